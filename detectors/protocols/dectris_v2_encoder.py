"""The sending half of DECTRIS Stream V2 (see ``detectors.protocols.dectris_v2``): one message for the start, for each
image and for the end, as a detector sends them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cbor2
import numpy as np

from detectors import codec
from detectors.errors import ConfigurationError
from detectors.messages import Encoding, OutgoingMessage, SeriesId, SeriesStart
from detectors.protocols import cbor
from detectors.protocols.dectris import DTYPES, user_data_for

ENCODINGS = {"bslz4": Encoding.BSLZ4, "lz4": Encoding.LZ4_BLOCKS, "raw": Encoding.RAW}

_NAMES = {encoding: name for name, encoding in ENCODINGS.items()}

#: Tags of the typed arrays (RFC 8746).
_TAGS = {np.dtype("<u1"): 64, np.dtype("<u2"): 69, np.dtype("<u4"): 70, np.dtype("<f4"): 85}

#: Numerators of times are counted in this many a second, as by the detectors.
_TIME_BASE = 50_000_000
_TICK_NS = 1_000_000_000 // _TIME_BASE
_BASE = cbor2.dumps(_TIME_BASE)

#: A simulated detector has no clock: all its dates are this one.
_DATE = cbor2.CBORTag(0, "1970-01-01T00:00:00.000+00:00")

#: Bit of the pixel mask: a dead pixel.
_DEAD = 2


class Encoder:
    """See ``detectors.messages.StreamEncoder``. One frame a message.

    A whole number as the series' id is ``series_id``, and with leading zeros ``series_unique_id``; a text is the latter
    alone. A time is told in steps of 20 ns; one that is not known is 0. Receivers take the type's largest value for a
    masked pixel, whatever ``maximum_is_masked`` says. A channel without a name is ``threshold_1``.
    """

    def __init__(self) -> None:
        self._started: dict[SeriesId, SeriesStart] = {}

    def start(self, start: SeriesStart) -> list[OutgoingMessage]:
        if start.dtype not in DTYPES.values():
            raise ConfigurationError(f"dectris-v2 sends {', '.join(DTYPES)}, not {start.dtype.name}")
        start = replace(start, channels=start.channels or ("threshold_1",))
        settings, mask, flatfield = start.settings, start.pixel_mask, start.flatfield
        energy = settings.get("energy_kev")
        bits = None if mask is None else np.where(mask, 0, _DEAD).astype("<u4")
        keys: dict[str, Any] = {
            "arm_date": _DATE,
            "channels": list(start.channels),
            "count_time": settings.get("count_time_s"),
            "detector_description": settings.get("detector"),
            "detector_serial_number": settings.get("detector_number"),
            "flatfield": _packed(start.channels, None if flatfield is None else flatfield.astype("<f4")),
            "flatfield_enabled": settings.get("flatfield_applied"),
            "frame_time": settings.get("frame_time_s"),
            "image_dtype": start.dtype.name,
            "image_size_x": start.detector_shape[1],
            "image_size_y": start.detector_shape[0],
            "incident_energy": energy * 1e3 if isinstance(energy, int | float) else None,
            "number_of_images": start.frames,
            "pixel_mask": _packed(start.channels, bits),
            "pixel_mask_enabled": None if mask is None else True,
            "saturation_value": int(np.iinfo(start.dtype).max) - 1,
            "threshold_energy": settings.get("threshold_energy_ev"),
            "user_data": cbor.plain(user_data_for(start)),
        }
        message = _message("start", start.series, {key: value for key, value in keys.items() if value is not None})
        self._started[start.series] = start
        return [[message]]

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
        start = self._started.get(series)
        if start is None:
            raise ConfigurationError("dectris-v2 needs the start of a series before its frames")
        channels = [(encoding, payloads), *others]
        if len(channels) != len(start.channels):
            announced = ", ".join(start.channels)
            raise ConfigurationError(f"dectris-v2: frames of {len(channels)} channels; announced were {announced}")
        exposure = start.settings.get("count_time_s")
        exposure = round(exposure * _TIME_BASE) if isinstance(exposure, float) and 0 <= exposure <= 1e9 else 0
        # All but numbers, times and pixels is the same in each message.
        head = _message("image", series, {}, further=6) + _text("image_id")
        dates = _text("real_time") + _time(exposure) + _text("series_date") + cbor2.dumps(_DATE) + _text("start_time")
        stop = _text("stop_time")
        before = [_text(start.channels[c]) + _pixels_head(start, channels[c][0]) for c in range(len(channels))]
        before[0] = _text("data") + cbor.head(5, len(channels)) + before[0]
        messages: list[OutgoingMessage] = []
        for i in range(len(payloads)):
            begun = 0 if exposed_ns is None else (int(exposed_ns[i]) + _TICK_NS // 2) // _TICK_NS
            parts: list[bytes | memoryview] = [head, cbor.head(0, first + i), dates, _time(begun), stop]
            parts.append(_time(begun + exposure))
            for text, (_, of_channel) in zip(before, channels, strict=True):
                parts += [text, cbor.head(2, memoryview(of_channel[i]).nbytes), of_channel[i]]
            messages.append([b"".join(parts)])
        return messages

    def end(self, series: SeriesId) -> list[OutgoingMessage]:
        self._started.pop(series, None)
        return [[_message("end", series, {})]]


def _message(kind: str, series: SeriesId, keys: Mapping[str, Any], further: int = 0) -> bytes:
    """A message of type, series and ``keys``, in this order; ``further`` keys are to be put behind it."""
    ids: dict[str, Any] = {"series_unique_id": series}
    if isinstance(series, int):
        if not 0 <= series < 2**64:
            raise ConfigurationError(f"dectris-v2 numbers its series from 0 to 2^64 - 1, got {series}")
        ids = {"series_id": series, "series_unique_id": f"{series:026d}"}
    pairs = [_text(key) + cbor2.dumps(value) for key, value in {"type": kind, **ids, **keys}.items()]
    return b"".join([cbor.head(6, 55799), cbor.head(5, len(pairs) + further), *pairs])


def _text(text: str) -> bytes:
    return cbor2.dumps(text)


def _time(ticks: int) -> bytes:
    """A rational number of seconds."""
    return b"".join([b"\x82", cbor.head(0, ticks) if ticks >= 0 else cbor.head(1, -1 - ticks), _BASE])


def _packed(channels: Sequence[str], array: np.ndarray | None) -> dict[str, cbor2.CBORTag] | None:
    """The same array for every channel, packed as a detector does."""
    if array is None:
        return None
    packed = cbor2.CBORTag(56500, ["bslz4", array.itemsize, codec.encode(array, Encoding.BSLZ4)])
    return dict.fromkeys(channels, cbor2.CBORTag(40, [list(array.shape), cbor2.CBORTag(_TAGS[array.dtype], packed)]))


def _pixels_head(start: SeriesStart, encoding: Encoding) -> bytes:
    """What comes before the byte string of a channel's pixels."""
    if encoding not in _NAMES:
        raise ConfigurationError(f"dectris-v2 sends pixels as {', '.join(ENCODINGS)}, not {encoding.name.lower()}")
    head = cbor.head(6, 40) + b"\x82" + cbor2.dumps(list(start.detector_shape)) + cbor.head(6, _TAGS[start.dtype])
    if encoding is Encoding.RAW:
        return head
    element = start.dtype.itemsize if encoding is Encoding.BSLZ4 else 0
    return head + cbor.head(6, 56500) + b"\x83" + _text(_NAMES[encoding]) + cbor.head(0, element)
