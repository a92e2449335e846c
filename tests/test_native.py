"""The native protocol: what is sent comes back, and nothing that anybody may send raises."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors import codec
from detectors.messages import Encoding, FrameBlock, Message, SeriesEnd, SeriesStart, Undecodable
from detectors.protocols.native import DTYPES
from detectors.protocols.native import Decoder as NativeDecoder
from detectors.protocols.native import Encoder as NativeEncoder
from tests.live_helpers import batch, packed, payloads_of

START = {"type": "start", "version": 1, "series": 7, "detector_shape": [4, 6], "dtype": "uint16"}
FRAMES = {"type": "frames", "series": 7, "first": 0, "count": 2, "encoding": "raw", "sizes": [3, 5]}


def feed(*messages: Sequence[Any]) -> list[Message]:
    """Decode messages; a part that is no bytes is packed first."""
    return NativeDecoder().feed(
        batch(*([part if isinstance(part, bytes) else msgpack.packb(part) for part in parts] for parts in messages))
    )


def refusal(*parts: Any) -> Undecodable:
    (message,) = feed(parts)
    assert isinstance(message, Undecodable), message
    return message


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_come_back_as_they_went(encoding: Encoding, dtype: str) -> None:
    frames = np.random.default_rng(0).poisson(0.3, (6, 7, 33)).astype(DTYPES[dtype])
    payloads = [packed(frame, encoding) for frame in frames]
    encoder = NativeEncoder()
    blocks = feed(
        encoder.frames("a", 10, payloads[:4], encoding)[0], encoder.frames("a", 14, payloads[4:], encoding)[0]
    )
    (block,) = blocks
    assert isinstance(block, FrameBlock)
    assert (block.series, block.encoding) == ("a", encoding)
    assert payloads_of(blocks) == list(enumerate(payloads, 10))
    for (_, payload), frame in zip(payloads_of(blocks), frames, strict=True):
        np.testing.assert_array_equal(codec.decode(payload, encoding, (7, 33), DTYPES[dtype]), frame)


@pytest.mark.parametrize("scan_shape", [None, (3, 5)])
@pytest.mark.parametrize("frames", [None, 15])
def test_a_start_comes_back_with_what_it_knows(scan_shape: tuple[int, int] | None, frames: int | None) -> None:
    known = {"energy_kev": 200.0, "aberrations": {"C10": -5.0}, "something_of_a_vendor": [1, "two"]}
    start = SeriesStart("s", (4, 6), DTYPES["uint16"], scan_shape, frames, known)
    parts = NativeEncoder().start(start)[0]
    (back,) = feed(parts)
    assert isinstance(back, SeriesStart)
    assert (back.series, back.detector_shape, back.dtype) == ("s", (4, 6), DTYPES["uint16"])
    assert (back.scan_shape, back.frames, back.settings) == (scan_shape, frames, known)
    assert back.header == tuple(parts), "a recording keeps the message as it came"


def test_the_smallest_start_and_an_end() -> None:
    del (smallest := dict(START))["version"]
    start, end = feed([smallest], [{"type": "end", "series": 7}])
    assert isinstance(start, SeriesStart)
    assert (start.scan_shape, start.frames, start.settings) == (None, None, {})
    assert isinstance(end, SeriesEnd)
    assert end.series == 7


def test_runs_of_frames_become_one_block() -> None:
    encoder = NativeEncoder()
    one = [encoder.frames(1, first, [b"ab"], Encoding.RAW)[0] for first in (5, 6, 2, 2**53)]
    other = [encoder.frames(2, 0, [b"c", b"de"], Encoding.RAW)[0], encoder.frames(2, 2, [b"f"], Encoding.LZ4)[0]]
    kinds = [(type(m), getattr(m, "series", None), len(m) if isinstance(m, FrameBlock) else 0) for m in feed(
        *one, *other, encoder.end(1)[0], *one[:2])]  # fmt: skip
    assert kinds == [
        (FrameBlock, 1, 4),
        (FrameBlock, 2, 2),
        (FrameBlock, 2, 1),
        (SeriesEnd, 1, 0),
        (FrameBlock, 1, 2),
    ]
    assert [index for index, _ in payloads_of(feed(*one))] == [5, 6, 2, 2**53]


def test_a_damaged_message_keeps_its_place_in_the_order() -> None:
    good = NativeEncoder().frames(1, 0, [b"x"], Encoding.RAW)[0]
    kinds = [type(message) for message in feed(good, [b"junk"], good, good)]
    assert kinds == [FrameBlock, Undecodable, FrameBlock]


def test_payloads_are_not_copied() -> None:
    received = batch(NativeEncoder().frames(1, 0, [b"abc", b"de"], Encoding.RAW)[0])
    (block,) = NativeDecoder().feed(received)
    assert isinstance(block, FrameBlock)
    assert block.slab is received.slab


def test_many_frames_in_a_message() -> None:
    payloads = [bytes([i % 256]) * (i % 5) for i in range(10_000)]
    messages = feed(NativeEncoder().frames(1, 100, payloads, Encoding.RAW)[0])
    assert payloads_of(messages) == list(enumerate(payloads, 100))


def test_without_sizes_all_frames_are_equal() -> None:
    messages = feed([{**FRAMES, "count": 3, "sizes": None}, b"aabbcc"])
    assert payloads_of(messages) == [(0, b"aa"), (1, b"bb"), (2, b"cc")]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((b"",), "does not start with a msgpack map"),
        ((b"\xc1",), "does not start with a msgpack map"),
        ((b"GET / HTTP/1.1\r\n",), "does not start with a msgpack map|must be a msgpack map"),
        ((b"\x80\x80",), "does not start with a msgpack map"),
        (([1, 2],), "must be a msgpack map with a 'type'"),
        (({"series": 1},), "must be a msgpack map with a 'type'"),
        (({"type": 3},), "must be a msgpack map with a 'type'"),
        (({1: 2, "type": "end"},), "msgpack map"),
        (({"type": "pause", "series": 1},), "unknown message type 'pause'; known are start, frames, end"),
        ((START, b"more"), "'start' message has 1 part, this one has 2"),
        (({"type": "end", "series": 1}, b""), "'end' message has 1 part, this one has 2"),
        ((FRAMES,), "has 2 parts .* has 1"),
        ((FRAMES, b"abc", b"defgh"), "has 2 parts .* has 3"),
    ],
)
def test_what_is_no_message_is_refused(parts: tuple[Any, ...], reason: str) -> None:
    refused = refusal(*parts)
    # As many frames are lost as the message claims to hold.
    assert refused.frames == (parts[0].get("count", 1) if isinstance(parts[0], dict) else 1)
    assert re.search(reason, refused.reason), refused.reason


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"version": 2}, "protocol version 2; this program speaks version 1"),
        ({"version": "1"}, "protocol version '1'"),
        ({"series": None}, "'series' must be an integer or a text, got None"),
        ({"series": [1]}, "'series' must be"),
        ({"series": True}, "'series' must be"),
        ({"series": 1.0}, "'series' must be"),
        ({"detector_shape": None}, "needs 'detector_shape'"),
        ({"detector_shape": [4]}, "'detector_shape' must be [rows, columns]"),
        ({"detector_shape": [0, 4]}, "each from 1 to 65536, got [0, 4]"),
        ({"detector_shape": [4, 65537]}, "each from 1 to 65536"),
        ({"detector_shape": [4.0, 4]}, "'detector_shape' must be"),
        ({"detector_shape": "4x4"}, "'detector_shape' must be"),
        ({"scan_shape": [-1, 4]}, "'scan_shape' must be"),
        ({"scan_shape": 16}, "'scan_shape' must be"),
        ({"dtype": None}, "unknown dtype None"),
        ({"dtype": "int16"}, "unknown dtype 'int16'; known are uint8, uint16, uint32, float32"),
        ({"frames": 0}, "'frames' must be an integer from 1"),
        ({"frames": -5}, "'frames' must be"),
        ({"frames": 2**60}, "'frames' must be"),
        ({"frames": "many"}, "'frames' must be"),
        ({"pixel_mask": "/etc/passwd"}, "'pixel_mask' must be"),
        ({"pixel_mask": b"1"}, "'pixel_mask' must be"),
    ],
)
def test_a_start_that_cannot_be_meant_is_refused(keys: dict[str, Any], reason: str) -> None:
    assert reason in refusal({**START, **keys}).reason


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"first": -1}, "'first' must be an integer from 0"),
        ({"first": 2**60}, "'first' must be"),
        ({"first": None}, "'first' must be"),
        ({"first": 1.0}, "'first' must be"),
        ({"first": True}, "'first' must be"),
        ({"count": 0}, "'count' must be an integer from 1"),
        ({"count": 65537}, "'count' must be an integer from 1 to 65536"),
        ({"count": "2"}, "'count' must be"),
        ({"count": 3}, "'sizes' must be a list of 3"),
        ({"count": 3, "sizes": None}, "8 bytes is not 3 equal frames; give their 'sizes'"),
        ({"sizes": [3, 4]}, "'sizes' add up to 7 bytes, the payload has 8"),
        ({"sizes": [-1, 9]}, "'sizes' must be a list"),
        ({"sizes": [4.0, 4.0]}, "'sizes' must be a list"),
        ({"sizes": [2**63, 2**63]}, "'sizes' add up to"),
        ({"sizes": "35"}, "'sizes' must be a list"),
        ({"encoding": None}, "unknown encoding None"),
        ({"encoding": "zstd"}, "unknown encoding 'zstd'; known are bslz4, lz4, raw"),
        ({"encoding": 2}, "unknown encoding 2"),
        ({"series": None}, "'series' must be"),
        ({"series": {}}, "'series' must be"),
    ],
)
def test_frames_that_cannot_be_meant_are_refused(keys: dict[str, Any], reason: str) -> None:
    assert reason in refusal({**FRAMES, **keys}, b"abcdefgh").reason


@pytest.mark.parametrize("value", [["raw"], {"raw": 1}])
def test_names_of_a_type_that_cannot_be_looked_up_are_refused(value: Any) -> None:
    assert "unknown encoding" in refusal({**FRAMES, "encoding": value}, b"abcdefgh").reason
    assert "unknown dtype" in refusal({**START, "dtype": value}).reason


def test_a_reason_is_a_sentence_however_long_the_nonsense() -> None:
    for parts in [({"type": "x" * 100_000},), ({**FRAMES, "encoding": "y" * 100_000}, b"abcdefgh")]:
        assert len(refusal(*parts).reason) < 1000


# Anything that anybody may send. Most of what hypothesis draws is close to a message, the rest is bytes.
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
    | st.text(max_size=5) | st.binary(max_size=5)
    | st.sampled_from(["raw", "lz4", "bslz4", "uint8", "start", "frames", "end"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
_KEYS = st.sampled_from(sorted({*START, *FRAMES, "frames", "scan_shape", "energy_kev"})) | st.text(max_size=3)
_HEADERS = st.builds(
    lambda base, changed, removed: {k: v for k, v in {**base, **changed}.items() if k not in removed},
    st.sampled_from([START, FRAMES, {"type": "end", "series": 7}]),
    st.dictionaries(_KEYS, _VALUES, max_size=3),
    st.sets(_KEYS, max_size=1),
).map(msgpack.packb)
_PARTS = _HEADERS | st.binary(max_size=64) | st.builds(lambda h, n: h[:n], _HEADERS, st.integers(0, 100))
_MESSAGES = st.lists(_PARTS, min_size=1, max_size=3) | st.tuples(_HEADERS, st.binary(max_size=16)).map(list)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(_MESSAGES, max_size=4))
def test_nothing_that_can_be_sent_raises(messages: list[list[bytes]]) -> None:
    received = batch(*messages)
    for message in NativeDecoder().feed(received):
        assert isinstance(message, SeriesStart | FrameBlock | SeriesEnd | Undecodable)
        if isinstance(message, Undecodable):
            assert message.reason
        if isinstance(message, FrameBlock):
            assert len(message.indices) == len(message.offsets) == len(message.sizes) > 0
            assert (message.indices >= 0).all()
            assert (message.offsets >= 0).all()
            assert (message.sizes >= 0).all()
            assert (message.offsets + message.sizes <= len(received.slab)).all()


def test_a_few_bytes_do_not_stand_for_thousands_of_frames() -> None:
    message = refusal({"type": "frames", "series": 7, "first": 0, "count": 65536, "encoding": "raw"}, b"")
    assert message.frames == 65536
    assert "0 bytes is not 65536 equal frames" in message.reason
