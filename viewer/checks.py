"""The last look at a snapshot before it is drawn: types, ranges, shapes. The network may bring anything. No Qt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from detectors.errors import ProtocolError
from stream.snapshot import STATES, Snapshot

Check = Callable[[Any], bool]

#: No scan and no detector has more pixels a side; a larger number is damage.
LARGEST = 1 << 16


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _size(value: Any) -> bool:
    return _count(value) and 0 < value <= LARGEST


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _pair(check: Check) -> Check:
    return lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(check, value))


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


_CHECKS: dict[str, Check] = {
    "session": _text,
    "sequence": _count,
    "time_s": _number,
    "state": lambda value: value in STATES,
    "message": _text,
    "link": _text,
    "series": _optional(lambda value: isinstance(value, int | str)),
    "passes_done": _count,
    "scan_row": _optional(_count),
    "rows_acquired": _count,
    "scan_shape": _optional(_pair(_size)),
    "scan_step_angstrom": _optional(_pair(_positive)),
    "detector_shape": _optional(_pair(_size)),
    "detector_pixel_mrad": _optional(_pair(_positive)),
    "bf_centre_px": _optional(_pair(_number)),
    "bf_radius_px": _optional(_positive),
    "bad_pixels": _count,
    "energy_kev": _optional(_positive),
    "semiangle_mrad": _optional(_positive),
    "rotation_deg": _optional(_number),
    "transpose": _optional(_flag),
    "aberrations": lambda value: (
        isinstance(value, dict) and all(_text(key) and _number(number) for key, number in value.items())
    ),
    "method": _text,
    "frames_per_s": _number,
    "megabytes_per_s": _number,
    "latency_ms": _optional(_number),
    "control_port": _optional(_size),
    "left_out": lambda value: isinstance(value, tuple) and all(map(_text, value)),
}


def checked(snapshot: Snapshot) -> Snapshot:
    """``snapshot`` itself if every field can be drawn. Raises ``ProtocolError`` naming the first that cannot."""
    for name, check in _CHECKS.items():
        value = getattr(snapshot, name)
        if not check(value):
            raise ProtocolError(f"a damaged snapshot: {name} is {str(value)[:60]!r}")
    for name, image in snapshot.images.items():
        if image.ndim != 2 or not all(map(_size, image.shape)):
            raise ProtocolError(f"a damaged snapshot: {name} has the shape {image.shape}")
    return snapshot
