"""Files of other programs, through RosettaSciIO (the optional extra ``liveptycho[files]``).

Only readers that make do without evaluating or unpickling what is in the file are used. Arrays are read lazily where
RosettaSciIO can. Its own reader of ``.mib`` turns the frames upside down; ours comes first and does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detectors.errors import DataFileError
from stream.files.dataset import ArrayFrames, by
from stream.files.units import ANGLES, LENGTHS, UNCALIBRATED, detector_pixel, spelled

#: Suffix -> RosettaSciIO's reader.
READERS = {
    ".blo": "blockfile",
    ".hspy": "hspy",
    ".zspy": "zspy",
    ".xml": "empad",
    ".emd": "emd",
    ".de5": "emd",
    ".tvips": "tvips",
    ".mrc": "mrc",
    ".ali": "mrc",
    ".dm3": "digitalmicrograph",
    ".dm4": "digitalmicrograph",
    ".nxs": "nexus",
    ".rpl": "ripple",
    ".ser": "tia",
    ".emi": "tia",
    ".app5": "topspin",
    ".tif": "tiff",
    ".tiff": "tiff",
}
#: What to do where it is missing.
INSTALL = "pip install 'liveptycho[files]'"


def is_installed() -> bool:
    """Whether RosettaSciIO is there."""
    return importlib.util.find_spec("rsciio") is not None


def open_foreign(path: Path, dataset: str | None = None) -> ArrayFrames:
    """Read a file through RosettaSciIO. ``dataset``: the title of the signal, where a file holds several.

    Raises ``DataFileError`` when the kind of file is not known, RosettaSciIO or what it needs is not installed, or it
    cannot read the file.
    """
    path = _empad_description(path)
    name = READERS.get(path.suffix.lower())
    if name is None:
        raise DataFileError(
            f"{path}: this kind of file is not known; HDF5, .npy, .mib and {', '.join(READERS)} can be read"
        )
    if not is_installed():
        raise DataFileError(
            f"{path}: reading {path.suffix} files needs RosettaSciIO, which is not installed: {INSTALL}"
        )
    signals, told = _read(path, name)
    signal = _chosen(path, signals, dataset)
    settings, notes = _calibration(signal)
    return ArrayFrames(
        path,
        _raster(path, signal),
        layout=f"{path.suffix} (RosettaSciIO {name})",
        settings=settings,
        notes=(*told, *notes),
    )


def _empad_description(path: Path) -> Path:
    """The ``.xml`` file that describes an EMPAD ``.raw`` file; any other path as it is."""
    if path.suffix.lower() != ".raw":
        return path
    beside = sorted(path.parent.glob("*.xml"))
    fitting = [xml for xml in beside if path.name.encode() in xml.read_bytes()] or beside
    if len(fitting) != 1:
        raise DataFileError(
            f"{path}: a .raw file is read by way of its description, EMPAD's .xml, of which {len(fitting)} lie beside "
            "it; name the .xml instead, or convert the file to .npy"
        )
    return fitting[0]


def _read(path: Path, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What RosettaSciIO finds, and what it had to say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            reader = importlib.import_module(f"rsciio.{name}").file_reader
            try:
                signals = reader(str(path), lazy=True)
            except NotImplementedError:
                signals = reader(str(path), lazy=False)
        except FileNotFoundError as error:
            raise DataFileError(f"{path}: {error.strerror or error}: {error.filename or 'a file'} is missing") from None
        except ImportError as error:
            raise DataFileError(
                f"{path}: RosettaSciIO lacks what it needs for {path.suffix} files ({error}); install that: "
                f"pip install 'rosettasciio[{name}]', or all it can use: pip install 'rosettasciio[all]'"
            ) from None
        except Exception as error:  # a foreign reader, and a file of which nothing is known
            raise DataFileError(
                f"{path}: RosettaSciIO cannot read it as {name} ({type(error).__name__}: {error}); it is damaged or "
                "something else, try to convert it with the program that wrote it"
            ) from error
    ours = [str(warning.message) for warning in caught if not issubclass(warning.category, DeprecationWarning)]
    return list(signals), [" ".join(text.split()) for text in dict.fromkeys(ours)]


def _chosen(path: Path, signals: list[dict[str, Any]], dataset: str | None) -> dict[str, Any]:
    def title(signal: Mapping[str, Any]) -> str:
        return str(_entry(signal, "General.title") or "untitled")

    usable = [s for s in signals if s["data"].ndim in (3, 4)]
    usable = [s for s in usable if s["data"].ndim == 4] or usable
    listing = ", ".join(f"{title(s)!r} ({by(s['data'].shape)})" for s in usable or signals) or "nothing"
    if dataset is not None:
        usable = [s for s in usable if title(s) == dataset]
    if len(usable) != 1:
        raise DataFileError(
            f"{path}: one series of frames was expected, with 4 or 3 axes; the file has {listing}"
            + ("; choose one with --dataset" if len(usable) > 1 else "")
        )
    return usable[0]


def _axes(signal: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The numbers of the scan's axes and of the detector's, each in the order (row, column)."""
    axes = signal.get("axes") or []
    ndim = signal["data"].ndim
    scan = [i for i, axis in enumerate(axes[:ndim]) if axis.get("navigate")]
    detector = [i for i in range(ndim) if i not in scan]
    return (scan, detector) if len(detector) == 2 else (list(range(ndim - 2)), [ndim - 2, ndim - 1])


def _raster(path: Path, signal: Mapping[str, Any]) -> Any:
    """The array as (scan rows, scan columns, detector rows, detector columns), still to be read."""
    scan, detector = _axes(signal)
    data = signal["data"]
    if data.dtype.fields:
        raise DataFileError(f"{path}: the frames have pixels of several components ({data.dtype}); convert them")
    return data if [*scan, *detector] == list(range(data.ndim)) else data.transpose(*scan, *detector)


def _calibration(signal: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings and notes from the axes and the metadata."""
    settings: dict[str, Any] = {}
    notes: list[str] = []
    energy = _positive(_entry(signal, "Acquisition_instrument.TEM.beam_energy"))
    if energy is not None:
        settings["energy_kev"] = energy
    if (angle := _positive(_entry(signal, "Acquisition_instrument.TEM.convergence_angle"))) is not None:
        settings["semiangle_mrad"] = angle
    axes = signal.get("axes") or []
    for kind, numbers in zip(("scan", "detector"), _axes(signal), strict=True):
        if len(numbers) != 2 or max(numbers) >= len(axes):
            continue
        steps = [_positive(abs(float(axes[i].get("scale") or 0.0))) for i in numbers]
        units = {re.sub(r"[*·]", "", spelled(str(axes[i].get("units") or ""))) for i in numbers}
        unit = units.pop() if len(units) == 1 else "of two kinds"
        if None in steps or unit in UNCALIBRATED:
            continue
        known: Mapping[str, Any] = LENGTHS if kind == "scan" else ANGLES
        if unit not in known:
            notes.append(f"the {kind} axes have a step of {steps[0]:g}, {steps[1]:g} in the unit {unit!r}: not used")
        elif kind == "scan":
            settings["scan_step_angstrom"] = [step * LENGTHS[unit] for step in steps if step]
        else:
            target, factor = ANGLES[unit]
            settings |= detector_pixel([step * factor for step in steps if step], target, energy)
    return settings, notes


def _entry(signal: Mapping[str, Any], name: str) -> Any:
    value: Any = signal.get("metadata") or {}
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _positive(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None
