"""What a frame costs and what a reconstruction holds, from small scans to large ones: against the formulas.

Each configuration is measured in a process of its own. Its engine gets raw frames that hold little more than the
bright-field disk, so that next to nothing is decoded. A row costs the same wherever it is: large scans get as many rows
as a few seconds allow.
"""

from __future__ import annotations

import time
from itertools import product
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.data import setup, table
from benchmarks.processes import MB, apart, held_bytes, peak_bytes
from benchmarks.report import Section
from detectors.errors import DoesNotFit
from detectors.messages import Encoding, FrameBlock
from stream.array import Device, choose_device
from stream.decode import compile_ahead
from stream.engine import BATCH_ROWS, Engine, MemoryPlan
from stream.kernels import is_real_kernel

_FOCUS, _ABERRATED = False, True
_PIXELS = (300, 1245, 4997, 9000)
QUICK = ((64, 300, _FOCUS), (64, 1245, _ABERRATED), (128, 1245, _FOCUS))
#: Without those whose kernels alone take more than about five seconds.
DEFAULT = (
    *product((64, 256), _PIXELS[:3], (_FOCUS, _ABERRATED)),
    (256, 9000, _FOCUS),
    *product((512,), _PIXELS[:2], (_FOCUS, _ABERRATED)),
    (512, 4997, _FOCUS),
)
LONG = tuple(product((64, 128, 256, 512, 1024, 2048), _PIXELS, (_FOCUS, _ABERRATED)))

#: Rows are fed for so long [s].
_SECONDS = {"quick": 0.3, "default": 1.5, "long": 8.0}
#: Frames that differ from each other.
_POOL = 256


def _block(rows: range, side: int, size: int, slab: np.ndarray) -> FrameBlock:
    """Raw frames of ``size`` bytes for some scan rows, out of a pool."""
    count = len(rows) * side
    offsets = np.arange(count) % _POOL * size
    return FrameBlock(1, Encoding.RAW, rows.start * side + np.arange(count), offsets, np.full(count, size), slab)


def _warm_up(device: Device, aberrated: bool) -> None:
    """Let whatever is compiled be compiled, or loaded, before anything is measured."""
    what = setup((32, 32), 60, aberrated=aberrated)
    size = what.geometry.shape[0] * what.geometry.shape[1]
    engine = Engine(what, device)
    for rows in (range(16), range(16, 32)):
        engine.add(_block(rows, 32, size, np.ones(_POOL * size, np.uint8)))
        while engine.accumulate():
            pass
    engine.object()
    engine.close()


def _measure(pipe: Connection, side: int, bf_pixels: int, aberrated: bool, seconds: float) -> None:
    compile_ahead()
    device = choose_device("cpu")
    _warm_up(device, aberrated)
    what = setup((side, side), bf_pixels, aberrated=aberrated)
    pixels, entries = len(what.geometry.bf_pixels), what.passband.entries
    plan = MemoryPlan.of(what)
    # Twice as many multiplications for complex kernels; the row spectra are complex in any case.
    operations = entries * pixels * (2 if is_real_kernel(what.method, what.probe) else 4) / side
    row = {
        "side": side, "pixels": pixels, "optics": "aberrated" if aberrated else "in focus", "entries": entries,
        "planned MB": plan.total / MB, "Mops": operations / 1e6,
    }  # fmt: skip
    shape = what.geometry.shape
    size = shape[0] * shape[1]
    rng = np.random.default_rng(7)
    slab = rng.poisson(1.0, _POOL * size).astype(np.uint8)
    before = held_bytes()
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        engine = Engine(what, device)
        row["setup s"], row["setup CPU s"] = time.perf_counter() - wall, time.process_time() - cpu
    except DoesNotFit as error:
        pipe.send({**row, "problem": str(error)})
        return
    adding = accumulating = 0.0
    batch = min(BATCH_ROWS, side)
    rows, began = 0, time.perf_counter()
    while rows < side and (rows < 2 * batch or time.perf_counter() - began < seconds):
        block = _block(range(rows, rows + batch), side, size, slab)
        cpu = time.process_time()
        engine.add(block)
        between = time.process_time()
        while engine.accumulate():
            pass
        accumulating += time.process_time() - between
        adding += between - cpu
        rows += batch
    wall = time.perf_counter() - began
    engine.object()
    frames = rows * side
    planned = plan.total - plan.ring * (1 - rows / side)
    row |= {
        "rows": rows, "add us": 1e6 * adding / frames, "accumulate us": 1e6 * accumulating / frames,
        "frames/s": frames / wall, "Gops/s": operations * frames / accumulating / 1e9,
        "taken MB": (peak_bytes() - before) / MB, "planned so far MB": planned / MB,
        "taken/planned": (peak_bytes() - before) / planned,
    }  # fmt: skip
    engine.close()
    pipe.send(row)


def run(quick: bool, long: bool = False) -> Section:
    """The section of the report."""
    seconds = _SECONDS["quick" if quick else "long" if long else "default"]
    rows: list[dict[str, Any]] = []
    for side, bf_pixels, aberrated in QUICK if quick else LONG if long else DEFAULT:
        row = apart(_measure, side, bf_pixels, aberrated, seconds)
        rows.append(row)
        told = row.get("problem") or f"{row['accumulate us']:.1f} us a frame, {row['taken MB']:,.0f} MB"
        print(f"  {side}x{side}, {row['pixels']} px, {row['optics']}: {told}", flush=True)
    measured = [row for row in rows if "problem" not in row]
    text = table(
        ("scan", "BF px", "optics", "rows fed", "set-up, s", "add, CPU µs a frame", "accumulate, CPU µs", "frames/s",
         "multiply-adds a frame, M", "G multiply-adds/s a core", "taken, MB", "planned, MB", "taken/planned"),
        [[f"{row['side']}x{row['side']}", row["pixels"], row["optics"],
          *(row[key] for key in ("rows", "setup s", "add us", "accumulate us", "frames/s", "Mops", "Gops/s",
                                 "taken MB", "planned so far MB", "taken/planned"))] for row in measured],
    )  # fmt: skip
    left_out = [
        f"{row['side']}x{row['side']} with {row['pixels']:,} pixels {row['optics']} ({row['planned MB'] / 1e3:,.0f} GB)"
        for row in rows
        if "problem" in row
    ]
    return Section(
        f"## Scaling: cost of a frame and memory\n\n{text}\n\n"
        "*add*: positions, raw decoding and sums; *accumulate*: ring, row FFT and contraction, over all threads. "
        "*multiply-adds*: entries of the passband x BF pixels / columns, times 2 (real kernels) or 4 (complex ones): "
        "what the dense contraction takes. *planned*: `MemoryPlan`, with the ring's share of the rows that were fed; "
        "*taken*: the process's peak beyond what it held before the engine. A row costs the same wherever it is, so "
        "large scans got as many rows as a few seconds allowed."
        + (f"\n\nDid not fit into this machine's memory: {'; '.join(left_out)}." if left_out else ""),
        {"scaling": measured},
    )


if __name__ == "__main__":
    print(run(quick=False).text)
