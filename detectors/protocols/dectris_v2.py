"""DECTRIS Stream V2: CBOR over ZeroMQ, one item a message part (SIMPLON, releases since 2022).

    start   {"type": "start", "series_id", "series_unique_id", "image_size_x", "image_dtype", "channels", ...}, at arm
    image   {"type": "image", "series_id", "image_id", "start_time", "data": {channel: 40([[rows, columns], pixels])}}
    end     {"type": "end", "series_id", "series_unique_id"}

Pixels are a typed byte string (RFC 8746), plain or packed: ``69(56500(["bslz4", 2, bytes]))``. All but the type and the
series may be missing from a start message. Where it does not say shape, type and channels of the frames, the first
image does, and the start is passed on together with it.

Our own simulator puts what a detector cannot know (scan shape, optics) under ``user_data`` (see
``dectris.user_data_for``); a detector's ``header_appendix`` may say the same.

Source: dectris/documentation, stream_v2 and cbor; checked against recordings of detectors. A pixel of its type's
largest number is none that was counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cbor2
import numpy as np

from detectors import codec
from detectors.errors import ProtocolError
from detectors.messages import (
    Announced,
    Encoding,
    FrameBlock,
    Message,
    ReceivedBatch,
    SeriesEnd,
    SeriesId,
    SeriesStart,
    Undecodable,
)
from detectors.protocols import cbor, dectris
from detectors.protocols.dectris_v2_encoder import ENCODINGS, Encoder

__all__ = ["ENCODINGS", "NAME", "PORT", "SUMMARY", "Decoder", "Encoder", "looks_like"]

NAME = "dectris-v2"
SUMMARY = "DECTRIS Stream V2, CBOR over ZeroMQ"
PORT = 31001

#: Pixel types by the tag of their typed array (RFC 8746); 68 is 64 with a hint for whoever calculates with it.
_PIXELS: Mapping[int, np.dtype] = {
    64: np.dtype("<u1"),
    68: np.dtype("<u1"),
    69: np.dtype("<u2"),
    70: np.dtype("<u4"),
}
#: ... and those of masks and flat fields.
_TYPED: Mapping[int, np.dtype] = {**_PIXELS, 78: np.dtype("<i4"), 85: np.dtype("<f4"), 86: np.dtype("<f8")}

#: The keys of a start message that are looked at here, arrays apart; all others are left unread.
_START_KEYS = (
    *("image_size_x", "image_size_y", "image_dtype", "saturation_value", "number_of_images", "channels"),
    *("incident_energy", "count_time", "frame_time", "threshold_energy", "flatfield_enabled", "user_data"),
    *("detector_description", "detector_serial_number"),
)
_ARRAYS = ("pixel_mask", "flatfield")

_LARGEST_COUNT = 2**53
_MAX_SERIES = 8
"""Series in progress at a time: those that were begun and not ended are forgotten, the oldest first."""
_MAX_MASK_PIXELS = 1 << 26


@dataclass
class _Series:
    """What is known of the frames of a series; ``config`` of a start that waits for the first image to say the rest."""

    series: SeriesId
    shape: tuple[int, int] | None = None
    dtype: np.dtype | None = None
    channels: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    header: bytes = b""
    notes: list[str] = field(default_factory=list)

    def start(self) -> list[Message]:
        """The start, once shape and dtype are known, and what of it could not be used."""
        config, self.config = self.config, None
        if config is None or self.shape is None or self.dtype is None:
            return []
        settings, scan_shape = dectris.told_by(config, config.get("user_data"))
        mask, flatfield = (self._array(config, key) for key in ("pixel_mask", "flatfield"))
        start = SeriesStart(
            self.series,
            self.shape,
            self.dtype,
            scan_shape,
            _count(config, "number_of_images", _LARGEST_COUNT),
            settings,
            (self.header,),
            self.channels,
            None if mask is None or mask.dtype.kind == "f" else dectris.good_pixels(mask),
            None if flatfield is None else flatfield.astype(np.float32, copy=False),
            maximum_is_masked=True,
        )
        return [start, *(Undecodable(f"series {self.series}: {note}", 0) for note in self.notes)]

    def _array(self, config: Mapping[str, Any], key: str) -> np.ndarray | None:
        """The first channel's array of ``config[key]``, ``{channel: array}``."""
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get(self.channels[0] if self.channels else None, next(iter(value.values()), None))
        if value is None:
            return None
        try:
            return _array(value, self.shape)
        except ProtocolError as error:
            self.notes.append(f"its {key} is not used: {error}")
            return None


class Decoder:
    """Sans-IO decoder: see ``detectors.messages.StreamDecoder``. It remembers what start messages said.

    Each message part is taken for itself: some senders put start and first image into one message.
    """

    def __init__(self) -> None:
        cbor.prepare()
        self._series: dict[SeriesId, _Series] = {}

    def feed(self, batch: ReceivedBatch) -> list[Message]:
        messages: list[Message] = []
        found, channels = cbor.walk(batch.slab, batch.offsets, batch.lengths)
        part_of = np.cumsum(batch.last) - batch.last
        refused = -1
        bounds = [*np.flatnonzero(found["same"] == 0).tolist(), len(found)]
        for first, stop in zip(bounds[:-1], bounds[1:], strict=True):
            what = int(found["what"][first])
            try:
                if what == cbor.IMAGE:
                    messages.extend(self._images(batch, found[first:stop], channels))
                elif what == cbor.OTHER:
                    messages.extend(self._other(batch.part(first)))
                elif refused != part_of[first]:  # several parts of one message that is of another protocol are one
                    refused = int(part_of[first])
                    messages.append(Undecodable(f"{cbor.REASONS[what]} (Stream V2)", int(found["lost"][first])))
            except ProtocolError as error:
                frames = stop - first if what == cbor.IMAGE else 0
                messages.append(Undecodable(_brief(str(error)), frames))
        return messages

    def _other(self, part: memoryview) -> list[Message]:
        """A start or end message; others do not concern us."""
        entries = cbor.entries(part)
        kind, *ids = (
            cbor.load(entries.get(key), 2 * cbor.MAX_ID_BYTES) for key in ("type", "series_id", "series_unique_id")
        )
        if kind not in ("start", "end"):
            return []
        series = next((name for name in ids if isinstance(name, str) or (type(name) is int and name >= 0)), None)
        if series is None:
            raise ProtocolError(f"a {kind!r} message needs 'series_id' or 'series_unique_id'")
        if kind == "start":
            before, known = self._series.get(series), _said(series, entries, bytes(part))
            self._remember(known)
            if known.shape is not None and known.dtype is not None and known.channels:
                return known.start()
            return [] if before is not None and before.header == known.header else [Announced(series)]
        known = self._series.pop(series) if series in self._series else _Series(series)
        messages: list[Message] = []
        if known.config is not None:
            # No image ever said what the pixels are: any type will do, as there are none.
            known.dtype = known.dtype or dectris.DTYPES["uint32"]
            messages = known.start()
            if not messages:
                messages = [Undecodable(f"series {series}: neither its start nor an image gave the image size", 0)]
        return [*messages, SeriesEnd(series, (bytes(part),))]

    def _remember(self, known: _Series) -> None:
        self._series.pop(known.series, None)
        self._series[known.series] = known
        if len(self._series) > _MAX_SERIES:
            del self._series[next(iter(self._series))]

    def _images(self, batch: ReceivedBatch, found: np.ndarray, channels: np.ndarray) -> list[Message]:
        """Consecutive images of one series and layout as one block."""
        slab, first = batch.slab, found[0]
        series: SeriesId = int(first["series"]) % 2**64
        if first["text_size"] >= 0:
            series = _text(slab, first["text_at"], first["text_size"])
        table = channels[first["first"] :][: len(found) * first["channels"]].reshape(len(found), -1)
        names = [_text(slab, channel["name_at"], channel["name_size"]) for channel in table[0]]
        known = self._series.get(series) or _Series(series)
        wanted = known.channels or tuple(dict.fromkeys(names))
        where = f"series {series}, image {first['index']}"
        if missing := [name for name in wanted if name not in names]:
            raise ProtocolError(f"{where}: channel {missing[0]!r} is missing; it has {', '.join(map(repr, names))}")
        places = [names.index(name) for name in wanted]
        layouts = [_layout(f"{where}, channel {names[c]!r}", slab, table[0, c]) for c in places]
        shape, dtype = known.shape or layouts[0][0], known.dtype or layouts[0][1]
        for name, (its_shape, its_dtype, _) in zip(wanted, layouts, strict=True):
            if (its_shape, its_dtype) != (shape, dtype):
                raise ProtocolError(
                    f"{where}, channel {name!r}: {_pixels(its_shape, its_dtype)} came, "
                    f"{_pixels(shape, dtype)} were announced"
                )
        if (known.shape, known.dtype, known.channels) != (shape, dtype, wanted):
            known.shape, known.dtype, known.channels = shape, dtype, wanted
            self._remember(known)
        exposed: np.ndarray | None = np.ascontiguousarray(found["exposed_ns"])
        if (found["exposed_ns"] == cbor.NO_TIME).any():
            exposed = None
        indices = np.ascontiguousarray(found["index"])
        blocks = [
            FrameBlock(
                series,
                encoding,
                indices,
                np.ascontiguousarray(table["offset"][:, c]),
                np.ascontiguousarray(table["size"][:, c]),
                slab,
                batch.time_ns,
                exposed,
            )
            for c, (_, _, encoding) in zip(places, layouts, strict=True)
        ]
        return [*known.start(), replace(blocks[0], others=tuple(blocks[1:])) if len(blocks) > 1 else blocks[0]]


def _layout(where: str, slab: np.ndarray, channel: np.ndarray) -> tuple[tuple[int, int], np.dtype, Encoding]:
    """Shape, dtype and encoding of a channel. Raises ``ProtocolError`` for what cannot be used."""
    problem = int(channel["problem"])
    if problem == cbor.ALGORITHM:
        name = _text(slab, int(channel["algorithm_at"]), int(channel["algorithm_size"]))
        raise ProtocolError(f"{where}: unknown compression {name!r}; known are {', '.join(ENCODINGS)}")
    if problem != cbor.FINE:
        raise ProtocolError(f"{where} {cbor.PROBLEMS[problem]}")
    dtype = _PIXELS.get(int(channel["tag"]))
    if dtype is None:
        raise ProtocolError(f"{where}: pixels of typed-array tag {channel['tag']}; known are 64, 69 and 70")
    encoding = Encoding(int(channel["encoding"]))
    if encoding is Encoding.BSLZ4 and channel["element"] != dtype.itemsize:
        raise ProtocolError(f"{where}: bslz4 of elements of {channel['element']} bytes, {dtype.name} was announced")
    return (int(channel["rows"]), int(channel["columns"])), dtype, encoding


def _pixels(shape: tuple[int, int], dtype: np.dtype) -> str:
    return f"{shape[0]}x{shape[1]} pixels of {dtype.name}"


def _text(slab: np.ndarray, at: int, size: int) -> str:
    return slab[at : at + size].tobytes().decode("utf-8", "replace")


def _brief(reason: str) -> str:
    """A reason repeats what came, which may be anything; it goes into snapshots and logs."""
    return reason if len(reason) <= 300 else f"{reason[:200]} ... {reason[-80:]}"


def _said(series: SeriesId, entries: Mapping[str, memoryview], header: bytes) -> _Series:
    """What a start message says of its frames. Raises ``ProtocolError`` for pixels that are not supported."""
    config = {key: cbor.plain(cbor.load(entries.get(key))) for key in _START_KEYS}
    config.update((key, cbor.load(entries.get(key), len(header))) for key in _ARRAYS)
    rows, columns = _count(config, "image_size_y", 65536), _count(config, "image_size_x", 65536)
    name, saturation, channels = config["image_dtype"], config["saturation_value"], config["channels"]
    if name is not None and (not isinstance(name, str) or name not in dectris.DTYPES):
        raise ProtocolError(f"series {series}: image_dtype {name!r}; known are {', '.join(dectris.DTYPES)}")
    # The largest count is often far below what the pixels could hold: only one beyond 16 bits tells them.
    if name is None and type(saturation) is int and saturation > np.iinfo(np.uint16).max:
        name = "uint32"
    if not (isinstance(channels, list) and all(isinstance(channel, str) for channel in channels)):
        channels = []
    return _Series(
        series,
        None if rows is None or columns is None else (rows, columns),
        None if name is None else dectris.DTYPES[name],
        tuple(dict.fromkeys(channels)),
        config,
        header,
    )


def _count(config: Mapping[str, Any], key: str, largest: int) -> int | None:
    """A positive whole number; None where there is none (0 images are as many as come)."""
    value = config.get(key)
    return value if type(value) is int and 1 <= value <= largest else None


def _array(value: Any, shape: tuple[int, int] | None) -> np.ndarray:
    """A MultiDimArray as an array. Raises ``ProtocolError`` where it is none, or not of ``shape``."""
    try:
        (rows, columns), typed = _tagged(value, 40)
        dtype = _TYPED[typed.tag]
        if (rows, columns) != shape:
            raise ProtocolError("it is of another shape than the frames")
        if rows * columns > _MAX_MASK_PIXELS:
            raise ProtocolError(f"{rows}x{columns} pixels are more than any detector has")
        payload, encoding = typed.value, Encoding.RAW
        if isinstance(payload, cbor2.CBORTag):
            algorithm, _, payload = _tagged(payload, 56500)
            encoding = ENCODINGS[algorithm]
        return codec.decode(payload, encoding, (rows, columns), dtype)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ProtocolError("it is not a two-dimensional array of a known type") from error


def _tagged(value: cbor2.CBORTag, tag: int) -> Any:
    if value.tag != tag:
        raise ValueError(value.tag)
    return value.value


def looks_like(part: bytes) -> bool:
    """Whether a message's first part is a CBOR map with a ``type``."""
    # No other protocol's messages begin like that, and the walk need not be compiled to say so.
    if not part or (part[0] >> 5 != 5 and bytes(part[:3]) != b"\xd9\xd9\xf7"):
        return False
    found, _ = cbor.walk(np.frombuffer(part, np.uint8), np.array([0]), np.array([len(part)]))
    return int(found["what"][0]) not in (cbor.NO_MAP, cbor.DAMAGED, cbor.NO_TYPE)
