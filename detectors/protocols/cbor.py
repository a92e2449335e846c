"""CBOR (RFC 8949) as DECTRIS Stream V2 speaks it: a compiled walk over a batch of messages, and small helpers.

The walk finds what an image message says (number, time, where each channel's payload lies) without building one object
or copying one byte. Keys may come in any order; what is unknown is skipped whole, whatever it is made of. Every step is
checked against the end of the message, and nesting is bounded: damaged or hostile bytes end in ``DAMAGED``.

Start and end messages are rare: ``entries`` cuts them into their keys and values, and ``cbor2`` reads the values asked
for, if they are of a harmless kind.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import cbor2
import numba
import numpy as np

from detectors.messages import Encoding
from detectors.protocols.intrinsics import byte_at

#: What a message is: an image, another map with a type, or nothing that can be used (see ``REASONS``).
IMAGE, OTHER, NO_MAP, DAMAGED, NO_TYPE, NO_SERIES, NO_INDEX, NO_DATA = range(8)
REASONS = {
    NO_MAP: "not a CBOR map",
    DAMAGED: "a damaged or truncated CBOR map",
    NO_TYPE: "a CBOR map without a 'type'",
    NO_SERIES: "an image without 'series_id' and 'series_unique_id'",
    NO_INDEX: "an image without a usable 'image_id'",
    NO_DATA: "an image without a usable 'data' map of 1 to 16 channels",
}

#: Why a channel of an image cannot be used.
FINE, NO_ARRAY, COLUMN_MAJOR, BAD_SHAPE, IN_PIECES, ALGORITHM = range(6)
PROBLEMS = {
    NO_ARRAY: "is not a row-major array (tag 40) of a typed byte string",
    COLUMN_MAJOR: "is a column-major array (tag 1040), which is not supported",
    BAD_SHAPE: "does not have two dimensions from 1 to 65536",
    IN_PIECES: "is a byte string of indefinite length, which is not supported",
}

NO_TIME = np.iinfo(np.int64).min

#: One message. ``same``: 1 where all but the frame itself is as in the message before. ``lost``: how many frames are
#: lost if it cannot be read. ``series``: as a number (u64 in two's complement) unless ``text_size`` >= 0, then as the
#: text at ``text_at``. ``exposed_ns``: ``start_time``, or ``NO_TIME``. Its channels: ``channels`` from ``first`` on.
MESSAGE = np.dtype(
    [(name, np.int64) for name in (
        "what", "same", "lost", "series", "text_at", "text_size", "index", "exposed_ns", "first", "channels",
    )]
)  # fmt: skip

#: One channel of an image: its name, payload (``offset``, ``size``) and, if it names one, algorithm as byte ranges of
#: the slab; ``encoding`` a ``messages.Encoding``; ``element`` the algorithm's size of an element; ``tag`` that of the
#: typed array (RFC 8746).
CHANNEL = np.dtype(
    [(name, np.int64) for name in (
        "problem", "name_at", "name_size", "tag", "rows", "columns", "encoding", "element",
        "algorithm_at", "algorithm_size", "offset", "size",
    )]
)  # fmt: skip

#: A series' name beyond so many bytes is none.
MAX_ID_BYTES = 1024
#: More channels than any detector has: four thresholds and their difference.
_MAX_CHANNELS = 16
_MAX_DEPTH = 64
_MAX_KEYS = 256
#: A value of a start message beyond so many items is not read.
_MAX_ITEMS = 1 << 14
_LARGEST_INDEX = 1 << 53

_UINT, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
#: Added to the kind of an item of indefinite length; with the simple values' kind it is the "break" that ends one.
_OPEN = 8
_BREAK = _SIMPLE + _OPEN

_TAG_ARRAY, _TAG_COLUMN_MAJOR, _TAG_COMPRESSED, _TAG_SELF_DESCRIBED = 40, 1040, 56500, 55799


def _word(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


_TYPE, _IMAGE, _DATA, _IMAGE_ID = _word("type"), _word("image"), _word("data"), _word("image_id")
_SERIES_ID, _UNIQUE_ID, _START_TIME = _word("series_id"), _word("series_unique_id"), _word("start_time")
_BSLZ4, _LZ4 = _word("bslz4"), _word("lz4")
_CODE_RAW, _CODE_BSLZ4, _CODE_LZ4 = int(Encoding.RAW), int(Encoding.BSLZ4), int(Encoding.LZ4_BLOCKS)

# What is read is given to the compiled functions as an address, ``slab``: counting the references to an array at every
# call would cost more than most of them do.
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _head(slab: int, at: int, end: int) -> Any:
    """The head of the item at ``at``: (kind, argument, where its contents begin); kind -1 where there is none.

    An argument of 2^63 and more comes out negative.
    """
    if at >= end:
        return -1, 0, end
    first = byte_at(slab, at)
    kind, info = first >> 5, first & 31
    at += 1
    if info < 24:
        return kind, info, at
    if info == 31 and (_BYTES <= kind <= _MAP or kind == _SIMPLE):
        return kind + _OPEN, 0, at
    if info > 27 or 1 << (info - 24) > end - at:
        return -1, 0, end
    argument = np.int64(0)
    for _ in range(1 << (info - 24)):
        argument = argument << 8 | byte_at(slab, at)
        at += 1
    return kind, argument, at


@_compiled
def _skip(slab: int, at: int, end: int, left: np.ndarray) -> int:
    """Where the whole item at ``at`` ends; -1 if it is malformed, too deeply nested, or goes beyond ``end``.

    ``left``: scratch, for each level the items that are still to come; for a level of indefinite length -1, or -2
    after a map's key.
    """
    depth = 0
    left[0] = 1
    while True:
        kind, argument, at = _head(slab, at, end)
        if kind == _BREAK:
            if left[depth] != -1:
                return -1
            depth -= 1
        elif kind in (_BYTES, _TEXT):
            if not 0 <= argument <= end - at:
                return -1
            at += argument
        elif kind == _BYTES + _OPEN or kind == _TEXT + _OPEN:
            piece, size, at = _head(slab, at, end)
            while piece == kind - _OPEN and 0 <= size <= end - at:
                piece, size, at = _head(slab, at + size, end)
            if piece != _BREAK:
                return -1
        elif _ARRAY <= kind <= _TAG or kind >= _OPEN:
            # Every item takes a byte at least: what announces more than there are bytes is refused at once.
            if kind == _TAG:
                items = 1
            elif kind >= _OPEN:
                items = -1
            elif 0 <= argument <= end - at:
                items = argument * 2 if kind == _MAP else argument
            else:
                return -1
            if items != 0:
                depth += 1
                if depth == _MAX_DEPTH:
                    return -1
                # The break of a map may not come after a key: there, -1 and -2 take turns.
                left[depth] = items
                left[_MAX_DEPTH + depth] = kind == _MAP + _OPEN
                continue
        elif kind < 0:
            return -1
        # An item is complete, and with it perhaps those around it.
        while True:
            if left[depth] < 0:
                if left[_MAX_DEPTH + depth]:
                    left[depth] = -3 - left[depth]
                break
            left[depth] -= 1
            if left[depth] > 0:
                break
            if depth == 0:
                return at
            depth -= 1


@_compiled
def _scratch() -> np.ndarray:
    """What ``_skip`` counts in: items left at each level, and whether the level is a map of indefinite length."""
    return np.empty(2 * _MAX_DEPTH, np.int64)


@_compiled
def _is(slab: int, at: int, size: int, word: np.ndarray) -> bool:
    if size != len(word):
        return False
    for i in range(len(word)):  # noqa: SIM110 - compiled, and a generator is not
        if byte_at(slab, at + i) != word[i]:
            return False
    return True


@_compiled
def _untagged(slab: int, at: int, end: int) -> tuple[int, int, int]:
    """The head of an item without the tags around it."""
    kind, argument, at = _head(slab, at, end)
    while kind == _TAG:
        kind, argument, at = _head(slab, at, end)
    return kind, argument, at


@_compiled
def _array_of(slab: int, at: int, end: int, count: int) -> int:
    """Where the first item of an array of ``count`` lies; -1 if there is none."""
    kind, argument, at = _head(slab, at, end)
    return at if (kind == _ARRAY and argument == count) or kind == _ARRAY + _OPEN else -1


@_compiled
def _nanoseconds(slab: int, at: int, end: int) -> int:
    """A rational number of seconds, ``[numerator, denominator]``, in whole nanoseconds, or ``NO_TIME``."""
    kind, _, contents = _untagged(slab, at, end)
    if kind != _ARRAY and kind != _ARRAY + _OPEN:
        return NO_TIME
    kind, numerator, at = _head(slab, contents, end)
    if (kind != _UINT and kind != _NEGATIVE) or numerator < 0:
        return NO_TIME
    if kind == _NEGATIVE:
        numerator = -1 - numerator
    kind, denominator, at = _head(slab, at, end)
    if kind != _UINT or not 0 < denominator < 1 << 33:
        return NO_TIME
    seconds, rest = numerator // denominator, numerator % denominator
    if not -9_000_000_000 < seconds < 9_000_000_000:
        return NO_TIME
    return seconds * 1_000_000_000 + rest * 1_000_000_000 // denominator


@_compiled
def _read_channel(slab: int, at: int, end: int, out: Any, left: np.ndarray) -> None:
    """One value of ``data``, well-formed: ``40([[rows, columns], tag(payload)])``."""
    out.problem = NO_ARRAY
    out.tag = out.rows = out.columns = out.element = out.algorithm_size = out.offset = out.size = 0
    out.encoding = _CODE_RAW
    kind, argument, at = _head(slab, at, end)
    if kind == _TAG and argument == _TAG_COLUMN_MAJOR:
        out.problem = COLUMN_MAJOR
    if kind != _TAG or argument != _TAG_ARRAY:
        return
    at = _array_of(slab, at, end, 2)
    if at < 0:
        return
    contents = _array_of(slab, at, end, 2)
    if contents < 0:
        out.problem = BAD_SHAPE
        return
    kind, out.rows, contents = _head(slab, contents, end)
    other, out.columns, contents = _head(slab, contents, end)
    at = _skip(slab, at, end, left)
    two = kind == _UINT and other == _UINT and at - contents <= 1  # a byte more is the break
    if not (two and 1 <= out.rows <= 65536 and 1 <= out.columns <= 65536):
        out.problem = BAD_SHAPE
        return
    kind, out.tag, at = _head(slab, at, end)
    if kind != _TAG:
        return
    kind, argument, contents = _head(slab, at, end)
    if kind == _TAG and argument == _TAG_COMPRESSED:
        at = _array_of(slab, contents, end, 3)
        if at < 0:
            return
        kind, size, at = _head(slab, at, end)
        if kind != _TEXT:
            return
        out.algorithm_at, out.algorithm_size = at, size
        at += size
        if _is(slab, out.algorithm_at, size, _BSLZ4):
            out.encoding = _CODE_BSLZ4
        elif _is(slab, out.algorithm_at, size, _LZ4):
            out.encoding = _CODE_LZ4
        else:
            out.problem = ALGORITHM
            return
        kind, out.element, at = _head(slab, at, end)
        if kind != _UINT:
            return
        kind, argument, contents = _head(slab, at, end)
    if kind == _BYTES + _OPEN:
        out.problem = IN_PIECES
    if kind != _BYTES:
        return
    out.offset, out.size = contents, argument
    out.problem = FINE


@_compiled
def _read_channels(slab: int, at: int, end: int, channels: np.ndarray, first: int, left: np.ndarray) -> int:
    """The map of channels at ``at``, well-formed, into ``channels`` from ``first`` on; how many, -1 if unusable."""
    kind, pairs, at = _untagged(slab, at, end)
    if kind != _MAP and kind != _MAP + _OPEN:
        return -1
    if kind == _MAP + _OPEN:
        pairs = -1
    count = 0
    while pairs != 0:
        pairs -= 1
        kind, size, name = _head(slab, at, end)
        if kind == _BREAK:
            break
        if kind != _TEXT or count == _MAX_CHANNELS:
            return -1
        value = name + size
        at = _skip(slab, value, end, left)
        out = channels[first + count]
        out.name_at, out.name_size = name, size
        _read_channel(slab, value, at, out, left)
        count += 1
    return count if count else -1


@_compiled
def _begin(slab: int, at: int, end: int) -> tuple[int, int]:
    """(pairs, where the first one lies) of a message's map; pairs -1 for indefinite length, -2 if it is no map."""
    kind, argument, at = _head(slab, at, end)
    if kind == _TAG and argument == _TAG_SELF_DESCRIBED:
        kind, argument, at = _head(slab, at, end)
    if kind == _MAP + _OPEN:
        return -1, at
    return (argument, at) if kind == _MAP and argument >= 0 else (-2, at)


@_compiled
def _read_message(slab: int, at: int, end: int, out: Any, channels: np.ndarray, first: int, left: np.ndarray) -> None:
    """One message; its channels are put into ``channels`` from ``first`` on."""
    out.first = first
    out.what = NO_MAP
    out.same = out.series = out.text_at = out.channels = 0
    out.index = out.text_size = -1
    out.lost = 1
    out.exposed_ns = NO_TIME
    pairs, at = _begin(slab, at, end)
    if pairs == -2:
        return
    out.what = DAMAGED
    what, has_series, has_text = NO_TYPE, False, False
    while pairs != 0:
        pairs -= 1
        kind, size, key = _head(slab, at, end)
        if kind == _BREAK and pairs < 0:
            at = key
            break
        value = _skip(slab, at, end, left)
        if value < 0:
            return
        at = _skip(slab, value, end, left)
        if at < 0:
            return
        if kind != _TEXT:
            continue
        if _is(slab, key, size, _TYPE):
            kind, size, contents = _untagged(slab, value, at)
            what = NO_TYPE
            if kind == _TEXT:
                what = IMAGE if _is(slab, contents, size, _IMAGE) else OTHER
                out.lost = what == IMAGE
        elif _is(slab, key, size, _SERIES_ID):
            kind, argument, contents = _untagged(slab, value, at)
            has_series = kind == _UINT or (kind == _TEXT and argument <= MAX_ID_BYTES)
            if kind == _UINT:
                out.series, out.text_size = argument, -1
            elif kind == _TEXT:
                out.text_at, out.text_size = contents, argument
        elif _is(slab, key, size, _UNIQUE_ID):
            kind, unique_size, unique_at = _untagged(slab, value, at)
            has_text = kind == _TEXT and unique_size <= MAX_ID_BYTES
        elif _is(slab, key, size, _IMAGE_ID):
            kind, argument, contents = _untagged(slab, value, at)
            out.index = argument if kind == _UINT and 0 <= argument <= _LARGEST_INDEX else -1
        elif _is(slab, key, size, _START_TIME):
            out.exposed_ns = _nanoseconds(slab, value, at)
        elif _is(slab, key, size, _DATA):
            out.channels = _read_channels(slab, value, at, channels, first, left)
    if at != end:  # something follows that belongs to no message
        return
    if not has_series and has_text:
        out.text_at, out.text_size = unique_at, unique_size
    if what == IMAGE:
        if not has_series and not has_text:
            what = NO_SERIES
        elif out.index < 0:
            what = NO_INDEX
        elif out.channels <= 0:
            what = NO_DATA
    out.what = what


@_compiled
def _same_text(slab: int, one: int, other: int, size: int) -> bool:
    for i in range(size):  # noqa: SIM110
        if byte_at(slab, one + i) != byte_at(slab, other + i):
            return False
    return True


@_compiled
def _alike(slab: int, one: Any, other: Any, channels: np.ndarray) -> bool:
    """Whether two images are of one series, and their channels the same in all but their contents."""
    if one.what != IMAGE or other.what != IMAGE or one.channels != other.channels or one.text_size != other.text_size:
        return False
    if one.text_size < 0 and one.series != other.series:
        return False
    if one.text_size > 0 and not _same_text(slab, one.text_at, other.text_at, one.text_size):
        return False
    for i in range(one.channels):
        a, b = channels[one.first + i], channels[other.first + i]
        if (
            a.problem != b.problem
            or a.tag != b.tag
            or a.rows != b.rows
            or a.columns != b.columns
            or a.encoding != b.encoding
            or a.element != b.element
            or a.name_size != b.name_size
            or not _same_text(slab, a.name_at, b.name_at, a.name_size)
        ):
            return False
    return True


@_compiled
def _walk(
    slab: int, slab_size: int, offsets: np.ndarray, sizes: np.ndarray, out: np.ndarray, channels: np.ndarray
) -> None:
    left = _scratch()
    used = 0
    for i in range(len(offsets)):
        message, at, size = out[i], offsets[i], sizes[i]
        if not 0 <= size <= slab_size - at or at < 0:
            at = size = 0
        _read_message(slab, at, at + size, message, channels, used, left)
        if message.what == IMAGE:
            used += message.channels
            message.same = i > 0 and _alike(slab, message, out[i - 1], channels)


@_compiled
def _entries(slab: int, end: int, out: np.ndarray) -> int:
    """Text keys and values of the map in ``end`` bytes, as rows (key, its size, value, its end); how many."""
    left = _scratch()
    pairs, at = _begin(slab, 0, end)
    count = 0
    while pairs != 0 and count < len(out):
        pairs -= 1
        kind, size, key = _head(slab, at, end)
        if kind == _BREAK and pairs < 0:
            break
        value = _skip(slab, at, end, left)
        at = -1 if value < 0 else _skip(slab, value, end, left)
        if at < 0:
            break
        if kind == _TEXT:
            out[count, 0], out[count, 1], out[count, 2], out[count, 3] = key, size, value, at
            count += 1
    return count


@_compiled
def _is_harmless(slab: int, end: int) -> bool:
    """Whether a well-formed value is small, and has none of the tags that make objects of many kinds, or cycles."""
    at = items = 0
    while at < end:
        kind, argument, at = _head(slab, at, end)
        items += 1
        if kind in (_BYTES, _TEXT):
            at += argument
        elif kind == _TAG and not (argument in (0, _TAG_ARRAY, _TAG_COMPRESSED) or 64 <= argument <= 87):
            return False
        if items > _MAX_ITEMS:
            return False
    return True


def walk(slab: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read messages that lie in ``slab`` (uint8): arrays of ``MESSAGE``, one each, and ``CHANNEL``, one after another.

    ``offsets``, ``sizes``: int64, where each message lies. Releases the GIL. Never raises for what messages hold.
    """
    messages = np.empty(len(offsets), MESSAGE)
    channels = np.empty((len(offsets) + 1) * _MAX_CHANNELS, CHANNEL)  # memory that is not used is never touched
    _walk(_address(slab), slab.nbytes, offsets, sizes, messages, channels)
    return messages, channels


def _address(data: memoryview | np.ndarray) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data


@functools.cache
def prepare() -> None:
    """Load or compile the walk, which can take seconds: to be called before messages are waiting."""
    none = np.empty(0, np.int64)
    walk(np.empty(0, np.uint8), none, none)
    load(entries(b"\xa1\x61a\x01")["a"])


def entries(message: bytes | memoryview) -> dict[str, memoryview]:
    """The values, still packed, of the text keys of a message that ``walk`` found to be in order."""
    out = np.empty((_MAX_KEYS, 4), np.int64)
    view = memoryview(message)
    rows = out[: _entries(_address(view), view.nbytes, out)].tolist()
    return {str(view[key : key + size], "utf-8", "replace"): view[value:end] for key, size, value, end in rows}


def load(value: memoryview | None, largest: int = 1 << 20) -> Any:
    """One value of ``entries`` as an object; None for what is absent, malformed, of an uncommon tag, or too large.

    ``largest``: bytes, packed; there may also be no more than 16384 items in it.

    By cbor2's version and the place in the message, maps and arrays are dict and list, or frozendict and tuple.
    """
    if value is None or value.nbytes > largest or not _is_harmless(_address(value), value.nbytes):
        return None
    try:
        return cbor2.loads(bytes(value))
    except Exception:  # cbor2 raises many unrelated types on malformed input
        return None


def plain(value: Any, depth: int = 0) -> Any:
    """Numbers, texts, lists and dicts with text keys, as JSON has them (and dates as text); None for the rest."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, date):
        return value.isoformat()
    if depth == _MAX_DEPTH or isinstance(value, bytes | bytearray):
        return None
    if isinstance(value, Mapping):
        return {key: plain(item, depth + 1) for key, item in value.items() if isinstance(key, str)}
    return [plain(item, depth + 1) for item in value] if isinstance(value, Sequence) else None


def head(kind: int, argument: int) -> bytes:
    """The head of an item of major type ``kind`` with a non-negative ``argument``, in as few bytes as possible."""
    if argument < 24:
        return bytes((kind << 5 | argument,))
    size = next(size for size in range(4) if argument < 1 << (8 << size))
    return bytes((kind << 5 | 24 + size,)) + argument.to_bytes(1 << size, "big")
