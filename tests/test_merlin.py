"""Merlin: recorded streams and files are decoded to the right frames, and nothing that anybody may send raises."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors import codec
from detectors.errors import ConfigurationError, ProtocolError
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
from detectors.protocols import merlin_control as control
from detectors.protocols.merlin import ENCODINGS, Decoder, Encoder, framing, looks_like
from detectors.protocols.merlin_framing import MAX_MESSAGE_BYTES, message
from detectors.protocols.merlin_headers import nanoseconds, parse_acquisition_header, parse_frame_header
from tests import merlin_oracle as oracle

SIMULATED = oracle.STREAMS / "merlin_sim_data.bin"
CONTROL = oracle.STREAMS / "merlin_sim_control.txt"
NO_DATA = "the recorded streams (shared/data/streams) are not here"
#: 2024-07-02 13:46:43 UTC
NOW = 1_719_928_003 * 10**9
RAW = {name: encoding for name, encoding in ENCODINGS.items() if name != "binary"}


@pytest.fixture(scope="module")
def recorded() -> bytes:
    if not SIMULATED.exists():
        pytest.skip(NO_DATA)
    return SIMULATED.read_bytes()


def received(messages: Sequence[bytes | memoryview], time_ns: int = 0) -> ReceivedBatch:
    return ReceivedBatch.from_messages([[bytes(message)] for message in messages], time_ns)


def framed(data: bytes) -> list[bytes]:
    return [data[start:stop] for start, stop in framing(memoryview(data)).bounds]


def feed(*messages: bytes, decoder: Decoder | None = None, together: bool = True) -> list[Message]:
    decoder = decoder or Decoder()
    batches = [received(messages)] if together else [received([message]) for message in messages]
    return [out for batch in batches for out in decoder.feed(batch)]


def blocks_of(messages: Sequence[Message]) -> list[FrameBlock]:
    return [message for message in messages if isinstance(message, FrameBlock)]


def the(kind: Any, messages: Sequence[Message]) -> Any:
    (one,) = [message for message in messages if isinstance(message, kind)]
    return one


def frames_of(messages: Sequence[Message]) -> list[tuple[int, bytes]]:
    return [
        (int(block.indices[i]), block.slab[block.offsets[i] : block.offsets[i] + block.sizes[i]].tobytes())
        for block in blocks_of(messages)
        for i in range(len(block))
    ]


def images_of(messages: Sequence[Message], start: SeriesStart | None = None) -> dict[int, np.ndarray]:
    start = start or the(SeriesStart, messages)
    return {
        int(block.indices[i]): codec.decode(
            block.slab[block.offsets[i] : block.offsets[i] + block.sizes[i]],
            block.encoding,
            start.detector_shape,
            start.dtype,
        )
        for block in blocks_of(messages)
        for i in range(len(block))
    }


def joined(messages: Sequence[Sequence[bytes | memoryview]]) -> list[bytes]:
    """What an encoder says, as it comes over TCP."""
    return [b"".join(parts) for parts in messages]


def acquisition(
    count: int = 8,
    shape: tuple[int, int] = (4, 8),
    dtype: str = "<u2",
    *,
    encoder: Encoder | None = None,
    **start: Any,
) -> list[bytes]:
    """HDR and frames, whose pixels all hold the frame's number."""
    encoder = encoder or Encoder(lambda: NOW)
    start = {"frames": count, **start}
    out = joined(encoder.start(SeriesStart(1, shape, np.dtype(dtype), **start)))
    payloads = [np.full(shape, i, np.dtype(dtype).newbyteorder(">")).tobytes() for i in range(count)]
    return out + joined(encoder.frames(1, 0, payloads, Encoding.RAW_BIG_ENDIAN))


# framing


def in_pieces(data: bytes, cuts: Sequence[int]) -> tuple[list[bytes], int, int]:
    """What a receiver that sees ``data`` piece by piece makes of it: messages, stray bytes, bytes left over."""
    buffer, out, stray = b"", [], 0
    edges = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    for start, stop in zip(edges, edges[1:], strict=False):
        buffer += data[start:stop]
        result = framing(memoryview(buffer))
        out += [buffer[a:b] for a, b in result.bounds]
        stray += result.stray
        buffer = buffer[result.used :]
    return out, stray, len(buffer)


def test_the_length_counts_the_comma() -> None:
    assert message(b"GET,SOFTWAREVERSION") == b"MPX,0000000020,GET,SOFTWAREVERSION"
    assert framing(memoryview(message(b"GET,SOFTWAREVERSION"))).bounds == [(0, 34)]


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 267_399), max_size=12))
def test_recorded_bytes_in_any_pieces(recorded: bytes, cuts: list[int]) -> None:
    messages, stray, left = in_pieces(recorded, cuts)
    assert (len(messages), stray, left) == (9, 0, 0)
    assert b"".join(messages) == recorded


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=40).map(message),
            st.binary(max_size=30),
            st.sampled_from([b"M", b"MPX", b"MPX,", b"MPX,00000", b"MPX,0000000000,", b"MPX,9999999999,MQ1,"]),
        ),
        max_size=12,
    ),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_every_byte_is_a_message_stray_or_waiting(pieces: list[bytes], cuts: list[int]) -> None:
    data = b"".join(pieces)
    messages, stray, left = in_pieces(data, cuts)
    assert sum(map(len, messages)) + stray + left == len(data)
    assert all(item.startswith(b"MPX,") for item in messages)


@pytest.mark.parametrize(
    "junk", [b"x", b"MP", b"\0" * 5000, b"MPX,00000x0020,", b"MPX,0000000000,", b"MPX,0999999999,"]
)
def test_stray_bytes_are_passed_over_and_counted(junk: bytes) -> None:
    good = acquisition(3)
    result = framing(memoryview(junk + good[0] + junk + b"".join(good[1:]) + b"MPX,00"))
    assert len(result.bounds) == len(good)
    assert result.stray == 2 * len(junk)
    data = junk + good[0] + junk + b"".join(good[1:])
    assert result.used == len(data)
    assert [data[a:b] for a, b in result.bounds] == good


@pytest.mark.parametrize("kept", [1, 14, 15, 30, 200, 440])
def test_a_message_cut_short_costs_no_other(kept: int) -> None:
    good = acquisition(4)
    damaged = b"".join([*good[:2], good[2][:kept], *good[3:]])
    result = framing(memoryview(damaged))
    assert [damaged[a:b] for a, b in result.bounds] == [*good[:2], *good[3:]]
    assert result.stray == kept


def test_a_length_that_is_too_large_costs_little() -> None:
    good = acquisition(8)
    wrong = re.sub(rb"^MPX,\d+", b"MPX,0000000999", good[2])
    data = b"".join([*good[:2], wrong, *good[3:]])
    messages, _, _ = in_pieces(data, range(0, len(data), 100))
    assert [m for m in messages if m in good] == [*good[:2], *good[3:]]


@pytest.mark.parametrize(
    "data",
    [
        b"MPX,0016777000,MQ1," * 200_000,
        b"MPX,0000000019,HDR," * 200_000,
        b"MPX,0000000005," * 200_000,
        b"M" * 4_000_000,
        b"MPX,9999999999," * 250_000,
    ],
)
def test_hostile_bytes_take_linear_time(data: bytes) -> None:
    began = time.perf_counter()
    framing(memoryview(data))
    assert time.perf_counter() - began < 8


# the recorded stream


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 267_399), max_size=8), together=st.booleans())
def test_the_recorded_stream_is_decoded(recorded: bytes, cuts: list[int], together: bool) -> None:
    messages = feed(*in_pieces(recorded, cuts)[0], together=together)
    start = the(SeriesStart, messages)
    assert messages[:2] == [Announced(start.series), start]
    assert (start.detector_shape, start.dtype, start.frames) == ((128, 256), np.dtype("u1"), 8)
    assert (start.scan_shape, start.maximum_is_masked) == (None, False)
    assert start.header == (recorded[:2063],), "a recording keeps the message as it came"
    assert start.series == "07/05/2021 18:56:38 #1"
    settings_ = start.settings
    assert settings_["detector"] == "Merlin"
    assert settings_["counter_depth"] == 6
    assert settings_["thresholds_kev"] == [40.0, 511.0]
    assert settings_["count_time_s"] == pytest.approx(0.1)
    assert settings_["detector_number"].startswith("W559_G11")
    assert "frames_per_trigger" not in settings_
    images = images_of(messages)
    assert sorted(images) == list(range(8))
    for i, begin in enumerate(range(2063, len(recorded), 14 + 33153)):  # 15 bytes of prefix, 384 of header
        expected = np.frombuffer(recorded[begin + 399 : begin + 14 + 33153], np.uint8).reshape(128, 256)
        np.testing.assert_array_equal(images[i], expected)
    exposed = np.concatenate([block.exposed_ns for block in blocks_of(messages)])
    assert exposed[0] == np.datetime64("2021-05-07T16:56:59.151103718", "ns").astype(np.int64)
    assert (np.diff(exposed) > 0).all()
    assert isinstance(messages[-1], SeriesEnd)
    assert messages[-1].series == start.series


def test_a_batch_of_like_frames_is_one_block_in_the_slab(recorded: bytes) -> None:
    batch = received(framed(recorded), time_ns=77)
    announced, start, block, end = Decoder().feed(batch)
    assert isinstance(start, SeriesStart)
    assert announced == Announced(start.series)
    assert isinstance(end, SeriesEnd)
    assert isinstance(block, FrameBlock)
    assert block.slab is batch.slab
    assert (block.time_ns, len(block), block.encoding) == (77, 8, Encoding.RAW)


# files


@pytest.mark.parametrize(
    ("archive", "member"), oracle.mib_names() or [pytest.param("", "", marks=pytest.mark.skip(NO_DATA))]
)
def test_recorded_files_are_decoded(archive: str, member: str) -> None:
    data = oracle.mib_bytes(archive, member)
    hdr = oracle.mib_bytes(archive, member.replace(".mib", ".hdr"))
    frames = list(oracle.mib_frames(data))
    about = parse_acquisition_header(hdr)
    assert about.frames == len(frames)
    assert about.counter_depth == frames[0].depth
    for i, frame in enumerate(frames, 1):
        header = parse_frame_header(memoryview(frame.header + frame.pixels))
        image = frame.image
        assert header.sequence == i
        assert header.detector_shape == image.shape
        assert header.dtype == image.dtype.newbyteorder("<")
        assert header.payload_bytes == len(frame.pixels)
        assert header.counter_depth == frame.depth
        assert header.shutter_ns == round(float(frame.fields[10]) * 1e9)
        stamp = frame.fields[frame.fields.index("MQ1A") + 1].rstrip("Z")
        assert header.timestamp_ns == np.datetime64(stamp, "ns").astype(np.int64)
        np.testing.assert_array_equal(
            codec.decode(frame.pixels, header.encoding, header.detector_shape, header.dtype), image
        )
    messages = feed(message(hdr), *(message(frame.header + frame.pixels) for frame in frames))
    images = images_of(messages)
    assert sorted(images) == list(range(len(frames)))
    for frame, image in zip(frames, images.values(), strict=True):
        np.testing.assert_array_equal(image, frame.image)
    bare = feed(hdr, *(frame.header + frame.pixels for frame in frames))
    assert frames_of(bare) == frames_of(messages), "without the network's prefix"
    assert the(SeriesStart, bare) == the(SeriesStart, messages)


FILES = oracle.mib_names()
PAIRS = [(archive, name) for archive, name in FILES if (archive, name.replace(".mib", "RAW.mib")) in FILES]


@pytest.mark.parametrize(("archive", "member"), PAIRS or [pytest.param("", "", marks=pytest.mark.skip(NO_DATA))])
def test_raw_and_binary_exposures_show_the_same(archive: str, member: str) -> None:
    binary = list(oracle.mib_frames(oracle.mib_bytes(archive, member)))
    raw = list(oracle.mib_frames(oracle.mib_bytes(archive, member.replace(".mib", "RAW.mib"))))
    assert {frame.fields[6] for frame in raw} == {"R64"}
    for one, other in zip(binary, raw, strict=True):
        assert one.image.shape == other.image.shape
        assert (one.image == other.image).mean() > 0.999
        assert other.image.any(), "an empty pair proves nothing"


@pytest.mark.skipif(not oracle.mib_names(), reason=NO_DATA)
def test_a_newer_header_says_the_scan() -> None:
    ((archive, member),) = [names for names in oracle.mib_names(".hdr") if "sig256x64" in names[1]]
    about = parse_acquisition_header(oracle.mib_bytes(archive, member))
    assert about.scan_shape == (2, 4)
    assert about.frames_per_trigger == 4
    assert about.thresholds_kev == [12.0, 511.0]
    assert about.time_stamp == "02/07/2024 13:49:15"
    frames = oracle.mib_frames(oracle.mib_bytes(archive, member.replace(".hdr", ".mib")))
    start = the(SeriesStart, feed(oracle.mib_bytes(archive, member), *(f.header + f.pixels for f in frames)))
    assert (start.scan_shape, start.frames, start.detector_shape) == ((2, 4), 8, (64, 256))
    assert start.settings["frames_per_trigger"] == 4


# headers


def header_text(**fields: Any) -> bytes:
    """An MQ1 header of which some fields are replaced, by number (``f6="R64"``), MQ1A extension and all."""
    values = ["MQ1", "000001", "00384", "01", "0256", "0256", "U16", "   1x1", "01", "2021-05-07 18:56:59.151103"]
    values += ["0.100000", "0", "0", "0", "4.0E+1", *["0.0"] * 7, "3RX", "068"]
    for name, value in fields.items():
        if name.startswith("f"):
            values[int(name[1:])] = str(value)
    extension = fields.get("extension", f"MQ1A,2021-05-07T16:56:59.151103718Z,100000000ns,{fields.get('depth', 12)},")
    return ",".join([*values, extension]).encode().ljust(384, b"\0")


@pytest.mark.parametrize(
    ("fields", "shape", "dtype", "encoding", "size"),
    [
        ({"f6": "U08"}, (256, 256), "u1", Encoding.RAW, 65536),
        ({"f6": "U01"}, (256, 256), "u1", Encoding.RAW, 65536),
        ({"f6": "U16"}, (256, 256), "<u2", Encoding.RAW_BIG_ENDIAN, 131072),
        ({"f6": "U32"}, (256, 256), "<u4", Encoding.RAW_BIG_ENDIAN, 262144),
        ({"f7": "  2x2G", "f4": 514, "f5": "0514"}, (514, 514), "<u2", Encoding.RAW_BIG_ENDIAN, 528392),
        ({"f7": "   Nx1", "f4": 1024}, (256, 1024), "<u2", Encoding.RAW_BIG_ENDIAN, 524288),
        ({"f6": "R64", "depth": 1}, (256, 256), "u1", Encoding.MERLIN_1BIT, 8192),
        ({"f6": "R64", "depth": 6, "f5": "0064"}, (64, 256), "u1", Encoding.MERLIN_6BIT, 16384),
        ({"f6": "R64", "depth": 12}, (256, 256), "<u2", Encoding.MERLIN_12BIT, 131072),
        ({"f6": "R64", "depth": 1, "f4": 1024, "f7": "2x2"}, (512, 512), "u1", Encoding.MERLIN_QUAD_1BIT, 32768),
        ({"f6": "R64", "depth": 6, "f4": 1024, "f7": "2x2"}, (512, 512), "u1", Encoding.MERLIN_QUAD_6BIT, 262144),
        ({"f6": "R64", "depth": 12, "f4": 1024, "f7": "2x2"}, (512, 512), "<u2", Encoding.MERLIN_QUAD_12BIT, 524288),
    ],
)
def test_what_a_frame_header_means(
    fields: dict[str, Any], shape: tuple[int, int], dtype: str, encoding: Encoding, size: int
) -> None:
    header = parse_frame_header(header_text(**fields))
    assert (header.detector_shape, header.dtype) == (shape, np.dtype(dtype))
    assert (header.encoding, header.payload_bytes) == (encoding, size)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"f6": "R64", "depth": 24}, "24 bits.*binary"),
        ({"f6": "R64", "extension": ""}, "unknown depth.*binary"),
        ({"f6": "R64", "f7": "Nx1", "f4": 1024}, "'Nx1'.*binary"),
        ({"f6": "R64", "f7": "2x2G", "f4": 1024}, "'2x2G'.*binary"),
        ({"f6": "R64", "depth": 1, "f4": 100}, "100x256.*words"),
        ({"f6": "R64", "f7": "2x2", "f4": 1026}, "1026x256.*words"),
        ({"f6": "U64"}, "'U64'"),
        ({"f6": "F32" * 1000}, "F32"),
    ],
)
def test_modes_that_cannot_be_read_are_refused_in_words(fields: dict[str, Any], reason: str) -> None:
    data = header_text(**fields)
    header = parse_frame_header(data.replace(b"00384", b"%05d" % len(data), 1))
    for name in ("detector_shape", "dtype", "encoding", "payload_bytes"):
        with pytest.raises(ProtocolError, match=reason) as caught:
            getattr(header, name)
        assert len(str(caught.value)) < 250
    (refused,) = feed(message(header_text(**fields) + bytes(100)))
    assert isinstance(refused, Undecodable)


def test_the_depth_may_be_known_from_the_acquisition() -> None:
    header = parse_frame_header(header_text(f6="R64", extension=""), counter_depth=6)
    assert header.encoding is Encoding.MERLIN_6BIT
    assert header.timestamp_ns == nanoseconds(b"2021-05-07 18:56:59.151103")
    assert header.shutter_ns == 100_000_000
    hdr = re.sub(rb"\):\t6\r", b"):\t12\r", message_text("<u1")[0])
    assert hdr != message_text("<u1")[0]
    frame = header_text(f6="R64", extension="", f4="0016", f5="0002") + bytes(64)
    assert the(FrameBlock, feed(hdr, message(frame))).encoding is Encoding.MERLIN_12BIT


def message_text(dtype: str) -> list[bytes]:
    return joined(Encoder(lambda: NOW).start(SeriesStart(1, (4, 8), np.dtype(dtype), frames=2)))


@pytest.mark.parametrize(
    "fields",
    [{"f1": 0}, {"f1": -1}, {"f1": "1_0"}, {"f1": "9" * 30}, {"f4": 0}, {"f4": 99999}, {"f5": ""}, {"f5": "²"},
     {"f2": 7}, {"f2": "99999"}, {"f2": "00500"}, {"f0": "MQ2"}, {"f3": "x"}],
)  # fmt: skip
def test_senseless_numbers_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_frame_header(header_text(**fields))


@pytest.mark.parametrize(
    "stamp",
    [b"", b"now", b"2021-02-30T00:00:00Z", b"0001-01-01 00:00:00", b"9999-01-01 00:00:00", b"2021-05-07T25:00:00Z"],
)
def test_senseless_times_are_unknown(stamp: bytes) -> None:
    assert nanoseconds(stamp) is None
    data = header_text(f9=stamp.decode(), extension=f"MQ1A,{stamp.decode()},5 ns,12,")
    assert parse_frame_header(data).timestamp_ns is None
    block = the(FrameBlock, feed(message(data + bytes(131072))))
    assert block.exposed_ns is None


def test_an_acquisition_header_with_nothing_in_it() -> None:
    about = parse_acquisition_header(b"HDR,")
    assert (about.frames, about.scan_shape, about.counter_depth, about.thresholds_kev) == (None, None, None, [])
    for bad in (b"", b"MQ1,", b"HDR," + bytes(1 << 17)):
        with pytest.raises(ProtocolError):
            parse_acquisition_header(bad)
    odd = parse_acquisition_header(
        b"HDR,\nFrames in Acquisition (Number):\tmany\nScanX:\t0\nScanY:\t-4\n"
        b"Thresholds (keV):\tx,nan,1e999,3\nEnd\nGain:\tno"
    )
    assert (odd.frames, odd.scan_shape, odd.thresholds_kev, odd.text("Gain")) == (None, None, [3.0], "")


# series


def indices(messages: Sequence[Message]) -> list[int]:
    return [int(index) for block in blocks_of(messages) for index in block.indices]


def kinds(messages: Sequence[Message]) -> str:
    letters = {Announced: "A", SeriesStart: "S", FrameBlock: "F", SeriesEnd: "E", Undecodable: "U"}
    return "".join(letters[type(m)] for m in messages)


def test_a_start_waits_for_the_first_frame() -> None:
    hdr, first, *_ = acquisition()
    decoder = Decoder()
    (announced,) = feed(hdr, decoder=decoder)
    assert feed(hdr, hdr, decoder=decoder) == [], "announced once"
    start, block = feed(first, decoder=decoder)
    assert isinstance(start, SeriesStart)
    assert announced == Announced(start.series)
    assert isinstance(block, FrameBlock)


def test_acquisitions_announced_within_a_second_are_told_apart() -> None:
    one, other = acquisition(5), acquisition(3)
    given_up, announced, start, *rest = feed(one[0], *other)
    assert [type(m) for m in (given_up, announced, start)] == [Announced, Announced, SeriesStart]
    assert announced == Announced(start.series)  # type: ignore[union-attr]
    assert given_up != announced
    assert kinds(rest) == "FE"


@pytest.mark.parametrize("together", [True, False])
def test_lost_doubled_and_reordered_frames(together: bool) -> None:
    hdr, *frames = acquisition(8)
    order = [0, 0, 2, 1, 5, 4, 4, 7]
    messages = feed(hdr, *(frames[i] for i in order), together=together)
    assert indices(messages) == order
    assert all(set(np.frombuffer(payload, ">u2")) == {i} for i, payload in frames_of(messages))
    assert isinstance(messages[-1], SeriesEnd), "the last number came, though others were lost"
    assert kinds(messages).count("E") == kinds(messages).count("S") == 1


def test_frames_that_come_late_in_the_batch_of_the_last_one_are_still_in_time() -> None:
    hdr, *frames = acquisition(4)
    assert kinds(feed(hdr, frames[0], frames[3], frames[2], frames[1])) == "ASFE"
    assert kinds(feed(hdr, *frames, frames[3])) == "ASFE"


def test_without_the_last_frame_there_is_no_end() -> None:
    assert kinds(feed(*acquisition(8)[:-1])) == "ASF"


def test_an_endless_acquisition() -> None:
    messages = feed(*acquisition(8, frames=None))
    assert kinds(messages) == "ASF"
    assert the(SeriesStart, messages).frames is None


@pytest.mark.parametrize("together", [True, False])
def test_two_acquisitions_in_a_row(together: bool) -> None:
    one = acquisition(5)
    other = acquisition(3, (2, 4), "<u1", encoder=Encoder(lambda: NOW + 10**9))
    for second in (one, other):  # the very same bytes again, too: simulators and replays do that
        messages = feed(*one, *second, together=together)
        text = kinds(messages)
        assert [text.count(letter) for letter in "ASE"] == [2, 2, 2]
        first_end, second_start = text.index("E"), text.rindex("S")
        assert first_end < second_start
        series = [m.series for m in messages if isinstance(m, SeriesStart)]
        assert series[0] != series[1]
        for kind in (Announced, SeriesEnd):
            assert [m.series for m in messages if isinstance(m, kind)] == series
        assert indices(messages) == [*range(5), *range(len(second) - 1)]
        assert {b.series for b in blocks_of(messages[second_start:])} == {series[1]}


@pytest.mark.parametrize("together", [True, False])
def test_a_header_repeated_in_mid_series_changes_nothing(together: bool) -> None:
    hdr, *frames = acquisition(6)
    messages = feed(hdr, hdr, *frames[:3], hdr, *frames[3:], together=together)
    assert [kinds(messages).count(letter) for letter in "ASE"] == [1, 1, 1]
    assert indices(messages) == list(range(6))


@pytest.mark.parametrize("together", [True, False])
def test_an_aborted_acquisition_begun_again_with_the_same_header_is_another(together: bool) -> None:
    hdr, *frames = acquisition(6)
    messages = feed(hdr, *frames[:3], hdr, *frames, together=together)
    starts = [m for m in messages if isinstance(m, SeriesStart)]
    assert len({start.series for start in starts}) == 2
    assert [len(list(b.indices)) for b in blocks_of(messages) if b.series == starts[0].series][-1]
    assert sum(len(b) for b in blocks_of(messages) if b.series == starts[1].series) == 6
    assert the(SeriesEnd, messages).series == starts[1].series


def test_frames_without_header_are_a_series_of_unknown_length() -> None:
    _, *frames = acquisition(6)
    next_one = acquisition(2)
    decoder = Decoder()
    messages = feed(*frames[3:], decoder=decoder)
    start = the(SeriesStart, messages)
    assert (start.detector_shape, start.dtype, start.frames, start.scan_shape) == ((4, 8), np.dtype("<u2"), None, None)
    assert start.header == ()
    assert indices(messages) == [3, 4, 5]
    assert kinds(feed(*next_one, decoder=decoder)) == "ASFE"


@pytest.mark.parametrize("together", [True, False])
def test_the_header_of_the_next_acquisition_is_lost(together: bool) -> None:
    decoder = Decoder()
    assert kinds(feed(*acquisition(4), decoder=decoder)) == "ASFE"
    messages = feed(*acquisition(4)[1:], decoder=decoder, together=together)
    assert the(SeriesStart, messages).frames is None
    assert indices(messages) == [0, 1, 2, 3]


@pytest.mark.parametrize("together", [True, False])
def test_a_short_acquisition_after_a_longer_one_that_was_aborted(together: bool) -> None:
    short = acquisition(4, encoder=Encoder(lambda: NOW + 10**9))
    messages = feed(*acquisition(10)[:9], *short[:3], together=together)
    assert not any(isinstance(m, SeriesEnd) for m in messages)
    messages = feed(*acquisition(10)[:9], *short, together=together)
    assert isinstance(messages[-1], SeriesEnd)
    assert the(SeriesEnd, messages).series == blocks_of(messages)[-1].series


def test_a_doubled_last_frame_belongs_to_what_has_ended() -> None:
    decoder = Decoder()
    stream = acquisition(4)
    (_, start, *_) = feed(*stream, decoder=decoder)
    assert isinstance(start, SeriesStart)
    doubled = feed(stream[-1], decoder=decoder)
    assert kinds(doubled) == "F"
    assert blocks_of(doubled)[0].series == start.series
    assert kinds(feed(*stream[1:], decoder=decoder)) == "SF", "the next one, its header lost"


def test_frames_of_another_kind_are_no_part_of_a_series() -> None:
    good, other = acquisition(3), acquisition(3, (8, 4), "<u1")
    messages = feed(*good[:2], other[2], *good[2:])
    assert kinds(messages) == "ASFUFE"
    assert "8x4 uint8 in a series of 4x8 uint16" in the(Undecodable, messages).reason


def test_a_frame_that_is_cut_short_is_undecodable() -> None:
    good = acquisition(3)
    messages = feed(*good[:2], good[2][:-7], good[3])
    assert kinds(messages) == "ASFUFE"
    assert "has 64 bytes of them, this one 57" in the(Undecodable, messages).reason


def test_a_message_of_two_parts_is_undecodable() -> None:
    good = acquisition(3)
    batch = ReceivedBatch.from_messages([[good[0]], good[1:3], [good[3]]])
    assert kinds(Decoder().feed(batch)) == "AUSFE"


def test_raw_and_binary_frames_may_follow_each_other() -> None:
    encoder = Encoder(lambda: NOW)
    image = np.arange(4 * 64, dtype=np.uint8).reshape(4, 64) % 2
    stream = joined(encoder.start(SeriesStart(1, (4, 64), np.dtype("u1"), frames=3)))
    for i, encoding in enumerate([Encoding.RAW, Encoding.MERLIN_1BIT, Encoding.MERLIN_6BIT]):
        stream += joined(encoder.frames(1, i, [codec.encode(image, encoding)], encoding))
    messages = feed(*stream)
    assert [block.encoding for block in blocks_of(messages)] == [0, Encoding.MERLIN_1BIT, Encoding.MERLIN_6BIT]
    for shown in images_of(messages).values():
        np.testing.assert_array_equal(shown, image)


def test_the_times_go_on_over_minutes_days_and_seven_digits() -> None:
    encoder = Encoder(lambda: NOW)
    encoder.start(SeriesStart(1, (1, 1), np.dtype("u1")))
    times = [NOW + step for step in (0, 1, 999_999_999, 59 * 10**9, 61 * 10**9, 86_400 * 10**9 + 5, 7)]
    stream = joined(encoder.frames(1, 999_996, [b"a"] * 7, Encoding.RAW, exposed_ns=times))
    block = the(FrameBlock, feed(*stream))
    assert block.exposed_ns is not None
    assert block.exposed_ns.tolist() == times
    assert block.indices.tolist() == list(range(999_996, 1_000_003))


def test_frames_of_old_software_have_times_too() -> None:
    frames = [header_text(f1=f"{i + 1:06d}", f9=f"2021-05-07 18:56:59.00000{i}", extension="") for i in range(5)]
    block = the(FrameBlock, feed(*(message(frame + bytes(131072)) for frame in frames)))
    assert block.exposed_ns is not None
    assert np.diff(block.exposed_ns).tolist() == [1000] * 4


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_messages_never_raise(data: st.DataObject) -> None:
    stream = acquisition(4)
    for _ in range(data.draw(st.integers(1, 4))):
        which = data.draw(st.integers(0, len(stream) - 1))
        bytes_ = bytearray(stream[which])
        action = data.draw(st.sampled_from(["change", "cut", "insert", "replace", "swap"]))
        at = data.draw(st.integers(0, min(len(bytes_), 420)))
        if action == "change" and at < len(bytes_):
            bytes_[at] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del bytes_[at:]
        elif action == "insert":
            bytes_[at:at] = data.draw(st.sampled_from([b",", b"9", b"\0", b"MQ1A,", b"MPX,0000000020,", b"-", b" "]))
        elif action == "replace":
            bytes_ = bytearray(data.draw(st.binary(max_size=60)))
        else:
            other = data.draw(st.integers(0, len(stream) - 1))
            stream[which], stream[other] = stream[other], stream[which]
            continue
        stream[which] = bytes(bytes_)
    for messages in (feed(*stream, together=data.draw(st.booleans())), feed(*framed(b"".join(stream)))):
        for block in blocks_of(messages):
            assert (block.indices >= 0).all()
            assert (block.offsets >= 0).all()
            assert (block.offsets + block.sizes <= len(block.slab)).all()
        assert all(len(m.reason) < 400 for m in messages if isinstance(m, Undecodable))


def test_a_header_full_of_traps_takes_no_time() -> None:
    trap = header_text(extension=",MQ1A,2021-05-07T16:56:00" * 2500)
    trap = trap.replace(b"00384", b"%05d" % len(trap), 1)
    began = time.perf_counter()
    assert len(trap) > 60_000
    feed(*[message(trap + bytes(131072))] * 5)
    assert time.perf_counter() - began < 2


# the sending half


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
@pytest.mark.parametrize("shape", [(5, 7), (512, 512)])
def test_binary_frames_come_back(dtype: str, shape: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (3, *shape), np.dtype(dtype), endpoint=True)
    encoder = Encoder(lambda: NOW)
    announced = SeriesStart(1, shape, np.dtype(dtype), (1, 3), 3, {"frames_per_trigger": 3, "count_time_s": 2e-3})
    stream = joined(encoder.start(announced))
    stream += joined(
        encoder.frames(1, 0, [f.astype(f.dtype.newbyteorder(">")).tobytes() for f in frames], ENCODINGS["binary"])
    )
    assert len(stream[0]) == 15 + 2048
    data = b"".join(stream)
    messages = feed(*framed(data))
    start = the(SeriesStart, messages)
    assert (start.detector_shape, start.dtype, start.scan_shape, start.frames) == (shape, np.dtype(dtype), (1, 3), 3)
    assert start.settings["frames_per_trigger"] == 3
    assert start.settings["count_time_s"] == pytest.approx(2e-3)
    assert start.settings["began"] == "02/07/2024 13:46:43"
    images = images_of(messages)
    for i, frame in enumerate(frames):
        np.testing.assert_array_equal(images[i], frame)
    assert np.diff(blocks_of(messages)[0].exposed_ns).tolist() == [2_000_000] * 2  # type: ignore[arg-type]
    assert isinstance(messages[-1], SeriesEnd)
    assert encoder.end(1) == []


@pytest.mark.parametrize("name", RAW)
def test_raw_frames_come_back(name: str) -> None:
    quad, depth = name.startswith("quad"), int(re.search(r"\d+", name)[0])  # type: ignore[index]
    shape = (256, 256) if quad else (48, 128)
    dtype = np.dtype("<u2" if depth == 12 else "u1")
    frames = np.random.default_rng(1).integers(0, 1 << depth, (2, *shape), dtype)
    payloads = [oracle.encode_raw(frame, depth, quad=quad) for frame in frames]
    encoder = Encoder(lambda: NOW)
    stream = joined(encoder.start(SeriesStart(1, shape, dtype, frames=2)))
    stream += joined(encoder.frames(1, 0, payloads, RAW[name]))
    fields = list(oracle.mib_frames(b"".join(item[15:] for item in stream[1:])))
    for frame, field in zip(frames, fields, strict=True):
        np.testing.assert_array_equal(field.image, frame)
        assert codec.encode(frame, RAW[name]) == field.pixels
    messages = feed(*framed(b"".join(stream)))
    assert {block.encoding for block in blocks_of(messages)} == {RAW[name]}
    assert frames_of(messages) == list(enumerate(payloads))
    images = images_of(messages)
    for i, frame in enumerate(frames):
        np.testing.assert_array_equal(images[i], frame)


def test_payloads_are_sent_as_they_are() -> None:
    encoder = Encoder(lambda: NOW)
    encoder.start(SeriesStart(1, (1, 2), np.dtype("u1")))
    payload = memoryview(b"ab")
    ((header, sent),) = encoder.frames(1, 41, [payload], Encoding.RAW)
    assert sent is payload
    assert parse_frame_header(bytes(header)[15:]).sequence == 42


@pytest.mark.parametrize(
    ("shape", "dtype", "encoding"),
    [
        ((4, 64), "<u2", Encoding.RAW),
        ((4, 64), "u1", Encoding.BSLZ4),
        ((4, 64), "u1", Encoding.LZ4),
        ((4, 64), "u1", Encoding.MERLIN_12BIT),
        ((4, 64), "<u2", Encoding.MERLIN_6BIT),
        ((4, 60), "u1", Encoding.MERLIN_1BIT),
        ((4, 64), "u1", Encoding.MERLIN_QUAD_1BIT),
        ((5, 64), "u1", Encoding.MERLIN_QUAD_6BIT),
    ],
)
def test_what_merlin_cannot_send_is_refused(shape: tuple[int, int], dtype: str, encoding: Encoding) -> None:
    encoder = Encoder(lambda: NOW)
    encoder.start(SeriesStart(1, shape, np.dtype(dtype)))
    with pytest.raises(ConfigurationError, match="Merlin cannot send"):
        encoder.frames(1, 0, [b""], encoding)


@pytest.mark.parametrize("changes", [{"dtype": np.dtype("<f4")}, {"channels": ("a", "b")}])
def test_what_merlin_cannot_announce_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="Merlin frames have one channel"):
        Encoder().start(SeriesStart(1, (4, 4), **{"dtype": np.dtype("u1"), **changes}))


def test_a_replayed_header_makes_the_same_series() -> None:
    hdr, *frames = acquisition(4, scan_shape=(2, 2))
    start = the(SeriesStart, feed(hdr, *frames))
    again = the(SeriesStart, feed(*start.header, *frames))
    assert again == start
    assert again.scan_shape == (2, 2)


def test_its_own_messages_are_recognised() -> None:
    assert all(looks_like(part) for part in acquisition(1))
    assert looks_like(acquisition(1)[1][15:])
    assert not any(looks_like(part) for part in (b"", b"GET / HTTP/1.1", b"\x81\xa4type", b"HTTP"))


# the control socket


def dialogue() -> Iterator[tuple[str, bytes]]:
    if not CONTROL.exists():
        pytest.skip(NO_DATA)
    for line in CONTROL.read_bytes().splitlines():
        yield chr(line[0]), line[2:]


@pytest.mark.parametrize("size", [1, 7, 43, 1000])
def test_the_recorded_dialogue(size: int) -> None:
    lines = list(dialogue())
    for way, find in (">", control.framing), ("<", control.reply_framing):
        said = [text for which, text in lines if which == way]
        data, buffer, found = b"".join(said), b"", []
        for at in range(0, len(data), size):  # as it may come over TCP
            buffer += data[at : at + size]
            result = find(memoryview(buffer))
            assert result.stray == 0
            found += [buffer[start:stop] for start, stop in result.bounds]
            buffer = buffer[result.used :]
        assert found == said
    requests = [control.parse_request(text) for way, text in lines if way == ">"]
    replies = [control.parse_reply(text) for way, text in lines if way == "<"]
    assert requests[2] == control.Request("SET", "NUMFRAMESTOACQUIRE", "8")
    assert requests[-1] == control.Request("CMD", "SOFTTRIGGER")
    assert replies[0] == control.Reply("GET", "SOFTWAREVERSION", "undef", control.OK)
    assert replies[2] == control.Reply("SET", "NUMFRAMESTOACQUIRE")
    for request, reply in zip(requests, replies, strict=True):
        assert reply.answers(request)
        assert reply.meaning == "done"
    assert not replies[0].answers(requests[1])
    assert [bytes(request) for request in requests] == [text for way, text in lines if way == ">"]
    # The simulator's replies have another length than they say: one byte more, their return code.
    assert [bytes(reply)[15:] for reply in replies] == [text[15:] for way, text in lines if way == "<"]
    assert all(framing(memoryview(bytes(reply))).bounds == [(0, len(bytes(reply)))] for reply in replies)


def test_replies_of_the_right_length() -> None:
    replies = [control.Reply("GET", "ROI", "1,2", 0), control.Reply("CMD", "ABORT", code=1), control.Reply("SET", "A")]
    data = b"".join(map(bytes, replies))
    result = control.reply_framing(memoryview(data))
    assert [control.parse_reply(data[start:stop]) for start, stop in result.bounds] == replies


def test_requests_with_a_value_too_many() -> None:
    assert control.parse_request(b"CMD,ABORT,0") == control.Request("CMD", "ABORT")
    assert control.parse_request(b"GET,ROI,0") == control.Request("GET", "ROI")


@pytest.mark.parametrize(
    ("text", "value", "meaning"),
    [
        (b"GET,FILENAME,a,b,0", "a,b", "done"),
        (b"GET,NONSENSE,0,2", "0", "not recognised"),
        (b"GET,NONSENSE,2", "", "not recognised"),
        (b"SET,HVBIAS,3\r\n", "", "out of range"),
        (b"CMD,STARTACQUISITION,1", "", "busy"),
        (b"CMD,ABORT,17", "", "return code 17"),
    ],
)
def test_replies_in_words(text: bytes, value: str, meaning: str) -> None:
    reply = control.parse_reply(message(text))
    assert (reply.value, reply.meaning) == (value, meaning)
    assert control.parse_reply(text) == reply


def test_a_value_may_hold_commas() -> None:
    request = control.Request("SET", "FILEDIRECTORY", "c:\\a,b")
    assert control.parse_request(bytes(request)) == request


@pytest.mark.parametrize("text", [b"", b"GET", b"GET,", b"PUT,A,1", b"\xff\xfe", b"SET,A", b"SET,,1"])
def test_requests_that_are_none(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        control.parse_request(message(text))


@pytest.mark.parametrize(
    "text", [b"", b"GET,A", b"GET,A,x", b"SET,A,1,0", b"CMD,A,-1", b"CMD,A,\xb2", b"CMD,A,123456789"]
)
def test_replies_that_are_none(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        control.parse_reply(message(text))


@given(text=st.binary(max_size=60))
def test_control_messages_never_raise_anything_else(text: bytes) -> None:
    for parse in (control.parse_request, control.parse_reply):
        with contextlib.suppress(ProtocolError):
            parse(text)


def test_the_largest_message_is_believed() -> None:
    data = b"MPX,%010d," % (MAX_MESSAGE_BYTES - 14)
    assert framing(memoryview(data)).used == 0
    assert framing(memoryview(b"MPX,%010d," % (MAX_MESSAGE_BYTES - 13))).stray > 0
