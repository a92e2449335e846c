"""The sending end of a stream over ZeroMQ: one socket that waits for its receiver and drops nothing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence

import zmq
import zmq.asyncio

from detectors.addresses import why
from detectors.errors import ConnectionFailed
from detectors.simulator.source import Payload

#: Smaller parts are copied into ZeroMQ's own memory: cheaper than keeping track of them.
_COPY_BELOW_BYTES = 1 << 16


class ZmqWire:
    """One ZeroMQ socket in a context of its own, so that leaving can wait for delivery.

    ``pattern``: ``push`` or ``pub``; ``address`` is bound, or connected to without ``bind``. Raises
    ``ConnectionFailed`` when the address cannot be used.
    """

    def __init__(self, pattern: str, address: str, bind: bool) -> None:
        self.publishes = pattern == "pub"
        self.context = zmq.asyncio.Context()
        # XPUB is PUB as seen from outside; it alone tells when a subscriber is there.
        self.socket: zmq.asyncio.Socket = self.context.socket(zmq.XPUB if self.publishes else zmq.PUSH)
        # The asyncio socket waits, this view of the same socket sends: a future for each message would be too slow.
        self.plain: zmq.Socket[bytes] = zmq.Socket.shadow(self.socket)
        self.closed = False
        try:
            self.socket.setsockopt(zmq.LINGER, 0)
            if self.publishes:
                self.socket.setsockopt(zmq.XPUB_NODROP, 1)
            else:
                self.socket.setsockopt(zmq.IMMEDIATE, 1)  # never queue for a peer that is not there yet
            if bind:
                self.socket.bind(address)
            else:
                self.socket.connect(address)
            self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        except zmq.ZMQError as error:
            self.close()
            verb = "send from" if bind else "connect to"
            raise ConnectionFailed(f"cannot {verb} {address!r}: {why(error)}") from None

    def try_send(self, parts: Sequence[Payload]) -> bool:
        """Send a message if there is room for it now."""
        send, last = self.plain.send, len(parts) - 1
        try:
            for i, part in enumerate(parts):
                flags = zmq.NOBLOCK if i == last else zmq.NOBLOCK | zmq.SNDMORE
                send(part, flags, copy=len(part) < _COPY_BELOW_BYTES)
        except zmq.Again:
            # Only a first part is ever refused: ZeroMQ takes or refuses whole messages.
            return False
        return True

    async def wait(self, timeout_s: float) -> None:
        """Wait until there may be room for a message, or until the timeout."""
        await self._poll(zmq.POLLOUT, timeout_s)

    async def wait_for_subscriber(self, timeout_s: float) -> None:
        """Where this wire publishes: wait until somebody listens, or until the timeout."""
        if self.publishes:
            await self._poll(zmq.POLLIN, timeout_s)

    async def _poll(self, event: int, timeout_s: float) -> None:
        poller = zmq.asyncio.Poller()
        poller.register(self.socket, event)
        await poller.poll(int(1000 * timeout_s))

    async def flush(self, linger_s: float) -> None:
        """Close, and wait until the receiver has everything or ``linger_s`` is over."""
        loop = asyncio.get_running_loop()
        delivered: asyncio.Future[None] = loop.create_future()

        def wait() -> None:
            self.context.term()
            with contextlib.suppress(RuntimeError):  # the loop may be gone by now, with nobody left to tell
                loop.call_soon_threadsafe(_settle, delivered)

        self.closed = True
        self.socket.close(linger=int(1000 * linger_s))
        # A daemon thread and not an executor's: nobody waits for it when the user has had enough.
        threading.Thread(target=wait, name="zmq-linger", daemon=True).start()
        await delivered

    def close(self) -> None:
        """Close at once, dropping what has not been delivered."""
        if not self.closed:
            self.closed = True
            self.socket.close(linger=0)
            self.context.term()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
