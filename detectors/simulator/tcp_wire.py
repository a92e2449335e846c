"""The sending end of a stream over plain TCP: listens for one client at a time, and drops nothing that it can send.

When the client goes away, what was on its way to it is lost, as with a real detector; the next message waits for the
next client.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress

from detectors.addresses import host_and_port, shown_address, why
from detectors.errors import ConnectionFailed
from detectors.simulator.source import Payload

_HEARD_BYTES = 1 << 16


class TcpWire:
    """A listening TCP socket and its client. At most one message waits here; the system's buffers hold the others.

    ``address``: ``tcp://HOST:PORT``, see ``host_and_port``. Raises ``ConnectionFailed`` when it cannot be used.
    """

    publishes = False

    def __init__(self, address: str, default_port: int) -> None:
        host, port = host_and_port(address, default_port)
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._client: socket.socket | None = None
        self._unsent: list[memoryview] = []
        try:
            # A second client waits in the queue until the first one has gone.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, backlog=1)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = why(error) if isinstance(error, OSError) else str(error)
            raise ConnectionFailed(f"cannot send from {address!r}: {reason}") from None
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        self.endpoint = shown_address(host, self._listener.getsockname()[1])

    def _accept(self) -> None:
        with suppress(OSError):
            self._client, _ = self._listener.accept()
            self._client.setblocking(False)
            self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._loop.remove_reader(self._listener)
            self._loop.add_reader(self._client, self._hear)
            self._changed.set()

    def _hear(self) -> None:
        """A client has nothing to say here, except by going away."""
        if self._client is None:
            return
        try:
            gone = not self._client.recv(_HEARD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self._let_go()

    def _let_go(self) -> None:
        if self._client is not None:
            self._loop.remove_reader(self._client)
            self._loop.remove_writer(self._client)
            self._client.close()
            self._client = None
            self._unsent = []
            if self._listener.fileno() >= 0:
                self._loop.add_reader(self._listener, self._accept)
            self._changed.set()

    def try_send(self, parts: Sequence[Payload]) -> bool:
        """Send a message if there is room for it now."""
        self._push()
        if self._client is None or self._unsent:
            return False
        self._unsent = [memoryview(part).cast("B") for part in parts if len(part)]
        self._push()
        return True

    def _push(self) -> None:
        """Hand as much to the system as it takes."""
        while self._client is not None and self._unsent:
            try:
                sent = self._client.sendmsg(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                self._let_go()
                return
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.pop(0))
            if sent:
                self._unsent[0] = self._unsent[0][sent:]

    async def wait(self, timeout_s: float) -> None:
        """Wait until there may be room for a message, or until the timeout."""
        self._changed.clear()
        client = self._client
        if client is not None:
            self._loop.add_writer(client, self._changed.set)
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            if client is not None and client is self._client:
                self._loop.remove_writer(client)

    async def wait_for_subscriber(self, timeout_s: float) -> None:
        """Nothing to wait for: this wire does not publish."""

    async def flush(self, linger_s: float) -> None:
        """Close, and wait until the receiver has everything or ``linger_s`` is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(linger_s):
                while self._client is not None and self._unsent:
                    await self.wait(1.0)
                    self._push()
                if self._client is not None:
                    with suppress(OSError):
                        self._client.shutdown(socket.SHUT_WR)
                # It has read everything once it answers the end of the stream with its own.
                while self._client is not None:
                    self._changed.clear()
                    await self._changed.wait()
        self.close()

    def close(self) -> None:
        """Close at once, dropping what has not been delivered."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        self._let_go()
