"""The way in: receiver and protocol decoder as one stream of messages; for live sessions, recording and ``check``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

from detectors.messages import FrameBlock, Message, ReceivedBatch, SeriesId, SeriesStart, StreamDecoder, Undecodable
from detectors.protocols.registry import StreamProtocol
from stream.probe import advice
from stream.receiving import Lease, Receiver
from stream.threads import in_threads

#: Frames whose start message has not come are kept up to so many bytes: with several sockets, the start may take
#: another way than the frames, and a publisher repeats it once a second.
_ORPHAN_BYTES = 64 << 20

#: So much of a message's first part is enough to tell which protocol it is of.
_LOOKED_AT_BYTES = 1 << 20


@dataclass(frozen=True)
class Silence:
    """Nothing came for ``seconds`` (since the last message, or since the beginning)."""

    seconds: float


#: Fewer message parts than this are translated at once: a thread costs more than it saves.
_FEW_PARTS = 256


class _Translation:
    """Batches from a receiver, with what a protocol says that they are.

    While one is being worked on, the next is translated already, once its slab is full: before, waiting makes it
    larger, which saves more.
    """

    def __init__(self, receiver: Receiver, decoders: list[StreamDecoder]) -> None:
        self._receiver, self._decoders = receiver, decoders
        self._ahead: asyncio.Task[tuple[Lease, list[Message]]] | None = None
        self._begun = False
        """whether a batch is being translated ahead, or the task waits for one"""

    async def next(self, timeout_s: float) -> tuple[Lease, list[Message]] | None:
        """The next batch, which is to be released; None when nothing came for so long."""
        if self._ahead is not None and self._begun:
            # It is let go of afterwards: should this be cancelled, ``stop`` gives the batch back.
            found = await self._ahead
            self._ahead = None
            return found
        await self.stop()
        lease = await self._receiver.get(timeout_s)
        return None if lease is None else (lease, await self._translate(lease))

    def go_ahead(self) -> None:
        """Translate the next batch, if one gets full before it is asked for."""
        self._begun = False
        self._ahead = asyncio.create_task(self._full_one(), name="translation")

    async def stop(self) -> None:
        """Translate nothing ahead any more; what was is given back unseen."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            if not self._begun:
                ahead.cancel()
            await asyncio.wait([ahead])
            if not ahead.cancelled() and ahead.exception() is None:
                ahead.result()[0].release()

    async def _full_one(self) -> tuple[Lease, list[Message]]:
        lease = await self._receiver.get(full=True)
        assert lease is not None
        self._begun = True
        return lease, await self._translate(lease)

    async def _translate(self, lease: Lease) -> list[Message]:
        feed, batch = self._decoders[lease.batch.socket_index].feed, lease.batch
        try:
            if len(batch.offsets) < _FEW_PARTS:
                return feed(batch)
            (found,) = await in_threads(partial(feed, batch))
            return found
        except BaseException:
            lease.release()
            raise


async def messages(
    receiver: Receiver, protocol: StreamProtocol, tick_s: float = 0.25
) -> AsyncGenerator[Message | Silence]:
    """Everything that arrives, in order; a ``Silence`` every ``tick_s`` while nothing does.

    A block of frames points into the receiver's memory: it must not be used any more once the next item is asked for.
    Where another protocol is spoken than the one expected, an ``Undecodable`` says so.
    """
    # A protocol may remember earlier parts: each socket is a stream of its own. Making the first one may compile, for
    # seconds after an installation, and the loop has other work meanwhile.
    decoders = await asyncio.to_thread(lambda: [protocol.decoder() for _ in receiver.endpoints])
    translation = _Translation(receiver, decoders)
    unknown = set(range(len(decoders)))  # nothing has been understood there yet
    silent = 0.0
    too_large = stray = 0
    try:
        while True:
            found = await translation.next(tick_s)
            try:
                if receiver.too_large > too_large:
                    yield Undecodable(
                        "a message was larger than the receiver takes; send fewer frames a message",
                        receiver.too_large - too_large,
                    )
                    too_large = receiver.too_large
                if receiver.stray_bytes > stray:
                    text = f"{receiver.stray_bytes - stray} bytes between the messages belong to none of them"
                    yield Undecodable((advice(protocol, receiver.first_stray) if unknown else "") or text, 0)
                    stray = receiver.stray_bytes
                if found is None:
                    silent += tick_s
                    yield Silence(silent)
                    continue
                silent = 0.0
                lease, decoded = found
                index = lease.batch.socket_index
                translation.go_ahead()
                if index in unknown and all(isinstance(message, Undecodable) for message in decoded):
                    if text := advice(protocol, _first_part(lease.batch)):
                        yield Undecodable(text, sum(m.frames for m in decoded if isinstance(m, Undecodable)))
                        continue
                else:
                    unknown.discard(index)
                for message in decoded:
                    yield message
            finally:
                if found is not None:
                    found[0].release()
    finally:
        await translation.stop()


def _first_part(batch: ReceivedBatch) -> bytes:
    return bytes(batch.part(0)[:_LOOKED_AT_BYTES])


def _held_bytes(block: FrameBlock) -> int:
    """Memory that a kept block takes: its payloads, and number, place and size of each frame, empty ones too."""
    return int(block.sizes.sum()) + 24 * len(block)


class Orphans:
    """Frames that came before the start message of their series."""

    def __init__(self) -> None:
        self._blocks: list[FrameBlock] = []
        self._bytes = 0
        self.lost = 0
        """frames that nobody claimed in time"""

    def keep(self, block: FrameBlock) -> None:
        """Keep a block; the oldest ones go when there are too many."""
        self._blocks.append(block.compact())
        self._bytes += _held_bytes(block)
        while self._bytes > _ORPHAN_BYTES:
            oldest = self._blocks.pop(0)
            self._bytes -= _held_bytes(oldest)
            self.lost += len(oldest)

    def forget(self, series: SeriesId) -> None:
        """Let go of what is kept of a series that is over: it must not go into the next one of the same number."""
        kept = [block for block in self._blocks if block.series != series]
        self.lost += sum(map(len, self._blocks)) - sum(map(len, kept))
        self._blocks, self._bytes = kept, sum(map(_held_bytes, kept))

    def claim(self, start: SeriesStart) -> list[FrameBlock]:
        """The kept blocks of a series that has started now; those of others are let go."""
        mine = [block for block in self._blocks if block.series == start.series]
        self.lost += sum(len(block) for block in self._blocks if block.series != start.series)
        self._blocks, self._bytes = [], 0
        return mine

    @property
    def series(self) -> SeriesId | None:
        """The series that frames are kept of, if any."""
        return self._blocks[-1].series if self._blocks else None
