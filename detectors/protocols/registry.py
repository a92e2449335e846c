"""The protocols that ``--protocol NAME`` knows. A new vendor is one new module in this folder and one line here.

Each module has the same names: ``NAME``, ``SUMMARY``, ``PORT``, ``ENCODINGS``, ``Decoder``, ``Encoder``,
``looks_like``, and ``framing`` where messages come over plain TCP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from detectors.errors import ConfigurationError
from detectors.messages import Encoding, Framing, StreamDecoder, StreamEncoder
from detectors.protocols import dectris_v1, dectris_v2, merlin, native


@dataclass(frozen=True)
class StreamProtocol:
    """One way of sending frames: how to read it, how to speak it, and where it is usually found.

    ``encodings``: the names that ``simulate --encoding`` takes, the usual one first. ``looks_like`` tells from the
    first part of a message whether it may be of this protocol, for advice. ``framing``: None where ZeroMQ keeps the
    messages apart.
    """

    name: str
    summary: str
    default_port: int
    encodings: Mapping[str, Encoding]
    decoder: Callable[[], StreamDecoder]
    encoder: Callable[[], StreamEncoder]
    looks_like: Callable[[bytes], bool]
    framing: Framing | None = None


class ProtocolModule(Protocol):
    """The names that each module in this folder has: see ``StreamProtocol``."""

    NAME: str
    SUMMARY: str
    PORT: int

    @property
    def ENCODINGS(self) -> Mapping[str, Encoding]: ...  # noqa: N802

    @property
    def Decoder(self) -> Callable[[], StreamDecoder]: ...  # noqa: N802

    @property
    def Encoder(self) -> Callable[[], StreamEncoder]: ...  # noqa: N802

    @property
    def looks_like(self) -> Callable[[bytes], bool]: ...


def _entry(module: ProtocolModule, framing: Framing | None = None) -> StreamProtocol:
    return StreamProtocol(
        module.NAME,
        module.SUMMARY,
        module.PORT,
        module.ENCODINGS,
        module.Decoder,
        module.Encoder,
        module.looks_like,
        framing,
    )


PROTOCOLS: Mapping[str, StreamProtocol] = {
    protocol.name: protocol
    for protocol in (
        _entry(native),
        _entry(dectris_v2),
        _entry(dectris_v1),
        _entry(merlin, merlin.framing),
    )
}


def protocol_named(name: str) -> StreamProtocol:
    """Look a protocol up. Raises ``ConfigurationError`` naming the known ones."""
    try:
        return PROTOCOLS[name]
    except KeyError:
        raise ConfigurationError(f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}") from None


def recognised(part: bytes) -> StreamProtocol | None:
    """The protocol that a message's first part seems to belong to, if any."""
    return next((protocol for protocol in PROTOCOLS.values() if protocol.looks_like(part)), None)
