"""``check``: what arrives at an address, and what to do about it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from detectors.errors import ConfigurationError
from detectors.messages import Encoding
from detectors.protocols.registry import PROTOCOLS, protocol_named
from detectors.simulator.merlin_device import SimulatedMerlin
from detectors.simulator.source import EncodedSource
from stream.check import Finding, check_address
from stream.probe import advice, is_zeromq, probe, socket_type
from tests.live_helpers import (
    ANY_PORT,
    FRAMES,
    OPTICS_AND_DISK,
    SCAN,
    PlainSender,
    all_frames,
    patiently,
    plainly,
    serving,
)


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
        (b"\xff" * 10, False, "begins with"),
    ],
)
async def test_something_else_on_the_port(greeting: bytes, close: bool, text: str) -> None:
    async with server(greeting, close) as address:
        found = await verdicts(address)
    assert found["connection"].verdict == "ERROR"
    assert "not ZeroMQ" in found["connection"].text
    assert text in found["connection"].text


async def http_reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
    writer.close()


@pytest.mark.parametrize("protocol", ["native", "dectris-v2", "merlin"])
async def test_an_http_server_is_recognised(protocol: str) -> None:
    listening = await asyncio.start_server(http_reply, "127.0.0.1", 0)
    try:
        address = f"tcp://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        found = await verdicts(address, protocol=protocol, timeout_s=0.3)
    finally:
        listening.close()
        await listening.wait_closed()
    assert found["connection"].verdict == "ERROR"
    assert "an HTTP server answers: is this the SIMPLON REST port?" in found["connection"].text
    assert "31001" in found["connection"].text


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
    assert "these are dectris-v1 messages" in found["messages"].text
    assert "use --protocol dectris-v1" in found["messages"].text
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


async def test_noise_is_of_no_protocol() -> None:
    async def send(sender: PlainSender) -> None:
        for _ in range(30):
            await sender.raw(b"\x00noise")

    async with plainly(send) as address:
        found = await verdicts(address)
    assert found["messages"].verdict == "ERROR"
    assert "is another --protocol spoken?" in found["messages"].text


@pytest.mark.parametrize(
    ("kind", "pattern", "text"),
    [
        (zmq.PUB, "pull", "ZeroMQ PUB socket answers on 127.0.0.1 port [0-9]+: the detector publishes, use --sub"),
        (zmq.XPUB, "pull", "use --sub"),
        (zmq.PUSH, "sub", "ZeroMQ PUSH socket answers .*: the detector does not publish, leave --sub out"),
        (zmq.REP, "pull", "ZeroMQ REP socket answers .*: it sends no frames; check the port"),
        (zmq.PUSH, "pull", "a ZeroMQ socket answers"),
        (zmq.PUB, "sub", "a ZeroMQ socket answers"),
    ],
)
async def test_a_socket_of_the_wrong_kind_is_recognised(kind: int, pattern: str, text: str) -> None:
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(kind)
        socket.bind(ANY_PORT)
        found = await verdicts(socket.getsockopt_string(zmq.LAST_ENDPOINT), pattern=pattern, timeout_s=0.3)
    finally:
        context.destroy(linger=0)
    assert re.search(text, found["connection"].text)
    assert found["connection"].verdict == ("OK" if text == "a ZeroMQ socket answers" else "ERROR")


async def test_the_probe_takes_no_message_from_a_stream() -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.scan(all_frames(), range(FRAMES))
        await sender.end()

    async with plainly(send) as address:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        for _ in range(3):
            assert (await probe(host, int(port), protocol_named("native"), 1.0)).socket_type == "PUSH"
        found = await verdicts(address)
    assert f"{FRAMES} frames" in found["frames"].text


# plain TCP


async def test_all_is_well_with_merlin() -> None:
    async with serving(encoding=Encoding.RAW_BIG_ENDIAN, protocol="merlin") as (endpoint, _):
        found = await verdicts(endpoint, protocol="merlin")
    assert {name: found[name].verdict for name in ("connection", "messages", "start", "frames")} == dict.fromkeys(
        ("connection", "messages", "start", "frames"), "OK"
    )
    assert f"{FRAMES} frames" in found["frames"].text


async def test_a_zeromq_protocol_and_merlins_data_port() -> None:
    async with serving(encoding=Encoding.RAW_BIG_ENDIAN, protocol="merlin") as (endpoint, _):
        found = await verdicts(endpoint, protocol="dectris-v2")
    assert found["connection"].verdict == "ERROR"
    assert "these are merlin messages" in found["connection"].text
    assert "use --protocol merlin" in found["connection"].text
    async with server(b"") as address:  # an idle one says nothing
        found = await verdicts(address, protocol="dectris-v2")
    assert "Merlin's data port, perhaps: use --protocol merlin" in found["connection"].text


async def test_merlin_and_a_zeromq_socket() -> None:
    async with PlainSender() as sender:
        found = await verdicts(sender.endpoint, protocol="merlin", timeout_s=0.5)
    assert found["connection"].verdict == "ERROR"
    assert "a ZeroMQ socket answers, and merlin is plain TCP: use --protocol native or" in found["connection"].text


async def test_merlin_and_its_control_port() -> None:
    merlin = SimulatedMerlin(EncodedSource(SCAN, Encoding.RAW_BIG_ENDIAN))
    async with merlin.serving(ANY_PORT):
        found = await verdicts(merlin.endpoint, protocol="merlin", timeout_s=0.3)
    assert found["connection"].verdict == "ERROR"
    assert "it is the control port; frames come from another one, usually 6342" in found["connection"].text


@pytest.mark.parametrize(
    ("greeting", "close", "verdict", "text"),
    [
        (b"", False, "OK", "a TCP server takes the connection"),
        (b"", True, "OK", "a TCP server takes the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False, "ERROR", "answers, but not merlin: it begins with b'SSH-2.0-Op'"),
    ],
)
async def test_merlin_and_something_else(greeting: bytes, close: bool, verdict: str, text: str) -> None:
    async with server(greeting, close) as address:
        found = await verdicts(address, protocol="merlin", timeout_s=0.3)
    assert found["connection"].verdict == verdict
    assert text in found["connection"].text
    assert found["messages"].verdict == ("TIMEOUT" if verdict == "OK" else "-")


async def test_merlin_and_nobody() -> None:
    async with PlainSender() as gone:
        address = gone.endpoint
    found = await verdicts(address, protocol="merlin", timeout_s=0.3)
    assert found["connection"].verdict == "ERROR"
    assert "nobody listens on 127.0.0.1 port" in found["connection"].text
    assert "--bind" not in found["connection"].text
    for address in ("nonsense", "tcp://127.0.0.1:port"):
        found = await verdicts(address, protocol="merlin", timeout_s=0.3)
        assert "not an address" in found["connection"].text
    with pytest.raises(ConfigurationError, match="it cannot be bound"):
        await check_address(address, protocol="merlin", bind=True)


# the bytes of ZeroMQ's handshake (ZMTP 3.0, RFC 23), written down here by hand


_HANDSHAKE = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 32)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB", "PUB"),
        (b"\x04\x28\x05READY\x08Identity\x00\x00\x00\x00\x0bSocket-Type\x00\x00\x00\x04PUSH", "PUSH"),
        (b"\x06" + bytes(7) + b"\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB", "PUB"),
        (b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03P", ""),
        (b"\x04\x19\x05READY\xffSocket-Type\x00\x00\x00\x03PUB", ""),
        (b"\x04\x06\x05ERROR", ""),
        (b"\x00\x01x", ""),
        (b"", ""),
    ],
)
def test_the_type_of_a_zeromq_socket(command: bytes, kind: str) -> None:
    assert socket_type(_HANDSHAKE + command) == kind
    assert is_zeromq(_HANDSHAKE)
    for length in range(len(_HANDSHAKE + command)):
        assert socket_type((_HANDSHAKE + command)[:length]) in ("", kind)


@given(st.binary(max_size=200))
def test_any_bytes_may_follow_a_greeting(noise: bytes) -> None:
    assert isinstance(socket_type(_HANDSHAKE + noise), str)
    for protocol in PROTOCOLS.values():
        assert isinstance(advice(protocol, noise), str)
