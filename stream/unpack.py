"""The compiled part of decoding: one GIL-free call unpacks a batch of payloads and makes every sum.

LZ4 and the dense bit transpose are the libraries' own C functions (from the HDF5 bitshuffle filter, see
``detectors.codec``), called from Numba by name so that the compiled code can be cached on disk.

Electron counts are sparse. A bitshuffled block arrives as bit planes, and at counting doses most of their bits are 0:
where at most one bit in ``_SPARSE`` is set, the set bits are visited one by one and nothing else is touched.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from detectors.codec import BLOCK_BYTES, bitshuffle_library

#: Columns of the per-position sums.
TOTAL, BRIGHT_FIELD, MOMENT_ROW, MOMENT_COLUMN = range(4)

#: A block with fewer than one set bit in this many pixels is summed bit by bit; measured break-even is 4-8.
_SPARSE = 6

OK, WRONG_SIZE, DAMAGED, NO_NUMBER = range(4)
REASONS = {
    WRONG_SIZE: "the payload does not hold one frame of the announced shape and dtype",
    DAMAGED: "the compressed payload is damaged or truncated",
    NO_NUMBER: "a pixel that is not masked holds NaN or infinity",
}

_library = bitshuffle_library()
for _name in ("LZ4_decompress_safe", "bshuf_untrans_bit_elem"):
    llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_library, _name), ctypes.c_void_p).value)

_lz4_decompress = types.ExternalFunction(
    "LZ4_decompress_safe", types.int32(types.voidptr, types.voidptr, types.int32, types.int32)
)
_untranspose_bits = types.ExternalFunction(
    "bshuf_untrans_bit_elem", types.int64(types.voidptr, types.voidptr, types.uint64, types.uint64)
)


@intrinsic
def _address(typingctx: Any, array: Any, offset: Any) -> Any:
    """The address of a byte of a uint8 array, as a C pointer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())

    return types.voidptr(array, types.int64), codegen


@intrinsic
def _count_trailing_zeros(typingctx: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


@intrinsic
def _count_ones(typingctx: Any, word: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _big_endian(slab: np.ndarray, at: int, count: int) -> int:
    value = 0
    for i in range(count):
        value = value << 8 | slab[at + i]
    return value


@_compiled
def _unpack_planes(slab: np.ndarray, at: int, size: int, nbytes: int, itemsize: int, planes: np.ndarray) -> int:
    """LZ4-decode every block of a bslz4 payload into ``planes``; returns the block size in bytes, or -1."""
    end = at + size
    if size < 12 or _big_endian(slab, at, 8) != nbytes:
        return -1
    block = _big_endian(slab, at + 8, 4)
    if block == 0:
        block = BLOCK_BYTES
    group = 8 * itemsize
    if block % group or block > 1 << 30:
        return -1
    at += 12
    done = 0
    shuffled = nbytes - nbytes % group
    while done < shuffled:
        wanted = min(block, shuffled - done)
        if at + 4 > end:
            return -1
        length = _big_endian(slab, at, 4)
        at += 4
        if length > end - at:
            return -1
        if _lz4_decompress(_address(slab, at), _address(planes, done), length, wanted) != wanted:
            return -1
        at += length
        done += wanted
    if end - at != nbytes - shuffled:
        return -1
    planes[shuffled:nbytes] = slab[at:end]  # what does not fill a group of 8 pixels travels as it is
    return block


@_compiled
def _add_dense(frame, start, stop, plan, pattern, column_sums, row, sums):
    """Add pixels ``start : stop`` of an unpacked frame."""
    bf_pixels, _, bad, width = plan
    for i in range(np.searchsorted(bad, start), np.searchsorted(bad, stop)):
        frame[bad[i]] = 0
    at = start
    while at < stop:
        r = at // width
        end = min(stop, (r + 1) * width)
        # Views from 0 and one loop a sum: only so are they vectorised (no negative indices, no aliasing to consider).
        values = frame[at:end]
        total = sums[0] * 0
        for i in range(len(values)):
            total += values[i]
        mean = pattern[at:end]
        for i in range(len(values)):
            mean[i] += values[i]
        columns = column_sums[at - r * width : end - r * width]
        for i in range(len(values)):
            columns[i] += values[i]
        sums[TOTAL] += total
        sums[MOMENT_ROW] += total * r
        at = end
    bright = sums[0] * 0
    for i in range(np.searchsorted(bf_pixels, start), np.searchsorted(bf_pixels, stop)):
        value = frame[bf_pixels[i]]
        row[i] = value
        bright += value
    sums[BRIGHT_FIELD] += bright


@_compiled
def _add_sparse(words, plane_words, planes, start, plan, pattern, row, sums):
    """Add the block of pixels from ``start`` by visiting the set bits of its planes, ``plane_words`` words each."""
    bf_pixels, bf_slot, _, width = plan
    for i in range(np.searchsorted(bf_pixels, start), np.searchsorted(bf_pixels, start + 64 * plane_words)):
        row[i] = 0
    total = bright = moment_row = moment_column = sums[0] * 0
    for plane in range(planes):
        weight = 1 << plane
        for w in range(plane_words):
            word = words[plane * plane_words + w]
            while word:
                pixel = start + 64 * w + np.int64(_count_trailing_zeros(word))
                word &= word - np.uint64(1)
                slot = bf_slot[pixel]
                if slot == -2:  # a masked pixel
                    continue
                r = pixel // width
                pattern[pixel] += weight
                total += weight
                moment_row += weight * r
                moment_column += weight * (pixel - r * width)
                if slot >= 0:
                    row[slot] += weight
                    bright += weight
    sums[TOTAL] += total
    sums[BRIGHT_FIELD] += bright
    sums[MOMENT_ROW] += moment_row
    sums[MOMENT_COLUMN] += moment_column


@_compiled
def _holds_numbers(frame, bad):
    """Whether every pixel that is not masked is finite: one that is not would spoil every image it gets into."""
    for i in range(len(bad)):
        frame[bad[i]] = 0
    for value in frame:  # noqa: SIM110 - compiled, and a generator is not
        if not np.isfinite(value):
            return False
    return True


@_compiled
def _add_frame(slab, at, size, encoding, plan, frame, planes, pattern, column_sums, row, sums):
    """Unpack one frame and add it everywhere; nothing is added unless the whole payload is sound."""
    pixels = len(frame)
    itemsize = frame.itemsize
    nbytes = pixels * itemsize
    frame_bytes = frame.view(np.uint8)
    sums[:] = 0
    column_sums[:] = 0
    if encoding == 2:
        block = _unpack_planes(slab, at, size, nbytes, itemsize, planes)
        if block < 0:
            return DAMAGED
        shuffled = nbytes - nbytes % (8 * itemsize)
        dense = False
        done = 0
        while itemsize == 4 and done < shuffled:  # never sparse, and looked at as a whole before any of it is added
            wanted = min(block, shuffled - done)
            _untranspose_bits(
                _address(planes, done), _address(frame_bytes, done), np.uint64(wanted // itemsize), np.uint64(itemsize)
            )
            done += wanted
        if itemsize == 4:
            frame_bytes[shuffled:] = planes[shuffled:nbytes]
            if not _holds_numbers(frame, plan[2]):
                return NO_NUMBER
            _add_dense(frame, 0, pixels, plan, pattern, column_sums, row, sums)
            dense = True
        while done < shuffled:
            wanted = min(block, shuffled - done)
            first = done // itemsize
            count = wanted // itemsize
            sparse = False
            if count % 64 == 0 and itemsize < 4:
                words = planes[done : done + wanted].view(np.uint64)
                ones = np.uint64(0)
                for word in words:
                    ones += _count_ones(word)
                if ones * np.uint64(_SPARSE) < count:
                    _add_sparse(words, count // 64, 8 * itemsize, first, plan, pattern, row, sums)
                    sparse = True
            if not sparse:
                _untranspose_bits(
                    _address(planes, done), _address(frame_bytes, done), np.uint64(count), np.uint64(itemsize)
                )
                _add_dense(frame, first, first + count, plan, pattern, column_sums, row, sums)
                dense = True
            done += wanted
        if itemsize < 4 and shuffled < nbytes:
            frame_bytes[shuffled:] = planes[shuffled:nbytes]
            _add_dense(frame, shuffled // itemsize, pixels, plan, pattern, column_sums, row, sums)
            dense = True
        if not dense:
            return OK
    else:
        if encoding == 1:
            if (
                size > 2147483647
                or _lz4_decompress(_address(slab, at), _address(frame_bytes, 0), size, nbytes) != nbytes
            ):
                return DAMAGED
        else:  # raw: FrameDecoder takes no other encoding
            if size != nbytes:
                return WRONG_SIZE
            frame_bytes[:] = slab[at : at + size]
        if itemsize == 4 and not _holds_numbers(frame, plan[2]):
            return NO_NUMBER
        _add_dense(frame, 0, pixels, plan, pattern, column_sums, row, sums)
    for c in range(len(column_sums)):
        sums[MOMENT_COLUMN] += c * column_sums[c]
    return OK


@_compiled
def decode_frames(
    slab, offsets, sizes, encoding, targets, plan, frame, planes, pattern, column_sums, rows, sums, status
):
    moments = np.zeros(4, sums.dtype)
    for i in range(len(offsets)):
        target = targets[i]
        status[i] = _add_frame(
            slab, offsets[i], sizes[i], encoding, plan, frame, planes, pattern, column_sums, rows[target], moments
        )
        sums[target] = moments
