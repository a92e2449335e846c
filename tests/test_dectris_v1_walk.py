"""The compiled walk over Stream V1 says what ``json`` and the decoder's states say, of any parts in any batches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.messages import Encoding, FrameBlock, Message
from detectors.protocols import dectris_v1_walk
from detectors.protocols.dectris_v1 import Decoder
from tests.live_helpers import batch, packed, payloads_of

PIXELS = np.arange(24, dtype="<u2").reshape(4, 6)
FRAMED = packed(PIXELS, Encoding.BSLZ4)
#: Payloads by the encoding that they are sent with.
BLOBS = {"<": PIXELS.tobytes(), ">": PIXELS.astype(">u2").tobytes(), "bs16-lz4<": FRAMED, "lz4<": FRAMED[16:]}
UNFRAMED = bytes(12) + FRAMED[12:]


def text(values: Any, **options: Any) -> bytes:
    return json.dumps(values, **options).encode()


def image(frame: int, series: int = 7, encoding: str = "<", blob: bytes | None = None, **changes: Any) -> list[bytes]:
    """An image of a detector; ``changes``: of any of its parts' values."""
    blob = BLOBS[encoding] if blob is None else blob
    parts = (
        {"frame": frame, "hash": "01ab", "htype": "dimage-1.0", "series": series},
        {"encoding": encoding, "htype": "dimage_d-1.0", "shape": [6, 4], "size": len(blob), "type": "uint16"},
        {"htype": "dconfig-1.0", "real_time": 9, "start_time": 10 * frame + 1, "stop_time": 10 * frame + 9},
    )
    for part in parts:
        part.update({key: value for key, value in changes.items() if key in part})
    first, layout, times = (text(part) for part in parts)
    return [first, layout, blob, times]


def header(series: int = 7, detail: str = "basic") -> list[bytes]:
    parts = [text({"htype": "dheader-1.0", "series": series, "header_detail": detail})]
    if detail != "none":
        parts.append(text({"nimages": 9, "x_pixels_in_detector": 6, "y_pixels_in_detector": 4, "bit_depth_image": 16}))
    if detail == "all":
        parts += [text({"htype": "dpixelmask-1.0", "shape": [6, 4], "type": "uint32"}), bytes(96)]
    return parts


def end(series: int = 7) -> list[bytes]:
    return [text({"htype": "dseries_end-1.0", "series": series})]


def found(parts: Sequence[bytes]) -> list[int]:
    """The parts at which the walk finds images."""
    received = batch(parts)
    return dectris_v1_walk.walk(received.slab, received.offsets, received.lengths)["part"].tolist()


def blind(slab: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """A walk that finds nothing, so that all goes part by part, through ``json``."""
    return np.empty(0, dectris_v1_walk.IMAGE)


def told(messages: Sequence[Message]) -> list[Any]:
    """Every field of every message, with the types of what is in them."""
    return [
        (type(message), *((f.name, plain(getattr(message, f.name))) for f in fields(message))) for message in messages
    ]


def plain(value: Any) -> Any:
    return (value.dtype, value.tolist()) if isinstance(value, np.ndarray) else (type(value), repr(value))


def both(*batches: Sequence[bytes]) -> list[Message]:
    """Decode parts, in some batches, in both ways."""
    quick, slow = Decoder(), Decoder()
    messages: list[Message] = []
    for parts in batches:
        received = batch(parts)
        ours = quick.feed(received)
        with patch.object(dectris_v1_walk, "walk", blind):
            assert told(ours) == told(slow.feed(received))
        messages += ours
    return messages


def series_of(messages: Sequence[Message]) -> list[Any]:
    """Frames by block, and the other messages' names."""
    return [m.indices.tolist() if isinstance(m, FrameBlock) else type(m).__name__ for m in messages]


def written(part: bytes, random: Random) -> bytes:
    """A JSON object again: its keys in another order, spaced otherwise, with more keys beside them."""
    values = list(json.loads(part).items())
    values = [(key, value) for key, value in values if random.random() < 0.1] + random.sample(values, len(values))
    for _ in range(random.choice([0, 0, 1])):
        more = random.choice([0, 12, "text", "", [1, 2], [3], [0, 0, 10**6]])
        values.insert(random.randint(0, len(values)), (random.choice(["new", "", "Frame"]), more))

    def space() -> str:
        return random.choice(["", "", "", " ", "\n  ", "\t\r "])

    members = ",".join(
        f"{space()}{json.dumps(key)}{space()}:{space()}{json.dumps(value, indent=random.choice([None, 1]))}{space()}"
        for key, value in values
    )
    return f"{space()}{{{members}}}{space()}".encode()


@st.composite
def sound(draw: st.DrawFn) -> list[bytes]:
    """An image as a detector or a simulator may well send it, perhaps with an appendix."""
    random = Random(draw(st.integers(0, 2**32)))
    encoding = draw(st.sampled_from([*BLOBS]))
    parts = image(
        draw(st.sampled_from([0, 1, 2, 10, 2**53, 99])),
        draw(st.sampled_from([7, 7, 7, 8, 0, 10**18 - 1])),
        encoding,
        draw(st.sampled_from([None, UNFRAMED])) if encoding.startswith("bs") else None,
        **draw(st.sampled_from([{}, {}, {"start_time": 0}, {"start_time": 0, "stop_time": 0}, {"shape": [6, 4, 1]}])),
    )
    if draw(st.booleans()):
        parts = [part if i == 2 else written(part, random) for i, part in enumerate(parts)]
    return parts + draw(st.sampled_from([[], [], [], [b"a note"], [b'{"temperature": 3}'], [b""], [b"{ no json"]]))


@settings(max_examples=200, deadline=None)
@given(st.lists(sound(), min_size=1, max_size=6), st.booleans())
def test_sound_images_are_found_and_as_json_reads_them(images: list[list[bytes]], announced: bool) -> None:
    before = header() if announced else []
    parts = [*before, *(part for each in images for part in each)]
    places = np.cumsum([len(before), *(len(each) for each in images)])[:-1].tolist()
    assert found(parts) == places
    blocks = [message for message in both(parts) if isinstance(message, FrameBlock)]
    assert [index for index, _ in payloads_of(blocks)] == [json.loads(parts[place])["frame"] for place in places]


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, -1, 0, 1, 1.0, 1e300, 2**53 + 1, 10**18, 10**40, "", "7", "uint16", "uint8", "<", "bs32-lz4<"),
        *("é", '"', "\\", "\x7f", "dimage-1.0", "dimage_d-1.0", "dconfig-1.0", "dseries_end-1.0", {}, {"htype": 1}, []),
        *([6], [6, 4], [6, 4, 2], [6, 4, 1, 1], [0, 4], [6.0, 4], [2**20, 4], [2**70, 1], ["6", "4"], [[6], 4], [8, 3]),
    ]
)


@st.composite
def damaged(draw: st.DrawFn) -> list[bytes]:
    """An image with something in it that is otherwise, or not where it belongs."""
    parts = draw(sound())
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(parts) - 1))
        part, data = parts[place], bytearray(parts[place])
        at = draw(st.integers(0, len(data)))
        action = draw(st.sampled_from(["value", "key", "byte", "flip", "cut", "insert", "lose", "double", "swap"]))
        if action in ("value", "key"):
            try:
                values = json.loads(part)
                key = draw(st.sampled_from(sorted(values)))
            except (ValueError, TypeError, IndexError):
                continue
            if action == "key":
                values[draw(st.sampled_from(["new", "htype", "é", 'a"b', "series"]))] = values.pop(key)
            else:
                values[key] = draw(ODD)
            parts[place] = text(values, ensure_ascii=draw(st.booleans()))
        elif action == "byte" and at < len(data):
            data[at] = draw(st.sampled_from(b'{}[]":,\\ 0123456789-+.eE\x00\x1f\x7f\x80\xc3'))
        elif action == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del data[at:]
        elif action == "insert":
            data[at:at] = draw(st.sampled_from([b" ", b",", b"0", b"\\", b'"', b"{}", b"\xef\xbb\xbf", b'"frame":3,']))
        elif action == "lose":
            del parts[place]
        elif action == "double":
            parts.insert(place, part)
        elif action == "swap":
            parts[place], parts[0] = parts[0], parts[place]
        if action in ("byte", "flip", "cut", "insert"):
            parts[place] = bytes(data)
        if not parts:
            break
    return parts


OTHERS = st.sampled_from(
    [
        *(header(), header(8), header(7, "all"), header(7, "none"), header(7, "all")[:3], header()[:1], end(), end(8)),
        *([b"junk"], [b""], [b"{}"], [b'{"htype": "dconfig-1.0"}'], [b'{"htype": ["x"]}']),
        *([b'{"\\u0068type": "dnew"}'], image(3)[:1], image(3)[:2], image(3)[:3], image(3)[1:], image(3)[3:]),
    ]
)


@settings(max_examples=600, deadline=None)
@given(st.lists(sound() | damaged() | OTHERS, max_size=8), st.sets(st.integers(0, 40), max_size=3))
def test_any_parts_are_as_json_reads_them(messages: list[list[bytes]], cuts: set[int]) -> None:
    parts = [part for message in messages for part in message]
    bounds = [0, *sorted(cut for cut in cuts if cut < len(parts)), len(parts)]
    both(*(parts[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)))


@pytest.mark.parametrize(
    "number", ["0", "5", "00", "05", "-0", "-5", "+5", "5.0", "5e0", "5E0", "0x5", " 5 ", "5 5", "", "true", "1_0"]
)
@pytest.mark.parametrize("place", range(3))
def test_numbers(number: str, place: int) -> None:
    parts = image(5)
    at, key = ((0, "frame"), (1, "size"), (3, "start_time"))[place]
    value = json.loads(parts[at])[key]
    parts[at] = parts[at].replace(f'"{key}": {value}'.encode(), f'"{key}": {number}'.encode())
    assert number.encode() in parts[at]
    both([*header(), *parts, *image(6)])


@pytest.mark.parametrize(
    "inside",
    [b"\\n", b"\\q", b'\\"', b'"', b"\\u0061", b"\t", b"\x00", b"\x1f", b"\x7f", b"\x80", "é".encode(), b"{}[]:,"],
)
@pytest.mark.parametrize("place", [b"dimage-1.0", b"01ab", b"hash", b"dimage_d-1.0", b"uint16", b"dconfig-1.0"])
def test_texts(inside: bytes, place: bytes) -> None:
    both([*header(), *(part.replace(place, place[:2] + inside + place[2:]) for part in image(5)), *image(6)])


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("behind", [b" ", b"x", b"{}", b"}", b",", b'"frame": 3}', b', "frame": 3}', b"\x00"])
def test_what_is_behind_an_object(behind: bytes, place: int) -> None:
    parts = image(5)
    parts[place] += behind
    assert found(parts) == [0] * (behind == b" ")
    both([*header(), *parts, *image(6)])


@pytest.mark.parametrize(("frame", "known"), [(2**53, True), (2**53 + 1, False)])
def test_no_larger_number_of_a_frame(frame: int, known: bool) -> None:
    assert found(image(frame)) == [0] * known
    both(image(frame), image(1))


@pytest.mark.parametrize(("digits", "known"), [(17, True), (18, True), (19, False), (25, False), (5000, False)])
def test_only_numbers_that_fit_are_read(digits: int, known: bool) -> None:
    parts = [part.replace(b'"series": 7', b'"series": ' + b"9" * digits) for part in image(0)]
    assert found(parts) == [0] * known
    both(parts, image(1))


@pytest.mark.parametrize(
    "appendix",
    [
        *(b"", b"x", b"a note", b"{", b"{}", b"[1]", b"{ no json", b'{"a": 1}', b'{"htype": "other"}', b'{"type": 1}'),
        *(b'{"\\u0068type": "dimage-1.0"}', b'{"htyp', b'{"htype"', b'{"htype": "dconfig-1.0"}', b"\xff\xfe", b" " * 9),
        *(b"{" * (1 << 20), b"{" * ((1 << 20) + 1), *end(8), *header(8)[:1], image(9)[0], image(9)[1]),
    ],
)
def test_what_may_follow_an_image(appendix: bytes) -> None:
    parts = [*header(), *image(0), appendix, *image(1), b"a note", *image(2), appendix, appendix, *image(3), appendix]
    both(parts, [b"a note", *image(4)])


def test_images_of_a_run_are_one_block() -> None:
    run = [part for i in range(4) for part in image(i)]
    odd = image(4, hash="ä")  # sound, and none that the walk knows
    odd[0] = text(json.loads(odd[0]), ensure_ascii=False)
    parts = [*header(), *run, *odd, *image(5), b"a note", *image(6, 8), *image(7, 8, "bs16-lz4<"), *image(8, 8)]
    assert found(parts) == [2, 6, 10, 14, 22, 27, 31, 35]
    assert series_of(both(parts)) == ["Announced", "SeriesStart", [0, 1, 2, 3, 4, 5], [6], [7], [8]]


def test_images_unlike_the_series_are_told_one_by_one() -> None:
    small = {"shape": [3, 2], "blob": bytes(12)}
    parts = [*header(), *image(0), *image(1, **small), *image(2, **small), *image(3)]
    assert found(parts) == [2, 6, 10, 14]
    assert series_of(both(parts)) == ["Announced", "SeriesStart", [0], "Undecodable", "Undecodable", [3]]


def test_images_behind_one_that_is_cut() -> None:
    parts = [*header(), *image(0)[:3], *image(1), *image(2), *image(3)[:1], *image(4), *image(5)]
    assert series_of(both(parts)) == ["Announced", "SeriesStart", [0, 1, 2], "Undecodable", [4, 5]]
    whole = image(9)
    assert series_of(both([*header(), *whole[:3]], [whole[3], *image(10), *image(11)])) == [
        *("Announced", "SeriesStart", [9], [10, 11])
    ]


def test_framing_that_a_simulator_left_empty_is_filled_in() -> None:
    parts = [part for i in range(3) for part in image(i, 7, "bs16-lz4<", UNFRAMED)]
    assert found(parts) == [0, 4, 8]
    assert payloads_of(both(parts)) == [(i, FRAMED) for i in range(3)]
    zeros = image(0, blob=bytes(48))
    assert payloads_of(both(zeros)) == [(0, bytes(48))], "raw pixels may well be 0"


def test_times_are_all_there_or_none() -> None:
    timed, zeros = [*image(0), *image(1)], image(2, start_time=0, stop_time=0)
    (block,) = both(timed)
    assert isinstance(block, FrameBlock)
    assert block.exposed_ns is not None
    assert block.exposed_ns.tolist() == [1, 11]
    for parts in ([*timed, *zeros], zeros):
        (block,) = both(parts)
        assert isinstance(block, FrameBlock)
        assert block.exposed_ns is None


def test_not_a_byte_beyond_a_part_is_read() -> None:
    """Parts cut anywhere, right in front of memory that cannot be read."""
    script = """
import ctypes, json, mmap, sys
import numpy as np
from detectors.protocols import dectris_v1_walk
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 3 * page)
base = np.frombuffer(memory, np.uint8)
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base.ctypes.data + 2 * page), page, 0) == 0
for parts in json.loads(sys.stdin.read()):
    parts = [bytes.fromhex(part) for part in parts]
    joined = b"".join(parts)
    base[: len(joined)] = np.frombuffer(joined, np.uint8)
    sizes = np.array([len(part) for part in parts])
    starts = np.cumsum(sizes) - sizes
    for place, part in enumerate(parts):
        for length in range(len(part) + 1):
            base[2 * page - length : 2 * page] = np.frombuffer(part[:length], np.uint8)
            offsets, lengths = starts.copy(), sizes.copy()
            offsets[place], lengths[place] = 2 * page - length, length
            images = dectris_v1_walk.walk(base[: 2 * page], offsets, lengths)
            assert len(images) == (length == len(part) or place == 4), (place, length)
print("all read")
"""
    random = Random(1)
    images = [image(1), image(2, 7, "bs16-lz4<", UNFRAMED), [*image(3), b'{"a h'], image(4)]
    images[3] = [part if i == 2 else written(part, random).strip() for i, part in enumerate(images[3])]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([[part.hex() for part in parts] for parts in images]),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (0, "all read\n"), done.stderr
