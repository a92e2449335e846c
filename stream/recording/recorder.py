"""Writing a recording while its stream is received. ``stream.recording.layout`` has the layout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from detectors.errors import DataFileError
from detectors.messages import FrameBlock, SeriesEnd, SeriesStart
from stream.files.hdf5 import HDF5_ERRORS, reason
from stream.recording import direct, payload_check
from stream.recording.channels import ChannelWriter, append, growing
from stream.recording.layout import FORMAT, NO_TIME, VERSION, channel_group

#: Readable by HDF5 1.10 (2016) and later; older formats have no SWMR.
_LIBVER = ("v110", "v110")
#: Frames are safe from a dying program after this long [s], this many frames or this many bytes of damaged payloads.
_FLUSH_S = 1.0
_FLUSH_FRAMES = 16384
_FLUSH_DAMAGED_BYTES = 8 << 20


class Recorder:
    """Writes one series to a new file. Use it as a context manager, or call :meth:`close`.

    ``path``: the file; ``start``: the series; ``protocol``: name of its stream protocol; ``program_version``: of the
    writer. An existing file is refused unless ``overwrite``. Every method blocks and none is safe to call from two
    threads at a time: use one worker thread. Raises ``DataFileError`` when the file cannot be made.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        start: SeriesStart,
        protocol: str,
        program_version: str,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.start = start
        self.frames = 0
        """frames written, damaged ones among them"""
        self.bytes = 0
        """size of their payloads"""
        self.damaged = 0
        """frames with a payload that was not one whole frame"""
        self._failure: str | None = None
        self._undecodable = 0
        self._index: list[np.ndarray] = []
        self._times: list[np.ndarray] = []
        self._exposed: list[np.ndarray] = []
        self._waiting = 0
        self._flushed = time.monotonic()
        payload_check.prepare()
        direct.prepare()
        if start.frame_bytes >= 1 << 32:
            raise DataFileError(
                f"{self.path}: a frame of {start.frame_bytes / 1e9:.0f} GB cannot be recorded; the detector's shape "
                f"{start.detector_shape} is hardly meant"
            )
        existed = self.path.exists()
        try:
            # Without a chunk cache, what does not fit on the disk fails at the write; HDF5 crashes when it fails later,
            # at the closing of a dataset.
            self._file = h5py.File(self.path, "w" if overwrite else "x", libver=_LIBVER, rdcc_nbytes=0)
        except HDF5_ERRORS as error:
            raise DataFileError(f"{self.path}: {_why_not_created(self.path, error)}") from error
        try:
            self._lay_out(protocol, program_version)
            self._channels = [
                ChannelWriter(self._file[channel_group(number)], start) for number in range(max(1, len(start.channels)))
            ]
            self._file.swmr_mode = True
            self._flush()
        except HDF5_ERRORS as error:
            self._abandon()
            if not existed:
                self.path.unlink(missing_ok=True)
            raise DataFileError(f"{self.path}: the recording cannot be started ({_why(error)})") from error

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, block: FrameBlock) -> None:
        """Append the frames of ``block``, which must belong to this series, with its arrival time.

        It holds every channel that was announced. The slabs are read during the call only. A payload that is not one
        whole frame is kept beside the others, see the layout. Raises ``DataFileError`` when the file cannot take the
        frames (disk full, for one), from then on at every call: what was flushed before remains readable.
        """
        if block.series != self.start.series:
            raise ValueError(f"a block of series {block.series!r} in the recording of series {self.start.series!r}")
        blocks = (block, *block.others)
        if len(blocks) != len(self._channels) or {len(other) for other in blocks} != {len(block)}:
            raise ValueError(f"frames of {len(blocks)} channels in a recording of {len(self._channels)}")
        self._require_open()
        try:
            whole = [channel.write(self.frames, each) for channel, each in zip(self._channels, blocks, strict=True)]
            self.frames += len(block)
            self.bytes += block.payload_bytes
            self.damaged += int(np.count_nonzero(~np.all(whole, axis=0)))
            self._index.append(np.array(block.indices, np.int64))
            self._times.append(np.full(len(block), block.time_ns, np.int64))
            exposed = np.full(len(block), NO_TIME) if block.exposed_ns is None else block.exposed_ns
            self._exposed.append(np.array(exposed, np.int64))
            self._waiting += len(block)
            if (
                self._waiting >= _FLUSH_FRAMES
                or time.monotonic() - self._flushed >= _FLUSH_S
                or sum(channel.damaged_bytes for channel in self._channels) >= _FLUSH_DAMAGED_BYTES
            ):
                self._flush()
        except HDF5_ERRORS as error:
            raise self._failed(error) from error

    def undecodable(self, messages: int = 1) -> None:
        """Count messages that the protocol could not read; they themselves are not kept."""
        self._undecodable += messages

    def flush(self) -> None:
        """Make everything so far safe from the end of this program. :meth:`write` does it once a second by itself, so
        this is for a stream that pauses. Raises ``DataFileError``.
        """
        self._require_open()
        try:
            self._flush()
        except HDF5_ERRORS as error:
            raise self._failed(error) from error

    def end(self, end: SeriesEnd | None) -> None:
        """The series is over: keep its end message; None when none came, and the recording stays incomplete.

        Frames that come late can still be written. Raises ``DataFileError``.
        """
        self._require_open()
        try:
            if end is not None and not self._file.attrs["complete"]:
                self._append_message("end", end.header)
                self._file.attrs.modify("complete", np.bool_(True))
            self._flush()
        except HDF5_ERRORS as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Write what is left and close the file. Harmless when it is closed already.

        Raises ``DataFileError`` when that fails, unless an earlier call has raised already.
        """
        if not self._file:
            return
        try:
            if self._failure is None:
                self._flush()
                self._file.close()
        except HDF5_ERRORS as error:
            raise self._failed(error) from error
        finally:
            self._abandon()

    def _lay_out(self, protocol: str, program_version: str) -> None:
        """Make every attribute and dataset, none of which can be added in SWMR mode."""
        start, file = self.start, self._file
        file.attrs.update(
            {
                "format": FORMAT,
                "version": VERSION,
                "protocol": protocol,
                "program_version": program_version,
                "series": json.dumps(start.series),
                "settings": json.dumps(dict(start.settings), default=_jsonable, skipkeys=True),
                "channels": json.dumps(start.channels),
                "maximum_is_masked": np.bool_(start.maximum_is_masked),
                "complete": np.bool_(False),
                "undecodable_messages": 0,
                "flushed_bytes": 0,
            }
        )
        if start.scan_shape is not None:
            file.attrs["scan_shape"] = np.array(start.scan_shape, np.int64)
        if start.frames is not None:
            file.attrs["frames_announced"] = start.frames
        if start.pixel_mask is not None:
            file["pixel_mask"] = start.pixel_mask.astype(bool)
        if start.flatfield is not None:
            file["flatfield"] = start.flatfield.astype(np.float32)
        for name, dtype in (
            ("frame_index", np.int64), ("arrival_time_ns", np.int64),
            ("messages/start", np.uint8), ("messages/start_sizes", np.int64),
            ("messages/end", np.uint8), ("messages/end_sizes", np.int64),
        ):  # fmt: skip
            growing(file, name, dtype)
        growing(file, "exposed_ns", np.int64, fillvalue=NO_TIME)
        self._append_message("start", start.header)
        for number in range(max(1, len(start.channels))):
            ChannelWriter.lay_out(file.require_group(channel_group(number)), start)

    def _flush(self) -> None:
        for channel in self._channels:
            channel.flush()
        if self._file.attrs["undecodable_messages"] != self._undecodable:
            self._file.attrs.modify("undecodable_messages", self._undecodable)
        if self._waiting:
            append(self._file["arrival_time_ns"], np.concatenate(self._times))
            self._append_exposed(np.concatenate(self._exposed))
            # The frames must be there before the index says so, or a reader would find frames that are not.
            self._file.flush()
            append(self._file["frame_index"], np.concatenate(self._index))
            self._index.clear()
            self._times.clear()
            self._exposed.clear()
            self._waiting = 0
        self._file.flush()
        self._file.attrs.modify("flushed_bytes", self.path.stat().st_size)
        self._file.flush()
        self._flushed = time.monotonic()

    def _append_exposed(self, exposed: np.ndarray) -> None:
        told = np.flatnonzero(exposed != NO_TIME)
        if len(told):
            dataset, first = self._file["exposed_ns"], self.frames - len(exposed)
            dataset.resize(first + told[-1] + 1, axis=0)
            dataset[first:] = exposed[: told[-1] + 1]

    def _append_message(self, name: str, parts: tuple[bytes, ...]) -> None:
        append(self._file[f"messages/{name}"], np.frombuffer(b"".join(parts), np.uint8))
        append(self._file[f"messages/{name}_sizes"], np.array([len(part) for part in parts], np.int64))

    def _require_open(self) -> None:
        if self._failure is not None:
            raise DataFileError(self._failure)
        if not self._file:
            raise ValueError("the recording is closed")

    def _failed(self, error: BaseException) -> DataFileError:
        self._failure = (
            f"{self.path}: recording failed ({_why(error)}) after {self.frames} frames; what was written up to about a "
            "second before remains readable. Free some space or record to another disk"
        )
        return DataFileError(self._failure)

    def _abandon(self) -> None:
        """Close the file after a failure without changing it any more, so that it stays as it was last flushed."""
        if not self._file:
            return
        with contextlib.suppress(*HDF5_ERRORS):
            # HDF5 would try again to write what did not fit, and mark the file as finished: let it write to nowhere.
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, self._file.id.get_vfd_handle())
            os.close(nowhere)
        for _ in range(2):  # where the first call fails, the second still lets go of the file
            with contextlib.suppress(*HDF5_ERRORS):
                self._file.close()


def _jsonable(value: Any) -> Any:
    """Settings that JSON does not know: arrays and NumPy numbers as numbers, anything else as its text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _why(error: BaseException) -> str:
    """HDF5's paragraph about a failed write, or the operating system's few words in it."""
    text = reason(error)
    found = re.search(r"error message = '([^']+)'", text)
    return found[1] if found else text


def _why_not_created(path: Path, error: BaseException) -> str:
    parent = path.parent
    if path.is_dir():
        return "a file to record to was expected, this is a directory; name a file in it"
    if isinstance(error, FileExistsError) or "file exists" in str(error).lower():
        return "the file exists and a recording does not replace it; choose another name or allow overwriting"
    if not parent.is_dir():
        return f"there is no directory {parent}; make it, or record elsewhere"
    if isinstance(error, PermissionError) or "Permission denied" in str(error):
        return f"writing to {parent} is not permitted; change its permissions or record elsewhere"
    if isinstance(error, BlockingIOError):
        return "another program has this file open; close it there or choose another name"
    return f"the file cannot be made ({_why(error)}); check the disk or record elsewhere"
