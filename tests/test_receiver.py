"""The receiver: every message, in order, whole; a slow consumer slows the sender down; nobody else has to wait."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import numpy as np
import pytest
import zmq
import zmq.asyncio

from detectors.errors import ConfigurationError, ConnectionFailed
from detectors.messages import Encoding, FrameBlock, ReceivedBatch, SeriesStart, Undecodable
from detectors.protocols.native import DTYPES
from detectors.protocols.native import Decoder as NativeDecoder
from detectors.protocols.native import Encoder as NativeEncoder
from detectors.protocols.registry import protocol_named
from stream import intake
from stream.intake import Orphans, Silence, messages
from stream.receiving import common, drain, zmq_receiver
from stream.receiving.common import Slab
from stream.receiving.zmq_receiver import ZmqReceiver as Receiver
from tests.live_helpers import ANY_PORT, PATIENCE_S, PlainSender, batch, patiently

Message = tuple[bytes, ...]

either_drain = pytest.mark.parametrize("how", ["compiled", "plain"], indirect=True)


@pytest.fixture
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the socket is emptied."""
    if request.param == "compiled" and not drain.COMPILED:
        pytest.skip("libzmq's functions cannot be reached in this build of pyzmq")
    monkeypatch.setattr(zmq_receiver, "drain", getattr(drain, f"drain_{request.param}"))


async def received(receiver: Receiver, count: int) -> list[Message]:
    """The next ``count`` messages."""
    out: list[Message] = []
    while len(out) < count:
        lease = await patiently(receiver.get())
        assert lease is not None
        got = lease.batch
        out += [tuple(bytes(got.part(i)) for i in parts) for parts in got.messages()]
        lease.release()
    return out


@contextlib.asynccontextmanager
async def sending(send: Callable[[], object]) -> AsyncIterator[asyncio.Task[None]]:
    task: asyncio.Task[None] = asyncio.ensure_future(send())  # type: ignore[arg-type]
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.usefixtures("how")
@either_drain
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("size", "count"), [(0, 500), (13, 20_000), (1_000_000, 60)])
async def test_nothing_is_lost_or_reordered(parts: int, size: int, count: int) -> None:
    # The number of the message in every part; sizes that are no multiple of anything.
    sent = [
        tuple(bytes([p]) + i.to_bytes(4, "big") + b"x" * (size + i % 7) for p in range(parts)) for i in range(count)
    ]

    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:

        async def send() -> None:
            for message in sent:
                await sender.raw(*message)

        async with sending(send):
            assert await received(receiver, count) == sent
        assert receiver.too_large == 0
        assert receiver.bytes_received >= sum(len(part) for message in sent for part in message)


async def test_empty_parts_arrive() -> None:
    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:
        await sender.raw(b"", b"", b"a", b"")
        await sender.raw(b"")
        assert await received(receiver, 2) == [(b"", b"", b"a", b""), (b"",)]


async def test_parts_lie_on_8_byte_boundaries() -> None:
    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:
        await sender.raw(b"abc", b"d", b"", b"efghijklm")
        lease = await patiently(receiver.get())
        assert (lease.batch.offsets % 8 == 0).all()
        assert lease.batch.slab.ctypes.data % 8 == 0
        lease.release()


@pytest.mark.usefixtures("how")
@either_drain
async def test_a_consumer_that_does_not_take_slows_the_sender_down(monkeypatch: pytest.MonkeyPatch) -> None:
    # 100 MB are to come; slabs of 1 MB and short queues hold only a few of them.
    monkeypatch.setattr(common, "FULL_BYTES", 1 << 20)
    monkeypatch.setattr(zmq_receiver, "_HIGH_WATER_MARK", 4)
    count, sent = 1000, 0

    async with PlainSender(sndhwm=4, sndbuf=1 << 16) as sender, Receiver([sender.endpoint]) as receiver:

        async def send_one() -> None:
            nonlocal sent
            await sender.raw(sent.to_bytes(4, "big") * 25_000)
            sent += 1

        async def send_the_rest() -> None:
            while sent < count:
                await send_one()

        await send_one()
        lease = await patiently(receiver.get())  # held: the consumer is busy
        while await sender.socket.poll(300, zmq.POLLOUT):
            await send_one()
            assert sent < count / 4, "the sender never had to wait"
        assert receiver.bytes_received < 10 << 20, "memory is bounded by the slabs"
        got = [tuple(bytes(lease.batch.part(i)) for i in parts) for parts in lease.batch.messages()]
        lease.release()
        async with sending(send_the_rest):
            got += await received(receiver, count - len(got))
    assert [int.from_bytes(message[0][:4], "big") for message in got] == list(range(count))


async def test_other_tasks_get_their_turn_while_the_socket_is_never_empty() -> None:
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.linger = 0
    socket.bind(ANY_PORT)
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    count, wanted = 0, 60_000

    def flood() -> None:
        # From a thread: the loop itself does nothing but receive.
        for _ in range(wanted):
            socket.send(b"x" * 2000)

    gaps = []

    async def metronome() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    try:
        async with Receiver([endpoint]) as receiver:
            flooding = asyncio.create_task(asyncio.to_thread(flood))
            ticking = asyncio.create_task(metronome())
            while count < wanted:
                lease = await patiently(receiver.get())
                count += len(lease.batch.lengths)
                lease.release()
            await patiently(flooding)
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
    finally:
        context.destroy(linger=0)
    assert len(gaps) > wanted / 4096, "at least one turn for each full slab"
    # A busy machine may take the processor away from us once or twice, but not habitually.
    assert sorted(gaps)[-3] < 0.05


async def test_after_a_pause_messages_wake_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing but the descriptor can tell of them.
    monkeypatch.setattr(zmq_receiver, "_SAFETY_NET_S", 3600.0)
    looks = 0

    def counting(*args: object) -> drain.Drained:
        nonlocal looks
        looks += 1
        return drain.drain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(zmq_receiver, "drain", counting)
    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:
        for i in range(20):
            await sender.raw(b"x" * i, b"y")
            assert await received(receiver, 1) == [(b"x" * i, b"y")]
            await asyncio.sleep(0.002 * (i % 10))
        await asyncio.sleep(0.1)
        before = looks
        await asyncio.sleep(0.3)
        assert looks <= before + 1, "while nothing comes, nobody looks"
        await sender.raw(b"z")
        assert await received(receiver, 1) == [(b"z",)]


def test_a_slab_takes_any_number_of_small_messages() -> None:
    slab = Slab()
    room, count = len(slab.last), len(slab.last) // 3 * 2
    starts = np.arange(3 * count, dtype=np.int64) * 5
    bounds = np.stack([starts, starts + starts % 4], axis=1)
    for first in range(0, 3 * count, count):
        slab.add(bounds[first : first + count])
    assert slab.count == 3 * count > room
    np.testing.assert_array_equal(slab.offsets[: slab.count], starts)
    np.testing.assert_array_equal(slab.lengths[: slab.count], starts % 4)
    assert slab.last[: slab.count].all()


async def test_several_sockets_share_one_consumer() -> None:
    async with PlainSender() as one, PlainSender() as other, Receiver([one.endpoint, other.endpoint]) as receiver:
        assert receiver.endpoints == [one.endpoint, other.endpoint]

        async def send() -> None:
            for i in range(200):
                await one.raw(b"one", i.to_bytes(4, "big"))
                await other.raw(b"other", i.to_bytes(4, "big"))

        by_socket: dict[int, list[Message]] = {0: [], 1: []}
        async with sending(send):
            while sum(map(len, by_socket.values())) < 400:
                lease = await patiently(receiver.get())
                got = lease.batch
                by_socket[got.socket_index] += [tuple(bytes(got.part(i)) for i in parts) for parts in got.messages()]
                lease.release()
    for index, name in ((0, b"one"), (1, b"other")):
        assert by_socket[index] == [(name, i.to_bytes(4, "big")) for i in range(200)]


async def test_a_bound_receiver_hears_those_who_connect() -> None:
    context = zmq.asyncio.Context()
    try:
        async with Receiver([ANY_PORT], bind=True) as receiver:
            socket = context.socket(zmq.PUSH)
            socket.connect(receiver.endpoints[0])
            await socket.send_multipart([b"a", b"b"])
            assert await received(receiver, 1) == [(b"a", b"b")]
    finally:
        context.destroy(linger=0)


async def test_a_subscriber_hears_a_publisher() -> None:
    context = zmq.asyncio.Context()
    try:
        publisher = context.socket(zmq.XPUB)  # like PUB, and it tells when somebody has subscribed
        publisher.bind(ANY_PORT)
        async with Receiver([publisher.getsockopt_string(zmq.LAST_ENDPOINT)], pattern="sub") as receiver:
            assert await patiently(publisher.recv()) == b"\x01"
            await publisher.send_multipart([b"topic", b"payload"])
            assert await received(receiver, 1) == [(b"topic", b"payload")]
    finally:
        context.destroy(linger=0)


async def test_a_silence_is_noticed() -> None:
    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:
        assert await patiently(receiver.get(0.01)) is None
        await sender.raw(b"x")
        assert await received(receiver, 1) == [(b"x",)]
        assert await patiently(receiver.get(0.01)) is None


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_batch_is_given_back_when_its_translation_is_cancelled_or_fails(
    ahead: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "FULL_PARTS", 2)
    monkeypatch.setattr(intake, "_FEW_PARTS", 0)
    begun, may_end, calls = threading.Event(), threading.Event(), []

    class Decoder:
        def feed(self, batch: ReceivedBatch) -> list[Undecodable]:
            calls.append(batch)
            if len(calls) == 1 + ahead:
                begun.set()
                assert may_end.wait(PATIENCE_S)
                if fails:
                    raise ValueError("a mistake of the decoder's")
            return [Undecodable("one"), Undecodable("two")]

    protocol = replace(protocol_named("native"), decoder=Decoder)
    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:
        stream = messages(receiver, protocol)
        for _ in range(4):
            await sender.raw(b"x")
        if ahead:
            await patiently(anext(stream))
            await patiently(anext(stream))
        following = asyncio.ensure_future(anext(stream))
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        if fails:
            may_end.set()
            with pytest.raises(ValueError, match="mistake"):
                await patiently(following)
        else:
            following.cancel()
            asyncio.get_running_loop().call_later(0.05, may_end.set)
            await asyncio.gather(following, return_exceptions=True)
        await stream.aclose()
        assert len(receiver._free) + (receiver._channels[0].slab is not None) == 3


async def test_a_socket_with_few_messages_gets_its_turn_beside_a_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "FULL_PARTS", 4)
    async with PlainSender() as busy, PlainSender() as quiet, Receiver([busy.endpoint, quiet.endpoint]) as receiver:

        async def send() -> None:
            while True:
                await busy.raw(b"x")

        async def next_socket() -> int:
            lease = await patiently(receiver.get(full=True))
            assert lease is not None
            lease.release()
            return lease.batch.socket_index

        async with sending(send):
            await quiet.raw(b"y")
            came = receiver._channels[1]
            while came.slab is None or not came.slab.count:
                assert await next_socket() == 0
            assert 1 in [await next_socket() for _ in range(3)]


@pytest.mark.usefixtures("how")
@either_drain
@pytest.mark.parametrize("parts", [[1001], [1, 1001], [1001, 1, 1], [1000] * 5, [900] * 40])
async def test_messages_that_are_too_large_are_counted(monkeypatch: pytest.MonkeyPatch, parts: list[int]) -> None:
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 1000)
    monkeypatch.setattr(common, "FULL_BYTES", 2000)
    small = (b"y" * 1000,)
    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:
        for message in (small, [b"z" * size for size in parts], small, small):
            await sender.raw(*message)
        # Several parts of the allowed size may or may not fit together; what must not be is a torn message.
        got = await received(receiver, 3)
        if receiver.too_large == 0:
            got = [message for message in [*got, *await received(receiver, 1)] if len(message) == 1]
        assert got == [small] * 3
        assert receiver.too_large == (1 if max(parts) > 1000 or sum(parts) > 4000 else 0)


async def test_a_message_that_is_too_large_is_told_to_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 1000)
    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:
        stream = messages(receiver, protocol_named("native"), tick_s=0.05)
        await sender.raw(b"x" * 2000)
        item = await patiently(anext(stream))
        while isinstance(item, Silence):
            item = await patiently(anext(stream))
        assert isinstance(item, Undecodable)
        assert "fewer frames a message" in item.reason
        await stream.aclose()


async def test_messages_that_are_all_too_large_are_told_while_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 1000)
    async with PlainSender() as sender, Receiver([sender.endpoint]) as receiver:

        async def send() -> None:
            while True:
                await sender.raw(b"x" * 2000)
                await asyncio.sleep(0)

        async with sending(send):
            assert await asyncio.wait_for(receiver.get(0.25), 3.0) is None
            assert receiver.too_large > 0


@pytest.mark.parametrize(
    ("address", "bind", "reason"),
    [
        ("nonsense", False, "not an address"),
        ("", False, "not an address"),
        ("tcp://127.0.0.1", False, "not an address"),
        ("tcp://127.0.0.1:notaport", False, "not an address"),
        ("carrier-pigeon://here", False, "unknown transport"),
        ("tcp://203.0.113.7:31000", True, "does not have that network address|no such network interface"),
        ("tcp://no-such-interface-here:31000", True, "no such network interface or host name"),
        ("ipc:///no/such/folder/socket", True, "."),
    ],
)
async def test_an_address_that_cannot_be_used_is_one_sentence(address: str, bind: bool, reason: str) -> None:
    with pytest.raises(ConnectionFailed, match=reason) as caught:
        async with Receiver([address], bind=bind):
            pass
    text = str(caught.value)
    assert repr(address) in text
    assert text.startswith("cannot bind" if bind else "cannot connect to")
    assert "\n" not in text


async def test_a_port_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConnectionFailed):
        async with Receiver(["tcp://127.0.0.1:99999"], bind=True):
            pass


async def test_a_port_in_use_is_one_sentence() -> None:
    async with Receiver([ANY_PORT], bind=True) as receiver:
        with pytest.raises(ConnectionFailed, match="port is in use by another program"):
            async with Receiver(receiver.endpoints, bind=True):
                pass


async def test_an_unknown_pattern_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown socket pattern 'rep'; known are pull, sub"):
        Receiver([ANY_PORT], pattern="rep")


async def test_leaving_while_messages_come_ends_at_once() -> None:
    async with PlainSender() as sender:

        async def send() -> None:
            while True:
                await sender.raw(b"x" * 1000)

        async with sending(send):
            async with Receiver([sender.endpoint]) as receiver:
                await received(receiver, 10)
            began = time.perf_counter()
        assert time.perf_counter() - began < 1


# frames that came before the start of their series


def orphan_blocks(*messages: list[bytes | memoryview]) -> list[FrameBlock]:
    return [m for m in NativeDecoder().feed(batch(*messages)) if isinstance(m, FrameBlock)]  # type: ignore[arg-type]


def test_early_frames_are_kept_until_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_ORPHAN_BYTES", 100_000)
    orphans, encoder = Orphans(), NativeEncoder()
    for first in range(20):
        for block in orphan_blocks(encoder.frames(1, first, [b"x" * 10_000], Encoding.RAW)[0]):
            orphans.keep(block)
    assert orphans.series == 1
    for block in orphan_blocks(encoder.frames(2, 0, [b"y"], Encoding.RAW)[0]):
        orphans.keep(block)
    mine = orphans.claim(SeriesStart(1, (100, 100), DTYPES["uint8"]))
    kept = [int(index) for block in mine for index in block.indices]
    assert kept == list(range(20 - len(kept), 20)), "the newest are kept"
    assert 5 <= len(kept) <= 10
    assert orphans.lost == 20 - len(kept) + 1
    assert orphans.series is None


def test_early_frames_without_content_take_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # A message of 52 bytes may announce 65,536 empty frames, and each of them has a number, a place and a size.
    monkeypatch.setattr(intake, "_ORPHAN_BYTES", 4 << 20)
    orphans, encoder = Orphans(), NativeEncoder()
    message = encoder.frames(1, 0, [b""] * 65_536, Encoding.RAW)[0]
    for _ in range(10):
        for block in orphan_blocks(message):
            orphans.keep(block)
    assert orphans.lost > 0
