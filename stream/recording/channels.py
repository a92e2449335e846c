"""The frames of one channel in a recording: payloads into HDF5 chunks, and chunks into the same payloads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  - importing it registers the compression filters
import numpy as np

from detectors.codec import decode, encode
from detectors.errors import ConfigurationError, DataFileError, ProtocolError
from detectors.messages import Encoding, FrameBlock, SeriesStart
from stream.files.hdf5 import HDF5_ERRORS, reason
from stream.recording.direct import write_chunks
from stream.recording.layout import FILTER_MASKS, FILTERS, LZ4_HEADER, STORED_AS
from stream.recording.payload_check import whole_frames


class ChannelWriter:
    """Writes the frames of one channel into its group."""

    def __init__(self, group: Any, start: SeriesStart) -> None:
        self._group, self._frames, self._start = group, group["frames"], start
        self._encodings: list[np.ndarray] = []
        self._damaged: list[tuple[int, bytes]] = []
        self.damaged_bytes = 0

    @staticmethod
    def lay_out(group: Any, start: SeriesStart) -> None:
        growing(group, "encoding", np.uint8)
        for name, dtype in (("at", np.int64), ("sizes", np.int64), ("payloads", np.uint8)):
            growing(group, f"damaged/{name}", dtype)
        # h5py's own interface attaches one compression filter at most.
        rows, columns = start.detector_shape
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, rows, columns))
        properties.set_filter(FILTERS[0], h5py.h5z.FLAG_OPTIONAL, (0,))
        properties.set_filter(FILTERS[1], h5py.h5z.FLAG_OPTIONAL, (0, 2))  # default block size, LZ4
        space = h5py.h5s.create_simple((0, rows, columns), (h5py.h5s.UNLIMITED, rows, columns))
        kind = h5py.h5t.py_create(start.dtype.newbyteorder("<"))
        h5py.h5d.create(group.id, b"frames", kind, space, properties).close()

    def write(self, first: int, block: FrameBlock) -> np.ndarray:
        """Append payloads, the first one's row being ``first``; bool (frames,), which are whole frames."""
        encoding, shape, dtype = block.encoding, self._start.detector_shape, self._start.dtype
        whole = whole_frames(block, shape, dtype)
        self._frames.resize(first + len(block), axis=0)
        stored_as = STORED_AS.get(encoding, encoding)
        mask = FILTER_MASKS[stored_as]
        encodings = np.full(len(block), encoding, np.uint8)
        if stored_as is encoding is not Encoding.LZ4:
            write_chunks(self._frames, first, block.slab, block.offsets, block.sizes, whole, mask)
        else:
            self._rewrite(first, block, stored_as, np.flatnonzero(whole), encodings)
        for i in np.flatnonzero(~whole).tolist():
            payload = block.payload(i)
            self._damaged.append((first + i, bytes(payload)))
            self.damaged_bytes += len(payload)
        self._encodings.append(encodings)
        return whole

    def _rewrite(
        self, first: int, block: FrameBlock, stored_as: Encoding, which: np.ndarray, encodings: np.ndarray
    ) -> None:
        """Payloads that HDF5 has no filter for, in another way; notes in ``encodings`` what readers must know."""
        encoding, shape, dtype = block.encoding, self._start.detector_shape, self._start.dtype
        write, mask = self._frames.id.write_direct_chunk, FILTER_MASKS[stored_as]
        for i in which.tolist():
            where, payload = (first + i, 0, 0), block.payload(i)
            if stored_as is not encoding:
                write(where, encode(decode(payload, encoding, shape, dtype), stored_as), mask)
            elif len(payload) == self._start.frame_bytes:
                # The LZ4 filter takes a block of the size of its contents for one that is not packed.
                write(where, decode(payload, encoding, shape, dtype), FILTER_MASKS[Encoding.RAW])
                encodings[i] = Encoding.RAW
            else:
                header = LZ4_HEADER.pack(self._start.frame_bytes, self._start.frame_bytes, len(payload))
                write(where, b"".join((header, payload)), mask)

    def flush(self) -> None:
        if self._damaged:
            at, payloads = zip(*self._damaged, strict=True)
            append(self._group["damaged/at"], np.array(at, np.int64))
            append(self._group["damaged/sizes"], np.array([len(payload) for payload in payloads], np.int64))
            append(self._group["damaged/payloads"], np.frombuffer(b"".join(payloads), np.uint8))
            self._damaged.clear()
            self.damaged_bytes = 0
        if self._encodings:
            append(self._group["encoding"], np.concatenate(self._encodings))
            self._encodings.clear()


class ChannelReader:
    """Reads the payloads of one channel from its group. ``damaged``: row -> (first byte in its payloads, size)."""

    def __init__(self, path: Path, group: Any, frames: int) -> None:
        self._path, self._group, self._data, self._frames = path, group, group["frames"], frames
        sizes = group["damaged/sizes"][...]
        starts = np.cumsum(sizes) - sizes
        columns = (group["damaged/at"][...].tolist(), starts.tolist(), sizes.tolist())
        # The recorder may have died after it wrote these and before it counted their frames: columns can differ.
        self.damaged = {at: (start, size) for at, start, size in zip(*columns, strict=False) if at < frames}

    def encodings(self, first: int, stop: int) -> list[Encoding]:
        """How the payloads of these rows came. Raises ``ValueError`` for a number that means nothing."""
        return [Encoding(code) for code in self._group["encoding"][first:stop].tolist()]

    def payload(self, row: int, encoding: Encoding) -> bytes:
        try:
            if row in self.damaged:
                start, size = self.damaged[row]
                return self._group["damaged/payloads"][start : start + size].tobytes()
            mask, chunk = self._data.id.read_direct_chunk((row, 0, 0))
        except HDF5_ERRORS as error:
            raise self._unreadable(row, error) from error
        stored_as = STORED_AS.get(encoding, encoding)
        if mask != FILTER_MASKS[stored_as]:
            raise DataFileError(f"{self._path}: frame {row} was repacked by another program; use the file as recorded")
        if stored_as is not encoding:
            try:
                frame = decode(chunk, stored_as, self._data.shape[1:], self._data.dtype)
                return encode(frame, encoding, fitting=False)
            except (ProtocolError, ConfigurationError) as error:
                raise self._unreadable(row, error) from error
        return chunk[LZ4_HEADER.size :] if encoding is Encoding.LZ4 else chunk

    def _unreadable(self, row: int, error: Exception) -> DataFileError:
        return DataFileError(
            f"{self._path}: frame {row} of {self._frames} cannot be read ({reason(error)}); the file or the disk is "
            "damaged, copy the file again"
        )


def growing(group: Any, name: str, dtype: Any, **options: Any) -> None:
    group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(4096,), **options)


def append(dataset: Any, values: np.ndarray) -> None:
    if len(values):
        length = len(dataset)
        dataset.resize(length + len(values), axis=0)
        dataset[length:] = values
