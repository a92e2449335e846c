"""A detector in a process of its own: a PUSH socket, at full speed or at a set rate with a bounded buffer.

It must not take the cores from what is measured: the messages are ready, only the frames' numbers are written into
them, and libzmq is called from a compiled loop (about 0.3 µs a message, and about as much in its own thread).
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import NamedTuple

import numpy as np
import zmq

from benchmarks import libzmq
from benchmarks.data import DETECTOR_SHAPE, frames, start
from detectors import codec
from detectors.messages import Encoding
from detectors.protocols.registry import protocol_named

#: A paced sender looks at the clock once in so many seconds.
_BURST_S = 1e-3
#: Messages that differ from each other (and frames, where a message holds one).
_TEMPLATES = 1024
#: Messages that ZeroMQ may hold: fewer than there are templates, whose numbers change while they wait their turn.
_HIGH_WATER_MARK = 500
#: A receiver that takes nothing for so long is gone [s].
_PATIENCE_S = 20
#: Stands for a frame's number while a template is made; in four bytes, as is any number beyond 65,535.
_MARK = 0x7E57F00D


@dataclass(frozen=True)
class Stream:
    """What is sent: frames of ``dtype`` and ``shape``, ``per_message`` in each message of ``protocol``."""

    scan_shape: tuple[int, int]
    dtype: str = "u1"
    encoding: Encoding = Encoding.BSLZ4
    per_message: int = 1
    protocol: str = "native"
    shape: tuple[int, int] = DETECTOR_SHAPE

    @property
    def name(self) -> str:
        bits = 8 * np.dtype(self.dtype).itemsize
        shape = f"{self.shape[0]}x{self.shape[1]}"
        return f"{shape} u{bits} {self.encoding.name.lower()}, {self.protocol} x{self.per_message}"

    @property
    def frames(self) -> int:
        """Frames of a pass."""
        return self.scan_shape[0] * self.scan_shape[1]

    @property
    def messages(self) -> int:
        """Messages of a pass."""
        return self.frames // self.per_message


class Sent(NamedTuple):
    """How a series went: when its first and last frame left, and each row's last one [s since the epoch]; CPU time of
    the sender [s]; frames that were sent, and that were dropped because the buffer was full."""

    began: float
    ended: float
    row_ends: list[float]
    cpu_s: float
    frames: int
    dropped: int


class Sender:
    """Use as a context manager. ``begin`` sends the start message, ``go`` the frames; ``done`` tells how they left."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)

    def __enter__(self) -> Sender:
        self._process.start()
        self.load(self.stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._pipe.send(None)
            self._process.join(5)
        self._process.kill()  # when it still waits for a receiver that has failed
        self._process.join()

    def load(self, stream: Stream) -> None:
        """Make another stream ready."""
        if stream.frames % stream.per_message:
            raise ValueError(f"{stream.frames} frames do not fill messages of {stream.per_message}")
        self.stream = stream
        self._pipe.send(("load", astuple(stream)))
        self.parts = self._pipe.recv()
        """parts of a message"""

    def begin(self, passes: int | None = 1) -> str:
        """Bind a new socket and send the start message on it; returns its address."""
        self._pipe.send(("begin", passes))
        return self._pipe.recv()

    def go(self, passes: int | None = 1, rate: float | None = None, row: int = 0, buffer: int | None = None) -> None:
        """Send ``passes`` passes (None: until ``stop``) and the end message, in the background.

        ``rate`` in frames/s. Like a detector's, frames wait in a buffer of ``buffer`` frames while the receiver is
        behind, and what does not fit is dropped, and counted; None: nothing is dropped, the sender is slowed down.
        With ``row``, the time of every frame that ends a row of so many is noted.
        """
        self._pipe.send(("go", passes, rate, row, buffer))

    @property
    def running(self) -> bool:
        """False when it has failed."""
        return self._process.is_alive()

    def stop(self) -> None:
        """End an endless series with its present pass."""
        self._pipe.send("stop")

    def done(self) -> Sent:
        """How the series went. Blocks until the end message is sent; to be called when everything has come."""
        # Only now: at the end message, ZeroMQ's own thread still has hundreds of messages to send.
        self._pipe.send(("done",))
        return Sent(*self._pipe.recv())


class _Outlet:
    """A stream's templates, and the socket that they go to."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        each = stream.per_message
        pool = [codec.encode(f, stream.encoding) for f in frames(_TEMPLATES, stream.dtype, shape=stream.shape)]
        encoder = protocol_named(stream.protocol).encoder()
        encoder.start(start(stream.scan_shape, stream.dtype, shape=stream.shape))
        mark = _MARK.to_bytes(4, "big")
        parts: list[bytes] = []
        made: dict[int, tuple[bytes, list[tuple[int, int]]]] = {}
        at, numbers, offsets, lengths = 0, [], [], []

        def keep(part: bytes) -> int:
            nonlocal at
            parts.append(part)
            at += len(part)
            return at - len(part)

        for template in range(_TEMPLATES):
            # Only heads differ where the payload is a part of its own; it is kept once.
            first = template * each % _TEMPLATES
            if first not in made:
                (message,) = encoder.frames(1, _MARK, pool[first : first + each], stream.encoding)
                head, *rest = map(bytes, message)
                if head.count(mark) != 1:
                    raise ValueError(f"{stream.protocol} does not write the number of a frame as four bytes")
                made[first] = head, [(keep(part), len(part)) for part in rest]
            head, kept = made[first]
            where = [(keep(head), len(head)), *kept]
            numbers.append(where[0][0] + head.index(mark))
            offsets.append([offset for offset, _ in where])
            lengths.append([length for _, length in where])
        self.slab = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
        self.offsets, self.lengths = np.array(offsets, np.int64), np.array(lengths, np.int64)
        self.numbers = np.array(numbers, np.int64)
        self._message = libzmq.message_buffer()
        self._turn = 0

    def send(self, socket: zmq.Socket, first: int, count: int) -> None:
        """Messages ``first`` ... ``first + count - 1`` of the series; waits for the receiver."""
        # Templates in turn, whatever the numbers: a number that is skipped must not bring back one that still waits.
        each, turn = self.stream.per_message, self._turn
        self._turn += count
        if libzmq.AVAILABLE:
            where = socket.underlying, self._message, self.slab, self.offsets, self.lengths, self.numbers
            went = libzmq.send_messages(*where, turn, first, count, each)
            if went < count:
                raise RuntimeError(f"nobody took message {first + went} within {_PATIENCE_S} s")
            return
        view = self.slab.data
        for i in range(count):
            template = (turn + i) % _TEMPLATES
            at = self.numbers[template]
            view[at : at + 4] = ((first + i) * each).to_bytes(4, "big")
            bounds = zip(self.offsets[template].tolist(), self.lengths[template].tolist(), strict=True)
            socket.send_multipart([view[offset : offset + length] for offset, length in bounds])


def _serve(pipe: Connection) -> None:
    context = zmq.Context()
    socket = outlet = None
    began = ended = cpu = 0.0
    outcome: tuple[list[float], int, int] = ([], 0, 0)
    while (request := pipe.recv()) is not None:
        if request == "stop":
            continue  # it came when the series was over already
        if request[0] == "load":
            outlet = _Outlet(Stream(*request[1]))
            pipe.send(outlet.offsets.shape[1])
            continue
        if request[0] == "done":
            row_ends, sent, dropped = outcome
            pipe.send((began, ended, row_ends, time.process_time() - cpu, sent, dropped))
            continue
        assert outlet is not None
        stream = outlet.stream
        encoder = protocol_named(stream.protocol).encoder()
        if request[0] == "begin":
            if socket is not None:
                socket.close(linger=0)
            socket = context.socket(zmq.PUSH)
            socket.set(zmq.IMMEDIATE, 1)
            socket.set(zmq.SNDHWM, _HIGH_WATER_MARK)
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            pipe.send(f"tcp://127.0.0.1:{port}")
            socket.send_multipart(encoder.start(start(stream.scan_shape, stream.dtype, request[1], stream.shape))[0])
            # Only from now on: a session that is started for the first time compiles for half a minute.
            socket.set(zmq.SNDTIMEO, 1000 * _PATIENCE_S)
            continue
        assert socket is not None
        began, cpu = time.time(), time.process_time()
        outcome = _run(pipe, socket, outlet, *request[1:])
        ended = time.time()
        encoder.start(start(stream.scan_shape, stream.dtype, shape=stream.shape))
        socket.send_multipart(encoder.end(1)[0])
    if socket is not None:
        socket.close(linger=0)
    context.term()


def _run(
    pipe: Connection,
    socket: zmq.Socket,
    outlet: _Outlet,
    passes: int | None,
    rate: float | None,
    row: int,
    buffer: int | None,
) -> tuple[list[float], int, int]:
    """Returns (times of the rows' ends, frames sent, frames dropped)."""
    stream = outlet.stream
    per_pass, each = stream.messages, stream.per_message
    row_ends: list[float] = []
    at = done = dropped = 0
    began = time.perf_counter()
    # Bounded, so that a full buffer and the clock are looked at in time.
    most = per_pass if rate is None else max(1, int(rate * _BURST_S / each))
    while passes is None or at < passes * per_pass:
        if at % per_pass == 0 and passes is None and pipe.poll():
            pipe.recv()
            break
        stop = per_pass * (at // per_pass + 1)
        if row:
            stop = min(stop, (at * each // row + 1) * row // each)
        if rate is not None:
            due = int((time.perf_counter() - began) * rate / each)
            if buffer is not None and (excess := due - at - max(1, buffer // each)) > 0:
                excess = min(excess, stop - at)
                at, dropped = at + excess, dropped + excess
                continue
            stop = min(stop, due)
        if stop <= at:
            time.sleep(_BURST_S)
            continue
        stop = min(stop, at + most)
        outlet.send(socket, at, stop - at)
        done += stop - at
        at = stop
        if row and at * each % row == 0:
            row_ends.append(time.time())
    return row_ends, done * each, dropped * each
