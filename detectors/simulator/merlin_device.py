"""A simulated Merlin: its control port, over which the simulated detector is set, started and stopped.

It answers ``GET``, ``SET`` and ``CMD`` and keeps the variables; the frames themselves go out by
``detectors.simulator.sender.serve``, to which it is the ``trigger``:

    merlin = SimulatedMerlin(source)
    async with merlin.serving("tcp://127.0.0.1:6341"):
        await serve(merlin.source, "tcp://127.0.0.1:6342", protocol="merlin", passes=None, trigger=merlin)

The pulses of an external trigger come by themselves, a moment after STARTACQUISITION; the soft trigger is waited for.
Frames come at the pace that ``serve`` is given, whatever ACQUISITIONPERIOD is set to.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from detectors.addresses import host_and_port, shown_address, why
from detectors.errors import ConnectionFailed, ProtocolError
from detectors.messages import Encoding, SeriesId, SeriesStart
from detectors.protocols.merlin_control import (
    BUSY,
    NOT_RECOGNISED,
    OK,
    OUT_OF_RANGE,
    PORT,
    TRIGGERS,
    Reply,
    Request,
    parse_request,
)
from detectors.protocols.merlin_framing import framing
from detectors.simulator.source import FrameSource, Payload

_READ_BYTES = 4096
#: No request is longer; whoever sends more without one is let go.
_MOST_PENDING_BYTES = 1 << 16
_PULSES_AFTER_S = 0.1

_READ_ONLY = ("SOFTWAREVERSION", "DETECTORSTATUS", "TEMPERATURE")
_IDLE, _ACQUIRING = "0", "1"


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[str], bool]:
    return lambda text: text.isascii() and text.isdigit() and len(text) < 11 and low <= int(text) <= high


def _milliseconds(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


#: What may be set to what; other variables take anything.
_RANGES: dict[str, Callable[[str], bool]] = {
    "NUMFRAMESTOACQUIRE": _whole(0),
    "NUMFRAMESPERTRIGGER": _whole(1),
    "TRIGGERSTART": _whole(0, 5),
    "TRIGGERSTOP": _whole(0, 5),
    "COUNTERDEPTH": lambda text: text in ("1", "6", "12", "24"),
    "ACQUISITIONTIME": _milliseconds,
    "ACQUISITIONPERIOD": _milliseconds,
}


@dataclass
class _Acquisition:
    """One STARTACQUISITION. ``frames``: 0 for ever."""

    number: int
    frames: int
    soft: bool
    go: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)


class SimulatedMerlin:
    """See the module. ``variables``: what GET and SET reach, all of them texts."""

    def __init__(self, source: FrameSource) -> None:
        self.source: FrameSource = _AsSet(source, self)
        self.endpoint = ""
        self.variables = {
            "SOFTWAREVERSION": "liveptycho simulation",
            "DETECTORSTATUS": _IDLE,
            "TEMPERATURE": "30.0",
            "NUMFRAMESTOACQUIRE": str(source.frames_per_pass),
            "NUMFRAMESPERTRIGGER": "1",
            "TRIGGERSTART": "0",
            "TRIGGERSTOP": "0",
            "ACQUISITIONTIME": "1.0",
            "ACQUISITIONPERIOD": "1.0",
            "COUNTERDEPTH": "12",
            "CONTINUOUSRW": "0",
            "COLOURMODE": "0",
            "CHARGESUMMING": "0",
            "GAIN": "0",
            "FILEFORMAT": "0",
            "FILEENABLE": "0",
            "FILEDIRECTORY": "",
            "FILENAME": "",
            "HVBIAS": "120",
            "OPERATINGENERGY": "0",
            **{f"THRESHOLD{i}": "0" for i in range(8)},
        }
        self._count = 0
        self._current: _Acquisition | None = None
        """what was started last, until it is over"""
        self._sending: _Acquisition | None = None
        """what the sender is at; it may be a little behind"""
        self._begun: asyncio.Queue[_Acquisition] = asyncio.Queue()

    # the trigger of detectors.simulator.sender.serve

    async def start_series(self) -> SeriesId | None:
        if self._sending is not None and self._sending is self._current:
            self._stop()
        # What was started and stopped before the sender came to it is none of its concern.
        while (acquisition := await self._begun.get()).stopped.is_set():
            pass
        self._sending = acquisition
        return acquisition.number

    async def before_frames(self) -> None:
        assert self._sending is not None
        if self._sending.soft:
            await self._sending.go.wait()
        else:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._sending.stopped.wait(), _PULSES_AFTER_S)

    def remaining(self, sent: int) -> int:
        assert self._sending is not None
        if self._sending.stopped.is_set():
            return 0
        return max(0, self._sending.frames - sent) if self._sending.frames else sys.maxsize

    # the control port

    def answer(self, request: Request) -> Reply:
        """Carry a request out."""
        kind, name, value = request.kind, request.name, request.value
        if kind == "CMD":
            return Reply(kind, name, code=self._command(name))
        if name not in self.variables:
            return Reply(kind, name, code=NOT_RECOGNISED)
        if kind == "GET":
            return Reply(kind, name, self.variables[name])
        if name in _READ_ONLY or not _RANGES.get(name, bool)(value):
            return Reply(kind, name, code=OUT_OF_RANGE)
        if self._current is not None:
            return Reply(kind, name, code=BUSY)
        self.variables[name] = value
        return Reply(kind, name)

    def _command(self, name: str) -> int:
        if name == "STARTACQUISITION":
            if self._current is not None:
                return BUSY
            self._count += 1
            soft = int(self.variables["TRIGGERSTART"]) == TRIGGERS["soft"]
            self._current = _Acquisition(self._count, int(self.variables["NUMFRAMESTOACQUIRE"]), soft)
            self.variables["DETECTORSTATUS"] = _ACQUIRING
            self._begun.put_nowait(self._current)
        elif name in ("STOPACQUISITION", "ABORT", "RESET"):
            self._stop()
        elif name == "SOFTTRIGGER":
            if self._current is not None:
                self._current.go.set()
        else:
            return NOT_RECOGNISED
        return OK

    def _stop(self) -> None:
        """The acquisition in hand is over."""
        if self._current is not None:
            self._current.stopped.set()
            self._current.go.set()
            self._current, self.variables["DETECTORSTATUS"] = None, _IDLE

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncIterator[SimulatedMerlin]:
        """Answer on the control port ``address`` meanwhile. Raises ``ConnectionFailed`` when it cannot be used."""
        host, port = host_and_port(address, PORT)
        clients: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            clients[writer] = asyncio.current_task()
            try:
                with suppress(OSError):
                    await self._converse(reader, writer)
            finally:
                del clients[writer]
                writer.close()

        try:
            server = await asyncio.start_server(serve, host or None, port)
        except OSError as error:
            raise ConnectionFailed(f"cannot listen for commands on {address!r}: {why(error)}") from None
        self.endpoint = shown_address(host, server.sockets[0].getsockname()[1])
        try:
            yield self
        finally:
            server.close()
            for writer in clients:
                writer.close()
            await asyncio.gather(*filter(None, clients.values()), return_exceptions=True)
            await server.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pending = b""
        while len(pending) <= _MOST_PENDING_BYTES and (heard := await reader.read(_READ_BYTES)):
            pending += heard
            found = framing(memoryview(pending))
            for start, stop in found.bounds:
                with suppress(ProtocolError):  # a message that is no request is not answered
                    writer.write(bytes(self.answer(parse_request(pending[start:stop]))))
            pending = pending[found.used :]
            await writer.drain()


class _AsSet:
    """The source of a detector, with what was set on the control port in its start message."""

    def __init__(self, source: FrameSource, merlin: SimulatedMerlin) -> None:
        self._source, self._merlin = source, merlin

    @property
    def encoding(self) -> Encoding:
        return self._source.encoding

    @property
    def frames_per_pass(self) -> int:
        return self._source.frames_per_pass

    def start(self, series: SeriesId) -> SeriesStart:
        start, variables = self._source.start(series), self._merlin.variables
        own = {
            "count_time_s": float(variables["ACQUISITIONTIME"]) * 1e-3,
            "frames_per_trigger": int(variables["NUMFRAMESPERTRIGGER"]),
        }
        return replace(start, settings={**start.settings, **own})

    def blocks(self) -> Iterator[tuple[int, Sequence[Payload]]]:
        return self._source.blocks()
