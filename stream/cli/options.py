"""Settings as command-line flags: one table, shared by every command that reconstructs or describes optics."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from detectors.errors import ConfigurationError
from detectors.protocols.registry import PROTOCOLS
from stream.config import Layer
from stream.optics import ORIENTATIONS
from stream.snapshot import IMAGE_CHANNELS

_PANEL = "Optics and calibration (flags win over --config, that wins over the stream or file)"

#: flag -> (type, help). The keys are those of ``stream.config.Settings``.
_FLAGS: dict[str, tuple[Any, str]] = {
    "scan_shape": (str, "Scan positions as ROWSxCOLUMNS, for example 128x128."),
    "energy_kev": (float, "Electron energy [keV]."),
    "semiangle_mrad": (float, "Convergence semi-angle [mrad]."),
    "scan_step_angstrom": (str, "Distance of scan positions [Å]: one number, or ROW,COLUMN."),
    "detector_pixel_mrad": (
        str,
        "Angle of a detector pixel [mrad]: one number, or ROW,COLUMN. Else from the disk's radius.",
    ),
    "rotation_deg": (float, "Rotation of scan against detector axes [degrees], as py4DSTEM's force_com_rotation."),
    "transpose": (bool, "The detector axes are swapped."),
    "rolloff_mrad": (float, "Width of the aperture's soft edge [mrad]; default 2."),
    "aberrations": (
        str,
        "For example C10=-100,C12=20,phi12=30 [Å, degrees]; C10 = -defocus. Replaces those of lower precedence.",
    ),
    "bf_centre_px": (str, "Centre of the bright-field disk, ROW,COLUMN [pixels]. Else found in the first frames."),
    "bf_radius_px": (float, "Radius of the bright-field disk [pixels]."),
    "pixel_mask": (str, "File with the pixel mask, 1 = good: .npy, or HDF5 with 'pixel_mask'."),
    "find_bad_pixels": (bool, "Look for hot and dead pixels in the first frames and mask them."),
    "method": (str, "ssb (both sidebands, aberrations corrected) or ssb-single (one sideband, the textbook form)."),
    "flyback_frames_per_row": (int, "Frames after each scan row that belong to no position."),
    "flyback_frames_per_pass": (int, "Frames after each pass that belong to no position."),
    "serpentine": (bool, "Every second scan row runs backwards."),
    "positions": (str, "File (.npy or text) with the row and column of each frame, negative for none."),
    "start_offset": (
        int,
        "Frames before the first position (prescan rows, a trigger too many), once a series. Below 0: so many "
        "positions come before the first frame.",
    ),
    "frames_per_trigger": (int, "Frames that the detector takes for each trigger of a line trigger, flyback included."),
    "row_starts": (str, "index: rows are counted from frame numbers (default). time-gaps: a pause in the exposures."),
    "orientation": (str, f"How the detector's frames lie: {', '.join(ORIENTATIONS)}."),
    "channel": (
        str,
        "Of a detector with several energy thresholds: the threshold to reconstruct, by its name in the stream, or A-B "
        "for a difference of two. Which images are made: see --channels.",
    ),
    "channels": (
        str,
        f"Which images are made, for example phase,bf: some of {', '.join(IMAGE_CHANNELS)}; default all. What is left "
        "out is not computed. Which threshold of the detector is taken: see --channel.",
    ),
    "averaging": (bool, "Average the passes instead of letting the newest replace the others."),
}


def parse_aberrations(text: str) -> dict[str, float]:
    """``"C10=-100,C12=20,phi12=30"`` as a map. Raises ``ConfigurationError``."""
    out = {}
    for item in filter(None, text.replace(" ", ",").split(",")):
        name, equals, value = item.partition("=")
        try:
            out[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigurationError(f"aberrations are written C10=-100,C12=20,phi12=30; cannot read {item!r}")
    return out


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command every settings flag and ``--config``; it receives them as ``layers``, a list of ``Layer``."""

    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> Any:
        values = {key: kwargs.pop(key) for key in _FLAGS}
        config: Path | None = kwargs.pop("config")
        if values["aberrations"] is not None:
            values["aberrations"] = parse_aberrations(values["aberrations"])
        layers = [Layer.of("flag", values)]
        if config is not None:
            layers.append(Layer.from_toml(config))
        return command(layers=layers, **kwargs)

    parameters = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "layers"]
    config = Annotated[
        Path | None,
        typer.Option(help="TOML file with the same keys (scan_shape, energy_kev, ...).", rich_help_panel=_PANEL),
    ]
    parameters.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config))
    for key, (kind, text) in _FLAGS.items():
        annotation = Annotated[kind | None, typer.Option(help=escape(text), rich_help_panel=_PANEL)]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def parse_passes(passes: int | None, unset: int) -> int | None:
    """``--passes``: 0 is for ever (None); ``unset`` is what a command takes when the flag is not given."""
    if passes is not None and passes < 0:
        raise ConfigurationError(f"--passes must be at least 1, or 0 for ever; got {passes}")
    return unset if passes is None else passes or None


def parse_positive(text: str, what: str) -> float | None:
    """A positive number, or None for ``max``. ``what`` begins the error for anything else."""
    if text == "max":
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigurationError(f"{what} or 'max', got {text!r}")
    return number


Device = Annotated[str, typer.Option(help="Where to compute: auto (a GPU if there is one), cpu or gpu.")]
Protocol = Annotated[str, typer.Option(help=f"What the detector speaks: {', '.join(PROTOCOLS)} (docs/detectors.md).")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads for decoding and for computing, each. (default: all cores)")
]
