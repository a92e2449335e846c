"""A sender in a process of its own: packed messages through a PUSH socket, at full speed or at a set rate."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import msgpack
import zmq

from benchmarks.data import start, stream_messages
from detectors.messages import Encoding
from detectors.protocols.registry import protocol_named

#: A paced sender looks at the clock once in so many seconds.
_BURST_S = 1e-3

_Messages = list[list[Any]]


class Sender:
    """Use as a context manager. ``begin`` sends the start message, ``go`` the frames; ``done`` tells when they left."""

    def __init__(
        self,
        scan_shape: tuple[int, int],
        dtype: str,
        encoding: Encoding,
        per_message: int = 1,
        protocol: str = "native",
    ) -> None:
        self.rows, self.columns = scan_shape
        self.frames = scan_shape[0] * scan_shape[1]
        self.messages = -(-self.frames // per_message)
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        args = (other, scan_shape, dtype, encoding, per_message, protocol)
        self._process = context.Process(target=_serve, args=args, daemon=True)

    def __enter__(self) -> Sender:
        self._process.start()
        self._pipe.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.send(None)
        self._process.join(5)
        self._process.kill()  # when it still waits for a receiver that has failed

    def begin(self, passes: int | None = 1) -> str:
        """Bind a new socket and send the start message on it; returns its address."""
        self._pipe.send(("begin", passes))
        return self._pipe.recv()

    def go(self, passes: int = 1, rate: float | None = None, row: int = 0, limit: int | None = None) -> None:
        """Send ``passes`` passes (or only the first ``limit`` messages) and the end message, in the background.

        ``rate`` in frames/s; with ``row``, note the time of every frame that ends a row of so many.
        """
        self._pipe.send(("go", passes, rate, row, limit))

    def done(self) -> tuple[float, float, list[float]]:
        """(time of the first frame, of the last one, of each row's last one), seconds since the epoch. Blocks."""
        return self._pipe.recv()


def _serve(
    pipe: Connection, scan_shape: tuple[int, int], dtype: str, encoding: Encoding, per_message: int, protocol: str
) -> None:
    frame_count = scan_shape[0] * scan_shape[1]
    messages = stream_messages(frame_count, dtype, encoding, per_message, protocol)
    encoder = protocol_named(protocol).encoder()
    context = zmq.Context()
    socket = None
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        if request[0] == "begin":
            if socket is not None:
                socket.close(linger=0)
            socket = context.socket(zmq.PUSH)
            socket.set(zmq.IMMEDIATE, 1)
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            pipe.send(f"tcp://127.0.0.1:{port}")
            socket.send_multipart(encoder.start(start(scan_shape, dtype, request[1]))[0])
            continue
        _, passes, rate, row, limit = request
        assert socket is not None
        began = time.time()
        ends: list[float] = []
        for number in range(passes):
            chosen = messages if number == 0 else _renumbered(messages, number * frame_count)
            chosen = chosen[:limit]
            ends += _send(socket, chosen, per_message, rate, row)
        ended = time.time()
        socket.send_multipart(encoder.end(1)[0])
        pipe.send((began, ended, ends))
    if socket is not None:
        socket.close(linger=0)
    context.term()


def _send(socket: zmq.Socket, messages: _Messages, per_message: int, rate: float | None, row: int) -> list[float]:
    send = socket.send
    ends = []
    began, burst = time.perf_counter(), 0
    for number, parts in enumerate(messages):
        if rate is not None and number >= burst:
            while (burst := int((time.perf_counter() - began) * rate / per_message) + 1) <= number:
                time.sleep(_BURST_S)
        for part in parts[:-1]:
            send(part, zmq.SNDMORE)
        send(parts[-1], copy=len(parts[-1]) < 1 << 16)
        if row and (number + 1) * per_message % row < per_message:
            ends.append(time.time())
    return ends


def _renumbered(messages: _Messages, first: int) -> _Messages:
    """The same messages of the native protocol, for a later pass."""
    out = []
    for header, payload in messages:
        values = msgpack.unpackb(header)
        values["first"] += first
        out.append([msgpack.packb(values), payload])
    return out
