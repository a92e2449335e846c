"""Receiving from plain TCP, which knows no messages: the protocol's ``framing`` finds them in the received bytes.

The detector listens and this program connects, again and again until it is there, and again when it has gone away.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from detectors.addresses import host_and_port, shown_address, why
from detectors.errors import ConnectionFailed
from detectors.messages import Framing
from stream.receiving import common
from stream.receiving.common import Channel, Receiver, Slab

#: Bytes received in one go before other tasks get their turn: less than a millisecond's worth.
_CHUNK_BYTES = 1 << 20

#: Attempts to connect are at least so far apart [s], and one takes at most so long [s].
_RETRY_S = 1.0
_CONNECT_S = 5.0

#: A detector that was switched off or unplugged says no farewell: after so long a silence [s] the system asks.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}

#: How many of the first stray bytes are kept.
_FIRST_STRAY_BYTES = 64


class _TcpChannel(Channel):
    def __init__(self, index: int, address: str, host: str, port: int) -> None:
        super().__init__(index, address)
        self.host, self.port = host, port
        self.framed = 0
        """up to where messages have been looked for in the slab; what follows is the beginning of one"""
        self.heard = False
        """whether a message has come from there"""
        self.trouble = f"connecting to {address}"

    def hand_over(self, free: list[Slab]) -> Slab | None:
        slab = self.slab
        if slab is None or not slab.count:
            return None
        tail = slab.memory[self.framed : slab.end]
        if len(tail) and not free:  # nowhere to go on with it
            return None
        self.slab, self.framed = None, 0
        if len(tail):
            self.slab = free.pop()
            self.slab.memory[: len(tail)] = tail
            self.slab.end = len(tail)
        return slab


class TcpReceiver(Receiver):
    """A TCP connection to each address, kept up for ever."""

    def __init__(self, addresses: Sequence[str], framing: Framing, default_port: int) -> None:
        super().__init__(addresses)
        self._framing, self._default_port = framing, default_port

    @property
    def link(self) -> str:
        return "; ".join(c.trouble for c in self._channels if isinstance(c, _TcpChannel) and c.trouble)

    def _open(self, index: int, address: str) -> _TcpChannel:
        host, port = host_and_port(address, self._default_port)
        if not host or not port:
            raise ConnectionFailed(f"cannot connect to {address!r}: name the detector's machine and port")
        self.endpoints.append(shown_address(host, port))
        return _TcpChannel(index, self.endpoints[-1], host, port)

    async def _read(self, channel: Channel) -> None:
        assert isinstance(channel, _TcpChannel)
        loop = asyncio.get_running_loop()
        while True:
            tried = loop.time()
            try:
                async with _connected(channel.host, channel.port) as connection:
                    channel.trouble = ""
                    await self._drain(channel, connection)
                channel.trouble = f"reconnecting to {channel.address}: the connection was closed from there"
            except TimeoutError:
                channel.trouble = f"connecting to {channel.address}: no such machine answers"
            except (OSError, UnicodeError) as error:
                reason = why(error) if isinstance(error, OSError) else str(error)
                channel.trouble = f"{'re' * channel.heard}connecting to {channel.address}: {reason}"
            self._drop_tail(channel)
            await asyncio.sleep(tried + _RETRY_S - loop.time())

    async def _drain(self, channel: _TcpChannel, connection: socket.socket) -> None:
        """Receive until the connection is closed from the other side."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        while True:
            slab = await self._slab(channel)
            try:
                size = connection.recv_into(slab.view[slab.end : slab.end + _CHUNK_BYTES])
            except BlockingIOError:
                # Not by sock_recv_into: the slab may have changed hands by the time that something comes.
                readable.clear()
                loop.add_reader(connection, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(connection)
                continue
            if size == 0:
                return
            slab.end += size
            self.bytes_received += size
            self._frame(channel, slab)
            await asyncio.sleep(0)

    def _frame(self, channel: _TcpChannel, slab: Slab) -> None:
        """Look for whole messages in what has come."""
        began = channel.framed
        found = self._framing(slab.view[began : slab.end])
        if found.bounds:
            channel.heard = True
            slab.add(began + np.array(found.bounds, np.int64))
            slab.time_ns = time.time_ns()
            self._something.set()
        channel.framed += found.used
        self._strayed(channel, slab, began, found.stray)
        if slab.end - channel.framed > common.MAX_MESSAGE_BYTES:
            slab.end = channel.framed
            self._lost(1, channel)
        if not slab.count and channel.framed:  # only stray bytes so far
            rest = slab.end - channel.framed
            slab.memory[:rest] = slab.memory[channel.framed : slab.end]
            slab.end, channel.framed = rest, 0

    def _drop_tail(self, channel: _TcpChannel) -> None:
        """The rest of a message that was on its way will not come any more."""
        if (slab := channel.slab) is not None:
            self._strayed(channel, slab, channel.framed, slab.end - channel.framed)
            slab.end = channel.framed

    def _strayed(self, channel: _TcpChannel, slab: Slab, began: int, count: int) -> None:
        if count:
            self.stray_bytes += count
            if not channel.heard and not self.first_stray:
                self.first_stray = bytes(slab.view[began : min(slab.end, began + _FIRST_STRAY_BYTES)])


@asynccontextmanager
async def _connected(host: str, port: int) -> AsyncIterator[socket.socket]:
    """A connection that stands, closed on leaving. Raises ``OSError`` or ``TimeoutError``."""
    loop = asyncio.get_running_loop()
    refused: OSError | None = None
    async with asyncio.timeout(_CONNECT_S):
        for family, kind, proto, _, where in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            connection = socket.socket(family, kind, proto)
            try:
                _prepare(connection)
                await loop.sock_connect(connection, where)
                if connection.getsockname() == connection.getpeername():  # possible on one machine, with nobody there
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
                break
            except OSError as error:
                connection.close()
                refused = error
            except BaseException:
                connection.close()
                raise
        else:
            raise refused or OSError(errno.EHOSTUNREACH, "no address")
    try:
        yield connection
    finally:
        connection.close()


def _prepare(connection: socket.socket) -> None:
    """Options of the socket. Its buffer is left alone: the system lets it grow to what a setting could not ask for."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
