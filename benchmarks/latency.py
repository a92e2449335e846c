"""From the departure of a scan row's last frame to the arrival of the published image that shows the row.

Frames come at half the rate that the session sustained a moment before. A viewer's place is taken by a process with a
SUB socket; sender, session and viewer share one host and so one clock.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zmq

from benchmarks.data import table
from benchmarks.report import Section
from benchmarks.sending import Sender, Stream
from benchmarks.sessions import engine_of, layers, scan
from stream.session import Session
from stream.session_options import SessionOptions
from stream.snapshot import Snapshot

#: Median and 99th percentile [ms].
GOALS_MS = (20.0, 60.0)
_CASES = (("dectris-v2", 1), ("native", 1), ("native", 64))


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
    stream = sender.stream
    options = SessionOptions(
        [address], stream.protocol, layers=layers(stream), publish="tcp://127.0.0.1:*", linger_s=1.0
    )
    async with Session(options) as session:
        viewer = context.Process(target=_watch, args=(session.publish_endpoint, other), daemon=True)
        viewer.start()
        await asyncio.to_thread(pipe.recv)
        await engine_of(session, sender)
        await asyncio.sleep(0.5)  # the subscription must be through
        sender.go(rate=rate, row=stream.scan_shape[1])
        seen = await asyncio.to_thread(pipe.recv)
    viewer.join(5)
    left = sender.done().row_ends
    arrived, row = np.array(seen).T
    shown = np.array([arrived[row >= number].min(initial=np.inf) for number in range(len(left))])
    scanning = arrived[(arrived > left[0]) & (arrived < left[-1])]
    return shown - np.array(left), np.diff(scanning)


def run(quick: bool) -> Section:
    """The section of the report."""
    shape = (64, 256) if quick else (256, 256)
    rows: list[dict[str, Any]] = []
    with Sender(Stream(shape)) as sender:
        asyncio.run(scan(sender))  # fills caches
        for protocol, per_message in _CASES[:1] if quick else _CASES:
            stream = Stream(shape, protocol=protocol, per_message=per_message)
            sender.load(stream)
            sustained = statistics.median(stream.frames / asyncio.run(scan(sender)).seconds for _ in range(3))
            seconds, intervals = asyncio.run(latencies(sender, sustained / 2))
            median, high = 1e3 * float(np.median(seconds)), 1e3 * float(np.percentile(seconds, 99))
            rows.append({
                "case": stream.name, "rate": sustained / 2, "median ms": median, "p99 ms": high,
                "worst ms": 1e3 * float(seconds.max()), "interval ms": 1e3 * float(np.median(intervals)),
                "median/goal": median / GOALS_MS[0], "p99/goal": high / GOALS_MS[1],
                "median/scan": median / 1e3 * sustained / 2 / stream.frames,
            })  # fmt: skip
            print(f"  {stream.name}: {median:.0f} ms, 99 %: {high:.0f} ms", flush=True)
    text = table(
        ("stream", "frames/s", "median, ms", "99 %, ms", "worst, ms", "between images, ms", "median/goal", "99 %/goal",
         "median/whole scan"),
        [[row[key] for key in ("case", "rate", "median ms", "p99 ms", "worst ms", "interval ms", "median/goal",
                               "p99/goal", "median/scan")] for row in rows],
    )  # fmt: skip
    return Section(
        f"## From a row's last frame to its published image: {shape[0]}x{shape[1]} scan\n\n{text}\n\n"
        f"Frames come at half the rate that a session sustained a moment before. Goals: median {GOALS_MS[0]:g} ms, "
        f"99 % {GOALS_MS[1]:g} ms. `median/whole scan` compares with reconstructing after the scan, which shows the "
        "first row that much later.",
        {"latency": rows},
    )


if __name__ == "__main__":
    print(run(quick=False).text)
