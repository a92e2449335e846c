"""The dialogue on Merlin's control socket (port 6341), sans-IO: requests and replies as bytes and back.

    > MPX,0000000025,SET,NUMFRAMESTOACQUIRE,8
    < MPX,0000000024,SET,NUMFRAMESTOACQUIRE,0        the last field is the return code
    > MPX,0000000020,GET,SOFTWAREVERSION
    < MPX,0000000027,GET,SOFTWAREVERSION,undef,0     value, return code
    > MPX,0000000021,CMD,STARTACQUISITION
    < MPX,0000000022,CMD,STARTACQUISITION,0

Messages are framed as on the data socket: ``framing`` finds requests in the received bytes, ``reply_framing`` replies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from detectors.errors import ProtocolError
from detectors.messages import Framed
from detectors.protocols.merlin_framing import framing, message, payload_of

__all__ = ["Reply", "Request", "framing", "parse_reply", "parse_request", "reply_framing"]

PORT = 6341

OK, BUSY, NOT_RECOGNISED, OUT_OF_RANGE = range(4)

#: Return codes in words.
MEANINGS = {OK: "done", BUSY: "busy", NOT_RECOGNISED: "not recognised", OUT_OF_RANGE: "out of range"}

#: Codes of TRIGGERSTART and TRIGGERSTOP. Older systems have another number for ``soft`` (ADMerlin sends them a 3).
TRIGGERS = {"internal": 0, "rising-ttl": 1, "falling-ttl": 2, "rising-lvds": 3, "falling-lvds": 4, "soft": 5}

Kind = Literal["GET", "SET", "CMD"]


@dataclass(frozen=True)
class Request:
    """``Request("GET", name)``, ``Request("SET", name, value)`` (which may hold commas), ``Request("CMD", name)``."""

    kind: Kind
    name: str
    value: str = ""

    def __bytes__(self) -> bytes:
        """The message as sent, ``MPX`` prefix and all."""
        return _packed(self.kind, self.name, *([self.value] if self.kind == "SET" else []))


@dataclass(frozen=True)
class Reply:
    """The answer to a request: its ``kind`` and ``name`` again, the ``value`` of a GET, and the return code."""

    kind: Kind
    name: str
    value: str = ""
    code: int = OK

    @property
    def meaning(self) -> str:
        """The return code in words."""
        return MEANINGS.get(self.code, f"return code {self.code}")

    def answers(self, request: Request) -> bool:
        return (self.kind, self.name) == (request.kind, request.name)

    def __bytes__(self) -> bytes:
        """The message as sent, ``MPX`` prefix and all."""
        return _packed(self.kind, self.name, *([self.value] if self.kind == "GET" else []), str(self.code))


def reply_framing(data: memoryview) -> Framed:
    """The replies in ``data``: see ``detectors.messages.Framing``."""
    return framing(data, replies=True)


def parse_request(data: bytes | memoryview) -> Request:
    """Read a request, with or without its ``MPX`` prefix. Raises ``ProtocolError`` for what is none."""
    kind, name, rest = _unpacked(data)
    if kind != "SET":  # LiberTEM gives every request a value
        return Request(kind, name)
    if not rest:
        raise ProtocolError(f"a Merlin SET request needs a value: {_shown(data)}")
    return Request(kind, name, ",".join(rest))


def parse_reply(data: bytes | memoryview) -> Reply:
    """Read a reply, with or without its ``MPX`` prefix. Raises ``ProtocolError`` for what is none."""
    kind, name, rest = _unpacked(data)
    if not rest or not (rest[-1].isascii() and rest[-1].isdigit() and len(rest[-1]) < 6):
        raise ProtocolError(f"a Merlin reply ends with a return code: {_shown(data)}")
    if kind != "GET" and len(rest) > 1:
        raise ProtocolError(f"a Merlin reply to {kind} has a return code and nothing else: {_shown(data)}")
    return Reply(kind, name, ",".join(rest[:-1]), int(rest[-1]))


def _packed(*fields: str) -> bytes:
    return message(",".join(fields).encode("latin-1"))


def _unpacked(data: bytes | memoryview) -> tuple[Kind, str, list[str]]:
    kind, *fields = bytes(payload_of(memoryview(data))).decode("latin-1").rstrip("\r\n\0").split(",")
    if kind not in ("GET", "SET", "CMD") or not fields or not fields[0].strip():
        raise ProtocolError(f"a Merlin control message is GET, SET or CMD and a name: {_shown(data)}")
    return cast(Kind, kind), fields[0].strip(), [field.strip() for field in fields[1:]]


def _shown(data: bytes | memoryview) -> str:
    return repr(bytes(data[:80]))
