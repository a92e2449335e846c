"""What all receivers share: slabs that are filled while others are being worked on, and back-pressure.

Each socket is drained without waiting, straight into a preallocated slab; the slab changes hands when the consumer is
ready for it, so that batches grow by themselves when the consumer is busy. There are only a few slabs: when all are in
use nothing is read, the transport's own queues fill up, and the sender is slowed down. Nothing is dropped here, except
a message beyond ``MAX_MESSAGE_BYTES`` or ``MAX_MESSAGE_PARTS``, which is counted.
"""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from detectors.messages import ReceivedBatch

logger = logging.getLogger(__name__)

#: Largest message part. Memory for it is only reserved, not touched, until such a part comes.
MAX_MESSAGE_BYTES = 128 << 20

#: Most parts of a message, where the transport knows of parts.
MAX_MESSAGE_PARTS = 1 << 16

#: A slab is full beyond so many parts or bytes; what was measured to be enough for full speed at 2 kB a message.
FULL_PARTS = 4096
FULL_BYTES = 16 << 20

#: A batch that is not full is not handed over sooner than so long after the one before it [s]: each batch has a price.
_GATHER_S = 3e-3


class Slab:
    """Received bytes, end to end in one piece of memory, and the parts of whole messages in them.

    Of ``offsets`` and ``lengths``, int64, and ``last``, bool, the first ``count`` are in use, see ``ReceivedBatch``.
    """

    def __init__(self) -> None:
        # Room for a message of the largest size behind one that just does not fill the slab. It is only reserved here.
        self.memory = np.empty(FULL_BYTES + 2 * MAX_MESSAGE_BYTES, np.uint8)
        self.view = self.memory.data
        room = FULL_PARTS + MAX_MESSAGE_PARTS
        self.offsets, self.lengths, self.last = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, bool)
        self.clear()

    def clear(self) -> None:
        self.end = self.count = self.time_ns = 0

    def add(self, bounds: np.ndarray) -> None:
        """Note messages of one part, int64 (messages, 2): where each begins and ends."""
        first, self.count = self.count, self.count + len(bounds)
        if self.count > len(self.last):
            room = 2 * self.count
            self.offsets, self.lengths = np.resize(self.offsets, room), np.resize(self.lengths, room)
            self.last = np.resize(self.last, room)
        self.offsets[first : self.count] = bounds[:, 0]
        self.lengths[first : self.count] = bounds[:, 1] - bounds[:, 0]
        self.last[first : self.count] = True

    @property
    def full(self) -> bool:
        """Whether it holds enough; never while there is no whole message to hand over."""
        return self.count > 0 and (self.end >= FULL_BYTES or self.count >= FULL_PARTS)


class Lease:
    """A received batch; its slab belongs to the holder until ``release``."""

    def __init__(self, receiver: Receiver, slab: Slab, socket_index: int) -> None:
        self._receiver, self._slab = receiver, slab
        self.batch = ReceivedBatch(
            slab.memory,
            slab.offsets[: slab.count],
            slab.lengths[: slab.count],
            slab.last[: slab.count],
            slab.time_ns,
            socket_index,
        )

    def release(self) -> None:
        """Give the slab back; the batch must not be used any more. Call once, on the event loop's thread."""
        self._receiver.give_back(self._slab)


class Channel:
    """One socket, and the slab that it is being drained into."""

    def __init__(self, index: int, address: str) -> None:
        self.index, self.address = index, address
        self.slab: Slab | None = None
        self.passed_over = 0
        """batches of other sockets that were handed over while messages lay here"""

    def hand_over(self, free: list[Slab]) -> Slab | None:
        """The slab with the whole messages in it, if there are any; takes one of the ``free`` ones where it must."""
        slab = self.slab
        if slab is None or not slab.count:
            return None
        self.slab = None
        return slab


class Receiver(abc.ABC):
    """Receives from one or several sockets: see ``open_receiver``. A transport adds ``_open`` and ``_read``."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = list(addresses)
        self._channels: list[Channel] = []
        self._readers: list[asyncio.Task[None]] = []
        self._something = asyncio.Event()
        self._slab_free = asyncio.Event()
        self._free: list[Slab] = []
        self._next = 0
        self._handed_over = 0.0
        self.endpoints: list[str] = []
        """the addresses in use, with real port numbers"""
        self.bytes_received = 0
        self.too_large = 0
        """messages beyond MAX_MESSAGE_BYTES or MAX_MESSAGE_PARTS, which were lost"""
        self.stray_bytes = 0
        """bytes that belonged to no message; where the transport keeps messages apart there are none"""
        self.first_stray = b""
        """the first of them, from which one may see what is really spoken there"""

    @property
    def link(self) -> str:
        """Which connections do not stand and why, in words; empty when all do, or the transport does not tell."""
        return ""

    @abc.abstractmethod
    def _open(self, index: int, address: str) -> Channel:
        """Begin with an address; puts it into ``endpoints``. Raises ``ConnectionFailed``."""

    @abc.abstractmethod
    async def _read(self, channel: Channel) -> None:
        """Fill the channel's slabs for ever."""

    def _close(self) -> None:  # noqa: B027 - not every transport has something to close
        """Close what ``_open`` opened."""

    async def __aenter__(self) -> Self:
        try:
            for index, address in enumerate(self._addresses):
                self._channels.append(self._open(index, address))
        except BaseException:
            self._close()
            raise
        # Two a socket, so that one is filled while the other is worked on, and one to spare.
        self._free = [Slab() for _ in range(2 * len(self._channels) + 1)]
        self._slab_free.set()
        self._readers = [asyncio.create_task(self._read(channel), name="receiver") for channel in self._channels]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._close()

    async def get(self, timeout_s: float | None = None, *, full: bool = False) -> Lease | None:
        """The next batch, at once if one is there; None when nothing came for ``timeout_s`` seconds.

        With ``full``, only a batch that cannot grow any more by being left, or whose turn it is: a socket with few
        messages does not wait for ever beside one that always has more. Leases are to be released before long: with two
        or more held, others may not be to be had.
        """
        clock = asyncio.get_running_loop().time
        deadline = None if timeout_s is None else clock() + timeout_s
        while True:
            early = clock() < self._handed_over + _GATHER_S
            for channel in self._channels[self._next :] + self._channels[: self._next]:
                due = channel.passed_over >= len(self._channels)
                if (full or early) and not due and (channel.slab is None or not channel.slab.full):
                    continue
                if (slab := channel.hand_over(self._free)) is not None:
                    self._pass_over_others(channel)
                    self._next = (channel.index + 1) % len(self._channels)
                    self._handed_over = clock()
                    # A free slab lets the reader go on while this batch is being worked on.
                    self._slab_free.set()
                    return Lease(self, slab, channel.index)
            self._something.clear()
            until = self._handed_over + _GATHER_S if early and not full else deadline
            try:
                async with asyncio.timeout_at(until):
                    await self._something.wait()
            except TimeoutError:
                if until is not deadline:
                    continue
                self._raise_failed_reader()
                return None

    def _pass_over_others(self, chosen: Channel) -> None:
        for channel in self._channels:
            if channel is chosen:
                channel.passed_over = 0
            elif channel.slab is not None and channel.slab.count:
                channel.passed_over += 1

    def _raise_failed_reader(self) -> None:
        for task in self._readers:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    def give_back(self, slab: Slab) -> None:
        """Take a slab back that a consumer has done with."""
        slab.clear()
        self._free.append(slab)
        self._slab_free.set()
        self._something.set()

    async def _slab(self, channel: Channel) -> Slab:
        """A slab of the channel's own with room in it, as soon as there is one."""
        while channel.slab is None or channel.slab.full:
            if channel.slab is None and self._free:
                channel.slab = self._free.pop()
                break
            self._slab_free.clear()
            await self._slab_free.wait()
        return channel.slab

    def _lost(self, count: int, channel: Channel) -> None:
        """Count messages that were too large."""
        if count:
            self.too_large += count
            logger.warning(
                "%d message(s) over %d MiB or %d parts from %s were lost",
                count,
                MAX_MESSAGE_BYTES >> 20,
                MAX_MESSAGE_PARTS,
                channel.address,
            )
