"""Merlin's control port: the simulated one, spoken to with bytes written by hand; and ours as its client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.errors import ConfigurationError, ConnectionFailed
from detectors.messages import Encoding, FrameBlock, SeriesEnd, SeriesStart
from detectors.protocols.registry import protocol_named
from detectors.simulator.merlin_device import SimulatedMerlin
from detectors.simulator.sender import SendReport, serve
from detectors.simulator.source import EncodedSource
from stream.config import Layer
from stream.control import ScanPlan
from stream.control import merlin as merlin_control
from stream.control.merlin import MerlinControl
from stream.intake import messages
from stream.receiving import open_receiver
from stream.record import record_stream
from stream.recording import open_recording
from stream.replay import replay_recording
from tests.live_helpers import (
    ANY_PORT,
    COLUMNS,
    FRAMES,
    OPTICS_AND_DISK,
    ROWS,
    SCAN,
    all_frames,
    assert_same_object,
    live_options,
    patiently,
    run_session,
    serving,
)


def mpx(text: str) -> bytes:
    """A message by the rule: the number counts the text and the comma before it."""
    return f"MPX,{len(text) + 1:010d},{text}".encode()


def place(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def source() -> EncodedSource:
    return EncodedSource(SCAN, Encoding.RAW_BIG_ENDIAN, threads=1)


@contextlib.asynccontextmanager
async def connected(merlin: SimulatedMerlin) -> AsyncIterator[Any]:
    """Ask in words, hear the answer's."""
    async with merlin.serving(ANY_PORT):
        reader, writer = await asyncio.open_connection(*place(merlin.endpoint))

        async def ask(text: str) -> str:
            writer.write(mpx(text))
            head = await patiently(reader.readexactly(15))
            assert head[:4] == b"MPX,"
            return (await patiently(reader.readexactly(int(head[4:14]) - 1))).decode()

        ask.writer, ask.reader = writer, reader  # type: ignore[attr-defined]
        try:
            yield ask
        finally:
            writer.close()
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def detector(**options: Any) -> AsyncIterator[tuple[SimulatedMerlin, str, asyncio.Task[SendReport]]]:
    """A simulated Merlin under way: its control, the endpoint of its data, and the task that sends."""
    merlin = SimulatedMerlin(source())
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with merlin.serving(ANY_PORT):
        sending = asyncio.create_task(
            serve(
                merlin.source,
                ANY_PORT,
                protocol="merlin",
                passes=None,
                trigger=merlin,
                ready=ready.set_result,
                **options,
            )
        )
        try:
            yield merlin, await patiently(ready), sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def series(endpoint: str, merlin: SimulatedMerlin, *commands: str) -> tuple[SeriesStart, list[int]]:
    """What comes on the data port after the commands, until the series ends: its start, the frames' numbers."""
    protocol = protocol_named("merlin")
    async with open_receiver(protocol, [endpoint]) as receiver:
        _, writer = await asyncio.open_connection(*place(merlin.endpoint))
        for command in commands:
            writer.write(mpx(command))
        starts, numbers = [], []
        stream = messages(receiver, protocol)
        async with contextlib.aclosing(stream):
            while True:
                item = await patiently(anext(stream))
                if isinstance(item, SeriesStart):
                    starts.append(item)
                elif isinstance(item, FrameBlock):
                    numbers += item.indices.tolist()
                elif isinstance(item, SeriesEnd):
                    break
        writer.close()
        await writer.wait_closed()
    (start,) = starts
    return start, numbers


async def test_the_dialogue() -> None:
    merlin = SimulatedMerlin(source())
    async with connected(merlin) as ask:
        assert await ask("GET,SOFTWAREVERSION") == "GET,SOFTWAREVERSION,liveptycho simulation,0"
        assert await ask("GET,DETECTORSTATUS") == "GET,DETECTORSTATUS,0,0"
        assert await ask("GET,NUMFRAMESTOACQUIRE") == f"GET,NUMFRAMESTOACQUIRE,{FRAMES},0"
        assert await ask("SET,NUMFRAMESTOACQUIRE,8") == "SET,NUMFRAMESTOACQUIRE,0"
        assert await ask("GET,NUMFRAMESTOACQUIRE") == "GET,NUMFRAMESTOACQUIRE,8,0"
        assert await ask("SET,FILEDIRECTORY,C:\\data,1") == "SET,FILEDIRECTORY,0"
        assert await ask("GET,FILEDIRECTORY") == "GET,FILEDIRECTORY,C:\\data,1,0"
        assert await ask("GET,NOSUCHTHING") == "GET,NOSUCHTHING,,2"
        assert await ask("SET,NOSUCHTHING,1") == "SET,NOSUCHTHING,2"
        assert await ask("CMD,NOSUCHTHING") == "CMD,NOSUCHTHING,2"
        for wrong in ("NUMFRAMESTOACQUIRE,-1", "NUMFRAMESPERTRIGGER,0", "TRIGGERSTART,6", "ACQUISITIONTIME,nan"):
            assert await ask(f"SET,{wrong}") == f"SET,{wrong.partition(',')[0]},3"
        assert await ask("SET,SOFTWAREVERSION,1") == "SET,SOFTWAREVERSION,3"
        assert await ask("CMD,STOPACQUISITION") == "CMD,STOPACQUISITION,0"
        assert await ask("CMD,STARTACQUISITION") == "CMD,STARTACQUISITION,0"
        assert await ask("GET,DETECTORSTATUS") == "GET,DETECTORSTATUS,1,0"
        assert await ask("CMD,STARTACQUISITION") == "CMD,STARTACQUISITION,1"
        assert await ask("SET,NUMFRAMESTOACQUIRE,9") == "SET,NUMFRAMESTOACQUIRE,1"
        assert await ask("CMD,STOPACQUISITION") == "CMD,STOPACQUISITION,0"
        assert await ask("GET,DETECTORSTATUS") == "GET,DETECTORSTATUS,0,0"
        # several at once, in pieces, with noise between
        both = mpx("GET,GAIN") + b"noise" + mpx("CMD") + mpx("CMD,ABORT")
        for i in range(0, len(both), 5):
            ask.writer.write(both[i : i + 5])
            await ask.writer.drain()
        expected = mpx("GET,GAIN,0,0") + mpx("CMD,ABORT,0")
        assert await patiently(ask.reader.readexactly(len(expected))) == expected


async def test_a_control_port_in_use_is_one_sentence() -> None:
    merlin = SimulatedMerlin(source())
    async with merlin.serving(ANY_PORT):
        with pytest.raises(ConnectionFailed, match="port is in use by another program"):
            async with SimulatedMerlin(source()).serving(merlin.endpoint):
                pass


async def test_frames_come_after_startacquisition_and_as_many_as_were_asked_for() -> None:
    async with detector() as (merlin, endpoint, sending):
        start, numbers = await series(
            endpoint, merlin, "SET,NUMFRAMESTOACQUIRE,40", "SET,NUMFRAMESPERTRIGGER,8", "CMD,STARTACQUISITION"
        )
        assert (start.frames, start.settings["frames_per_trigger"]) == (40, 8)
        assert numbers == list(range(40))
        # and again, more than the source has in one pass; the detector is idle before
        start, numbers = await series(
            endpoint, merlin, f"SET,NUMFRAMESTOACQUIRE,{FRAMES + 5}", "SET,TRIGGERSTART,3", "CMD,STARTACQUISITION"
        )
        assert start.frames == FRAMES + 5
        assert numbers == list(range(FRAMES + 5))
        assert not sending.done()


async def test_the_soft_trigger_is_waited_for_and_stop_ends_an_endless_acquisition() -> None:
    told: list[SendReport] = []
    async with detector(rate=2000.0, progress=told.append) as (merlin, endpoint, _):
        protocol = protocol_named("merlin")
        async with open_receiver(protocol, [endpoint]) as receiver, MerlinControl(merlin.endpoint) as control:
            for name, value in (("NUMFRAMESTOACQUIRE", 0), ("TRIGGERSTART", 5)):
                await control._set(name, value)
            await control.arm()
            before = await patiently(receiver.get())  # the acquisition header and nothing else
            assert len(before.batch.lengths) == 1
            before.release()
            assert await receiver.get(0.2) is None
            await control._command("SOFTTRIGGER")
            (await patiently(receiver.get())).release()
            await control.finish()
            while (lease := await receiver.get(0.3)) is not None:
                lease.release()
            sent = told[-1].frames
            assert sent > 0
            assert await receiver.get(0.2) is None


async def test_started_and_stopped_without_anybody_listening_does_not_block_the_next_one() -> None:
    async with detector() as (merlin, endpoint, _), MerlinControl(merlin.endpoint) as control:
        for _ in range(3):
            await control.arm()
            await asyncio.sleep(0.02)
            await control.finish()
        start, numbers = await series(endpoint, merlin, "SET,NUMFRAMESTOACQUIRE,7", "CMD,STARTACQUISITION")
    assert (start.frames, numbers) == (7, list(range(7)))


# our client


PLAN = ScanPlan("line", FRAMES, COLUMNS, count_time_s=0.5e-3, frame_time_s=0.6e-3)


async def test_a_scan_is_prepared_in_merlins_words() -> None:
    merlin = SimulatedMerlin(source())
    async with merlin.serving(ANY_PORT), MerlinControl(merlin.endpoint) as control:
        facts = await control.describe()
        assert facts.settings == {
            "detector": "Merlin",
            "software_version": "liveptycho simulation",
            "count_time_s": 1e-3,
        }
        assert (await control.prepare(PLAN)).frame_time_s == 0.6e-3
        wanted = {
            "NUMFRAMESTOACQUIRE": str(FRAMES),
            "NUMFRAMESPERTRIGGER": str(COLUMNS),
            "TRIGGERSTART": "1",
            "TRIGGERSTOP": "0",
            "ACQUISITIONTIME": "0.5",
            "ACQUISITIONPERIOD": "0.6",
        }
        assert merlin.variables.items() >= wanted.items()
        await control.prepare(ScanPlan("gate", 10, 5))
        assert (merlin.variables["TRIGGERSTART"], merlin.variables["TRIGGERSTOP"]) == ("1", "2")
        await control.prepare(ScanPlan("software", 10, 5))
        assert merlin.variables["TRIGGERSTART"] == "0"
        assert await control.dropped() is None
        await control.arm()
        with pytest.raises(ConfigurationError, match="is acquiring: another program"):
            await control.prepare(PLAN)
        with pytest.raises(ConfigurationError, match="refuses STARTACQUISITION: busy; is an acquisition running"):
            await control.arm()
        await control.abort()
        await control.prepare(PLAN)
    async with merlin.serving(ANY_PORT), MerlinControl(merlin.endpoint, trigger_start=3, trigger_stop=4) as control:
        await control.prepare(PLAN)
        assert (merlin.variables["TRIGGERSTART"], merlin.variables["TRIGGERSTOP"]) == ("3", "4")
    async with merlin.serving(ANY_PORT), MerlinControl(merlin.endpoint, trigger_start=6) as control:
        with pytest.raises(ConfigurationError, match="refuses TRIGGERSTART = 6: out of range"):
            await control.prepare(PLAN)


@contextlib.asynccontextmanager
async def something(*replies: bytes, close: bool = False) -> AsyncIterator[str]:
    """A server that answers each request with the next of these bytes."""

    async def serve_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            for reply in replies:
                if not await reader.read(100):
                    break
                writer.write(reply)
            if not close:
                await reader.read()
        writer.close()

    server = await asyncio.start_server(serve_client, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("replies", "close", "reason"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], False, "not Merlin's control port"),
        ([mpx("GET,SOFTWAREVERSION,no code")], False, "ends with a return code"),
        ([], False, "no answer to GET,SOFTWAREVERSION within 0 s: is it Merlin's control port"),
        ([b"MPX,00"], True, "broke off: it was closed from there"),
        ([b"MPX,0000100000," + bytes(90_000)], False, "not Merlin's control port"),
    ],
)
async def test_what_is_no_merlin_is_said_in_words(
    replies: list[bytes], close: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merlin_control, "_REPLY_S", 0.3)
    async with something(*replies, close=close) as address, MerlinControl(address) as control:
        with pytest.raises(ConnectionFailed, match=reason) as caught:
            await control.describe()
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_nobody_is_there() -> None:
    async with something() as gone:
        pass
    with pytest.raises(
        ConnectionFailed, match=r"control port .*: nobody listens there; is the Merlin software running"
    ):
        async with MerlinControl(gone):
            pass
    with pytest.raises(ConnectionFailed, match="not an address"):
        MerlinControl("nonsense")


async def test_replies_to_others_are_passed_over_and_old_merlins_do_not_know_everything() -> None:
    replies = [mpx("GET,GAIN,1,0") + mpx("GET,SOFTWAREVERSION,0.7,0"), mpx("GET,ACQUISITIONTIME,,2")]
    async with something(*replies) as address, MerlinControl(address) as control:
        assert (await control.describe()).settings == {"detector": "Merlin", "software_version": "0.7"}


# the whole way


async def test_a_scan_through_merlin_gives_the_same_image_and_recording(tmp_path: Path) -> None:
    layers = [Layer.of("test", {**OPTICS_AND_DISK, "scan_shape": (ROWS, COLUMNS)})]
    path = tmp_path / "recording.h5"
    async with serving(encoding=Encoding.RAW_BIG_ENDIAN, protocol="merlin") as (endpoint, _):
        merlin, _ = await run_session(live_options(endpoint, protocol="merlin", layers=layers, record=path))
    async with serving() as (endpoint, _):
        native, _ = await run_session(live_options(endpoint, layers=layers))
    assert merlin.result is not None
    assert native.result is not None
    assert merlin.incomplete == ""
    assert_same_object(merlin.result, native.result, 1e-6)
    recorded = payloads(path)
    np.testing.assert_array_equal(
        np.stack([np.frombuffer(frame, ">u2").reshape(SCAN.detector_shape) for frame in recorded]), all_frames()
    )
    # and is replayed as it came, over TCP
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    again = tmp_path / "again.h5"
    replaying = asyncio.create_task(replay_recording(path, ANY_PORT, speed=None, ready=ready.set_result))
    done = await patiently(record_stream([await patiently(ready)], again, protocol="merlin", timeout_s=10.0))
    assert (done.frames, done.incomplete, await patiently(replaying)) == (FRAMES, "", FRAMES)
    assert payloads(again) == recorded


def payloads(path: Path) -> list[bytes]:
    """Every frame of a recording, as it came."""
    with open_recording(path) as recording:
        assert recording.protocol == "merlin"
        return [
            block.slab[offset : offset + size].tobytes()
            for block in recording.blocks()
            for offset, size in zip(block.offsets, block.sizes, strict=True)
        ]
