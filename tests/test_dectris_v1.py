"""DECTRIS Stream V1: recordings of a detector and of simulators, and whatever a stream may come to on its way."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import lz4.block
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
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
from detectors.protocols import dectris_v1
from detectors.protocols.dectris_v1 import Decoder, Encoder, looks_like
from tests.live_helpers import batch, packed, payloads_of

U1, U2, U4 = np.dtype("u1"), np.dtype("<u2"), np.dtype("<u4")
PIXELS = np.arange(24, dtype="<u2").reshape(4, 6)


# --- an independent decoder, from the description ---


def unpacked(blob: bytes, encoding: str, shape: Sequence[int], kind: str) -> np.ndarray:
    """The pixels of a blob, (y, x), by ``lz4.block`` and NumPy alone."""
    dtype = np.dtype(kind).newbyteorder(">" if encoding.endswith(">") else "<")
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if "bs" in encoding:
        blob = unshuffled(blob, nbytes, dtype.itemsize)
    elif "lz4" in encoding:
        blob = lz4.block.decompress(blob, uncompressed_size=nbytes)
    return np.frombuffer(blob, dtype).reshape(shape[1], shape[0])


def unshuffled(blob: bytes, nbytes: int, size: int) -> bytes:
    block = struct.unpack_from(">I", blob, 8)[0] or 8192
    at, out, whole = 12, [], nbytes - nbytes % (8 * size)
    for done in range(0, whole, block):
        (length,) = struct.unpack_from(">I", blob, at)
        raw = lz4.block.decompress(blob[at + 4 : at + 4 + length], uncompressed_size=min(block, whole - done))
        bits = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(size * 8, -1), axis=1, bitorder="little")
        out.append(np.packbits(bits.T, axis=1, bitorder="little").tobytes())
        at += 4 + length
    return b"".join(out) + blob[at:]


def pictures(messages: Iterable[Message], shape: tuple[int, int], dtype: np.dtype) -> list[tuple[int, np.ndarray]]:
    """Every frame as the program reads it."""
    return [
        (index, codec.decode(payload, message.encoding, shape, dtype))
        for message in messages
        if isinstance(message, FrameBlock)
        for index, payload in payloads_of([message])
    ]


def frames_sent(parts: Iterable[bytes]) -> list[tuple[int, np.ndarray]]:
    """Every frame of a sound stream, by the decoder above."""
    out, parts = [], iter(parts)
    for part in parts:
        if part.startswith(b"{") and (image := json.loads(part)).get("htype") == "dimage-1.0":
            layout = json.loads(next(parts))
            out.append((image["frame"], unpacked(next(parts), layout["encoding"], layout["shape"], layout["type"])))
    return out


def times_sent(parts: Iterable[bytes]) -> list[int]:
    return [json.loads(part)["start_time"] for part in parts if part.startswith(b"{") and b"dconfig-1.0" in part]


def assert_same_pictures(one: list[tuple[int, np.ndarray]], other: list[tuple[int, np.ndarray]]) -> None:
    assert [index for index, _ in one] == [index for index, _ in other]
    for (_, a), (_, b) in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


# --- a stream made by hand ---


def text(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def header(series: int = 7, detail: str = "basic", appendix: bytes | None = None, **config: Any) -> list[bytes]:
    parts = [text(htype="dheader-1.0", series=series, header_detail=detail)]
    if detail != "none":
        usual = {"nimages": 1, "ntrigger": 6, "x_pixels_in_detector": 6, "y_pixels_in_detector": 4}
        parts.append(text(**{**usual, **config}))
    return parts if appendix is None else [*parts, appendix]


def image(frame: int, series: int = 7, pixels: np.ndarray = PIXELS, **changes: Any) -> list[bytes]:
    """An image of raw pixels; ``changes``: other values in its dimage_d."""
    blob = changes.pop("blob", pixels.tobytes())
    layout = {"shape": list(pixels.shape[::-1]), "type": pixels.dtype.name, "encoding": "<", "size": len(blob)}
    return [
        text(htype="dimage-1.0", series=series, frame=frame, hash="0123abcd"),
        text(htype="dimage_d-1.0", **{**layout, **changes}),
        blob,
        text(htype="dconfig-1.0", start_time=1000 * frame, stop_time=1000 * frame + 900, real_time=900),
    ]


def end(series: int = 7) -> list[bytes]:
    return [text(htype="dseries_end-1.0", series=series)]


def feed(*messages: Sequence[bytes]) -> list[Message]:
    return Decoder().feed(batch(*messages))


def heard(*messages: Sequence[bytes]) -> list[Message]:
    """The same without what only announces a series."""
    return [message for message in feed(*messages) if not isinstance(message, Announced)]


def story(messages: Iterable[Message]) -> list[Any]:
    """What the messages say, however the frames were gathered into blocks."""
    out: list[Any] = []
    for message in messages:
        if isinstance(message, FrameBlock):
            times = [None] * len(message) if message.exposed_ns is None else message.exposed_ns.tolist()
            out += [
                (message.series, message.encoding, index, payload, time)
                for (index, payload), time in zip(payloads_of([message]), times, strict=True)
            ]
        elif isinstance(message, SeriesStart):
            arrays = (None if a is None else a.tolist() for a in (message.pixel_mask, message.flatfield))
            out.append((message, *arrays))
        else:
            out.append(message)
    return out


def kinds(messages: Iterable[Message]) -> list[Any]:
    """The same in short: "start", frame numbers, "end", and -n for an undecodable message of n frames.

    Without announcements, which are tested on their own.
    """
    out: list[Any] = []
    for message in messages:
        if isinstance(message, FrameBlock):
            out += message.indices.tolist()
        elif isinstance(message, Undecodable):
            out.append(f"{-message.frames}" if message.frames else "0 lost")
        elif not isinstance(message, Announced):
            out.append("start" if isinstance(message, SeriesStart) else "end")
    return out


def start_of(messages: Sequence[Message]) -> SeriesStart:
    (start,) = (message for message in messages if isinstance(message, SeriesStart))
    return start


# --- recordings ---


def eiger_parts(shared_data: Path) -> list[bytes]:
    files = sorted((shared_data / "streams/eiger_stream1_real").glob("streamData.*"))
    if not files:
        pytest.skip("the recording eiger_stream1_real is not among the shared data")
    return [file.read_bytes() for file in files]


def in_messages(parts: Sequence[bytes], header_parts: int) -> list[list[bytes]]:
    """The parts of a detector with ``header_parts`` in its header, in the messages that it sends them in."""
    out, at = [], 0
    while at < len(parts):
        length = {b"dheader": header_parts, b"dseries": 1}.get(
            next((key for key in (b"dheader", b"dseries") if key in parts[at]), b""), 4
        )
        out.append(list(parts[at : at + length]))
        at += length
    return out


@cache
def capture(path: Path) -> tuple[tuple[bytes, ...], ...]:
    if not path.is_file():
        pytest.skip(f"the recording {path.name} is not among the shared data")
    return tuple(tuple(message["parts"]) for message in msgpack.unpackb(path.read_bytes())["messages"])


def test_a_real_detector(shared_data: Path) -> None:
    parts = eiger_parts(shared_data)
    messages = in_messages(parts, 8)
    assert [len(message) for message in messages] == ([8] + [4] * 10 + [1]) * 2
    received = batch(*messages)
    decoded = Decoder().feed(received)
    assert [type(message) for message in decoded] == [Announced, SeriesStart, FrameBlock, SeriesEnd] * 2
    for number, ours, sent in ((0, decoded[:4], messages[:12]), (1, decoded[4:], messages[12:])):
        announced, start, block, last = ours
        assert isinstance(start, SeriesStart)
        assert announced == Announced(start.series)
        assert isinstance(block, FrameBlock)
        assert isinstance(last, SeriesEnd)
        series = json.loads(sent[0][0])["series"]
        assert (start.series, block.series, last.series) == (series,) * 3
        assert series == 71 or number
        assert (start.detector_shape, start.dtype, start.frames) == ((1062, 1028), U4, 10)
        assert (start.header, last.header) == (tuple(sent[0]), tuple(sent[-1]))
        assert (start.scan_shape, start.pixel_mask, start.flatfield) == (None, None, None)
        assert start.maximum_is_masked
        assert start.settings["detector"] == "Dectris EIGER2 Si 1M"
        assert start.settings["energy_kev"] == pytest.approx(8.041522436116359)
        assert (block.encoding, block.slab is received.slab) == (Encoding.LZ4, True)
        flat = list(chain.from_iterable(sent))
        assert block.exposed_ns is not None
        assert block.exposed_ns.tolist() == times_sent(flat)
        ours_decoded = pictures([block], (1062, 1028), U4)
        assert [index for index, _ in ours_decoded] == list(range(10))
        assert_same_pictures(ours_decoded, frames_sent(flat))
        if not number:
            assert np.count_nonzero(ours_decoded[0][1] == 2**32 - 1) == 39084, "gaps, as the documentation counts them"


def test_the_start_and_first_image_of_tickit_in_one_message(shared_data: Path) -> None:
    messages = capture(shared_data / "streams/tickit_legacy_basic.msgpack")
    assert [len(message) for message in messages] == [6, 4, 1]
    decoded = heard(*messages)
    start, block, last = decoded
    assert isinstance(start, SeriesStart)
    assert isinstance(block, FrameBlock)
    assert isinstance(last, SeriesEnd)
    assert (start.series, start.detector_shape, start.dtype) == (3, (4362, 4148), U2)
    assert (start.header, last.header) == (messages[0][:2], messages[2])
    assert (block.encoding, block.exposed_ns) == (Encoding.BSLZ4, None), "its times are all 0"
    assert_same_pictures(pictures(decoded, (4362, 4148), U2), frames_sent(chain.from_iterable(messages)))


def test_the_header_of_tickit_with_all_details(shared_data: Path) -> None:
    messages = capture(shared_data / "streams/tickit_legacy_all_header_only.msgpack")
    decoded = feed(*messages)
    start = start_of(decoded)
    assert kinds(decoded)[0] == "start"
    assert kinds(decoded)[-1] == "end"
    assert (start.detector_shape, start.series) == ((48, 64), 4)
    assert start.header == messages[0][:8]
    assert start.pixel_mask is not None
    assert start.pixel_mask.shape == (48, 64)
    assert start.pixel_mask.all()
    # Its flat field is zero everywhere.
    assert start.flatfield is None
    assert [m.reason for m in decoded if isinstance(m, Undecodable)] == [
        "the flat field is no flat field: it is not used"
    ]
    # An image may be of another size than the arrays.
    other = feed(messages[0][:8], image(0, 4))
    assert kinds(other) == ["start", "0 lost", "0 lost", 0]
    assert start_of(other).pixel_mask is None


def test_the_simulator_of_libertem_live(shared_data: Path) -> None:
    messages = capture(shared_data / "streams/libertem_dectris_mock.msgpack")
    assert [len(message) for message in messages] == [1, 1] + [4] * 6 + [1]
    decoded = feed(*messages)
    assert kinds(decoded) == ["start", 0, 1, 2, 3, 4, 5, "end"]
    start = start_of(decoded)
    assert (start.series, start.detector_shape, start.dtype, start.frames) == (34, (512, 512), U2, 6)
    assert start.header == (*messages[0], *messages[1])
    ours = pictures(decoded, (512, 512), U2)  # refuses a framing without its size
    assert_same_pictures(ours, frames_sent(chain.from_iterable(messages)))
    assert any(picture.any() for _, picture in ours)
    for (_, payload), sent in zip(payloads_of(decoded), messages[2:-1], strict=True):
        assert payload[12:] == sent[2][12:]
        assert payload[:12] == struct.pack(">QI", 512 * 512 * 2, 8192)


@pytest.mark.parametrize("name", ["tickit_legacy_basic", "libertem_dectris_mock"])
def test_recordings_come_out_the_same_in_any_batches(shared_data: Path, name: str) -> None:
    messages = capture(shared_data / f"streams/{name}.msgpack")
    decoder = Decoder()
    one_by_one = [out for message in messages for part in message for out in decoder.feed(batch([part]))]
    assert story(one_by_one) == story(feed(*messages))


# --- the encodings ---


@pytest.mark.parametrize(
    ("encoding", "shape", "blob", "pixels"),
    [
        (
            "bs16-lz4<",
            [3, 3],
            "00 00 00 00 00 00 00 12 00 00 20 00 00 00 00 0d 43 aa cc f0 00 01 00 50 00 00 00 00 00 08 00",
            [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
        ),
        (
            "bs16-lz4<",
            [6, 4],
            "00 00 00 00 00 00 00 30 00 00 20 00 00 00 00 0d 3f 00 01 00 01 00 15 50 00 00 00 00 00",
            [[0] * 6, [0, 0, 1, 0, 0, 0], [0] * 6, [0] * 6],
        ),
        (
            "lz4<",
            [6, 4],
            "1b 00 01 00 1b 01 10 00 07 02 00 50 00 00 00 00 00",
            [[0] * 6, [0, 0, 1, 0, 0, 0], [0] * 6, [0] * 6],
        ),
        ("<", [2, 1], "01 02 03 04", [[0x0201, 0x0403]]),
    ],
)
def test_the_documented_bytes(encoding: str, shape: list[int], blob: str, pixels: list[list[int]]) -> None:
    raw = bytes.fromhex(blob)
    (message,) = feed(image(5, blob=raw, shape=shape, encoding=encoding))
    assert isinstance(message, FrameBlock)
    ((index, picture),) = pictures([message], (shape[1], shape[0]), U2)
    assert index == 5
    assert picture.tolist() == pixels
    assert unpacked(raw, encoding, shape, "uint16").tolist() == pixels, "the tests' own decoder"


@pytest.mark.parametrize(
    ("encoding", "kind", "expected"),
    [
        ("<", "uint16", Encoding.RAW),
        (">", "uint16", Encoding.RAW_BIG_ENDIAN),
        (">", "uint8", Encoding.RAW),
        ("lz4<", "uint32", Encoding.LZ4),
        ("-lz4<", "uint32", Encoding.LZ4),
        ("bs8-lz4<", "uint8", Encoding.BSLZ4),
        ("bs16lz4<", "uint16", Encoding.BSLZ4),
        ("bs32-lz4<", "uint32", Encoding.BSLZ4),
        ("bs8-lz4>", "uint8", Encoding.BSLZ4),
    ],
)
def test_encodings(encoding: str, kind: str, expected: Encoding) -> None:
    (block,) = feed(image(0, type=kind, encoding=encoding))
    assert isinstance(block, FrameBlock)
    assert block.encoding is expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoding": "lz4>"}, "little-endian"),
        ({"encoding": "bs16-lz4>"}, "little-endian"),
        ({"encoding": "bs8-lz4<"}, "not that of uint16"),
        ({"encoding": "bs16<"}, "unknown encoding"),
        ({"encoding": "lz4"}, "unknown encoding"),
        ({"encoding": None}, "unknown encoding"),
        ({"type": "float32"}, "uint8, uint16, uint32"),
        ({"type": ["uint8"]}, "uint8, uint16, uint32"),
        ({"shape": [6]}, "'shape'"),
        ({"shape": [6, 4, 2]}, "'shape'"),
        ({"shape": [6, 0]}, "'shape'"),
        ({"shape": [6, 1e3]}, "'shape'"),
        ({"shape": [6, 10**30]}, "'shape'"),
        ({"size": -1}, "'size'"),
        ({"size": 47}, "47 bytes of pixels announced, a part of 48 came"),
        ({"size": 10**19}, "'size'"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_lost_frame(changes: dict[str, Any], reason: str) -> None:
    messages = feed(header(), image(0), image(1, **changes), image(2))
    assert kinds(messages) == ["start", 0, "-1", 2]
    (lost,) = (message for message in messages if isinstance(message, Undecodable))
    assert reason in lost.reason
    assert len(lost.reason) <= 300


def test_shape_is_width_and_height() -> None:
    messages = feed(header(), image(0, pixels=PIXELS), image(1, shape=[6, 4, 1]))
    assert start_of(messages).detector_shape == (4, 6)
    assert pictures(messages, (4, 6), U2)[1][1].tolist() == PIXELS.tolist()


def test_pixels_are_not_copied() -> None:
    received = batch(header(), *(image(i) for i in range(3)))
    *_, block = Decoder().feed(received)
    assert isinstance(block, FrameBlock)
    assert block.slab is received.slab
    assert len(block) == 3


def test_an_image_in_two_batches_outlives_the_slab_of_the_first() -> None:
    first, second = batch(header(), image(0), image(1)[:3]), batch(image(1)[3:], image(2))
    writable = replace(first, slab=first.slab.copy())
    decoder = Decoder()
    *_, block = decoder.feed(writable)
    assert payloads_of([block]) == [(0, PIXELS.tobytes())]
    writable.slab[:] = 0  # the receiver uses it again
    kept, direct = decoder.feed(second)
    assert payloads_of([kept, direct]) == [(1, PIXELS.tobytes()), (2, PIXELS.tobytes())]
    assert isinstance(direct, FrameBlock)
    assert direct.slab is second.slab


# --- headers ---


@pytest.mark.parametrize("appendix", [None, b"a scan of mine", b'{"mine": 1}', "Größe".encode()])
@pytest.mark.parametrize("detail", ["none", "basic", "all"])
def test_header_details_and_appendices(detail: str, appendix: bytes | None) -> None:
    mask = np.zeros((4, 6), "<u4")
    mask[0, 1], mask[2, 3], mask[3, 3] = 1, 16, 1 << 8  # the last one tells of a pixel that can be used
    field = np.linspace(0.5, 1.5, 24, dtype="<f4").reshape(4, 6)
    arrays = [
        *(text(htype="dflatfield-1.0", shape=[6, 4], type="float32"), field.tobytes()),
        *(text(htype="dpixelmask-1.0", shape=[6, 4], type="uint32"), mask.tobytes()),
        *(text(htype="dcountrate_table-1.0", shape=[2, 5], type="float32"), bytes(40)),
    ]
    parts = header(detail=detail) + (arrays if detail == "all" else []) + ([] if appendix is None else [appendix])
    messages = feed(parts, image(0), end())
    assert kinds(messages) == ["start", 0, "end"]
    start = start_of(messages)
    assert start.header == tuple(parts)
    assert start.frames == (None if detail == "none" else 6)
    expected = {None: None, b"a scan of mine": "a scan of mine", b'{"mine": 1}': {"mine": 1}}.get(appendix, "Größe")
    assert start.settings.get("user_data") == expected
    if detail == "all":
        assert start.pixel_mask is not None
        assert np.argwhere(~start.pixel_mask).tolist() == [[0, 1], [2, 3]]
        assert start.flatfield is not None
        assert start.flatfield.tolist() == field.tolist()
    else:
        assert start.pixel_mask is None
        assert start.flatfield is None


@pytest.mark.parametrize("appendix", [b"a note", b"", b'{"note": 3}', b"\xff\xfe", b"[1, 2]", b'{"htype": "mine"}'])
def test_appendices_of_images(appendix: bytes) -> None:
    messages = feed(header(), *([*image(i), appendix] for i in range(3)), end())
    assert kinds(messages) == ["start", 0, 1, 2, "end"]


def test_images_are_right_where_the_configuration_is_not() -> None:
    """A region is read out of a larger detector, in another depth."""
    parts = header(x_pixels_in_detector=1028, y_pixels_in_detector=1062, bit_depth_image=32)
    start = start_of(feed(parts, image(0)))
    assert (start.detector_shape, start.dtype) == ((4, 6), U2)


def test_an_image_unlike_the_first_one() -> None:
    other = image(1, pixels=PIXELS.T.copy())
    assert kinds(feed(header(), image(0), other, image(2, pixels=PIXELS.astype("u1")), image(3))) == [
        *("start", 0, "-1", "-1", 3)
    ]


def test_series_without_images() -> None:
    known = feed(header(bit_depth_image=16), end())
    assert kinds(known) == ["start", "end"]
    assert (start_of(known).detector_shape, start_of(known).dtype) == ((4, 6), U2)
    assert kinds(feed(header(detail="none"), end())) == ["end"], "nothing can be said of it"
    assert kinds(feed(header(bit_depth_image=12), end())) == ["end"]


@pytest.mark.parametrize(
    ("config", "frames"),
    [
        ({"nimages": 10, "ntrigger": 4}, 40),
        ({"nimages": 10, "ntrigger": None}, None),
        ({"nimages": 0}, None),
        ({"nimages": -2, "ntrigger": -3}, None),
        ({"nimages": 2**40, "ntrigger": 2**40}, None),
        ({"nimages": "many"}, None),
    ],
)
def test_announced_frames(config: dict[str, Any], frames: int | None) -> None:
    assert start_of(feed([header()[0], text(**config)], image(0))).frames == frames


def test_lines_of_a_scan() -> None:
    start = start_of(feed([header()[0], text(nimages=16, ntrigger=8, incident_energy=3e5)], image(0)))
    assert (start.frames, start.settings) == (128, {"frames_per_trigger": 16, "energy_kev": 300.0})


@pytest.mark.parametrize(
    ("announced", "blob", "told"),
    [
        ({"shape": [6, 4], "type": "uint32"}, bytes(95), "came with 95 bytes"),
        ({"shape": [6, 4], "type": "float32"}, bytes(96), "is no pixel mask"),
        ({"shape": [4, 6], "type": "uint32"}, bytes(96), "the shape (6, 4)"),
        ({"shape": [6, "x"], "type": "uint32"}, bytes(96), "came with 96 bytes"),
        ({"shape": [6, 4], "type": {}}, bytes(96), "came with 96 bytes"),
        ({"shape": [], "type": "undefined"}, b"", ""),
    ],
)
def test_masks_that_are_none(announced: dict[str, Any], blob: bytes, told: str) -> None:
    messages = feed([*header(detail="all"), text(htype="dpixelmask-1.0", **announced), blob], image(0))
    assert start_of(messages).pixel_mask is None
    reasons = [message.reason for message in messages if isinstance(message, Undecodable)]
    assert len(reasons) == bool(told)
    assert all(told in reason for reason in reasons)
    assert 0 in kinds(messages)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_flat_fields_that_are_none(value: float) -> None:
    field = np.full((4, 6), value, "<f4").tobytes()
    messages = feed(
        [*header(detail="all"), text(htype="dflatfield-1.0", shape=[6, 4], type="float32"), field], image(0)
    )
    assert kinds(messages) == ["start", "0 lost", 0]
    assert start_of(messages).flatfield is None


# --- what can happen to a stream ---


def test_frames_before_any_header_are_passed_on() -> None:
    """Whoever takes them can say that the start did not come."""
    assert kinds(feed(image(3), image(4), header(8), image(0, 8))) == [3, 4, "start", 0]


def test_an_aborted_series_is_followed_by_another() -> None:
    for cut in range(1, 5):
        messages = feed(header(1), image(0, 1), image(1, 1)[:cut], header(2), image(0, 2), end(2))
        expected: list[Any] = ["start", 0, *(["-1"] if cut < 3 else [1]), "start", 0, "end"]
        assert kinds(messages) == expected, cut
        assert [message.series for message in messages if isinstance(message, SeriesStart)] == [1, 2]
    for cut in range(1, 3):
        assert kinds(feed(header(1)[:cut], header(2), image(0, 2))) == ["start", 0], "it never came to an image"


def test_stale_frames_between_header_and_images() -> None:
    messages = heard(header(2), image(7, 1), image(8, 1), end(1), image(0, 2))
    assert kinds(messages) == [7, 8, "end", "start", 0]
    assert [message.series for message in messages if not isinstance(message, Undecodable)] == [1, 1, 2, 2]


def test_a_header_that_comes_again_says_the_same() -> None:
    """Publishers repeat it; the receiver tells by ``header`` that the series goes on."""
    announced, *messages = feed(header(), header(), image(0), header(), image(1))
    assert announced == Announced(7)
    assert kinds(messages) == ["start", 0, "start", 1]
    assert Announced(7) not in messages, "announced once"
    starts = [m for m in messages if isinstance(m, SeriesStart)]
    assert starts[0] == starts[1]


@pytest.mark.parametrize(("detail", "needed"), [("none", 1), ("basic", 2), ("all", 2)])
def test_a_series_is_announced_with_its_header(detail: str, needed: int) -> None:
    decoder = Decoder()
    parts = header(detail=detail)
    said = [decoder.feed(batch([part])) for part in parts]
    assert said == [[Announced(7)] if number == needed else [] for number in range(1, len(parts) + 1)]
    assert kinds(decoder.feed(batch(image(0)))) == ["start", 0]


def test_each_series_is_announced() -> None:
    one, other = header(), [header()[0], text(nimages=3)]
    assert feed(header(1), header(2)) == [Announced(1), Announced(2)]
    assert feed(one, other) == [Announced(7), Announced(7)], "begun again with another configuration"
    assert [type(m) for m in feed(one, end(), one, end(8), one)] == [Announced, SeriesEnd, Announced, SeriesEnd]
    assert feed(one[:1], header(8)) == [Announced(7), Announced(8)], "its configuration never came"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (0, [0, "-1", 2]),  # nobody knows which image that was
        (1, [0, "-1", 2]),
        (2, [0, "-1", 2]),
        (3, [0, 1, 2]),  # only its time is unknown
    ],
)
def test_lost_parts(place: int, expected: list[Any]) -> None:
    parts = image(1)
    del parts[place]
    messages = feed(header(), image(0), parts, image(2), end())
    assert kinds(messages) == ["start", *expected, "end"]
    blocks = [message for message in messages if isinstance(message, FrameBlock)]
    assert [block.exposed_ns is None for block in blocks if 1 in block.indices] == [True] * (place == 3)


@pytest.mark.parametrize(
    ("place", "expected"), [(0, [0, "-1", 1, 2]), (1, [0, "-1", 2]), (2, [0, 1, "0 lost", 2]), (3, [0, 1, "0 lost", 2])]
)
def test_doubled_parts(place: int, expected: list[Any]) -> None:
    parts = image(1)
    parts.insert(place, parts[place])
    assert kinds(feed(header(), image(0), parts, image(2), end())) == ["start", *expected, "end"]


def test_interleaved_images() -> None:
    mixed = [part for pair in zip(image(1), image(2, pixels=PIXELS + 1), strict=True) for part in pair]
    messages = feed(header(), image(0), mixed, image(3))
    assert kinds(messages) == ["start", 0, "-1", "-1", 3]


def test_lost_and_doubled_and_swapped_messages() -> None:
    assert kinds(feed(header(), image(2), image(0), image(0), image(5), end(), end())) == [
        *("start", 2, 0, 0, 5, "end", "end")
    ]


def test_strays_are_told_once_until_something_fits() -> None:
    junk = [[b"\x00\xff"], [b"{}"], [b'{"htype": 3}'], [b"{" * 50]]
    assert kinds(feed(*junk, header(), image(0), image(1)[1:], *junk, image(2), end(), *junk)) == [
        *("0 lost", "start", 0, "-1", 2, "end", "0 lost")
    ]
    lost = image(1)[1:]
    assert kinds(feed(image(0), lost, lost, lost)) == [0, "-1", "-1", "-1"], "each was an image"


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"{",
        b"\xff" * 40,
        b'{"htype":"dimage-1.0"}',
        b'{"htype":"dimage-1.0","frame":-1,"series":7}',
        b'{"htype":"dimage-1.0","frame":0,"series":"7"}',
        b'{"htype":"dimage-1.0","frame":1' + b"0" * 40 + b',"series":7}',
        b'{"htype":"dimage-1.0","frame":1' + b"0" * 9000 + b',"series":7}',
        b'{"htype":"dimage-1.0","frame":01,"series":7}',
        b'{"htype":"dheader-1.0"}',
        b'{"htype":"dheader-1.0","series":null}',
        b'{"htype":"dseries_end-1.0","series":[]}',
        b'{"htype":["dheader-1.0"]}',
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"htype":"dimage-1.0","frame":0,"series":7,}',
    ],
)
@pytest.mark.parametrize("place", range(9))
def test_nonsense_in_any_place(part: bytes, place: int) -> None:
    parts = [*header(detail="all"), text(htype="dpixelmask-1.0", shape=[6, 4], type="uint32"), bytes(96), *image(0)]
    parts.insert(place, part)
    messages = feed(parts, image(1), image(2), end())
    assert kinds(messages)[-2:] == [2, "end"]
    # Never more than what it hit: the start, and the image that it came in.
    assert 1 in kinds(messages)


def test_the_fast_way_of_reading_says_what_json_says() -> None:
    """Keys in any order, spaces, unknown keys, doubled keys."""
    variants = [
        image(3),
        [json.dumps(json.loads(p), separators=(",", ":"), sort_keys=True).encode() if p[:1] == b"{" else p
         for p in image(3)],
        [json.dumps(json.loads(p), indent=2).encode() if p[:1] == b"{" else p for p in image(3)],
        [json.dumps({**json.loads(p), "new": [1, {}]}).encode() if p[:1] == b"{" else p for p in image(3)],
        [p.replace(b'{"htype"', b'{"size": 1, "start_time": 1, "frame": 9, "htype"') if p[:1] == b"{" else p
         for p in image(3)],
    ]  # fmt: skip
    expected = story(feed(image(3)))
    assert len(expected) == 1
    for variant in variants:
        assert story(feed(variant)) == expected
        assert story(feed(variant, variant)) == expected * 2, "once it is known"


# --- any messages, any batches ---

MASK = (np.arange(24) % 5 == 0).astype("<u4").reshape(4, 6)
STREAM: list[list[bytes]] = [
    image(8, 6),
    end(6),
    [*header(7, "all"), text(htype="dpixelmask-1.0", shape=[6, 4], type="uint32"), MASK.tobytes(), b"a note"],
    image(0),
    [*image(1), b"a note"],
    image(2, blob=bytes(12) + packed(PIXELS, Encoding.BSLZ4)[12:], encoding="bs16-lz4<"),
    image(3)[:2],
    [b"garbage"],
    image(4)[:3],
    image(5, encoding=">"),
    end(),
    header(8, "none"),
    image(0, 8, PIXELS.astype("u1")),
    end(8),
]  # fmt: skip
WHOLE = [part for message in STREAM for part in message]


def cut(parts: Sequence[bytes], places: Iterable[int]) -> list[list[bytes]]:
    bounds = [0, *sorted(set(places)), len(parts)]
    return [list(parts[a:b]) for a, b in pairwise(bounds) if a < b]


def test_the_whole_stream() -> None:
    assert kinds(feed(*STREAM)) == [
        *(8, "end", "start", 0, 1, 2, "-1", 4, 5, "end", "start", 0, "end")
    ]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sets(st.integers(1, len(WHOLE) - 1), max_size=len(WHOLE)),
    st.sets(st.integers(1, len(WHOLE) - 1), max_size=12),
)
def test_every_splitting_says_the_same(messages: set[int], batches: set[int]) -> None:
    decoder, out = Decoder(), []
    for group in cut(WHOLE, batches):
        received = batch(*cut(group, [place for place in messages if place < len(group)]))
        received = replace(received, slab=received.slab.copy())
        out += story(decoder.feed(received))
        received.slab[:] = 0xA5  # what is still needed was copied
    assert out == story(feed(*STREAM))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nothing_raises_and_a_new_header_mends_it(data: st.DataObject) -> None:
    parts = list(WHOLE)
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(parts) - 1))
        action = data.draw(st.sampled_from(["lose", "double", "cut", "flip", "swap", "junk"]))
        if action == "lose" and len(parts) > 1:
            del parts[place]
        elif action == "double":
            parts.insert(data.draw(st.integers(0, len(parts))), parts[place])
        elif action == "cut":
            parts[place] = parts[place][: data.draw(st.integers(0, len(parts[place])))]
        elif action == "flip" and parts[place]:
            at = data.draw(st.integers(0, len(parts[place]) - 1))
            parts[place] = parts[place][:at] + bytes([data.draw(st.integers(0, 255))]) + parts[place][at + 1 :]
        elif action == "swap":
            other = data.draw(st.integers(0, len(parts) - 1))
            parts[place], parts[other] = parts[other], parts[place]
        else:
            parts.insert(place, data.draw(st.binary(max_size=60)))
    decoder = Decoder()
    for group in cut(parts, data.draw(st.sets(st.integers(1, max(1, len(parts) - 1)), max_size=4))):
        for message in decoder.feed(batch(group)):
            if isinstance(message, FrameBlock):
                assert (message.offsets >= 0).all()
                assert (message.offsets + message.sizes <= len(message.slab)).all()
                assert len(message.indices) == len(message.sizes) == len(message.offsets)
    assert kinds(decoder.feed(batch(header(9), image(0, 9), image(1, 9), end(9))))[-4:] == [*("start", 0, 1, "end")]


def test_empty_batches() -> None:
    assert feed() == []
    assert feed([b""]) == feed([b""])
    decoder = Decoder()
    decoder.feed(batch(header(), image(0)[:3]))
    assert decoder.feed(batch()) == []
    assert kinds(decoder.feed(batch(image(0)[3:]))) == ["start", 0]


def test_endless_headers_are_not_kept() -> None:
    decoder = Decoder()
    pair = [text(htype="dsomething-1.0", shape=[], type="undefined"), b""]
    messages = decoder.feed(batch(header(), *[pair] * 200, image(0)))
    assert len(start_of(messages).header) <= 16


# --- our own simulator ---

KNOWN = {"energy_kev": 200.0, "semiangle_mrad": 21.5, "aberrations": {"C10": -5.0}, "count_time_s": 1e-5}
START = SeriesStart(5, (4, 6), U2, (3, 4), 12, KNOWN, maximum_is_masked=True)


@pytest.mark.parametrize("dtype", [U1, U2, U4])
@pytest.mark.parametrize("encoding", dectris_v1.ENCODINGS.values())
@pytest.mark.parametrize("timed", [False, True])
def test_frames_come_back_as_they_went(dtype: np.dtype, encoding: Encoding, timed: bool) -> None:
    frames = np.random.default_rng(0).poisson(0.4, (5, 7, 33)).astype(dtype)
    payloads = [memoryview(packed(frame, encoding)) for frame in frames]
    times = [0, 10, 20, 30, 2**60] if timed else None
    encoder = Encoder()
    start = replace(START, detector_shape=(7, 33), dtype=dtype)
    sent = [*encoder.start(start), *encoder.frames(5, 4, payloads, encoding, exposed_ns=times), *encoder.end(5)]
    messages = heard(*sent)  # type: ignore[arg-type]
    assert kinds(messages) == ["start", 4, 5, 6, 7, 8, "end"]
    block = messages[1]
    assert isinstance(block, FrameBlock)
    assert (block.series, block.encoding) == (5, encoding)
    assert payloads_of(messages) == list(enumerate(map(bytes, payloads), 4))
    assert (None if block.exposed_ns is None else block.exposed_ns.tolist()) == times
    for (_, picture), (_, ours), frame in zip(
        frames_sent(bytes(part) for message in sent for part in message),
        pictures(messages, (7, 33), dtype),
        frames,
        strict=True,
    ):
        np.testing.assert_array_equal(picture, frame)
        np.testing.assert_array_equal(ours, frame)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("scan_shape", "frames"), [(None, None), ((3, 4), 12)])
def test_a_start_comes_back(masked: bool, flat: bool, scan_shape: tuple[int, int] | None, frames: int | None) -> None:
    start = replace(
        START,
        scan_shape=scan_shape,
        frames=frames,
        pixel_mask=PIXELS % 7 != 0 if masked else None,
        flatfield=(1 + PIXELS / 100).astype(np.float32) if flat else None,
    )
    encoder = Encoder()
    (sent,) = encoder.start(start)
    assert json.loads(sent[0]) == {
        **{"htype": "dheader-1.0", "series": 5},
        "header_detail": "all" if masked or flat else "basic",
    }
    back = start_of(feed(sent, *encoder.frames(5, 0, [PIXELS.tobytes()], Encoding.RAW)))  # type: ignore[arg-type]
    assert back.header == tuple(sent)
    assert (back.series, back.detector_shape, back.dtype) == (5, (4, 6), U2)
    assert (back.scan_shape, back.frames) == (scan_shape, frames)
    assert {key: back.settings.get(key) for key in KNOWN} == KNOWN
    assert "scan_shape" not in back.settings
    assert "user_data" not in back.settings
    for mine, theirs in ((start.pixel_mask, back.pixel_mask), (start.flatfield, back.flatfield)):
        assert (mine is None) == (theirs is None)
        assert mine is None or theirs is None or mine.tolist() == theirs.tolist()


def test_the_configuration_is_a_detectors_own(shared_data: Path) -> None:
    """Every key that a real one sends, and each of the same kind of value."""
    real = json.loads(eiger_parts(shared_data)[1])
    ours = json.loads(bytes(Encoder().start(replace(START, settings={**KNOWN, "frames_per_trigger": 4}))[0][1]))
    assert {key for key in real if key not in ours} == {"compression"}, "each image says its own"
    for key in ours:
        assert key in real
        assert isinstance(ours[key], int | float) == isinstance(real[key], int | float), key
    assert (ours["nimages"], ours["ntrigger"], ours["photon_energy"]) == (4, 3, 2e5)
    assert (ours["x_pixels_in_detector"], ours["y_pixels_in_detector"], ours["bit_depth_image"]) == (6, 4, 16)
    assert list(ours) == sorted(ours)


def test_the_messages_are_a_detectors_own(shared_data: Path) -> None:
    """The same keys in the same order of parts as the recording."""
    real = in_messages(eiger_parts(shared_data), 8)
    encoder = Encoder()
    start = replace(START, detector_shape=(1062, 1028), dtype=U4, pixel_mask=np.ones((1062, 1028), bool))
    ours = [*encoder.start(start), *encoder.frames(5, 0, [bytes(9)], Encoding.LZ4, exposed_ns=[3]), *encoder.end(5)]
    for sent, recorded in ((ours[0][:8], real[0]), (ours[1], real[1]), (ours[2], real[11])):
        assert len(sent) == len(recorded)
        for one, other in zip(sent, recorded, strict=True):
            if other.startswith(b"{") and b"htype" in other:
                assert list(json.loads(bytes(one))) == list(json.loads(other))
                assert json.loads(bytes(one))["htype"] == json.loads(other)["htype"]
    layout = json.loads(bytes(ours[1][1]))
    assert (layout["shape"], layout["encoding"], layout["size"]) == ([1028, 1062], "lz4<", 9)


def test_a_text_as_series_becomes_a_number() -> None:
    encoder = Encoder()
    sent = [*encoder.start(replace(START, series="scan")), *encoder.frames("scan", 0, [bytes(48)], Encoding.RAW)]
    messages = feed(*sent, *encoder.end("scan"))  # type: ignore[arg-type]
    numbers = {message.series for message in messages if not isinstance(message, Undecodable)}
    assert len(numbers) == 1
    assert isinstance(numbers.pop(), int)


def test_what_it_cannot_send_is_said() -> None:
    encoder = Encoder()
    with pytest.raises(ConfigurationError, match="start"):
        encoder.frames(1, 0, [b""], Encoding.RAW)
    with pytest.raises(ConfigurationError, match="float32"):
        encoder.start(replace(START, dtype=np.dtype("<f4")))
    with pytest.raises(ConfigurationError, match="one channel"):
        encoder.start(replace(START, channels=("low", "high")))
    encoder.start(START)
    with pytest.raises(ConfigurationError, match="one channel"):
        encoder.frames(1, 0, [b""], Encoding.RAW, others=[(Encoding.RAW, [b""])])
    with pytest.raises(ConfigurationError, match="MERLIN"):
        encoder.frames(1, 0, [b""], Encoding.MERLIN_12BIT)


@pytest.mark.parametrize(
    "ours",
    [
        {"scan_shape": [0, 4]},
        {"scan_shape": [2, 2, 2]},
        {"scan_shape": "2x2"},
        {"scan_shape": [True, 2]},
        {"scan_shape": [1e9, 2]},
    ],
)
def test_a_scan_shape_that_is_none(ours: dict[str, Any]) -> None:
    start = start_of(feed(header(appendix=text(liveptycho={**ours, "energy_kev": 80.0})), image(0)))
    assert start.scan_shape is None
    assert start.settings["energy_kev"] == 80.0


def test_text_that_nobody_can_print_is_not_taken_for_settings() -> None:
    start = start_of(feed(header(appendix=b'{"liveptycho": {"method": "\\ud800"}}'), image(0)))
    assert "method" not in start.settings


def test_looks_like() -> None:
    for part in (header()[0], image(0)[0], end()[0], b' {"htype": "dconfig-1.0"}'):
        assert looks_like(part)
    for part in (b"", b"{", b"\xa1ahtype", b"[1]", b'{"htype": 1}', b'{"htype": "x"}', b'{"type": "d"}', b"\x00" * 99):
        assert not looks_like(part)
    assert not looks_like(b"{" + b" " * (2 << 20))


def test_blocks_of_a_batch_are_few() -> None:
    """One block for all images of a batch, whatever their number."""
    messages = [header(), *(image(i) for i in range(500)), end()]
    sizes = [len(message) for message in feed(*messages) if isinstance(message, FrameBlock)]
    assert sizes == [500]


def test_arrival_is_that_of_the_batch() -> None:
    received = ReceivedBatch.from_messages([image(0)], time_ns=123)
    (block,) = Decoder().feed(received)
    assert isinstance(block, FrameBlock)
    assert block.time_ns == 123
