"""Packing frames for a stream and a plain way to unpack one again: raw pixels in every order, lz4 and bslz4.

The compressors are the LZ4 and bitshuffle libraries' own, called through hdf5plugin's build of the HDF5 bitshuffle
filter: it ships with every install, has no OpenMP in it, and releases the GIL. The reconstruction's fast path does not
come through here (see ``stream.decode``); recordings, simulators and tests do.

Merlin's raw frames are 64-bit words with their bytes reversed, whatever the counter's depth. Those of four chips (2x2)
come as rows of Q4, Q3, Q2, Q1 side by side, and are turned here into the picture: Q1 Q2 above Q3 Q4, the latter two
turned by 180 degrees.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterator
from pathlib import Path

import hdf5plugin
import lz4.block
import numpy as np

from detectors.errors import ConfigurationError, ProtocolError
from detectors.messages import Encoding

#: Bytes of pixels in a bitshuffle block; what DECTRIS detectors send and the bitshuffle library's own default.
BLOCK_BYTES = 8192

#: What comes before the blocks of a chunk: bytes of the frame, bytes of pixels in a block.
_FRAMING = struct.Struct(">QI")

#: Bits that count in each of Merlin's raw modes.
MERLIN_BITS = {
    Encoding.MERLIN_1BIT: 1,
    Encoding.MERLIN_6BIT: 6,
    Encoding.MERLIN_12BIT: 12,
    Encoding.MERLIN_QUAD_1BIT: 1,
    Encoding.MERLIN_QUAD_6BIT: 6,
    Encoding.MERLIN_QUAD_12BIT: 12,
}
_QUAD = {Encoding.MERLIN_QUAD_1BIT, Encoding.MERLIN_QUAD_6BIT, Encoding.MERLIN_QUAD_12BIT}


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


def encode(frame: np.ndarray, encoding: Encoding, *, fitting: bool = True) -> bytes:
    """Pack one frame (rows, columns; u8/u16/u32/f4) as the payload of a stream message; ``decode`` undoes it exactly.

    Raises ``ConfigurationError`` for a frame that the encoding cannot say: Merlin's raw modes hold counts of 1 or 6
    bits in uint8, 12 bits in uint16. Without ``fitting`` a count may have as many bits as there is room for, so that
    whatever ``decode`` returned becomes the same payload again.
    """
    frame = np.ascontiguousarray(frame.astype(frame.dtype.newbyteorder("<"), copy=False))
    if encoding is Encoding.RAW:
        return frame.tobytes()
    if encoding is Encoding.RAW_BIG_ENDIAN:
        return frame.byteswap().tobytes()
    if encoding is Encoding.LZ4:
        return lz4.block.compress(frame, store_size=False)
    if encoding is Encoding.LZ4_BLOCKS:
        return _encode_lz4_blocks(frame.reshape(-1).view(np.uint8))
    if encoding is Encoding.BSLZ4:
        return _encode_bslz4(frame)
    return _encode_merlin(frame, encoding, fitting)


def decode(
    payload: bytes | memoryview | np.ndarray, encoding: Encoding, shape: tuple[int, int], dtype: np.dtype
) -> np.ndarray:
    """Unpack one frame: array of ``shape`` and ``dtype``. Raises ``ProtocolError`` when the payload does not fit."""
    data = np.frombuffer(payload, dtype=np.uint8)
    nbytes = shape[0] * shape[1] * dtype.itemsize
    if encoding in MERLIN_BITS:
        return _decode_merlin(data, encoding, shape, dtype)
    if encoding is Encoding.LZ4:
        data = _decode_lz4(data, nbytes)
    elif encoding is Encoding.LZ4_BLOCKS:
        data = _decode_lz4_blocks(data, nbytes)
    elif encoding is Encoding.BSLZ4:
        data = _decode_bslz4(data, nbytes, dtype.itemsize)
    if data.nbytes != nbytes:
        raise ProtocolError(
            f"a frame of {shape[0]}x{shape[1]} {dtype.name} has {nbytes} bytes, the payload holds {data.nbytes}"
        )
    frame = data.view(dtype).reshape(shape)
    return frame.byteswap() if encoding is Encoding.RAW_BIG_ENDIAN else frame


# LZ4 and bitshuffle


def _encode_lz4_blocks(data: np.ndarray) -> bytes:
    parts = [_FRAMING.pack(data.nbytes, BLOCK_BYTES)]
    for first in range(0, data.nbytes, BLOCK_BYTES):
        block = data[first : first + BLOCK_BYTES]
        packed = lz4.block.compress(block, store_size=False)
        if len(packed) >= block.nbytes:
            packed = block.tobytes()
        parts += [struct.pack(">I", len(packed)), packed]
    return b"".join(parts)


def _encode_bslz4(frame: np.ndarray) -> bytes:
    library = bitshuffle_library()
    block = BLOCK_BYTES // frame.itemsize
    out = np.empty(12 + library.bshuf_compress_lz4_bound(frame.size, frame.itemsize, block), dtype=np.uint8)
    _FRAMING.pack_into(out.data, 0, frame.nbytes, BLOCK_BYTES)
    size = library.bshuf_compress_lz4(frame.ctypes.data, out.ctypes.data + 12, frame.size, frame.itemsize, block)
    if size < 0:
        raise RuntimeError(f"bitshuffle failed with code {size}")
    return out[: 12 + size].tobytes()


def _blocks(data: np.ndarray, nbytes: int, group: int) -> Iterator[tuple[np.ndarray, int]]:
    """(packed bytes, bytes of pixels) of every block of a chunk, whose pixels are packed in groups of ``group`` bytes.

    Raises ``ProtocolError`` where a header does not fit, and at the end unless the rest is what fills no group.
    """
    if data.nbytes < _FRAMING.size:
        raise ProtocolError(f"a payload of {data.nbytes} bytes is shorter than its header")
    total, block = _FRAMING.unpack_from(data.data)
    if block == 0 and group > 1:
        block = BLOCK_BYTES
    if total != nbytes or block == 0 or block % group:
        raise ProtocolError(f"a payload of {total} bytes in blocks of {block}; the frame has {nbytes} bytes")
    at, left = _FRAMING.size, nbytes - nbytes % group
    while left > 0 and at + 4 <= data.nbytes:
        (length,) = struct.unpack_from(">I", data.data, at)
        if at + 4 + length > data.nbytes:
            break
        yield data[at + 4 : at + 4 + length], min(block, left)
        at += 4 + length
        left -= block
    if left > 0 or at + nbytes % group != data.nbytes:
        raise ProtocolError(f"a truncated payload of {data.nbytes} bytes")


def _decode_lz4(data: np.ndarray, nbytes: int) -> np.ndarray:
    try:
        return np.frombuffer(lz4.block.decompress(data, uncompressed_size=nbytes), dtype=np.uint8)
    except lz4.block.LZ4BlockError as error:
        raise ProtocolError(f"a damaged lz4 payload of {data.nbytes} bytes ({error})") from error


def _decode_lz4_blocks(data: np.ndarray, nbytes: int) -> np.ndarray:
    parts = []
    for packed, size in _blocks(data, nbytes, 1):
        parts.append(packed if packed.nbytes == size else _decode_lz4(packed, size))
        if parts[-1].nbytes != size:
            raise ProtocolError(f"a block of {parts[-1].nbytes} bytes of pixels, {size} were expected")
    return np.concatenate(parts)


def _decode_bslz4(data: np.ndarray, nbytes: int, itemsize: int) -> np.ndarray:
    for _ in _blocks(data, nbytes, 8 * itemsize):  # the library trusts its input's block lengths
        pass
    block = _FRAMING.unpack_from(data.data)[1] or BLOCK_BYTES
    out = np.empty(nbytes, dtype=np.uint8)
    body = np.ascontiguousarray(data[_FRAMING.size :])
    used = bitshuffle_library().bshuf_decompress_lz4(
        body.ctypes.data, out.ctypes.data, nbytes // itemsize, itemsize, block // itemsize
    )
    if used != body.nbytes:
        raise ProtocolError(f"a damaged bslz4 payload of {data.nbytes} bytes")
    return out


# Merlin's raw modes


def _not_merlin(shape: tuple[int, ...], dtype: np.dtype, encoding: Encoding) -> str | None:
    """Why a raw mode cannot hold such frames."""
    bits, quad = MERLIN_BITS[encoding], encoding in _QUAD
    expected = np.dtype("<u2" if bits == 12 else "<u1")
    if dtype != expected:
        return f"they are {expected.name}, not {dtype.name}"
    in_a_word = 64 if bits == 1 else 8 // dtype.itemsize
    if len(shape) != 2 or shape[0] % (1 + quad) or shape[1] % ((1 + quad) * in_a_word):
        of_four = " on each of four chips" if quad else ""
        return f"their columns come {in_a_word} at a time{of_four}, which {'x'.join(map(str, shape))} pixels do not"
    return None


def _encode_merlin(frame: np.ndarray, encoding: Encoding, fitting: bool) -> bytes:
    bits = MERLIN_BITS[encoding]
    reason = _not_merlin(frame.shape, frame.dtype, encoding)
    if reason is None and fitting and (most := int(frame.max(initial=0))) >> bits:
        reason = f"a pixel of this frame counts {most}"
    if reason is not None:
        raise ConfigurationError(f"Merlin's raw {bits}-bit frames: {reason}; use another encoding")
    if encoding in _QUAD:
        rows, columns = frame.shape[0] // 2, frame.shape[1] // 2
        upper, lower = frame[:rows], frame[rows:]
        frame = np.hstack([lower[::-1, ::-1], upper[:, columns:], upper[:, :columns]])
    words = np.packbits(frame, bitorder="little") if bits == 1 else np.ascontiguousarray(frame)
    return words.reshape(-1).view(np.uint64).byteswap().tobytes()


def _decode_merlin(data: np.ndarray, encoding: Encoding, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    reason = _not_merlin(shape, dtype, encoding)
    one_bit, pixels = MERLIN_BITS[encoding] == 1, shape[0] * shape[1]
    expected = pixels // 8 if one_bit else pixels * dtype.itemsize
    if reason is None and data.nbytes != expected:
        reason = f"{expected} bytes hold {shape[0]}x{shape[1]} pixels, the payload has {data.nbytes}"
    if reason is not None:
        raise ProtocolError(f"Merlin's raw {MERLIN_BITS[encoding]}-bit frames: {reason}")
    # Little-endian words, so that the first pixel is the first one in memory.
    words = np.frombuffer(data, np.dtype(">u8")).astype("<u8").view(np.uint8)
    frame = np.unpackbits(words, bitorder="little") if one_bit else words.view(dtype)
    if encoding not in _QUAD:
        return frame.reshape(shape)
    rows, columns = shape[0] // 2, shape[1] // 2
    mosaic = frame.reshape(rows, 2 * shape[1])
    upper = np.hstack([mosaic[:, 3 * columns :], mosaic[:, 2 * columns : 3 * columns]])
    return np.vstack([upper, mosaic[::-1, : 2 * columns][:, ::-1]])
