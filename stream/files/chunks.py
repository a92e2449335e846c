"""Compressed frames as they lie in an HDF5 file: chunks of one frame, packed as streams pack them, never decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from detectors.codec import encode
from detectors.errors import DataFileError
from detectors.messages import Encoding
from stream.files.dataset import frame_dtype
from stream.files.hdf5 import HDF5_ERRORS, filters, reason

#: Numbers of the HDF5 filters whose chunks are payloads of streams: bitshuffle and LZ4.
_BITSHUFFLE, _LZ4 = 32008, 32004
#: bitshuffle's options are (version, version, bytes of a pixel, block size, compression); compression 2 is LZ4.
_PIXEL_BYTES, _COMPRESSION, _WITH_LZ4 = 2, 4, 2


def packed_encoding(dataset: Any) -> Encoding | None:
    """How a stream would call the chunks of ``dataset`` (h5py); None where they are no payloads and must be decoded."""
    if not dataset.chunks or dataset.chunks != (*(1,) * (dataset.ndim - 2), *dataset.shape[-2:]):
        return None
    if frame_dtype(dataset.dtype) != dataset.dtype or len(pipeline := filters(dataset)) != 1:
        return None
    code, options, _ = pipeline[0]
    if code == _LZ4:
        return Encoding.LZ4_BLOCKS
    if code == _BITSHUFFLE and len(options) > _COMPRESSION and options[_COMPRESSION] == _WITH_LZ4:
        return Encoding.BSLZ4 if options[_PIXEL_BYTES] == dataset.dtype.itemsize else None
    return None


def read_chunks(
    dataset: Any, places: Sequence[tuple[int, ...]], encoding: Encoding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chunks of the frames at ``places`` (their indices on all axes but the detector's): slab, offsets, sizes.

    A frame that the file never stored (a hole), or stored without its filter, is packed here, so that all are of the
    same ``encoding``. Raises ``DataFileError`` naming a frame that cannot be read.
    """
    payloads = [_payload(dataset, place, encoding) for place in places]
    sizes = np.fromiter(map(len, payloads), np.int64, len(payloads))
    return np.frombuffer(b"".join(payloads), np.uint8), np.cumsum(sizes) - sizes, sizes


def _payload(dataset: Any, place: tuple[int, ...], encoding: Encoding) -> bytes:
    corner = (*place, 0, 0)
    try:
        try:
            skipped, payload = dataset.id.read_direct_chunk(corner)
            if not skipped:
                return payload
        except HDF5_ERRORS:
            if dataset.id.get_chunk_info_by_coord(corner).size:
                raise
        return encode(dataset[place], encoding)
    except HDF5_ERRORS as error:
        raise DataFileError(
            f"{dataset.file.filename}: frame {', '.join(map(str, place))} of {dataset.name} cannot be read "
            f"({reason(error)}); the file or the disk is damaged, copy the file again"
        ) from error
