"""The result file: HDF5 with NeXus attributes, so that generic viewers plot it, and enough to do it all again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from detectors.errors import ConfigurationError, DataFileError
from stream.parameters import Parameters
from stream.setup import Setup
from stream.snapshot import IMAGE_UNITS, Counters, channels_without, left_out_sentence

#: Path in the file -> image over the scan positions.
_PLOTTED = {
    "phase": "phase",
    "amplitude": "amplitude",
    "virtual/bright_field": "bright_field",
    "virtual/dark_field": "dark_field",
}


def require_writable(path: Path) -> None:
    """Raise ``DataFileError`` when a file could not be written there: asked before the work, and not after it."""
    if not path.name or path.is_dir():
        raise DataFileError(f"cannot write {path}: it is a directory; name a file in it")
    # Folders are made for a file; the nearest one that is there decides.
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise DataFileError(f"cannot write {path}: {parent} is not a folder that can be written to")


@dataclass(frozen=True)
class Result:
    """A reconstruction, finished or not.

    ``object`` complex64 scan shape, dimensionless, mean 1, None where the phase is left out; ``images``: see
    ``stream.snapshot.IMAGE_UNITS``, float32, NaN where nothing came, without those that are left out;
    ``positions_received`` bool scan shape.
    """

    object: np.ndarray | None
    images: Mapping[str, np.ndarray]
    positions_received: np.ndarray
    parameters: Parameters
    setup: Setup
    counters: Counters
    source: str
    passes: int
    detector: Mapping[str, Any] = field(default_factory=dict)
    """what the stream or file told of its detector: name, firmware, exposure, thresholds, ..."""

    @property
    def phase(self) -> np.ndarray:
        """arg of the object [rad], float32 scan shape; NaN in rows that were not acquired.

        Raises ``ConfigurationError`` where the phase is left out.
        """
        if "phase" not in self.images:
            raise ConfigurationError(f"there is no phase; {left_out_sentence(self.channels_left_out)}")
        return self.images["phase"]

    @property
    def channels(self) -> tuple[str, ...]:
        """The channels of ``stream.snapshot.IMAGE_CHANNELS`` whose images were made."""
        return channels_without(self.channels_left_out)

    @property
    def channels_left_out(self) -> tuple[str, ...]:
        """Those whose images were not made, because they were not asked for."""
        return self.setup.left_out

    def save(self, path: str | Path) -> None:
        """Write the result file; an existing one is replaced once the new one is complete.

        Raises ``DataFileError`` when it cannot be written.
        """
        path = Path(path)
        require_writable(path)
        unfinished = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(unfinished, "w") as file:
                self._write(file)
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            raise DataFileError(f"cannot write the result {path}: {error.strerror or error}") from None

    def _write(self, file: Any) -> None:
        step = self.setup.scan_step
        file.attrs.update(
            {
                "NX_class": "NXroot",
                "default": "reconstruction",
                "creator": "liveptycho",
                "format": "liveptycho-result",
                "program_version": version("liveptycho"),
                "source": self.source,
            }
        )
        entry = file.create_group("reconstruction")
        entry.attrs["NX_class"] = "NXentry"
        what = f"{self.setup.method.name} reconstruction" if "phase" in self.images else "virtual images"
        entry["title"] = f"{what} of {self.source}"
        # The arrays themselves stand at the root, under plain names; the NXdata groups link to them.
        rows, columns = self.setup.scan.shape
        for axis, count, length in (("row", rows, step[0]), ("column", columns, step[1])):
            file[f"axes/{axis}"] = np.arange(count) * length
            file[f"axes/{axis}"].attrs["units"] = "angstrom"
        if self.object is not None:
            file["object"] = self.object
            file["object"].attrs["units"] = "1"
        scan_axes = ["row", "column"]
        for path, image in _PLOTTED.items():
            if image in self.images:
                file[path] = self.images[image]
                file[path].attrs["units"] = IMAGE_UNITS[image]
                _plot(file, entry, image, path, scan_axes)
        if {"com_row", "com_column"} <= self.images.keys():
            file["com"] = np.stack([self.images["com_row"], self.images["com_column"]])
            file["com"].attrs.update(
                {"units": "mrad", "components": ["row", "column"], "frame": "scan axes, relative to bf_centre_px"}
            )
            _plot(file, entry, "com", "com", [".", *scan_axes])
        if "mean_pattern" in self.images:
            file["mean_pattern"] = self.images["mean_pattern"]
            file["mean_pattern"].attrs["units"] = "counts/frame"
            _plot(file, entry, "mean_pattern", "mean_pattern", [".", "."])
        file["positions_received"] = self.positions_received
        file["pixel_mask"] = self.setup.geometry.good.astype(np.uint8)
        file["pixel_mask"].attrs["meaning"] = "1 = good"
        for group in {"virtual", "axes"} & file.keys():
            file[group].attrs["NX_class"] = "NXcollection"
        file.attrs.update(self._attributes())

    def _attributes(self) -> dict[str, Any]:
        values = {
            key: np.nan if value is None else json.dumps(value) if isinstance(value, Mapping) else value
            for key, value in self.parameters.values.items()
        }
        out: dict[str, Any] = {
            key: value for key, value in values.items() if not (isinstance(value, float) and np.isnan(value))
        }
        out.update({f"C_{symbol}": number for symbol, number in self.parameters.values["aberrations"].items()})
        out["wavelength_angstrom"] = self.setup.probe.wavelength
        out["mean_frames_per_position"] = float(self.passes) if self.setup.averaging else 1.0
        out["passes"] = self.passes
        out.update({f"frames_{name}": count for name, count in self.counters.as_dict().items()})
        out["detector"] = json.dumps(dict(self.detector), default=str)
        out["channels_left_out"] = ",".join(self.channels_left_out)
        out["sources"] = json.dumps(dict(self.parameters.sources))
        out["configuration"] = self.parameters.as_toml()
        return out


def _plot(file: Any, entry: Any, name: str, path: str, axes: list[str]) -> None:
    """An NXdata group for the image at ``path``, so that a viewer plots it with its axes; the first is the default."""
    data = entry.create_group(name)
    data.attrs.update({"NX_class": "NXdata", "signal": name, "axes": axes})
    data[name] = file[path]
    for axis in set(axes) - {"."}:
        data[axis] = file[f"axes/{axis}"]
    if "default" not in entry.attrs:
        entry.attrs["default"] = name


def is_result(path: Path) -> bool:
    """Whether ``path`` is a result file of this program. Never raises."""
    try:
        with h5py.File(path) as file:
            return bool(file.attrs.get("format") == "liveptycho-result")
    except OSError:
        return False


def describe_result(path: Path) -> list[tuple[str, str]]:
    """What a result file holds, as (label, text) rows. Raises ``DataFileError``."""
    try:
        with h5py.File(path) as file:
            rows = [("file", str(path)), ("layout", "liveptycho result")]
            if left_out := str(file.attrs.get("channels_left_out", "")):
                rows.append(("images", left_out_sentence(left_out.split(","))))
            there = {**file, **{f"virtual/{name}": item for name, item in file.get("virtual", {}).items()}}
            rows += [
                (name, f"{item.dtype.name} {item.shape}")
                for name, item in there.items()
                if isinstance(item, h5py.Dataset)
            ]
            rows += [
                (key, ", ".join(map(str, value)) if key == "channels" else str(value))
                for key, value in file.attrs.items()
                if key not in ("NX_class", "default", "creator", "format", "sources", "channels_left_out")
            ]
            return rows
    except OSError as error:
        raise DataFileError(f"{path}: the result cannot be read ({error})") from None
