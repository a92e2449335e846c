"""A compiled walk over a batch of DECTRIS Stream V1: what images say, without building one object.

It only knows whole images as detectors send them: three flat JSON objects of integers, plain texts and short lists of
integers, with the keys in any order, any others beside them, and the pixels where they belong. Everything else is left
to the decoder, which reads it part by part with ``json``; so whatever is found here is what ``json`` would have found.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from detectors.protocols.dectris_v1_parts import LARGEST_INDEX, MAX_TEXT_BYTES
from detectors.protocols.intrinsics import byte_at

#: One image: ``parts`` parts of the batch from ``part`` on, 5 with an appendix. ``same``: 1 where it follows the image
#: before, of the same series and layout. Its pixels: ``size`` bytes at ``offset``. ``time_ns``: ``start_time``, or
#: ``NO_TIME``. ``unframed``: 1 where the first 12 bytes of a bitshuffle payload are 0, see the decoder. ``shape`` as
#: sent, packed (see :func:`shape_of`); ``encoding`` and ``type`` as byte ranges of the slab.
IMAGE = np.dtype(
    [(name, np.int64) for name in (
        "same", "part", "parts", "series", "frame", "offset", "size", "time_ns", "unframed", "shape",
        "dimensions", "encoding_at", "encoding_size", "type_at", "type_size",
    )]
)  # fmt: skip

NO_TIME = -1

#: What a value is; ``_BAD``: nothing that is known here.
_BAD, _NUMBER, _TEXT, _LIST = range(4)
_MAX_DIGITS = 18
#: Numbers of a list are so many bits long at most, and so many.
_LIST_BITS, _MAX_LISTED = 20, 3


def _word(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


_HTYPE, _DIMAGE, _DIMAGE_D, _DCONFIG = (_word(text) for text in ("htype", "dimage-1.0", "dimage_d-1.0", "dconfig-1.0"))
_SERIES, _FRAME, _SHAPE, _SIZE, _TYPE = (_word(text) for text in ("series", "frame", "shape", "size", "type"))
_ENCODING, _START_TIME, _STOP_TIME = (_word(text) for text in ("encoding", "start_time", "stop_time"))

_QUOTE, _COMMA, _ZERO, _COLON, _OPEN_LIST, _BACKSLASH, _CLOSE_LIST, _OPEN, _CLOSE = b'",0:[\\]{}'

# What is read is given to the compiled functions as an address: see ``detectors.protocols.intrinsics``.
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _byte(slab: int, at: int, end: int) -> int:
    """The byte at ``at``; 0, which nothing here begins with, from ``end`` on."""
    return byte_at(slab, at) if at < end else 0


@_compiled
def _is_space(byte: int) -> bool:
    return byte == 0x20 or byte == 0x0A or byte == 0x0D or byte == 0x09


@_compiled
def _behind_space(slab: int, at: int, end: int) -> int:
    while at < end and _is_space(byte_at(slab, at)):
        at += 1
    return at


@_compiled
def _behind_text(slab: int, at: int, end: int) -> int:
    """Behind the text that begins with the quote at ``at``; -1 if it is none, or has more than printable ASCII."""
    if _byte(slab, at, end) != _QUOTE:
        return -1
    at += 1
    while at < end:
        byte = byte_at(slab, at)
        at += 1
        if byte == _QUOTE:
            return at
        if not 0x20 <= byte < 0x7F or byte == _BACKSLASH:
            return -1
    return -1


@_compiled
def _number(slab: int, at: int, end: int) -> tuple[int, int]:
    """(value, what follows) of a whole number that is not negative; -1 for the latter if there is none."""
    first, value = at, 0
    while at < end and at - first <= _MAX_DIGITS:
        digit = byte_at(slab, at) - _ZERO
        if not 0 <= digit <= 9:
            break
        value = 10 * value + digit
        at += 1
    digits = at - first
    if not 1 <= digits <= _MAX_DIGITS or (digits > 1 and byte_at(slab, first) == _ZERO):
        return 0, -1
    return value, at


@_compiled
def _list(slab: int, at: int, end: int) -> tuple[int, int, int]:
    """(numbers packed, how many, what follows) of the list that begins at ``at``; -1 for the last if there is none."""
    packed = count = 0
    while count < _MAX_LISTED:
        number, at = _number(slab, _behind_space(slab, at + 1, end), end)
        if at < 0 or number >> _LIST_BITS:
            return 0, 0, -1
        packed |= number << (_LIST_BITS * count)
        count += 1
        at = _behind_space(slab, at, end)
        byte = _byte(slab, at, end)
        if byte == _CLOSE_LIST:
            return packed, count, at + 1
        if byte != _COMMA:
            return 0, 0, -1
    return 0, 0, -1


@_compiled
def _member(slab: int, at: int, end: int) -> Any:
    """One member of an object: (what follows, key, its size, what the value is, value, size).

    The value: a number; where a text lies, and its size; a list packed, and its length. What follows is the next
    member, or ``end`` if the object is complete and nothing comes behind it.
    """
    failed = end, 0, 0, _BAD, 0, 0
    key = at + 1
    at = _behind_text(slab, at, end)
    if at < 0:
        return failed
    key_size = at - 1 - key
    at = _behind_space(slab, at, end)
    if _byte(slab, at, end) != _COLON:
        return failed
    at = _behind_space(slab, at + 1, end)
    byte = _byte(slab, at, end)
    value = size = 0
    if byte == _QUOTE:
        what, value = _TEXT, at + 1
        at = _behind_text(slab, at, end)
        size = at - 1 - value
    elif byte == _OPEN_LIST:
        what = _LIST
        value, size, at = _list(slab, at, end)
    else:
        what = _NUMBER
        value, at = _number(slab, at, end)
    if at < 0:
        return failed
    at = _behind_space(slab, at, end)
    byte = _byte(slab, at, end)
    at = _behind_space(slab, at + 1, end)
    if (byte == _COMMA and at < end) or (byte == _CLOSE and at == end):
        return at, key, key_size, what, value, size
    return failed


@_compiled
def _first_member(slab: int, at: int, end: int) -> int:
    """Where the first member of the object lies; ``end`` if there is no object, or it is longer than it may be."""
    at = _behind_space(slab, at, end if end - at <= MAX_TEXT_BYTES else at)
    return _behind_space(slab, at + 1, end) if _byte(slab, at, end) == _OPEN else end


@_compiled
def _is(slab: int, at: int, size: int, word: np.ndarray) -> bool:
    if size != len(word):
        return False
    for i in range(len(word)):  # noqa: SIM110 - compiled, and a generator is not
        if byte_at(slab, at + i) != word[i]:
            return False
    return True


@_compiled
def _read_dimage(slab: int, at: int, end: int, out: Any) -> bool:
    typed = False
    out.series = out.frame = -1
    at = _first_member(slab, at, end)
    while at < end:
        at, key, key_size, what, value, size = _member(slab, at, end)
        if what == _BAD:
            return False
        if _is(slab, key, key_size, _HTYPE):
            typed = what == _TEXT and _is(slab, value, size, _DIMAGE)
        elif _is(slab, key, key_size, _SERIES):
            out.series = value if what == _NUMBER else -1
        elif _is(slab, key, key_size, _FRAME):
            out.frame = value if what == _NUMBER and value <= LARGEST_INDEX else -1
    return typed and out.series >= 0 and out.frame >= 0


@_compiled
def _read_dimage_d(slab: int, at: int, end: int, out: Any) -> bool:
    typed = False
    out.size = out.dimensions = out.encoding_size = out.type_size = -1
    at = _first_member(slab, at, end)
    while at < end:
        at, key, key_size, what, value, size = _member(slab, at, end)
        if what == _BAD:
            return False
        if _is(slab, key, key_size, _HTYPE):
            typed = what == _TEXT and _is(slab, value, size, _DIMAGE_D)
        elif _is(slab, key, key_size, _SHAPE):
            out.shape, out.dimensions = value, size if what == _LIST else -1
        elif _is(slab, key, key_size, _SIZE):
            out.size = value if what == _NUMBER else -1
        elif _is(slab, key, key_size, _ENCODING):
            out.encoding_at, out.encoding_size = value, size if what == _TEXT else -1
        elif _is(slab, key, key_size, _TYPE):
            out.type_at, out.type_size = value, size if what == _TEXT else -1
    return typed and out.size >= 0 and out.dimensions >= 0 and out.encoding_size >= 0 and out.type_size >= 0


@_compiled
def _read_times(slab: int, at: int, end: int, out: Any) -> bool:
    typed = False
    start, stop = NO_TIME, 0
    at = _first_member(slab, at, end)
    while at < end:
        at, key, key_size, what, value, size = _member(slab, at, end)
        if what == _BAD:
            return False
        if _is(slab, key, key_size, _HTYPE):
            typed = what == _TEXT and _is(slab, value, size, _DCONFIG)
        elif _is(slab, key, key_size, _START_TIME) or _is(slab, key, key_size, _STOP_TIME):
            if what != _NUMBER:
                return False
            if key_size == len(_START_TIME):
                start = value
            else:
                stop = value
    # Simulators send zeros for what they do not know.
    out.time_ns = start if start > 0 or stop > 0 else NO_TIME
    return typed


@_compiled
def _is_appendix(slab: int, at: int, size: int) -> bool:
    """Whether a part behind an image can only be its appendix: no JSON object that names an ``htype``."""
    if not 2 <= size <= MAX_TEXT_BYTES or (byte_at(slab, at) != _OPEN and not _is_space(byte_at(slab, at))):
        return True
    for i in range(at, at + size):
        if byte_at(slab, i) == _BACKSLASH:
            return False
        if byte_at(slab, i) == _HTYPE[0] and at + size - i >= len(_HTYPE) and _is(slab, i, len(_HTYPE), _HTYPE):
            return False
    return True


@_compiled
def _is_unframed(slab: int, image: Any) -> bool:
    if image.encoding_size < 2 or byte_at(slab, image.encoding_at) != 0x62:  # b, as in bs16-lz4<
        return False
    if image.size < 12:
        return False
    for i in range(12):  # noqa: SIM110
        if byte_at(slab, image.offset + i):
            return False
    return True


@_compiled
def _same_text(slab: int, one: int, other: int, size: int) -> bool:
    for i in range(size):  # noqa: SIM110
        if byte_at(slab, one + i) != byte_at(slab, other + i):
            return False
    return True


@_compiled
def _follows(slab: int, one: Any, before: Any) -> bool:
    """Whether an image comes right behind another of the same series and layout."""
    return (
        before.part + before.parts == one.part
        and one.series == before.series
        and one.unframed == before.unframed
        and one.shape == before.shape
        and one.dimensions == before.dimensions
        and one.encoding_size == before.encoding_size
        and one.type_size == before.type_size
        and _same_text(slab, one.encoding_at, before.encoding_at, one.encoding_size)
        and _same_text(slab, one.type_at, before.type_at, one.type_size)
    )


@_compiled
def _read_image(slab: int, offsets: np.ndarray, sizes: np.ndarray, part: int, out: Any) -> bool:
    """The image whose first part is ``part``; whether there is one."""
    layout, pixels, times = part + 1, part + 2, part + 3
    if not (
        _read_dimage(slab, offsets[part], offsets[part] + sizes[part], out)
        and _read_dimage_d(slab, offsets[layout], offsets[layout] + sizes[layout], out)
        and out.size == sizes[pixels]
        and _read_times(slab, offsets[times], offsets[times] + sizes[times], out)
    ):
        return False
    out.part, out.parts, out.offset = part, 4, offsets[pixels]
    out.unframed = _is_unframed(slab, out)
    appendix = part + 4
    if appendix < len(offsets) and _is_appendix(slab, offsets[appendix], sizes[appendix]):
        out.parts = 5
    return True


@_compiled
def _walk(slab: int, slab_size: int, offsets: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> int:
    """The images among a batch's parts into ``out``; how many."""
    for part in range(len(offsets)):
        if offsets[part] < 0 or not 0 <= sizes[part] <= slab_size - offsets[part]:
            return 0
    count = part = 0
    while part + 3 < len(offsets):
        image = out[count]
        if _read_image(slab, offsets, sizes, part, image):
            image.same = count > 0 and _follows(slab, image, out[count - 1])
            part += image.parts
            count += 1
        else:
            part += 1
    return count


def walk(slab: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The images among the parts of a batch (see ``messages.ReceivedBatch``), an array of ``IMAGE``.

    Releases the GIL. Never raises for what the parts hold.
    """
    images = np.empty(len(offsets) // 4 + 1, IMAGE)  # memory that is not used is never touched
    return images[: _walk(slab.ctypes.data, slab.nbytes, offsets, sizes, images)]


def shape_of(packed: int, dimensions: int) -> list[int]:
    """``IMAGE``'s ``shape``, ``dimensions`` numbers."""
    return [packed >> (_LIST_BITS * i) & (1 << _LIST_BITS) - 1 for i in range(dimensions)]


@functools.cache
def prepare() -> None:
    """Load or compile the walk, which can take seconds: to be called before messages are waiting."""
    none = np.empty(0, np.int64)
    walk(np.empty(0, np.uint8), none, none)
