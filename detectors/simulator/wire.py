"""The sending end of a stream, whatever carries it: waits for its receiver and drops nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from detectors.errors import ConfigurationError
from detectors.protocols.registry import StreamProtocol
from detectors.simulator.source import Payload
from detectors.simulator.tcp_wire import TcpWire
from detectors.simulator.zmq_wire import ZmqWire

#: The ways of sending: to one receiver that is waited for, or to whoever listens.
PATTERNS = ("push", "pub")


class Wire(Protocol):
    """Sends messages, each a sequence of parts. ``endpoint``: the address with its real port number; ``publishes``:
    to whoever listens, so that late ones must be told the start again."""

    endpoint: str
    publishes: bool

    def try_send(self, parts: Sequence[Payload]) -> bool:
        """Send a message if there is room for it now."""
        ...

    async def wait(self, timeout_s: float) -> None:
        """Wait until there may be room for a message, or until the timeout."""
        ...

    async def wait_for_subscriber(self, timeout_s: float) -> None:
        """Where this wire publishes: wait until somebody listens, or until the timeout."""
        ...

    async def flush(self, linger_s: float) -> None:
        """Close, and wait until the receiver has everything or ``linger_s`` is over."""
        ...

    def close(self) -> None:
        """Close at once, dropping what has not been delivered."""
        ...


def open_wire(protocol: StreamProtocol, address: str, *, pattern: str = "push", bind: bool = True) -> Wire:
    """The wire that a protocol is sent on. Call it on the event loop.

    ``address`` is bound, or connected to without ``bind``. Raises ``ConnectionFailed`` when it cannot be used, and
    ``ConfigurationError`` for what the protocol's transport does not know.
    """
    if pattern not in PATTERNS:
        raise ConfigurationError(f"unknown socket pattern {pattern!r}; known are {', '.join(PATTERNS)}")
    if protocol.framing is None:
        return ZmqWire(pattern, address, bind)
    if pattern != "push" or not bind:
        raise ConfigurationError(
            f"{protocol.name} is sent over plain TCP: the detector waits for one client to connect; it cannot "
            + ("publish to several" if bind else "connect by itself")
        )
    return TcpWire(address, protocol.default_port)


async def send(wire: Wire, parts: Sequence[Payload]) -> None:
    """Send a message as soon as there is a receiver with room for it."""
    while not wire.try_send(parts):
        await wire.wait(1.0)
