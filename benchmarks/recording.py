"""Recording: a session that records what it reconstructs, ``liveptycho record``, and the recorder by itself.

Baseline: ``write_direct_chunk`` of the same payloads, one frame a chunk, into a bare HDF5 file.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.data import start, table
from benchmarks.report import Section
from benchmarks.sending import Sender, Stream
from benchmarks.sessions import ALL, Run, offer, offered, scan
from benchmarks.stages import Payloads
from detectors.messages import FrameBlock
from stream.config import Settings
from stream.record import record_stream
from stream.recording import Recorder
from stream.recording.payload_check import whole_frames

#: Sent frames/s that are to be received, decoded and recorded without loss.
GOAL_RATE = 120_000
#: What a detector can hold back [frames]: a tenth of a second at that rate.
_BUFFER = GOAL_RATE // 10

#: Without the phase: receive, decode, record.
_DECODE = "bf"


def _verify(path: Path, frames: int) -> None:
    """Raise ``RuntimeError`` unless the file holds every frame of one pass, once and whole."""
    with h5py.File(path) as file:
        came, complete = np.sort(file["frame_index"][...]), bool(file.attrs["complete"])
        damaged = [name for name in _damaged(file) if len(file[name])]
    if damaged or not complete or not np.array_equal(came, np.arange(frames)):
        raise RuntimeError(f"{len(came)} of {frames} frames were recorded, complete: {complete}, damaged: {damaged}")
    path.unlink()


def _damaged(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visit(lambda name: names.append(name) if name.endswith("damaged/at") else None)
    return names


async def _record(sender: Sender, path: Path, rate: float | None = None, buffer: int | None = None) -> Run:
    """``liveptycho record``: from the first frame's departure until the file is closed."""
    address = sender.begin()
    task = asyncio.create_task(record_stream([address], path, protocol=sender.stream.protocol))
    await asyncio.sleep(0.3)  # connected; a paced sender must not begin before
    cpu = time.process_time()
    sender.go(rate=rate, buffer=buffer)
    recorded = await task
    ended, cpu = time.time(), time.process_time() - cpu
    sent = sender.done()
    if recorded.frames != sent.frames:
        raise RuntimeError(f"{recorded.frames} of {sent.frames} frames were recorded")
    return Run(ended - sent.began, cpu, sent, {})


def _alone(what: Stream, folder: Path) -> dict[str, Any]:
    """CPU time of a frame in the recorder, and where it goes [µs]."""
    payloads = Payloads(what)
    count = len(payloads.offsets)
    series = start(what.scan_shape, what.dtype, shape=what.shape)
    blocks = [
        FrameBlock(1, what.encoding, first + np.arange(count), payloads.offsets, payloads.sizes, payloads.slab)
        for first in range(0, 8 * count, count)
    ]
    frames = count * len(blocks)
    with Recorder(folder / "alone.h5", series, what.protocol, version("liveptycho")) as recorder:
        recorder.write(blocks[0])
        cpu, wall = time.process_time(), time.perf_counter()
        for block in blocks[1:]:
            recorder.write(block)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    whole_frames(blocks[0], what.shape, series.dtype)
    check = time.process_time()
    whole_frames(blocks[0], what.shape, series.dtype)
    check = time.process_time() - check
    bounds = list(zip(payloads.offsets.tolist(), payloads.sizes.tolist(), strict=True))
    slab = payloads.slab.data
    with h5py.File(folder / "bare.h5", "w", libver=("v110", "v110"), rdcc_nbytes=0) as file:
        data = file.create_dataset(
            "frames", (0, *what.shape), what.dtype, chunks=(1, *what.shape), maxshape=(None, *what.shape)
        )
        bare = time.process_time()
        for number in range(len(blocks)):
            data.resize((number + 1) * count, axis=0)
            for i, (offset, size) in enumerate(bounds):
                data.id.write_direct_chunk((number * count + i, 0, 0), slab[offset : offset + size])
        file.flush()
        bare = time.process_time() - bare
    after = frames - count
    return {
        "case": what.name, "recorder us": 1e6 * cpu / after, "wall us": 1e6 * wall / after,
        "check us": 1e6 * check / count, "bare us": 1e6 * bare / frames,
        "recorder/bare": (cpu / after) / (bare / frames),
    }  # fmt: skip


def run(quick: bool, long: bool = False) -> Section:
    """The section of the report."""
    shape = (64, 256) if quick else (512, 256) if long else (256, 256)
    cases = [Stream(shape, protocol="dectris-v2"), Stream(shape, protocol="dectris-v2", shape=(96, 96))]
    channels = [_DECODE, ALL] if "channels" in Settings.model_fields else [ALL]
    rows, costs = [], []
    with tempfile.TemporaryDirectory() as name, Sender(cases[0]) as sender:
        folder = Path(name)
        for stream in cases[:1] if quick else cases:
            sender.load(stream)
            ways: list[tuple[str, Any, Any]] = [
                (f"session, channels {made}", lambda path, made=made: scan(sender, channels=made, record=path),
                 lambda path, made=made: offer(sender, GOAL_RATE, _BUFFER, channels=made, record=path))
                for made in channels if offered(made)
            ]  # fmt: skip
            ways.append(
                ("liveptycho record", lambda path: _record(sender, path),
                 lambda path: _record(sender, path, GOAL_RATE, _BUFFER))
            )  # fmt: skip
            for way, freely, at_rate in ways:
                path = folder / "scan.h5"
                went = asyncio.run(freely(path))
                _verify(path, stream.frames)
                paced = asyncio.run(at_rate(path))
                path.unlink()
                rows.append({
                    "case": stream.name, "way": way, "rate": stream.frames / went.seconds,
                    "cpu us": 1e6 * went.cpu_s / stream.frames, "dropped": paced.sent.dropped,
                    "rate/goal": stream.frames / went.seconds / GOAL_RATE,
                })  # fmt: skip
                print(f"  {stream.name}, {way}: {rows[-1]['rate']:,.0f} frames/s", flush=True)
            costs.append(_alone(stream, folder))
            for path in folder.iterdir():
                path.unlink()
    text = table(
        ("stream", "what records", "frames/s, sender waits", "CPU, µs a frame", "rate/goal",
         f"lost of {cases[0].frames:,} at {GOAL_RATE:,}/s"),
        [[row[key] for key in ("case", "way", "rate", "cpu us", "rate/goal", "dropped")] for row in rows],
    )  # fmt: skip
    cost_text = table(
        ("stream", "recorder, CPU µs a frame", "wall µs", "of it: is the payload whole?", "bare write_direct_chunk",
         "recorder/bare"),
        [[row[key] for key in ("case", "recorder us", "wall us", "check us", "bare us", "recorder/bare")]
         for row in costs],
    )  # fmt: skip
    return Section(
        f"## Recording on the local disk\n\n{text}\n\n"
        f"Goal: {GOAL_RATE:,} sent frames/s received, decoded and recorded with no loss. Each file was read again: "
        f"every frame is in it once, and whole. At {GOAL_RATE:,}/s the sender can hold back {_BUFFER:,} frames and "
        "drops what does not fit. Files are written to the page cache; the disk itself is behind.\n\n"
        f"### The recorder alone, one thread\n\n{cost_text}",
        {"recording": rows, "recorder": costs},
    )


if __name__ == "__main__":
    print(run(quick=False).text)
