"""Frames in a plain ``.npy`` file, memory-mapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detectors.errors import DataFileError
from stream.files.dataset import ArrayFrames

MAGIC = b"\x93NUMPY"


def open_npy(path: Path) -> ArrayFrames:
    """The frames of a ``.npy`` file with 4 axes (scan and detector) or 3 (frames, rows, columns).

    Raises ``DataFileError`` for anything else, Python objects among it, which are never unpickled.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataFileError(
            f"{path}: an array of plain numbers was expected, this .npy file cannot be read ({error}); it is truncated "
            "or holds Python objects"
        ) from None
    notes: tuple[str, ...] = ()
    if array.ndim > 1 and array.flags.f_contiguous and not array.flags.c_contiguous:
        notes = (
            "the array is in Fortran order, so that every frame lies scattered over the whole file: reading is slow; "
            "np.save(name, np.ascontiguousarray(array)) mends it",
        )
    return ArrayFrames(path, array, layout="NumPy array", settings={}, notes=notes)
