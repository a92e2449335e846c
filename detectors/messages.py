"""What every stream protocol is translated into: start of a series, blocks of frames, end of a series.

A protocol module turns received bytes into these (sans-IO: it owns no socket), and the reconstruction knows nothing
else of any vendor. Payloads are never copied here: a block of frames points into the slab it was received in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import numpy as np

SeriesId = int | str


class Encoding(IntEnum):
    """How one frame's payload is packed. The numbers are shared with the compiled decoder."""

    RAW = 0
    """little-endian pixels, row after row"""
    LZ4 = 1
    """one bare LZ4 block of the raw pixels"""
    BSLZ4 = 2
    """bitshuffle + LZ4 as in an HDF5 chunk: u64 BE size, u32 BE block size, then u32 BE length + LZ4 block, ..."""


@dataclass(frozen=True)
class ReceivedBatch:
    """Message parts as they came from the socket, end to end in one slab.

    ``slab``: uint8, 1-D. ``offsets``, ``lengths``: int64 (parts,), byte ranges in the slab. ``last``: bool (parts,),
    True where a part ends its message; a message never spans two batches. ``time_ns``: arrival of the batch, ns since
    the epoch. ``socket_index`` says which of several sockets it came from.
    """

    slab: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    last: np.ndarray
    time_ns: int
    socket_index: int = 0

    @classmethod
    def from_messages(cls, messages: Iterable[Sequence[bytes]], time_ns: int = 0) -> ReceivedBatch:
        """Pack messages (each a sequence of parts) as the receiver would: for tests, replay and files."""
        parts = [(bytes(part), i == len(message) - 1) for message in messages for i, part in enumerate(message)]
        lengths = np.array([len(part) for part, _ in parts], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if parts else lengths
        slab = np.frombuffer(b"".join(part for part, _ in parts), dtype=np.uint8)
        return cls(slab, offsets, lengths, np.array([is_last for _, is_last in parts], dtype=bool), time_ns)

    def part(self, index: int) -> memoryview:
        """The bytes of one part, without a copy."""
        start = int(self.offsets[index])
        return self.slab[start : start + int(self.lengths[index])].data

    def messages(self) -> Iterator[range]:
        """The part numbers of each message, in order of arrival."""
        first = 0
        for stop in (np.flatnonzero(self.last) + 1).tolist():
            yield range(first, stop)
            first = stop


@dataclass(frozen=True)
class SeriesStart:
    """A series begins. What a sender does not know is None.

    ``detector_shape`` (rows, columns); ``dtype`` of a frame, little-endian; ``scan_shape`` (rows, columns);
    ``frames``: how many are announced, None for an endless series; ``settings``: configuration keys that the stream
    itself knows (``energy_kev`` ...); ``header``: the message as received, for recordings.
    """

    series: SeriesId
    detector_shape: tuple[int, int]
    dtype: np.dtype
    scan_shape: tuple[int, int] | None = None
    frames: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    header: tuple[bytes, ...] = ()

    @property
    def frame_bytes(self) -> int:
        """Size of one decoded frame in bytes."""
        return self.detector_shape[0] * self.detector_shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class FrameBlock:
    """Frames of one series and one encoding, in order of arrival.

    ``indices``: int64 (frames,), each frame's number in its series, which alone decides its scan position.
    ``offsets``, ``sizes``: int64 (frames,), byte ranges of the payloads in ``slab`` (uint8, 1-D). ``time_ns``: arrival.
    """

    series: SeriesId
    encoding: Encoding
    indices: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    slab: np.ndarray
    time_ns: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, which: np.ndarray) -> FrameBlock:
        """The frames at ``which`` (an index or boolean array), still in the same slab."""
        return FrameBlock(
            self.series,
            self.encoding,
            self.indices[which],
            self.offsets[which],
            self.sizes[which],
            self.slab,
            self.time_ns,
        )

    def compact(self) -> FrameBlock:
        """The same frames in a slab of their own: for whoever must hold them longer than the receiver's slab lives."""
        slab = np.concatenate([self.slab[o : o + n] for o, n in zip(self.offsets, self.sizes, strict=True)])
        offsets = np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)
        return FrameBlock(self.series, self.encoding, self.indices, offsets, self.sizes, slab, self.time_ns)


@dataclass(frozen=True)
class SeriesEnd:
    """A series is over; ``header`` is the message as received, for recordings."""

    series: SeriesId
    header: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Undecodable:
    """A message that breaks the protocol: counted and shown, never fatal. ``frames`` is how many it claimed to hold."""

    reason: str
    frames: int = 1


Message = SeriesStart | FrameBlock | SeriesEnd | Undecodable


class StreamDecoder(Protocol):
    """Bytes in, messages out. One instance follows one stream; it may remember earlier parts, but owns no socket."""

    def feed(self, batch: ReceivedBatch) -> list[Message]:
        """Translate a batch, in order of arrival. Never raises on malformed input: that is an ``Undecodable``."""
        ...


class StreamEncoder(Protocol):
    """The sending half of a protocol, for the simulated detector and for replay: messages as lists of parts."""

    def start(self, start: SeriesStart) -> list[bytes]: ...

    def frames(
        self, series: SeriesId, first: int, payloads: Sequence[bytes | memoryview], encoding: Encoding
    ) -> list[bytes | memoryview]:
        """One message with consecutive frames ``first``, ``first + 1``, ..."""
        ...

    def end(self, series: SeriesId) -> list[bytes]: ...
