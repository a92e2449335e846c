"""DECTRIS Stream V2: recorded and written-out messages are decoded to the right pixels; nothing that comes raises."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cbor2
import lz4.block
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from detectors import codec
from detectors.errors import ConfigurationError
from detectors.messages import (
    Announced,
    Encoding,
    FrameBlock,
    Message,
    ReceivedBatch,
    SeriesEnd,
    SeriesStart,
    Undecodable,
)
from detectors.protocols import cbor, dectris_v2
from tests.live_helpers import batch, payloads_of

TYPES = {64: np.dtype("<u1"), 69: np.dtype("<u2"), 70: np.dtype("<u4"), 85: np.dtype("<f4")}
UNIQUE = "01GRXWT80JSDY2FNW8SGCCDZD9"

# The byte vectors of the protocol's description: 4 rows, 6 columns of uint16, all 0 but [1, 2] = 1.
BSLZ4 = bytes.fromhex(
    "00 00 00 00 00 00 00 30 00 00 20 00 00 00 00 0d 3f 00 01 00 01 00 15 50 00 00 00 00 00".replace(" ", "")
)
LZ4 = bytes.fromhex(
    "00 00 00 00 00 00 00 30 00 00 00 30 00 00 00 11 1b 00 01 00 1b 01 10 00 07 02 00 50 00 00 00 00 00"
)
BSLZ4_3X3 = bytes.fromhex(
    "00 00 00 00 00 00 00 12 00 00 20 00 00 00 00 0d 43 aa cc f0 00 01 00 50 00 00 00 00 00 08 00"
)
IMAGE = bytes.fromhex("""
d9 d9 f7 a9 64 74 79 70 65 65 69 6d 61 67 65 69 73 65 72 69 65 73 5f 69 64 01 70 73 65 72 69 65 73 5f 75 6e 69 71 75 65
5f 69 64 78 1a 30 31 47 52 58 57 54 38 30 4a 53 44 59 32 46 4e 57 38 53 47 43 43 44 5a 44 39 68 69 6d 61 67 65 5f 69 64
07 69 72 65 61 6c 5f 74 69 6d 65 82 19 01 9f 1a 02 fa f0 80 6b 73 65 72 69 65 73 5f 64 61 74 65 c0 78 1d 32 30 32 33 2d
30 32 2d 31 30 54 31 35 3a 34 39 3a 30 35 2e 32 38 31 2b 30 31 3a 30 30 6a 73 74 61 72 74 5f 74 69 6d 65 82 19 0b 59 1a
02 fa f0 80 69 73 74 6f 70 5f 74 69 6d 65 82 19 0c f8 1a 02 fa f0 80 64 64 61 74 61 a1 6b 74 68 72 65 73 68 6f 6c 64 5f
31 d8 28 82 82 04 06 d8 45 d9 dc b4 83 65 62 73 6c 7a 34 02 58 1d 00 00 00 00 00 00 00 30 00 00 20 00 00 00 00 0d 3f 00
01 00 01 00 15 50 00 00 00 00 00
""")
END = bytes.fromhex("""
d9 d9 f7 a3 64 74 79 70 65 63 65 6e 64 69 73 65 72 69 65 73 5f 69 64 01 70 73 65 72 69 65 73 5f 75 6e 69 71 75 65 5f 69
64 78 1a 30 31 47 52 58 57 54 38 30 4a 53 44 59 32 46 4e 57 38 53 47 43 43 44 5a 44 39
""")
PIXELS = np.zeros((4, 6), "<u2")
PIXELS[1, 2] = 1


# A decoder that shares nothing with ours, written from the description.


def unpacked(value: Any) -> bytes:
    """The bytes of a typed array's contents."""
    if isinstance(value, bytes):
        return value
    assert value.tag == 56500
    algorithm, element, data = value.value
    total, block = struct.unpack_from(">QI", data)
    block = block or 8192
    group = 8 * element if algorithm == "bslz4" else 1
    at, out = 12, []
    left = total - total % group
    while left > 0:
        (length,) = struct.unpack_from(">I", data, at)
        packed, size = data[at + 4 : at + 4 + length], min(block, left)
        raw = packed if algorithm == "lz4" and length == size else lz4.block.decompress(packed, uncompressed_size=size)
        if algorithm == "bslz4":
            bits = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(element * 8, -1), axis=1, bitorder="little")
            raw = np.packbits(bits.T, axis=1, bitorder="little").tobytes()
        assert len(raw) == size
        out.append(raw)
        at, left = at + 4 + length, left - size
    assert len(data) - at == total % group
    return b"".join([*out, data[at:]])


def array(value: Any) -> np.ndarray:
    """A MultiDimArray as numbers."""
    assert value.tag == 40
    shape, typed = value.value
    return np.frombuffer(unpacked(typed.value), TYPES[typed.tag]).reshape(shape)


def pictures(message: bytes) -> dict[str, np.ndarray]:
    """The channels of an image message."""
    return {name: array(value) for name, value in plain(cbor2.loads(message))["data"].items()}


def plain(value: Any) -> Any:
    """Maps as dicts, whatever cbor2 makes of them, and without the tag around the message."""
    if isinstance(value, cbor2.CBORTag) and value.tag == 55799:
        value = value.value
    return dict(value) if isinstance(value, Mapping) else value


# Messages written from the description.


def mda(pixels: np.ndarray, algorithm: str | None = None, **other: Any) -> cbor2.CBORTag:
    tag = next(tag for tag, dtype in TYPES.items() if dtype == pixels.dtype)
    payload: Any = pixels.tobytes()
    if algorithm is not None:
        encoding = {"bslz4": Encoding.BSLZ4, "lz4": Encoding.LZ4_BLOCKS}[algorithm]
        element = pixels.itemsize if algorithm == "bslz4" else 0
        payload = cbor2.CBORTag(56500, [algorithm, other.get("element", element), codec.encode(pixels, encoding)])
    return cbor2.CBORTag(40, [list(pixels.shape), cbor2.CBORTag(other.get("tag", tag), payload)])


def packed(keys: Mapping[str, Any], signature: bool = True) -> bytes:
    """A message; keys whose value is ``...`` are left out."""
    body = cbor2.dumps({key: value for key, value in keys.items() if value is not ...})
    return b"\xd9\xd9\xf7" * signature + body


def start(**keys: Any) -> bytes:
    usual = {
        "type": "start", "series_id": 1, "series_unique_id": UNIQUE, "channels": ["threshold_1"],
        "image_dtype": "uint16", "image_size_x": 6, "image_size_y": 4, "number_of_images": 24,
    }  # fmt: skip
    return packed({**usual, **keys})


def image(number: int = 0, data: Any = None, **keys: Any) -> bytes:
    usual = {"type": "image", "series_id": 1, "image_id": number, "start_time": [number * 50, 50_000_000]}
    return packed({**usual, **keys, "data": {"threshold_1": mda(PIXELS)} if data is None else data})


def end(**keys: Any) -> bytes:
    return packed({"type": "end", "series_id": 1, "series_unique_id": UNIQUE, **keys})


def feed(*messages: bytes) -> list[Message]:
    """Without announcements, which are tested on their own."""
    heard = dectris_v2.Decoder().feed(batch(*([message] for message in messages)))
    return [message for message in heard if not isinstance(message, Announced)]


def one_block(messages: Sequence[Message]) -> FrameBlock:
    (block,) = (message for message in messages if not isinstance(message, SeriesStart))
    assert isinstance(block, FrameBlock), block
    return block


def one_start(messages: Sequence[Message]) -> SeriesStart:
    (start,) = messages
    assert isinstance(start, SeriesStart), start
    return start


def refusal(*messages: bytes) -> Undecodable:
    refused = feed(*messages)[-1]
    assert isinstance(refused, Undecodable), refused
    return refused


def decoded(block: FrameBlock, shape: tuple[int, int], dtype: Any) -> list[np.ndarray]:
    return [codec.decode(payload, block.encoding, shape, np.dtype(dtype)) for _, payload in payloads_of([block])]


def told(messages: Iterable[Message]) -> list[tuple[Any, ...]]:
    """Messages in short: kind, series, frame numbers or reason."""
    return [
        ("frames", m.series, *m.indices.tolist()) if isinstance(m, FrameBlock)
        else ("?", m.reason, m.frames) if isinstance(m, Undecodable)
        else ({Announced: "announced", SeriesStart: "start", SeriesEnd: "end"}[type(m)], m.series)
        for m in messages
    ]  # fmt: skip


# What the description writes out


def test_the_written_out_image() -> None:
    assert len(IMAGE) == 251
    block = one_block(feed(IMAGE))
    assert (block.series, block.encoding, block.indices.tolist()) == (1, Encoding.BSLZ4, [7])
    assert block.exposed_ns is not None
    assert block.exposed_ns.tolist() == [0xB59 * 20]
    assert payloads_of([block]) == [(7, BSLZ4)]
    np.testing.assert_array_equal(decoded(block, (4, 6), "<u2")[0], PIXELS)
    np.testing.assert_array_equal(pictures(IMAGE)["threshold_1"], PIXELS)


def test_the_written_out_end() -> None:
    assert len(END) == 69
    assert feed(END) == [SeriesEnd(1, (END,))]


@pytest.mark.parametrize(
    ("algorithm", "element", "payload", "pixels"),
    [
        ("bslz4", 2, BSLZ4, PIXELS),
        ("bslz4", 2, BSLZ4_3X3, np.arange(9, dtype="<u2").reshape(3, 3)),
        ("lz4", 0, LZ4, PIXELS),
        (None, 0, PIXELS.tobytes(), PIXELS),
    ],
)
def test_the_written_out_payloads(algorithm: str | None, element: int, payload: bytes, pixels: np.ndarray) -> None:
    data: Any = payload if algorithm is None else cbor2.CBORTag(56500, [algorithm, element, payload])
    value = cbor2.CBORTag(40, [list(pixels.shape), cbor2.CBORTag(69, data)])
    block = one_block(feed(image(3, {"a": value})))
    np.testing.assert_array_equal(decoded(block, pixels.shape, "<u2")[0], pixels)
    np.testing.assert_array_equal(array(value), pixels)


# What detectors and simulators have sent


def test_recorded_images_of_four_thresholds(shared_data: Path) -> None:
    files = sorted((shared_data / "streams/stream2_stxm").glob("*.cbor"))
    if not files:
        pytest.skip("the recorded streams (shared/data/streams) are not here")
    messages = [file.read_bytes() for file in files]
    block = one_block(feed(*messages))
    assert (block.series, block.indices.tolist(), len(block.others)) == (51, [0, 1, 2], 3)
    assert block.exposed_ns is not None
    assert np.diff(block.exposed_ns).tolist() == [10_100_000_000] * 2, "10 s exposures, 0.1 s between them"
    expected = [pictures(message) for message in messages]
    assert list(expected[0]) == [f"threshold_{n}" for n in (1, 2, 3, 4)]
    for number, name in enumerate(expected[0]):
        for frame, theirs in zip(decoded(block.channel(number), (532, 515), "<u4"), expected, strict=True):
            np.testing.assert_array_equal(frame, theirs[name])


def test_a_recorded_series_of_a_simulator(shared_data: Path) -> None:
    path = shared_data / "streams/tickit_cbor_basic.msgpack"
    if not path.exists():
        pytest.skip("the recorded streams (shared/data/streams) are not here")
    messages = [message["parts"] for message in msgpack.unpackb(path.read_bytes(), raw=False)["messages"]]
    announced, first, block, last = dectris_v2.Decoder().feed(batch(*messages))
    assert announced == Announced(1)
    assert isinstance(first, SeriesStart)
    assert (first.detector_shape, first.dtype, first.frames) == ((4362, 4148), np.dtype("<u2"), 2)
    assert (first.channels, first.maximum_is_masked) == (("threshold_1",), True)
    assert first.header == (messages[0][0],), "it sends start and first image as two parts of one message"
    assert first.settings["energy_kev"] == pytest.approx(13.500299829)
    assert first.settings["detector"] == "Dectris EIGER2 Si 16M"
    assert isinstance(block, FrameBlock)
    assert block.indices.tolist() == [0, 1]
    frame = decoded(block.take(np.array([1])), first.detector_shape, first.dtype)[0]
    np.testing.assert_array_equal(frame, pictures(messages[1][0])["threshold_1"])
    assert payloads_of([block])[0][1] == payloads_of([block])[1][1], "both images are the same"
    assert last == SeriesEnd(1, tuple(messages[2]))
    # Message by message, as they come live: the same.
    decoder = dectris_v2.Decoder()
    live = [told(decoder.feed(batch(message))) for message in messages]
    assert live == [[("announced", 1), ("start", 1), ("frames", 1, 0)], [("frames", 1, 1)], [("end", 1)]]


# Images


@pytest.mark.parametrize("algorithm", [None, "bslz4", "lz4"])
@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
@pytest.mark.parametrize("signature", [True, False])
def test_every_encoding_and_type(algorithm: str | None, dtype: str, signature: bool) -> None:
    frames = np.random.default_rng(0).poisson(3, (5, 33, 70)).astype(dtype)
    messages = [
        packed(
            {"type": "image", "series_id": 2**64 - 1, "image_id": n, "data": {"x": mda(frame, algorithm)}}, signature
        )
        for n, frame in enumerate(frames)
    ]
    block = one_block(feed(*messages))
    assert block.encoding is {None: Encoding.RAW, "bslz4": Encoding.BSLZ4, "lz4": Encoding.LZ4_BLOCKS}[algorithm]
    assert (block.series, block.exposed_ns) == (2**64 - 1, None)
    np.testing.assert_array_equal(decoded(block, (33, 70), dtype), frames)
    np.testing.assert_array_equal([pictures(message)["x"] for message in messages], frames)


def test_payloads_are_not_copied() -> None:
    received = batch([IMAGE])
    (block,) = dectris_v2.Decoder().feed(received)
    assert isinstance(block, FrameBlock)
    assert block.slab is received.slab


def test_runs_of_images_become_one_block_and_others_do_not() -> None:
    other = image(5, series_id=2)
    named = image(6, {"b": mda(PIXELS)})
    compressed = image(7, {"threshold_1": mda(PIXELS, "bslz4")})
    messages = [image(0), image(4), image(2), other, image(3), named, compressed, image(8), end(), image(9)]
    assert told(feed(*messages[:5], *messages[6:])) == [
        ("frames", 1, 0, 4, 2), ("frames", 2, 5), ("frames", 1, 3), ("frames", 1, 7), ("frames", 1, 8), ("end", 1),
        ("frames", 1, 9),
    ]  # fmt: skip
    others = [{"another": mda(PIXELS)}, {"threshold_1": mda(PIXELS[:2])}, {"threshold_1": mda(PIXELS[:, :2].copy())}]
    for data in [*others, {"threshold_1": mda(PIXELS, tag=70)}]:
        assert [kind for kind, *_ in told(feed(image(0), image(1, data), image(2)))] == ["frames", "?", "frames"]
    element = image(1, {"threshold_1": mda(PIXELS, "bslz4", element=4)})
    assert [kind for kind, *_ in told(feed(compressed, element, compressed))] == ["frames", "?", "frames"]
    packing = [{"threshold_1": mda(PIXELS, algorithm)} for algorithm in (None, "lz4", "bslz4")]
    assert len(feed(*(image(n, data) for n, data in enumerate(packing)))) == 3


@given(st.lists(st.sampled_from([1, 2, "three"]), max_size=60), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_interleaved_lost_and_doubled_images(which: list[int | str], per_batch: int) -> None:
    """Two series by number and one by text, told apart whatever the order and wherever batches end."""

    def message(number: int, series: int | str) -> bytes:
        ids = {"series_id": series} if isinstance(series, int) else {"series_id": ..., "series_unique_id": series}
        return image(number, {"t": mda(PIXELS + np.uint16(number))}, **ids)

    sent = [(series, number // 2 * 2, number) for number, series in enumerate(which)]
    decoder = dectris_v2.Decoder()
    got = []
    for first in range(0, len(sent), per_batch):
        received = batch(*([message(n, series)] for series, n, _ in sent[first : first + per_batch]))
        for block in decoder.feed(received):
            assert isinstance(block, FrameBlock)
            got += [
                (block.series, n, frame.max())
                for n, frame in zip(block.indices.tolist(), decoded(block, (4, 6), "<u2"), strict=True)
            ]
    assert got == [(series, n, n + 1) for series, n, _ in sent]


def test_times_are_in_nanoseconds_and_need_not_be_known() -> None:
    times: list[Any] = [[1, 3], [2**40, 50_000_000], [-1, 50_000_000], cbor2.CBORTag(30, [5, 1])]
    for value, expected in zip(times, [333_333_333, 2**40 * 20, -20, 5_000_000_000], strict=True):
        block = one_block(feed(image(0, start_time=value)))
        assert block.exposed_ns is not None
        assert block.exposed_ns.tolist() == [expected]
    for value in (None, ..., 3, 0.5, [1, 0], [1], [2**64 - 1, 1], [1, 2**63], ["1", "2"], {"a": 1}):
        block = one_block(feed(image(0), image(1, start_time=value)))
        assert (len(block), block.exposed_ns) == (2, None), value


def test_several_channels_in_the_order_of_the_start() -> None:
    pixels = {name: PIXELS * np.uint16(factor) for name, factor in {"difference": 1, "threshold_1": 2, "x": 5}.items()}
    packing = {"difference": None, "threshold_1": "bslz4", "x": "lz4"}
    data = {name: mda(picture, packing[name]) for name, picture in pixels.items()}
    first, block = feed(start(channels=["threshold_1", "difference"]), image(0, data))
    assert isinstance(first, SeriesStart)
    assert isinstance(block, FrameBlock)
    assert first.channels == ("threshold_1", "difference")
    assert [len(block.others), block.encoding, block.others[0].encoding] == [1, Encoding.BSLZ4, Encoding.RAW]
    for number, name in enumerate(first.channels):
        np.testing.assert_array_equal(decoded(block.channel(number), (4, 6), "<u2")[0], pixels[name])
    # Without a start, in the order of the first image, also when a later one has another.
    one, other = feed(image(0, data), image(1, dict(reversed(data.items()))))
    for block in (one, other):
        assert isinstance(block, FrameBlock)
        assert [decoded(block.channel(c), (4, 6), "<u2")[0].max() for c in range(3)] == [1, 2, 5]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"threshold_2": mda(PIXELS)}, "channel 'threshold_1' is missing; it has 'threshold_2'"),
        ({"threshold_1": mda(PIXELS.astype("<u4"))}, "4x6 pixels of uint32 came, 4x6 pixels of uint16 were announced"),
        ({"threshold_1": mda(PIXELS.T.copy())}, "6x4 pixels of uint16 came, 4x6"),
        ({"threshold_1": mda(PIXELS, "bslz4", element=4)}, "bslz4 of elements of 4 bytes, uint16 was announced"),
        ({"threshold_1": mda(PIXELS, tag=65)}, "typed-array tag 65; known are 64, 69 and 70"),
        ({"threshold_1": mda(PIXELS, tag=85)}, "typed-array tag 85"),
        ({"threshold_1": cbor2.CBORTag(40, [[4, 6], cbor2.CBORTag(69, cbor2.CBORTag(56500, ["bszstd", 2, b""]))])},
         "unknown compression 'bszstd'; known are bslz4, lz4, raw"),
        ({"threshold_1": cbor2.CBORTag(1040, [[4, 6], cbor2.CBORTag(69, b"")])}, "column-major"),
        ({"threshold_1": cbor2.CBORTag(40, [[24], cbor2.CBORTag(69, b"")])}, "two dimensions"),
        ({"threshold_1": cbor2.CBORTag(40, [[4, 6, 1], cbor2.CBORTag(69, b"")])}, "two dimensions"),
        ({"threshold_1": cbor2.CBORTag(40, [[0, 6], cbor2.CBORTag(69, b"")])}, "two dimensions"),
        ({"threshold_1": cbor2.CBORTag(40, [[4, 1 << 20], cbor2.CBORTag(69, b"")])}, "two dimensions"),
        ({"threshold_1": cbor2.CBORTag(40, [[4, -6], cbor2.CBORTag(69, b"")])}, "two dimensions"),
        ({"threshold_1": cbor2.CBORTag(40, [[4, 6], b""])}, "is not a row-major array"),
        ({"threshold_1": cbor2.CBORTag(69, b"")}, "is not a row-major array"),
        ({"threshold_1": [[0, 1], [1, 0]]}, "is not a row-major array"),
        ({"threshold_1": None}, "is not a row-major array"),
        ({}, "'data' map"),
        ({str(n): mda(PIXELS) for n in range(17)}, "'data' map of 1 to 16"),
        ([mda(PIXELS)], "'data' map"),
        ({1: mda(PIXELS)}, "'data' map"),
        (..., "'data' map"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_used_say_why(data: Any, reason: str) -> None:
    first, before, refused, after = feed(start(), image(0), image(1, data), image(2))
    assert isinstance(refused, Undecodable)
    assert refused.frames == 1
    assert re.search(re.escape(reason), refused.reason), refused.reason
    assert told([first, before, after]) == [("start", 1), ("frames", 1, 0), ("frames", 1, 2)]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"image_id": ...}, "image_id"),
        ({"image_id": None}, "image_id"),
        ({"image_id": -1}, "image_id"),
        ({"image_id": 2**60}, "image_id"),
        ({"image_id": 2**64 - 1}, "image_id"),
        ({"image_id": 1.0}, "image_id"),
        ({"series_id": ...}, "series_id"),
        ({"series_id": -1}, "series_id"),
        ({"series_id": "x" * 2000}, "series_id"),
        ({"type": 3}, "type"),
        ({"type": ...}, "type"),
    ],
)
def test_images_without_the_necessary_say_so(keys: dict[str, Any], reason: str) -> None:
    refused = refusal(image(0, **keys))
    assert refused.frames == 1
    assert reason in refused.reason


def test_as_many_frames_are_lost_as_there_are_in_a_run() -> None:
    refused = refusal(*(image(n, {"a": mda(PIXELS, "bslz4", element=1)}) for n in range(5)))
    assert (refused.frames, "image 0, channel 'a'" in refused.reason) == (5, True)


# Any CBOR around what matters


def open_ended(value: Any) -> bytes:
    """CBOR with indefinite lengths wherever they are allowed."""
    if isinstance(value, dict):
        return b"\xbf" + b"".join(cbor2.dumps(key) + open_ended(item) for key, item in value.items()) + b"\xff"
    if isinstance(value, list):
        return b"\x9f" + b"".join(map(open_ended, value)) + b"\xff"
    if isinstance(value, cbor2.CBORTag):
        return cbor.head(6, value.tag) + open_ended(value.value)
    return cbor2.dumps(value)


def test_indefinite_lengths() -> None:
    keys = {
        "type": "image", "series_id": 1, "user_data": [{}, {"a": [1]}, []], "image_id": 3, "start_time": [5, 1],
        "data": {"a": mda(PIXELS, "bslz4"), "b": mda(PIXELS)},
    }  # fmt: skip
    block = one_block(feed(open_ended(keys)))
    assert (block.indices.tolist(), block.exposed_ns) == ([3], np.array([5_000_000_000]))
    for number in (0, 1):
        np.testing.assert_array_equal(decoded(block.channel(number), (4, 6), "<u2")[0], PIXELS)
    pieces = b"\xa2\x64type\x65image\x61x\x5f\x42ab\x40\x41c\xff"
    assert told(feed(pieces)) == [("?", cbor.REASONS[cbor.NO_SERIES] + " (Stream V2)", 1)], "well-formed"
    in_pieces = open_ended({**keys, "data": {"a": cbor2.CBORTag(40, [[4, 6], cbor2.CBORTag(69, 0)])}})
    refused = refusal(in_pieces.replace(b"\xd8\x45\x00", b"\xd8\x45\x5f\x42ab\xff"))
    assert "indefinite length" in refused.reason
    three = cbor2.CBORTag(40, [[4, 6, 1], cbor2.CBORTag(69, PIXELS.tobytes())])
    assert "two dimensions" in refusal(open_ended({**keys, "data": {"a": three}})).reason
    # The "break" must come where it may.
    for damaged in (
        b"\xbf\x64type\xff",
        b"\xa2\x64type\x61?\x61x\xbf\x61a\xff",
        b"\xa1\x64type\xff",
        b"\xbf\x61a\x5f\x61a\xff\xff",
        b"\xff",
        b"\xbf\x1f\x00",
    ):
        assert "damaged" in refusal(damaged).reason or "not a CBOR map" in refusal(damaged).reason


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats() | st.text(max_size=9)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5)
    | st.builds(cbor2.CBORTag, st.sampled_from([0, 6, 40, 999, 56500, 2**40]), inner),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=18) | st.integers(), VALUES, max_size=4), st.randoms(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_unknown_keys_are_skipped_whole_in_any_order(unknown: dict[Any, Any], random: Any, ended: bool) -> None:
    known = {"type": "image", "series_id": 1, "image_id": 9, "data": {"threshold_1": mda(PIXELS)}, "start_time": [1, 1]}
    items = list({**unknown, **known}.items())
    random.shuffle(items)
    keys = dict(items)
    block = one_block(feed(open_ended(keys) if ended else packed(keys, random.random() < 0.5)))
    assert (block.series, block.indices.tolist(), block.exposed_ns) == (1, [9], np.array([1_000_000_000]))
    np.testing.assert_array_equal(decoded(block, (4, 6), "<u2")[0], PIXELS)


def test_other_messages_are_ignored_whole() -> None:
    assert feed(start(), packed({"type": "calibration", "x": [1]}), packed({"type": "metadata"}), end())[1:] == feed(
        end()
    )


# Start and end


FULL_START = {
    "arm_date": cbor2.CBORTag(0, "2023-02-10T15:49:05.281+01:00"), "beam_center_x": 515.0, "beam_center_y": 257,
    "channels": ["threshold_1", "difference"], "count_time": 0.001, "countrate_correction_enabled": True,
    "countrate_correction_lookup_table": cbor2.CBORTag(70, np.arange(9, dtype="<u4").tobytes()),
    "detector_description": "DECTRIS ARINA", "detector_serial_number": "E-01-0001", "detector_translation": [0, 0, 0.1],
    "flatfield": {"difference": mda(np.zeros((4, 6), "<f4")), "threshold_1": mda(np.full((4, 6), 1.5, "<f4"), "bslz4")},
    "flatfield_enabled": True, "frame_time": 1, "goniometer": {"chi": {"increment": 0.0, "start": 30.0}},
    "image_dtype": "uint16", "image_size_x": 6, "image_size_y": 4, "incident_energy": 200000,
    "incident_wavelength": 0.025, "number_of_images": 7, "pixel_mask_enabled": True,
    "pixel_mask": {"threshold_1": mda(np.eye(4, 6, dtype="<u4") * 2 + 256, "bslz4"), "difference": mda(PIXELS)},
    "saturation_value": 65534, "threshold_energy": {"threshold_1": 1e4, "threshold_2": 2e4, "difference": None},
    "user_data": {"sample": "gold", "n": [1, 2]}, "virtual_pixel_interpolation_enabled": False,
}  # fmt: skip


def test_a_start_with_everything() -> None:
    raw = start(**FULL_START)
    got = one_start(feed(raw))
    assert (got.series, got.detector_shape, got.dtype, got.frames) == (1, (4, 6), np.dtype("<u2"), 7)
    assert (got.scan_shape, got.channels, got.header) == (None, ("threshold_1", "difference"), (raw,))
    assert got.maximum_is_masked
    assert got.settings == {
        "energy_kev": 200.0, "count_time_s": 0.001, "frame_time_s": 1, "detector": "DECTRIS ARINA",
        "detector_number": "E-01-0001", "flatfield_applied": True, "user_data": {"sample": "gold", "n": [1, 2]},
        "threshold_energy_ev": {"threshold_1": 1e4, "threshold_2": 2e4, "difference": None},
    }  # fmt: skip
    assert got.pixel_mask is not None
    assert got.flatfield is not None
    np.testing.assert_array_equal(got.pixel_mask, ~np.eye(4, 6, dtype=bool), "bits beyond the fifth do no harm")
    np.testing.assert_array_equal(got.flatfield, np.full((4, 6), 1.5))
    assert got.flatfield.dtype == np.float32


@pytest.mark.parametrize("key", [*FULL_START, "series_id", "series_unique_id"])
@pytest.mark.parametrize("value", [..., None])
def test_any_key_of_a_start_may_be_missing_or_none(key: str, value: Any) -> None:
    pixels = {"threshold_1": mda(PIXELS), "difference": mda(PIXELS)}
    changed: dict[str, Any] = {**FULL_START, key: value}
    series: Any = UNIQUE if key == "series_id" else 1
    messages = feed(start(**changed), image(0, pixels, series_id=series), end(series_id=series))
    assert told(messages) == [("start", series), ("frames", series, 0), ("end", series)]
    (got, *_) = messages
    assert isinstance(got, SeriesStart)
    assert (got.detector_shape, got.dtype, got.channels) == ((4, 6), np.dtype("<u2"), ("threshold_1", "difference"))
    assert got.frames == (None if key == "number_of_images" else 7)


@pytest.mark.parametrize("missing", ["image_dtype", "image_size_x", "image_size_y", "channels"])
def test_a_start_that_says_too_little_waits_for_the_first_image(missing: str) -> None:
    decoder = dectris_v2.Decoder()
    raw = start(**{missing: ...})
    assert decoder.feed(batch([raw], [raw])) == [Announced(1)]
    assert told(decoder.feed(batch([image(3, {"a": None})])))[0][0] == "?", "an image that says nothing does not help"
    got, block = decoder.feed(batch([image(4)], [image(5)]))
    assert isinstance(got, SeriesStart)
    assert (got.detector_shape, got.dtype, got.channels, got.header) == (
        (4, 6), np.dtype("<u2"), ("threshold_1",), (raw,)
    )  # fmt: skip
    assert told([block]) == [("frames", 1, 4, 5)]
    assert told(decoder.feed(batch([image(6)], [end()]))) == [("frames", 1, 6), ("end", 1)], "told once"


def test_a_series_without_images() -> None:
    got, last = feed(start(image_dtype=..., channels=...), end())
    assert (one_start([got]).detector_shape, one_start([got]).dtype) == ((4, 6), np.dtype("<u4"))
    assert isinstance(last, SeriesEnd)
    messages = feed(start(image_size_x=None), end())
    assert [type(message) for message in messages] == [Undecodable, SeriesEnd]
    assert told(messages)[0][1:] == ("series 1: neither its start nor an image gave the image size", 0)


def test_the_saturation_value_tells_the_type_only_when_it_must_be() -> None:
    assert one_start(feed(start(image_dtype=..., saturation_value=2**32 - 2))).dtype == np.dtype("<u4")
    for ambiguous in (21517, 65534, 254, None, 1.5, "65536", True):
        raw = start(image_dtype=..., saturation_value=ambiguous)
        assert dectris_v2.Decoder().feed(batch([raw])) == [Announced(1)]


def test_an_array_that_does_not_fit_is_not_used_and_told() -> None:
    wrong: list[Any] = [
        mda(np.zeros((6, 4), "<u4")), mda(np.zeros((4, 6), "<u4"), tag=71), 5, [1, 2], cbor2.CBORTag(40, 3),
        cbor2.CBORTag(40, [[4, 6], cbor2.CBORTag(70, b"short")]),
        cbor2.CBORTag(40, [["4", []], cbor2.CBORTag(70, b"")]),
        cbor2.CBORTag(40, [[4, 6], cbor2.CBORTag(70, cbor2.CBORTag(56500, [[], 4, b""]))]),
        cbor2.CBORTag(40, [[4, 6], cbor2.CBORTag(70, cbor2.CBORTag(56500, ["bslz4", 4, b"\xff" * 40]))]),
        cbor2.CBORTag(40, [[4, 6], cbor2.CBORTag(70, "text")]),
    ]  # fmt: skip
    for key in ("pixel_mask", "flatfield"):
        for value in wrong:
            got, note = feed(start(**{key: {"threshold_1": value}}))
            assert isinstance(got, SeriesStart)
            assert (got.pixel_mask, got.flatfield) == (None, None)
            assert isinstance(note, Undecodable)
            assert note.frames == 0
            assert note.reason.startswith(f"series 1: its {key} is not used: "), note.reason


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (start(image_dtype="int32"), "series 1: image_dtype 'int32'; known are uint8, uint16, uint32"),
        (start(series_id=..., series_unique_id=None), "a 'start' message needs 'series_id' or 'series_unique_id'"),
        (end(series_id=-4, series_unique_id=[]), "an? 'end' message needs 'series_id'"),
        (start()[:-1], "damaged"),
        (end() + b"\x00", "damaged"),
    ],
)
def test_starts_and_ends_that_cannot_be_used_cost_no_frame(message: bytes, reason: str) -> None:
    refused = refusal(message)
    assert refused.frames == 0
    assert re.search(reason, refused.reason), refused.reason


@pytest.mark.parametrize(
    "value",
    [
        b"\xd8\x1c\x81\xd8\x1d\x00",  # a list that holds itself
        b"\xc2\x5a\x00\x01\x00\x00" + b"\xff" * 65536,  # a number of 20,000 digits
        b"\xd8\x23\x63(((",  # a regular expression
        b"\xc0\x63abc",  # no date
        b"\x63\xff\xfe\xfd",  # no Unicode
        b"\x9f" + b"\x00" * 20000 + b"\xff",  # too much of it
        b"\x81" * 60 + b"\x00",
        b"\xf8\xff",
    ],
)
@pytest.mark.parametrize("key", ["user_data", "channels", "pixel_mask", "series_date", "image_size_x"])
def test_hostile_values_in_a_start_are_as_good_as_absent(value: bytes, key: str) -> None:
    keys = {"type": "start", "series_id": 1, "image_dtype": "uint16", "image_size_x": 6, "image_size_y": 4}
    keys = {name: item for name, item in keys.items() if name != key}
    body = b"".join(cbor2.dumps(name) + cbor2.dumps(item) for name, item in keys.items()) + cbor2.dumps(key) + value
    messages = feed(bytes([0xA0 + len(keys) + 1]) + body, image(0))
    assert isinstance(messages[0], SeriesStart)
    assert value[0] in (0x81, 0xF8) or not messages[0].settings, "only what is plain is kept"
    assert told(messages)[0] == ("start", 1)
    assert told(messages)[-1] == ("frames", 1, 0)


def test_nesting_is_bounded() -> None:
    for opening in (b"\x81", b"\x9f", b"\xc6", b"\xbf\x61a", b"\xa1\x61a"):
        for depth in (50, 64, 100_000):
            closing = b"\xff" * depth if opening[0] in (0x9F, 0xBF) else b""
            inside = opening * depth + b"\x00" + closing
            message = b"\xa3\x64type\x63end\x69series_id\x01\x61x" + inside
            assert told(feed(message))[0][0] == ("end" if depth == 50 else "?"), (opening, depth)


def test_a_new_start_replaces_an_older_one_and_forgotten_series_do_not_pile_up() -> None:
    decoder = dectris_v2.Decoder()
    decoder.feed(batch([start(image_dtype="uint32")], [start(image_dtype="uint16")]))
    assert told(decoder.feed(batch([image(0)]))) == [("frames", 1, 0)]
    decoder.feed(batch(*([start(series_id=n)] for n in range(2, 2000))))
    assert len(decoder._series) <= 8


# What is not ours, or damaged


def test_parts_of_other_protocols_are_one_undecodable_a_message() -> None:
    v1 = [
        b'{"htype":"dimage-1.0","series":1,"frame":0}',
        b'{"htype":"dimage_d-1.0"}',
        BSLZ4,
        b'{"htype":"dconfig-1.0"}',
    ]
    native = [msgpack.packb({"type": "frames", "series": 1}), b"pixels"]
    messages = dectris_v2.Decoder().feed(batch(v1, native, [b""], [b"GET / HTTP/1.1\r\n"]))
    assert [type(message) for message in messages] == [Undecodable] * 4
    assert all(isinstance(m, Undecodable) and m.frames == 1 and "Stream V2" in m.reason for m in messages)


def test_an_empty_batch() -> None:
    assert dectris_v2.Decoder().feed(batch()) == []


def test_looks_like() -> None:
    for message in (IMAGE, IMAGE[3:], END, start(), packed({"a": 1, "type": "?"})):
        assert dectris_v2.looks_like(message)
    for other in (
        b"", b"\xd9\xd9\xf7", IMAGE[:-1], cbor2.dumps({"a": 1}), cbor2.dumps({"type": 1}), cbor2.dumps(["type"]),
        msgpack.packb({"type": "start"}), b'{"htype":"dheader-1.0"}', b"MPX,0000000384,HDR,", b"GET / HTTP/1.1",
    ):  # fmt: skip
        assert not dectris_v2.looks_like(other), other


LONG_IMAGE = image(
    1,
    {"threshold_1": mda(PIXELS, "bslz4"), "b": mda(PIXELS)},
    user_data=[1, "💙", {"a": [b"x", 2.5]}],
    stop_time=[1, 3],
)


def within(message: bytes, before: bytes, after: bytes) -> ReceivedBatch:
    """One message with other bytes around it in the slab."""
    slab = np.frombuffer(before + message + after, np.uint8)
    return ReceivedBatch(slab, np.array([len(before)]), np.array([len(message)]), np.array([True]), 0)


def checked(message: bytes, rest: bytes = b"") -> list[Message]:
    """Decode a message twice, between different bytes: what lies around it may not matter, nor be pointed to."""
    results = []
    for before, after in ((b"", rest), (b"\xff\xa1\x61", b"\xff" * 40), (b"\x9f", IMAGE)):
        messages = dectris_v2.Decoder().feed(within(message, before, after))
        for item in messages:
            for block in [item, *item.others] if isinstance(item, FrameBlock) else []:
                assert ((block.offsets >= len(before)) & (block.sizes >= 0)).all()
                assert (block.offsets + block.sizes <= len(before) + len(message)).all()
        results.append([(*told([m]), *(payloads_of([m]) if isinstance(m, FrameBlock) else [])) for m in messages])
    assert results[0] == results[1] == results[2]
    return messages


@pytest.mark.parametrize("message", [IMAGE, LONG_IMAGE, END, start(**FULL_START)])
def test_truncated_anywhere(message: bytes) -> None:
    for length in range(len(message)):
        (refused,) = checked(message[:length], message[length:])
        assert isinstance(refused, Undecodable), length
    assert not isinstance(checked(message)[0], Undecodable)


@given(
    st.sampled_from([IMAGE, LONG_IMAGE, END, start(), start(**FULL_START)]),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 3),
)
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_damage_never_raises(message: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(message)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    checked(bytes(damaged[: len(damaged) - cut]))


def test_not_a_byte_beyond_a_message_is_read() -> None:
    """Messages cut anywhere, right in front of memory that cannot be read."""
    script = """
import ctypes, mmap, sys
import numpy as np
from detectors.protocols import cbor
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
base = np.frombuffer(memory, np.uint8)
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base.ctypes.data + page), page, 0) == 0
for message in map(bytes.fromhex, sys.stdin.read().split()):
    for length in range(1, len(message) + 1):
        base[page - length : page] = np.frombuffer(message[:length], np.uint8)
        found, _ = cbor.walk(base[:page], np.array([page - length]), np.array([length]))
        cbor.entries(memoryview(base[page - length : page]))
        assert (found["what"][0] > cbor.OTHER) == (length < len(message)), (length, found)
print("all read")
"""
    messages = "\n".join(message.hex() for message in (IMAGE, LONG_IMAGE, END, start()))
    done = subprocess.run([sys.executable, "-c", script], input=messages, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "all read\n"), done.stderr


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
@example(b"\xbf" + b"\x00" * 199)
@example(b"\xbb" + b"\xff" * 199)
@example(b"\xa1\x64type\x7b" + b"\xff" * 8)
@example(b"\xa1\x64data\x9b" + b"\xff" * 8)
def test_random_bytes_never_raise(data: bytes) -> None:
    checked(data)
    checked(b"\xd9\xd9\xf7\xbf\x64type\x65image\x69series_id\x01\x68image_id\x01\x64data" + data)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_what_cbor2_can_read_is_well_formed(value: Any) -> None:
    """Ours agrees with an independent reader on where an item ends."""
    data = cbor2.dumps(value)
    message = b"\xa2\x61x" + data + b"\x64type\x61?"
    assert feed(message) == []
    for cut in range(1, min(len(data), 40)):
        assert len(feed(message[:-cut])) == 1


# The sending half


def sent(start: SeriesStart, *frames: dict[str, Any]) -> list[bytes]:
    encoder = dectris_v2.Encoder()
    messages = encoder.start(start)
    for arguments in frames:
        messages += encoder.frames(start.series, **arguments)
    messages += encoder.end(start.series)
    assert all(len(message) == 1 for message in messages)
    return [bytes(message[0]) for message in messages]


@pytest.mark.parametrize("name", dectris_v2.ENCODINGS)
@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_sent_comes_back(name: str, dtype: str, count: int) -> None:
    encoding, rng = dectris_v2.ENCODINGS[name], np.random.default_rng(1)
    frames = rng.poisson(2, (count, 5, 13, 21)).astype(dtype)
    payloads = [[codec.encode(frame, encoding) for frame in channel] for channel in frames]
    channels = tuple(f"threshold_{c + 1}" for c in range(count))
    times = [1_700_000_000_123_456_780 + 20 * n * n for n in range(5)]
    mask = rng.random((13, 21)) < 0.8
    flatfield = rng.random((13, 21)).astype("<f4")
    known: dict[str, Any] = {
        "energy_kev": 80.1,
        "scan_step_angstrom": [0.1, 0.2],
        "aberrations": {"C10": -5.0},
        "count_time_s": 1e-5,
    }
    original = SeriesStart(
        7, (13, 21), np.dtype(dtype), (2, 3), 6, known, channels=channels, pixel_mask=mask, flatfield=flatfield
    )
    others = [(encoding, channel) for channel in payloads[1:]]
    arguments = {"first": 2**33, "payloads": payloads[0], "encoding": encoding, "others": others, "exposed_ns": times}
    messages = sent(original, arguments)
    first, block, last = feed(*messages)
    assert isinstance(first, SeriesStart)
    assert isinstance(block, FrameBlock)
    assert isinstance(last, SeriesEnd)
    assert (first.series, first.detector_shape, first.dtype, first.scan_shape, first.frames, first.channels) == (
        7, (13, 21), np.dtype(dtype), (2, 3), 6, channels
    )  # fmt: skip
    assert dict(first.settings) == known
    assert (first.header, first.maximum_is_masked) == ((messages[0],), True)
    assert first.pixel_mask is not None
    assert first.flatfield is not None
    np.testing.assert_array_equal(first.pixel_mask, mask)
    np.testing.assert_array_equal(first.flatfield, flatfield)
    assert (block.indices - 2**33).tolist() == [0, 1, 2, 3, 4]
    assert block.exposed_ns is not None
    assert block.exposed_ns.tolist() == times
    for c in range(count):
        assert [payload for _, payload in payloads_of([block.channel(c)])] == payloads[c]
    # An independent reader sees the same.
    for n, message in enumerate(messages[1:-1]):
        for name, channel in zip(channels, frames, strict=True):
            np.testing.assert_array_equal(pictures(message)[name], channel[n])
    said = plain(cbor2.loads(messages[0]))
    np.testing.assert_array_equal(array(said["pixel_mask"][channels[-1]]) == 0, mask)
    np.testing.assert_array_equal(array(said["flatfield"][channels[0]]), flatfield)


def test_messages_look_as_a_detector_sends_them() -> None:
    """Tag, key order and values, as described; read by cbor2."""
    settings = {"energy_kev": 200.0, "count_time_s": 1e-4, "detector": "simulated"}
    original = SeriesStart(3, (4, 6), np.dtype("<u2"), (2, 2), 4, settings)
    arguments = {"first": 7, "payloads": [BSLZ4], "encoding": Encoding.BSLZ4, "exposed_ns": [0xB59 * 20]}
    messages = sent(original, arguments)
    assert all(message.startswith(b"\xd9\xd9\xf7") for message in messages)
    first, picture, last = (plain(cbor2.loads(message)) for message in messages)
    unique = "0" * 25 + "3"
    assert list(first)[:4] == ["type", "series_id", "series_unique_id", "arm_date"]
    assert list(first)[4:] == sorted(list(first)[4:])
    assert (first["image_size_x"], first["image_size_y"], first["image_dtype"]) == (6, 4, "uint16")
    assert (first["number_of_images"], first["incident_energy"], list(first["channels"])) == (4, 2e5, ["threshold_1"])
    assert first["saturation_value"] == 65534
    assert list(picture) == [
        "type", "series_id", "series_unique_id", "image_id", "real_time", "series_date", "start_time", "stop_time",
        "data",
    ]  # fmt: skip
    assert [list(picture[key]) for key in ("real_time", "start_time", "stop_time")] == [
        [5000, 50_000_000], [0xB59, 50_000_000], [0xB59 + 5000, 50_000_000]
    ]  # fmt: skip
    assert last == {"type": "end", "series_id": 3, "series_unique_id": unique}
    # The pixels are laid out as in the written-out message, byte for byte.
    at = IMAGE.index(b"\x64data")
    assert messages[1].endswith(IMAGE[at:])


def test_an_endless_series_of_unknown_times_with_a_text_for_a_name() -> None:
    original = SeriesStart("scan é", (4, 6), np.dtype("<u2"))
    arguments = {"first": 0, "payloads": [memoryview(BSLZ4)] * 2, "encoding": Encoding.BSLZ4}
    first, block, last = feed(*sent(original, arguments))
    assert isinstance(first, SeriesStart)
    assert isinstance(block, FrameBlock)
    assert isinstance(last, SeriesEnd)
    assert (first.series, block.series, last.series) == ("scan é",) * 3
    assert (first.frames, first.scan_shape, dict(first.settings)) == (None, None, {})
    assert block.exposed_ns is not None
    assert block.exposed_ns.tolist() == [0, 0]


def test_several_series_by_one_encoder() -> None:
    encoder = dectris_v2.Encoder()
    for series, shape in ((1, (4, 6)), (2, (2, 3))):
        encoder.start(SeriesStart(series, shape, np.dtype("<u1")))
    for series, shape in ((1, [4, 6]), (2, [2, 3])):
        (message,) = encoder.frames(series, 0, [b"x"], Encoding.RAW)
        assert list(plain(cbor2.loads(message[0]))["data"]["threshold_1"].value[0]) == shape


def test_what_cannot_be_sent_is_said() -> None:
    encoder = dectris_v2.Encoder()
    with pytest.raises(ConfigurationError, match="uint8, uint16, uint32, not float32"):
        encoder.start(SeriesStart(1, (4, 6), np.dtype("<f4")))
    with pytest.raises(ConfigurationError, match="needs the start"):
        encoder.frames(1, 0, [b""], Encoding.RAW)
    for series in (-1, 2**64):
        with pytest.raises(ConfigurationError, match=f"from 0 to .* got {series}"):
            encoder.start(SeriesStart(series, (4, 6), np.dtype("<u2")))
    encoder.start(SeriesStart(1, (4, 6), np.dtype("<u2")))
    with pytest.raises(ConfigurationError, match="bslz4, lz4, raw, not raw_big_endian"):
        encoder.frames(1, 0, [b""], Encoding.RAW_BIG_ENDIAN)
    with pytest.raises(ConfigurationError, match="frames of 2 channels; announced were threshold_1"):
        encoder.frames(1, 0, [b""], Encoding.RAW, others=[(Encoding.RAW, [b""])])


@given(st.integers(0, 2**64 - 1), st.integers(0, 7))
def test_heads_are_the_shortest(argument: int, kind: int) -> None:
    assert cbor.head(0, argument) == cbor2.dumps(argument)
    assert cbor.head(kind, argument)[0] >> 5 == kind
