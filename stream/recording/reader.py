"""Reading a recording: the frames as they came, for replay and reconstruction. See ``stream.recording.layout``.

A recording that nobody finished (the program died, the disk was full, it is still being written) is read up to its last
flush.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from detectors.errors import DataFileError
from detectors.messages import Encoding, FrameBlock, SeriesEnd, SeriesStart
from stream.files.hdf5 import HDF5_ERRORS, explained, open_file
from stream.recording.channels import ChannelReader
from stream.recording.layout import FILTERS, FORMAT, NO_TIME, VERSION, channel_group

#: Defaults of ``Recording.blocks``.
BLOCK_BYTES = 32 << 20
BLOCK_FRAMES = 512

_DTYPES = {np.dtype(f"<{code}") for code in ("u1", "u2", "u4", "f4")}

#: Rows of the per-frame arrays that are read at a time.
_ROWS_AT_A_TIME = 1 << 16

#: HDF5's superblock, version 3: signature, version, consistency flags, end of file (HDF5 File Format, section II.A).
_SUPERBLOCK = struct.Struct("<8sB2xB16xQ")
_SWMR_WRITING = 4

_TRUNCATED = "{path}: the file ends before what was recorded; it was truncated, copy it again"


def is_recording(path: str | PathLike[str]) -> bool:
    """Whether ``path`` is a recording by its mark. Reads a few kB and never raises: whatever cannot be read is none."""
    try:
        file, _ = _open(Path(path))
    except DataFileError:
        return False
    with file:
        try:
            return bool(file.attrs.get("format") == FORMAT)
        except HDF5_ERRORS:
            return False


def open_recording(path: str | PathLike[str]) -> Recording:
    """Open a recording; the caller closes it.

    Raises ``DataFileError`` when there is no such file, it is not a recording, or it is truncated or damaged.
    """
    path = Path(path)
    file, unfinished = _open(path)
    try:
        with explained(path, "reading the recording"):
            _require_ours(path, file)
            if unfinished and path.stat().st_size < file.attrs["flushed_bytes"]:
                raise DataFileError(_TRUNCATED.format(path=path))
            return Recording(path, file)
    except BaseException:
        file.close()
        raise


class Recording:
    """An open recording. Use it as a context manager, or call :meth:`close`; made by :func:`open_recording`.

    ``path``; ``start``: the series as it was announced, with the raw header; ``frames``: how many were recorded,
    duplicates and damaged ones among them; ``protocol``, ``program_version``: of the recorded stream and the recorder;
    ``complete``: whether the end message came; ``undecodable_messages``: how many came that the protocol could not read
    (they were not kept); ``damaged_frames``: frames with a payload that is not one whole frame; ``messages_start``,
    ``messages_end``: raw message parts, none where nothing came.
    """

    def __init__(self, path: Path, file: Any) -> None:
        """Take over the open ``file``, whose layout is known to be right."""
        attrs, self._file, self.path = file.attrs, file, path
        self.protocol, self.program_version = str(attrs["protocol"]), str(attrs["program_version"])
        self.complete = bool(attrs["complete"])
        self.undecodable_messages = int(attrs["undecodable_messages"])
        self.frames = len(file["frame_index"])
        self.messages_start, self.messages_end = self._message("start"), self._message("end")
        scan, announced = attrs.get("scan_shape"), attrs.get("frames_announced")
        channels = _channels(file)
        self._channels = [
            ChannelReader(path, file[channel_group(number)], self.frames) for number in range(max(1, len(channels)))
        ]
        data = file["frames"]
        self.start = SeriesStart(
            json.loads(attrs["series"]),
            (data.shape[1], data.shape[2]),
            data.dtype.newbyteorder("<"),
            None if scan is None else (int(scan[0]), int(scan[1])),
            None if announced is None else int(announced),
            json.loads(attrs["settings"]),
            self.messages_start,
            channels,
            file["pixel_mask"][...] if "pixel_mask" in file else None,
            file["flatfield"][...] if "flatfield" in file else None,
            bool(attrs["maximum_is_masked"]),
        )
        self.damaged_frames = len(set().union(*(channel.damaged for channel in self._channels)))

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Harmless when it is closed already."""
        self._file.close()

    @property
    def detector_shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.start.detector_shape

    @property
    def dtype(self) -> np.dtype:
        """of a frame, little-endian"""
        return self.start.dtype

    @property
    def scan_shape(self) -> tuple[int, int] | None:
        """(rows, columns), None where the stream did not say"""
        return self.start.scan_shape

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration keys that the stream knew."""
        return dict(self.start.settings)

    @property
    def end(self) -> SeriesEnd | None:
        """The end of the series; None when no end message came."""
        return SeriesEnd(self.start.series, self.messages_end) if self.complete else None

    @property
    def duration_s(self) -> float:
        """From the arrival of the first frame to that of the last one [s]."""
        if self.frames == 0:
            return 0.0
        times = self._file["arrival_time_ns"]
        with explained(self.path, "reading the arrival times"):
            return float(int(times[self.frames - 1]) - int(times[0])) / 1e9

    def blocks(
        self, max_bytes: int = BLOCK_BYTES, max_frames: int = BLOCK_FRAMES, *, keep_batches: bool = True
    ) -> Iterator[FrameBlock]:
        """All frames in order of arrival, their payloads packed as they came, each block in a slab of its own.

        A block holds at most ``max_frames`` frames and ``max_bytes`` bytes (but at least one frame) with every channel,
        all of one encoding a channel. With ``keep_batches`` it also holds frames of one arrival time only, as a replay
        in recorded time needs; without, blocks are as full as they can be and ``time_ns`` is the first frame's.
        Raises ``DataFileError`` naming the frame that cannot be read.
        """
        pending: list[_Row] = []
        size = 0
        for row in self._rows():
            if pending and (
                row.kind != pending[0].kind
                or len(pending) >= max_frames
                or size + row.payload_bytes > max_bytes
                or (keep_batches and row.time_ns != pending[0].time_ns)
            ):
                yield self._block(pending)
                pending, size = [], 0
            pending.append(row)
            size += row.payload_bytes
        if pending:
            yield self._block(pending)

    def describe(self) -> list[tuple[str, str]]:
        """What the file holds, as (label, text) rows for a table."""
        start, frame_bytes = self.start, self.start.frame_bytes
        announced = "" if start.frames is None else f" of {start.frames} announced"
        stored = self.path.stat().st_size
        rows, columns = self.detector_shape
        ratio = f", {stored / (self.frames * frame_bytes):.3g} of the pixels' size" if self.frames else ""
        described = [
            ("file", str(self.path)),
            ("layout", f"{FORMAT}, version {VERSION}, by liveptycho {self.program_version}"),
            ("stream", f"{self.protocol}, series {start.series}"),
            ("frames", f"{self.frames}{announced}"),
            ("scan", f"{self.scan_shape[0]} x {self.scan_shape[1]} positions" if self.scan_shape else "not given"),
            ("detector", f"{rows} x {columns} pixels"),
            ("pixel type", self.dtype.name),
            *([("channels", ", ".join(start.channels))] if start.channels else []),
            ("size", f"{stored / 1e6:.4g} MB{ratio}"),
            ("duration", f"{self.duration_s:.4g} s"),
            ("end", "the end message came" if self.complete else "no end message: the series was cut off"),
        ]
        if self.damaged_frames or self.undecodable_messages:
            damaged = f"{self.damaged_frames} damaged frames (kept)"
            described.append(("note", f"{damaged}, {self.undecodable_messages} undecodable messages (not kept)"))
        described.extend((key, json.dumps(value, ensure_ascii=False)[:60]) for key, value in self.settings.items())
        return described

    def _message(self, name: str) -> tuple[bytes, ...]:
        data = self._file[f"messages/{name}"][...].tobytes()
        stops = np.cumsum(self._file[f"messages/{name}_sizes"][...]).tolist()
        return tuple(data[start:stop] for start, stop in zip([0, *stops], stops, strict=False))

    def _rows(self) -> Iterator[_Row]:
        for first in range(0, self.frames, _ROWS_AT_A_TIME):
            stop = min(first + _ROWS_AT_A_TIME, self.frames)
            with explained(self.path, f"reading the numbers and times of frames {first} to {stop - 1}"):
                indices = self._file["frame_index"][first:stop].tolist()
                times = self._file["arrival_time_ns"][first:stop].tolist()
                exposed = self._file["exposed_ns"][first:stop].tolist()
                encodings = zip(*(channel.encodings(first, stop) for channel in self._channels), strict=True)
            exposed += [NO_TIME] * (stop - first - len(exposed))
            columns = zip(range(first, stop), indices, times, exposed, encodings, strict=True)
            for at, index, time_ns, exposed_ns, its_encodings in columns:
                payloads = [c.payload(at, encoding) for c, encoding in zip(self._channels, its_encodings, strict=True)]
                yield _Row(index, time_ns, exposed_ns, its_encodings, payloads)

    def _block(self, rows: list[_Row]) -> FrameBlock:
        indices = np.array([row.index for row in rows], np.int64)
        exposed = None
        if rows[0].exposed_ns != NO_TIME:
            exposed = np.array([row.exposed_ns for row in rows], np.int64)
        blocks = []
        for number, encoding in enumerate(rows[0].encodings):
            payloads = [row.payloads[number] for row in rows]
            sizes = np.array([len(payload) for payload in payloads], np.int64)
            slab = np.frombuffer(b"".join(payloads), np.uint8)
            where = indices, np.cumsum(sizes) - sizes, sizes, slab, rows[0].time_ns, exposed
            blocks.append(FrameBlock(self.start.series, encoding, *where))
        return replace(blocks[0], others=tuple(blocks[1:]))


@dataclass(slots=True)
class _Row:
    """A frame: encodings and payloads of its channels."""

    index: int
    time_ns: int
    exposed_ns: int
    encodings: tuple[Encoding, ...]
    payloads: list[bytes]

    @property
    def kind(self) -> tuple[tuple[Encoding, ...], bool]:
        """What the frames of a block have in common."""
        return self.encodings, self.exposed_ns == NO_TIME

    @property
    def payload_bytes(self) -> int:
        return sum(map(len, self.payloads))


def _open(path: Path) -> tuple[Any, bool]:
    """The open ``h5py.File``, and whether its writer has not finished it. Raises ``DataFileError``."""
    try:
        return open_file(path), False
    except DataFileError:
        least = _unfinished_bytes(path)
        if least is None:
            raise
        # In this mode HDF5 reads zeros beyond the end of the file, and waits for ever for metadata to become right.
        if path.stat().st_size < least:
            raise DataFileError(_TRUNCATED.format(path=path)) from None
        try:
            return h5py.File(path, "r", swmr=True), True
        except HDF5_ERRORS:
            pass
        raise


def _unfinished_bytes(path: Path) -> int | None:
    """The least size of a file that was opened for SWMR writing and not closed since; None for any other file."""
    try:
        with path.open("rb") as file:
            block = file.read(_SUPERBLOCK.size)
    except OSError:
        return None
    if len(block) < _SUPERBLOCK.size:
        return None
    signature, version, flags, end = _SUPERBLOCK.unpack(block)
    return end if signature == b"\x89HDF\r\n\x1a\n" and version == 3 and flags & _SWMR_WRITING else None


def _require_ours(path: Path, file: Any) -> None:
    """Raise ``DataFileError`` unless ``file`` is a recording that this version reads."""
    if file.attrs.get("format") != FORMAT:
        raise DataFileError(f"{path}: a recording by liveptycho was expected, this is another HDF5 file")
    version = file.attrs.get("version")
    if version != VERSION:
        raise DataFileError(
            f"{path}: the recording has version {version} of its format, this program reads version {VERSION}; "
            "use a newer liveptycho"
        )
    frames = len(file["frame_index"])
    for number in range(max(1, len(_channels(file)))):
        group = file[channel_group(number)]
        data = group["frames"]
        properties = data.id.get_create_plist()
        filters = tuple(properties.get_filter(i)[0] for i in range(properties.get_nfilters()))
        like = file["frames"]
        if (
            (data.ndim, data.chunks, filters) != (3, (1, *data.shape[1:]), FILTERS)
            or data.dtype not in _DTYPES
            or (data.shape[1:], data.dtype) != (like.shape[1:], like.dtype)
        ):
            raise DataFileError(
                f"{path}: {data.name} is not laid out as recorded (chunks {data.chunks} of {data.dtype}, filters "
                f"{filters}); another program has changed it, use the file as recorded"
            )
        if frames > min(len(file["arrival_time_ns"]), len(data), len(group["encoding"])):
            raise DataFileError(f"{path}: the recording's arrays have different lengths; it is damaged, copy it again")


def _channels(file: Any) -> tuple[str, ...]:
    """Names of the channels, none where there is but one without a name."""
    return tuple(map(str, json.loads(file.attrs["channels"])))
