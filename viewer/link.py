"""The viewer's two sockets: snapshots in (SUB) and control requests out (REQ). No Qt; nothing here ever blocks.

Both reconnect by themselves when a session ends and another begins at the same address.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgpack
import zmq

from detectors.errors import ConfigurationError, ConnectionFailed, ProtocolError
from stream.snapshot import COMMANDS, Snapshot, unpack_map
from viewer.checks import checked

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 3.0


def normalized(address: str) -> str:
    """``host:port`` or a ZeroMQ address, as a ZeroMQ address. Raises ``ConfigurationError``."""
    full = address if "://" in address else f"tcp://{address}"
    parts = urlsplit(full)
    try:
        complete = parts.scheme in ("ipc", "inproc") or (parts.scheme == "tcp" and parts.hostname and parts.port)
    except ValueError:  # the port is not a number
        complete = False
    if not complete:
        raise ConfigurationError(f"expected an address such as tcp://127.0.0.1:31010, got {address!r}")
    return full


def control_host(address: str) -> str:
    """The host that publishes at ``address`` (as of :func:`normalized`), in a form fit for a ZeroMQ address."""
    host = urlsplit(address).hostname if address.startswith("tcp://") else None
    if host is None:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


class SnapshotLink:
    """Receives the newest snapshot, whatever happened in between. Damaged ones are counted, never raised."""

    def __init__(self, address: str, context: zmq.Context[Any]) -> None:
        """Raises ``ConnectionFailed`` when ZeroMQ refuses the address; a silent address is waited for."""
        self.received = 0
        self.damaged = 0
        self.damage = ""
        """what was wrong with the last damaged snapshot"""
        self._socket = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        # Newest only. A high-water mark of 1 would not do: one waits in the sender, one here, more in the kernel.
        self._socket.setsockopt(zmq.CONFLATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        # A host that vanishes without closing its connections is noticed by the missing heartbeat.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConnectionFailed(f"cannot use the address {address}: {error}") from error

    def poll(self) -> Snapshot | None:
        """The newest sound snapshot that came since the last call, or None. Returns at once."""
        newest = None
        while True:
            try:
                part = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return newest
            try:
                newest = checked(Snapshot.unpack(part))
                self.received += 1
            except (ProtocolError, OverflowError) as error:
                self.damaged += 1
                self.damage = str(error)
                log.warning("damaged snapshot: %s", error)

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class Answer:
    """What became of a control request."""

    command: str
    ok: bool
    error: str = ""
    """a sentence, empty if ok"""
    reply: Mapping[str, Any] = field(default_factory=dict, repr=False)


class ControlClient:
    """Sends control requests one after the other and collects their answers; a dead session costs a timeout."""

    def __init__(
        self,
        host: str,
        context: zmq.Context[Any],
        timeout_s: float = ANSWER_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host, self._context, self._timeout_s, self._clock = host, context, timeout_s, clock
        self._port: int | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._queue: deque[dict[str, Any]] = deque()
        self._failed: list[Answer] = []
        self._sent = False
        """whether the first of the queue is on its way"""
        self._deadline = 0.0

    @property
    def port(self) -> int | None:
        return self._port

    def use_port(self, port: int | None) -> None:
        """The session's control port, from its snapshots; None where it takes no requests."""
        if port != self._port:
            # Another session: what was meant for the last one is not for it.
            self._failed += [Answer(r["command"], False, "the session ended before it answered") for r in self._queue]
            self._queue.clear()
            self._port = port
            self._drop_socket()

    def request(self, command: str, **values: Any) -> None:
        """Queue a request of COMMANDS. An unsent older one of the same command is replaced: only the newest counts."""
        if set(values) != set(COMMANDS[command]):
            raise ValueError(f"{command} takes {COMMANDS[command]}, got {tuple(values)}")
        first = self._queue.popleft() if self._sent else None
        self._queue = deque(waiting for waiting in self._queue if waiting["command"] != command)
        if first is not None:
            self._queue.appendleft(first)
        self._queue.append({"command": command, **values})
        if len(self._queue) == 1:
            self._deadline = self._clock() + self._timeout_s

    def poll(self) -> list[Answer]:
        """Send what waits, and return the answers that came. Returns at once."""
        answers, self._failed = self._failed, []
        while self._queue:
            answer = self._step()
            if answer is None:
                break
            answers.append(answer)
            self._queue.popleft()
            self._sent = False
            self._deadline = self._clock() + self._timeout_s
        return answers

    def close(self) -> None:
        self._queue.clear()
        self._drop_socket()

    def _step(self) -> Answer | None:
        """The answer to the first request of the queue, if there is one by now."""
        request = self._queue[0]
        command = request["command"]
        if self._port is None:
            return Answer(command, False, "this session takes no control requests")
        try:
            if not self._sent:
                self._connected().send(msgpack.packb(request), zmq.NOBLOCK)
                self._sent = True
            reply = unpack_map(self._connected().recv(zmq.NOBLOCK))
        except zmq.Again:
            if self._clock() < self._deadline:
                return None
            # A fresh socket, so that a request which timed out is not delivered to the next session by surprise.
            self._drop_socket()
            return Answer(command, False, f"no answer from the session within {self._timeout_s:g} s")
        except (zmq.ZMQError, ProtocolError) as error:
            self._drop_socket()
            return Answer(command, False, f"the control request failed: {error}")
        ok = reply.get("ok") is True
        return Answer(command, ok, "" if ok else str(reply.get("error", "the session refused without a reason")), reply)

    def _connected(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            self._socket = self._context.socket(zmq.REQ)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.REQ_RELAXED, 1)
            self._socket.setsockopt(zmq.REQ_CORRELATE, 1)
            self._socket.setsockopt(zmq.RCVTIMEO, 0)
            # Nothing is queued towards a session that is not there.
            self._socket.setsockopt(zmq.IMMEDIATE, 1)
            self._socket.setsockopt(zmq.IPV6, 1)
            self._socket.connect(f"tcp://{self._host}:{self._port}")
        return self._socket

    def _drop_socket(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._sent = None, False
