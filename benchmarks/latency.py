"""From the departure of a scan row's last frame to the arrival of the published image that shows the row.

Frames come at half the rate that the session sustained a moment before. A viewer's place is taken by a process with a
SUB socket; sender, session and viewer share one host and so one clock.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection

import numpy as np
import zmq

from benchmarks.data import table
from benchmarks.end_to_end import session_seconds
from benchmarks.sending import Sender
from detectors.messages import Encoding
from stream.session import Session, SessionOptions
from stream.snapshot import Snapshot


def _watch(address: str, pipe: Connection) -> None:
    """Note when each snapshot came, and the row that it says is in it; ends with the session."""
    socket = zmq.Context().socket(zmq.SUB)
    socket.set(zmq.CONFLATE, 1)
    socket.set(zmq.SUBSCRIBE, b"")
    socket.connect(address)
    seen: list[tuple[float, int]] = []
    pipe.send("ready")
    state = ""
    while state not in ("finished", "stopped", "failed"):
        part = socket.recv()
        arrived = time.time()
        snapshot = Snapshot.unpack(part)
        state = snapshot.state
        if snapshot.scan_row is not None:
            seen.append((arrived, snapshot.scan_row))
    pipe.send(seen)


async def latencies(sender: Sender, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """(latency of each row, intervals between snapshots) in s, of one pass at ``rate`` frames/s."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    address = sender.begin()
    options = SessionOptions([address], publish="tcp://127.0.0.1:*", linger_s=1.0)
    async with Session(options) as session:
        viewer = context.Process(target=_watch, args=(session.publish_endpoint, other), daemon=True)
        viewer.start()
        await asyncio.to_thread(pipe.recv)
        while session.reconstruction is None or session.reconstruction.engine is None:  # noqa: ASYNC110
            await asyncio.sleep(1e-3)
        await asyncio.sleep(0.5)  # the subscription must be through
        sender.go(rate=rate, row=sender.columns)
        seen = await asyncio.to_thread(pipe.recv)
    viewer.join(5)
    _, _, left = sender.done()
    arrived, row = np.array(seen).T
    shown = np.array([arrived[row >= number].min(initial=np.inf) for number in range(len(left))])
    scanning = arrived[(arrived > left[0]) & (arrived < left[-1])]
    return shown - np.array(left), np.diff(scanning)


def run(quick: bool) -> str:
    """The section of the report."""
    scan = (64, 256) if quick else (256, 256)
    rows = []
    for dtype, encoding, per_message in (("u1", Encoding.BSLZ4, 1), ("u1", Encoding.BSLZ4, 64)):
        with Sender(scan, dtype, encoding, per_message) as sender:
            asyncio.run(session_seconds(sender))
            sustained = sender.frames / asyncio.run(session_seconds(sender))
            seconds, intervals = asyncio.run(latencies(sender, sustained / 2))
        median, high = np.median(seconds), np.percentile(seconds, 99)
        interval, whole = float(np.median(intervals)), sender.frames / (sustained / 2)
        rows.append((f"u8 bslz4 x{per_message}", sustained / 2, 1e3 * median, 1e3 * high, 1e3 * seconds.max(),
                     1e3 * interval, median / interval, median / whole))  # fmt: skip
        print(f"  u8 bslz4 x{per_message}: {1e3 * median:.0f} ms", flush=True)
    head = ("frames", "frames/s", "median, ms", "99 %, ms", "worst, ms", "between images, ms", "median/interval",
            "median/whole scan")  # fmt: skip
    return (
        f"## From a row's last frame to its published image: {scan[0]}x{scan[1]} scan\n\n{table(head, rows)}\n\n"
        "`median/whole scan` compares with reconstructing after the scan, which shows the first row that much later."
    )


if __name__ == "__main__":
    print(run(quick=False))
