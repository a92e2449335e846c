"""The compiled part of decoding: one GIL-free call unpacks a batch of payloads and makes every sum.

Electron counts are sparse. A bitshuffled block arrives as bit planes, and at counting doses most of their bits are 0:
where at most one bit in ``_SPARSE`` is set, the set bits are visited one by one and nothing else is touched. All other
frames are unpacked into pixels first.

Whatever is compiled into these calls stands in this file, but for the hardly changing ``stream.intrinsics``: to tell
whether the machine code that it keeps on disk is out of date, Numba looks at no other file.
"""

from __future__ import annotations

import numba
import numpy as np

from detectors.codec import BLOCK_BYTES
from detectors.messages import Encoding
from stream.intrinsics import address, count_ones, count_trailing_zeros, lz4_decompress, swap_bytes, untranspose_bits

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

# LZ4's rules for the end of a block (lz4_Block_format.md, "End of block conditions"): the last 5 bytes are literals,
# the last match starts at least 12 bytes before the end. The library refuses blocks that break them.
_LAST_LITERALS = 5
_MATCH_LIMIT = 12

_RAW, _RAW_BIG_ENDIAN = int(Encoding.RAW), int(Encoding.RAW_BIG_ENDIAN)
_LZ4, _BSLZ4, _LZ4_BLOCKS = int(Encoding.LZ4), int(Encoding.BSLZ4), int(Encoding.LZ4_BLOCKS)
_MERLIN_1BIT, _MERLIN_12BIT = int(Encoding.MERLIN_1BIT), int(Encoding.MERLIN_12BIT)
_MERLIN_QUAD_1BIT, _MERLIN_QUAD_12BIT = int(Encoding.MERLIN_QUAD_1BIT), int(Encoding.MERLIN_QUAD_12BIT)

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


# a payload as bytes


@_compiled
def _big_endian(slab, at, count):
    value = 0
    for i in range(count):
        value = value << 8 | int(slab[at + i])
    return value


@_compiled
def _lz4_fits(slab, at, end, wanted):
    """Whether the LZ4 block in ``slab[at:end]`` unpacks to exactly ``wanted`` bytes."""
    done = 0
    while at < end:
        token = int(slab[at])
        at += 1
        literals = token >> 4
        more = literals == 15
        while more:
            if at >= end:
                return False
            literals += int(slab[at])
            more = slab[at] == 255
            at += 1
        at += literals
        done += literals
        if at == end:
            return done == wanted
        if at > end - 3 - _LAST_LITERALS or done > wanted - _MATCH_LIMIT:
            return False
        if int(slab[at]) | int(slab[at + 1]) << 8 > done:
            return False
        at += 2
        match = token & 15
        more = match == 15
        while more:
            if at >= end - _LAST_LITERALS + 1:
                return False
            match += int(slab[at])
            more = slab[at] == 255
            at += 1
        done += match + 4
        if done > wanted - _LAST_LITERALS:
            return False
    return False


@_compiled
def _all_masked(bad, first, count):
    """Whether the pixels ``first`` ... ``first + count - 1`` are all among ``bad``, ascending flat indices."""
    last = np.searchsorted(bad, first) + count - 1
    return last < len(bad) and bad[last] == first + count - 1


@_compiled
def _unpack_blocks(slab, at, end, nbytes, group, out, bad):
    """Unpack the LZ4 blocks of an HDF5 chunk into ``out``, or only look whether they are sound where that is empty.

    ``group``: bytes of pixels that are shuffled together, 1 for the plain LZ4 filter. Shuffled blocks with nothing but
    ``bad`` pixels (ascending flat indices) are not unpacked: they become 0. Returns the bytes of pixels in a block, or
    -1 for a chunk that does not hold ``nbytes``.
    """
    if end - at < 12 or _big_endian(slab, at, 8) != nbytes:
        return -1
    block = _big_endian(slab, at + 8, 4)
    if block == 0 and group > 1:
        block = BLOCK_BYTES
    if block == 0 or block % group:
        return -1
    at += 12
    done = 0
    packed = nbytes - nbytes % group
    while done < packed:
        wanted = min(block, packed - done)
        if at + 4 > end:
            return -1
        length = _big_endian(slab, at, 4)
        at += 4
        if length > end - at:
            return -1
        if group == 1 and length == wanted:  # this one is not packed
            if len(out):
                out[done : done + wanted] = slab[at : at + wanted]
        elif len(out) == 0:
            if not _lz4_fits(slab, at, at + length, wanted):
                return -1
        elif group > 1 and _all_masked(bad, 8 * done // group, 8 * wanted // group):
            out[done : done + wanted] = 0
        elif lz4_decompress(address(slab, at), address(out, done), length, wanted) != wanted:
            return -1
        at += length
        done += wanted
    if end - at != nbytes - packed:
        return -1
    if len(out):
        out[packed:nbytes] = slab[at:end]  # what does not fill a group of 8 pixels travels as it is
    return block


@_compiled
def _holds_merlin(size, encoding, pixels, width, itemsize):
    """Whether so many bytes are one raw frame of a Merlin: see ``detectors.codec``."""
    quad = encoding >= _MERLIN_QUAD_1BIT
    one_bit = encoding in (_MERLIN_1BIT, _MERLIN_QUAD_1BIT)
    if itemsize != (2 if encoding in (_MERLIN_12BIT, _MERLIN_QUAD_12BIT) else 1):
        return False
    in_a_word = 64 if one_bit else 8 // itemsize
    chips = 2 if quad else 1
    if width % (chips * in_a_word) or pixels // width % chips:
        return False
    return size == (pixels // 8 if one_bit else pixels * itemsize)


@_compiled
def check_frames(slab, offsets, sizes, encoding, pixels, width, itemsize):
    """bool (frames,): which payloads ``decode_frames`` would take, as far as bytes go; no pixel is written."""
    whole = np.zeros(len(offsets), np.bool_)
    nothing, no_pixels = np.empty(0, np.uint8), np.empty(0, np.int64)
    nbytes = pixels * itemsize
    for i in range(len(offsets)):
        at, size = offsets[i], sizes[i]
        if at < 0 or size < 0 or at > len(slab) - size:
            continue
        if encoding in (_RAW, _RAW_BIG_ENDIAN):
            whole[i] = size == nbytes
        elif encoding == _LZ4:
            whole[i] = _lz4_fits(slab, at, at + size, nbytes)
        elif encoding == _BSLZ4:
            whole[i] = _unpack_blocks(slab, at, at + size, nbytes, 8 * itemsize, nothing, no_pixels) > 0
        elif encoding == _LZ4_BLOCKS:
            whole[i] = _unpack_blocks(slab, at, at + size, nbytes, 1, nothing, no_pixels) > 0
        elif _MERLIN_1BIT <= encoding <= _MERLIN_QUAD_12BIT:
            whole[i] = _holds_merlin(size, encoding, pixels, width, itemsize)
    return whole


# a payload as pixels


@_compiled
def _untranspose(planes, block, itemsize, out):
    """Every bitshuffled block back into pixels."""
    nbytes = len(out)
    shuffled = nbytes - nbytes % (8 * itemsize)
    for done in range(0, shuffled, block):
        count = min(block, shuffled - done) // itemsize
        untranspose_bits(address(planes, done), address(out, done), np.uint64(count), np.uint64(itemsize))
    out[shuffled:] = planes[shuffled:nbytes]


@_compiled
def _reverse_words(data):
    words = data.view(np.uint64)
    for i in range(len(words)):
        words[i] = swap_bytes(words[i])


@_compiled
def _unpack_merlin(slab, at, size, encoding, width, frame, planes):
    quad = encoding >= _MERLIN_QUAD_1BIT
    frame_bytes = frame.view(np.uint8)
    # The rows of four chips side by side, or the picture itself.
    mosaic_bytes = planes[: len(frame_bytes)] if quad else frame_bytes
    mosaic = mosaic_bytes.view(frame.dtype)
    if encoding in (_MERLIN_1BIT, _MERLIN_QUAD_1BIT):
        bits = frame_bytes[:size] if quad else planes[:size]
        bits[:] = slab[at : at + size]
        _reverse_words(bits)
        for i in range(size):
            for k in range(8):
                mosaic[8 * i + k] = bits[i] >> k & 1
    else:
        mosaic_bytes[:] = slab[at : at + size]
        _reverse_words(mosaic_bytes)
    if quad:
        half = width // 2
        rows = len(frame) // width
        for r in range(rows // 2):
            source = mosaic[2 * width * r : 2 * width * (r + 1)]  # Q4, Q3, Q2, Q1
            upper = frame[width * r : width * (r + 1)]
            upper[:half] = source[3 * half :]
            upper[half:] = source[width : 3 * half]
            lower = frame[width * (rows - 1 - r) : width * (rows - r)]
            for c in range(width):
                lower[c] = source[width - 1 - c]


@_compiled
def _unpack(slab, at, size, encoding, width, frame, planes, bad):
    """One payload into ``frame``, whatever its encoding; ``planes`` is scratch of as many bytes."""
    itemsize = frame.itemsize
    frame_bytes = frame.view(np.uint8)
    nbytes = len(frame_bytes)
    if encoding in (_RAW, _RAW_BIG_ENDIAN):
        if size != nbytes:
            return WRONG_SIZE
        frame_bytes[:] = slab[at : at + size]
        if encoding == _RAW_BIG_ENDIAN and itemsize == 2:
            halves = frame_bytes.view(np.uint16)
            for i in range(len(halves)):
                halves[i] = swap_bytes(halves[i])
        elif encoding == _RAW_BIG_ENDIAN and itemsize == 4:
            words = frame_bytes.view(np.uint32)
            for i in range(len(words)):
                words[i] = swap_bytes(words[i])
    elif encoding == _LZ4:
        if size > 2147483647 or lz4_decompress(address(slab, at), address(frame_bytes, 0), size, nbytes) != nbytes:
            return DAMAGED
    elif encoding == _BSLZ4:
        block = _unpack_blocks(slab, at, at + size, nbytes, 8 * itemsize, planes, bad)
        if block < 0:
            return DAMAGED
        _untranspose(planes, block, itemsize, frame_bytes)
    elif encoding == _LZ4_BLOCKS:
        if _unpack_blocks(slab, at, at + size, nbytes, 1, frame_bytes, bad) < 0:
            return DAMAGED
    elif _MERLIN_1BIT <= encoding <= _MERLIN_QUAD_12BIT:
        if not _holds_merlin(size, encoding, len(frame), width, itemsize):
            return WRONG_SIZE
        _unpack_merlin(slab, at, size, encoding, width, frame, planes)
    else:
        return WRONG_SIZE
    return OK


@_compiled
def _clear(frame, masked):
    """Pixels of the value that stands for "no count" become 0; ``masked``: that value, or nothing."""
    if len(masked):
        for i in range(len(frame)):
            frame[i] = 0 if frame[i] == masked[0] else frame[i]


@_compiled
def _subtract(frame, other):
    """``frame - other``, never below 0: so a pixel that is masked in ``other``, the largest value, becomes 0 too."""
    for i in range(len(frame)):
        frame[i] = 0 if frame[i] <= other[i] else frame[i] - other[i]


@_compiled
def _holds_numbers(frame, bad):
    """Whether every pixel that is not masked is finite: one that is not would spoil every image it gets into."""
    for i in range(len(bad)):
        frame[bad[i]] = 0
    for value in frame:  # noqa: SIM110 - compiled, and a generator is not
        if not np.isfinite(value):
            return False
    return True


# pixels into rows and sums


@_compiled
def _add_dense(frame, start, stop, plan, pattern, column_sums, row, sums):
    """Add pixels ``start : stop`` of an unpacked frame."""
    bf_pixels, _, bad, width, _, _ = plan
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
def _clear_planes(words, plane_words, planes):
    """``_clear`` for bit planes: the largest value has every bit set. Most words of the highest plane are 0."""
    for w in range(plane_words):
        full = words[(planes - 1) * plane_words + w]
        if full:
            for plane in range(planes - 1):
                full &= words[plane * plane_words + w]
        if full:
            for plane in range(planes):
                words[plane * plane_words + w] &= ~full


@_compiled
def _is_sparse(words, plane_words):
    """Whether fewer bits are set than one in ``_SPARSE`` pixels; the lowest planes usually know."""
    most = np.uint64(64 * plane_words // _SPARSE)
    ones = np.uint64(0)
    for first in range(0, len(words), plane_words):
        for word in words[first : first + plane_words]:
            ones += count_ones(word)
        if ones > most:
            return False
    return True


@_compiled
def _add_sparse(words, plane_words, planes, start, plan, pattern, row, sums):
    """Add the block of pixels from ``start`` by visiting the set bits of its planes, ``plane_words`` words each."""
    bf_pixels, bf_slot, _, width, _, _ = plan
    for i in range(np.searchsorted(bf_pixels, start), np.searchsorted(bf_pixels, start + 64 * plane_words)):
        row[i] = 0
    total = bright = moment_row = moment_column = sums[0] * 0
    for plane in range(planes):
        weight = 1 << plane
        for w in range(plane_words):
            word = words[plane * plane_words + w]
            while word:
                pixel = start + 64 * w + np.int64(count_trailing_zeros(word))
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
def _add_planes(planes, block, plan, frame, pattern, column_sums, row, sums):
    """Add a frame of counts from the bit planes of its blocks (``block`` bytes), each by the quicker way."""
    masked = plan[4]
    itemsize = frame.itemsize
    frame_bytes = frame.view(np.uint8)
    nbytes = len(frame_bytes)
    shuffled = nbytes - nbytes % (8 * itemsize)
    for done in range(0, shuffled, block):
        wanted = min(block, shuffled - done)
        first = done // itemsize
        count = wanted // itemsize
        if count % 64 == 0:
            words = planes[done : done + wanted].view(np.uint64)
            if len(masked):
                _clear_planes(words, count // 64, 8 * itemsize)
            if _is_sparse(words, count // 64):
                _add_sparse(words, count // 64, 8 * itemsize, first, plan, pattern, row, sums)
                continue
        untranspose_bits(address(planes, done), address(frame_bytes, done), np.uint64(count), np.uint64(itemsize))
        _clear(frame[first : first + count], masked)
        _add_dense(frame, first, first + count, plan, pattern, column_sums, row, sums)
    if shuffled < nbytes:
        frame_bytes[shuffled:] = planes[shuffled:nbytes]
        first = shuffled // itemsize
        _clear(frame[first:], masked)
        _add_dense(frame, first, len(frame), plan, pattern, column_sums, row, sums)


@_compiled
def decode_frames(payloads, minus, targets, plan, scratch, pattern, column_sums, rows, sums, status):
    """Unpack frames and add them everywhere; of one that is not sound nothing is added.

    ``payloads``, ``minus``: (slab, offsets, sizes, encoding); ``minus`` has no offsets where nothing is subtracted.
    ``plan``: see ``stream.decode.FrameDecoder``. ``scratch``: two frames, and the bytes of one.
    """
    slab, offsets, sizes, encoding = payloads
    minus_slab, minus_offsets, minus_sizes, minus_encoding = minus
    _, _, bad, width, masked, holds_floats = plan
    frame, other, planes = scratch
    pixels, itemsize = len(frame), frame.itemsize
    moments = np.zeros(4, sums.dtype)
    for i in range(len(offsets)):
        at, size = offsets[i], sizes[i]
        status[i] = WRONG_SIZE
        if at < 0 or size < 0 or at > len(slab) - size:
            continue
        row = rows[targets[i]]
        moments[:] = 0
        column_sums[:] = 0
        if encoding == _BSLZ4 and not holds_floats and len(minus_offsets) == 0:
            nbytes = pixels * itemsize
            block = _unpack_blocks(slab, at, at + size, nbytes, 8 * itemsize, planes, bad)
            status[i] = OK if block > 0 else DAMAGED
            if block > 0:
                _add_planes(planes, block, plan, frame, pattern, column_sums, row, moments)
        else:
            status[i] = _unpack(slab, at, size, encoding, width, frame, planes, bad)
            _clear(frame, masked)
            if len(minus_offsets) and status[i] == OK:
                at, size = minus_offsets[i], minus_sizes[i]
                if at < 0 or size < 0 or at > len(minus_slab) - size:
                    status[i] = WRONG_SIZE
                else:
                    status[i] = _unpack(minus_slab, at, size, minus_encoding, width, other, planes, bad)
                    _subtract(frame, other)
            if holds_floats and status[i] == OK and not _holds_numbers(frame, bad):
                status[i] = NO_NUMBER
            if status[i] == OK:
                _add_dense(frame, 0, pixels, plan, pattern, column_sums, row, moments)
        for c in range(width):
            moments[MOMENT_COLUMN] += c * column_sums[c]
        sums[targets[i]] = moments
