"""A Merlin detector as ``stream.control`` sees it: its control port in the words of a scan."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

from detectors.addresses import host_and_port, shown_address, why
from detectors.errors import ConfigurationError, ConnectionFailed, LiveptychoError, ProtocolError
from detectors.messages import SeriesId
from detectors.protocols.merlin_control import BUSY, OK, PORT, TRIGGERS, Reply, Request, parse_reply, reply_framing
from stream.control.active_scan import DetectorFacts, Finished, Prepared, ScanPlan

#: A reply is given so long to come [s], and so many bytes to come in.
_REPLY_S = 5.0
_MOST_PENDING_BYTES = 1 << 16
_READ_BYTES = 4096

_ACQUIRING = "1"

#: What begins and ends an exposure for each kind of trigger: names in ``TRIGGERS``.
_START_AND_STOP = {
    "software": ("internal", "internal"),
    "pixel": ("rising-ttl", "internal"),
    "line": ("rising-ttl", "internal"),
    "gate": ("rising-ttl", "falling-ttl"),
}


class MerlinControl:
    """A Merlin over its control port: see ``stream.control.DetectorControl``.

    ``trigger_start``, ``trigger_stop``: codes for TRIGGERSTART and TRIGGERSTOP where those of ``TRIGGERS`` do not fit
    (LVDS instead of TTL, older systems); a software trigger is followed by SOFTTRIGGER.
    """

    def __init__(self, address: str, *, trigger_start: int | None = None, trigger_stop: int | None = None) -> None:
        self._host, self._port = host_and_port(address, PORT)
        self._codes = trigger_start, trigger_stop
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._pending = b""
        self._one_at_a_time = asyncio.Lock()
        self._armed = 0

    async def __aenter__(self) -> Self:
        async with self._one_at_a_time:
            await self._connected()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._disconnect()

    async def describe(self) -> DetectorFacts:
        version = await self._ask("SOFTWAREVERSION")
        milliseconds = await self._ask("ACQUISITIONTIME")
        settings: dict[str, object] = {"detector": "Merlin"}
        if version:
            settings["software_version"] = version
        with suppress(TypeError, ValueError):
            settings["count_time_s"] = float(milliseconds or "") * 1e-3
        return DetectorFacts(settings)

    async def prepare(self, plan: ScanPlan) -> Prepared:
        if await self._ask("DETECTORSTATUS") == _ACQUIRING:
            raise ConfigurationError(
                f"the Merlin at {self._shown} is acquiring: another program (its own, LiberTEM, ...) may hold it; stop "
                "the acquisition there first"
            )
        start, stop = (
            TRIGGERS[name] if code is None else code
            for name, code in zip(_START_AND_STOP[plan.trigger], self._codes, strict=True)
        )
        await self._set("NUMFRAMESTOACQUIRE", plan.frames)
        await self._set("TRIGGERSTART", start)
        await self._set("TRIGGERSTOP", stop)
        if plan.trigger != "software":
            await self._set("NUMFRAMESPERTRIGGER", plan.frames_per_line if plan.trigger == "line" else 1)
        if plan.count_time_s is not None:
            await self._set("ACQUISITIONTIME", _milliseconds(plan.count_time_s))
        if plan.frame_time_s is not None:
            await self._set("ACQUISITIONPERIOD", _milliseconds(plan.frame_time_s))
        frame_time_s = None
        with suppress(TypeError, ValueError):
            frame_time_s = float(await self._ask("ACQUISITIONPERIOD") or "") * 1e-3
        return Prepared(frame_time_s)

    async def arm(self) -> SeriesId:
        try:
            await self._command("STARTACQUISITION")
        except ConnectionFailed:
            # The answer was lost, and not the command: it must not stay armed.
            with suppress(LiveptychoError):
                await self.abort()
            raise
        self._armed += 1
        return f"started here #{self._armed}"

    async def trigger(self) -> None:
        try:
            await self._command("SOFTTRIGGER")
        except ConfigurationError:
            # With an internal trigger, STARTACQUISITION has begun it all; some simulators wait even then.
            if self._codes[0] not in (None, TRIGGERS["internal"]):
                raise

    async def flush(self) -> None:
        """Nothing is held back."""

    async def finish(self) -> Finished:
        await self.abort()
        return Finished()

    async def abort(self) -> None:
        await self._command("STOPACQUISITION")

    async def dropped(self) -> int | None:
        return None

    # one request, one reply

    @property
    def _shown(self) -> str:
        return shown_address(self._host, self._port)

    async def _ask(self, name: str) -> str | None:
        """A variable's value; None where this Merlin does not have it."""
        reply = await self._exchange(Request("GET", name))
        return reply.value if reply.code == OK else None

    async def _set(self, name: str, value: int | str) -> None:
        self._require(await self._exchange(Request("SET", name, str(value))), f"{name} = {value}")

    async def _command(self, name: str) -> None:
        self._require(await self._exchange(Request("CMD", name)), name)

    def _require(self, reply: Reply, what: str) -> None:
        if reply.code != OK:
            hint = "; is an acquisition running?" if reply.code == BUSY else ""
            raise ConfigurationError(f"the Merlin at {self._shown} refuses {what}: {reply.meaning}{hint}")

    async def _exchange(self, request: Request) -> Reply:
        async with self._one_at_a_time:
            reader, writer = await self._connected()
            try:
                async with asyncio.timeout(_REPLY_S):
                    writer.write(bytes(request))
                    await writer.drain()
                    while not (reply := self._reply(request)):
                        if not (heard := await reader.read(_READ_BYTES)):
                            raise ConnectionResetError("it was closed from there")
                        self._pending += heard
                return reply
            except TimeoutError:
                reason = f"no answer to {_words(request)} within {_REPLY_S:.0f} s: is it Merlin's control port?"
            except ProtocolError as error:
                reason = str(error)
            except OSError as error:
                reason = f"the connection broke off: {why(error)}"
            except asyncio.CancelledError:
                await self._disconnect()  # the reply would be taken for that of the next request
                raise
            await self._disconnect()
            raise ConnectionFailed(f"Merlin at {self._shown}: {reason}")

    def _reply(self, request: Request) -> Reply | None:
        """The reply, if it has come; others before it are of no concern."""
        found = reply_framing(memoryview(self._pending))
        messages = [self._pending[start:stop] for start, stop in found.bounds]
        self._pending = self._pending[found.used :]
        if len(self._pending) > _MOST_PENDING_BYTES or (found.stray and not messages):
            raise ProtocolError("what answers there is not Merlin's control port (usually 6341)")
        replies = (parse_reply(message) for message in messages)
        return next((reply for reply in replies if reply.answers(request)), None)

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._connection is None:
            self._pending = b""
            try:
                async with asyncio.timeout(_REPLY_S):
                    self._connection = await asyncio.open_connection(self._host, self._port)
            except (OSError, UnicodeError) as error:
                reason = why(error) if isinstance(error, OSError) else str(error)
                raise ConnectionFailed(
                    f"cannot connect to Merlin's control port {self._shown}: {reason or 'it does not answer'}; "
                    "is the Merlin software running?"
                ) from None
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection[1].close()
            with suppress(OSError):
                await connection[1].wait_closed()


def _words(request: Request) -> str:
    return ",".join(filter(None, (request.kind, request.name, request.value)))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.9g}"
