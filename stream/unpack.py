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
from stream.intrinsics import (
    address,
    byte_at,
    clear_bytes,
    copy_8,
    copy_16,
    copy_bytes,
    count_ones,
    count_trailing_zeros,
    lz4_decompress,
    swap_bytes,
    untranspose_bits,
    word_at,
)

#: Columns of the per-position sums.
TOTAL, BRIGHT_FIELD, MOMENT_ROW, MOMENT_COLUMN = range(4)

#: A block with fewer than one set bit in this many pixels is summed bit by bit; measured break-even is 4-8.
_SPARSE = 6

#: Blocks that LZ4 has made smaller than one byte in so many are unpacked by our own loop.
_RARE = 3

#: Pixels, or rows of them, that are summed in a number of twice their bits before it could overflow.
_SPAN = 256

#: Planes whose bits are counted in the bit planes of ``Mean.counters``; the few set bits of higher ones are visited.
_COUNTED_PLANES = 8

_IN_PARTIAL, _IN_COUNTERS = range(2)

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

#: The library counts bytes in 32 bits with a sign.
_LARGEST = 2**31 - 1

_RAW, _RAW_BIG_ENDIAN = int(Encoding.RAW), int(Encoding.RAW_BIG_ENDIAN)
_LZ4, _BSLZ4, _LZ4_BLOCKS = int(Encoding.LZ4), int(Encoding.BSLZ4), int(Encoding.LZ4_BLOCKS)
_MERLIN_1BIT, _MERLIN_12BIT = int(Encoding.MERLIN_1BIT), int(Encoding.MERLIN_12BIT)
_MERLIN_QUAD_1BIT, _MERLIN_QUAD_12BIT = int(Encoding.MERLIN_QUAD_1BIT), int(Encoding.MERLIN_QUAD_12BIT)

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
#: The same for sums of floats, which are vectorised only where they may be added in any order.
_reordering = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"}, _nrt=False)
#: The same for functions that allocate nothing and return no array: without this, every use of an array counts
#: references, which takes longer than adding up a sparse block. Numba documents the option for ``register_jitable``
#: only, hence the upper bound in ``pyproject.toml``.
_borrowing = numba.njit(nogil=True, cache=True, error_model="numpy", _nrt=False)


# a payload as bytes


@_borrowing
def _big_endian(slab, at, count):
    value = 0
    for i in range(count):
        value = value << 8 | int(slab[at + i])
    return value


@_borrowing
def _lz4_fits(slab, at, end, wanted):
    """Whether the LZ4 block in ``slab[at:end]`` unpacks to exactly ``wanted`` bytes, by the letter of the format.

    The library takes a little more: offsets of 0, where it fills in what it likes, and matches that it copies so fast
    that it overlooks how near the end they are.
    """
    done = 0
    while at < end:
        token = byte_at(slab, at)
        at += 1
        literals = token >> 4
        if literals == 15:
            more = True
            while more:
                if at >= end:
                    return False
                value = byte_at(slab, at)
                literals += value
                more = value == 255
                at += 1
        at += literals
        done += literals
        if at > end - 3 - _LAST_LITERALS or done > wanted - _MATCH_LIMIT:
            return at == end and done == wanted
        offset = byte_at(slab, at) | byte_at(slab, at + 1) << 8
        if offset == 0 or offset > done:
            return False
        at += 2
        match = token & 15
        if match == 15:
            more = True
            while more:
                if at >= end - _LAST_LITERALS + 1:
                    return False
                value = byte_at(slab, at)
                match += value
                more = value == 255
                at += 1
        done += match + 4
        if done > wanted - _LAST_LITERALS:
            return False
    return False


@_borrowing
def _unpack_sparse(slab, at, end, out, start, wanted):
    """Unpack the LZ4 block in ``slab[at:end]`` into ``out`` from ``start`` on: it takes what ``_lz4_fits`` takes.

    Returns where the zeros begin that it ends with, counted from ``start``: they are *not* written. -1 for a block that
    does not unpack to exactly ``wanted`` bytes. Up to 16 bytes beyond it are overwritten.

    Bit planes of counts are mostly zeros, which LZ4 says as "repeat the last byte": long runs of them are written only
    when something follows that may refer to them.
    """
    done = 0
    zeros = 0  # from here to ``done`` there is nothing but 0, and ...
    written = 0  # ... from here on it has not been written yet
    while at < end:
        token = byte_at(slab, at)
        at += 1
        literals = token >> 4
        if literals == 15:
            more = True
            while more:
                if at >= end:
                    return -1
                value = byte_at(slab, at)
                literals += value
                more = value == 255
                at += 1
        if literals > end - at or literals > wanted - done:
            return -1
        if at + literals == end:
            if done + literals != wanted:
                return -1
            nonzero = 0
            for i in range(at, end):
                nonzero |= byte_at(slab, i)
            if nonzero:
                clear_bytes(out, start + written, done - written)
                copy_bytes(address(out, start + done), address(slab, at), literals)
                zeros = wanted
            return zeros
        if written < done:
            clear_bytes(out, start + written, done - written)
        if literals:
            if literals <= 16 and at + 16 <= len(slab):
                copy_16(out, start + done, slab, at)
            else:
                copy_bytes(address(out, start + done), address(slab, at), literals)
            at += literals
            done += literals
            zeros = done
        if at > end - 3 - _LAST_LITERALS or done > wanted - _MATCH_LIMIT:
            return -1
        offset = byte_at(slab, at) | byte_at(slab, at + 1) << 8
        if offset == 0 or offset > done:
            return -1
        at += 2
        length = token & 15
        if length == 15:
            more = True
            while more:
                if at >= end - _LAST_LITERALS + 1:
                    return -1
                value = byte_at(slab, at)
                length += value
                more = value == 255
                at += 1
        length += 4
        if done + length > wanted - _LAST_LITERALS:
            return -1
        to = start + done
        done += length
        written = done
        if offset < 8:
            # A run of 0 may be said with any such offset.
            if to >= 8:
                last = word_at(out, to - 8) >> np.uint64(64 - 8 * offset)
            else:
                last = np.uint64(0)
                for i in range(to - offset, to):
                    last |= np.uint64(byte_at(out, i))
            if last == 0:
                zeros = min(zeros, to - start - offset)
                written = to - start
                continue
            for i in range(to, to + length):
                out[i] = byte_at(out, i - offset)
        else:
            i = to
            step = 16 if offset >= 16 else 8
            while i < start + done:
                if offset >= 16:
                    copy_16(out, i, out, i - offset)
                else:
                    copy_8(out, i, out, i - offset)
                i += step
        zeros = done
    return -1


@_borrowing
def _place(numbers, wanted):
    """How many of these ascending numbers are below ``wanted``."""
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) // 2
        if numbers[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@_borrowing
def _all_masked(bad, first, count):
    """Whether the pixels ``first`` ... ``first + count - 1`` are all among ``bad``, ascending flat indices."""
    last = _place(bad, first) + count - 1
    return last < len(bad) and bad[last] == first + count - 1


@_borrowing
def _unpack_blocks(slab, at, end, nbytes, group, out, bad, ends):
    """Unpack the LZ4 blocks of an HDF5 chunk into ``out``, or only look whether they are sound where that is empty.

    ``group``: bytes of pixels that are shuffled together, 1 for the plain LZ4 filter. Shuffled blocks with nothing but
    ``bad`` pixels (ascending flat indices) are not unpacked: they become 0. Returns the bytes of pixels in a block, or
    -1 for a chunk that does not hold ``nbytes``.

    ``out`` has room for 16 bytes more. ``ends``: gets where the zeros begin with which a shuffled block ends, counted
    from the block's start, and these are not written then; or has no elements, and everything is.
    """
    if end - at < 12 or max(end - at, nbytes) > _LARGEST or _big_endian(slab, at, 8) != nbytes:
        return -1
    block = _big_endian(slab, at + 8, 4)
    if block == 0 and group > 1:
        block = BLOCK_BYTES
    if block == 0 or block % group:
        return -1
    at += 12
    done = 0
    packed = nbytes - nbytes % group
    number = 0
    while done < packed:
        wanted = min(block, packed - done)
        if at + 4 > end:
            return -1
        length = _big_endian(slab, at, 4)
        at += 4
        if length > end - at:
            return -1
        zeros = wanted
        if group == 1 and length == wanted:  # this one is not packed
            if len(out):
                copy_bytes(address(out, done), address(slab, at), wanted)
        elif len(out) == 0:
            if not _lz4_fits(slab, at, at + length, wanted):
                return -1
        elif group > 1 and len(bad) and _all_masked(bad, 8 * done // group, 8 * wanted // group):
            zeros = 0
        elif group > 1 and length * _RARE < wanted:
            zeros = _unpack_sparse(slab, at, at + length, out, done, wanted)
            if zeros < 0:
                return -1
        elif group > 1 and not _lz4_fits(slab, at, at + length, wanted):
            return -1  # as in a sparse block: the library alone would take more than the format allows
        elif lz4_decompress(address(slab, at), address(out, done), length, wanted) != wanted:
            return -1
        if len(ends):
            ends[number] = zeros
            number += 1
        elif len(out):
            clear_bytes(out, done + zeros, wanted - zeros)
        at += length
        done += wanted
    if end - at != nbytes - packed:
        return -1
    if len(out):
        copy_bytes(
            address(out, packed), address(slab, at), nbytes - packed
        )  # what does not fill a group of 8 pixels travels as it is
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
    """bool (frames,): which payloads hold one frame, as far as bytes go; no pixel is written.

    ``decode_frames`` takes all of these. Of others it only takes bitshuffled ones that are damaged where every pixel
    is masked, and LZ4 blocks that the library takes though they break the format's rules: see ``_lz4_fits``.
    """
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
            whole[i] = _unpack_blocks(slab, at, at + size, nbytes, 8 * itemsize, nothing, no_pixels, no_pixels) > 0
        elif encoding == _LZ4_BLOCKS:
            whole[i] = _unpack_blocks(slab, at, at + size, nbytes, np.int64(1), nothing, no_pixels, no_pixels) > 0
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
    copy_bytes(address(out, shuffled), address(planes, shuffled), nbytes - shuffled)


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
        copy_bytes(address(bits, 0), address(slab, at), size)
        _reverse_words(bits)
        for i in range(size):
            for k in range(8):
                mosaic[8 * i + k] = bits[i] >> k & 1
    else:
        copy_bytes(address(mosaic_bytes, 0), address(slab, at), size)
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
        copy_bytes(address(frame_bytes, 0), address(slab, at), size)
        if encoding == _RAW_BIG_ENDIAN and itemsize == 2:
            halves = frame_bytes.view(np.uint16)
            for i in range(len(halves)):
                halves[i] = swap_bytes(halves[i])
        elif encoding == _RAW_BIG_ENDIAN and itemsize == 4:
            words = frame_bytes.view(np.uint32)
            for i in range(len(words)):
                words[i] = swap_bytes(words[i])
    elif encoding == _LZ4:
        if size > _LARGEST or lz4_decompress(address(slab, at), address(frame_bytes, 0), size, nbytes) != nbytes:
            return DAMAGED
    elif encoding == _BSLZ4:
        block = _unpack_blocks(slab, at, at + size, nbytes, 8 * itemsize, planes, bad, bad[:0])
        if block < 0:
            return DAMAGED
        _untranspose(planes, block, itemsize, frame_bytes)
    elif encoding == _LZ4_BLOCKS:
        if _unpack_blocks(slab, at, at + size, nbytes, np.int64(1), frame_bytes, bad, bad[:0]) < 0:
            return DAMAGED
    elif _MERLIN_1BIT <= encoding <= _MERLIN_QUAD_12BIT:
        if not _holds_merlin(size, encoding, len(frame), width, itemsize):
            return WRONG_SIZE
        _unpack_merlin(slab, at, size, encoding, width, frame, planes)
    else:
        return WRONG_SIZE
    return OK


@_borrowing
def _clear(frame, start, stop, masked):
    """Those of the pixels ``start : stop`` become 0 that have the value ``masked``, which stands for "no count"."""
    for i in range(np.uint64(start), np.uint64(stop)):
        frame[i] = 0 if frame[i] == masked else frame[i]


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


@_reordering
def _add_moments(frame, start, stop, width, columns, sums):
    """Add the total and the first moments of pixels ``start : stop``, row by row.

    ``columns``: scratch of ``width`` numbers of the type in which 256 pixels can be summed.
    """
    narrow, wide = columns.dtype.type, sums.dtype.type
    at, row = start, start // width
    while at < stop:
        band = min(stop, (row + _SPAN) * width)
        columns[:] = 0
        while at < band:
            end = min(band, (row + 1) * width)
            total = wide(0)
            for first in range(at, end, _SPAN):
                part = narrow(0)
                for i in range(np.uint64(first), np.uint64(min(end, first + _SPAN))):
                    part = narrow(part + frame[i])
                total += wide(part)
            before = np.uint64(row * width)
            for i in range(np.uint64(at), np.uint64(end)):
                columns[i - before] += frame[i]
            sums[TOTAL] += total
            sums[MOMENT_ROW] += total * row
            at = end
            row += 1
        moment = wide(0)
        for c in range(width):
            moment += c * wide(columns[c])
        sums[MOMENT_COLUMN] += moment


@_reordering
def _add_total(frame, start, stop, columns, sums):
    narrow, wide = columns.dtype.type, sums.dtype.type
    for first in range(start, stop, _SPAN):
        part = narrow(0)
        for i in range(np.uint64(first), np.uint64(min(stop, first + _SPAN))):
            part = narrow(part + frame[i])
        sums[TOTAL] += wide(part)


@_reordering
def _gather(frame, start, stop, plan, row, sums):
    """Copy the bright-field pixels among ``start : stop`` into their row, a run of neighbours at a time."""
    run = max(0, _place(plan.run_pixel, start + 1) - 1)
    bright = sums.dtype.type(0)
    while plan.run_pixel[run] < stop:
        to_slot = plan.run_slot[run] - plan.run_pixel[run]
        first = max(start, plan.run_pixel[run])
        last = min(stop, plan.run_slot[run + 1] - to_slot)
        for i in range(first, last):
            value = frame[np.uint64(i)]
            row[np.uint64(i + to_slot)] = value
            bright += value
        run += 1
    sums[BRIGHT_FIELD] += bright


@_borrowing
def _add_dense(frame, start, stop, plan, mean, row, sums):
    """Add pixels ``start : stop`` of an unpacked frame."""
    if len(plan.masked):
        _clear(frame, start, stop, plan.masked[0])
    bad = plan.bad
    if len(bad):
        for i in range(_place(bad, start), _place(bad, stop)):
            frame[bad[i]] = 0
    if plan.pattern:
        partial = mean.partial
        for i in range(np.uint64(start), np.uint64(stop)):
            partial[i] += frame[i]
    if plan.moments:
        _add_moments(frame, start, stop, plan.width, mean.columns, sums)
    else:
        _add_total(frame, start, stop, mean.columns, sums)
    _gather(frame, start, stop, plan, row, sums)


# bit planes into rows and sums


@_borrowing
def _clear_planes(words, first, plane_words, planes):
    """``_clear`` for bit planes: the largest value has every bit set. Most words of the highest plane are 0."""
    for w in range(first, first + plane_words):
        full = words[(planes - 1) * plane_words + w]
        if full:
            for plane in range(planes - 1):
                full &= words[plane * plane_words + w]
        if full:
            for plane in range(planes):
                words[plane * plane_words + w] &= ~full


@_borrowing
def _count(words, start, stop):
    """How many bits are set in ``words[start:stop]``."""
    ones = np.uint64(0)
    for w in range(np.uint64(start), np.uint64(stop)):
        ones += count_ones(words[w])
    return np.int64(ones)


@_borrowing
def _plane_moments(words, start, stop, pixel_word, plan, weight, sums):
    """Add the first moments of one plane's words ``start : stop``, ``pixel_word`` being the first one's number.

    A bit's place in its word is a sum of powers of 2, so the sum of places is one count of bits for each power. From
    the sum of flat indices and that of the rows follows that of the columns.
    """
    first = np.uint64(start)
    offset = np.uint64(pixel_word) - first
    places = words_before = rows = np.uint64(0)
    for w in range(first, np.uint64(stop)):
        word = words[w]
        ones = count_ones(word)
        places += (
            count_ones(word & np.uint64(0xAAAAAAAAAAAAAAAA))
            + (count_ones(word & np.uint64(0xCCCCCCCCCCCCCCCC)) << np.uint64(1))
            + (count_ones(word & np.uint64(0xF0F0F0F0F0F0F0F0)) << np.uint64(2))
            + (count_ones(word & np.uint64(0xFF00FF00FF00FF00)) << np.uint64(3))
            + (count_ones(word & np.uint64(0xFFFF0000FFFF0000)) << np.uint64(4))
            + (count_ones(word & np.uint64(0xFFFFFFFF00000000)) << np.uint64(5))
        )
        words_before += ones * np.uint64(np.uint32(w + offset))
        rows += ones * np.uint64(plan.word_row[w + offset])
    for level in range(len(plan.row_places)):
        more = np.uint64(0)
        for w in range(first, np.uint64(stop)):
            more += count_ones(words[w] & plan.row_places[level, w + offset])
        rows += more << np.uint64(level)
    row_sum = np.int64(rows)
    sums[MOMENT_ROW] += weight * row_sum
    sums[MOMENT_COLUMN] += weight * (np.int64(places) + 64 * np.int64(words_before) - plan.width * row_sum)


@_borrowing
def _add_to_counters(words, start, stop, pixel_word, plane, mean):
    """Add a plane's words to the counters, which are bit planes as well: a bit of carry goes on to the next plane."""
    counters, carry = mean.counters, mean.carry
    first = np.uint64(start)
    length = np.uint64(stop) - first
    for i in range(length):
        carry[i] = words[first + i]
    in_plane = np.uint64(len(carry))
    low = np.uint64(plane) * in_plane + np.uint64(pixel_word)
    any_left = True
    while any_left:
        left = np.uint64(0)
        high = low + in_plane
        for i in range(length):
            bits = carry[i]
            old = counters[low + i]
            counters[low + i] = old ^ bits
            bits &= old
            old = counters[high + i]
            counters[high + i] = old ^ bits
            bits &= old
            carry[i] = bits
            left |= bits
        any_left = left != 0
        low = high + in_plane


@_borrowing
def _visit_pattern(words, start, stop, pixel_word, weight, pattern):
    for w in range(start, stop):
        word = words[w]
        while word:
            pattern[64 * (pixel_word + w - start) + np.int64(count_trailing_zeros(word))] += weight
            word &= word - np.uint64(1)


@_borrowing
def _add_sparse(planes, first, plane_words, used, first_word, plan, mean, row, sums):
    """Add a block of pixels by its bit planes, counted by ``_count_planes``."""
    words = planes.words
    bf_first = _place(plan.bf_words, first_word)
    bf_last = _place(plan.bf_words, first_word + plane_words)
    for plane in range(used):
        if planes.ones[plane] == 0:
            continue
        weight = 1 << plane
        start = first + plane * plane_words
        stop = start + plane_words
        sums[TOTAL] += weight * planes.ones[plane]
        to_words = start - first_word
        bright = np.int64(0)
        for k in range(bf_first, bf_last):
            w = plan.bf_words[k]
            wanted = plan.bf_bits[k]
            word = words[w + to_words] & wanted
            bright += np.int64(count_ones(word))
            while word:
                lowest = word & (~word + np.uint64(1))
                row[plan.bf_slot[k] + np.int64(count_ones(wanted & (lowest - np.uint64(1))))] += weight
                word ^= lowest
        sums[BRIGHT_FIELD] += weight * bright
        if not (plan.moments or plan.pattern):
            continue
        while words[start] == 0:
            start += 1
        while words[stop - 1] == 0:
            stop -= 1
        pixel_word = start - to_words
        if plan.moments:
            _plane_moments(words, start, stop, pixel_word, plan, weight, sums)
        if plan.pattern and plane < _COUNTED_PLANES:
            _add_to_counters(words, start, stop, pixel_word, plane, mean)
        elif plan.pattern:
            _visit_pattern(words, start, stop, pixel_word, weight, mean.pattern)


@_borrowing
def _count_planes(planes, first, plane_words, used, first_word, plan):
    """Clear the masked pixels of a block's bit planes; how many bits are set then, in each plane and in all.

    The block's ``used`` planes of ``plane_words`` words each begin with the word ``first``.
    """
    words = planes.words
    if len(plan.masked) and used == 8 * plan.masked.itemsize:
        last = first + (used - 1) * plane_words
        if _count(words, last, last + plane_words):
            _clear_planes(words, first, plane_words, used)
    in_all = 0
    for plane in range(used):
        start = np.uint64(first + plane * plane_words)
        stop = start + np.uint64(plane_words)
        if len(plan.bad):
            offset = np.uint64(first_word) - start
            for w in range(start, stop):
                words[w] &= plan.good_bits[w + offset]
        ones = _count(words, start, stop)
        planes.ones[plane] = ones
        in_all += ones
    return in_all


@_borrowing
def _add_planes(planes, block, plan, frame, mean, row, sums):
    """Add a frame of counts from the bit planes of its blocks (``block`` bytes), each by the quicker way."""
    itemsize = frame.itemsize
    nbytes = len(frame) * itemsize
    shuffled = nbytes - nbytes % (8 * itemsize)
    for slot in range(np.uint64(len(row))):
        row[slot] = 0
    for number in range((shuffled + block - 1) // block):
        end = planes.ends[number]
        if end == 0:
            continue
        done = number * block
        wanted = min(block, shuffled - done)
        first = done // itemsize
        count = wanted // itemsize
        if count % 64 == 0 and first % 64 == 0:
            used = (8 * end + count - 1) // count  # planes
            clear_bytes(planes.data, done + end, used * count // 8 - end)
            end = used * count // 8
            in_all = _count_planes(planes, done // 8, count // 64, used, first // 64, plan)
            if in_all * _SPARSE <= count:
                if in_all:
                    _add_sparse(planes, done // 8, count // 64, used, first // 64, plan, mean, row, sums)
                continue
        clear_bytes(planes.data, done + end, wanted - end)
        untranspose_bits(address(planes.data, done), address(frame, first), np.uint64(count), np.uint64(itemsize))
        _add_dense(frame, first, first + count, plan, mean, row, sums)
    if shuffled < nbytes:
        first = shuffled // itemsize
        copy_bytes(address(frame, first), address(planes.data, shuffled), nbytes - shuffled)
        _add_dense(frame, first, len(frame), plan, mean, row, sums)


# the mean pattern


@_compiled
def flush_pattern(mean):
    """Add what the narrow accumulators of the mean pattern hold to ``mean.pattern``, and empty them."""
    pattern, partial, counters = mean.pattern, mean.partial, mean.counters
    if mean.used[_IN_PARTIAL]:
        for i in range(len(pattern)):
            pattern[i] += partial[i]
        partial[:] = 0
    if mean.used[_IN_COUNTERS]:
        # The counters look like one bitshuffled block of 16-bit pixels.
        pixels = 64 * len(mean.carry)
        counts = np.empty(pixels, np.uint16)
        count_bytes = counts.view(np.uint8)
        untranspose_bits(address(counters.view(np.uint8), 0), address(count_bytes, 0), np.uint64(pixels), np.uint64(2))
        for i in range(len(pattern)):
            pattern[i] += counts[i]
        counters[:] = 0
    mean.used[:] = 0


@_compiled
def decode_frames(payloads, minus, targets, plan, scratch, mean, rows, sums, status):
    """Unpack frames and add them everywhere; of one that is not sound nothing is added.

    ``payloads``, ``minus``: (slab, offsets, sizes, encoding); ``minus`` has no offsets where nothing is subtracted.
    ``plan``, ``mean``: see ``stream.decode``. ``scratch``: two frames, the bytes of one
    and 16 more, and an int64 for every block that a frame may have.
    """
    slab, offsets, sizes, encoding = payloads
    minus_slab, minus_offsets, minus_sizes, minus_encoding = minus
    bad, width, masked, holds_floats = plan.bad, plan.width, plan.masked, plan.holds_floats
    frame, other, planes = scratch
    pixels, itemsize = len(frame), frame.itemsize
    nbytes = pixels * itemsize
    moments = np.zeros(4, sums.dtype)
    start = np.int64(0)  # not the literal: functions would be compiled once more for that
    as_they_lie = encoding == _RAW and len(bad) == 0 and len(masked) == 0 and len(minus_offsets) == 0
    for i in range(len(offsets)):
        at, size = offsets[i], sizes[i]
        status[i] = WRONG_SIZE
        if at < 0 or size < 0 or at > len(slab) - size:
            continue
        row = rows[targets[i]]
        moments[:] = 0
        if mean.used[_IN_PARTIAL] >= mean.most[_IN_PARTIAL] or mean.used[_IN_COUNTERS] >= mean.most[_IN_COUNTERS]:
            flush_pattern(mean)
        if encoding == _BSLZ4 and not holds_floats and len(minus_offsets) == 0:
            block = _unpack_blocks(slab, at, at + size, nbytes, 8 * itemsize, planes.data, bad, planes.ends)
            status[i] = OK if block > 0 else DAMAGED
            if block > 0:
                _add_planes(planes, block, plan, frame, mean, row, moments)
                mean.used[:] += 1
        elif as_they_lie and size == nbytes and (slab.ctypes.data + at) % itemsize == 0:
            status[i] = OK
            view = numba.carray(address(slab, at), (pixels,), frame.dtype)
            if holds_floats and not _holds_numbers(view, bad):
                status[i] = NO_NUMBER
            else:
                _add_dense(view, start, pixels, plan, mean, row, moments)
                mean.used[_IN_PARTIAL] += 1
        else:
            status[i] = _unpack(slab, at, size, encoding, width, frame, planes.data, bad)
            if len(minus_offsets) and len(masked):
                _clear(frame, start, pixels, masked[0])
            if len(minus_offsets) and status[i] == OK:
                at, size = minus_offsets[i], minus_sizes[i]
                if at < 0 or size < 0 or at > len(minus_slab) - size:
                    status[i] = WRONG_SIZE
                else:
                    status[i] = _unpack(minus_slab, at, size, minus_encoding, width, other, planes.data, bad)
                    _subtract(frame, other)
            if holds_floats and status[i] == OK and not _holds_numbers(frame, bad):
                status[i] = NO_NUMBER
            if status[i] == OK:
                _add_dense(frame, start, pixels, plan, mean, row, moments)
                mean.used[_IN_PARTIAL] += 1
        sums[targets[i]] = moments
