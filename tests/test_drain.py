"""Emptying a socket into a slab: compiled and plain, the same tests for both."""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import zmq

from stream.receiving import common
from stream.receiving import drain as module
from stream.receiving.common import Slab
from stream.receiving.drain import Drained, drain_compiled, drain_plain

Drain = Callable[[zmq.Socket, Slab, int, int], Drained]
Message = tuple[bytes, ...]

#: No limit.
ANY = 1 << 60


@pytest.fixture(params=["compiled", "plain"])
def drain(request: pytest.FixtureRequest) -> Drain:
    if request.param == "plain":
        return drain_plain
    if not module.COMPILED:
        pytest.skip("libzmq's functions cannot be reached in this build of pyzmq")
    return drain_compiled


@pytest.fixture
def sockets() -> Iterator[tuple[zmq.Socket, zmq.Socket]]:
    """A PUSH and a PULL socket in one process: what was sent is there at once."""
    context = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    push.sndhwm = pull.rcvhwm = 0
    pull.bind("inproc://here")
    push.connect("inproc://here")
    yield push, pull
    context.destroy(linger=0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 1000)
    monkeypatch.setattr(common, "MAX_MESSAGE_PARTS", 10)
    monkeypatch.setattr(common, "FULL_BYTES", 2000)
    monkeypatch.setattr(common, "FULL_PARTS", 30)


def send(push: zmq.Socket, messages: Sequence[Message]) -> None:
    for message in messages:
        push.send_multipart(message)


def held(slab: Slab) -> list[Message]:
    """The messages in a slab."""
    out: list[Message] = []
    parts: list[bytes] = []
    for offset, length, last in zip(slab.offsets, slab.lengths, slab.last[: slab.count], strict=False):
        assert offset % 8 == 0
        assert offset + length <= slab.end
        parts.append(slab.memory[offset : offset + length].tobytes())
        if last:
            out.append(tuple(parts))
            parts = []
    assert not parts, "a message is whole"
    return out


def test_messages_arrive_part_by_part(drain: Drain, sockets: tuple[zmq.Socket, zmq.Socket]) -> None:
    push, pull = sockets
    first: list[Message] = [(b"a",), (b"", b"", b"bc", b""), (b"",), (b"x" * 9, b"y" * 100_000), (b"z" * 8,)]
    second: list[Message] = [(b"d", b"e")]
    slab = Slab()
    assert drain(pull, slab, ANY, ANY) == Drained(0, 0, True)
    send(push, first)
    assert drain(pull, slab, ANY, ANY) == Drained(9, 0, True)
    assert held(slab) == first
    send(push, second)  # goes behind what is there
    assert drain(pull, slab, ANY, ANY) == Drained(2, 0, True)
    assert held(slab) == first + second
    slab.clear()
    assert held(slab) == []
    send(push, second)
    drain(pull, slab, ANY, ANY)
    assert held(slab) == second


def test_a_limit_of_parts_or_bytes_never_cuts_a_message(drain: Drain, sockets: tuple[zmq.Socket, zmq.Socket]) -> None:
    push, pull = sockets
    message = (b"x" * 16, b"y" * 16)
    send(push, [message] * 9)
    slab = Slab()
    assert drain(pull, slab, 3, ANY) == Drained(4, 0, False)
    assert drain(pull, slab, ANY, 33) == Drained(4, 0, False)
    assert drain(pull, slab, ANY, 32) == Drained(2, 0, False)
    assert held(slab) == [message] * 5
    assert drain(pull, slab, ANY, ANY) == Drained(8, 0, True)
    assert held(slab) == [message] * 9


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("message", "fit"), [((b"x" * 600,), 4), ((b"", b"a", b"b", b""), 8)])
def test_a_full_slab_leaves_the_rest_in_the_socket(
    drain: Drain, sockets: tuple[zmq.Socket, zmq.Socket], message: Message, fit: int
) -> None:
    push, pull = sockets
    send(push, [message] * (fit + 2))
    slab, other = Slab(), Slab()
    assert drain(pull, slab, ANY, ANY) == Drained(fit * len(message), 0, False)
    assert slab.full
    assert drain(pull, slab, ANY, ANY) == Drained(0, 0, False)
    assert held(slab) == [message] * fit
    assert drain(pull, other, ANY, ANY) == Drained(2 * len(message), 0, True)
    assert held(other) == [message] * 2


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "large",
    [
        (b"x" * 1001,),
        (b"x" * 1001, b"a", b""),
        (b"a", b"x" * 1001, b"b"),
        (b"a", b"b", b"x" * 1001),
        (b"x" * 900,) * 5,  # beyond all the memory that a slab has
        (b"",) * 11,
    ],
)
def test_a_message_that_is_too_large_is_counted_and_skipped_whole(
    drain: Drain, sockets: tuple[zmq.Socket, zmq.Socket], large: Message
) -> None:
    push, pull = sockets
    before: list[Message] = [(b"1", b"2")]
    after: list[Message] = [(b"y" * 1000,), (b"",) * 10]  # just not too large
    slab = Slab()
    send(push, [*before, large, large, *after])
    assert drain(pull, slab, ANY, ANY) == Drained(2 + 2 * len(large) + 11, 2, True)
    assert held(slab) == before + after


def test_a_part_of_the_largest_size(drain: Drain, sockets: tuple[zmq.Socket, zmq.Socket]) -> None:
    push, pull = sockets
    slab = Slab()
    huge = bytes(common.MAX_MESSAGE_BYTES + 1)
    for size in (len(huge), len(huge) - 1):
        push.send(b"before")
        push.send(memoryview(huge)[:size], copy=False)
        push.send(b"behind")
    assert drain(pull, slab, ANY, ANY) == Drained(5, 1, False), "full with the largest that fits"
    assert slab.lengths[: slab.count].tolist() == [6, 6, 6, len(huge) - 1]
    assert not slab.memory[slab.offsets[3] : slab.end].any()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_sent_arrives_in_order(
    drain: Drain, sockets: tuple[zmq.Socket, zmq.Socket], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "MAX_MESSAGE_BYTES", 300_000)
    monkeypatch.setattr(common, "FULL_BYTES", 500_000)
    push, pull = sockets
    random_number = random.Random(seed)

    def some_part() -> bytes:
        size = random_number.choice([0, 1, 8, 2000, 2000, 2000, 37_000, 300_000, 300_001])
        return random_number.randbytes(min(size, 9)) + bytes(max(0, size - 9))

    sent = [tuple(some_part() for _ in range(random_number.choice([1, 2, 2, 3, 7]))) for _ in range(400)]
    # Sums that do not fit are for another test.
    sent = [message for message in sent if sum(map(len, message)) <= 600_000]
    send(push, sent)
    got: list[Message] = []
    lost, empty, slab = 0, False, Slab()
    while not empty:
        _, too_large, empty = drain(pull, slab, 50, 1 << 20)
        lost += too_large
        if slab.full or empty:
            got += held(slab)
            slab.clear()
    fine = [message for message in sent if max(map(len, message)) <= 300_000]
    assert got == fine
    assert lost == len(sent) - len(fine) > 0


def test_a_socket_that_was_closed_is_an_error(drain: Drain, sockets: tuple[zmq.Socket, zmq.Socket]) -> None:
    push, pull = sockets
    slab = Slab()
    send(push, [(b"a",)])
    drain(pull, slab, ANY, ANY)
    pull.close()
    with pytest.raises(zmq.ZMQError) as caught:
        drain(pull, slab, ANY, ANY)
    assert caught.value.errno == zmq.ENOTSOCK
    assert held(slab) == [(b"a",)]


def test_a_context_that_was_terminated_is_an_error(drain: Drain) -> None:
    context = zmq.Context()
    pull = context.socket(zmq.PULL)
    pull.bind("inproc://here")
    slab = Slab()
    assert drain(pull, slab, ANY, ANY) == Drained(0, 0, True)
    terminating = threading.Thread(target=context.term)  # waits for the socket
    terminating.start()
    try:
        with pytest.raises(zmq.ContextTerminated):
            while True:
                drain(pull, slab, ANY, ANY)
    finally:
        pull.close()
        terminating.join()


def test_a_build_that_hides_libzmq_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not module._add_symbols()
