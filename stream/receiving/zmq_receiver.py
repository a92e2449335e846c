"""Receiving from ZeroMQ sockets: when to look at them; what is there is taken by ``drain``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from detectors.addresses import why
from detectors.errors import ConfigurationError, ConnectionFailed
from stream.receiving.common import Channel, Receiver
from stream.receiving.drain import drain, prepare

#: Parts and bytes received in one go before other tasks get their turn: some tenths of a millisecond's worth.
_DRAIN_PARTS = 1024
_DRAIN_BYTES = 2 << 20

#: While messages flow, the socket is looked at so often [s] (which asyncio's timer rounds up to a millisecond):
#: a wake-up for each message would cost more than the message.
_POLL_S = 0.5e-3

#: After so many looks at an empty socket the descriptor is waited for, which costs nothing.
_EMPTY_POLLS = 4

#: ZeroMQ's wake-ups are edge triggered; should one ever be missed, this is how long it takes to notice [s].
_SAFETY_NET_S = 0.05

#: Messages that ZeroMQ queues for a socket, on top of the slabs. It counts messages and not bytes, and changing it
#: while messages flow can stop them: enough for bursts of small messages, bearable with messages of megabytes.
_HIGH_WATER_MARK = 1024

PATTERNS = {"pull": zmq.PULL, "sub": zmq.SUB}


class _ZmqChannel(Channel):
    def __init__(self, socket: zmq.Socket, index: int, address: str) -> None:
        super().__init__(index, address)
        self.socket = socket
        self.readable = asyncio.Event()
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._peers = 0

    @property
    def connected(self) -> bool:
        with suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
                self._peers = max(0, self._peers + (1 if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else -1))
        return self._peers > 0


class ZmqReceiver(Receiver):
    """A PULL or SUB socket for each address."""

    def __init__(self, addresses: Sequence[str], *, bind: bool = False, pattern: str = "pull") -> None:
        if pattern not in PATTERNS:
            raise ConfigurationError(f"unknown socket pattern {pattern!r}; known are {', '.join(PATTERNS)}")
        super().__init__(addresses)
        self._bind, self._pattern = bind, pattern

    @property
    def link(self) -> str:
        return "; ".join(
            f"no connection to {c.address} yet"
            for c in self._channels
            if isinstance(c, _ZmqChannel) and not c.connected
        )

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(prepare)
        self._context = zmq.Context()
        return await super().__aenter__()

    def _open(self, index: int, address: str) -> _ZmqChannel:
        socket = self._context.socket(PATTERNS[self._pattern])
        socket.rcvhwm = _HIGH_WATER_MARK
        socket.linger = 0
        socket.reconnect_ivl_max = 1000
        if self._pattern == "sub":
            socket.subscribe(b"")
        port = address.rpartition(":")[2]
        if address.startswith("tcp://") and port.isdecimal() and int(port) > 65535:  # ZeroMQ would take the remainder
            raise ConnectionFailed(f"cannot use {address!r}: there are no ports beyond 65535")
        channel = _ZmqChannel(socket, index, address)  # before connecting, or its monitor could miss that
        try:
            if self._bind:
                socket.bind(address)
            else:
                socket.connect(address)
        except zmq.ZMQError as error:
            verb = "bind" if self._bind else "connect to"
            raise ConnectionFailed(f"cannot {verb} {address!r}: {why(error)}") from None
        self.endpoints.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        return channel

    def _close(self) -> None:
        self._context.destroy(linger=0)

    async def _read(self, channel: Channel) -> None:
        assert isinstance(channel, _ZmqChannel)
        loop = asyncio.get_running_loop()
        descriptor = channel.socket.FD
        polls = 0
        while True:
            slab = await self._slab(channel)
            before = slab.end
            received, too_large, empty = drain(channel.socket, slab, _DRAIN_PARTS, _DRAIN_BYTES)
            self._lost(too_large, channel)
            if received:
                slab.time_ns = time.time_ns()
                self.bytes_received += slab.end - before
                self._something.set()
                polls = _EMPTY_POLLS
            if not empty:
                await asyncio.sleep(0)
                continue
            if polls:
                polls -= not received
                await asyncio.sleep(_POLL_S)
                continue
            # The descriptor is edge triggered and reading the event flag re-arms it.
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
