"""The native protocol's compiled walk says what ``msgpack`` says, of sound headers and of any other bytes."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from random import Random
from typing import Any
from unittest.mock import patch

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detectors.messages import FrameBlock, Message, SeriesEnd, Undecodable
from detectors.protocols import msgpack_walk
from detectors.protocols.native import Decoder
from tests.live_helpers import batch, payloads_of

FRAMES = {"type": "frames", "series": 7, "first": 0, "count": 2, "encoding": "raw", "sizes": [3, 5]}
PAYLOAD = b"abcdefgh"


def found(*messages: Sequence[bytes]) -> list[bool]:
    """Which messages the walk takes for frames."""
    received = batch(*messages)
    table, _ = msgpack_walk.walk(received.slab, received.offsets, received.lengths, received.last)
    return (table["what"] == msgpack_walk.FRAMES).tolist()


def blind(slab: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, last: np.ndarray) -> Any:
    """A walk that knows nothing, so that all goes through ``msgpack``."""
    ends = np.flatnonzero(last) + 1
    messages = np.zeros(len(ends), msgpack_walk.MESSAGE)
    messages["what"], messages["stop"], messages["part"][1:] = msgpack_walk.OTHER, ends, ends[:-1]
    return messages, msgpack_walk.Frames(*(np.empty(0, np.int64) for _ in range(3)))


def told(messages: Sequence[Message]) -> list[Any]:
    """Every field of every message, with the types of what is in them."""
    return [
        (type(message), *((f.name, plain(getattr(message, f.name))) for f in fields(message))) for message in messages
    ]


def plain(value: Any) -> Any:
    return (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else (type(value), repr(value))


def both(*messages: Sequence[bytes]) -> list[Message]:
    """Decode messages in both ways."""
    received = batch(*messages)
    ours = Decoder().feed(received)
    with patch.object(msgpack_walk, "walk", blind):
        assert told(ours) == told(Decoder().feed(received))
    return ours


def item(value: Any, random: Random) -> bytes:
    """``value`` packed, its numbers and lengths in any of the widths that they fit in."""
    wide = random.choice([0, 0, 1, 2, 4, 8])
    if type(value) is int:
        names = {1: "bB", 2: "hH", 4: "iI", 8: "qQ"}.get(wide, "")
        for name in random.sample(names, len(names)):
            try:
                return bytes((0xCC + "BHIQbhiq".index(name),)) + struct.pack(f">{name}", value)
            except struct.error:
                pass
    elif isinstance(value, str):
        data, first = value.encode(), {1: 0xD9, 2: 0xDA, 4: 0xDB}.get(wide)
        if first is not None and len(data) < 256**wide:
            return bytes((first,)) + len(data).to_bytes(wide, "big") + data
    elif isinstance(value, list) and wide in (2, 4):
        return (
            bytes((0xDC + (wide == 4),))
            + len(value).to_bytes(wide, "big")
            + b"".join(item(part, random) for part in value)
        )
    elif isinstance(value, dict):
        return pairs(list(value.items()), random)
    return msgpack.packb(value)


def pairs(entries: Sequence[tuple[Any, Any]], random: Random) -> bytes:
    wide = random.choice([0, 2, 4]) if len(entries) < 16 else 2
    head = bytes((0xDE + (wide == 4),)) + len(entries).to_bytes(wide, "big") if wide else bytes((0x80 | len(entries),))
    return head + b"".join(item(key, random) + item(value, random) for key, value in entries)


UNKNOWN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text(max_size=40) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.binary(max_size=3), inner,
                                                                max_size=3),
    max_leaves=8,
)  # fmt: skip
SERIES = st.sampled_from([7, 8, -1, -(2**63), 2**63, 2**64 - 1, "", "7", "scan", "Größe"]) | st.text(max_size=5)


@st.composite
def sound(draw: st.DrawFn) -> list[bytes]:
    """Frames as a sender may well send them: a header and its payload."""
    random = Random(draw(st.integers(0, 2**32)))
    sizes = draw(st.lists(st.integers(0, 9) | st.integers(200, 300), min_size=1, max_size=5))
    if draw(st.booleans()):
        sizes = sizes[:1] * len(sizes)
    values = {
        **FRAMES,
        "series": draw(SERIES),
        "first": draw(st.sampled_from([0, 1, 127, 128, 2**32, 2**53])),
        "count": len(sizes),
        "encoding": draw(st.sampled_from(["raw", "lz4", "bslz4"])),
        "sizes": draw(st.sampled_from([sizes, None]))
        if len(set(sizes)) == 1 and (any(sizes) or not sizes[1:])
        else sizes,
    }
    if values["sizes"] is None and draw(st.booleans()):
        del values["sizes"]
    entries = random.sample(list(values.items()), len(values))
    # The same keys before, with values that do not hold; some other keys anywhere.
    entries = [(key, value) for key, value in entries if random.random() < 0.1] + entries
    unknown = draw(st.lists(st.tuples(st.text(max_size=8) | st.binary(max_size=3), UNKNOWN), max_size=2))
    for key, value in unknown:
        if key not in FRAMES:
            entries.insert(random.randint(0, len(entries)), (key, value))
    return [pairs(entries, random), bytes(sum(sizes))]


@settings(max_examples=300, deadline=None)
@given(st.lists(sound(), min_size=1, max_size=6))
def test_sound_frames_are_found_and_as_msgpack_reads_them(messages: list[list[bytes]]) -> None:
    assert found(*messages) == [True] * len(messages)
    blocks = both(*messages)
    assert all(isinstance(block, FrameBlock) for block in blocks)
    headers = [msgpack.unpackb(header) for header, _ in messages]
    assert [index for index, _ in payloads_of(blocks)] == [h["first"] + i for h in headers for i in range(h["count"])]


@st.composite
def damaged(draw: st.DrawFn) -> list[bytes]:
    """Frames with a few bytes other than they were, a key's value changed, or in another number of parts."""
    parts = draw(sound())
    header = bytearray(parts[0])
    if draw(st.booleans()):
        key = draw(st.sampled_from(sorted(FRAMES)))
        values = {**msgpack.unpackb(parts[0]), key: draw(UNKNOWN)}
        header = bytearray(msgpack.packb(values, default=str))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(header)))
        action = draw(st.sampled_from(["flip", "set", "cut", "insert", "lose"]))
        if action == "flip" and at < len(header):
            header[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "set" and at < len(header):
            header[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0x90, 0xA0, *range(0xC0, 0x100)]))
        elif action == "cut":
            del header[at:]
        elif action == "insert":
            header[at:at] = draw(st.binary(min_size=1, max_size=4))
        else:
            del header[at : at + 1]
    payload = parts[1] + bytes(draw(st.sampled_from([0, 0, 0, 1])))
    return draw(st.sampled_from([[bytes(header), payload]] * 6 + [[bytes(header)], [bytes(header), payload, b""]]))


OTHERS = st.sampled_from(
    [
        [msgpack.packb({"type": "end", "series": 7})],
        [msgpack.packb({"type": "start", "series": 7, "detector_shape": [4, 6], "dtype": "uint16"})],
        [b"junk"],
        [b""],
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(sound() | damaged() | OTHERS, max_size=6))
def test_any_batch_is_as_msgpack_reads_it(messages: list[list[bytes]]) -> None:
    both(*messages)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\x81\xa5sizes\xdd\xff\xff\xff\xff")
@example(b"\x81\xa1x" + b"\x91" * 60)
@example(b"\x81\xa1x" + b"\x81" * 60)
@example(b"\x81\xa1x\xdb\xff\xff\xff\xff")
@example(b"\x81\xdb\xff\xff\xff\xff")
def test_any_bytes_are_as_msgpack_reads_them(data: bytes) -> None:
    both([data], [data, b""], [msgpack.packb(FRAMES) + data, PAYLOAD])
    # Behind a whole header's keys, as one more entry.
    both([bytes((0x80 | len(FRAMES) + 1,)) + msgpack.packb(FRAMES)[1:] + data, PAYLOAD])


@pytest.mark.parametrize(
    "text",
    [
        *("ascii", "é", "߿", "ࠀ", "퟿", "￿", "𐀀", "\U0010ffff"),
        *(b"\x80", b"\xc1\xbf", b"\xc2", b"\xc2a", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xef\xbf", b"\xf0\x8f\xbf\xbf"),
        *(b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff", b"ok\xe2\x82"),
    ],
)
@pytest.mark.parametrize("place", ["series", "value", "key", "inner key"])
def test_texts_are_unicode(text: str | bytes, place: str) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    packed = bytes((0xA0 | len(data),)) + data
    entries = {
        "series": b"\xa6series" + packed,
        "value": b"\xa1x" + packed,
        "key": packed + b"\xc0",
        "inner key": b"\xa1x\x81" + packed + b"\xc0",
    }
    message = [b"\x87" + msgpack.packb(FRAMES)[1:] + entries[place], PAYLOAD]
    assert found(message) == [isinstance(text, str)]
    both(message)


@pytest.mark.parametrize("depth", [1, 31, 32, 100, 2000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa0"])
def test_nesting_has_a_limit(depth: int, opening: bytes) -> None:
    message = [b"\x87" + msgpack.packb(FRAMES)[1:] + b"\xa1x" + opening * depth + b"\xc0", PAYLOAD]
    assert found(message) == [depth < 32], "beyond, msgpack has its own limit"
    both(message)


def test_the_last_of_several_holds() -> None:
    header = b"\x88" + msgpack.packb({**FRAMES, "first": 3, "sizes": [1, 7]})[1:] + msgpack.packb(
        {"first": 5, "sizes": None}
    )[1:]  # fmt: skip
    assert found([header, PAYLOAD]) == [True]
    assert payloads_of(both([header, PAYLOAD])) == [(5, b"abcd"), (6, b"efgh")]


def test_a_large_header() -> None:
    sizes = [i % 5 for i in range(65536)]
    message = [msgpack.packb({**FRAMES, "count": len(sizes), "sizes": sizes}), bytes(sum(sizes))]
    assert found(message) == [True]
    both(message)
    too_many = [msgpack.packb({**FRAMES, "count": 65537, "sizes": [0] * 65537}), b""]
    assert found(too_many) == [False]
    (refused,) = both(too_many)
    assert isinstance(refused, Undecodable)
    padded = [msgpack.packb({**FRAMES, "pad": bytes(16 << 20)}), PAYLOAD]
    assert found(padded) == [False]
    both(padded)


def test_messages_keep_their_order_and_runs_their_series() -> None:
    def frames(series: Any, first: int, encoding: str = "raw") -> list[bytes]:
        return [msgpack.packb({**FRAMES, "series": series, "first": first, "encoding": encoding}), PAYLOAD]

    end = [msgpack.packb({"type": "end", "series": 7})]
    # The fourth is sound, and none that the walk knows: msgpack reads extensions.
    odd = [msgpack.packb({**FRAMES, "first": 8, "when": msgpack.Timestamp(1, 2)}), PAYLOAD]
    sent = [frames(7, 0), frames(7, 2), end, frames(7, 4), odd, frames(7, 6), frames("7", 8), frames(-1, 10),
            frames(2**64 - 1, 12), frames(7, 14, "lz4"), [b"junk"], frames(7, 16)]  # fmt: skip
    assert found(*sent) == [True] * 2 + [False] + [True] + [False] + [True] * 5 + [False] + [True]
    messages = both(*sent)
    blocks = [(m.series, m.indices.tolist()) if isinstance(m, FrameBlock) else type(m) for m in messages]
    assert blocks == [
        (7, [0, 1, 2, 3]),
        SeriesEnd,
        (7, [4, 5, 8, 9, 6, 7]),
        ("7", [8, 9]),
        (-1, [10, 11]),
        (2**64 - 1, [12, 13]),
        (7, [14, 15]),
        Undecodable,
        (7, [16, 17]),
    ]


def test_not_a_byte_beyond_a_header_is_read() -> None:
    """Headers cut anywhere, right in front of memory that cannot be read."""
    script = """
import ctypes, mmap, sys
import numpy as np
from detectors.protocols import msgpack_walk
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
base = np.frombuffer(memory, np.uint8)
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base.ctypes.data + page), page, 0) == 0
last = np.array([False, True])
for header in map(bytes.fromhex, sys.stdin.read().split()):
    for length in range(len(header) + 1):
        base[page - length : page] = np.frombuffer(header[:length], np.uint8)
        found, _ = msgpack_walk.walk(base[:page], np.array([page - length, 0]), np.array([length, 8]), last)
        assert (found["what"][0] == msgpack_walk.FRAMES) == (length == len(header)), (length, found)
print("all read")
"""
    random = Random(1)
    headers = [pairs(random.sample([*FRAMES.items(), ("x", {"y": ["é", 1.5, b"z"]})], 7), random) for _ in range(30)]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(header.hex() for header in headers),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (0, "all read\n"), done.stderr
