"""``check``: what arrives at an address, and what to do about it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import zmq
import zmq.asyncio

from detectors.errors import ConfigurationError
from stream.check import Finding, check_address
from tests.live_helpers import ANY_PORT, FRAMES, OPTICS_AND_DISK, PlainSender, all_frames, patiently, plainly, serving


async def verdicts(address: str, **options: Any) -> dict[str, Finding]:
    findings = await patiently(check_address(address, **options))
    assert all("\n" not in finding.text for finding in findings)
    return {finding.name: finding for finding in findings}


@contextlib.asynccontextmanager
async def server(greeting: bytes, close: bool = False) -> AsyncIterator[str]:
    """Something on a port that is no ZeroMQ socket."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()
        if not close:
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        await listening.wait_closed()


async def test_all_is_well() -> None:
    async with serving() as (endpoint, _):
        found = await verdicts(endpoint)
    assert {name: finding.verdict for name, finding in found.items()} == dict.fromkeys(
        ("connection", "messages", "start", "frames", "settings", "end"), "OK"
    )
    assert "detector 32x32 uint16, scan 16x16" in found["start"].text
    assert f"{FRAMES} frames (bslz4), numbers 0 to {FRAMES - 1}" in found["frames"].text


async def test_a_publisher() -> None:
    async with serving(pattern="pub") as (endpoint, _):
        found = await verdicts(endpoint, pattern="sub")
    assert found["end"].verdict == "OK"


async def test_an_address_that_is_bound() -> None:
    async with PlainSender() as unused:
        address = unused.endpoint
    async with serving(address=address, bind=False) as _:
        found = await verdicts(address, bind=True)
    assert "connection" not in found
    assert found["end"].verdict == "OK"


async def test_nobody_listens() -> None:
    async with PlainSender() as gone:
        address = gone.endpoint
    found = await verdicts(address)
    assert found["connection"].verdict == "ERROR"
    assert "nobody listens on 127.0.0.1 port" in found["connection"].text
    assert {finding.verdict for name, finding in found.items() if name != "connection"} == {"-"}


@pytest.mark.parametrize(
    ("greeting", "close", "text"),
    [
        (b"", False, "says nothing by itself"),
        (b"", True, "says nothing by itself"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False, "begins with b'SSH-2.0-Op'"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True, "begins with b'HTTP/1.1 4'"),
        (b"\xff" * 10, False, "begins with"),
    ],
)
async def test_something_else_on_the_port(greeting: bytes, close: bool, text: str) -> None:
    async with server(greeting, close) as address:
        found = await verdicts(address)
    assert found["connection"].verdict == "ERROR"
    assert "not ZeroMQ" in found["connection"].text
    assert text in found["connection"].text


async def test_silence() -> None:
    async with PlainSender() as sender:
        found = await verdicts(sender.endpoint, timeout_s=0.5)
    assert found["connection"].verdict == "OK"
    assert found["messages"].verdict == "TIMEOUT"
    assert "waited 0.5 s" in found["messages"].text


async def test_another_protocol_is_spoken() -> None:
    async def send(sender: PlainSender) -> None:
        for _ in range(30):
            await sender.raw(b'{"htype": "dheader-1.0"}')

    async with plainly(send) as address:
        found = await verdicts(address)
    assert found["messages"].verdict == "ERROR"
    assert "another --protocol" in found["messages"].text
    assert found["start"].verdict == found["frames"].verdict == "TIMEOUT"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([*range(10), *range(15, 40)], "5 are missing"), (range(0, 60, 2), "is another client connected?")],
)
async def test_frames_without_a_start_and_with_holes(numbers: Sequence[int], text: str) -> None:
    frames = all_frames()
    async with plainly(lambda sender: sender.scan(frames, numbers)) as address:
        found = await verdicts(address, timeout_s=0.5)
    assert found["start"].verdict == "TIMEOUT"
    assert found["frames"].verdict == "ERROR"
    assert text in found["frames"].text
    assert found["end"].verdict == "-"


async def test_settings_that_live_will_need() -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start(**dict.fromkeys(OPTICS_AND_DISK), scan_shape=None)
        await sender.end()

    async with plainly(send) as address:
        found = await verdicts(address)
    assert found["settings"].verdict == "-"
    for key in ("scan_shape", "energy_kev", "semiangle_mrad"):
        assert key in found["settings"].text


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "http://127.0.0.1:80",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:port",
        "tcp://127.0.0.1:99999",
        "tcp://",
        pytest.param("tcp://[::1"),
        pytest.param(
            "tcp://a..b:31000",
        ),
    ],
)
async def test_an_address_that_is_none(address: str) -> None:
    found = await verdicts(address, timeout_s=0.5)
    assert found["connection"].verdict == "ERROR"


async def test_a_port_in_use_cannot_be_bound() -> None:
    async with PlainSender() as sender:
        found = await verdicts(sender.endpoint, bind=True, timeout_s=0.5)
    assert found["socket"].verdict == "ERROR"
    assert "port is in use" in found["socket"].text


async def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown protocol 'morse'"):
        await check_address(ANY_PORT, protocol="morse")


async def test_a_socket_of_the_wrong_kind_is_silence() -> None:
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.PUB)  # and we pull
        socket.bind(ANY_PORT)
        found = await verdicts(socket.getsockopt_string(zmq.LAST_ENDPOINT), timeout_s=0.5)
    finally:
        context.destroy(linger=0)
    assert found["messages"].verdict == "TIMEOUT"
