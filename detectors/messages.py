"""What every stream protocol is translated into: start of a series, blocks of frames, end of a series.

A protocol module turns received bytes into these (sans-IO: it owns no socket), and the reconstruction knows nothing
else of any vendor. Payloads are never copied here: a block of frames points into the slab it was received in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    LZ4_BLOCKS = 3
    """LZ4 as in an HDF5 chunk: the same framing as BSLZ4 without the shuffling; a block as long as its contents is not
    packed"""
    RAW_BIG_ENDIAN = 4
    """big-endian pixels, row after row"""
    MERLIN_1BIT = 5
    """Merlin's raw 1-bit frames: 64 pixels in 8 big-endian bytes, the first one in the lowest bit"""
    MERLIN_6BIT = 6
    """... 6-bit: 8 pixels in 8 bytes, reversed"""
    MERLIN_12BIT = 7
    """... 12-bit: 4 big-endian 16-bit pixels in 8 bytes, reversed"""
    MERLIN_QUAD_1BIT = 8
    """the same of four chips, a row of each side by side (see ``detectors.protocols.merlin``)"""
    MERLIN_QUAD_6BIT = 9
    MERLIN_QUAD_12BIT = 10


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
class Announced:
    """A series was announced; its ``SeriesStart`` follows with its first frame, which tells what is still unknown."""

    series: SeriesId


@dataclass(frozen=True)
class SeriesStart:
    """A series begins. What a sender does not know is None.

    ``detector_shape`` (rows, columns); ``dtype`` of a decoded frame, little-endian; ``scan_shape`` (rows, columns);
    ``frames``: how many are announced, None for an endless series; ``settings``: configuration keys that the stream
    itself knows (``energy_kev`` ...), others are kept for the record; ``header``: the message as received, for
    recordings. ``channels``: names of the thresholds that each frame comes with, empty where there is but one and it
    has no name. ``pixel_mask``: bool ``detector_shape``, True = good; ``flatfield``: float32 ``detector_shape``.
    ``maximum_is_masked``: the dtype's largest value stands for "no count" (gap, bad or overflown pixel).
    """

    series: SeriesId
    detector_shape: tuple[int, int]
    dtype: np.dtype
    scan_shape: tuple[int, int] | None = None
    frames: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    header: tuple[bytes, ...] = ()
    channels: tuple[str, ...] = ()
    pixel_mask: np.ndarray | None = field(default=None, compare=False)
    flatfield: np.ndarray | None = field(default=None, compare=False)
    maximum_is_masked: bool = False

    @property
    def frame_bytes(self) -> int:
        """Size of one decoded frame in bytes."""
        return self.detector_shape[0] * self.detector_shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class FrameBlock:
    """Frames of one series and one encoding, in order of arrival.

    ``indices``: int64 (frames,), each frame's number in its series, which alone decides its scan position.
    ``offsets``, ``sizes``: int64 (frames,), byte ranges of the payloads in ``slab`` (uint8, 1-D). ``time_ns``: arrival.
    ``exposed_ns``: int64 (frames,), when each exposure began by the detector's clock [ns], of which only differences
    mean anything; None where the stream does not say. ``others``: the same frames as seen by the other channels, in the
    order of ``SeriesStart.channels[1:]``. ``minus``: what is to be subtracted from each frame, never below 0 (for the
    difference of two channels that the detector did not make itself).
    """

    series: SeriesId
    encoding: Encoding
    indices: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    slab: np.ndarray
    time_ns: int = 0
    exposed_ns: np.ndarray | None = None
    others: tuple[FrameBlock, ...] = ()
    minus: FrameBlock | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, which: np.ndarray) -> FrameBlock:
        """The frames at ``which`` (an index or boolean array), still in the same slab."""
        return replace(
            self,
            indices=self.indices[which],
            offsets=self.offsets[which],
            sizes=self.sizes[which],
            exposed_ns=None if self.exposed_ns is None else self.exposed_ns[which],
            others=tuple(other.take(which) for other in self.others),
            minus=None if self.minus is None else self.minus.take(which),
        )

    def compact(self) -> FrameBlock:
        """The same frames in a slab of their own: for whoever must hold them longer than the receiver's slab lives."""
        slab = np.concatenate([self.slab[o : o + n] for o, n in zip(self.offsets, self.sizes, strict=True)])
        return replace(
            self,
            offsets=np.cumsum(self.sizes) - self.sizes,
            slab=slab,
            others=tuple(other.compact() for other in self.others),
            minus=None if self.minus is None else self.minus.compact(),
        )

    def payload(self, number: int) -> memoryview:
        """The bytes of one frame, without a copy."""
        start = int(self.offsets[number])
        return self.slab[start : start + int(self.sizes[number])].data

    def channel(self, number: int) -> FrameBlock:
        """The frames of one channel alone, by its place in ``SeriesStart.channels``."""
        return replace(self, others=()) if number == 0 else self.others[number - 1]

    @property
    def payload_bytes(self) -> int:
        """Size of all payloads together, of every channel."""
        return int(self.sizes.sum()) + sum(other.payload_bytes for other in self.others)


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


Message = Announced | SeriesStart | FrameBlock | SeriesEnd | Undecodable


class StreamDecoder(Protocol):
    """Bytes in, messages out. One instance follows one stream; it may remember earlier parts, but owns no socket."""

    def feed(self, batch: ReceivedBatch) -> list[Message]:
        """Translate a batch, in order of arrival, into what is complete with it.

        **Starts.** Where what announces a series tells shape and dtype of its frames, ``SeriesStart`` comes at once.
        Where it does not, ``Announced`` comes at once, and ``SeriesStart`` before the first ``FrameBlock`` (or before
        the end, if there were no frames and enough is known; else ``SeriesEnd`` comes alone).

        **Repeats.** A header that comes again while its series goes on is no second ``Announced``; if it leads to
        another ``SeriesStart``, that has the same ``series`` and ``header``, by which it is known.

        **Missed headers.** Whoever joins in the middle gets ``FrameBlock``s without a ``SeriesStart``, or with one that
        the frames alone have told: no announcement comes before it.

        **Damage.** Malformed input never raises: it is an ``Undecodable``, and the messages behind it are read.

        **Memory.** A decoder may keep state from batch to batch, of bounded size, as copies. The next batch may be fed
        while the messages of this one are being handled. After that the batch's slab is filled anew: of what is
        returned, only ``FrameBlock.slab`` may point into it, and whoever keeps a block longer has to ``compact`` it.

        **Threads.** ``feed`` may be called in any thread, one call at a time.
        """
        ...


#: A message about to be sent: its parts.
OutgoingMessage = Sequence["bytes | memoryview"]


class StreamEncoder(Protocol):
    """The sending half of a protocol, for the simulated detector and for replay. One instance speaks one stream."""

    def start(self, start: SeriesStart) -> list[OutgoingMessage]:
        """The messages that begin a series. Raises ``ConfigurationError`` for what the protocol cannot say."""
        ...

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
        """Consecutive frames ``first``, ``first + 1``, ... as one or several messages, payloads byte for byte.

        ``others``: the same frames of the further channels that ``start`` announced; ``exposed_ns``: their times.
        """
        ...

    def end(self, series: SeriesId) -> list[OutgoingMessage]:
        """The messages that end a series; none where the protocol has no end."""
        ...


@dataclass(frozen=True)
class Framed:
    """Where the whole messages lie in received bytes: ``bounds`` (start, stop) of each, ``used`` bytes that need not be
    looked at again, ``stray`` of them that belonged to no message."""

    bounds: Sequence[tuple[int, int]]
    used: int
    stray: int = 0


class Framing(Protocol):
    """For protocols on plain TCP, which has no messages: finds them in the bytes. Sans-IO, without state."""

    def __call__(self, data: memoryview) -> Framed:
        """The whole messages in ``data``; what follows ``used`` is shown again with more bytes behind it."""
        ...
