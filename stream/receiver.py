"""The receiver: from ZeroMQ sockets to batches of message parts, without a Python object a frame.

Each socket is drained without waiting, part by part, straight into a preallocated slab; the slab changes hands when the
consumer is ready for it, so that batches grow by themselves when the consumer is busy. There are only a few slabs: when
all are in use nothing is read, ZeroMQ's own queues fill up, and the sender is slowed down. Nothing is dropped here,
except a message beyond ``MAX_MESSAGE_BYTES``, which is counted.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import zmq

from detectors.errors import ConfigurationError, ConnectionFailed
from detectors.messages import ReceivedBatch

logger = logging.getLogger(__name__)

#: Largest message part. Memory for it is only reserved, not touched, until such a part comes.
MAX_MESSAGE_BYTES = 128 << 20

#: A slab is full beyond so many parts or bytes; what was measured to be enough for full speed at 2 kB a message.
_FULL_PARTS = 4096
_FULL_BYTES = 16 << 20

#: Parts received in one go before other tasks get their turn: about a millisecond's worth.
_DRAIN_PARTS = 512

#: ZeroMQ's wake-ups are edge triggered; should one ever be missed, this is how long it takes to notice [s].
_SAFETY_NET_S = 0.05

#: Messages that ZeroMQ queues for a socket, on top of the slabs. It counts messages and not bytes, and changing it
#: while messages flow can stop them: enough for bursts of small messages, bearable with messages of megabytes.
_HIGH_WATER_MARK = 1024

PATTERNS = {"pull": zmq.PULL, "sub": zmq.SUB}


class _Slab:
    """Received parts, end to end in one piece of memory."""

    def __init__(self) -> None:
        # Room for a message of the largest size behind one that just does not fill the slab.
        self.memory = np.empty(_FULL_BYTES + 2 * MAX_MESSAGE_BYTES, np.uint8)
        self.view = self.memory.data
        self.clear()

    def clear(self) -> None:
        self.end = 0
        self.offsets: list[int] = []
        self.lengths: list[int] = []
        self.last: list[bool] = []
        self.time_ns = 0

    @property
    def full(self) -> bool:
        return self.end >= _FULL_BYTES or len(self.offsets) >= _FULL_PARTS


class Lease:
    """A received batch; its slab belongs to the holder until ``release``."""

    def __init__(self, receiver: Receiver, slab: _Slab, socket_index: int) -> None:
        self._receiver, self._slab = receiver, slab
        self.batch = ReceivedBatch(
            slab.memory,
            np.array(slab.offsets, np.int64),
            np.array(slab.lengths, np.int64),
            np.array(slab.last, bool),
            slab.time_ns,
            socket_index,
        )

    def release(self) -> None:
        """Give the slab back; the batch must not be used any more. Call once, on the event loop's thread."""
        self._receiver._give_back(self._slab)


class _Channel:
    """One socket, and the slab that it is being drained into."""

    def __init__(self, socket: zmq.Socket, index: int, address: str) -> None:
        self.socket, self.index, self.address = socket, index, address
        self.slab: _Slab | None = None
        self.readable = asyncio.Event()

    def drain(self, slab: _Slab) -> tuple[int, int]:
        """Receive up to ``_DRAIN_PARTS`` parts without waiting; returns (parts received, messages too large)."""
        receive, option, view = self.socket.recv_into, self.socket.get, slab.view
        received = too_large = 0
        while received < _DRAIN_PARTS and not slab.full:
            first, start, fits, more = len(slab.offsets), slab.end, True, True
            while more:
                try:
                    # The rest of a multipart message is there as soon as its first part is.
                    room = min(MAX_MESSAGE_BYTES, len(view) - slab.end)
                    size = receive(view[slab.end : slab.end + room], flags=zmq.DONTWAIT)
                except zmq.Again:
                    return received, too_large
                received += 1
                more = bool(option(zmq.RCVMORE))  # not as an attribute: its look-up costs more than the receiving
                fits = fits and size <= room
                slab.offsets.append(slab.end)
                slab.lengths.append(size)
                slab.last.append(not more)
                if fits:
                    slab.end += (size + 7) & ~7  # on an 8-byte boundary: pixels are read in place
            if not fits:
                slab.end = start
                del slab.offsets[first:], slab.lengths[first:], slab.last[first:]
                too_large += 1
        return received, too_large


class Receiver:
    """Receives from one or several ZeroMQ sockets. Use as an async context manager, then ``get`` batch by batch.

    ``addresses``: ZeroMQ endpoints. They are connected to, or bound with ``bind`` (``tcp://127.0.0.1:*`` picks a port,
    see ``endpoints``). ``pattern``: ``pull`` (from PUSH) or ``sub`` (from PUB). Raises ``ConnectionFailed`` for an
    address that cannot be used.
    """

    def __init__(self, addresses: Sequence[str], *, bind: bool = False, pattern: str = "pull") -> None:
        if pattern not in PATTERNS:
            raise ConfigurationError(f"unknown socket pattern {pattern!r}; known are {', '.join(PATTERNS)}")
        self._addresses, self._bind, self._pattern = list(addresses), bind, pattern
        self._channels: list[_Channel] = []
        self._readers: list[asyncio.Task[None]] = []
        self._something = asyncio.Event()
        self._slab_free = asyncio.Event()
        self._free: list[_Slab] = []
        self._next = 0
        self.endpoints: list[str] = []
        """the addresses in use, with real port numbers"""
        self.bytes_received = 0
        self.too_large = 0
        """messages beyond MAX_MESSAGE_BYTES, which were lost"""

    async def __aenter__(self) -> Receiver:
        self._context = zmq.Context()
        try:
            for index, address in enumerate(self._addresses):
                self._open(index, address)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        # Two a socket, so that one is filled while the other is worked on, and one to spare.
        self._free = [_Slab() for _ in range(2 * len(self._channels) + 1)]
        self._slab_free.set()
        self._readers = [asyncio.create_task(self._read(channel), name="receiver") for channel in self._channels]
        return self

    def _open(self, index: int, address: str) -> None:
        socket = self._context.socket(PATTERNS[self._pattern])
        socket.rcvhwm = _HIGH_WATER_MARK
        socket.linger = 0
        socket.reconnect_ivl_max = 1000
        if self._pattern == "sub":
            socket.subscribe(b"")
        port = address.rpartition(":")[2]
        if address.startswith("tcp://") and port.isdecimal() and int(port) > 65535:  # ZeroMQ would take the remainder
            raise ConnectionFailed(f"cannot use {address!r}: there are no ports beyond 65535")
        try:
            if self._bind:
                socket.bind(address)
            else:
                socket.connect(address)
        except zmq.ZMQError as error:
            verb = "bind" if self._bind else "connect to"
            raise ConnectionFailed(f"cannot {verb} {address!r}: {why(error)}") from None
        self.endpoints.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._channels.append(_Channel(socket, index, address))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._context.destroy(linger=0)

    async def get(self, timeout_s: float | None = None) -> Lease | None:
        """The next batch, at once if one is there; None when nothing came for ``timeout_s`` seconds."""
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while True:
            for channel in self._channels[self._next :] + self._channels[: self._next]:
                if channel.slab is not None and channel.slab.offsets:
                    slab, channel.slab = channel.slab, None
                    self._next = (channel.index + 1) % len(self._channels)
                    # A free slab lets the reader go on while this batch is being worked on.
                    self._slab_free.set()
                    return Lease(self, slab, channel.index)
            self._something.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._something.wait()
            except TimeoutError:
                self._raise_failed_reader()
                return None

    def _raise_failed_reader(self) -> None:
        for task in self._readers:
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    def _give_back(self, slab: _Slab) -> None:
        slab.clear()
        self._free.append(slab)
        self._slab_free.set()

    async def _read(self, channel: _Channel) -> None:
        loop = asyncio.get_running_loop()
        descriptor = channel.socket.FD
        while True:
            while channel.slab is None or channel.slab.full:
                if channel.slab is None and self._free:
                    channel.slab = self._free.pop()
                    break
                self._slab_free.clear()
                await self._slab_free.wait()
            slab = channel.slab
            before = slab.end
            received, too_large = channel.drain(slab)
            if too_large:
                self.too_large += too_large
                logger.warning(
                    "%d message(s) over %d MiB from %s were lost", too_large, MAX_MESSAGE_BYTES >> 20, channel.address
                )
            if received:
                slab.time_ns = time.time_ns()
                self.bytes_received += slab.end - before
                self._something.set()
                await asyncio.sleep(0)
                continue
            # Nothing left. The descriptor is edge triggered and reading the event flag re-arms it.
            if int(channel.socket.EVENTS) & zmq.POLLIN:
                await asyncio.sleep(0)
                continue
            channel.readable.clear()
            loop.add_reader(descriptor, channel.readable.set)
            try:
                async with asyncio.timeout(_SAFETY_NET_S):
                    await channel.readable.wait()
            except TimeoutError:
                pass
            finally:
                loop.remove_reader(descriptor)


def why(error: zmq.ZMQError) -> str:
    """ZeroMQ's error in words that help."""
    reasons = {
        zmq.EADDRINUSE: "the port is in use by another program; choose another one or end that program",
        zmq.EPROTONOSUPPORT: "unknown transport; write tcp://HOST:PORT or ipc://PATH",
        zmq.EINVAL: "not an address; write tcp://HOST:PORT, for example tcp://127.0.0.1:31000",
        errno.ENODEV: "this machine has no such network interface or host name",
        zmq.EADDRNOTAVAIL: "this machine does not have that network address",
        errno.EACCES: "permission denied",
    }
    return reasons.get(error.errno or 0, error.strerror)
