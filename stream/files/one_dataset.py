"""Frames that are one dataset of an HDF5 file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detectors.errors import DataFileError
from detectors.messages import Encoding, FrameBlock
from stream.files.chunks import packed_encoding, read_chunks
from stream.files.dataset import (
    BLOCK_BYTES,
    Dataset4D,
    Part,
    beyond_float32,
    by,
    most_frames,
    raster_parts,
    spans,
)
from stream.files.hdf5 import HDF5_ERRORS, filter_names, reason, require_filters, require_sources


class HDF5Frames(Dataset4D):
    """One 4-D (scan rows, scan columns, detector rows, detector columns) or 3-D (frames, rows, columns) dataset."""

    def __init__(
        self,
        path: Path,
        file: Any,
        dataset: Any,
        *,
        layout: str,
        settings: Mapping[str, Any] | None = None,
        pixel_mask: np.ndarray | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Take over the open ``file``. Raises ``DataFileError`` when ``dataset`` cannot be a series of frames."""
        self.path, self.layout, self.dataset = path, layout, str(dataset.name)
        self.settings = dict(settings or {})
        self.pixel_mask, self.notes = pixel_mask, notes
        self._file, self._data = file, dataset
        self._set_frames(dataset.shape or (), dataset.dtype)
        require_filters(path, dataset)
        require_sources(path, dataset)
        packed = packed_encoding(dataset)
        self.encoding, self.as_stored = packed or Encoding.RAW, packed is not None

    def close(self) -> None:
        self._file.close()

    def parts(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Part]:
        # Bounded by what is larger in memory, the stored or the converted frame.
        most = most_frames(self.detector_shape, max(self.dtype.itemsize, self._stored.itemsize), max_bytes)
        chunks = self._data.chunks or (1,) * self._data.ndim
        if self.scan_shape is not None:
            yield from raster_parts(self.scan_shape, self.detector_shape, chunks, most)
            return
        for start, stop in spans(self.frames, chunks[0], most):
            yield Part(start, np.s_[start:stop], (stop - start, *self.detector_shape))

    def read(self, part: Part) -> tuple[int, np.ndarray]:
        return part.first, read_frames(self.path, self._data, part, self.dtype)

    def packed_blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[FrameBlock]:
        if not self.as_stored:
            yield from super().packed_blocks(max_bytes)
            return
        most = most_frames(self.detector_shape, self.dtype.itemsize, max_bytes)
        for start, stop in spans(self.frames, 1, most):
            indices = np.arange(start, stop)
            shape = (self.frames,) if self.scan_shape is None else self.scan_shape
            places = list(zip(*(axis.tolist() for axis in np.unravel_index(indices, shape)), strict=True))
            slab, offsets, sizes = read_chunks(self._data, places, self.encoding)
            yield FrameBlock("file", self.encoding, indices, offsets, sizes, slab)

    def _storage(self) -> str:
        return storage(self._data)


def read_frames(path: Path, dataset: Any, part: Part, dtype: np.dtype) -> np.ndarray:
    """The decoded frames of a part of an h5py dataset, (n, rows, columns) of ``dtype``. Raises ``DataFileError``."""
    block = np.empty(part.shape, dtype)
    count = int(np.prod(part.shape[:-2]))
    try:
        if dataset.dtype == dtype:
            dataset.read_direct(block, part.where)
        else:
            # NumPy's conversion, not HDF5's: it is several times faster.
            with np.errstate(over="raise"):
                block[...] = dataset[part.where]
    except FloatingPointError:
        raise beyond_float32(path, part.first, count, dataset.name) from None
    except HDF5_ERRORS as error:
        raise DataFileError(
            f"{path}: frames {part.first} to {part.first + count - 1} of {dataset.name} cannot be read "
            f"({reason(error)}); the file or the disk is damaged, copy the file again"
        ) from error
    return block.reshape(-1, *part.shape[-2:])


def storage(dataset: Any) -> str:
    """How an h5py dataset is kept, in a few words."""
    if not dataset.chunks:
        return "in other files" if dataset.is_virtual else "contiguous"
    return f"chunks of {by(dataset.chunks)}, {', '.join(filter_names(dataset)) or 'not compressed'}"
