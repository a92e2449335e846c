"""What is behind an address? Told from the first bytes that come from there, and from what it answers.

Nothing is taken off a stream: a ZeroMQ socket is left before the handshake is over, and before that it sends nothing.
Source: ZMTP 3.0 and 3.1 (ZeroMQ RFC 23 and 37).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from detectors.addresses import host_and_port, why
from detectors.errors import LiveptychoError
from detectors.protocols import merlin
from detectors.protocols.merlin_control import Request
from detectors.protocols.registry import PROTOCOLS, StreamProtocol, recognised

#: What a ZeroMQ peer sends first: signature (8 bytes of it are anything), major version; 64 bytes in all.
_SIGNATURE = (0xFF, 0x7F)
_SIGNATURE_BYTES, _GREETING_BYTES = 10, 64
#: Ours: version 3.0, no authentication, not a server.
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)

#: Asked where nothing comes by itself.
_HTTP_REQUEST = b"GET / HTTP/1.0\r\n\r\n"
_CONTROL_REQUEST = bytes(Request("GET", "SOFTWAREVERSION"))

#: How long something is waited for at a time [s], and how much of it is read.
_PATIENCE_S = 1.0
_READ_BYTES = 4096


#: Nobody is there if there is no connection after so long [s].
CONNECT_S = 3.0

#: Which ZeroMQ sockets each pattern receives from, and what to say where the other one is needed.
_SENDERS = {"pull": ("PUSH",), "sub": ("PUB", "XPUB")}
_FLAGS = {"pull": "the detector does not publish, leave --sub out", "sub": "the detector publishes, use --sub"}

_TCP_HINT = " (Merlin's data port, perhaps: use --protocol merlin)"


@dataclass(frozen=True)
class Answer:
    """``nobody``: why nobody is there, in words, else empty. ``said``: the first bytes that came by themselves;
    ``replied``: ... and to a question, where nothing had come. ``socket_type``: a ZeroMQ peer's, as it names it."""

    nobody: str = ""
    said: bytes = b""
    replied: bytes = b""
    socket_type: str = ""


async def probe(host: str, port: int, protocol: StreamProtocol, timeout_s: float) -> Answer:
    """Connect, listen, and ask where nothing comes. ``timeout_s``: for the connection; the rest takes 3 s at most."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return Answer(f"{host} does not answer: is it switched on, and does a firewall block port {port}?")
    except ConnectionRefusedError:
        return Answer(f"nobody listens on {host} port {port}: is the detector's stream switched on?")
    except (OSError, UnicodeError) as error:
        return Answer(f"{host} cannot be reached: {why(error) if isinstance(error, OSError) else error}")
    try:
        said = await _first_bytes(reader, _SIGNATURE_BYTES)
        if is_zeromq(said):
            writer.write(_GREETING)
            return Answer(said=said, socket_type=socket_type(await _first_bytes(reader, _READ_BYTES, said)))
        if said:
            return Answer(said=await _first_bytes(reader, _GREETING_BYTES, said))
        # An HTTP server would wait for the end of Merlin's request, and a Merlin need not see HTTP.
        for question in (_CONTROL_REQUEST, _HTTP_REQUEST) if protocol.name == merlin.NAME else (_HTTP_REQUEST,):
            with suppress(OSError):
                writer.write(question)
            if replied := await _first_bytes(reader, _GREETING_BYTES):
                return Answer(replied=replied)
        return Answer()
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _first_bytes(reader: asyncio.StreamReader, count: int, out: bytes = b"") -> bytes:
    """``out`` and what follows it, up to ``count`` bytes; fewer when no more come for a while."""
    with suppress(TimeoutError, OSError):
        async with asyncio.timeout(_PATIENCE_S):
            while len(out) < count and not socket_type(out) and (more := await reader.read(count - len(out))):
                out += more
    return out


def is_zeromq(data: bytes) -> bool:
    """Whether a ZeroMQ peer begins like this."""
    return len(data) >= _SIGNATURE_BYTES and (data[0], data[9]) == _SIGNATURE


def socket_type(data: bytes) -> str:
    """``PUSH``, ``PUB``, ...: from a ZeroMQ peer's greeting and READY command; empty where it does not say."""
    command = data[_GREETING_BYTES:]
    if command[:1] not in (b"\x04", b"\x06"):
        return ""
    size_bytes = 1 if command[:1] == b"\x04" else 8
    body = command[1 + size_bytes :][: int.from_bytes(command[1 : 1 + size_bytes], "big")]
    if not body.startswith(b"\x05READY"):
        return ""
    at = 6
    while at < len(body):  # name length, name, u32 value length, value
        name_end = at + 1 + body[at]
        value_end = name_end + 4 + int.from_bytes(body[name_end : name_end + 4], "big")
        if body[at + 1 : name_end].lower() == b"socket-type" and value_end <= len(body):
            return body[name_end + 4 : value_end].decode("ascii", "replace")
        at = value_end
    return ""


def advice(expected: StreamProtocol, data: bytes) -> str:
    """What to do where the first bytes that came are not of the expected protocol; empty when they tell nothing."""
    if expected.looks_like(data):
        return ""
    if data.startswith(b"HTTP/"):
        ports = [f"{protocol.default_port} ({protocol.name})" for protocol in PROTOCOLS.values()]
        return (
            "an HTTP server answers: is this the SIMPLON REST port? The stream has a port of its own, usually "
            f"{', '.join(ports[:-1])} or {ports[-1]}"
        )
    if is_zeromq(data):
        names = [protocol.name for protocol in PROTOCOLS.values() if protocol.framing is None]
        return f"a ZeroMQ socket answers, and {expected.name} is plain TCP: use --protocol {' or '.join(names)}"
    if (found := recognised(data)) is not None:
        return f"these are {found.name} messages ({found.summary}): use --protocol {found.name}"
    return ""


async def reach(
    address: str, protocol: StreamProtocol, pattern: str, timeout_s: float, said: bytes = b""
) -> tuple[str, str]:
    """Is anybody there, and does it speak the protocol's transport? ``said``: what came from there, if that is known
    already; otherwise a connection of its own tells, before any message is taken. Returns a verdict (OK, ERROR, or -
    for what is not probed) and a sentence."""

    scheme = address.partition("://")[0]
    if scheme in ("ipc", "inproc"):
        return ("-", f"{scheme} addresses are not probed")
    try:
        host, port = host_and_port(address, None if protocol.framing is None else protocol.default_port)
    except LiveptychoError as error:
        return ("ERROR", str(error))
    there = f"{host} port {port}"
    answer = Answer(said=said) if said else await probe(host, port, protocol, min(timeout_s, CONNECT_S))
    if answer.nobody:
        hint = "" if protocol.framing else " (if the detector connects to this program instead, use --bind)"
        return ("ERROR", answer.nobody + hint)
    if is_zeromq(answer.said) and protocol.framing is None:
        if answer.socket_type in _SENDERS[pattern] or not answer.socket_type:
            return ("OK", f"a ZeroMQ socket answers on {there}")
        right = next((flag for name, flag in _FLAGS.items() if answer.socket_type in _SENDERS[name]), "")
        return (
            "ERROR",
            f"a ZeroMQ {answer.socket_type} socket answers on {there}: {right or 'it sends no frames; check the port'}",
        )
    if text := advice(protocol, answer.said or answer.replied):
        return ("ERROR", f"{there}: {text}")
    if protocol.framing is not None and not answer.said:
        if protocol.looks_like(answer.replied):
            return (
                "ERROR",
                f"{there} answers commands: it is the control port; frames come from another one, usually "
                f"{protocol.default_port}",
            )
        return ("OK", f"a TCP server takes the connection on {there}")
    what = f"begins with {answer.said[:10]!r}" if answer.said else "says nothing by itself"
    return (
        "ERROR",
        f"something on {there} answers, but not {'ZeroMQ' if protocol.framing is None else protocol.name}: it {what}"
        f"{_TCP_HINT if protocol.framing is None and not answer.said else ''}; check the port number",
    )
