"""Packing frames for a stream: raw, lz4 and bslz4 payloads, and a plain way to unpack one again.

The compressors are the LZ4 and bitshuffle libraries' own, called through hdf5plugin's build of the HDF5 bitshuffle
filter: it ships with every install, has no OpenMP in it, and releases the GIL. The reconstruction's fast path does not
come through here (see ``stream.decode``); recordings, simulators and tests do.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import hdf5plugin
import lz4.block
import numpy as np

from detectors.errors import ProtocolError
from detectors.messages import Encoding

#: Bytes of pixels in a bitshuffle block; what DECTRIS detectors send and the bitshuffle library's own default.
BLOCK_BYTES = 8192


@functools.cache
def bitshuffle_library() -> ctypes.CDLL:
    """The HDF5 bitshuffle filter's shared library, which exports bitshuffle's and LZ4's C functions."""
    plugins = Path(hdf5plugin.PLUGIN_PATH)
    library = ctypes.CDLL(str(next(plugins.glob("libh5bshuf.*"))))
    for name in ("bshuf_compress_lz4", "bshuf_decompress_lz4"):
        function = getattr(library, name)
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]
    library.bshuf_compress_lz4_bound.restype = ctypes.c_size_t
    library.bshuf_compress_lz4_bound.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]
    return library


def encode(frame: np.ndarray, encoding: Encoding) -> bytes:
    """Pack one frame (any shape, u8/u16/u32/f4) as the payload of a stream message."""
    frame = np.ascontiguousarray(frame.astype(frame.dtype.newbyteorder("<"), copy=False))
    if encoding is Encoding.RAW:
        return frame.tobytes()
    if encoding is Encoding.LZ4:
        return lz4.block.compress(frame, store_size=False)
    library = bitshuffle_library()
    block = BLOCK_BYTES // frame.itemsize
    out = np.empty(12 + library.bshuf_compress_lz4_bound(frame.size, frame.itemsize, block), dtype=np.uint8)
    struct.pack_into(">QI", out.data, 0, frame.nbytes, BLOCK_BYTES)
    size = library.bshuf_compress_lz4(frame.ctypes.data, out.ctypes.data + 12, frame.size, frame.itemsize, block)
    if size < 0:
        raise RuntimeError(f"bitshuffle failed with code {size}")
    return out[: 12 + size].tobytes()


def decode(
    payload: bytes | memoryview | np.ndarray, encoding: Encoding, shape: tuple[int, int], dtype: np.dtype
) -> np.ndarray:
    """Unpack one frame: array of ``shape`` and ``dtype``. Raises ``ProtocolError`` when the payload does not fit."""
    data = np.frombuffer(payload, dtype=np.uint8)
    nbytes = shape[0] * shape[1] * dtype.itemsize
    if encoding is Encoding.LZ4:
        try:
            data = np.frombuffer(lz4.block.decompress(data, uncompressed_size=nbytes), dtype=np.uint8)
        except lz4.block.LZ4BlockError as error:
            raise ProtocolError(f"a damaged lz4 payload of {len(payload)} bytes ({error})") from error
    elif encoding is Encoding.BSLZ4:
        data = _decode_bslz4(data, nbytes, dtype.itemsize)
    if data.nbytes != nbytes:
        raise ProtocolError(
            f"a frame of {shape[0]}x{shape[1]} {dtype.name} has {nbytes} bytes, the payload holds {data.nbytes}"
        )
    return data.view(dtype).reshape(shape)


def _decode_bslz4(data: np.ndarray, nbytes: int, itemsize: int) -> np.ndarray:
    if data.nbytes < 12:
        raise ProtocolError(f"a bslz4 payload of {data.nbytes} bytes is shorter than its header")
    total, block = struct.unpack_from(">QI", data.data, 0)
    block = block or BLOCK_BYTES
    if total != nbytes or block % (8 * itemsize):
        raise ProtocolError(f"a bslz4 payload of {total} bytes in blocks of {block}; the frame has {nbytes} bytes")
    # The library trusts its input's block lengths, so they are checked here first.
    end, left = 12, nbytes - nbytes % (8 * itemsize)
    while left > 0 and end + 4 <= data.nbytes:
        end += 4 + struct.unpack_from(">I", data.data, end)[0]
        left -= block
    if left > 0 or end + nbytes % (8 * itemsize) != data.nbytes:
        raise ProtocolError(f"a truncated bslz4 payload of {data.nbytes} bytes")
    out = np.empty(nbytes, dtype=np.uint8)
    body = np.ascontiguousarray(data[12:])
    used = bitshuffle_library().bshuf_decompress_lz4(
        body.ctypes.data, out.ctypes.data, nbytes // itemsize, itemsize, block // itemsize
    )
    if used != body.nbytes:
        raise ProtocolError(f"a damaged bslz4 payload of {data.nbytes} bytes")
    return out
