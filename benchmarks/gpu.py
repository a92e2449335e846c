"""On a CUDA device: sustained frames/s from received messages, optics changes, memory bandwidth, traffic to the device.

Nothing is received here: blocks of compressed frames are there already, as a receiver hands them over.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.data import ABERRATIONS, ENERGY_KEV, ROLLOFF_MRAD, SEMIANGLE_MRAD, STEP_ANGSTROM, median_seconds, table
from detectors.codec import encode
from detectors.errors import ConfigurationError, DoesNotFit
from detectors.messages import Encoding, FrameBlock
from stream.accumulator import Accumulator
from stream.array import Device, choose_device
from stream.engine import BATCH_ROWS, Engine
from stream.geometry import DetectorGeometry
from stream.gpu.decode import GpuFrameDecoder
from stream.kernels import METHODS
from stream.optics import Aberrations, Probe
from stream.ring import RowRing
from stream.scan import ScanPattern
from stream.setup import MemoryPlan, Setup

#: The disk's radius as a share of half the detector: 8,800 bright-field pixels of 192x192, 2,200 of 96x96.
_DISK = 0.552
_MEAN = 0.2
"""electrons a pixel in the disk"""

#: Memory bandwidth by the makers' data sheets, B/s. The first name that is contained in the device's counts.
PEAKS = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB PCIe": 1.935e12,
    "A100": 1.555e12,
    "V100": 0.9e12,
    "L40S": 0.864e12,
    "RTX 4090": 1.008e12,
    "RTX 3090": 0.936e12,
    "RTX A6000": 0.768e12,
}


def peak_bandwidth(name: str) -> float | None:
    """The data sheet's memory bandwidth of a device [B/s], None where it is not known here."""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def make_setup(detector: int, scan: int, *, aberrated: bool, passes: int | None = 1) -> Setup:
    """A square detector whose disk has 0.552 of its width, a square scan."""
    radius = _DISK * detector / 2
    shape, pixel = (detector, detector), SEMIANGLE_MRAD / radius
    geometry = DetectorGeometry(
        shape, (pixel, pixel), (detector / 2, detector / 2), SEMIANGLE_MRAD, np.ones(shape, bool)
    )
    probe = Probe(ENERGY_KEV * 1e3, SEMIANGLE_MRAD * 1e-3, ROLLOFF_MRAD * 1e-3,
                  Aberrations.from_user(ABERRATIONS if aberrated else {}))  # fmt: skip
    step = (STEP_ANGSTROM, STEP_ANGSTROM)
    return Setup(geometry, probe, ScanPattern((scan, scan)), step, np.dtype("u1"), METHODS["ssb"], passes)


def compressed_block(what: Setup, frames: int) -> FrameBlock:
    """Frames as a receiver hands them over: bslz4 payloads in one slab, 20 bytes of a message's header before each."""
    rng, shape = np.random.default_rng(1), what.geometry.shape
    row, column = np.indices(shape) - np.array(shape)[:, None, None] / 2
    lit = np.hypot(row, column) < _DISK * shape[0] / 2
    pool = []
    for _ in range(min(frames, 512)):
        frame = np.zeros(shape, what.dtype)
        frame[lit] = rng.poisson(_MEAN, int(lit.sum()))
        pool.append(bytes(20) + encode(frame, Encoding.BSLZ4))
    payloads = [pool[i % len(pool)] for i in range(frames)]
    lengths = np.array([len(payload) for payload in payloads], np.int64)
    slab = np.frombuffer(b"".join(payloads), np.uint8)
    offsets = np.cumsum(lengths) - lengths + 20
    return FrameBlock("series", Encoding.BSLZ4, np.arange(frames), offsets, lengths - 20, slab)


def wait(device: Device) -> None:
    """Until the device has done everything."""
    if device.is_gpu:
        device.xp.cuda.runtime.deviceSynchronize()


def seconds(device: Device, work: Callable[[], object], repeats: int) -> float:
    """Median time of ``work`` until the device is done with it, after one run that is not counted."""

    def whole() -> None:
        work()
        wait(device)

    whole()
    return median_seconds(whole, repeats)


class Uploads:
    """Counts the bytes that a decoder's runtime copies to the device."""

    def __init__(self, runtime: Any) -> None:
        self.bytes = 0
        upload = runtime.upload

        def counted(stream: Any, to: Any, array: np.ndarray) -> None:
            self.bytes += array.nbytes
            upload(stream, to, array)

        runtime.upload = counted


def sustained(device: Device, detector: int, scan: int, passes: int) -> list[tuple]:
    """Frames/s of continuous scanning, from compressed blocks to Psi, with either decoder; traffic a frame."""
    what = make_setup(detector, scan, aberrated=True, passes=None)
    frames = scan * scan
    block = compressed_block(what, min(4096, frames))
    engine = Engine(what, device)
    decoder = engine._decoder
    if not isinstance(decoder, GpuFrameDecoder):
        engine.close()
        return [(f"{detector}x{detector}", "the test at the start failed", *[float("nan")] * 4)]
    uploads = Uploads(decoder._runtime)
    done = threading.Event()

    def rows_into_the_image() -> None:
        while not done.is_set():
            if not engine.accumulate():
                time.sleep(2e-4)

    def scan_once(number: int) -> None:
        for first in range(0, frames, len(block)):
            engine.add(replace(block, indices=block.indices + (number * frames + first)))
        while engine.closed_rows:
            time.sleep(2e-4)
        wait(device)

    out = []
    thread = threading.Thread(target=rows_into_the_image)
    thread.start()
    try:
        for turn, (name, engine._decoder) in enumerate((("GPU", decoder), ("CPU, pinned", decoder._host))):
            first = turn * (passes + 1)
            scan_once(first)
            uploads.bytes = 0
            began = perf_counter()
            for number in range(first + 1, first + 1 + passes):
                scan_once(number)
            rate = passes * frames / (perf_counter() - began)
            traffic = uploads.bytes / (passes * frames)
            pixels, alone = len(what.geometry.bf_pixels), decoding_alone(device, engine, block)
            out.append((f"{detector}x{detector}", name, pixels, float(rate), float(alone), float(traffic)))
            print(f"  {detector}x{detector}, {name}: {rate:,.0f} frames/s", flush=True)
    finally:
        done.set()
        thread.join()
        engine.close()
    counters = engine.counters
    if counters.undecodable or counters.late or counters.duplicate or counters.outside:
        raise RuntimeError(f"frames were lost: {counters}")
    return out


def decoding_alone(device: Device, engine: Engine, block: FrameBlock) -> float:
    """Frames/s of the engine's decoder."""
    decoder: Any = engine._decoder
    rows = decoder.xp.empty((len(block), len(engine.setup.geometry.bf_pixels)), decoder.dtype)
    sums, targets = np.empty((len(block), 4), decoder.sums_dtype), np.arange(len(block))
    wait(device)
    return len(block) / seconds(device, lambda: decoder.decode(block, targets, rows, sums), 9)


def changed_optics(device: Device, scan: int, repeats: int) -> list[tuple]:
    """Every row of a full ring contracted again: new kernels, rows into Psi, the object. Times in ms, bandwidth."""
    out = []
    for aberrated in (False, True):
        what = make_setup(192, scan, aberrated=aberrated)
        optics = "aberrated" if aberrated else "in focus"
        pixels = len(what.geometry.bf_pixels)
        try:
            MemoryPlan.of(what, device).check(device)
        except DoesNotFit:
            out.append((f"{scan}x{scan}", optics, pixels, *[float("nan")] * 5))
            continue
        ring = RowRing(what.scan.shape, pixels, what.dtype, device, averaging=False)
        counts = np.random.default_rng(1).poisson(_MEAN, (8, scan, pixels)).astype(what.dtype)
        for row in range(scan):
            ring.commit(row, 0, counts[row % len(counts)], np.ones(scan, bool))
        new_kernels = seconds(device, lambda what=what: what.make_kernels(device), repeats)
        kernels = what.make_kernels(device)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:
            accumulator = Accumulator(
                kernels, ring, device, keep_contracted=False, executor=executor, threads=len(os.sched_getaffinity(0))
            )

            def contract(accumulator: Accumulator = accumulator) -> None:
                accumulator.clear()
                for first in range(0, scan, BATCH_ROWS):
                    accumulator.add(np.arange(first, min(first + BATCH_ROWS, scan)))

            contraction = seconds(device, contract, repeats)
            image = seconds(device, lambda accumulator=accumulator: accumulator.object(1.0), repeats)
        # What has to be moved: the counts once, the spectra in and out, the kernels once for each batch of rows.
        spectra = scan * kernels.passband.column_count * pixels * 8
        moved = scan * scan * pixels + 2 * spectra + -(-scan // BATCH_ROWS) * kernels.nbytes
        out.append((
            f"{scan}x{scan}", optics, pixels, 1e3 * new_kernels, 1e3 * contraction, 1e3 * image,
            1e3 * (new_kernels + contraction + image), moved / contraction / 1e9,
        ))  # fmt: skip
        print(f"  {scan}x{scan}, {optics}: {out[-1][6]:,.1f} ms", flush=True)
        del kernels, accumulator, ring
    return out


def copy_bandwidth(device: Device) -> float:
    """Bytes read and written a second by a plain copy inside the device's memory [B/s]."""
    xp = device.xp
    source = xp.zeros(1 << 28 if device.is_gpu else 1 << 24, np.float32)
    to = xp.empty_like(source)

    def copy() -> None:
        to[...] = source

    return 2 * source.nbytes / seconds(device, copy, 9)


def run(quick: bool) -> str:
    """The section of the report."""
    try:
        device = choose_device("gpu")
    except ConfigurationError:
        return "no CUDA device: not measured"
    return measured(device, scan=128 if quick else 512, scans=(128,) if quick else (256, 512, 1024), passes=2)


def measured(device: Device, scan: int, scans: tuple[int, ...], passes: int) -> str:
    """The section, on ``device``."""
    rates = [row for detector in (96, 192) for row in sustained(device, detector, scan, passes)]
    changes = [row for side in scans for row in changed_optics(device, side, repeats=5)]
    copy, peak = copy_bandwidth(device), peak_bandwidth(device.name)
    ceiling = f"{peak / 1e9:,.0f} GB/s by its data sheet" if peak else "its data sheet is not known here"
    shares = [(*row, row[7] * 1e9 / copy, row[7] * 1e9 / peak if peak else float("nan")) for row in changes]
    head = ("detector", "decoded on", "BF px", "frames/s", "decoding alone", "to the device, B/frame")
    head_changes = ("scan", "optics", "BF px", "kernels, ms", "contraction, ms", "object, ms", "all, ms",
                    "contraction, GB/s", "share of a copy's", "share of the peak")  # fmt: skip
    return (
        f"## GPU: {device.name}\n\nContinuous scanning, {scan}x{scan}, u8 bslz4 at {_MEAN} e/px in the disk, "
        "aberrated, from received messages to Psi; after a first pass that is not counted.\n\n"
        f"{table(head, rates)}\n\nA full ring after a change of optics. Bandwidth counts what has to be moved; a copy "
        f"inside the device moves {copy / 1e9:,.0f} GB/s, {ceiling}.\n\n{table(head_changes, shares)}"
    )


if __name__ == "__main__":
    print(run(quick=False))
