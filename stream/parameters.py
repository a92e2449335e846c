"""From layers of settings to a reconstruction: every value resolved or derived, and where it came from.

From ``Parameters`` on everything is Å, rad and eV.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from detectors.errors import ConfigurationError
from stream.config import MOST_ROWS, Layer, Settings
from stream.geometry import DetectorGeometry
from stream.kernels import METHODS
from stream.optics import ORIENTATIONS, Aberrations, AxesRelation, Probe, electron_wavelength
from stream.scan import ScanPattern
from stream.setup import Setup
from stream.snapshot import IMAGE_CHANNELS

#: py4DSTEM's default aperture roll-off.
DEFAULT_ROLLOFF_MRAD = 2.0


@dataclass(frozen=True)
class MeasuredDisk:
    """What the first frames told: the bright-field disk and the pixels that cannot be trusted."""

    centre_px: tuple[float, float]
    radius_px: float
    bad_pixels: np.ndarray
    frames: int


@dataclass(frozen=True)
class Parameters:
    """All settings, resolved: ``values`` by key in the user's units, ``sources`` where each came from.

    ``bad_pixels``: bool detector shape, the pixels that were found to be bad in the first frames, or None.
    """

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    bad_pixels: np.ndarray | None = None

    @property
    def probe(self) -> Probe:
        """The probe, in Å, rad and eV; its axes are those of the frames as sent."""
        value = self.values
        axes = AxesRelation(math.radians(value["rotation_deg"]), value["transpose"])
        return Probe(
            energy_ev=value["energy_kev"] * 1e3,
            semiangle=value["semiangle_mrad"] * 1e-3,
            rolloff=value["rolloff_mrad"] * 1e-3,
            aberrations=Aberrations.from_user(value["aberrations"]),
            axes=axes.flipped(*ORIENTATIONS[value["orientation"]]),
        )

    def setup(
        self, detector_shape: tuple[int, int], dtype: np.dtype, passes: int | None, sent_mask: np.ndarray | None = None
    ) -> Setup:
        """The reconstruction that these parameters describe.

        ``sent_mask``: bool ``detector_shape``, a mask that the stream or file brought along. Raises
        ``ConfigurationError``.
        """
        value = self.values
        path = value["pixel_mask"]
        good = good_pixels(detector_shape, sent_mask, None if path is None else Path(path))
        if self.bad_pixels is not None:
            good = good & ~self.bad_pixels
        geometry = DetectorGeometry(
            detector_shape, value["detector_pixel_mrad"], value["bf_centre_px"], value["semiangle_mrad"], good
        )
        scan = _scan_pattern(value)
        if value["rolloff_mrad"] > value["semiangle_mrad"]:
            raise ConfigurationError(
                f"rolloff_mrad {value['rolloff_mrad']} is wider than semiangle_mrad {value['semiangle_mrad']}"
            )
        return Setup(
            geometry,
            self.probe,
            scan,
            value["scan_step_angstrom"],
            dtype,
            METHODS[value["method"]],
            passes,
            value["averaging"],
            channels=frozenset(value["channels"]),
        )

    def as_toml(self) -> str:
        """A configuration file that says all of this again."""
        lines, tables = [], []
        for key, value in self.values.items():
            if key == "find_bad_pixels" and value is None and self.bad_pixels is not None and self.bad_pixels.any():
                value = True  # else a repetition, which knows the disk, would not look for them
            if key in ("pixel_mask", "positions") and value is not None:
                value = str(Path(value).absolute())
            if value is None or value == {}:
                continue
            if isinstance(value, Mapping):
                tables.append("\n".join([f"\n[{key}]", *(f"{name} = {_toml(item)}" for name, item in value.items())]))
            else:
                lines.append(f"{key} = {_toml(value)}  # {self.sources[key]}")
        return "\n".join([*lines, *tables, ""])


def _scan_pattern(value: Mapping[str, Any]) -> ScanPattern:
    return ScanPattern(
        value["scan_shape"],
        value["flyback_frames_per_row"],
        value["flyback_frames_per_pass"],
        value["serpentine"],
        None if value["positions"] is None else load_positions(Path(value["positions"])),
        value["start_offset"],
        value["row_starts"] == "time-gaps",
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


_DEFAULTS: dict[str, Any] = {
    "rotation_deg": 0.0,
    "transpose": False,
    "rolloff_mrad": DEFAULT_ROLLOFF_MRAD,
    "aberrations": {},
    "method": "ssb",
    "flyback_frames_per_row": 0,
    "flyback_frames_per_pass": 0,
    "serpentine": False,
    "start_offset": 0,
    "row_starts": "index",
    "orientation": "as-sent",
    "averaging": False,
    "channels": tuple(IMAGE_CHANNELS),
}


class Resolution:
    """The layers laid over each other, and what is still to be found.

    ``layers`` in order of precedence; ``frames``: how many the series announces, if it does. ``resolve`` derives the
    rest; before it, ``needs_disk`` says whether the first frames must be looked at.
    """

    def __init__(self, layers: Sequence[Layer], frames: int | None = None) -> None:
        self._layers, self._frames = tuple(layers), frames
        self._values: dict[str, Any] = {}
        self._sources: dict[str, str] = {}
        self.notes: list[str] = []
        for layer in layers:
            for key, value in layer.settings.given.items():
                if key not in self._values:
                    self._put(key, value, layer.source)
                elif not _same(self._values[key], value):
                    self.notes.append(
                        f"{key} is {_plain(value)} in the {layer.source}; {_plain(self._values[key])} from the "
                        f"{self._sources[key]} is used"
                    )
        self._derive_scan()
        self._derive()

    def _put(self, key: str, value: Any, source: str) -> None:
        self._values[key], self._sources[key] = value, source

    def _derive_scan(self) -> None:
        """What a line trigger tells: frames per trigger are the columns of the scan and the flyback after them."""
        have = self._values
        per_trigger = have.get("frames_per_trigger", 1)
        if per_trigger == 1 or "positions" in have:
            return
        source = f"frames_per_trigger of the {self._sources['frames_per_trigger']}"
        triggers = None if self._frames is None else (self._frames - have.get("start_offset", 0)) // per_trigger
        if "scan_shape" not in have:
            columns = per_trigger - have.get("flyback_frames_per_row", 0)
            if triggers is not None and 1 < triggers <= MOST_ROWS and 1 <= columns <= MOST_ROWS:
                self._put("scan_shape", (triggers, columns), f"derived from {source} and {self._frames} frames")
            return
        rows, columns = have["scan_shape"]
        if rows > 1 and per_trigger >= rows * columns:
            return  # a trigger for each pass
        flyback = per_trigger - columns
        if flyback >= 0 and "flyback_frames_per_row" not in have and (triggers is None or triggers >= rows):
            self._put("flyback_frames_per_row", flyback, f"derived from scan_shape and {source}")
        elif (counted := have.get("flyback_frames_per_row", 0)) != flyback:
            self.notes.append(
                f"the detector takes {per_trigger} frames for each trigger"
                + ("" if triggers is None else f" ({triggers} triggers)")
                + f", and each of the {rows} rows has {columns} positions and {counted} frames of flyback: "
                + ("each frame is taken for a position of its own" if flyback < 0 else "check scan_shape")
            )

    def _derive(self) -> None:
        """Whatever follows from what is known, without looking at frames."""
        have = self._values
        if "detector_pixel_mrad" not in have and {"detector_pixel_inv_angstrom", "energy_kev"} <= have.keys():
            wavelength = electron_wavelength(have["energy_kev"] * 1e3)
            pixel = tuple(float(p * wavelength * 1e3) for p in have["detector_pixel_inv_angstrom"])
            self._put("detector_pixel_mrad", pixel, f"{self._sources['detector_pixel_inv_angstrom']}, with energy_kev")
        radius = have.get("bf_radius_px")
        if radius is None and {"semiangle_mrad", "detector_pixel_mrad"} <= have.keys():
            radius = float(np.mean([have["semiangle_mrad"] / p for p in have["detector_pixel_mrad"]]))
            self._put("bf_radius_px", radius, "derived from semiangle_mrad and detector_pixel_mrad")
        elif radius is not None and "semiangle_mrad" in have and "detector_pixel_mrad" not in have:
            pixel = have["semiangle_mrad"] / radius
            self._put("detector_pixel_mrad", (pixel, pixel), "derived from bf_radius_px and semiangle_mrad")
        elif radius is not None and "detector_pixel_mrad" in have and "semiangle_mrad" not in have:
            semiangle = radius * float(np.mean(have["detector_pixel_mrad"]))
            self._put("semiangle_mrad", semiangle, "derived from bf_radius_px and detector_pixel_mrad")
        elif radius is not None and {"semiangle_mrad", "detector_pixel_mrad"} <= have.keys():
            implied = float(np.mean([have["semiangle_mrad"] / p for p in have["detector_pixel_mrad"]]))
            if abs(radius - implied) > 0.05 * implied and not self._sources["bf_radius_px"].startswith("measured"):
                self.notes.append(
                    f"bf_radius_px is {radius:g}, but semiangle_mrad and detector_pixel_mrad make it {implied:g}; "
                    "the latter are used"
                )

    def overlaid(self, layer: Layer) -> Resolution:
        """The same with one more layer on top."""
        return Resolution([layer, *self._layers], self._frames)

    @property
    def known(self) -> Mapping[str, Any]:
        """What is known so far, by key."""
        return self._values

    def scan_pattern(self) -> ScanPattern:
        """The scan alone, to arm a detector for it. Raises ``ConfigurationError``, also when it is not known."""
        if "scan_shape" not in self._values:
            raise ConfigurationError(
                "to arm the detector for a scan, its scan_shape must be known: --scan-shape 128x128"
            )
        return _scan_pattern({**dict.fromkeys(Settings.model_fields), **_DEFAULTS, **self._values})

    @property
    def needs_disk(self) -> bool:
        """Whether the bright-field disk (or the bad pixels) must be found in the first frames."""
        return (
            not {"bf_centre_px", "bf_radius_px"} <= self._values.keys() or self._values.get("find_bad_pixels") is True
        )

    def require(self) -> None:
        """Raise one ``ConfigurationError`` with every key that is missing and cannot come from the first frames."""
        have = self._values
        missing = [key for key in ("scan_shape", "energy_kev", "scan_step_angstrom") if key not in have]
        if "semiangle_mrad" not in have and "detector_pixel_mrad" not in have:
            missing += ["semiangle_mrad", "detector_pixel_mrad (or semiangle_mrad alone: the disk's radius gives it)"]
        if missing:
            flags = " ".join(f"--{key.split()[0].replace('_', '-')}" for key in missing)
            raise ConfigurationError(
                f"missing: {', '.join(missing)}; give them as flags ({flags}) or in a configuration file (--config)"
            )

    def resolve(self, disk: MeasuredDisk | None = None) -> Parameters:
        """All values. ``disk``: what was measured, where ``needs_disk``. Raises ``ConfigurationError``."""
        self.require()
        bad_pixels = None
        if disk is not None:
            source = f"measured in the first {disk.frames} frames"
            for key, value in (("bf_centre_px", disk.centre_px), ("bf_radius_px", disk.radius_px)):
                if key not in self._values:
                    self._put(key, value, source)
            self._derive()
            if self._values.get("find_bad_pixels") is not False:
                bad_pixels = disk.bad_pixels
        values = {key: self._values.get(key, _DEFAULTS.get(key)) for key in Settings.model_fields}
        if values["aberrations"]:
            values["aberrations"] = dict(values["aberrations"])
        sources = {key: self._sources.get(key, "default") for key in Settings.model_fields}
        return Parameters(values, sources, bad_pixels)


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(np.allclose(one, other))
    except TypeError:
        return bool(one == other)


def _plain(value: Any) -> str:
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return "x".join(map(str, value))
    return ",".join(value) if isinstance(value, tuple) and all(isinstance(v, str) for v in value) else str(value)


def load_pixel_mask(path: Path) -> np.ndarray:
    """A pixel mask, bool (detector rows, columns), True = good: from .npy or from an HDF5 dataset ``pixel_mask``."""
    try:
        if path.suffix == ".npy":
            mask = np.load(path, allow_pickle=False)
        else:
            with h5py.File(path) as file:
                mask = file["pixel_mask"][()]
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"cannot read the pixel mask {path}: {error}; expected .npy, or HDF5 with 'pixel_mask'"
        ) from None
    if mask.ndim != 2:
        raise ConfigurationError(f"the pixel mask {path} must have 2 dimensions, it has {mask.ndim}")
    return mask.astype(bool)


def good_pixels(detector_shape: tuple[int, int], sent_mask: np.ndarray | None, user_mask: Path | None) -> np.ndarray:
    """The pixels that both masks, as far as there are any, call good: bool ``detector_shape``.

    Raises ``ConfigurationError`` for masks of another shape, and when they leave no pixel.
    """
    good = np.ones(detector_shape, bool)
    for mask in (sent_mask, None if user_mask is None else load_pixel_mask(user_mask)):
        if mask is None:
            continue
        if mask.shape != detector_shape:
            raise ConfigurationError(
                f"the pixel mask has the shape {'x'.join(map(str, mask.shape))}, "
                f"the detector {detector_shape[0]}x{detector_shape[1]}"
            )
        good &= mask
    if not good.any():
        raise ConfigurationError("the pixel masks call every pixel bad; 1 = good, check --pixel-mask and the sent mask")
    return good


def load_positions(path: Path) -> np.ndarray:
    """A position table, int64 (frames, 2): from .npy or from text with two integers a line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # loadtxt only warns of a file without data
            table = (
                np.load(path, allow_pickle=False)
                if path.suffix == ".npy"
                else np.loadtxt(path, dtype=np.int64, ndmin=2)
            )
    except (OSError, EOFError, ValueError, UserWarning) as error:
        raise ConfigurationError(f"cannot read the position table {path}: {error}") from None
    return table.astype(np.int64) if np.issubdtype(table.dtype, np.integer) else table
