"""liveptycho on the same array: the whole job through the public function, and the engine fed from memory."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from benchmarks.peers.measuring import Job, answer, arguments
from detectors.messages import Encoding, FrameBlock
from stream.api import reconstruct
from stream.array import choose_device
from stream.engine import Engine, Setup

_REPEATS = 3
_BLOCK_BYTES = 32 << 20


def fed(engine: Engine, data: np.ndarray) -> np.ndarray:
    """The object from all frames, given to the engine in blocks that point into the array."""
    frames = data.shape[0] * data.shape[1]
    size = data[0, 0].nbytes
    slab = data.reshape(-1).view(np.uint8)
    per_block = max(1, _BLOCK_BYTES // size)

    def accumulate() -> None:
        while engine.accumulate():
            pass

    with ThreadPoolExecutor(1) as worker:
        pending = worker.submit(accumulate)
        for first in range(0, frames, per_block):
            indices = np.arange(first, min(first + per_block, frames))
            engine.add(
                FrameBlock(1, Encoding.RAW, indices, indices * size, np.full(len(indices), size), slab)
            )  # fmt: skip
            if pending.done():
                pending.result()
                pending = worker.submit(accumulate)
        pending.result()
    engine.finish()
    return engine.object()


def fed_seconds(setup: Setup, data: np.ndarray) -> tuple[float, float]:
    """(seconds until the engine is there, its kernels with it; seconds from the first frame to the object)."""
    began = perf_counter()
    engine = Engine(setup, choose_device("cpu"))
    ready = perf_counter()
    fed(engine, data)
    ended = perf_counter()
    engine.close()
    return ready - began, ended - ready


def main() -> None:
    asked = arguments()
    data = np.load(asked["data"], mmap_mode="r")
    settings = {**asked["optics"], "scan_shape": data.shape[:2], "aberrations": asked["aberrations"]}
    reconstruct(asked["small"], device="cpu", **{**settings, "scan_shape": tuple(asked["small_scan"])})
    with Job() as whole:
        result = reconstruct(asked["data"], device="cpu", **settings)
    np.save(asked["out"], result.object)
    times = [fed_seconds(result.setup, data) for _ in range(_REPEATS)]
    setup_s, run_s = map(statistics.median, zip(*times, strict=True))
    answer(
        setup_s=setup_s,
        run_s=run_s,
        whole_s=whole.seconds,
        cpu_s=whole.cpu_s,
        peak_bytes=whole.peak_bytes,
        beyond_bytes=whole.peak_bytes - data.nbytes,
        counters=result.counters.as_dict(),
    )


if __name__ == "__main__":
    main()
