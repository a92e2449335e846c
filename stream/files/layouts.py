"""``open_dataset``: what kind of file it is, and which dataset of an HDF5 file holds the frames."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import h5py

from detectors.errors import DataFileError
from stream.files import emd, foreign, own
from stream.files.dataset import Dataset4D
from stream.files.dectris import DectrisFrames, is_dectris
from stream.files.hdf5 import HDF5_ERRORS, array_datasets, explained, listing, open_file, reason
from stream.files.mib import MibFrames, is_mib
from stream.files.npy import MAGIC as NPY_MAGIC
from stream.files.npy import open_npy
from stream.files.one_dataset import HDF5Frames
from stream.files.units import decoded

#: HDF5 files of other programs: RosettaSciIO is asked about those in which nothing of ours is found.
_FOREIGN_HDF5 = (".emd", ".de5", ".hspy", ".nxs")


def open_dataset(path: str | PathLike[str], dataset: str | None = None) -> Dataset4D:
    """Open a file of 4D-STEM frames, recognised by its content.

    ``path``: HDF5 (liveptycho's own layout: ``data`` with the calibration as root attributes; DECTRIS master and data
    files; EMD and py4DSTEM; any other), Merlin's ``.mib``, ``.npy``, or what RosettaSciIO reads (see
    ``stream.files.foreign``). ``dataset``: path of the frames inside an HDF5 file, needed only where it leaves a
    choice: 4-D (scan rows, scan columns, detector rows, detector columns) or 3-D (frames, detector rows, detector
    columns). Without it the one 4-D dataset is taken, or else the one 3-D dataset. In DECTRIS files with several
    thresholds it is the one to read, by name or number from 1 (by default all); elsewhere the title of a signal.
    The caller closes the result. Raises ``DataFileError``, also for a calibration that is not a finite number.
    """
    path = Path(path)
    if path.suffix.lower() == ".zspy" and path.is_dir():
        return foreign.open_foreign(path, dataset)
    beginning = _beginning(path)  # where nothing can be read, open_file says why
    if is_mib(beginning):
        return MibFrames(path)
    if beginning.startswith(NPY_MAGIC):
        return open_npy(path)
    if beginning and path.suffix.lower() not in ("", ".h5", ".hdf5", *_FOREIGN_HDF5) and not h5py.is_hdf5(path):
        return foreign.open_foreign(path, dataset)
    file = open_file(path)
    try:
        with explained(path, "reading the file's structure"):
            if is_dectris(file) and (dataset is None or "/" not in dataset):
                frames = DectrisFrames(path, file, dataset)
                file.close()
                return frames
            notes = _foreign_notes(path, file)
            if notes is None:
                file.close()
                return foreign.open_foreign(path, dataset)
            return _one(path, file, dataset, notes)
    except DataFileError:
        file.close()
        if dataset is None and path.suffix.lower() in _FOREIGN_HDF5 and foreign.is_installed():
            try:
                return foreign.open_foreign(path)
            except DataFileError:
                pass  # what we had to say ourselves is the better advice
        raise
    except BaseException:
        file.close()
        raise


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError:
        return b""


def _foreign_notes(path: Path, file: Any) -> tuple[str, ...] | None:
    """None for an HDF5 file that RosettaSciIO is to read, else what to say of its calibration."""
    if "Data/Image" in file and path.suffix.lower() == ".emd":  # Velox: the frames are the last axis
        return None
    if decoded(file.attrs.get("file_format")) != "HyperSpy":
        return ()
    if foreign.is_installed():
        return None
    return ("the calibration of HyperSpy files is read by RosettaSciIO, which is not installed: " + foreign.INSTALL,)


def _one(path: Path, file: Any, dataset: str | None, notes: tuple[str, ...]) -> HDF5Frames:
    """The one dataset of an HDF5 file that is asked for, or that holds frames, with its calibration."""
    data = _named(path, file, dataset) if dataset is not None else _only(path, file)
    if data.parent == file and own.has_calibration(file):
        settings, mask, notes = own.calibration(path, file, tuple(data.shape or ())[-2:])
        return HDF5Frames(path, file, data, layout=own.LAYOUT, settings=settings, pixel_mask=mask, notes=notes)
    if (layout := emd.layout_of(data)) is not None:
        settings, notes = emd.calibration(path, data)
        return HDF5Frames(path, file, data, layout=layout, settings=settings, notes=notes)
    return HDF5Frames(path, file, data, layout="HDF5 dataset", notes=notes)


def _named(path: Path, file: Any, name: str) -> Any:
    candidates = f"it has {listing(array_datasets(file)) or 'none with three or four dimensions'}"
    try:
        item = file[name]
    except HDF5_ERRORS as error:
        missing = name.strip("/") not in file
        why = "has no dataset" if missing else f"cannot open ({reason(error)})"
        raise DataFileError(f"{path}: the file {why} {name!r}; {candidates}") from None
    if isinstance(item, h5py.Group) and isinstance(item.get("data"), h5py.Dataset):
        item = item["data"]
    if not isinstance(item, h5py.Dataset):
        raise DataFileError(f"{path}: {name!r} is a group, a dataset was expected; {candidates}")
    if item.shape is not None and item.ndim not in (3, 4):
        raise DataFileError(
            f"{path}: dataset {item.name} has {item.ndim} dimensions, 4 (scan rows, scan columns, detector rows, "
            f"detector columns) or 3 (frames, rows, columns) were expected; {candidates}"
        )
    return item


def _only(path: Path, file: Any) -> Any:
    found = array_datasets(file)
    choice = [d for d in found if d.ndim == 4] or [d for d in found if d.ndim == 3]
    if len(choice) > 1:
        # A layout that names its frames decides between several: the own one first, then EMD's data cube.
        ours = [d for d in choice if d.name == "/data" and own.has_calibration(file)]
        cubes = [d for d in choice if emd.layout_of(d) is not None]
        choice = ours or (cubes if len(cubes) == 1 else choice)
    if len(choice) == 1:
        return choice[0]
    if not choice:
        raise DataFileError(
            f"{path}: a 4-D dataset (scan rows, scan columns, detector rows, detector columns) was expected, the file "
            "has none; check that it is the raw data and not a result"
        )
    raise DataFileError(
        f"{path}: one {choice[0].ndim}-D dataset was expected, there are {len(choice)}: {listing(choice)}; choose one "
        "with --dataset"
    )
