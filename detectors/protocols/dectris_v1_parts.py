"""The small parts of DECTRIS Stream V1: what an image's JSON texts say, and what a header has told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from detectors.errors import ProtocolError
from detectors.messages import Encoding, SeriesStart
from detectors.protocols.dectris import DTYPES, good_pixels, told_by

#: No sane number of a frame or length of a series is larger.
LARGEST_INDEX = 2**53
LARGEST_INT64 = 2**63 - 1

#: A configuration has about 3 kB; nothing larger than this is read as JSON, or kept as an appendix.
MAX_TEXT_BYTES = 1 << 20

_ENCODING = re.compile(r"(?:(?:bs(8|16|32))?(-?lz4))?([<>])")


class Layout(NamedTuple):
    """How the pixels of an image lie: what ``dimage_d`` says, but for their size in bytes."""

    encoding: Encoding
    shape: tuple[int, int]
    dtype: np.dtype


def integer(fields: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = fields.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ProtocolError(f"{key!r} must be an integer from {low} to {high}, got {value!r}")
    return value


def series_of(fields: Mapping[str, Any]) -> int:
    return integer(fields, "series", -LARGEST_INT64, LARGEST_INT64)


def layout_of(fields: Mapping[str, Any]) -> Layout:
    shape, kind, name = fields.get("shape"), fields.get("type"), fields.get("encoding")
    if not (
        isinstance(shape, list)
        and shape[2:] in ([], [1])
        and len(shape) >= 2
        and all(type(n) is int and 1 <= n <= 65536 for n in shape)
    ):
        raise ProtocolError(f"'shape' must be [x, y], each from 1 to 65536, got {shape!r}")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise ProtocolError(f"'type' must be one of {', '.join(DTYPES)}, got {kind!r}")
    match = _ENCODING.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ProtocolError(f"unknown encoding {name!r}; known are '<', 'lz4<', 'bs8-lz4<', 'bs16-lz4<', 'bs32-lz4<'")
    bits, packed, order = match.groups()
    swapped = order == ">" and dtype.itemsize > 1
    if bits is not None and int(bits) != 8 * dtype.itemsize:
        raise ProtocolError(f"the encoding {name!r} is not that of {dtype.name} pixels")
    if packed and swapped:
        raise ProtocolError(f"the encoding {name!r}: compressed pixels are only read in little-endian order ('<')")
    plain = Encoding.RAW_BIG_ENDIAN if swapped else Encoding.RAW
    return Layout(Encoding.BSLZ4 if bits else Encoding.LZ4 if packed else plain, (shape[1], shape[0]), dtype)


@dataclass
class Header:
    """A series whose first image has not come. ``arrays``: "pixel mask" and "flat field", (rows, columns), as sent."""

    series: int
    parts: list[bytes]
    config: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    appendix: str | None = None

    def start(self, shape: tuple[int, int], dtype: np.dtype) -> tuple[SeriesStart, list[str]]:
        """The start of a series with such images, and what of the header cannot be used."""
        settings, scan_shape = told_by(self.config, self.appendix)
        arrays: dict[str, np.ndarray | None] = {"pixel mask": None, "flat field": None}
        notes = []
        for name, array in self.arrays.items():
            if array.shape != shape:
                notes.append(f"the {name} has the shape {array.shape}, the images {shape}: it is not used")
            elif name == "pixel mask" and array.dtype.kind == "u":
                arrays[name] = good_pixels(array)
            elif name == "flat field" and np.isfinite(array).all() and array.any():
                arrays[name] = array.astype(np.float32)
            else:
                notes.append(f"the {name} is no {name}: it is not used")
        start = SeriesStart(
            self.series,
            shape,
            dtype,
            scan_shape,
            _frame_count(self.config),
            settings,
            tuple(self.parts),
            pixel_mask=arrays["pixel mask"],
            flatfield=arrays["flat field"],
            maximum_is_masked=True,
        )
        return start, notes


def _frame_count(config: Mapping[str, Any]) -> int | None:
    """Images of a series, ``nimages`` for each of ``ntrigger`` triggers; None where it is not told."""
    images, triggers = config.get("nimages"), config.get("ntrigger", 1)
    if not (type(images) is int and type(triggers) is int and images > 0 and triggers > 0):
        return None
    return images * triggers if images * triggers <= LARGEST_INDEX else None
