"""What arrives at an address? Each question answered with OK, TIMEOUT or ERROR, and with advice."""

from __future__ import annotations

import time
from dataclasses import dataclass

from detectors import codec
from detectors.errors import LiveptychoError, ProtocolError
from detectors.messages import Announced, FrameBlock, SeriesEnd, SeriesId, SeriesStart, Undecodable
from detectors.protocols.registry import protocol_named
from stream.config import Layer
from stream.intake import Silence, messages
from stream.neighbours import GapPattern
from stream.parameters import Resolution
from stream.probe import CONNECT_S, reach
from stream.receiving import open_receiver

#: Frames of each block that are unpacked.
_TRIED = 16


@dataclass(frozen=True)
class Finding:
    """One line of the table; ``verdict`` is OK, TIMEOUT, ERROR, or - for what could not be looked at."""

    name: str
    verdict: str
    text: str


_UNSEEN = [Finding(name, "-", "not looked at") for name in ("messages", "start", "frames", "settings", "end")]


async def check_address(
    address: str, *, protocol: str = "native", bind: bool = False, pattern: str = "pull", timeout_s: float = 5.0
) -> list[Finding]:
    """Listen at ``address`` for up to ``timeout_s`` seconds and say what came. Raises ``LiveptychoError`` only for an
    unknown protocol or pattern."""
    spoken = protocol_named(protocol)
    receiver = open_receiver(spoken, [address], bind=bind, pattern=pattern)
    over_tcp = spoken.framing is not None
    findings = []
    # Over plain TCP there may be one client only, and what is sent meanwhile is lost: there, listening comes first.
    if not (bind or over_tcp):
        findings.append(Finding("connection", *await reach(address, spoken, pattern, timeout_s)))
        if findings[-1].verdict == "ERROR":
            return findings + _UNSEEN
    seen = _Seen()
    try:
        async with receiver:
            deadline = time.monotonic() + timeout_s
            stream = messages(receiver, spoken, tick_s=0.1)
            try:
                async for item in stream:
                    seen.take(item)
                    nobody = isinstance(item, Silence) and item.seconds >= CONNECT_S and receiver.link
                    if seen.enough or nobody or time.monotonic() > deadline:
                        break
            finally:
                await stream.aclose()
    except LiveptychoError as error:
        return [*findings, Finding("connection" if over_tcp else "socket", "ERROR", str(error))]
    if over_tcp:
        findings.append(
            Finding("connection", "OK", f"a TCP connection to {receiver.endpoints[0]}")
            if seen.understood
            else Finding("connection", *await reach(address, spoken, pattern, timeout_s, receiver.first_stray))
        )
        if findings[-1].verdict == "ERROR":
            return findings + _UNSEEN
    return findings + seen.findings(protocol, timeout_s)


class _Seen:
    """What came, counted."""

    def __init__(self) -> None:
        self.starts: list[SeriesStart] = []
        self.announced: SeriesId | None = None
        self.frames = self.blocks = self.ends = self.unreadable = 0
        self.reason = ""
        self.lowest = self.highest = -1
        self.gaps = GapPattern()
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
            self.gaps.take(item.indices)
            self.highest = max(self.highest, int(item.indices.max()))
            self.lowest = int(item.indices.min()) if self.lowest < 0 else min(self.lowest, int(item.indices.min()))
        elif isinstance(item, SeriesEnd):
            self.ends += 1
        elif isinstance(item, Announced):
            self.announced = item.series
        elif isinstance(item, Undecodable):
            self.unreadable += max(1, item.frames)
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
    def understood(self) -> bool:
        """Whether there was anything of the expected protocol."""
        return bool(self.starts or self.frames or self.ends)

    @property
    def enough(self) -> bool:
        return self.ends > 0 or self.unreadable >= 20

    def findings(self, protocol: str, timeout_s: float) -> list[Finding]:
        if not (self.understood or self.unreadable):
            advice = "nothing came: is a series armed and triggered? Another client may be taking the messages"
            return [Finding("messages", "TIMEOUT", f"{advice} (waited {timeout_s:g} s)")]
        out = []
        if self.unreadable:
            out.append(
                Finding(
                    "messages",
                    "ERROR",
                    f"{self.unreadable} message(s) are not {protocol}: {self.reason}"
                    + ("" if "--protocol" in self.reason else "; is another --protocol spoken?"),
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
        if not self.starts and self.announced is not None:
            return Finding("start", "OK", f"series {self.announced} was announced, and waits for its first frame")
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
        if self.gaps.sentence:
            return Finding("frames", "ERROR", f"{text}: {self.gaps.sentence}")
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
            Resolution([Layer.of("stream", own, ignore_unknown=True)], start.frames).require()
        except LiveptychoError as error:
            return [Finding("settings", "-", f"`live` will need more than the stream says; {error}")]
        return [Finding("settings", "OK", "the stream says everything that `live` needs")]
