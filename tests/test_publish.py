"""Publishing and control, over real sockets: what a viewer may count on, and what nobody can break."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio

from detectors.errors import ConfigurationError, ConnectionFailed, ProtocolError
from stream.api import Session, Snapshot
from stream.config import Layer
from stream.publish import Publisher
from tests.live_helpers import (
    ANY_PORT,
    COLUMNS,
    FRAMES,
    SCAN,
    PlainSender,
    all_frames,
    live_options,
    patiently,
    serving,
    snapshot_where,
)


@contextlib.asynccontextmanager
async def published(**options: Any) -> AsyncIterator[tuple[Session, PlainSender]]:
    """A session that publishes, and the sender it listens to."""
    async with PlainSender() as sender, Session(live_options(sender.endpoint, publish=ANY_PORT, **options)) as session:
        yield session, sender


@contextlib.contextmanager
def sockets() -> Any:
    context = zmq.asyncio.Context()
    try:
        yield context
    finally:
        context.destroy(linger=0)


def subscriber(context: zmq.asyncio.Context, session: Session, conflate: bool = True) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.SUB)
    if conflate:
        socket.setsockopt(zmq.CONFLATE, 1)
    socket.subscribe(b"")
    assert session.publish_endpoint is not None
    socket.connect(session.publish_endpoint)
    return socket


async def ask_raw(session: Session, *parts: bytes) -> dict[str, Any]:
    """A request as bytes; the reply."""
    assert session.publish_endpoint is not None
    with sockets() as context:
        socket = context.socket(zmq.REQ)
        socket.connect(f"tcp://127.0.0.1:{session._publisher.control_port}")  # type: ignore[union-attr]
        await socket.send_multipart(parts)
        reply = msgpack.unpackb(await asyncio.wait_for(socket.recv(), 3.0))
    assert isinstance(reply, dict)
    return reply


async def ask(session: Session, **request: Any) -> dict[str, Any]:
    return await ask_raw(session, msgpack.packb(request))


async def test_a_viewer_that_comes_to_an_idle_session_sees_it_soon() -> None:
    async with published() as (session, _):
        with sockets() as context:
            socket = subscriber(context, session)
            snapshot = Snapshot.unpack(await patiently(socket.recv(), 3.0))
            assert snapshot.state == "waiting"
            assert snapshot.link == "waiting"
            assert snapshot.control_port == session._publisher.control_port  # type: ignore[union-attr]
            # From now on at least one a second, though nothing happens.
            seen = [snapshot]
            began = time.monotonic()
            while len(seen) < 3:
                seen.append(Snapshot.unpack(await patiently(socket.recv(), 2.4)))
            assert time.monotonic() - began < 2 * 1.0 + 1.5
    assert [s.sequence for s in seen] == sorted({s.sequence for s in seen})


async def test_at_most_thirty_a_second() -> None:
    async with serving(rate=500.0, frames_per_message=1) as (endpoint, _):
        disk = [Layer.of("flag", {"bf_centre_px": SCAN.centre_px})]  # or every frame would wait for it to be found
        async with Session(live_options(endpoint, publish=ANY_PORT, layers=disk)) as session:
            with sockets() as context:
                socket = subscriber(context, session, conflate=False)
                snapshots = [Snapshot.unpack(await patiently(socket.recv()))]
                while snapshots[-1].state != "finished":
                    snapshots.append(Snapshot.unpack(await patiently(socket.recv())))
    scanning = [s for s in snapshots if s.state == "scanning"]
    assert len(scanning) > 2
    span = scanning[-1].time_s - scanning[0].time_s
    # The last but one may be early: the state of the session has changed.
    assert len(scanning) - 2 <= 30 * span * 1.1 + 1
    assert snapshots[-1].rows_acquired == FRAMES // COLUMNS


async def test_what_is_published_is_what_the_session_has() -> None:
    async with published(linger_s=30.0) as (session, sender):
        with sockets() as context:
            socket = subscriber(context, session)
            await sender.start()
            await sender.scan(all_frames(), range(FRAMES))
            await sender.end()
            own = await snapshot_where(session, lambda s: s.state == "finished")
            seen = Snapshot.unpack(await patiently(socket.recv()))
            while seen.state != "finished":
                seen = Snapshot.unpack(await patiently(socket.recv()))
    assert seen.scan_shape == own.scan_shape
    assert seen.counters == own.counters
    assert seen.aberrations == own.aberrations
    for name, image in own.images.items():
        np.testing.assert_array_equal(seen.images[name], image)


@pytest.mark.parametrize("state", ["waiting", "scanning", "finished"])
async def test_every_command(state: str) -> None:
    async with published(linger_s=30.0) as (session, sender):
        if state != "waiting":
            await sender.start()
            await sender.scan(all_frames(), range(100 if state == "scanning" else FRAMES))
            if state == "finished":
                await sender.end()
            await snapshot_where(session, lambda s: s.state == state and s.rows_acquired > 0)
        values = {"C10": -7.0, "C12": 3.0, "phi12": 10.0}
        assert await ask(session, command="aberrations", values=values) == {"ok": True}
        assert await ask(session, command="rotation", rotation_deg=12.5, transpose=True) == {"ok": True}
        assert await ask(session, command="rotation", rotation_deg=13.5) == {"ok": True}
        assert await ask(session, command="method", method="ssb-single") == {"ok": True}
        reply = await ask(session, command="snapshot")
        assert reply.keys() == {"ok", "snapshot"}
        snapshot = Snapshot.unpack(reply["snapshot"])
        assert snapshot.state == state
        if state != "waiting":
            assert snapshot.aberrations == values
            assert (snapshot.rotation_deg, snapshot.transpose, snapshot.method) == (13.5, True, "ssb-single")
            assert "phase" in snapshot.images
        assert await ask(session, command="reset") == {"ok": True}
        if state != "waiting":
            await snapshot_where(session, lambda s: s.rows_acquired == 0)
        assert await ask(session, command="stop") == {"ok": True}
        await patiently(session.wait(), 3.0)


async def test_rows_that_come_after_a_reset_are_shown() -> None:
    frames = all_frames()
    async with published() as (session, sender):
        await sender.start()
        await sender.scan(frames, range(8 * COLUMNS))
        await snapshot_where(session, lambda s: s.rows_acquired == 8)
        assert await ask(session, command="reset") == {"ok": True}
        await snapshot_where(session, lambda s: s.rows_acquired == 0)
        await sender.scan(frames, range(8 * COLUMNS, FRAMES))
        snapshot = await snapshot_where(session, lambda s: s.rows_acquired == 8)
        assert np.isnan(snapshot.images["phase"][:8]).all()
        assert np.isfinite(snapshot.images["phase"][8:]).all()
        await sender.end()
        result = await patiently(session.wait())
    assert result is not None
    assert np.isfinite(result.object).all()
    assert result.counters.received == FRAMES


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({}, "unknown command None"),
        ({"command": "dance"}, "unknown command 'dance'; known are aberrations, rotation, method"),
        ({"command": 3}, "unknown command 3"),
        ({"command": "stop", "now": True}, "stop does not take now; it takes nothing"),
        ({"command": "method", "methods": "ssb"}, "method does not take methods; it takes method"),
        ({"command": "method"}, "method needs its value"),
        ({"command": "method", "method": "magic"}, "unknown method 'magic'"),
        ({"command": "method", "method": ["ssb"]}, "method"),
        ({"command": "aberrations"}, "aberrations needs values"),
        ({"command": "aberrations", "values": [1.0]}, "aberrations needs values"),
        ({"command": "aberrations", "values": {"C10": float("nan")}}, "C10"),
        ({"command": "aberrations", "values": {"C10": "much"}}, "C10"),
        ({"command": "aberrations", "values": {"C10": None}}, "C10"),
        ({"command": "aberrations", "values": {"Z4": 1.0}}, "unknown aberration 'Z4'"),
        ({"command": "aberrations", "values": {"phi12": 1.0}}, "phi12"),
        ({"command": "rotation"}, "rotation needs its value"),
        ({"command": "rotation", "rotation_deg": float("inf")}, "rotation_deg"),
        ({"command": "rotation", "rotation_deg": "north"}, "rotation_deg"),
        ({"command": "rotation", "rotation_deg": [1.0]}, "rotation_deg"),
        ({"command": "rotation", "rotation_deg": 1e9}, "rotation_deg"),
        ({"command": "rotation", "transpose": "perhaps"}, "transpose"),
        ({"command": "rotation", "transpose": 7}, "transpose"),
    ],
)  # fmt: skip
async def test_a_request_that_cannot_be_meant_is_refused(request_: dict[str, Any], error: str) -> None:
    async with published() as (session, _):
        reply = await ask(session, **request_)
        assert reply["ok"] is False
        assert error in reply["error"]
        assert "\n" not in reply["error"]
        assert await ask(session, command="reset") == {"ok": True}, "and the session goes on"


@pytest.mark.parametrize("part", [b"", b"\xc1", b"\x80\x80", b"GET / HTTP/1.1", msgpack.packb([1]), b"\x81\x01\x02"])
async def test_garbage_is_answered(part: bytes) -> None:
    async with published() as (session, _):
        reply = await ask_raw(session, part)
        assert reply["ok"] is False
        assert await ask(session, command="reset") == {"ok": True}


@pytest.mark.parametrize("command", [["stop"], {"stop": 1}])
async def test_a_command_that_cannot_be_looked_up_is_refused(command: Any) -> None:
    async with published() as (session, _):
        reply = await ask(session, command=command)
        assert reply["ok"] is False
        assert await ask(session, command="reset") == {"ok": True}


async def test_a_request_of_several_parts_is_refused() -> None:
    async with published() as (session, _):
        reply = await ask_raw(session, msgpack.packb({"command": "reset"}), b"more")
        assert reply["ok"] is False
        assert await ask(session, command="reset") == {"ok": True}


async def test_an_oversized_request_costs_its_sender_the_connection_only() -> None:
    async with published() as (session, _):
        with sockets() as context:
            socket = context.socket(zmq.REQ)
            socket.connect(f"tcp://127.0.0.1:{session._publisher.control_port}")  # type: ignore[union-attr]
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            await socket.send(b"x" * (2 << 20))
            await patiently(monitor.recv_multipart())
            socket.disable_monitor()
        assert await ask(session, command="reset") == {"ok": True}


async def test_a_command_that_fails_inside_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with published() as (session, _):

        async def broken(**settings: Any) -> None:
            raise RuntimeError("a bug of ours")

        monkeypatch.setattr(session, "change", broken)
        reply = await ask(session, command="method", method="ssb")
        assert reply["ok"] is False
        assert await ask(session, command="reset") == {"ok": True}


async def test_a_port_in_use_is_one_sentence() -> None:
    async def handler(command: str, request: dict[str, Any]) -> dict[str, Any]:
        return {}

    async with Publisher(ANY_PORT, handler) as publisher:
        with pytest.raises(ConnectionFailed, match=r"cannot publish on .*port is in use"):
            async with Publisher(publisher.endpoint, handler):
                pass


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("nonsense", ConfigurationError),
        ("ipc:///tmp/x", ConfigurationError),
        ("tcp://127.0.0.1", ConnectionFailed),
        ("tcp://127.0.0.1:notaport", ConnectionFailed),
        ("tcp://203.0.113.7:31010", ConnectionFailed),
        pytest.param(
            "tcp://[::1", (ConfigurationError, ConnectionFailed),
        ),
    ],
)  # fmt: skip
async def test_an_address_that_cannot_be_used_is_one_sentence(address: str, error: Any) -> None:
    async def handler(command: str, request: dict[str, Any]) -> dict[str, Any]:
        return {}

    with pytest.raises(error, match=r"tcp://") as caught:
        async with Publisher(address, handler):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [b"", b"\xc1", msgpack.packb({"type": "snapshot", "version": 2}), msgpack.packb([])])
def test_what_is_no_snapshot_is_a_protocol_error(part: bytes) -> None:
    with pytest.raises(ProtocolError):
        Snapshot.unpack(part)
