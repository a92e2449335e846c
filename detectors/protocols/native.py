"""The native stream protocol, byte for byte as docs/protocol.md describes it.

    start    1 part   msgpack map {"type": "start", "series", "detector_shape", "dtype", ...}
    frames   2 parts  msgpack map {"type": "frames", "series", "first", "count", "encoding", "sizes"}, then the payloads
    end      1 part   msgpack map {"type": "end", "series"}

The payload is a part of its own so that neither side ever copies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import msgpack
import numpy as np

from detectors.errors import ProtocolError
from detectors.messages import (
    Encoding,
    Message,
    OutgoingMessage,
    ReceivedBatch,
    SeriesEnd,
    SeriesId,
    SeriesStart,
    Undecodable,
)
from detectors.protocols import msgpack_walk
from detectors.protocols.gathering import Gathering
from detectors.protocols.msgpack_walk import LARGEST_INDEX, MAX_FRAMES_PER_MESSAGE, MAX_HEADER_BYTES

_T = TypeVar("_T")

NAME = "native"
SUMMARY = "msgpack over ZeroMQ, docs/protocol.md"
PORT = 31000
VERSION = 1

#: Pixel types on the wire, all little-endian.
DTYPES = {
    name: np.dtype(f"<{code}")
    for name, code in {"uint8": "u1", "uint16": "u2", "uint32": "u4", "float32": "f4"}.items()
}
ENCODINGS = {"bslz4": Encoding.BSLZ4, "lz4": Encoding.LZ4, "raw": Encoding.RAW}

_NAMES = {encoding: name for name, encoding in ENCODINGS.items()}

_START_KEYS = {
    "type",
    "version",
    "series",
    "detector_shape",
    "dtype",
    "scan_shape",
    "frames",
    "pixel_mask",
    "maximum_is_masked",
}


class Decoder:
    """Sans-IO decoder: see ``detectors.messages.StreamDecoder``. It keeps no state between batches.

    Frames are read by the compiled walk. What that does not know, or finds wrong, is read here, message by message.
    """

    def __init__(self) -> None:
        msgpack_walk.prepare()

    def feed(self, batch: ReceivedBatch) -> list[Message]:
        gathering = Gathering(batch)
        messages, frames = msgpack_walk.walk(batch.slab, batch.offsets, batch.lengths, batch.last)
        heads = np.flatnonzero(messages["same"] == 0)
        # As plain tuples: a field of a NumPy record costs ten times as much to take out.
        runs = messages[heads].tolist()
        rows = [*messages["row"][heads].tolist(), len(frames.indices)]
        for run, (row, end) in zip(runs, pairwise(rows), strict=True):
            what, _, part, stop, _, series, text_at, text_size, encoding, *_ = run
            if what == msgpack_walk.FRAMES:
                gathering.extend(
                    _series_name(batch.slab, series, text_at, text_size),
                    Encoding(encoding),
                    frames.indices[row:end],
                    frames.offsets[row:end],
                    frames.sizes[row:end],
                )
            else:
                _read(batch, range(part, stop), gathering)
        gathering.close()
        return gathering.messages


def _series_name(slab: np.ndarray, number: int, text_at: int, text_size: int) -> SeriesId:
    """The series of ``msgpack_walk.MESSAGE``."""
    if text_size >= 0:
        return slab[text_at : text_at + text_size].tobytes().decode()
    return number if text_size == -1 else number + 2**64


def _read(batch: ReceivedBatch, parts: range, found: Gathering) -> None:
    """Any message, by way of ``msgpack``."""
    header: Mapping[str, Any] = {}
    try:
        header = _unpack(batch.part(parts[0]))
        kind = header["type"]
        if kind == "frames":
            _frames(header, parts, batch, found)
            return
        if len(parts) != 1:
            raise ProtocolError(f"a {kind!r} message has 1 part, this one has {len(parts)}")
        if kind == "start":
            found.say(_start(header, bytes(batch.part(parts[0]))))
        elif kind == "end":
            found.say(SeriesEnd(_series(header), (bytes(batch.part(parts[0])),)))
        else:
            raise ProtocolError(f"unknown message type {kind!r}; known are start, frames, end")
    except ProtocolError as error:
        found.say(Undecodable(_brief(str(error)), _claimed_frames(header)))


def _claimed_frames(header: Mapping[str, Any]) -> int:
    """How many frames are lost with a message that cannot be read."""
    count = header.get("count")
    return count if type(count) is int and 1 <= count <= MAX_FRAMES_PER_MESSAGE else 1


def _brief(reason: str) -> str:
    """A reason repeats what came, which may be anything; it goes into snapshots and logs."""
    return reason if len(reason) <= 300 else f"{reason[:200]} ... {reason[-80:]}"


def _frames(header: Mapping[str, Any], parts: range, batch: ReceivedBatch, found: Gathering) -> None:
    if len(parts) != 2:
        raise ProtocolError(f"a 'frames' message has 2 parts (header, payload), this one has {len(parts)}")
    first = _integer(header, "first", 0, LARGEST_INDEX)
    count = _integer(header, "count", 1, MAX_FRAMES_PER_MESSAGE)
    encoding = _choice(header, "encoding", ENCODINGS)
    sizes = np.array(_sizes(header, count, int(batch.lengths[parts[1]])), np.int64)
    offsets = batch.offsets[parts[1]] + np.cumsum(sizes) - sizes
    found.extend(_series(header), encoding, np.arange(first, first + count), offsets, sizes)


def _unpack(part: memoryview) -> Mapping[str, Any]:
    if part.nbytes > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {part.nbytes} bytes; the payload belongs into a second part")
    try:
        header = msgpack.unpackb(part, raw=False)
    except Exception as error:  # msgpack raises half a dozen unrelated types on malformed input
        raise ProtocolError(f"a message of {part.nbytes} bytes does not start with a msgpack map ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get("type"), str):
        raise ProtocolError("a message's first part must be a msgpack map with a 'type'")
    return header


def _integer(header: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = header.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"{key!r} must be an integer from {low} to {high}, got {value!r}")
    return value


def _choice(header: Mapping[str, Any], key: str, choices: Mapping[str, _T]) -> _T:
    name = header.get(key)
    if not isinstance(name, str) or name not in choices:
        raise ProtocolError(f"unknown {key} {name!r}; known are {', '.join(choices)}")
    return choices[name]


def _series(header: Mapping[str, Any]) -> SeriesId:
    series = header.get("series")
    if type(series) not in (int, str):
        raise ProtocolError(f"'series' must be an integer or a text, got {series!r}")
    return series  # type: ignore[return-value]


def _shape(header: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    value = header.get(key)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and 1 <= n <= 65536 for n in value)):
        raise ProtocolError(f"{key!r} must be [rows, columns], each from 1 to 65536, got {value!r}")
    return value[0], value[1]


def _sizes(header: Mapping[str, Any], count: int, length: int) -> list[int]:
    """Bytes of each frame's payload; without 'sizes' they are all equal."""
    sizes = header.get("sizes")
    if sizes is None:
        if length % count or (length == 0 and count > 1):  # a few bytes must not stand for thousands of frames
            raise ProtocolError(f"a payload of {length} bytes is not {count} equal frames; give their 'sizes'")
        return [length // count] * count
    if not (isinstance(sizes, list) and len(sizes) == count and all(type(n) is int and n >= 0 for n in sizes)):
        raise ProtocolError(f"'sizes' must be a list of {count} numbers of bytes")
    if sum(sizes) != length:
        raise ProtocolError(f"'sizes' add up to {sum(sizes)} bytes, the payload has {length}")
    return sizes


def _start(header: Mapping[str, Any], raw: bytes) -> SeriesStart:
    version = header.get("version", VERSION)
    if version != VERSION:
        raise ProtocolError(f"protocol version {version!r}; this program speaks version {VERSION}")
    detector_shape = _shape(header, "detector_shape")
    if detector_shape is None:
        raise ProtocolError("a start message needs 'detector_shape' as [rows, columns]")
    dtype = _choice(header, "dtype", DTYPES)
    frames = None if header.get("frames") is None else _integer(header, "frames", 1, LARGEST_INDEX)
    settings = {key: value for key, value in header.items() if key not in _START_KEYS}
    return SeriesStart(
        _series(header),
        detector_shape,
        dtype,
        _shape(header, "scan_shape"),
        frames,
        settings,
        (raw,),
        pixel_mask=_pixel_mask(header, detector_shape),
        maximum_is_masked=header.get("maximum_is_masked") is True and dtype.kind == "u",
    )


def _pixel_mask(header: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray | None:
    mask = header.get("pixel_mask")
    if mask is None:
        return None
    if not isinstance(mask, bytes) or len(mask) != shape[0] * shape[1]:
        raise ProtocolError(f"'pixel_mask' must be {shape[0] * shape[1]} bytes, one a pixel, 1 = good")
    return np.frombuffer(mask, np.uint8).reshape(shape) != 0


class Encoder:
    """The sending half: see ``detectors.messages.StreamEncoder``."""

    def start(self, start: SeriesStart) -> list[OutgoingMessage]:
        header = {
            "type": "start",
            "version": VERSION,
            "series": start.series,
            "detector_shape": list(start.detector_shape),
            "dtype": start.dtype.name,
            "scan_shape": None if start.scan_shape is None else list(start.scan_shape),
            "frames": start.frames,
            "pixel_mask": None if start.pixel_mask is None else start.pixel_mask.astype(np.uint8).tobytes(),
            "maximum_is_masked": start.maximum_is_masked,
            **start.settings,
        }
        return [[msgpack.packb(header)]]

    def frames(
        self,
        series: SeriesId,
        first: int,
        payloads: Sequence[bytes | memoryview],
        encoding: Encoding,
        *,
        others: Sequence[tuple[Encoding, Sequence[bytes | memoryview]]] = (),
        exposed_ns: Sequence[int] | None = None,
    ) -> list[OutgoingMessage]:
        header = {
            "type": "frames",
            "series": series,
            "first": first,
            "count": len(payloads),
            "encoding": _NAMES[encoding],
            "sizes": [memoryview(payload).nbytes for payload in payloads],
        }
        return [[msgpack.packb(header), payloads[0] if len(payloads) == 1 else b"".join(payloads)]]

    def end(self, series: SeriesId) -> list[OutgoingMessage]:
        return [[msgpack.packb({"type": "end", "series": series})]]


def looks_like(part: bytes) -> bool:
    """Whether a message's first part is a header of this protocol."""
    try:
        _unpack(memoryview(part))
    except ProtocolError:
        return False
    return True
