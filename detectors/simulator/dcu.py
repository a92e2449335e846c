"""A simulated detector control unit: the SIMPLON interface over which the simulated detector is armed and triggered.

It answers REST and keeps the detector's state (na -> idle -> ready -> acquire -> idle); the frames themselves go out by
``detectors.simulator.sender.serve``, to which it is the ``trigger``:

    dcu = SimulatedDCU(source, protocol="dectris-v2")
    async with dcu.serving("http://127.0.0.1:8080"):
        await serve(dcu.source, address, protocol="dectris-v2", passes=None, trigger=dcu)

Unlike a real one it drops nothing: it waits for a receiver. In external trigger modes the pulses come by themselves,
and several software triggers bring all their frames with the last of them. Frames come at the pace that ``serve`` is
given, whatever the frame time is set to.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import yarl
from aiohttp import web

from detectors.errors import ConfigurationError, ConnectionFailed
from detectors.messages import SeriesId, SeriesStart
from detectors.protocols.dectris import FORMATS
from detectors.simulator.dcu_keys import READOUT_S, VERSION, Key, dcu_keys
from detectors.simulator.source import FrameSource, Payload

_EXTERNAL = ("exts", "exte")
#: A series that is ended has to be given up by the sender within so long [s].
_ENDING_S = 5.0


@dataclass
class _Series:
    """What was armed. ``go``: triggered; ``ended``: no more frames are wanted; ``over``: its end has been sent."""

    number: int
    frames: int
    mode: str
    triggers_left: int
    go: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class _Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SimulatedDCU:
    """See the module. ``frame_time_s``: what it tells until it is set. ``initialised``: idle from the beginning.

    ``pulses_after_s``: how long after arming the first external trigger comes. Everything else is what ``source`` says
    of its detector. ``dropped`` may be set, to be told until the next arming.
    """

    def __init__(
        self,
        source: FrameSource,
        protocol: str = "dectris-v2",
        *,
        frame_time_s: float = 1e-3,
        initialised: bool = True,
        pulses_after_s: float = 0.2,
    ) -> None:
        if protocol not in FORMATS:
            raise ConfigurationError(f"a simulated DCU speaks {' or '.join(FORMATS)}, not {protocol}")
        self.state = "idle" if initialised else "na"
        self.dropped = 0
        self.url = ""
        self.source: FrameSource = _AsConfigured(source, self)
        self._pulses_after_s = pulses_after_s
        self._count = 0
        self._series: _Series | None = None
        self._served: _Series | None = None
        self._armed: asyncio.Queue[_Series] = asyncio.Queue()
        self._config = dcu_keys(source, FORMATS[protocol], frame_time_s)

    def __getitem__(self, key: str) -> Any:
        """A configuration value, as ``detector/nimages``."""
        module, _, name = key.partition("/")
        return self._config[module][name].value

    # the trigger of detectors.simulator.sender.serve

    async def start_series(self) -> SeriesId | None:
        if self._served is not None:
            self._close(self._served)  # its end message has been sent
            self._served = None
        # What was armed and ended before the sender came to it is none of its concern.
        while (series := await self._armed.get()).ended.is_set():
            pass
        self._served = series
        return series.number

    async def before_frames(self) -> None:
        series = self._served
        assert series is not None
        if series.mode in _EXTERNAL:
            with suppress(TimeoutError):
                await asyncio.wait_for(series.ended.wait(), self._pulses_after_s)
        else:
            waiting = [asyncio.ensure_future(event.wait()) for event in (series.go, series.ended)]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
        if not series.ended.is_set():
            self.state = "acquire"

    def remaining(self, sent: int) -> int:
        series = self._served
        return 0 if series is None or series.ended.is_set() else max(0, series.frames - sent)

    def _close(self, series: _Series) -> None:
        series.ended.set()
        series.over.set()
        if self._series is series:
            self._series, self.state = None, "idle"

    # commands

    async def _command(self, name: str, argument: Any) -> Any:
        commands: dict[str, Callable[[], Any]] = {
            "initialize": self._initialize,
            "arm": self._arm,
            "trigger": self._trigger,
            **dict.fromkeys(("disarm", "cancel", "abort"), self._end),
        }
        if name not in commands:
            raise _Refusal(404, f"unknown command {name}")
        if self.state == "na" and name != "initialize":
            raise _Refusal(400, "the detector has not been initialized")
        if argument is not None and not (name == "trigger" and self["detector/trigger_mode"] == "inte"):
            raise _Refusal(400, f"{name} takes no argument here")
        return await commands[name]()

    async def _initialize(self) -> dict[str, Any]:
        if self._series is not None:
            await self._end()
        self.state = "idle"
        return {}

    async def _arm(self) -> dict[str, Any]:
        if self.state != "idle":
            raise _Refusal(400, f"arm is not possible in state {self.state}")
        triggers = self["detector/ntrigger"]
        self._count += 1
        self.dropped = 0
        frames = triggers * self["detector/nimages"]
        self._series = series = _Series(self._count, frames, self["detector/trigger_mode"], triggers)
        self.state = "ready"
        if self["stream/mode"] == "enabled":
            self._armed.put_nowait(series)
        elif series.mode in _EXTERNAL:
            self._close(series)  # triggered, read out, and nobody is told
        return {"sequence id": series.number}

    async def _trigger(self) -> dict[str, Any]:
        series = self._series
        if series is None:
            raise _Refusal(400, f"trigger is not possible in state {self.state}")
        if series.mode in _EXTERNAL or not series.triggers_left:
            raise _Refusal(400, f"trigger is not possible: the trigger mode is {series.mode}")
        series.triggers_left -= 1
        if not series.triggers_left:
            series.go.set()
            if self["stream/mode"] == "enabled":
                await series.over.wait()
            else:
                self._close(series)
        return {}

    async def _end(self) -> dict[str, Any]:
        series = self._series
        if series is not None:
            series.ended.set()
            if self._served is series:
                with suppress(TimeoutError):
                    await asyncio.wait_for(series.over.wait(), _ENDING_S)
            self._close(series)  # also when nobody serves it, or the sender hangs
        return {"sequence id": self._count}

    # REST

    @asynccontextmanager
    async def serving(self, url: str = "http://127.0.0.1:0") -> AsyncIterator[str]:
        """Answer at ``url``; port 0 takes any free one. Gives the address. Raises ``ConnectionFailed``."""
        try:
            host, port = yarl.URL(url).host, yarl.URL(url).port
        except ValueError:
            host, port = None, None
        if not url.startswith("http://") or host is None or port is None:
            raise ConfigurationError(f"{url!r} is not an address to answer at; expected like http://127.0.0.1:8080")
        application = web.Application()
        application.router.add_get("/detector/api/version/", self._answer_version)
        application.router.add_route("*", "/{module}/api/{version}/{kind}/{key:.+}", self._answer)
        application.router.add_put("/{module}/api/{version}/{kind}", self._answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise ConnectionFailed(f"cannot answer at {url}: {error.strerror or error}") from None
            self.url = str(yarl.URL.build(scheme="http", host=host, port=runner.addresses[0][1]))
            yield self.url
        finally:
            if self._series is not None:
                self._close(self._series)  # whoever waits for a trigger is answered
            await runner.cleanup()

    async def _answer_version(self, request: web.Request) -> web.Response:
        return web.json_response({"value": VERSION, "value_type": "string"})

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            return web.json_response(await self._answered(request))
        except _Refusal as refusal:
            return web.Response(status=refusal.status, text=str(refusal))

    async def _answered(self, request: web.Request) -> Any:
        module, version, kind = (request.match_info[name] for name in ("module", "version", "kind"))
        key = request.match_info.get("key")
        if module not in self._config or version != VERSION or kind not in ("config", "status", "command"):
            raise _Refusal(404, f"unknown path {request.path}")
        if request.method == "GET" and kind != "command":
            return self._told(module, kind, key)
        if request.method != "PUT" or kind == "status":
            raise _Refusal(405, f"{request.method} is not possible for {request.path}")
        try:
            body = await request.json() if await request.text() else {}
        except (ValueError, RecursionError) as error:
            raise _Refusal(400, f"the body is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise _Refusal(400, 'expected {"value": ...}')
        if kind == "command":
            if module != "detector":
                return await self._stream_command(f"{module}/{key}")
            return await self._command(str(key), body.get("value"))
        changes = body if key is None else {key: body}
        out: list[str] = []
        for name, change in changes.items():
            if not isinstance(change, dict) or "value" not in change:
                raise _Refusal(400, 'expected {"value": ...}')
            out += self._put(module, name, change["value"])
        return out

    async def _stream_command(self, command: str) -> dict[str, Any]:
        if command != "stream/initialize":
            raise _Refusal(404, f"unknown command {command}")
        self._put("stream", "mode", "disabled")
        return {}

    def _told(self, module: str, kind: str, key: str | None) -> Any:
        if self.state == "na" and (module, kind, key) != ("detector", "status", "state"):
            raise _Refusal(400, "the detector has not been initialized: only its state can be read")
        keys = self._config[module] if kind == "config" else self._status(module)
        if key == "keys":
            return sorted(keys)
        if key not in keys:
            raise _Refusal(404, f"unknown path {module}/{kind}/{key}")
        return keys[key].told()

    def _status(self, module: str) -> dict[str, Key]:
        if module == "detector":
            return {"state": Key(self.state, "string"), "error": Key([], "string[]")}
        if module == "stream":
            running = "acquire" if self.state == "acquire" else "ready"
            state = running if self["stream/mode"] == "enabled" else "disabled"
            return {"state": Key(state, "string"), "dropped": Key(self.dropped, "uint")}
        return {"state": Key("disabled", "string")} if self._config[module] else {}

    def _put(self, module: str, name: str, value: Any) -> list[str]:
        """Set a configuration key; which ones changed with it."""
        keys = self._config[module]
        if self.state != "idle":
            raise _Refusal(400, f"nothing can be set in state {self.state}")
        if name not in keys:
            raise _Refusal(404, f"unknown path {module}/config/{name}")
        if problem := keys[name].problem(value):
            raise _Refusal(400, f"{module}/config/{name} cannot be {json.dumps(value)[:100]}: {problem}")
        before = {key: item.value for key, item in keys.items() if key != "pixel_mask"}
        keys[name].value = value
        if module == "detector":
            if keys["trigger_mode"].value == "exte":
                keys["nimages"].value = 1
            shortest = keys["count_time"].value + READOUT_S
            if name == "count_time":
                keys["frame_time"].value = max(keys["frame_time"].value, shortest)
            elif keys["frame_time"].value < shortest:
                keys["count_time"].value = keys["frame_time"].value - READOUT_S
        return sorted({name} | {key for key, old in before.items() if keys[key].value != old})


class _AsConfigured:
    """A source whose start says what the detector has been set to."""

    def __init__(self, source: FrameSource, dcu: SimulatedDCU) -> None:
        self._source, self._dcu = source, dcu
        self.encoding, self.frames_per_pass = source.encoding, source.frames_per_pass

    def start(self, series: SeriesId) -> SeriesStart:
        start, dcu = self._source.start(series), self._dcu
        told = {"trigger_mode": "trigger_mode", "count_time_s": "count_time", "frame_time_s": "frame_time"}
        settings = {**start.settings, **{name: dcu[f"detector/{key}"] for name, key in told.items()}}
        start = replace(start, settings=settings)
        return start if dcu["stream/header_detail"] == "all" else replace(start, pixel_mask=None, flatfield=None)

    def blocks(self) -> Iterator[tuple[int, Sequence[Payload]]]:
        return self._source.blocks()
