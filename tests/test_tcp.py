"""Streams over plain TCP: the receiver's framing, back-pressure and reconnecting; the sender's wire."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from detectors.errors import ConfigurationError, ConnectionFailed
from detectors.messages import Framed, ReceivedBatch, Undecodable
from detectors.protocols.registry import protocol_named
from detectors.simulator.tcp_wire import TcpWire
from detectors.simulator.wire import open_wire, send
from stream.intake import Silence, messages
from stream.receiving import Receiver, common, open_receiver, tcp_receiver
from stream.receiving.tcp_receiver import TcpReceiver
from tests.live_helpers import ANY_PORT, patiently

_MARK = b"<>"


def framing(data: memoryview) -> Framed:
    """Messages are "<>", 4 bytes of length, and so many bytes."""
    held, bounds, at, stray = bytes(data), [], 0, 0
    while True:
        found = held.find(_MARK, at)
        if found < 0:  # the last byte may be half a mark
            used = max(at, len(held) - held.endswith(b"<"))
            return Framed(bounds, used, stray + used - at)
        stray, at = stray + found - at, found
        stop = at + 6 + int.from_bytes(held[at + 2 : at + 6], "big")
        if len(held) < at + 6 or stop > len(held):
            return Framed(bounds, at, stray)
        bounds.append((at, stop))
        at = stop


def packed(payload: bytes) -> bytes:
    return _MARK + len(payload).to_bytes(4, "big") + payload


def numbered(count: int, size: int = 0) -> list[bytes]:
    return [packed(i.to_bytes(4, "big") + b"x" * (size + i % 7)) for i in range(count)]


def parts_of(batch: ReceivedBatch) -> list[bytes]:
    return [bytes(batch.part(i)) for i in range(len(batch.lengths))]


async def received(receiver: Receiver, count: int) -> list[bytes]:
    out: list[bytes] = []
    while len(out) < count:
        lease = await patiently(receiver.get())
        assert lease is not None
        assert lease.batch.last.all()
        out += parts_of(lease.batch)
        lease.release()
    return out


async def until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():  # noqa: ASYNC110 - there is nothing to wait for
            await asyncio.sleep(0.005)

    await patiently(wait())


Serve = Callable[[asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def detector(*clients: Serve, port: int = 0) -> AsyncIterator[str]:
    """A TCP server that treats its first, second, ... client so, each until its function returns."""
    waiting, tasks, over = list(clients), set(), asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        racing = [asyncio.ensure_future(over.wait())]
        if waiting:
            racing.append(asyncio.ensure_future(waiting.pop(0)(writer)))
        await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
        for task in racing:
            task.cancel()
        await asyncio.gather(*racing, return_exceptions=True)
        if over.is_set():
            writer.transport.abort()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        over.set()
        await asyncio.gather(*tasks)
        await server.wait_closed()


def sending(*chunks: bytes, stay: bool = True) -> Serve:
    async def serve(writer: asyncio.StreamWriter) -> None:
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0)
        if stay:
            await asyncio.sleep(60)

    return serve


def receiver_of(*addresses: str) -> TcpReceiver:
    return TcpReceiver(addresses, framing, 6342)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_receiver, "_RETRY_S", 0.02)


# the receiver


@pytest.mark.parametrize(("size", "count", "most"), [(0, 5000, 50), (1000, 2000, 5000), (1_000_000, 60, 3_000_000)])
async def test_every_message_arrives_whole_and_in_order_however_it_is_cut(size: int, count: int, most: int) -> None:
    sent = numbered(count, size)
    stream, rng, chunks = b"".join(sent), random.Random(size), []
    while stream:
        n = rng.randint(1, most)
        chunks.append(stream[:n])
        stream = stream[n:]
    async with detector(sending(*chunks)) as address, receiver_of(address) as receiver:
        assert receiver.endpoints == [address]
        assert await received(receiver, count) == sent
        assert receiver.bytes_received == sum(map(len, sent))
        assert (receiver.stray_bytes, receiver.too_large, receiver.link) == (0, 0, "")


async def test_small_slabs_hold_parts_of_messages_without_losing_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "FULL_BYTES", 1000)
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 700)
    monkeypatch.setattr(tcp_receiver, "_CHUNK_BYTES", 333)
    sent = numbered(500, 600)
    async with detector(sending(b"".join(sent))) as address, receiver_of(address) as receiver:
        assert await received(receiver, 500) == sent


async def test_a_consumer_that_does_not_take_slows_the_sender_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "FULL_BYTES", 1 << 20)
    sent = numbered(2000, 50_000)  # 100 MB; slabs of 1 MB and the system's buffers hold only a part

    async with detector(sending(*sent)) as address, receiver_of(address) as receiver:
        lease = await patiently(receiver.get())
        got = parts_of(lease.batch)  # and keeps it for a while
        before = -1
        while receiver.bytes_received > before:
            before = receiver.bytes_received
            await asyncio.sleep(0.1)
        assert receiver.bytes_received < 5 << 20
        lease.release()
        got += await received(receiver, len(sent) - len(got))
    assert got == sent


async def test_stray_bytes_are_counted_and_what_follows_is_found() -> None:
    noise = [b"noise", b"", b"<", b"<<", bytes(1000)]
    sent = numbered(5, 30)
    stream = b"".join(a + b for a, b in zip(noise, sent, strict=True))
    async with (
        detector(sending(*(stream[i : i + 7] for i in range(0, len(stream), 7)))) as address,
        receiver_of(address) as receiver,
    ):
        assert await received(receiver, 5) == sent
        assert receiver.stray_bytes == sum(map(len, noise))
        assert receiver.first_stray.startswith(b"nois")


async def test_noise_without_end_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "FULL_BYTES", 10_000)
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 1000)
    last = packed(b"at last")
    async with detector(sending(*[b"." * 5000] * 100, last)) as address, receiver_of(address) as receiver:
        assert await received(receiver, 1) == [last]
        assert receiver.stray_bytes == 500_000


async def test_a_message_that_is_too_large_is_counted_and_the_next_ones_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(common, "FULL_BYTES", 2000)
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 1000)
    monkeypatch.setattr(tcp_receiver, "_CHUNK_BYTES", 500)
    small = packed(b"y" * 900)
    for huge in (packed(b"z" * 3000), _MARK + b"\xff" * 4 + b"z" * 3000):
        async with detector(sending(small, huge, small, small)) as address, receiver_of(address) as receiver:
            assert await received(receiver, 3) == [small] * 3
            assert receiver.too_large == 1


async def test_what_was_lost_is_told_to_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 1000)
    protocol = replace(protocol_named("native"), framing=framing)
    async with (
        detector(sending(b"noise", _MARK + b"\0\0\xff\xff" + b"z" * 3000)) as address,
        open_receiver(protocol, [address]) as receiver,
    ):
        stream, found = messages(receiver, protocol, 0.05), []
        async with contextlib.aclosing(stream):
            while len(found) < 2:
                item = await patiently(anext(stream))
                assert isinstance(item, Silence | Undecodable)
                found += [item] if isinstance(item, Undecodable) else []
    by_frames = {item.frames: item.reason for item in found}
    assert "larger than the receiver takes" in by_frames[1]
    assert "bytes between the messages" in by_frames[0]


@pytest.mark.usefixtures("quick")
async def test_a_detector_that_is_not_there_yet_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sent = numbered(3)
    async with receiver_of(f"tcp://127.0.0.1:{port}") as receiver:
        assert receiver.link == f"connecting to tcp://127.0.0.1:{port}"
        await until(lambda: receiver.link.endswith(": nobody listens there"))
        assert await patiently(receiver.get(0.05)) is None
        async with detector(sending(*sent), port=port):
            assert await received(receiver, 3) == sent
            assert receiver.link == ""


@pytest.mark.usefixtures("quick")
async def test_a_connection_that_breaks_is_made_again_and_half_a_message_is_no_message() -> None:
    sent = numbered(6, 100)
    half = sent[0][:50]
    clients = sending(*sent[:3], half, stay=False), sending(*sent[3:])
    async with detector(*clients) as address, receiver_of(address) as receiver:
        assert await received(receiver, 6) == sent
        assert receiver.stray_bytes == len(half)
    async with detector(sending(sent[0], stay=False)) as address, receiver_of(address) as receiver:
        await received(receiver, 1)
        await until(lambda: receiver.link)
        assert receiver.link == f"reconnecting to {address}: the connection was closed from there"


async def test_a_host_that_is_none_is_said_and_tried_again() -> None:
    async with receiver_of("tcp://no-such-host.invalid:1") as receiver:
        await until(lambda: "there is no host of that name" in receiver.link)


async def test_several_detectors_share_one_consumer() -> None:
    one, other = numbered(300, 10), numbered(300, 20)
    async with (
        detector(sending(*one)) as first,
        detector(sending(*other)) as second,
        receiver_of(first, second) as receiver,
    ):
        got: dict[int, list[bytes]] = {0: [], 1: []}
        while sum(map(len, got.values())) < 600:
            lease = await patiently(receiver.get())
            got[lease.batch.socket_index] += parts_of(lease.batch)
            lease.release()
    assert got == {0: one, 1: other}


async def test_leaving_while_messages_come_ends_at_once() -> None:
    async def flood(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"".join(numbered(100, 1000)))
            await writer.drain()

    async with detector(flood) as address, receiver_of(address) as receiver:
        await received(receiver, 10)
        began = time.perf_counter()
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("nonsense", "not an address"),
        ("", "not an address"),
        ("ipc:///tmp/socket", "not an address"),
        ("tcp://127.0.0.1:notaport", "not an address"),
        ("tcp://127.0.0.1:99999", "not an address"),
        ("tcp://127.0.0.1:0", "name the detector's machine and port"),
        ("tcp://*:6342", "name the detector's machine and port"),
    ],
)
async def test_an_address_that_cannot_be_used_is_one_sentence(address: str, reason: str) -> None:
    with pytest.raises(ConnectionFailed, match=reason) as caught:
        async with receiver_of(address):
            pass
    assert repr(address) in str(caught.value)


async def test_the_protocols_port_is_the_default() -> None:
    async with open_receiver(protocol_named("merlin"), ["tcp://127.0.0.1"]) as receiver:
        assert receiver.endpoints == ["tcp://127.0.0.1:6342"]


@pytest.mark.parametrize("options", [{"bind": True}, {"pattern": "sub"}])
async def test_what_plain_tcp_does_not_know_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="merlin comes over plain TCP"):
        open_receiver(protocol_named("merlin"), [ANY_PORT], **options)  # type: ignore[arg-type]


# the sender's wire


async def heard(reader: asyncio.StreamReader, count: int) -> bytes:
    return await patiently(reader.readexactly(count))  # type: ignore[no-any-return]


def place(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


@contextlib.asynccontextmanager
async def wire() -> AsyncIterator[TcpWire]:
    opened = open_wire(protocol_named("merlin"), ANY_PORT)
    assert isinstance(opened, TcpWire)
    try:
        yield opened
    finally:
        opened.close()


async def test_parts_follow_each_other_on_the_wire() -> None:
    async with wire() as sender:
        assert not sender.try_send([b"nobody is there"])
        reader, writer = await asyncio.open_connection(*place(sender.endpoint))
        for parts in ([b"abc", b"", memoryview(b"def")], [b"g"]):
            await patiently(send(sender, parts))
        await patiently(asyncio.gather(sender.flush(5), _read_to_the_end(reader, writer, b"abcdefg")))


async def _read_to_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, expected: bytes) -> None:
    assert await reader.read() == expected
    writer.close()
    await writer.wait_closed()


async def test_a_slow_client_slows_the_sender_down_and_loses_nothing() -> None:
    sent = numbered(400, 250_000)  # 100 MB
    async with wire() as sender:
        reader, writer = await asyncio.open_connection(*place(sender.endpoint), limit=1 << 16)
        await patiently(send(sender, [sent[0]]))
        taken = 1
        while sender.try_send([sent[taken]]):
            taken += 1
            await asyncio.sleep(0)
            assert taken < 200, "the sender never had to wait"

        async def the_rest() -> None:
            for message in sent[taken:]:
                await send(sender, [message])
            await sender.flush(20)

        await patiently(asyncio.gather(the_rest(), _read_to_the_end(reader, writer, b"".join(sent))))


async def test_the_next_client_gets_the_next_message() -> None:
    async with wire() as sender:
        reader, writer = await asyncio.open_connection(*place(sender.endpoint))
        await patiently(send(sender, [b"first "]))
        assert await heard(reader, 6) == b"first "
        other, other_writer = await asyncio.open_connection(*place(sender.endpoint))  # waits for its turn
        await patiently(send(sender, [b"second"]))
        assert await heard(reader, 6) == b"second"
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.05)
        await patiently(send(sender, [b"third "]))
        assert await heard(other, 6) == b"third "
        other_writer.close()
        await other_writer.wait_closed()


async def test_a_client_that_never_reads_holds_the_sender_no_longer_than_agreed() -> None:
    async with wire() as sender:
        _, writer = await asyncio.open_connection(*place(sender.endpoint), limit=1)
        await patiently(send(sender, [b"x" * 50_000_000]))
        began = time.perf_counter()
        await sender.flush(0.2)
        assert 0.15 < time.perf_counter() - began < 2
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_a_port_in_use_and_what_the_wire_cannot_are_said_in_words() -> None:
    async with wire() as sender:
        with pytest.raises(ConnectionFailed, match="port is in use by another program"):
            open_wire(protocol_named("merlin"), sender.endpoint)
    wrong: Sequence[dict[str, object]] = ({"pattern": "pub"}, {"bind": False})
    for options in wrong:
        with pytest.raises(ConfigurationError, match="plain TCP"):
            open_wire(protocol_named("merlin"), ANY_PORT, **options)  # type: ignore[arg-type]
