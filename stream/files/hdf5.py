"""HDF5 at the edge: opening a file, finding its datasets, reading its numbers, and saying clearly what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  - importing it registers the compression filters that detectors use
import numpy as np

from detectors.errors import DataFileError

#: h5py raises these for whatever the HDF5 library could not do; which one depends on the call, not on the cause.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)


def reason(error: BaseException) -> str:
    """An h5py error as a few words on one line."""
    # The text of a KeyError is its argument in quotes.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join(text.split()) or "no reason given"


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn h5py's exceptions into a ``DataFileError`` that says what was being done."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise DataFileError(
            f"{path}: {doing} failed ({reason(error)}); the file is damaged or incomplete, copy it again"
        ) from error


def open_file(path: Path) -> Any:
    """Open ``path`` for reading and return the ``h5py.File``.

    Raises ``DataFileError`` when it is missing, a directory, not readable, not HDF5, truncated, or locked by a writer.
    """
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise DataFileError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataFileError(f"{path}: an HDF5 file was expected, this is a directory; name one file in it") from None
    except PermissionError:
        raise DataFileError(f"{path}: reading is not permitted; change its permissions or copy it") from None
    except OSError as error:
        raise DataFileError(f"{path}: it cannot be read ({error.strerror}); check the disk or the network") from None
    if not h5py.is_hdf5(path):
        raise DataFileError(
            f"{path}: an HDF5 file was expected, this is something else; convert it first, e.g. with RosettaSciIO or "
            "py4DSTEM"
        )
    try:
        return h5py.File(path, "r")
    except BlockingIOError:
        raise DataFileError(f"{path}: another program is writing this file; wait until it is closed") from None
    except HDF5_ERRORS as error:
        raise DataFileError(
            f"{path}: a complete HDF5 file was expected, this one is truncated or damaged ({reason(error)}); copy it "
            "again"
        ) from error


def array_datasets(file: Any) -> list[Any]:
    """Every dataset with three or more dimensions, in the file's order. Links to other files are not followed."""
    found: list[Any] = []

    def visit(_name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None and item.ndim >= 3:
            found.append(item)

    file.visititems(visit)
    return found


def listing(datasets: Sequence[Any]) -> str:
    """Datasets as ``/path (6x5x16x16 uint16)``, comma-separated, at most a dozen of them."""
    shown = [f"{d.name} ({'x'.join(map(str, d.shape))} {d.dtype})" for d in datasets[:12]]
    return ", ".join([*shown, f"and {len(datasets) - 12} more"] if len(datasets) > 12 else shown)


def attribute(item: Any, name: str, path: Path) -> Any:
    """The value of an attribute that is there. Raises ``DataFileError`` naming it when its type cannot be read."""
    try:
        return item.attrs[name]
    except HDF5_ERRORS as error:
        raise DataFileError(
            f"{path}: attribute {name!r} has a type that cannot be read ({reason(error)}); write it as a number or "
            "remove it"
        ) from error


def numbers(value: Any, name: str, path: Path, *, sizes: tuple[int, ...] = (1,), positive: bool = False) -> list[float]:
    """``value`` as a list of finite floats, one for each of its elements.

    ``sizes``: the element counts allowed. Raises ``DataFileError`` naming ``name`` when the value has another size, is
    not a number, is not finite, or is not positive where it must be.
    """
    try:
        if np.iscomplexobj(value):
            raise TypeError
        array = np.asarray(value, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.size not in sizes or not np.isfinite(array).all() or (positive and (array <= 0).any()):
        count = " or ".join(map(str, sizes))
        wanted = f"{count} {'positive finite' if positive else 'finite'} number{'s' if sizes != (1,) else ''}"
        got = " ".join(str(value).split())
        raise DataFileError(
            f"{path}: {name} must be {wanted}, got {got[:60] or 'nothing'}; correct it in the file or remove it"
        )
    return array.tolist()


def number(value: Any, name: str, path: Path, *, positive: bool = False) -> float:
    """``value`` as one finite float; see :func:`numbers`."""
    return numbers(value, name, path, positive=positive)[0]


def pair(value: Any, name: str, path: Path, *, positive: bool = False) -> list[float]:
    """``value`` as [row, column]; a single number counts for both. See :func:`numbers`."""
    found = numbers(value, name, path, sizes=(1, 2), positive=positive)
    return found * 2 if len(found) == 1 else found


def filters(dataset: Any) -> list[tuple[int, tuple[int, ...], str]]:
    """The filters that an h5py dataset's chunks went through: (number, options, name)."""
    plist = dataset.id.get_create_plist()
    entries = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    return [
        (code, tuple(options), bytes(name).decode(errors="replace").split(";")[0]) for code, _, options, name in entries
    ]


def filter_names(dataset: Any) -> list[str]:
    """Their names."""
    return [name for _, _, name in filters(dataset)]


def require_filters(path: Path, dataset: Any) -> None:
    """Raise ``DataFileError`` for a filter that is not installed: HDF5 only says that some chunk could not be read."""
    for code, _, name in filters(dataset):
        if not h5py.h5z.filter_avail(code):
            raise DataFileError(
                f"{path}: dataset {dataset.name} is compressed with filter {code} ({name or 'no name'}), "
                "which is not installed; install its HDF5 plugin or repack the file with gzip (h5repack)"
            )


def require_sources(path: Path, dataset: Any) -> None:
    """Raise ``DataFileError`` where a file that a virtual dataset takes frames from is missing: HDF5 reads zeros."""
    sources = {s.file_name for s in dataset.virtual_sources()} if dataset.is_virtual else set()
    for name in sorted(sources - {"."}):
        if "%" not in name and not (path.parent / name).exists() and not Path(name).exists():
            raise DataFileError(
                f"{path}: dataset {dataset.name} takes frames from {name}, which is missing; put that file "
                "beside this one"
            )


def frames_in(path: Path, file: Any, name: str) -> Any:
    """The 3-D or 4-D dataset ``name`` of an open file. Raises ``DataFileError`` when there is none."""
    try:
        data = file[name]
    except HDF5_ERRORS:
        data = None
    if not isinstance(data, h5py.Dataset) or data.ndim not in (3, 4) or 0 in data.shape:
        raise DataFileError(f"{path}: images were expected in {name}, there are none; copy the data file again")
    return data
