"""The protocols that ``--protocol NAME`` knows. A new vendor is one new module and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from detectors import native
from detectors.errors import ConfigurationError
from detectors.messages import StreamDecoder, StreamEncoder


@dataclass(frozen=True)
class StreamProtocol:
    """One way of sending frames: how to read it, how to speak it, and where it is usually found."""

    name: str
    summary: str
    decoder: Callable[[], StreamDecoder]
    encoder: Callable[[], StreamEncoder]
    default_port: int


_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        StreamProtocol(
            "native", "msgpack over ZeroMQ, docs/protocol.md", native.NativeDecoder, native.NativeEncoder, native.PORT
        ),
    )
}


def protocol_named(name: str) -> StreamProtocol:
    """Look a protocol up. Raises ``ConfigurationError`` naming the known ones."""
    try:
        return _PROTOCOLS[name]
    except KeyError:
        raise ConfigurationError(f"unknown protocol {name!r}; known are {', '.join(_PROTOCOLS)}") from None
