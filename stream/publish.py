"""Images and status out, control in: the two sockets that viewers talk to. See docs/publishing.md."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

import msgpack
import zmq
import zmq.asyncio

from detectors.addresses import why
from detectors.errors import ConfigurationError, ConnectionFailed, LiveptychoError, ProtocolError
from stream.snapshot import COMMANDS, unpack_map

logger = logging.getLogger(__name__)

#: A control request is a few numbers; whatever is larger is not one.
_MAX_REQUEST_BYTES = 1 << 20

Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]

#: ZeroMQ's own thread has so long to take the last snapshot before the sockets are closed [s].
_LAST_SNAPSHOT_S = 0.1


class Publisher:
    """A PUB socket for snapshots and a REP socket for control requests. Use as an async context manager.

    ``address``: TCP endpoint for the snapshots, ``tcp://127.0.0.1:*`` picks a port. The control socket is bound on the
    same interface, one port further (any free one when the port was picked). Raises ``ConnectionFailed`` when an
    address is taken or impossible.
    """

    def __init__(self, address: str, handler: Handler) -> None:
        self._address, self._handler = address, handler
        self.endpoint = ""
        self.control_port = 0

    async def __aenter__(self) -> Publisher:
        if not self._address.startswith("tcp://"):
            raise ConfigurationError(f"snapshots are published on tcp://HOST:PORT, got {self._address!r}")
        self._context = zmq.asyncio.Context()
        try:
            # Newest wins: a slow viewer sees the latest snapshot, never a queue of old ones.
            self._images = self._bind(zmq.PUB, self._address, {zmq.CONFLATE: 1, zmq.LINGER: 200})
            self.endpoint = self._images.getsockopt_string(zmq.LAST_ENDPOINT)
            port = int(self.endpoint.rpartition(":")[2])
            host = self._address.rpartition(":")[0]
            picked = self._address.endswith((":*", ":0"))
            options = {zmq.MAXMSGSIZE: _MAX_REQUEST_BYTES, zmq.LINGER: 200}
            self._control = self._bind(zmq.REP, f"{host}:{'*' if picked else port + 1}", options)
            self.control_port = int(self._control.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        except BaseException:
            self._context.destroy(linger=0)
            raise
        return self

    def _bind(self, kind: int, address: str, options: Mapping[zmq.SocketOption, int]) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        for option, value in options.items():
            socket.set(option, value)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConnectionFailed(f"cannot publish on {address!r}: {why(error)}") from None
        return socket

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The mark that ends a conflating connection replaces what was not fetched yet: the last snapshot goes first.
        await asyncio.sleep(_LAST_SNAPSHOT_S)
        self._context.destroy()

    async def send(self, part: bytes) -> None:
        """Publish one snapshot; it replaces one that has not been sent yet."""
        await self._images.send(part)

    async def answer(self) -> None:
        """Answer control requests, one at a time, for ever."""
        while True:
            reply = await self._answer_one(await self._control.recv_multipart())
            await self._control.send(msgpack.packb(reply))

    async def _answer_one(self, parts: list[bytes]) -> dict[str, Any]:
        try:
            if len(parts) != 1:
                raise ProtocolError(f"a request has 1 part, this one has {len(parts)}")
            request = unpack_map(parts[0])
            command = request.pop("command", None)
            if not isinstance(command, str) or command not in COMMANDS:
                raise ConfigurationError(f"unknown command {command!r}; known are {', '.join(COMMANDS)}")
            if unknown := sorted(map(str, request.keys() - set(COMMANDS[command]))):
                raise ConfigurationError(
                    f"{command} does not take {', '.join(unknown)}; "
                    f"it takes {', '.join(COMMANDS[command]) or 'nothing'}"
                )
            return {"ok": True, **await self._handler(command, request)}
        except LiveptychoError as error:
            logger.warning("control request refused: %s", error)
            return {"ok": False, "error": str(error)}
        except Exception as error:  # a mistake of ours: whoever asked must hear of it, and the scan must go on
            logger.exception("a control request failed")
            return {"ok": False, "error": f"internal error: {type(error).__name__}: {error}"}
