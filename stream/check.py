"""What arrives at an address? Each question answered with OK, TIMEOUT or ERROR, and with advice."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from detectors import codec
from detectors.errors import LiveptychoError, ProtocolError
from detectors.messages import FrameBlock, SeriesEnd, SeriesStart, Undecodable
from detectors.protocols.registry import protocol_named
from stream.config import Layer
from stream.intake import Silence, messages
from stream.parameters import Resolution
from stream.receiver import Receiver

#: The first bytes that a ZeroMQ peer sends: signature, 8 bytes, 0x7F, and its major version (ZMTP 3.x, RFC 23).
_ZMTP_SIGNATURE = (0xFF, 0x7F)


#: Frames of each block that are unpacked.
_TRIED = 16


@dataclass(frozen=True)
class Finding:
    """One line of the table; ``verdict`` is OK, TIMEOUT, ERROR, or - for what could not be looked at."""

    name: str
    verdict: str
    text: str


async def check_address(
    address: str, *, protocol: str = "native", bind: bool = False, pattern: str = "pull", timeout_s: float = 5.0
) -> list[Finding]:
    """Listen at ``address`` for up to ``timeout_s`` seconds and say what came. Raises ``LiveptychoError`` only for an
    unknown protocol or pattern."""
    decoder = protocol_named(protocol).decoder
    findings = []
    if not bind:
        reach = await _reach(address, min(timeout_s, 3.0))
        findings.append(reach)
        if reach.verdict == "ERROR":
            return findings + [
                Finding(name, "-", "not looked at") for name in ("messages", "start", "frames", "settings", "end")
            ]
    seen = _Seen()
    try:
        async with Receiver([address], bind=bind, pattern=pattern) as receiver:
            deadline = time.monotonic() + timeout_s
            stream = messages(receiver, decoder, tick_s=0.1)
            try:
                async for item in stream:
                    seen.take(item)
                    if seen.enough or time.monotonic() > deadline:
                        break
            finally:
                await stream.aclose()
    except LiveptychoError as error:
        return [*findings, Finding("socket", "ERROR", str(error))]
    return findings + seen.findings(protocol, timeout_s)


async def _reach(address: str, timeout_s: float) -> Finding:
    """Is anybody there, and does it speak ZeroMQ? A plain connection tells, before any message is taken."""
    scheme = address.partition("://")[0]
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if scheme != "tcp" or not host or port is None:
        if scheme in ("ipc", "inproc"):
            return Finding("connection", "-", f"{scheme} addresses are not probed")
        return Finding("connection", "ERROR", f"{address!r} is not an address; write tcp://HOST:PORT")
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return Finding(
            "connection", "ERROR", f"{host} does not answer: is it switched on, and does a firewall block port {port}?"
        )
    except (socket.gaierror, UnicodeError):
        return Finding("connection", "ERROR", f"there is no host called {host!r}")
    except OSError:
        return Finding(
            "connection",
            "ERROR",
            f"nobody listens on {host} port {port}: is the detector's stream switched on? (if the "
            "detector connects to this program instead, use --bind)",
        )
    greeting = b""
    with suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
        async with asyncio.timeout(1.0):
            greeting = await reader.readexactly(10)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    if len(greeting) == 10 and (greeting[0], greeting[9]) == _ZMTP_SIGNATURE:
        return Finding("connection", "OK", f"a ZeroMQ socket answers on {host} port {port}")
    what = "says nothing by itself (an HTTP server, perhaps)" if not greeting else f"begins with {greeting!r}"
    return Finding(
        "connection",
        "ERROR",
        f"something on {host} port {port} answers, but not ZeroMQ: it {what}; check the port number",
    )


class _Seen:
    """What came, counted."""

    def __init__(self) -> None:
        self.starts: list[SeriesStart] = []
        self.frames = self.blocks = self.ends = self.unreadable = 0
        self.reason = ""
        self.lowest = self.highest = -1
        self.tried = self.damaged = 0
        self.damage = ""
        self.encoding = ""

    def take(self, item: object) -> None:
        if isinstance(item, SeriesStart):
            self.starts.append(item)
        elif isinstance(item, FrameBlock):
            self.frames += len(item)
            self._try_some(item)
            self.encoding = item.encoding.name.lower()
            self.highest = max(self.highest, int(item.indices.max()))
            self.lowest = int(item.indices.min()) if self.lowest < 0 else min(self.lowest, int(item.indices.min()))
        elif isinstance(item, SeriesEnd):
            self.ends += 1
        elif isinstance(item, Undecodable):
            self.unreadable += 1
            self.reason = item.reason
        else:
            assert isinstance(item, Silence)

    def _try_some(self, block: FrameBlock) -> None:
        """Unpack the first frames of a block: enough to see damage, few enough not to fall behind."""
        if not self.starts or self.starts[-1].series != block.series:
            return
        start = self.starts[-1]
        for offset, size in list(zip(block.offsets, block.sizes, strict=True))[:_TRIED]:
            self.tried += 1
            try:
                codec.decode(block.slab[offset : offset + size], block.encoding, start.detector_shape, start.dtype)
            except ProtocolError as error:
                self.damaged += 1
                self.damage = str(error)

    @property
    def enough(self) -> bool:
        return self.ends > 0 or self.unreadable >= 20

    def findings(self, protocol: str, timeout_s: float) -> list[Finding]:
        if not (self.starts or self.frames or self.ends or self.unreadable):
            advice = "nothing came: is a series armed and triggered? Another client may be taking the messages"
            return [Finding("messages", "TIMEOUT", f"{advice} (waited {timeout_s:g} s)")]
        out = []
        if self.unreadable:
            out.append(
                Finding(
                    "messages",
                    "ERROR",
                    f"{self.unreadable} message(s) are not {protocol}: {self.reason}; is another --protocol spoken?",
                )
            )
        else:
            out.append(Finding("messages", "OK", f"they are {protocol}"))
        out += [self._start(), self._frames(), *self._settings()]
        out.append(
            Finding("end", "OK", "the series ended")
            if self.ends
            else Finding("end", "-", "did not come while listening")
        )
        return out

    def _start(self) -> Finding:
        if not self.starts:
            return Finding("start", "TIMEOUT", "no start message: listen before the detector is armed")
        start = self.starts[-1]
        scan = (
            "scan shape not said" if start.scan_shape is None else f"scan {start.scan_shape[0]}x{start.scan_shape[1]}"
        )
        rows, columns = start.detector_shape
        return Finding("start", "OK", f"series {start.series}: detector {rows}x{columns} {start.dtype.name}, {scan}")

    def _frames(self) -> Finding:
        if not self.frames:
            return Finding("frames", "TIMEOUT", "no frames: is the detector triggered?")
        span = self.highest - self.lowest + 1
        text = f"{self.frames} frames ({self.encoding}), numbers {self.lowest} to {self.highest}"
        if 0.4 < self.frames / span < 0.6 and span > 10:
            return Finding("frames", "ERROR", f"{text}: every second frame is missing: is another client connected?")
        if self.damaged:
            return Finding(
                "frames", "ERROR", f"{text}: {self.damaged} of {self.tried} looked at are damaged: {self.damage}"
            )
        if self.frames < span:
            return Finding("frames", "ERROR", f"{text}: {span - self.frames} are missing")
        return Finding("frames", "OK", text)

    def _settings(self) -> list[Finding]:
        if not self.starts:
            return []
        start = self.starts[-1]
        own = dict(start.settings, **({} if start.scan_shape is None else {"scan_shape": start.scan_shape}))
        try:
            Resolution([Layer.of("stream", own, ignore_unknown=True)]).require()
        except LiveptychoError as error:
            return [Finding("settings", "-", f"`live` will need more than the stream says; {error}")]
        return [Finding("settings", "OK", "the stream says everything that `live` needs")]
