"""SIMPLON: the client against the simulated DCU, recorded dialogues and hostile servers; scans armed from here."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from detectors.errors import ConfigurationError, ConnectionFailed, LiveptychoError, ProtocolError
from detectors.messages import Encoding, FrameBlock, Message, ReceivedBatch, SeriesEnd, SeriesId, SeriesStart
from detectors.protocols.native import Decoder
from detectors.simplon import Refused, Simplon, decode_array, encode_array
from detectors.simulator.dcu import SimulatedDCU
from detectors.simulator.sender import Trigger, serve
from stream.control import ActiveScan, DetectorControl, DetectorFacts, Finished, Prepared, ScanPlan
from stream.control.simplon import SimplonControl
from stream.intake import Silence
from stream.scan import ScanPattern

PATIENCE_S = 20.0
LOCAL = "http://127.0.0.1:0"
ROWS, COLUMNS = 4, 5
MASK = np.ones((2, 3), bool)
MASK[1, 0] = False


class Frames:
    """Twenty frames of 2x3 pixels that say which they are."""

    encoding = Encoding.RAW
    frames_per_pass = ROWS * COLUMNS

    def start(self, series: SeriesId) -> SeriesStart:
        settings = {"energy_kev": 200.0}
        return SeriesStart(series, (2, 3), np.dtype("<u2"), None, None, settings, pixel_mask=MASK)

    def blocks(self) -> Iterator[tuple[int, Sequence[bytes]]]:
        for first in range(0, self.frames_per_pass, 3):
            count = min(3, self.frames_per_pass - first)
            yield first, [np.full((2, 3), first + i, "<u2").tobytes() for i in range(count)]


class WatchedDCU(SimulatedDCU):
    """Remembers what it was asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Frames(), **{"pulses_after_s": 0.02, **options})
        self.asked: list[tuple[str, str]] = []
        self.stream = ""

    async def _answered(self, request: web.Request) -> Any:
        self.asked.append((request.method, request.path))
        return await super()._answered(request)

    @property
    def commands(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path in self.asked if method == "PUT" and "/command/" in path]


@contextlib.asynccontextmanager
async def detector(*, sending: bool = True, rate: float | None = None, **options: Any) -> AsyncIterator[WatchedDCU]:
    """A simulated detector: its REST interface, and its stream at ``dcu.stream``."""
    dcu = WatchedDCU(**options)
    trigger: Trigger = dcu
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with dcu.serving(LOCAL):
        serving = asyncio.create_task(
            serve(dcu.source, "tcp://127.0.0.1:*", passes=None, trigger=trigger, rate=rate, ready=ready.set_result)
            if sending
            else asyncio.sleep(0),
            name="serving",
        )
        try:
            if sending:
                dcu.stream = await asyncio.wait_for(ready, PATIENCE_S)
            yield dcu
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


@contextlib.asynccontextmanager
async def answering(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """A web server that answers everything with ``answer``; its address."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def scripted(replies: dict[str, Any]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Answers by the end of the path, as JSON; 404 for anything else."""

    async def answer(request: web.Request) -> web.StreamResponse:
        for path, reply in replies.items():
            if request.path.endswith(path):
                return web.json_response(reply)
        return web.Response(status=404, text="no such path")

    return answer


@contextlib.asynccontextmanager
async def port_that_says(greeting: bytes) -> AsyncIterator[str]:
    """A port that is no web server."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def message_of(url: str, kind: type[LiveptychoError], **options: Any) -> str:
    """What connecting to ``url`` fails with."""
    with pytest.raises(kind) as caught:
        async with Simplon(url, **{"timeout_s": 2.0, **options}):
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


# arrays


@given(st.sampled_from(["<u4", "<f4", "<u2", "|u1"]), st.integers(0, 5), st.integers(0, 7))
def test_arrays_survive_the_journey(dtype: str, rows: int, columns: int) -> None:
    array = np.arange(rows * columns).reshape(rows, columns).astype(dtype)
    decoded = decode_array(json.loads(json.dumps(encode_array(array))))
    assert decoded.dtype == array.dtype
    assert decoded.shape == (rows, columns)
    assert (decoded == array).all()


def test_an_arrays_shape_is_width_and_height() -> None:
    data = base64.b64encode(bytes(range(6))).decode()
    array = decode_array({"__darray__": [1, 0, 0], "type": "|u1", "shape": [3, 2], "filters": ["base64"], "data": data})
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "|O"},
        {"type": ["<u4"]},
        {"type": None},
        {"shape": [3, 3]},
        {"shape": [-3, -2]},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": [0, 1 << 100], "data": ""},
        {"shape": [3.0, 2]},
        {"shape": None},
        {"shape": [1, 2, 3]},
        {"filters": ["bslz4"]},
        {"filters": None},
        {"data": "no base64!"},
        {"data": "AAA="},
        {"data": "é"},
        {"data": 7},
    ],
)
def test_damaged_arrays_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        decode_array({**encode_array(np.zeros((2, 3), "<u4")), **changes})


# the client and the simulated DCU


async def test_keys_commands_and_the_states_of_a_series() -> None:
    async with detector(sending=False, initialised=False) as dcu, Simplon(dcu.url) as client:
        assert client.version == "1.8.0"
        assert await client.state() == "na"
        with pytest.raises(Refused, match="initialized"):
            await client.get("detector", "config", "nimages")
        await client.command("initialize")
        assert await client.state() == "idle"
        assert await client.get("detector", "config", "x_pixels_in_detector") == 3
        assert await client.get("detector", "config", "y_pixels_in_detector") == 2
        assert await client.get("detector", "config", "incident_energy") == 200e3
        mask = await client.get("detector", "config", "pixel_mask")
        assert mask.shape == (2, 3)
        assert (mask != 0).tolist() == (~MASK).tolist()
        entry = await client.entry("detector", "config", "trigger_mode")
        assert entry.allowed_values is not None
        assert set(entry.allowed_values) >= {"ints", "exts"}
        assert entry.access_mode == "rw"
        assert (await client.entry("detector", "config", "frame_time")).unit == "s"
        assert await client.find("detector", "config", "threshold/1/energy") is None
        assert await client.put("detector", "nimages", 7) == ["nimages"]
        assert await client.put("detector", "trigger_mode", "exte") == ["nimages", "trigger_mode"]
        assert await client.get("detector", "config", "nimages") == 1
        assert await client.put("detector", "count_time", 0.5) == ["count_time", "frame_time"]
        assert await client.get("detector", "config", "frame_time") >= 0.5
        assert await client.put("detector", "frame_time", 0.1) == ["count_time", "frame_time"]
        assert await client.get("detector", "config", "count_time") < 0.1
        for key, value in [("nimages", "7"), ("nimages", -1), ("trigger_mode", "x"), ("description", "mine")]:
            with pytest.raises(Refused, match=key):
                await client.put("detector", key, value)
        dcu.dropped = 3
        first = await client.arm()
        assert dcu.dropped == 0
        assert await client.state() == "ready"
        with pytest.raises(Refused, match="ready"):
            await client.arm()
        with pytest.raises(Refused, match="ready"):
            await client.put("detector", "nimages", 1)
        with pytest.raises(Refused, match="ready"):
            await client.put("stream", "mode", "disabled")
        with pytest.raises(Refused, match="exte"):
            await client.command("trigger")
        assert await client.command("disarm") == {"sequence id": first}
        assert await client.state() == "idle"
        with pytest.raises(Refused, match="idle"):
            await client.command("trigger")
        assert await client.arm() == first + 1
        await client.command("abort")
        with pytest.raises(Refused) as refused:
            await client.command("explode")
        assert refused.value.status == 404


async def test_wrong_versions_and_paths_are_not_found() -> None:
    async with detector(sending=False) as dcu, Simplon(dcu.url) as client:
        for version, module in (("1.6.0", "detector"), ("1.8.0", "kitchen")):
            client.version = version
            with pytest.raises(Refused) as refused:
                await client.get(module, "config", "nimages")
            assert refused.value.status == 404


async def test_several_stream_keys_in_one_call() -> None:
    async with detector(sending=False) as dcu, Simplon(dcu.url) as client:
        values = {"mode": {"value": "disabled"}, "header_detail": {"value": "all"}}
        async with (
            aiohttp.ClientSession() as http,
            http.put(f"{dcu.url}/stream/api/1.8.0/config", json=values) as answer,
        ):
            assert await answer.json() == ["mode", "header_detail"]
        assert await client.get("stream", "status", "state") == "disabled"


async def test_an_older_interface_is_spoken_with_an_older_dcu() -> None:
    replies = {"/detector/api/1.6.0/status/state": {"value": "idle"}, "/1.6.0/config/nimages": {"value": 3}}
    async with answering(scripted(replies)) as url, Simplon(url) as client:
        assert client.version == "1.6.0"
        assert await client.get("detector", "config", "nimages") == 3


def recording(shared_data: Path, name: str) -> dict[tuple[str, str], str]:
    """The answers of a recorded dialogue."""
    path = shared_data / "streams" / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    log = msgpack.unpackb(path.read_bytes(), raw=False)["rest_log"]
    return {(method, path): reply for method, path, _, reply in log}


def replaying(replies: dict[tuple[str, str], str], missing: int) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        reply = replies.get((request.method, request.path))
        return web.Response(status=missing) if reply is None else web.Response(text=reply)

    return answer


async def test_tickits_dialogue_is_understood(shared_data: Path) -> None:
    replies = recording(shared_data, "tickit_cbor_basic.msgpack")
    async with answering(replaying(replies, 404)) as url, Simplon(url) as client:
        assert await client.state() == "idle"
        assert await client.get("detector", "config", "nimages") == 2
        assert "ints" in ((await client.entry("detector", "config", "trigger_mode")).allowed_values or ())
        assert await client.put("stream", "format", "cbor") == []
        assert "count_time" in await client.put("detector", "frame_time", 0.05)
        assert await client.arm() == 2
        assert await client.command("trigger") == {"sequence id": 4}


async def test_libertems_dialogue_arms_a_gated_scan(shared_data: Path) -> None:
    """Its simulator tells no state, no dropped count and no stream format, and refuses to change anything."""
    replies = recording(shared_data, "libertem_dectris_mock.msgpack")
    async with answering(replaying(replies, 500)) as url, SimplonControl(url, "dectris-v1") as control:
        facts = await control.describe()
        assert facts.detector_shape == (512, 512)
        assert facts.dtype == np.dtype("<u2")
        assert facts.pixel_mask is None
        assert facts.warnings == ()
        prepared = await control.prepare(ScanPlan("gate", 6, 3))
        assert prepared.frame_time_s == 0.001
        assert await control.arm() == 34
        with pytest.raises(ConfigurationError, match="trigger_mode"):
            await control.prepare(ScanPlan("line", 6, 3))
    async with answering(replaying(replies, 500)) as url, SimplonControl(url, "dectris-v2") as control:
        with pytest.raises(ConfigurationError, match="dectris-v1"):
            await control.prepare(ScanPlan("gate", 6, 3))


# servers that misbehave


async def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        text = await message_of(f"http://127.0.0.1:{taken.getsockname()[1]}", ConnectionFailed)
    assert "nobody answers" in text
    assert "switched on" in text


async def test_a_server_that_hangs() -> None:
    enough = asyncio.Event()

    async def hang(request: web.Request) -> web.Response:
        await enough.wait()
        return web.Response()

    async with answering(hang) as url:
        assert "did not answer within 0.2 s" in await message_of(url, ConnectionFailed, timeout_s=0.2)
        enough.set()
    async with port_that_says(b"") as url:
        assert "did not answer within 0.2 s" in await message_of(url, ConnectionFailed, timeout_s=0.2)


async def test_another_web_server() -> None:
    async with answering(scripted({})) as url:
        assert "no SIMPLON interface" in await message_of(url, ConfigurationError)

    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>hello</html>", content_type="text/html")

    async with answering(page) as url:
        text = await message_of(url, ConfigurationError)
        assert "text/html" in text
        assert "not JSON" in text


@pytest.mark.parametrize("body", ["[" * 100_000, '"text"', "[]", '{"worth": 1}', '{"value":', "9" * 10_000, "", "null"])
async def test_answers_that_are_none(body: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=body, content_type="application/json")

    async with answering(answer) as url:
        await message_of(url, ConfigurationError)


async def test_an_endless_answer_is_cut_off() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" " * 65536)
        return response

    async with answering(endless) as url:
        assert "more than 1 MB" in await message_of(url, ConfigurationError)


async def test_redirections_are_not_followed() -> None:
    followed = []

    async def redirect(request: web.Request) -> web.Response:
        followed.append(request.path)
        raise web.HTTPFound("/elsewhere")

    async with answering(redirect) as url:
        assert "elsewhere" in await message_of(url, ConfigurationError)
    assert len(followed) == 1


async def test_a_stream_port_is_recognised() -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as stream:
        port = stream.bind_to_random_port("tcp://127.0.0.1")
        text = await message_of(f"http://127.0.0.1:{port}", ConfigurationError)
    assert "ZeroMQ" in text
    async with port_that_says(b"MPX,0000000001,HDR,") as url:
        assert "does not speak HTTP" in await message_of(url, ConfigurationError)


async def test_a_connection_that_breaks_off() -> None:
    async def leave(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async with answering(leave) as url:
        assert "broke off" in await message_of(url, ConnectionFailed)


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:31001", "ftp://dcu", "http://", "http://dcu:port", ""])
async def test_addresses_that_are_none(url: str) -> None:
    assert "expected" in await message_of(url, ConfigurationError)


async def test_an_address_may_be_short() -> None:
    assert Simplon("dcu").url == "http://dcu"
    assert Simplon("dcu:8080").url == "http://dcu:8080"
    assert Simplon("http://dcu/detector/").url == "http://dcu"


@pytest.mark.parametrize("reply", [{}, {"sequence_id": 1}, {"sequence id": "1"}, {"sequence id": True}, [], 7])
async def test_arming_without_a_number(reply: Any) -> None:
    async with (
        answering(scripted({"status/state": {"value": "idle"}, "command/arm": reply})) as url,
        Simplon(url) as dcu,
    ):
        with pytest.raises(ConfigurationError, match="series' number"):
            await dcu.arm()


# passive


async def test_asking_changes_nothing() -> None:
    async with detector(sending=False) as dcu:
        async with SimplonControl(dcu.url, "dectris-v2") as control:
            facts = await control.describe()
            assert await control.dropped() == 0
        assert {method for method, _ in dcu.asked} == {"GET"}
    assert facts.settings["energy_kev"] == 200.0
    assert facts.settings["firmware"] == "release-2024.1.0"
    assert facts.detector_shape == (2, 3)
    assert facts.dtype == np.dtype("<u2")
    assert facts.pixel_mask is not None
    assert facts.pixel_mask.dtype == bool
    assert (facts.pixel_mask == MASK).all()
    assert facts.warnings == ()


async def test_a_stream_that_is_off_or_another_is_warned_of() -> None:
    async with detector(sending=False, protocol="dectris-v1") as dcu:
        dcu._config["stream"]["mode"].value = "disabled"
        async with SimplonControl(dcu.url, "dectris-v2") as control:
            off, other = (await control.describe()).warnings
    assert "switched off" in off
    assert "--protocol dectris-v1" in other
    assert "legacy" in other
    async with detector(sending=False, initialised=False) as dcu, SimplonControl(dcu.url, "dectris-v2") as control:
        (text,) = (await control.describe()).warnings
        assert "initialised" in text


async def test_thresholds_in_use_are_told() -> None:
    replies = {
        "status/state": {"value": "idle"},
        "threshold/1/energy": {"value": 10e3},
        "threshold/1/mode": {"value": "enabled"},
        "threshold/2/energy": {"value": 50e3},
        "threshold/2/mode": {"value": "disabled"},
        "photon_energy": {"value": 80e3},
        "pixel_mask": {"value": {**encode_array(np.zeros((2, 3), "<u4")), "type": "evil"}},
    }
    async with answering(scripted(replies)) as url, SimplonControl(url, "dectris-v2") as control:
        facts = await control.describe()
    assert facts.settings["threshold_energy_ev"] == {"threshold_1": 10e3}
    assert facts.settings["energy_kev"] == 80.0
    assert facts.detector_shape is None
    assert facts.pixel_mask is None


async def test_a_detector_that_vanishes_does_not_spoil_the_end() -> None:
    async with detector(sending=False) as dcu:
        control = await SimplonControl(dcu.url, "dectris-v2").__aenter__()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(control.__aexit__)
        assert await control.dropped() is None


# plans


def test_plans() -> None:
    scan = ScanPattern((ROWS, COLUMNS), flyback_frames_per_row=2)
    plan = ScanPlan.of("line", scan, 3)
    assert (plan.frames, plan.frames_per_line) == (3 * ROWS * (COLUMNS + 2), COLUMNS + 2)
    for passes, pattern, options in [
        (None, scan, {}),
        (1, ScanPattern((ROWS, COLUMNS), flyback_frames_per_pass=1), {}),
        (1, scan, {"count_time_s": -1.0}),
        (1, scan, {"frame_time_s": float("nan")}),
    ]:
        with pytest.raises(ConfigurationError):
            ScanPlan.of("line", pattern, passes, **options)


@pytest.mark.parametrize(
    ("trigger", "mode", "images", "triggers"),
    [
        ("software", "ints", ROWS * COLUMNS, 1),
        ("pixel", "exts", 1, ROWS * COLUMNS),
        ("line", "exts", COLUMNS, ROWS),
        ("gate", "exte", 1, ROWS * COLUMNS),
    ],
)
async def test_the_detector_is_configured(trigger: Any, mode: str, images: int, triggers: int) -> None:
    async with detector(sending=False) as dcu, SimplonControl(dcu.url, "dectris-v2") as control:
        for earlier in ("exte", "ints"):  # whatever was there before
            dcu._config["detector"]["trigger_mode"].value = earlier
            dcu._config["stream"]["mode"].value = "disabled"
            plan = ScanPlan(trigger, ROWS * COLUMNS, COLUMNS, count_time_s=2e-3, frame_time_s=1e-3)
            prepared = await control.prepare(plan)
            assert dcu["detector/trigger_mode"] == mode
            assert (dcu["detector/nimages"], dcu["detector/ntrigger"]) == (images, triggers)
            assert dcu["stream/mode"] == "enabled"
            assert prepared.frame_time_s == pytest.approx(1e-3)
            compression, count_time = prepared.notes  # the source sends raw frames; counting fits into the frame
            assert "compression" in compression
            assert "count_time was set to 0.002" in count_time


@pytest.mark.parametrize(("trigger", "mode"), [("software", "ints"), ("pixel", "exts")])
async def test_what_another_client_holds_is_left_alone(trigger: Any, mode: str) -> None:
    async with detector(sending=False) as dcu, SimplonControl(dcu.url, "dectris-v2") as control:
        async with Simplon(dcu.url) as other:
            await other.put("detector", "trigger_mode", mode)
            await other.arm()
        asked = len(dcu.asked)
        with pytest.raises(ConfigurationError, match=r"another client.*ready.*without --trigger"):
            await control.prepare(ScanPlan(trigger, 20, 5))
        assert {method for method, _ in dcu.asked[asked:]} == {"GET"}
        for state, word in [("na", "initialised"), ("initialize", "again"), ("error", "error"), ("test", "test")]:
            dcu.state = state
            with pytest.raises(ConfigurationError, match=word):
                await control.prepare(ScanPlan(trigger, 20, 5))


async def test_a_dcu_of_the_other_format_says_so() -> None:
    async with detector(sending=False, protocol="dectris-v1") as dcu, SimplonControl(dcu.url, "dectris-v2") as control:
        with pytest.raises(ConfigurationError, match="use --protocol dectris-v1"):
            await control.prepare(ScanPlan("software", 20, 5))
    with pytest.raises(ConfigurationError, match="dectris-v2"):
        SimplonControl("http://dcu", "merlin")


# a scan from arming to end, over real sockets


async def items(stream: str, tick_s: float = 0.05) -> AsyncGenerator[Message | Silence]:
    """What a bare PULL socket receives, as the intake would give it."""
    with zmq.asyncio.Context() as context, context.socket(zmq.PULL) as pull:
        pull.connect(stream)
        silent = 0.0
        while True:
            if await pull.poll(int(1000 * tick_s)):
                silent = 0.0
                for message in Decoder().feed(ReceivedBatch.from_messages([await pull.recv_multipart()])):
                    yield message
            else:
                silent += tick_s
                yield Silence(silent)


async def scanned(
    scan: ActiveScan,
    stream: str,
    enough: Callable[[list[Message]], bool] = lambda _: False,
    *,
    dropped: Callable[[], None] = lambda: None,
    at_once: bool = False,
) -> tuple[list[Message], Finished]:
    """The messages of one armed series, and how it ended; the socket stays connected until then."""
    out: list[Message] = []
    async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(items(stream)) as coming:
        async for item in coming:
            if not await scan.admits(item):
                continue
            if isinstance(item, Silence):
                assert await scan.watch() == ""
                continue
            out.append(item)
            if isinstance(item, SeriesEnd) or enough(out):
                dropped()
                return out, await scan.end(at_once=at_once)
    raise AssertionError("unreachable")


def indices(messages: list[Message]) -> list[int]:
    return [int(i) for message in messages if isinstance(message, FrameBlock) for i in message.indices]


@pytest.mark.parametrize("trigger", ["software", "pixel", "line", "gate"])
async def test_a_scan_of_two_passes(trigger: Any) -> None:
    frames = 2 * ROWS * COLUMNS
    async with detector() as dcu, SimplonControl(dcu.url, "dectris-v2") as control:
        for number in (1, 2):
            scan = ActiveScan(control, ScanPlan(trigger, frames, COLUMNS))
            await scan.prepare()
            messages, finished = await scanned(scan, dcu.stream)
            assert scan.series == number
            assert isinstance(messages[0], SeriesStart)
            assert messages[0].frames == frames
            assert messages[0].pixel_mask is None  # asked for over REST
            assert indices(messages) == list(range(frames))
            assert isinstance(messages[-1], SeriesEnd)
            assert finished == Finished(0, "")
            assert dcu.state == "idle"
        assert dcu.commands == ["arm", "trigger"] * 2 if trigger == "software" else ["arm"] * 2


async def test_a_software_trigger_is_answered_when_the_series_is_out() -> None:
    async with detector(rate=40.0) as dcu, Simplon(dcu.url) as client:
        await client.put("detector", "nimages", 20)
        await client.arm()
        triggering = asyncio.create_task(client.command("trigger"))
        got: list[Message] = []
        async with asyncio.timeout(PATIENCE_S), contextlib.aclosing(items(dcu.stream)) as coming:
            async for item in coming:
                if not isinstance(item, Silence):
                    got.append(item)
                if isinstance(item, FrameBlock) and item.indices[0] < 15:
                    assert not triggering.done()
                    assert await client.state() == "acquire"
                if isinstance(item, SeriesEnd):
                    break
            await triggering
        assert indices(got) == list(range(20))
        assert await client.state() == "idle"


async def test_a_scan_that_is_stopped_leaves_the_detector_idle() -> None:
    async with detector(rate=50.0) as dcu, SimplonControl(dcu.url, "dectris-v2") as control:
        for at_once, command in ((False, "disarm"), (True, "abort")):
            scan = ActiveScan(control, ScanPlan("software", 10_000, COLUMNS))
            await scan.prepare()
            messages, finished = await scanned(scan, dcu.stream, lambda out: len(indices(out)) >= 3, at_once=at_once)
            assert len(indices(messages)) == 3
            assert finished.message == ""
            assert dcu.commands[-1] == command
            assert dcu.state == "idle"


async def test_dropped_images_are_told() -> None:
    async with detector() as dcu, SimplonControl(dcu.url, "dectris-v2") as control:
        scan = ActiveScan(control, ScanPlan("software", 20, COLUMNS))
        await scan.prepare()
        _, finished = await scanned(scan, dcu.stream, dropped=lambda: setattr(dcu, "dropped", 7))
    assert finished.dropped == 7
    assert "dropped 7 images that nobody took" in finished.message


async def test_a_switched_off_stream_comes_to_nothing() -> None:
    async with detector() as dcu, Simplon(dcu.url) as client:
        await client.put("stream", "mode", "disabled")
        await client.arm()
        await client.command("trigger")
        assert await client.state() == "idle"
        await client.put("detector", "trigger_mode", "exts")
        await client.arm()
        assert await client.state() == "idle"


async def test_a_taken_port_is_said() -> None:
    async with detector(sending=False) as dcu:
        with pytest.raises(ConnectionFailed, match="cannot answer"):
            async with SimulatedDCU(Frames()).serving(dcu.url):
                pass
    with pytest.raises(ConfigurationError, match="not an address"):
        async with SimulatedDCU(Frames()).serving("tcp://127.0.0.1:1"):
            pass


# the watchdogs, with a clock of our own


class Fake:
    """A detector under the test's thumb."""

    def __init__(self) -> None:
        self.now, self.calls = 100.0, []  # type: float, list[str]
        self.armed: asyncio.Future[SeriesId] = asyncio.get_running_loop().create_future()
        self.triggered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Fake:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def describe(self) -> DetectorFacts:
        return DetectorFacts()

    async def prepare(self, plan: ScanPlan) -> Prepared:
        return Prepared(frame_time_s=0.001)

    async def arm(self) -> SeriesId:
        self.calls.append("arm")
        return await self.armed

    async def trigger(self) -> None:
        self.calls.append("trigger")
        await self.triggered

    async def flush(self) -> None:
        self.calls.append("flush")

    async def finish(self) -> Finished:
        self.calls.append("finish")
        return Finished(0)

    async def abort(self) -> None:
        self.calls.append("abort")

    async def dropped(self) -> int | None:
        return 0


@contextlib.asynccontextmanager
async def faked(trigger: Any = "software", *, armed: bool = True) -> AsyncIterator[tuple[ActiveScan, Fake]]:
    """A scan of 20 frames, armed as series 5."""
    fake = Fake()
    control: DetectorControl = fake
    scan = ActiveScan(control, ScanPlan(trigger, 20, COLUMNS), clock=lambda: fake.now)
    await scan.prepare()
    try:
        if armed:
            assert not await scan.admits(Silence(0.25))
            fake.armed.set_result(5)
            await asyncio.sleep(0.01)
        yield scan, fake
    finally:
        if not fake.armed.done():
            fake.armed.set_result(5)
        await scan.end()


def start(series: SeriesId = 5, frames: int | None = 20) -> SeriesStart:
    return SeriesStart(series, (2, 3), np.dtype("<u2"), frames=frames)


def block(first: int = 0, count: int = 1, series: SeriesId = 5) -> FrameBlock:
    nothing = np.zeros(count, np.int64)
    return FrameBlock(series, Encoding.RAW, np.arange(first, first + count), nothing, nothing, np.zeros(0, np.uint8))


async def test_old_messages_run_out_before_arming() -> None:
    async with faked(armed=False) as (scan, fake):
        for item in (start(4), block(series=4), SeriesEnd(4)):
            assert not await scan.admits(item)
        assert fake.calls == []
        assert not await scan.admits(Silence(0.25))
        await asyncio.sleep(0)
        assert fake.calls == ["arm"]
        # The header overtakes the answer that tells its number.
        ours = asyncio.create_task(scan.admits(start(5)))
        await asyncio.sleep(0.01)
        assert not ours.done()
        fake.armed.set_result(5)
        assert await ours
        assert not await scan.admits(start(4))
        assert not await scan.admits(block(series=4))
        assert not await scan.admits(SeriesEnd(4))
        assert await scan.admits(block())
        assert await scan.admits(SeriesEnd(5))


async def test_another_sender_at_the_address_is_noticed() -> None:
    async with faked(armed=False) as (scan, fake):
        fake.now += 100.0  # the session takes its time to connect
        assert not await scan.admits(block(series=4))
        fake.now += 11.0
        with pytest.raises(ConfigurationError, match="another detector"):
            await scan.admits(block(series=4))


async def test_a_series_by_another_number() -> None:
    """Only where it cannot be an old one: tickit's arm counts commands, not series."""
    async with faked(armed=False) as (scan, fake):
        await scan.admits(start(1))
        await scan.admits(Silence(0.25))
        fake.armed.set_result(5)
        assert not await scan.admits(start(1))
        assert not await scan.admits(start(2, frames=21))
        assert await scan.admits(start(2))
        assert not await scan.admits(start(3))
        assert await scan.admits(block(series=2))
        assert await scan.admits(start(5))  # the right one takes over
        assert not await scan.admits(block(series=2))


async def test_no_header() -> None:
    async with faked() as (scan, fake):
        fake.now += 9.0
        assert await scan.watch() == ""
        assert "header" in scan.waiting_for
        fake.now += 2.0
        assert "header" in await scan.watch()


async def test_no_frames_after_a_software_trigger() -> None:
    async with faked() as (scan, fake):
        assert await scan.admits(start())
        assert fake.calls == ["arm", "trigger"]
        assert await scan.admits(block(0, 3))
        fake.now += 4.9
        assert await scan.watch() == ""
        fake.now += 0.2
        assert "no frame came for 5 s" in await scan.watch()
        assert await scan.admits(block(3, 17))
        assert await scan.admits(start())  # said again
        fake.now += 100.0
        assert await scan.watch() == ""  # all are there; the end message is not its concern


@pytest.mark.parametrize(("trigger", "words"), [("pixel", "one a frame"), ("line", "5 frames"), ("gate", "exposure")])
async def test_external_triggers_are_waited_for(trigger: str, words: str) -> None:
    async with faked(trigger) as (scan, fake):
        assert await scan.admits(start())
        fake.now += 1e6
        assert await scan.watch() == ""
        assert words in scan.waiting_for
        await scan.admits(block(0, 18))
        fake.now += 1e6
        assert await scan.watch() == ""
        assert "flush" not in fake.calls
        # Some detectors keep the last image until they are disarmed.
        await scan.admits(block(18))
        for _ in range(3):
            fake.now += 5.0
            assert await scan.watch() == ""
        assert fake.calls == ["arm", "flush"]


async def test_a_refused_arming_or_trigger_is_told() -> None:
    async with faked() as (scan, fake):
        fake.triggered.set_exception(ConfigurationError("the trigger is stuck"))
        await asyncio.sleep(0.01)
        assert await scan.watch() == "the trigger is stuck"
        # With frames under way it was heard, and what became of its answer does not matter, unless they stay away.
        await scan.admits(start())
        await scan.admits(block(0, 3))
        fake.now += 4.0
        assert await scan.watch() == ""
        fake.now += 2.0
        assert "the trigger is stuck" in await scan.watch()
    async with faked(armed=False) as (scan, fake):
        await scan.admits(Silence(0.25))
        fake.armed.set_exception(ConfigurationError("not today"))
        await asyncio.sleep(0.01)
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="not today"):
                await scan.watch()
            with pytest.raises(ConfigurationError, match="not today"):
                await scan.admits(Silence(0.5))
        assert await scan.end() == Finished()
        assert fake.calls == ["arm"]


async def test_ending() -> None:
    async with faked(armed=False) as (scan, fake):
        assert await scan.end() == Finished()
        assert fake.calls == []
    async with faked(armed=False) as (scan, fake):
        await scan.admits(Silence(0.25))
        ending = asyncio.create_task(scan.end())
        await asyncio.sleep(0.01)
        assert not ending.done()  # the detector is being armed: it must be disarmed again
        fake.armed.set_result(5)
        assert await ending == Finished(0)
        assert fake.calls == ["arm", "trigger", "finish"]
