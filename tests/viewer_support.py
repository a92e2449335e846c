"""What the viewer's tests share: snapshots to show, a session's two sockets without a session, bounded waits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgpack
import numpy as np
import zmq

from stream.snapshot import Counters, Snapshot

# Before anybody imports Qt: the tests need no screen.
os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")

T = TypeVar("T")


def images(shape: tuple[int, int] = (48, 64), rows: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Every image of a scan of ``shape`` whose first ``rows`` are acquired: float32, NaN below."""
    rng = np.random.default_rng(seed)
    scan = {}
    for name in ("phase", "amplitude", "bright_field", "dark_field", "com_row", "com_column"):
        scan[name] = rng.normal(size=shape).astype(np.float32)
        scan[name][shape[0] if rows is None else rows :] = np.nan
    return scan | {"mean_pattern": rng.random((32, 32), dtype=np.float32) + 0.01}


def snapshot(sequence: int = 1, shape: tuple[int, int] = (48, 64), rows: int = 30, **changes: Any) -> Snapshot:
    """A session in the middle of a scan; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "session": "first",
        "sequence": sequence,
        "time_s": 1.8e9,
        "state": "scanning",
        "link": "receiving",
        "scan_row": rows - 1,
        "rows_acquired": rows,
        "scan_shape": shape,
        "scan_step_angstrom": (0.2, 0.2),
        "detector_shape": (32, 32),
        "detector_pixel_mrad": (2.0, 2.0),
        "bf_centre_px": (15.5, 16.5),
        "bf_radius_px": 10.0,
        "energy_kev": 200.0,
        "semiangle_mrad": 20.0,
        "rotation_deg": 5.0,
        "transpose": False,
        "aberrations": {"C10": -100.0, "C30": 1e5},
        "counters": Counters(received=1000),
        "frames_per_s": 7500.0,
        "megabytes_per_s": 276.5,
        "latency_ms": 12.0,
        "images": images(shape, rows, sequence),
    }
    return Snapshot(**(fields | changes))


def wait_for(attempt: Callable[[], T | None], what: str, timeout_s: float = 5.0) -> T:
    """The first result of ``attempt`` that is not None, [] or False; fails after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while time.monotonic() < deadline:
        if result := attempt():
            return result
        pause.wait(0.005)
    raise AssertionError(f"{what}: not within {timeout_s} s")


@contextmanager
def publisher(address: str = "tcp://127.0.0.1:*") -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A bound PUB socket and its address, as a session has it."""
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.CONFLATE, 1)
        bind_again(socket, address)
        yield socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def bind_again(socket: zmq.Socket[Any], address: str) -> None:
    """Bind, waiting for a predecessor to let go of the port."""

    def attempt() -> bool:
        try:
            socket.bind(address)
        except zmq.ZMQError:
            return False
        return True

    wait_for(attempt, f"bind {address}")


class Responder:
    """A session's control socket: answers every request with ``reply`` and remembers it."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
        self.requests: list[dict[str, Any]] = []
        self.reply: dict[str, Any] = {"ok": True}

    def serve(self) -> bool:
        """Answer one waiting request; whether there was one."""
        if not self._socket.poll(0):
            return False
        self.requests.append(msgpack.unpackb(self._socket.recv()))
        self._socket.send(msgpack.packb(self.reply))
        return True


@contextmanager
def responder() -> Iterator[Responder]:
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind("tcp://127.0.0.1:*")
        yield Responder(socket)
