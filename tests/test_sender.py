"""The sender, heard by plain ZeroMQ sockets: everything arrives in order, at the set rate; errors are sentences."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from detectors.errors import ConfigurationError, ConnectionFailed
from detectors.messages import (
    Encoding,
    FrameBlock,
    Message,
    ReceivedBatch,
    SeriesEnd,
    SeriesId,
    SeriesStart,
)
from detectors.protocols.native import Decoder as NativeDecoder
from detectors.simulator.misbehaviour import Misbehaviour
from detectors.simulator.sender import SendReport, serve

ADDRESS = "tcp://127.0.0.1:*"
PATIENCE_S = 30.0


class NumberedFrames:
    """A source whose payloads say which frame they are."""

    def __init__(self, blocks: int = 10, frames_per_block: int = 10, payload_bytes: int = 64) -> None:
        self.encoding = Encoding.RAW
        self.shape = (blocks, frames_per_block)
        self.payload_bytes = payload_bytes
        self.closed = False

    @property
    def frames_per_pass(self) -> int:
        return self.shape[0] * self.shape[1]

    def start(self, series: SeriesId) -> SeriesStart:
        return SeriesStart(series, (1, self.payload_bytes), np.dtype("u1"), self.shape, self.frames_per_pass)

    def blocks(self) -> Iterator[tuple[int, Sequence[bytes]]]:
        try:
            for block in range(self.shape[0]):
                first = block * self.shape[1]
                yield first, [(first + i).to_bytes(self.payload_bytes, "little") for i in range(self.shape[1])]
        finally:
            self.closed = True


class Receiver:
    """A bare socket that collects messages until the end of the series."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self.socket = socket
        self.messages: list[list[bytes]] = []

    async def until_end(self) -> list[Message]:
        while not (self.messages and b"\xa3end" in self.messages[-1][0]):
            self.messages.append(await asyncio.wait_for(self.socket.recv_multipart(), PATIENCE_S))
        return self.decoded()

    async def frames(self, count: int) -> None:
        while sum(len(message) == 2 for message in self.messages) < count:
            self.messages.append(await asyncio.wait_for(self.socket.recv_multipart(), PATIENCE_S))

    def decoded(self) -> list[Message]:
        return NativeDecoder().feed(ReceivedBatch.from_messages(self.messages))


Connect = Callable[[str], Receiver]


@pytest.fixture
async def pull() -> AsyncIterator[Connect]:
    """Connect a receiver to an endpoint."""
    with sockets(zmq.PULL) as connect:
        yield connect


@contextlib.contextmanager
def sockets(kind: int, **options: int) -> Iterator[Connect]:
    context = zmq.asyncio.Context()
    receivers: list[Receiver] = []

    def connect(endpoint: str) -> Receiver:
        socket = context.socket(kind)
        for name, value in options.items():
            socket.setsockopt(getattr(zmq, name), value)
        if kind == zmq.SUB:
            socket.subscribe(b"")
        socket.connect(endpoint)
        receivers.append(Receiver(socket))
        return receivers[-1]

    yield connect
    context.destroy(linger=0)


async def started(source: Any, **options: Any) -> tuple[asyncio.Task[SendReport], str]:
    """A sender under way, and its endpoint."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    sending = asyncio.create_task(serve(source, ADDRESS, ready=ready.set_result, **options))
    return sending, await asyncio.wait_for(ready, PATIENCE_S)


async def finished(sending: Awaitable[SendReport]) -> SendReport:
    return await asyncio.wait_for(sending, PATIENCE_S)


def received_frames(messages: list[Message]) -> tuple[list[int], list[int]]:
    """The announced index of each frame, and the number that its payload says."""
    blocks = [message for message in messages if isinstance(message, FrameBlock)]
    indices = [int(index) for block in blocks for index in block.indices]
    numbers = [
        int.from_bytes(block.slab[o : o + n].tobytes(), "little")
        for block in blocks
        for o, n in zip(block.offsets, block.sizes, strict=True)
    ]
    return indices, numbers


@pytest.mark.parametrize("frames_per_message", [1, 7, 10, 64, 1000])
async def test_every_frame_arrives_once_and_in_order(pull: Connect, frames_per_message: int) -> None:
    sending, endpoint = await started(NumberedFrames(), passes=2, frames_per_message=frames_per_message, series="s")
    receiver = pull(endpoint)
    messages = await receiver.until_end()
    report = await finished(sending)
    assert isinstance(messages[0], SeriesStart)
    assert messages[0].frames == 200
    assert messages[0].scan_shape == (10, 10)
    assert isinstance(messages[-1], SeriesEnd)
    indices, numbers = received_frames(messages)
    assert indices == list(range(200))
    assert numbers == [*range(100), *range(100)]
    assert report.frames == 200
    assert report.messages == -(-200 // frames_per_message) == len(receiver.messages) - 2
    assert report.payload_bytes == 200 * 64


async def test_it_waits_for_a_slow_receiver_and_loses_nothing() -> None:
    with sockets(zmq.PULL, RCVHWM=1, RCVBUF=4096) as connect:
        told: list[SendReport] = []
        heard = asyncio.Event()

        def tell(report: SendReport) -> None:
            told.append(report)
            heard.set()

        sending, endpoint = await started(NumberedFrames(20, 100, payload_bytes=70_000), progress=tell)
        receiver = connect(endpoint)
        await receiver.frames(1)
        await asyncio.wait_for(heard.wait(), 20)
        for _ in range(200):  # the sender has the loop to itself and fills whatever buffers there are
            await asyncio.sleep(0)
        assert not sending.done()
        assert told[-1].frames < 2000
        indices, numbers = received_frames(await receiver.until_end())
        await finished(sending)
    assert indices == numbers == list(range(2000))


async def test_it_connects_to_a_receiver_that_is_bound() -> None:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PULL)
    socket.bind(ADDRESS)
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    sending = asyncio.create_task(serve(NumberedFrames(), endpoint, bind=False))
    indices, _ = received_frames(await Receiver(socket).until_end())
    assert indices == list(range(100))
    await finished(sending)
    context.destroy(linger=0)


@pytest.mark.parametrize(("rate", "frames_per_message"), [(2000.0, 1), (2000.0, 10), (20000.0, 1)])
async def test_the_rate_is_kept(pull: Connect, rate: float, frames_per_message: int) -> None:
    frames = int(rate * 0.4)
    source = NumberedFrames(frames // 100, 100)
    sending, endpoint = await started(source, rate=rate, frames_per_message=frames_per_message)
    receiver = pull(endpoint)
    await receiver.until_end()
    report = await finished(sending)
    assert report.frames == frames
    assert report.seconds > 0.95 * (frames - 1) / rate
    assert report.seconds < 0.4 + 2.0  # generous: the machine may be busy


async def test_progress_is_told_while_sending_and_at_the_end(pull: Connect) -> None:
    told: list[SendReport] = []
    sending, endpoint = await started(NumberedFrames(4, 100), rate=1000.0, progress=told.append)
    await pull(endpoint).until_end()
    report = await finished(sending)
    assert len(told) >= 2
    assert told[-1] == report
    assert [r.frames for r in told] == sorted(r.frames for r in told)


async def test_misbehaviour_reaches_the_wire(pull: Connect) -> None:
    wrong = Misbehaviour(drop=0.1, duplicate=0.1, reorder=0.1, corrupt=0.1, seed=3)
    sending, endpoint = await started(NumberedFrames(20, 50), misbehaviour=wrong, frames_per_message=5)
    messages = await pull(endpoint).until_end()
    report = await finished(sending)
    indices, _ = received_frames(messages)
    counts = report.misbehaviour
    assert len(indices) == counts.sent == report.frames == 1000 - counts.dropped + counts.duplicated
    assert len(set(indices)) == 1000 - counts.dropped
    sizes = np.concatenate([message.sizes for message in messages if isinstance(message, FrameBlock)])
    assert np.count_nonzero(sizes < 64) == counts.corrupted


@pytest.mark.parametrize("ends", [False, True])
async def test_a_detector_that_dies_sends_no_end(pull: Connect, ends: bool) -> None:
    wrong = Misbehaviour(stop_after=42, end_when_stopped=ends)
    sending, endpoint = await started(NumberedFrames(), misbehaviour=wrong)
    receiver = pull(endpoint)
    await receiver.frames(42)
    if ends:
        await receiver.until_end()
    report = await finished(sending)
    assert report.frames == 42
    indices, _ = received_frames(receiver.decoded())
    assert indices == list(range(42))
    assert await receiver.socket.poll(0) == 0


async def test_publishing_repeats_the_start_and_loses_nothing() -> None:
    with sockets(zmq.SUB) as connect:
        sending, endpoint = await started(NumberedFrames(13, 100), pattern="pub", rate=1000.0)
        messages = await connect(endpoint).until_end()
        report = await finished(sending)
    assert sum(isinstance(message, SeriesStart) for message in messages) == 2
    indices, _ = received_frames(messages)
    assert indices == list(range(1300))
    assert report.frames == 1300


async def test_publishing_goes_on_without_a_subscriber() -> None:
    report = await finished(serve(NumberedFrames(), ADDRESS, pattern="pub", subscriber_wait_s=0.01))
    assert report.frames == 100


@pytest.mark.parametrize("listening", [False, True])
async def test_cancelling_ends_it_at_once(pull: Connect, listening: bool) -> None:
    source = NumberedFrames(10, 1000)
    sending, endpoint = await started(source, passes=None)
    if listening:
        await pull(endpoint).frames(5)
    began = time.perf_counter()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert time.perf_counter() - began < 5


async def test_a_receiver_that_hangs_holds_it_no_longer_than_agreed() -> None:
    with sockets(zmq.PULL, RCVHWM=1, RCVBUF=4096) as connect:
        source = NumberedFrames(10, 10, payload_bytes=1_000_000)
        sending, endpoint = await started(source, linger_s=0.2)
        connect(endpoint)  # and never reads: the sender's own queue takes everything, the wire does not
        report = await finished(sending)
    assert report.frames == 100


async def test_cancelling_ends_the_wait_for_delivery() -> None:
    with sockets(zmq.PULL, RCVHWM=1, RCVBUF=4096) as connect:
        told: asyncio.Queue[SendReport] = asyncio.Queue()
        source = NumberedFrames(10, 10, payload_bytes=1_000_000)
        sending, endpoint = await started(source, linger_s=60.0, progress=told.put_nowait)
        connect(endpoint)
        while (await asyncio.wait_for(told.get(), PATIENCE_S)).frames < 100:
            pass
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finished(sending)


async def test_a_port_in_use_is_one_clear_sentence() -> None:
    sending, endpoint = await started(NumberedFrames())
    with pytest.raises(ConnectionFailed, match="port is in use by another program"):
        await serve(NumberedFrames(), endpoint)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1", "tcp://127.0.0.1:notaport"])
async def test_an_address_that_is_none_is_one_clear_sentence(address: str) -> None:
    with pytest.raises(ConnectionFailed, match=address):
        await serve(NumberedFrames(), address)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"passes": 0}, {"frames_per_message": 0}, {"pattern": "rep"}])
async def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        await serve(NumberedFrames(), ADDRESS, **wrong)


async def test_a_source_that_fails_is_heard() -> None:
    class Broken(NumberedFrames):
        def blocks(self) -> Iterator[tuple[int, Sequence[bytes]]]:
            yield 0, [b"x" * 64]
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        await serve(Broken(), ADDRESS, pattern="pub", subscriber_wait_s=0.0)
