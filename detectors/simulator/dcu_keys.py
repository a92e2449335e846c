"""The configuration of the simulated detector control unit: its keys, their values, and what they may be set to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detectors.errors import ConfigurationError
from detectors.messages import Encoding
from detectors.simplon import encode_array
from detectors.simulator.source import FrameSource

VERSION = "1.8.0"

#: The least time between two exposures [s].
READOUT_S = 1e-7

_COMPRESSIONS = {Encoding.RAW: "none", Encoding.LZ4: "lz4", Encoding.LZ4_BLOCKS: "lz4", Encoding.BSLZ4: "bslz4"}
_MOST = 2_000_000_000
#: A bit of the pixel mask: dead.
_DEAD = 2

_KINDS: dict[str, Callable[[Any], bool]] = {
    "uint": lambda value: type(value) is int and value >= 0,
    "float": lambda value: type(value) in (int, float),
    "string": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
}


@dataclass
class Key:
    """A key as it is told: see ``detectors.simplon.Entry``."""

    value: Any
    kind: str
    writable: bool = False
    allowed: Sequence[str] | None = None
    low: float | None = None
    high: float | None = None
    unit: str | None = None

    def told(self) -> dict[str, Any]:
        optional = {"allowed_values": self.allowed, "min": self.low, "max": self.high, "unit": self.unit}
        value = encode_array(self.value) if isinstance(self.value, np.ndarray) else self.value
        known = {name: item for name, item in optional.items() if item is not None}
        return {"access_mode": "rw" if self.writable else "r", "value": value, "value_type": self.kind, **known}

    def problem(self, value: Any) -> str:
        """Why it cannot be set to ``value``; empty when it can."""
        if not self.writable:
            return "it is read-only"
        if not _KINDS[self.kind](value):
            return f"expected {self.kind}"
        if self.allowed is not None and value not in self.allowed:
            return f"allowed are {', '.join(self.allowed)}"
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            return f"it lies between {self.low} and {self.high}"
        return ""


def dcu_keys(source: FrameSource, stream_format: str, frame_time_s: float) -> dict[str, dict[str, Key]]:
    """Every configuration key, by module. Raises ``ConfigurationError`` for frames that no DCU sends."""
    if source.encoding not in _COMPRESSIONS:
        raise ConfigurationError(f"a DCU cannot send {source.encoding.name}; use bslz4, lz4 or raw")
    start = source.start(0)
    rows, columns = start.detector_shape
    good = np.ones(start.detector_shape, bool) if start.pixel_mask is None else start.pixel_mask
    bits = 8 * start.dtype.itemsize
    detector = {
        "description": Key("liveptycho simulated detector", "string"),
        "detector_number": Key("SIMULATED-1", "string"),
        "eiger_fw_version": Key("release-2024.1.0", "string"),
        "software_version": Key(VERSION, "string"),
        "x_pixels_in_detector": Key(columns, "uint"),
        "y_pixels_in_detector": Key(rows, "uint"),
        "bit_depth_image": Key(bits, "uint"),
        "bit_depth_readout": Key(bits, "uint"),
        "detector_readout_time": Key(READOUT_S, "float", unit="s"),
        "pixel_mask": Key(np.where(good, 0, _DEAD).astype("<u4"), "uint[][]"),
        "pixel_mask_applied": Key(start.maximum_is_masked, "bool"),
        "flatfield_correction_applied": Key(False, "bool"),
        "roi_mode": Key("disabled", "string", True, ["disabled"]),
        "compression": Key(_COMPRESSIONS[source.encoding], "string", True, [_COMPRESSIONS[source.encoding]]),
        "trigger_mode": Key("ints", "string", True, ["ints", "inte", "exts", "exte"]),
        "nimages": Key(1, "uint", True, low=1, high=_MOST),
        "ntrigger": Key(1, "uint", True, low=1, high=_MOST),
        "count_time": Key(frame_time_s - READOUT_S, "float", True, low=5e-8, high=3600.0, unit="s"),
        "frame_time": Key(frame_time_s, "float", True, low=1e-6, high=3600.0, unit="s"),
    }
    if (energy_kev := start.settings.get("energy_kev")) is not None:
        detector["incident_energy"] = Key(1e3 * energy_kev, "float", True, low=1e3, high=5e6, unit="eV")
    switch = ["enabled", "disabled"]
    return {
        "detector": detector,
        "stream": {
            "mode": Key("enabled", "string", True, switch),
            "format": Key(stream_format, "string", True, [stream_format]),
            "header_detail": Key("basic", "string", True, ["all", "basic", "none"]),
            "header_appendix": Key("", "string", True),
            "image_appendix": Key("", "string", True),
        },
        "monitor": {"mode": Key("disabled", "string", True, switch)},
        "filewriter": {"mode": Key("disabled", "string", True, switch)},
        "system": {},
    }
