"""The messages between a session and its viewers, as docs/publishing.md describes them. A leaf: no engine, no Qt.

A snapshot is one msgpack part: the session's state and its newest images. A control request is one msgpack map, and so
is its reply. Nothing here is ever unpickled or evaluated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack
import numpy as np

from detectors.errors import ProtocolError

VERSION = 1

#: Every image a snapshot may carry, and its unit. Scan images are float32 (scan rows, scan columns), NaN where there
#: is nothing yet; ``mean_pattern`` is float32 (detector rows, detector columns).
IMAGE_UNITS: dict[str, str] = {
    "phase": "rad",
    "amplitude": "1",
    "bright_field": "counts",
    "dark_field": "counts",
    "com_row": "mrad",
    "com_column": "mrad",
    "mean_pattern": "counts/frame",
}

#: What a user may ask for or leave out (``--channels``) -> the images that it stands for.
IMAGE_CHANNELS: dict[str, tuple[str, ...]] = {
    "phase": ("phase", "amplitude"),
    "bf": ("bright_field",),
    "df": ("dark_field",),
    "com": ("com_row", "com_column"),
    "pattern": ("mean_pattern",),
}

#: The states of a session, in the order in which it passes through them.
STATES = ("waiting", "calibrating", "scanning", "finished", "stopped", "failed")

#: Control commands and the keys that each takes besides ``command``.
COMMANDS: dict[str, tuple[str, ...]] = {
    "aberrations": ("values",),
    "rotation": ("rotation_deg", "transpose"),
    "method": ("method",),
    "reset": (),
    "snapshot": (),
    "stop": (),
}


def channels_without(channels: Collection[str]) -> tuple[str, ...]:
    """The image channels that are not among ``channels``, in the order of IMAGE_CHANNELS."""
    return tuple(name for name in IMAGE_CHANNELS if name not in channels)


def left_out_sentence(left_out: Collection[str]) -> str:
    """``left out: df, com (--channels phase,bf,pattern)``; empty where nothing is left out."""
    made = ",".join(channels_without(left_out))
    return f"left out: {', '.join(left_out)} (--channels {made})" if left_out else ""


@dataclass(frozen=True)
class Counters:
    """What became of the frames. ``received`` counts every frame that arrived, whatever happened to it afterwards."""

    received: int = 0
    missing: int = 0
    """positions of closed rows that no frame came for; filled with their row's mean pattern"""
    duplicate: int = 0
    late: int = 0
    """frames of a pass that a newer one had already replaced"""
    undecodable: int = 0
    outside: int = 0
    """flyback frames and frames beyond the announced scan"""
    unclaimed: int = 0
    """frames of no series in progress: their start never came, was refused, or its end had come"""

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Snapshot:
    """One moment of a session. Angles and lengths carry their unit in the name; None means not known (yet)."""

    session: str
    """a random text; a new one means that another session took over the address"""
    sequence: int
    """counts up with every published snapshot"""
    time_s: float
    """seconds since the epoch, at the session"""
    state: str
    """one of STATES"""
    message: str = ""
    """a sentence for the user: what is being waited for, what went wrong"""
    link: str = "waiting"
    """``waiting`` (nothing came yet), ``receiving``, ``silent`` (nothing for over a second)"""
    series: int | str | None = None
    passes_done: int = 0
    scan_row: int | None = None
    """the scan row that was completed last"""
    rows_acquired: int = 0
    """scan rows that hold data, 0..scan_shape[0]"""
    scan_shape: tuple[int, int] | None = None
    scan_step_angstrom: tuple[float, float] | None = None
    detector_shape: tuple[int, int] | None = None
    detector_pixel_mrad: tuple[float, float] | None = None
    bf_centre_px: tuple[float, float] | None = None
    bf_radius_px: float | None = None
    bad_pixels: int = 0
    """detector pixels that are masked"""
    energy_kev: float | None = None
    semiangle_mrad: float | None = None
    rotation_deg: float | None = None
    transpose: bool | None = None
    aberrations: Mapping[str, float] = field(default_factory=dict)
    """C10, C12, phi12, ...: Å and degrees"""
    method: str = "ssb"
    counters: Counters = Counters()
    frames_per_s: float = 0.0
    megabytes_per_s: float = 0.0
    latency_ms: float | None = None
    """from the arrival of the newest row's last frame to this snapshot"""
    control_port: int | None = None
    """TCP port of the control socket, on the host that publishes"""
    left_out: tuple[str, ...] = ()
    """the channels of IMAGE_CHANNELS whose images the user did not ask for: they are not made"""
    images: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """by name, see IMAGE_UNITS; all float32"""

    def pack(self) -> bytes:
        """One msgpack part."""
        message = {name: getattr(self, name) for name in self.__dataclass_fields__}
        message["counters"] = self.counters.as_dict()
        message["aberrations"] = dict(self.aberrations)
        message["images"] = {
            name: {
                "shape": list(image.shape),
                "dtype": "<f4",
                "unit": IMAGE_UNITS[name],
                "data": np.ascontiguousarray(image, dtype="<f4").data.cast("B"),
            }
            for name, image in self.images.items()
        }
        return msgpack.packb({"type": "snapshot", "version": VERSION, **message})

    @classmethod
    def unpack(cls, part: bytes | memoryview) -> Snapshot:
        """The inverse of :meth:`pack`; unknown keys are ignored. Raises ``ProtocolError`` on anything malformed."""
        message = unpack_map(part)
        if message.get("type") != "snapshot" or message.get("version") != VERSION:
            raise ProtocolError(f"expected a liveptycho snapshot, version {VERSION}; got {str(message)[:80]}")
        try:
            images = {
                name: np.frombuffer(image["data"], dtype="<f4").reshape(image["shape"])
                for name, image in message.pop("images", {}).items()
                if name in IMAGE_UNITS
            }
            counts = message.pop("counters", {})
            counters = Counters(**{name: int(counts[name]) for name in Counters.__dataclass_fields__ if name in counts})
            known: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in message.items()
                if key in cls.__dataclass_fields__
            }
            return cls(**known, counters=counters, images=images)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ProtocolError(f"a damaged snapshot ({error})") from error


def unpack_map(part: bytes | memoryview) -> dict[str, Any]:
    """One msgpack map with text keys. Raises ``ProtocolError`` for anything else."""
    try:
        message = msgpack.unpackb(part, raw=False)
    except Exception as error:  # msgpack raises half a dozen unrelated types on malformed input
        raise ProtocolError(f"not a msgpack message ({error})") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"expected a msgpack map, got {type(message).__name__}")
    return message
