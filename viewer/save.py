"""What is on the screen, to disk: the window as PNG and the snapshot as HDF5. No Qt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py

from detectors.errors import DataFileError
from stream.snapshot import IMAGE_UNITS, Snapshot


def save_pair(folder: Path, snapshot: Snapshot, save_picture: Callable[[Path], bool]) -> tuple[Path, Path]:
    """Write ``liveptycho-<time>.png`` with ``save_picture(path)`` and ``.h5`` with the data; returns both paths.

    A name that exists is never overwritten. Raises ``DataFileError`` with a sentence when writing fails.
    """
    stem = _free_stem(folder, datetime.fromtimestamp(snapshot.time_s).strftime("liveptycho-%Y%m%d-%H%M%S"))
    picture, data = folder / f"{stem}.png", folder / f"{stem}.h5"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_data(data, snapshot)
        if not save_picture(picture):
            raise OSError("the PNG could not be written")
    except OSError as error:
        raise DataFileError(f"cannot save to {folder}: {error}; start the viewer in another folder") from error
    return picture, data


def save_data(path: Path, snapshot: Snapshot) -> None:
    """Every image as a dataset with its ``unit``; all other fields as attributes of the file, None left out."""
    with h5py.File(path, "w") as file:
        for name, image in snapshot.images.items():
            dataset = file.create_dataset(name, data=image, compression="gzip", compression_opts=1)
            dataset.attrs["unit"] = IMAGE_UNITS[name]
        for name, value in metadata(snapshot).items():
            if value is not None:
                file.attrs[name] = json.dumps(value) if isinstance(value, dict) else value


def metadata(snapshot: Snapshot) -> dict[str, Any]:
    """All fields of a snapshot but its images."""
    fields = {name: getattr(snapshot, name) for name in Snapshot.__dataclass_fields__ if name != "images"}
    return fields | {
        "counters": asdict(snapshot.counters),
        "aberrations": dict(snapshot.aberrations),
        "left_out": ",".join(snapshot.left_out),
    }


def _free_stem(folder: Path, stem: str) -> str:
    taken = {path.stem for path in folder.glob(f"{stem}*")}
    return next(name for n in range(len(taken) + 1) if (name := f"{stem}-{n}" if n else stem) not in taken)
