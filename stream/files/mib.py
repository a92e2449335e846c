"""Merlin's files: ``.mib`` (the header of a frame, its pixels, the next header, ...) with a ``.hdr`` beside it.

The pixels are handed on as they lie in the file, which is memory-mapped. Rows come in the file's order: RosettaSciIO
turns them upside down, LiberTEM does not; the ``orientation`` setting is for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from detectors import codec
from detectors.errors import DataFileError, ProtocolError
from detectors.messages import FrameBlock
from detectors.protocols.merlin_headers import (
    AcquisitionHeader,
    nanoseconds,
    parse_acquisition_header,
    parse_frame_header,
    settings_of,
)
from stream.files.dataset import BLOCK_BYTES, Dataset4D, Part, most_frames, spans

#: What a frame begins with, and the most digits of its number that are believed.
_MAGIC, _NUMBER_DIGITS = b"MQ1,", 15
_TIME_FIELD = 9


def is_mib(beginning: bytes) -> bool:
    """Whether a file that begins so is one of Merlin's."""
    return beginning.startswith((_MAGIC, b"HDR,"))


class MibFrames(Dataset4D):
    """A ``.mib`` file (or the ``.hdr`` that belongs to it)."""

    layout = "Merlin .mib"
    protocol = "merlin"
    as_stored = True

    def __init__(self, path: Path) -> None:
        """Raises ``DataFileError`` for a file that holds no frame that can be read."""
        self.path = path.with_suffix(".mib") if path.suffix.lower() == ".hdr" else path
        about = _beside(self.path)
        try:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise DataFileError(f"{self.path}: it cannot be read ({error}); check the path, or copy it again") from None
        try:
            header = parse_frame_header(self._bytes[: 1 << 16].data, about.counter_depth)
            self.encoding, self._payload_bytes = header.encoding, header.payload_bytes
            shape, dtype = header.detector_shape, header.dtype
        except ProtocolError as error:
            raise DataFileError(f"{self.path}: {error}") from None
        self._at, self._stride = header.data_offset, header.data_offset + self._payload_bytes
        self._first_number = header.sequence
        frames, rest = divmod(len(self._bytes), self._stride)
        if not frames:
            raise DataFileError(
                f"{self.path}: a frame has {self._stride} bytes, the file has {rest}; it is truncated, copy it again"
            )
        self._set_frames((frames, *shape), dtype)
        notes = [f"the last frame is cut short after {rest} of {self._stride} bytes and is left out"] if rest else []
        if about.frames is not None and about.frames != frames:
            notes.append(f"the acquisition was set to {about.frames} frames, the file has {frames}")
        self.notes = tuple(notes)
        self.settings = settings_of(about, header)
        self.scan_shape = about.scan_shape
        per_trigger = about.frames_per_trigger or 1
        if self.scan_shape is None and 1 < per_trigger < frames and frames % per_trigger == 0:
            self.scan_shape = (frames // per_trigger, per_trigger)

    def parts(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Part]:
        for start, stop in spans(self.frames, 1, most_frames(self.detector_shape, self.dtype.itemsize, max_bytes)):
            yield Part(start, slice(start, stop), (stop - start, *self.detector_shape))

    def read(self, part: Part) -> tuple[int, np.ndarray]:
        frames = np.empty(part.shape, self.dtype)
        for frame, number in zip(frames, range(part.where.start, part.where.stop), strict=True):
            start = number * self._stride + self._at
            payload = self._bytes[start : start + self._payload_bytes]
            frame[...] = codec.decode(payload, self.encoding, self.detector_shape, self.dtype)
        return part.first, frames

    def packed_blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[FrameBlock]:
        for part in self.parts(max_bytes):
            start, stop = part.where.start, part.where.stop
            slab = np.asarray(self._bytes[start * self._stride : stop * self._stride])
            heads = self._heads(slab, start)
            offsets = np.arange(stop - start) * self._stride + self._at
            sizes = np.full(stop - start, self._payload_bytes)
            indices = self._indices(heads, start)
            yield FrameBlock("file", self.encoding, indices, offsets, sizes, slab, 0, _exposed_ns(heads))

    def _heads(self, slab: np.ndarray, first: int) -> list[bytes]:
        """The headers in ``slab``. Raises ``DataFileError`` where there is no frame."""
        texts = np.ascontiguousarray(slab.reshape(-1, self._stride)[:, : self._at]).tobytes()
        heads = [texts[i : i + self._at] for i in range(0, len(texts), self._at)]
        for number, head in enumerate(heads, first):
            if not head.startswith(_MAGIC):
                raise DataFileError(
                    f"{self.path}: frame {number} does not begin with a Merlin header; the frames before it have "
                    "another size, or the file is damaged"
                )
        return heads

    def _indices(self, heads: list[bytes], first: int) -> np.ndarray:
        """The place of each frame in its series: from Merlin's own numbers where they only leave frames out, else as
        they follow each other in the file."""
        places = np.arange(first, first + len(heads))
        numbers = [head.split(b",", 2)[1] for head in heads]
        if not all(number.isdigit() and len(number) <= _NUMBER_DIGITS for number in numbers):
            return places
        indices = np.array([int(number) for number in numbers]) - self._first_number
        return indices if (np.diff(indices) > 0).all() and (indices >= places).all() else places

    def _storage(self) -> str:
        return "memory-mapped"


def _beside(path: Path) -> AcquisitionHeader:
    """What the ``.hdr`` file says, if there is one."""
    for suffix in (".hdr", ".HDR"):
        try:
            return parse_acquisition_header(path.with_suffix(suffix).read_bytes()[: 1 << 16])
        except FileNotFoundError:
            continue
        except (OSError, ProtocolError) as error:
            raise DataFileError(
                f"{path.with_suffix(suffix)}: the header of {path.name} cannot be read ({error}); remove or mend it"
            ) from None
    return AcquisitionHeader({})


def _exposed_ns(heads: list[bytes]) -> np.ndarray | None:
    """When each exposure began [ns], as ``parse_frame_header`` reads it; None where a header does not say."""
    times = []
    for head in heads:
        text = head.partition(b",MQ1A,")[2].split(b",", 1)[0]
        if not text:
            text = b"".join(head.split(b",", _TIME_FIELD + 1)[_TIME_FIELD : _TIME_FIELD + 1])
        if (time_ns := nanoseconds(text)) is None:
            return None
        times.append(time_ns)
    return np.array(times, np.int64)
