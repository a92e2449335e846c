"""Where the frames of a virtual HDF5 dataset really lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from stream.files.hdf5 import frames_in, open_file


class Source(NamedTuple):
    """One channel of a run of images: in dataset ``name`` of ``file`` ('.' is the virtual dataset's own) from ``at`` on
    the first axis, in a 4-D dataset at ``plane`` of the second."""

    file: str
    name: str
    at: int
    plane: int | None


def sources(data: Any, planes: Sequence[int]) -> list[tuple[int, int, list[Source]]] | None:
    """The runs that an h5py virtual dataset (images, channels, rows, columns) is made of: first image, count, and where
    each of the ``planes`` comes from. None where it is made in another way, and must be read as it is."""
    shape = data.shape
    found: dict[tuple[int, int], dict[int, Source]] = {}
    for source in data.virtual_sources():
        target = _box(source.vspace)
        if "%" in source.file_name or target is None:
            return None
        (first, plane, *corner), (count, channels, *size) = target
        if any(corner) or tuple(size) != shape[2:]:
            return None
        box = _whole(data, source) if source.src_space.get_select_type() == h5py.h5s.SEL_ALL else _box(source.src_space)
        if box is None or box[1] not in ((count, channels, *shape[2:]), (count, *shape[2:])) or any(box[0][-2:]):
            return None
        start, extent = box
        if len(extent) == 3 and channels != 1:
            return None
        found_here = found.setdefault((first, count), {})
        for offset in range(channels):
            at = None if len(extent) == 3 else start[1] + offset
            found_here[plane + offset] = Source(source.file_name, source.dset_name, start[0], at)
    runs, expected = [], 0
    for (first, count), found_here in sorted(found.items()):
        if first != expected or not set(planes) <= found_here.keys():
            return None
        runs.append((first, count, [found_here[plane] for plane in planes]))
        expected += count
    return runs if expected == shape[0] else None


def _whole(data: Any, source: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All of a source's dataset, as (corner, size)."""
    master = Path(data.file.filename)
    path = next((p for p in (master.parent / source.file_name, Path(source.file_name)) if p.exists()), master)
    with open_file(path) as file:
        shape = frames_in(path, file, source.dset_name).shape
    return (0,) * len(shape), shape


def _box(space: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """A dataspace's selection as (corner, size); None where it is no gapless box."""
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return None
    start, stride, count, block = space.get_regular_hyperslab()
    if any(c != 1 and s != b for s, c, b in zip(stride, count, block, strict=True)):
        return None
    size = tuple(c * b for c, b in zip(count, block, strict=True))
    return tuple(start), size
