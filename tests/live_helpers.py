"""What the tests of the live path share: small simulated scans, a sender under way, and a hostile sender of our own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import zmq
import zmq.asyncio

from detectors.codec import encode
from detectors.messages import Encoding, FrameBlock, Message, ReceivedBatch
from detectors.simulator.sender import SendReport, serve
from detectors.simulator.simulation import SimulatedScan
from detectors.simulator.source import EncodedSource
from stream.api import Result, Session, SessionOptions, Snapshot
from stream.offline import reconstruct_file

ANY_PORT = "tcp://127.0.0.1:*"
PATIENCE_S = 30.0
ROWS = COLUMNS = 16
DETECTOR = (32, 32)
FRAMES = ROWS * COLUMNS

#: Small, noisy, rotated and defocused: nothing in it is accidentally symmetric.
SCAN = SimulatedScan(
    scan_shape=(ROWS, COLUMNS),
    scan_step_angstrom=(0.4, 0.4),
    detector_shape=DETECTOR,
    detector_pixel_mrad=(2.0, 2.0),
    bf_centre_px=(15.3, 16.2),
    rotation_deg=20.0,
    aberrations={"C10": -40.0},
    electrons_per_frame=2000.0,
    specimen="particle",
    seed=5,
)

#: What a plain sender says of ``SCAN``: everything but the disk, which is found in the first frames.
OPTICS: dict[str, Any] = dict(SCAN.start(1).settings)
#: ... and with the disk, so that nothing depends on which frames come first.
OPTICS_AND_DISK: dict[str, Any] = {**OPTICS, "bf_centre_px": list(SCAN.centre_px), "bf_radius_px": 10.0}


def all_frames(scan: SimulatedScan = SCAN) -> np.ndarray:
    """Every pattern of a scan: (frames, detector rows, detector columns)."""
    return np.concatenate([block for _, block in scan.frames()])


def scan_file(path: Path, scan: SimulatedScan = SCAN) -> Path:
    """The scan as a data file, in the layout with the calibration as root attributes."""
    settings = scan.start(1).settings
    with h5py.File(path, "w") as file:
        file["data"] = all_frames(scan).reshape(*scan.scan_shape, *scan.detector_shape)
        file.attrs.update(
            {
                "energy_eV": settings["energy_kev"] * 1e3,
                "semiangle_mrad": settings["semiangle_mrad"],
                "rolloff_mrad": settings["rolloff_mrad"],
                "scan_step_A": settings["scan_step_angstrom"],
                "det_pixel_mrad": settings["detector_pixel_mrad"],
                "rotation_deg": settings["rotation_deg"],
                "C10_A": settings["aberrations"].get("C10", 0.0),
            }
        )
    return path


def assert_same_object(one: Result | np.ndarray, other: Result | np.ndarray, tolerance: float = 1e-5) -> None:
    """Two objects agree to ``tolerance``, relative to the image (mean-free norm) and not to its mean of 1."""
    a, b = (item.object if isinstance(item, Result) else item for item in (one, other))
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.linalg.norm(b - b.mean()) > 0, "an empty image proves nothing"
    assert np.linalg.norm((a - a.mean()) - (b - b.mean())) <= tolerance * np.linalg.norm(b - b.mean())


@contextlib.asynccontextmanager
async def serving(
    scan: Any = SCAN, encoding: Encoding = Encoding.BSLZ4, **options: Any
) -> AsyncIterator[tuple[str, asyncio.Task[SendReport]]]:
    """A simulated detector under way: its endpoint, and the task that serves."""
    source = EncodedSource(scan, encoding, threads=1)
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    options.setdefault("frames_per_message", 5)
    sending = asyncio.create_task(
        serve(source, options.pop("address", ANY_PORT), ready=ready.set_result, **options), name="serving"
    )
    try:
        yield await patiently(ready), sending
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def patiently(waiting: Any, seconds: float = PATIENCE_S) -> Any:
    """Await, but not for ever."""
    return await asyncio.wait_for(waiting, seconds)


async def run_session(options: SessionOptions) -> tuple[Session, list[Snapshot]]:
    """A session from start to end, and every snapshot that a reader got."""
    async with Session(options) as session:

        async def read() -> list[Snapshot]:
            return [snapshot async for snapshot in session]

        snapshots = await patiently(read())
    return session, snapshots


async def snapshot_where(session: Session, condition: Any) -> Snapshot:
    """The first snapshot that fulfils ``condition``."""

    async def look() -> Snapshot:
        async for snapshot in session:
            if condition(snapshot):
                return snapshot
        raise AssertionError(f"the session ended before: {session.snapshot}")

    return await patiently(look())


def live_options(*addresses: str, **options: Any) -> SessionOptions:
    """A session that gives up soon rather than hanging, on the CPU."""
    options.setdefault("timeout_s", PATIENCE_S / 2)
    options.setdefault("series_timeout_s", PATIENCE_S / 2)
    return SessionOptions(list(addresses), device="cpu", threads=2, **options)


def offline(path: Path, **options: Any) -> Result:
    return reconstruct_file(path, device="cpu", threads=2, **options)


class PlainSender:
    """A sender written from the protocol's description, with pyzmq and msgpack only. Sends whatever it is told to."""

    def __init__(self, pattern: int = zmq.PUSH, address: str = ANY_PORT, **options: int) -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(pattern)
        self.socket.linger = 0
        self.socket.sndtimeo = int(1000 * PATIENCE_S)
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.bind(address)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def __aenter__(self) -> PlainSender:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    async def raw(self, *parts: bytes) -> None:
        await self.socket.send_multipart(parts)

    async def start(self, series: int | str = 1, **keys: Any) -> None:
        """A start message; keys replace or extend what suits ``SCAN``; those that are None are left out."""
        header = {
            "type": "start",
            "version": 1,
            "series": series,
            "detector_shape": list(DETECTOR),
            "dtype": "uint16",
            "scan_shape": [ROWS, COLUMNS],
            "frames": FRAMES,
            **OPTICS_AND_DISK,
            **keys,
        }
        await self.raw(msgpack.packb({key: value for key, value in header.items() if value is not None}))

    async def frames(
        self,
        payloads: Sequence[bytes],
        first: int = 0,
        series: int | str = 1,
        encoding: str = "raw",
        **keys: Any,
    ) -> None:
        """One message with consecutive frames."""
        header = {
            "type": "frames",
            "series": series,
            "first": first,
            "count": len(payloads),
            "encoding": encoding,
            "sizes": [len(payload) for payload in payloads],
            **keys,
        }
        await self.raw(msgpack.packb(header), b"".join(payloads))

    async def scan(self, frames: np.ndarray, order: Iterable[int], series: int | str = 1) -> None:
        """Single frames, in any order."""
        for index in order:
            await self.frames([frames[index].tobytes()], int(index), series)

    async def end(self, series: int | str = 1) -> None:
        await self.raw(msgpack.packb({"type": "end", "series": series}))


Send = Callable[[PlainSender], Awaitable[None]]


@contextlib.asynccontextmanager
async def plainly(send: Send, sender: PlainSender | None = None) -> AsyncIterator[str]:
    """A plain sender under way; its endpoint."""
    async with sender or PlainSender() as sender:
        task = asyncio.ensure_future(send(sender))
        try:
            yield sender.endpoint
        finally:
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome


def payloads_of(messages: Iterable[Message]) -> list[tuple[int, bytes]]:
    """(index, payload) of every frame."""
    return [
        (int(index), block.slab[offset : offset + size].tobytes())
        for block in messages
        if isinstance(block, FrameBlock)
        for index, offset, size in zip(block.indices, block.offsets, block.sizes, strict=True)
    ]


def packed(array: np.ndarray, encoding: Encoding) -> bytes:
    return encode(array, encoding)


def batch(*messages: Sequence[bytes]) -> ReceivedBatch:
    """Messages as the receiver hands them over."""
    return ReceivedBatch.from_messages(messages)
