"""A compiled walk over a batch of the native protocol: what the headers of frames say, without building one object.

It only knows sound "frames" messages: two parts, of which the first is a msgpack map with "type", "series", "first",
"count", "encoding" and perhaps "sizes", each once or several times (then the last one holds), in any order, between
keys of any other name. What it does not know, or finds wrong, is ``OTHER``: the decoder reads that with ``msgpack`` and
says what is the matter. So whatever is found here is what ``msgpack`` would have found.

Every step is checked against the end of the header, nesting is bounded, and texts are Unicode or refused.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from detectors.messages import Encoding
from detectors.protocols.intrinsics import byte_at

OTHER, FRAMES = range(2)

#: No sane frame index or series length is larger; keeps a damaged header from asking for the impossible.
LARGEST_INDEX = 2**53
MAX_FRAMES_PER_MESSAGE = 65536
MAX_HEADER_BYTES = 16 << 20

#: One message: the batch's parts from ``part`` to before ``stop``. ``same``: 1 where it is ``FRAMES`` of the series and
#: encoding of the message before. ``series``: a number, by ``text_size`` an int64 (-1) or a uint64 in two's complement
#: (-2), else the text at ``text_at``. ``encoding``: a ``messages.Encoding``. Its ``count`` frames, ``first`` and
#: following, are those from ``row`` on. ``sizes_at``: where their sizes are read, -1 if they are equal; ``offset``,
#: ``size``: the payload. After ``OTHER``, what comes behind ``row`` means nothing.
MESSAGE = np.dtype(
    [(name, np.int64) for name in (
        "what", "same", "part", "stop", "row", "series", "text_at", "text_size", "encoding", "first", "count",
        "sizes_at", "offset", "size",
    )]
)  # fmt: skip

_BAD, _UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _NIL, _SIMPLE, _SIGNED = range(-1, 9)
_MAX_DEPTH = 32

#: Kind, and bytes of the argument, of the items that begin with 0xc0 to 0xdf (msgpack's specification). Extensions, for
#: which ``msgpack`` has rules of its own, are left to it.
_KINDS = np.array(
    [
        *((_NIL, 0), (_BAD, 0), (_SIMPLE, 0), (_SIMPLE, 0)),
        *((_BYTES, 1), (_BYTES, 2), (_BYTES, 4)),
        *[(_BAD, 0)] * 3,
        *((_SIMPLE, 4), (_SIMPLE, 8)),
        *((_UINT, 1), (_UINT, 2), (_UINT, 4), (_UINT, 8)),
        *((_SIGNED, 1), (_SIGNED, 2), (_SIGNED, 4), (_SIGNED, 8)),
        *[(_BAD, 0)] * 5,
        *((_TEXT, 1), (_TEXT, 2), (_TEXT, 4)),
        *((_ARRAY, 2), (_ARRAY, 4)),
        *((_MAP, 2), (_MAP, 4)),
    ],
    np.int64,
)


def _word(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


_TYPE, _IS_FRAMES, _SERIES, _FIRST, _COUNT = (_word(key) for key in ("type", "frames", "series", "first", "count"))
_ENCODING, _SIZES = _word("encoding"), _word("sizes")
_RAW, _LZ4, _BSLZ4 = _word("raw"), _word("lz4"), _word("bslz4")
_CODE_RAW, _CODE_BSLZ4, _CODE_LZ4 = int(Encoding.RAW), int(Encoding.BSLZ4), int(Encoding.LZ4)

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _head(slab: int, at: int, end: int) -> Any:
    """The head of the item at ``at``: (kind, argument, where its contents begin); ``_BAD`` where there is none.

    Bytes and texts are whole. An unsigned argument of 2^63 and more comes out negative.
    """
    if at >= end:
        return _BAD, 0, end
    first = byte_at(slab, at)
    at += 1
    if first < 0x80:
        return _UINT, first, at
    if first >= 0xE0:
        return _NEGATIVE, first - 256, at
    if first < 0x90:
        return _MAP, first & 15, at
    if first < 0xA0:
        return _ARRAY, first & 15, at
    kind, argument = _TEXT, first & 31
    if first >= 0xC0:
        kind, width = _KINDS[first - 0xC0, 0], _KINDS[first - 0xC0, 1]
        if kind == _BAD or width > end - at:
            return _BAD, 0, end
        argument = np.int64(0)
        for i in range(width):
            argument = argument << 8 | byte_at(slab, at + i)
        at += width
        if kind == _SIGNED:
            if width < 8 and argument >> (8 * width - 1):
                argument -= np.int64(1) << 8 * width
            return (_NEGATIVE if argument < 0 else _UINT), argument, at
    if kind in (_TEXT, _BYTES) and argument > end - at:
        return _BAD, 0, end
    return kind, argument, at


@_compiled
def _is_unicode(slab: int, at: int, size: int) -> bool:
    """Whether bytes are UTF-8 as Python reads it: no surrogates, nothing longer than need be (RFC 3629)."""
    end = at + size
    while at < end:
        first = byte_at(slab, at)
        at += 1
        if first < 0x80:
            continue
        if 0xC2 <= first <= 0xDF:
            more = 1
        elif 0xE0 <= first <= 0xEF:
            more = 2
        elif 0xF0 <= first <= 0xF4:
            more = 3
        else:
            return False
        if more > end - at:
            return False
        second = byte_at(slab, at)
        if (
            (first == 0xE0 and second < 0xA0)
            or (first == 0xED and second > 0x9F)
            or (first == 0xF0 and second < 0x90)
            or (first == 0xF4 and second > 0x8F)
        ):
            return False
        for _ in range(more):
            if byte_at(slab, at) >> 6 != 2:
                return False
            at += 1
    return True


@_compiled
def _skip(slab: int, at: int, end: int, left: np.ndarray) -> int:
    """Where the whole item at ``at`` ends; -1 if it is malformed, too deeply nested, or goes beyond ``end``.

    ``left``: scratch, for each level the items that are still to come and whether it is a map.
    """
    depth = 0
    left[0, 0], left[0, 1] = 1, 0
    while True:
        kind, argument, at = _head(slab, at, end)
        if kind == _BAD:
            return -1
        if left[depth, 1] and left[depth, 0] & 1 == 0 and kind != _TEXT and kind != _BYTES:
            return -1  # msgpack takes no other keys
        if kind == _TEXT and not _is_unicode(slab, at, argument):
            return -1
        if kind in (_TEXT, _BYTES):
            at += argument
        elif kind in (_ARRAY, _MAP) and argument > 0:
            # Every item takes a byte at least: what announces more than there are bytes is refused at once.
            depth += 1
            if argument > end - at or depth == _MAX_DEPTH:
                return -1
            left[depth, 0] = argument * 2 if kind == _MAP else argument
            left[depth, 1] = kind == _MAP
            continue
        # An item is complete, and with it perhaps those around it.
        while True:
            left[depth, 0] -= 1
            if left[depth, 0] > 0:
                break
            if depth == 0:
                return at
            depth -= 1


@_compiled
def _is(slab: int, at: int, size: int, word: np.ndarray) -> bool:
    if size != len(word):
        return False
    for i in range(len(word)):  # noqa: SIM110 - compiled, and a generator is not
        if byte_at(slab, at + i) != word[i]:
            return False
    return True


@_compiled
def _read_header(slab: int, at: int, end: int, size: int, out: Any, left: np.ndarray) -> bool:
    """The header of frames whose payload has ``size`` bytes; whether it is one, and nothing in it is wrong."""
    kind, pairs, at = _head(slab, at, end)
    if kind != _MAP:
        return False
    typed = has_series = False
    out.first = out.count = out.encoding = out.sizes_at = -1
    listed = total = 0
    for _ in range(pairs):
        kind, key_size, key = _head(slab, at, end)
        if kind != _TEXT and kind != _BYTES:
            return False
        value = key + key_size
        at = -1
        if kind == _TEXT:
            kind, argument, contents = _head(slab, value, end)
            if _is(slab, key, key_size, _TYPE):
                if kind != _TEXT or not _is(slab, contents, argument, _IS_FRAMES):
                    return False
                typed, at = True, contents + argument
            elif _is(slab, key, key_size, _SERIES):
                has_series, at = True, contents
                if kind == _TEXT:
                    if not _is_unicode(slab, contents, argument):
                        return False
                    out.series, out.text_at, out.text_size = 0, contents, argument
                    at += argument
                elif kind in (_UINT, _NEGATIVE):
                    out.series, out.text_at = argument, 0
                    out.text_size = -2 if kind == _UINT and argument < 0 else -1
                else:
                    return False
            elif _is(slab, key, key_size, _FIRST):
                if kind != _UINT or not 0 <= argument <= LARGEST_INDEX:
                    return False
                out.first, at = argument, contents
            elif _is(slab, key, key_size, _COUNT):
                if kind != _UINT or not 1 <= argument <= MAX_FRAMES_PER_MESSAGE:
                    return False
                out.count, at = argument, contents
            elif _is(slab, key, key_size, _ENCODING):
                if kind != _TEXT:
                    return False
                if _is(slab, contents, argument, _BSLZ4):
                    out.encoding = _CODE_BSLZ4
                elif _is(slab, contents, argument, _LZ4):
                    out.encoding = _CODE_LZ4
                elif _is(slab, contents, argument, _RAW):
                    out.encoding = _CODE_RAW
                else:
                    return False
                at = contents + argument
            elif _is(slab, key, key_size, _SIZES):
                at = contents
                out.sizes_at, listed, total = -1, 0, 0
                if kind == _ARRAY and argument <= MAX_FRAMES_PER_MESSAGE:
                    out.sizes_at, listed = contents, argument
                    for _ in range(listed):
                        kind, argument, at = _head(slab, at, end)
                        # None is larger than all of them together, so that the sum has room.
                        if kind != _UINT or not 0 <= argument <= size:
                            return False
                        total += argument
                elif kind != _NIL:
                    return False
            elif not _is_unicode(slab, key, key_size):
                return False
        if at < 0:  # a key that does not concern us
            at = _skip(slab, value, end, left)
            if at < 0:
                return False
    if at != end or not typed or not has_series or out.first < 0 or out.count < 0 or out.encoding < 0:
        return False
    if out.sizes_at < 0:
        return size % out.count == 0 and (size > 0 or out.count == 1)
    return listed == out.count and total == size


@_compiled
def _alike(slab: int, one: Any, other: Any) -> bool:
    """Whether two messages bring frames of one series and encoding."""
    if other.what != FRAMES or one.encoding != other.encoding:
        return False
    if one.text_size != other.text_size or one.series != other.series:
        return False
    for i in range(one.text_size):  # noqa: SIM110
        if byte_at(slab, one.text_at + i) != byte_at(slab, other.text_at + i):
            return False
    return True


@_compiled
def _walk(
    slab: int, slab_size: int, offsets: np.ndarray, sizes: np.ndarray, last: np.ndarray, out: np.ndarray
) -> tuple[int, int]:
    """Every message of the batch into ``out``; how many, and how many frames they have."""
    left = np.empty((_MAX_DEPTH, 2), np.int64)
    count = rows = first = 0
    for part in range(len(offsets)):
        if not last[part]:
            continue
        message = out[count]
        message.part, message.stop, message.row = first, part + 1, rows
        message.what, message.same = OTHER, 0
        if part == first + 1:
            at, size = offsets[first], sizes[first]
            message.offset, message.size = offsets[part], sizes[part]
            inside = at >= 0 and 0 <= size <= slab_size - at
            if inside and size <= MAX_HEADER_BYTES and _read_header(slab, at, at + size, message.size, message, left):
                message.what = FRAMES
                message.same = count > 0 and _alike(slab, message, out[count - 1])
                rows += message.count
        first = part + 1
        count += 1
    return count, rows


@_compiled
def _list_frames(
    slab: int, slab_size: int, messages: np.ndarray, indices: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
) -> None:
    """The frames of all messages, one after another."""
    for i in range(len(messages)):
        message = messages[i]
        if message.what != FRAMES:
            continue
        row, at, offset = message.row, message.sizes_at, message.offset
        size = message.size // message.count
        for k in range(message.count):
            if at >= 0:
                _, size, at = _head(slab, at, slab_size)
            indices[row + k], offsets[row + k], sizes[row + k] = message.first + k, offset, size
            offset += size


class Frames(NamedTuple):
    """The frames of a batch, in order of arrival: int64 (frames,) each, as in ``messages.FrameBlock``."""

    indices: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def walk(slab: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, Frames]:
    """Read the messages of a batch (see ``messages.ReceivedBatch``): an array of ``MESSAGE``, and their frames.

    Releases the GIL. Never raises for what messages hold.
    """
    messages = np.empty(len(offsets), MESSAGE)  # memory that is not used is never touched
    address = slab.ctypes.data
    count, rows = _walk(address, slab.nbytes, offsets, sizes, last, messages)
    frames = Frames(*(np.empty(rows, np.int64) for _ in range(3)))
    _list_frames(address, slab.nbytes, messages[:count], *frames)
    return messages[:count], frames


@functools.cache
def prepare() -> None:
    """Load or compile the walk, which can take seconds: to be called before messages are waiting."""
    none = np.empty(0, np.int64)
    walk(np.empty(0, np.uint8), none, none, np.empty(0, np.bool_))
