"""Payloads into HDF5 chunks as they are: a block of frames in one call.

``write_compiled`` goes to HDF5's C function without holding the interpreter's lock, which every chunk would otherwise
let go of and have to wait for again; ``write_plain`` says the same through h5py, and takes over where h5py was built in
a way that hides the function. ``write_chunks`` is the better one that there is.

HDF5 is the very one that h5py has loaded. Its function is called by name, so that the compiled code can be cached on
disk; its lock, which HDF5 needs as it is not thread-safe, is h5py's own.
"""

from __future__ import annotations

from typing import Any

import h5py
import numba
import numpy as np
from h5py._objects import phil
from numba import types

from stream.intrinsics import add_loaded_symbols, address

#: Whether ``write_compiled`` can be used.
COMPILED = add_loaded_symbols(h5py.h5d.__file__, "H5Dwrite_chunk")

_write_chunk = types.ExternalFunction(
    "H5Dwrite_chunk", types.int32(types.int64, types.int64, types.uint32, types.voidptr, types.uint64, types.voidptr)
)


@numba.njit(nogil=True, cache=True)
def _write_from(dataset, first, slab, offsets, sizes, wanted, mask, at):  # type: ignore[no-untyped-def]
    """Write the ``wanted`` payloads from the one numbered ``at`` on; the number of the one that failed, or how many."""
    where = np.zeros(3, np.uint64)
    place = address(where.view(np.uint8), 0)
    while at < len(offsets):
        where[0] = first + at
        if wanted[at] and _write_chunk(dataset, 0, mask, place, sizes[at], address(slab, offsets[at])) < 0:
            break
        at += 1
    return at


def write_plain(dataset: Any, first: int, slab: np.ndarray, offsets: np.ndarray, sizes: np.ndarray,
                wanted: np.ndarray, mask: int) -> None:  # fmt: skip
    """Write ``slab[offset : offset + size]`` into the chunk of row ``first + i`` wherever ``wanted[i]``.

    ``dataset``: an h5py dataset of frames, a chunk each; ``slab`` uint8; ``offsets``, ``sizes`` int64 (frames,),
    ``wanted`` bool (frames,); ``mask``: the filters that were not applied. Raises as h5py does when HDF5 cannot write.
    """
    view = memoryview(slab)  # type: ignore[arg-type]
    for i in np.flatnonzero(wanted).tolist():
        offset = int(offsets[i])
        dataset.id.write_direct_chunk((first + i, 0, 0), view[offset : offset + int(sizes[i])], mask)


def write_compiled(dataset: Any, first: int, slab: np.ndarray, offsets: np.ndarray, sizes: np.ndarray,
                   wanted: np.ndarray, mask: int) -> None:  # fmt: skip
    """The same as :func:`write_plain`."""
    at, one = 0, np.ones(1, np.bool_)
    while True:
        with phil:
            at = _write_from(dataset.id.id, first, slab, offsets, sizes, wanted, np.uint32(mask), at)
        if at == len(offsets):
            return
        # h5py knows how to put it into words; should it succeed, the next one follows.
        write_plain(dataset, first + at, slab, offsets[at : at + 1], sizes[at : at + 1], one, mask)
        at += 1


def prepare() -> None:
    """Load or compile the call, which can take a second: to be called before frames are waiting."""
    if COMPILED:
        none = np.empty(0, np.int64)
        for slab in (np.empty(0, np.uint8), np.frombuffer(b"", np.uint8)):  # writable and not are two types
            _write_from(0, 0, slab, none, none, np.empty(0, np.bool_), np.uint32(0), 0)


write_chunks = write_compiled if COMPILED else write_plain
