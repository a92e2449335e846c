"""The two text headers of Quantum Detectors' Merlin: of an acquisition (HDR) and of each frame (MQ1).

They are the same on the network and in its files: a ``.hdr`` file is one HDR, a ``.mib`` file MQ1 headers and pixels
end to end. Sources: recorded files, ADMerlin and LiberTEM's description of both (read, not copied).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np

from detectors.errors import ProtocolError
from detectors.messages import Encoding

#: Bytes of an acquisition header.
HDR_BYTES = 2048

#: The largest header and the longest side that are believed; keeps a damaged header from asking for the impossible.
_MAX_HEADER_BYTES = 1 << 16
_MAX_SIDE = 1 << 14
_MAX_FRAMES = 2**53

#: Decoded pixels of the binary modes, big-endian on the wire. 1-bit frames are called U08 or U01, and have bytes.
BINARY: dict[str, np.dtype] = {
    "U01": np.dtype("u1"),
    "U08": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
}
#: ... and of the raw mode (R64), by counter depth: encoding of one chip, of a quad, decoded pixel, bits a pixel.
RAW_MODES: dict[int, tuple[Encoding, Encoding, np.dtype, int]] = {
    1: (Encoding.MERLIN_1BIT, Encoding.MERLIN_QUAD_1BIT, np.dtype("u1"), 1),
    6: (Encoding.MERLIN_6BIT, Encoding.MERLIN_QUAD_6BIT, np.dtype("u1"), 8),
    12: (Encoding.MERLIN_12BIT, Encoding.MERLIN_QUAD_12BIT, np.dtype("<u2"), 16),
}

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIME = re.compile(rb"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?Z?")
_DURATION_NS = re.compile(rb"(\d{1,18}) ?ns")


@dataclass(frozen=True)
class AcquisitionHeader:
    """What an HDR says. ``entries``: its lines, by the key without what stands in brackets (``Counter Depth``).

    The properties are None (or empty) for what is missing or makes no sense there.
    """

    entries: Mapping[str, str]

    def text(self, key: str) -> str:
        return self.entries.get(key, "")

    def integer(self, key: str) -> int | None:
        value = self.text(key)
        return int(value) if value.isascii() and value.isdigit() and len(value) <= 15 else None

    @property
    def time_stamp(self) -> str:
        """When the acquisition was begun: local time, to the second, as Merlin writes it."""
        return self.text("Time and Date Stamp")

    @property
    def frames(self) -> int | None:
        """Frames in the acquisition; None where it goes on until it is stopped."""
        return self.integer("Frames in Acquisition") or None

    @property
    def frames_per_trigger(self) -> int | None:
        return self.integer("Frames per Trigger") or None

    @property
    def counter_depth(self) -> int | None:
        """Bits of a pixel's counter: 1, 6, 12 or 24."""
        return self.integer("Counter Depth")

    @property
    def scan_shape(self) -> tuple[int, int] | None:
        """(rows, columns) = (ScanY, ScanX), which newer software sends."""
        rows, columns = self.integer("ScanY"), self.integer("ScanX")
        if not rows or not columns or rows * columns == 1 or max(rows, columns) > 65536:
            return None
        return rows, columns

    @property
    def thresholds_kev(self) -> list[float]:
        """The energy thresholds [keV], without the unused (zero) ones."""
        values = [_number(value) for value in self.text("Thresholds").split(",")]
        return [value for value in values if value]


def parse_acquisition_header(text: bytes) -> AcquisitionHeader:
    """Read an HDR: the contents of a ``.hdr`` file, or a message without its ``MPX`` prefix.

    Raises ``ProtocolError`` for what is none.
    """
    if bytes(text[:4]) != b"HDR," or len(text) > _MAX_HEADER_BYTES:
        raise ProtocolError(f"a Merlin acquisition header begins with 'HDR,', this one with {bytes(text[:20])!r}")
    entries: dict[str, str] = {}
    for line in bytes(text[4:]).decode("latin-1").splitlines():
        if line.startswith("End"):
            break
        key, colon, value = line.partition(":")
        if colon:
            entries[key.split("(")[0].strip()] = value.strip()
    return AcquisitionHeader(entries)


@dataclass(frozen=True)
class FrameHeader:
    """What the MQ1 header of one frame says.

    ``sequence``: the frame's number in its acquisition, from 1. ``data_offset``: where the pixels begin, counted from
    ``MQ1``. ``width``, ``height``: as written, which for a quad in raw mode is not the image (see ``detector_shape``).
    ``dtype_name``: U01, U08, U16, U32, U64 or R64. ``layout``: 1x1, 2x2, 2x2G, Nx1 ... ``timestamp_ns``: start of the
    exposure [ns since 1970, of UTC where the header has it, else of local time], None if unreadable. ``shutter_ns``:
    exposure [ns], 0 if unknown. ``counter_depth``: bits, None if unknown. ``thresholds_kev``: the unused ones are 0.
    """

    sequence: int
    data_offset: int
    chips: int
    width: int
    height: int
    dtype_name: str
    layout: str
    timestamp_ns: int | None
    shutter_ns: int
    counter_depth: int | None
    thresholds_kev: tuple[float, ...]

    @property
    def is_raw(self) -> bool:
        """Whether the pixels are packed as the chips deliver them."""
        return self.dtype_name == "R64"

    @property
    def detector_shape(self) -> tuple[int, int]:
        """(rows, columns) of the decoded image. Raises ``ProtocolError`` as ``encoding`` does."""
        return self._format[0]

    @property
    def dtype(self) -> np.dtype:
        """Of the decoded image, little-endian. Raises ``ProtocolError`` as ``encoding`` does."""
        return self._format[1]

    @property
    def encoding(self) -> Encoding:
        """How the pixels are packed. Raises ``ProtocolError`` for a mode that cannot be read, saying what to set."""
        return self._format[2]

    @property
    def payload_bytes(self) -> int:
        """How many bytes of pixels follow the header. Raises ``ProtocolError`` as ``encoding`` does."""
        return self._format[3]

    @cached_property
    def _format(self) -> tuple[tuple[int, int], np.dtype, Encoding, int]:
        shape, pixels = (self.height, self.width), self.height * self.width
        if not self.is_raw:
            if self.dtype_name not in BINARY:
                raise ProtocolError(f"Merlin pixels of type {self.dtype_name!r}; known are {', '.join(BINARY)} and R64")
            dtype = BINARY[self.dtype_name]
            encoding = Encoding.RAW if dtype.itemsize == 1 else Encoding.RAW_BIG_ENDIAN
            return shape, dtype, encoding, pixels * dtype.itemsize
        advice = "set the file format to binary in the Merlin software"
        if self.counter_depth not in RAW_MODES:
            depth = "unknown depth" if self.counter_depth is None else f"{self.counter_depth} bits"
            raise ProtocolError(f"Merlin raw frames of {depth}; only 1, 6 and 12 bits can be read: {advice}")
        single, quad, dtype, bits = RAW_MODES[self.counter_depth]
        if self.layout not in ("1x1", "2x2"):
            raise ProtocolError(f"Merlin raw frames of layout {self.layout!r}; only 1x1 and 2x2 can be read: {advice}")
        is_quad = self.layout == "2x2"
        columns, beyond = divmod(self.width, 4 if is_quad else 1)
        if beyond or columns * bits % 64:  # no word of 8 bytes holds pixels of two rows or chips
            raise ProtocolError(
                f"Merlin raw frames of {self.width}x{self.height} pixels in layout {self.layout}, whose rows do not "
                f"fill words of 8 bytes: {advice}"
            )
        if is_quad:
            shape = (2 * self.height, self.width // 2)
        return shape, dtype, quad if is_quad else single, pixels * bits // 8


def parse_frame_header(data: bytes | memoryview, counter_depth: int | None = None) -> FrameHeader:
    """Read the MQ1 header that ``data`` begins with; what follows it is not looked at.

    ``counter_depth`` (from the acquisition's header) counts where the frame's own does not say. Raises
    ``ProtocolError`` for what is no such header or is cut short.
    """
    start = bytes(data[:64])
    fields = start.split(b",")
    if fields[0] != b"MQ1" or len(fields) < 4:
        raise ProtocolError(f"a Merlin frame begins with 'MQ1,' and its numbers, this one with {start[:24]!r}")
    data_offset = _count(fields[2], "offset", _MAX_HEADER_BYTES)
    if data_offset > len(data):
        raise ProtocolError(f"a Merlin frame header of {data_offset} bytes is cut short after {len(data)}")
    fields = bytes(data[:data_offset]).rstrip(b"\0").split(b",")
    if len(fields) < 8:
        raise ProtocolError(f"a Merlin frame header of {data_offset} bytes has only {len(fields)} fields")
    times, shutter_ns = fields[9:10], 0
    if len(fields) > 10 and (shutter_s := _number(fields[10])) is not None:
        shutter_ns = round(min(shutter_s, 1e9) * 1e9)
    if b"MQ1A" in fields[8:]:
        extension = fields[fields.index(b"MQ1A", 8) + 1 :][:3]
        times = extension[:1] + times
        if len(extension) > 1 and (match := _DURATION_NS.fullmatch(extension[1].strip())):
            shutter_ns = int(match[1])
        if len(extension) > 2 and extension[2].strip().isdigit() and len(extension[2]) < 4:
            counter_depth = int(extension[2])
    return FrameHeader(
        sequence=_count(fields[1], "sequence number", _MAX_FRAMES),
        data_offset=data_offset,
        chips=_count(fields[3], "number of chips", 64),
        width=_count(fields[4], "width", _MAX_SIDE),
        height=_count(fields[5], "height", _MAX_SIDE),
        dtype_name=fields[6][:16].decode("latin-1").strip(),
        layout=fields[7][:16].decode("latin-1").strip(),
        timestamp_ns=next((ns for ns in map(nanoseconds, times) if ns is not None), None),
        shutter_ns=shutter_ns,
        counter_depth=counter_depth,
        thresholds_kev=tuple(_number(value) or 0.0 for value in fields[14:22]),
    )


def nanoseconds(text: bytes) -> int | None:
    """A time such as ``2021-05-07T16:56:59.151103718Z`` in ns since 1970; None for what is none."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        return None
    try:
        if not 1970 <= int(match[1]) < 2200:  # beyond, the nanoseconds do not fit into 64 bits
            return None
        whole = datetime(*map(int, match.groups()[:6]), tzinfo=UTC) - _EPOCH  # type: ignore[misc,arg-type]
    except ValueError:  # the 30th of February
        return None
    return (whole.days * 86400 + whole.seconds) * 10**9 + int((match[7] or b"").ljust(9, b"0"))


def acquisition_header(
    first: FrameHeader, frames: int | None, frames_per_trigger: int, scan_shape: tuple[int, int] | None
) -> bytes:
    """Write an HDR, ``HDR_BYTES`` long, of the acquisition that begins with the frame ``first``."""
    lines = {
        "Time and Date Stamp (day, mnth, yr, hr, min, s)": f"{_calendar(first.timestamp_ns or 0):%d/%m/%Y %H:%M:%S}",
        "Chip ID": ",".join(["simulated"] * first.chips),
        "Chip Type (Medipix 3.0, Medipix 3.1, Medipix 3RX)": "Medipix 3RX",
        "Assembly Size (NX1, 2X2)": f"   {first.layout}",
        "Chip Mode  (SPM, CSM, CM, CSCM)": "SPM",
        "Counter Depth (number)": first.counter_depth,
        "Gain": "SLGM",
        "Active Counters": "Counter 0",
        "Thresholds (keV)": _thresholds(*first.thresholds_kev),
        "Acquisition Type (Normal, Th_scan, Config)": "Normal",
        "Frames in Acquisition (Number)": frames or 0,
        "Frames per Trigger (Number)": frames_per_trigger,
        "Trigger Start (Positive, Negative, Internal)": "Internal",
        "Trigger Stop (Positive, Negative, Internal)": "Internal",
        "Readout System": "Merlin Quad",
        "Software Version": "liveptycho",
    }
    if scan_shape is not None:
        lines |= {"ScanX": scan_shape[1], "ScanY": scan_shape[0]}
    text = "".join(("HDR,\t\r\n", *(f"{key}:\t{value}\r\n" for key, value in lines.items()), "End\t"))
    return text.encode("latin-1").ljust(HDR_BYTES)


def frame_header(header: FrameHeader) -> bytes:
    """Write an MQ1 header, ``data_offset`` bytes long; a time that is None becomes 1970."""
    timestamp_ns = header.timestamp_ns or 0
    time, fraction = f"{_calendar(timestamp_ns):%Y-%m-%d %H:%M:%S}", timestamp_ns % 10**9
    text = (
        f"MQ1,{header.sequence:06d},{header.data_offset:05d},{header.chips:02d},{header.width:04d},{header.height:04d},"
        f"{header.dtype_name},{header.layout:>6},{(1 << header.chips) - 1:02X},{time}.{fraction // 1000:06d},"
        f"{header.shutter_ns * 1e-9:.6f},0,0,0,{_thresholds(*header.thresholds_kev)},{'3RX,' * header.chips}"
        f"MQ1A,{time.replace(' ', 'T')}.{fraction:09d}Z,{header.shutter_ns}ns,{header.counter_depth},"
    )
    return text.encode("latin-1").ljust(header.data_offset, b"\0")


def _calendar(ns: int) -> datetime:
    return _EPOCH + timedelta(seconds=ns // 10**9)


def _thresholds(*values: float) -> str:
    """Eight energies [keV]."""
    return ",".join(f"{value:.6E}".replace("E+0", "E+") for value in (*values, *[0.0] * 8)[:8])


def settings_of(about: AcquisitionHeader, header: FrameHeader) -> dict[str, Any]:
    """The settings that the headers of an acquisition and of its first frame tell, without those that are unknown."""
    known = {
        "detector": "Merlin",
        "detector_number": about.text("Chip ID"),
        "software_version": about.text("Software Version"),
        "began": about.time_stamp,
        "trigger_start": about.text("Trigger Start"),
        "trigger_stop": about.text("Trigger Stop"),
        "counter_depth": header.counter_depth or about.counter_depth,
        "thresholds_kev": about.thresholds_kev or [energy for energy in header.thresholds_kev if energy],
        "count_time_s": header.shutter_ns * 1e-9,
        "frames_per_trigger": about.frames_per_trigger if (about.frames_per_trigger or 1) > 1 else None,
    }
    return {key: value for key, value in known.items() if value}


def _count(field: bytes, what: str, largest: int) -> int:
    field = field.strip()
    if not field.isdigit() or len(field) > 16 or not 1 <= int(field) <= largest:
        raise ProtocolError(f"the {what} in a Merlin frame header must be 1 to {largest}, got {field[:24]!r}")
    return int(field)


def _number(field: str | bytes) -> float | None:
    """A number that is finite and not negative."""
    try:
        value = float(field)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None
