"""Settings: what a user, a file or a stream may say about a scan, validated, with its source in words.

They come in layers: command-line flags, then a TOML file, then what the stream or data file says of itself. Keys carry
their unit. ``stream.parameters`` lays the layers over each other.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from detectors.errors import ConfigurationError
from stream.kernels import method_named
from stream.optics import ORIENTATIONS, Aberrations
from stream.snapshot import IMAGE_CHANNELS


def parse_shape(text: str) -> tuple[int, int]:
    """``"128x64"`` as (rows, columns). Raises ``ConfigurationError`` for anything else."""
    rows, cross, columns = text.lower().replace("×", "x").partition("x")
    if not (cross and rows.strip().isdecimal() and columns.strip().isdecimal()):
        raise ConfigurationError(f"a shape is written ROWSxCOLUMNS, for example 128x128; got {text!r}")
    return int(rows), int(columns)


def _pair(value: Any) -> Any:
    """One number stands for both axes; a text is split at commas, as it comes from a flag."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(value) * 2 if len(value) == 1 else tuple(value)
    return (value, value)


def _shape(value: Any) -> Any:
    if isinstance(value, str):
        return parse_shape(value)
    return tuple(value) if isinstance(value, (list, tuple, np.ndarray)) else value


def _image_channels(value: Any) -> tuple[str, ...]:
    """Names of image channels in their usual order; a text is split at commas, as it comes from a flag."""
    names = value.split(",") if isinstance(value, str) else value
    if isinstance(names, (list, tuple, set, frozenset)):
        wanted = [name.strip() if isinstance(name, str) else name for name in names]
        if wanted and len(set(wanted)) == len(wanted) and set(wanted) <= IMAGE_CHANNELS.keys():
            return tuple(name for name in IMAGE_CHANNELS if name in wanted)
    raise ConfigurationError(
        f"channels are the images to be made: one or more of {', '.join(IMAGE_CHANNELS)}, each once, for example "
        f"phase,bf; got {value!r} (one of a detector's thresholds is chosen with channel, without s)"
    )


def _number(low: float, high: float) -> Any:
    return Annotated[FiniteFloat, Field(ge=low, le=high)]


def _two(low: float, high: float) -> Any:
    return Annotated[tuple[_number(low, high), _number(low, high)], BeforeValidator(_pair)]  # type: ignore[misc]


#: Most rows, and most columns, of a scan.
MOST_ROWS = 65536

_Count = Annotated[int, Field(ge=1, le=MOST_ROWS)]


class Settings(BaseModel):
    """Every key that flags, TOML files and streams may set. None means: not said here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scan_shape: Annotated[tuple[_Count, _Count], BeforeValidator(_shape)] | None = None
    """(rows, columns) of the scan; in text ``128x128``"""
    energy_kev: _number(1, 5000) | None = None  # type: ignore[valid-type]
    """kinetic energy of the electrons [keV]"""
    semiangle_mrad: _number(0.01, 500) | None = None  # type: ignore[valid-type]
    """convergence semi-angle [mrad]"""
    scan_step_angstrom: _two(1e-4, 1e5) | None = None  # type: ignore[valid-type]
    """distance of scan positions [Å]: one number, or (row, column)"""
    detector_pixel_mrad: _two(1e-5, 100) | None = None  # type: ignore[valid-type]
    """angle of a detector pixel [mrad]: one number, or (row, column)"""
    detector_pixel_inv_angstrom: _two(1e-7, 100) | None = None  # type: ignore[valid-type]
    """the same as a spatial frequency [1/Å], for files that do not know the energy"""
    rotation_deg: _number(-720, 720) | None = None  # type: ignore[valid-type]
    """rotation of scan against detector axes [degrees], as py4DSTEM's force_com_rotation"""
    transpose: bool | None = None
    """whether the detector axes are swapped"""
    rolloff_mrad: _number(0, 100) | None = None  # type: ignore[valid-type]
    """width of the aperture's soft edge [mrad]"""
    aberrations: dict[str, FiniteFloat] | None = None
    """C10, C12, phi12, ... [Å, degrees]; C10 = -defocus"""
    bf_centre_px: _two(-1e5, 1e5) | None = None  # type: ignore[valid-type]
    """centre of the bright-field disk (row, column) [pixels]"""
    bf_radius_px: _number(0.5, 1e5) | None = None  # type: ignore[valid-type]
    """radius of the bright-field disk [pixels]"""
    pixel_mask: str | None = None
    """file with the detector's pixel mask, 1 = good: .npy, or HDF5 with a dataset ``pixel_mask``"""
    find_bad_pixels: bool | None = None
    """look for hot and dead pixels in the first frames and mask them; by default only when the disk is searched too"""
    method: str | None = None
    """``ssb`` or ``ssb-single``"""
    flyback_frames_per_row: Annotated[int, Field(ge=0, le=65536)] | None = None
    flyback_frames_per_pass: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    serpentine: bool | None = None
    """every second scan row runs backwards"""
    positions: str | None = None
    """file (.npy or text) with the (row, column) of each frame, negative for none; instead of a raster"""
    start_offset: Annotated[int, Field(ge=-(1 << 40), le=1 << 40)] | None = None
    """frames before the first position, once a series; below 0: positions before the first frame"""
    frames_per_trigger: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    """frames that the detector takes for each trigger; several: a line trigger, that is as many for each row"""
    row_starts: Literal["index", "time-gaps"] | None = None
    """``index``: rows follow from the frames' numbers; ``time-gaps``: from pauses between the exposures"""
    orientation: Literal[tuple(ORIENTATIONS)] | None = None  # type: ignore[valid-type]
    """how the frames as sent lie on the detector: see ``stream.optics.ORIENTATIONS``"""
    channel: str | None = None
    """of several thresholds the one to reconstruct, by its name in the stream; ``A-B`` for a difference of two"""
    channels: Annotated[tuple[str, ...], BeforeValidator(_image_channels)] | None = None
    """the images to be made: names of ``stream.snapshot.IMAGE_CHANNELS``; in text ``phase,bf``. None: all of them"""
    averaging: bool | None = None
    """average the passes instead of letting the newest replace the others"""

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are set here."""
        return {key: value for key, value in self if value is not None}


@dataclass(frozen=True)
class Layer:
    """Settings and where they came from, in words for the user: ``flag``, ``config file scan.toml``, ``stream``."""

    source: str
    settings: Settings

    @classmethod
    def of(cls, source: str, values: Mapping[str, Any], *, ignore_unknown: bool = False) -> Layer:
        """Validate ``values``. Raises ``ConfigurationError`` that names the source, the key and what was expected.

        ``ignore_unknown`` is for streams and files, which may say more than concerns us.
        """
        known = {key: value for key, value in values.items() if value is not None}
        if ignore_unknown:
            known = {key: value for key, value in known.items() if key in Settings.model_fields}
        try:
            settings = Settings.model_validate(known)
        except ConfigurationError as error:
            raise ConfigurationError(f"{source}: {error}") from None
        except (ValidationError, TypeError) as error:
            raise ConfigurationError(f"{source}: {_sentence(error)}") from None
        if settings.aberrations is not None:
            try:
                Aberrations.from_user(settings.aberrations)
            except ConfigurationError as error:
                raise ConfigurationError(f"{source}: {error}") from None
        if settings.method is not None:
            try:
                method_named(settings.method)
            except ConfigurationError as error:
                raise ConfigurationError(f"{source}: {error}") from None
        return cls(source, settings)

    @classmethod
    def from_toml(cls, path: Path) -> Layer:
        """Read a configuration file; file names in it are relative to it."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError(f"cannot read the configuration file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} is not a TOML file: {error}") from None
        for key in ("pixel_mask", "positions"):
            if isinstance(values.get(key), str):
                values[key] = str(path.parent / values[key])
        return cls.of(f"config file {path.name}", values)


def _sentence(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    parts = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"] if isinstance(part, str))
        if detail["type"] == "extra_forbidden":
            parts.append(f"unknown key {key!r}; known are {', '.join(Settings.model_fields)}")
        else:
            parts.append(f"{key}: {detail['msg'][:1].lower()}{detail['msg'][1:]}, got {detail['input']!r}")
    return "; ".join(parts)
