"""The stages of a live reconstruction, each alone on all cores: what the whole can reach at most.

Each returns a ``Stage``: frames/s, and the CPU time of a frame over all threads.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import llvmlite.binding
import numba
import numpy as np
import zmq
from numba import types
from threadpoolctl import threadpool_limits

from benchmarks import libzmq
from benchmarks.data import frames, start
from benchmarks.sending import Sender, Stream
from benchmarks.sessions import layers
from detectors import codec
from detectors.messages import Encoding, FrameBlock
from stream.array import choose_device
from stream.engine import BATCH_ROWS, Setup
from stream.kernels import is_real_kernel
from stream.reconstruction import Reconstruction

CORES = len(os.sched_getaffinity(0))

#: Frames that differ from each other, and how many are decoded in one go.
_POOL, _BLOCK = 1024, 4096


class Stage(NamedTuple):
    rate: float
    """frames/s"""
    cpu_us: float
    """CPU time of a frame, over all threads of this process [µs]"""


def _timed(work: Callable[[], object], count: int, seconds: float) -> Stage:
    """``work`` on ``count`` frames, again and again for about ``seconds``: the median rate, the mean CPU time."""
    work()
    walls = []
    cpu, began = time.process_time(), time.perf_counter()
    while time.perf_counter() - began < seconds or len(walls) < 3:
        before = time.perf_counter()
        work()
        walls.append(time.perf_counter() - before)
    cpu = time.process_time() - cpu
    return Stage(count / float(np.median(walls)), 1e6 * cpu / (count * len(walls)))


def receive(sender: Sender) -> Stage:
    """The same messages from the same sender, received and let go of in a compiled loop."""
    stream = sender.stream
    address = sender.begin()
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.linger = 0
        socket.connect(address)
        socket.recv_multipart()
        cpu = time.process_time()
        sender.go()
        wanted = stream.messages * sender.parts
        if libzmq.AVAILABLE:
            came = libzmq.receive_parts(socket.underlying, libzmq.message_buffer(), wanted)
        else:
            came = sum(1 for _ in range(wanted) if socket.recv(copy=False) is not None)
        ended, cpu = time.time(), time.process_time() - cpu
    if came != wanted:
        raise RuntimeError(f"{came} of {wanted} message parts came")
    return Stage(stream.frames / (ended - sender.done().began), 1e6 * cpu / stream.frames)


llvmlite.binding.add_symbol(
    "bshuf_decompress_lz4", ctypes.cast(codec.bitshuffle_library().bshuf_decompress_lz4, ctypes.c_void_p).value
)
_decompress = types.ExternalFunction(
    "bshuf_decompress_lz4", types.int64(types.intp, types.intp, types.uintp, types.uintp, types.uintp)
)


@numba.njit(nogil=True, cache=True)
def _decompress_all(slab, offsets, sizes, out, pixels, itemsize, block):
    sound = 0
    for i in range(len(offsets)):
        where = slab.ctypes.data + offsets[i] + 12
        used = _decompress(where, out.ctypes.data, np.uint64(pixels), np.uint64(itemsize), np.uint64(block))
        sound += used == sizes[i] - 12
    return sound


class Payloads:
    """A stream's frames as a receiver has them: ``_BLOCK`` payloads, end to end."""

    def __init__(self, what: Stream) -> None:
        self.what = what
        pool = [codec.encode(f, what.encoding) for f in frames(_POOL, what.dtype, shape=what.shape)]
        sizes = np.array([len(payload) for payload in pool], np.int64)
        # Eight-byte boundaries, as the receiver has it.
        self.slab = np.zeros(int(((sizes + 7) & ~7).sum()), np.uint8)
        offsets = np.cumsum((sizes + 7) & ~7) - ((sizes + 7) & ~7)
        for offset, payload in zip(offsets.tolist(), pool, strict=True):
            self.slab[offset : offset + len(payload)] = np.frombuffer(payload, np.uint8)
        self.offsets, self.sizes = np.tile(offsets, _BLOCK // _POOL), np.tile(sizes, _BLOCK // _POOL)

    def library(self, seconds: float) -> Stage | None:
        """Whole frames by the bitshuffle library's own C function; None where nothing is compressed."""
        if self.what.encoding is not Encoding.BSLZ4:
            return None
        rows, columns = self.what.shape
        itemsize = np.dtype(self.what.dtype).itemsize
        sizes = rows * columns, itemsize, codec.BLOCK_BYTES // itemsize

        def work(part: slice) -> None:
            out = np.empty(rows * columns * itemsize, np.uint8)
            chosen = self.offsets[part], self.sizes[part]
            if _decompress_all(self.slab, *chosen, out, *sizes) != len(chosen[0]):
                raise RuntimeError("the library did not take every frame")

        parts = [slice(i * _BLOCK // CORES, (i + 1) * _BLOCK // CORES) for i in range(CORES)]
        with ThreadPoolExecutor(CORES) as executor:
            return _timed(lambda: list(executor.map(work, parts)), _BLOCK, seconds)

    def ours(self, channels: str, seconds: float) -> Stage:
        """By the session's own decoder, with everything that it takes from a frame: rows, sums, mean pattern."""
        # A small scan with the same disk: its kernels are made at once, and it has room for the frames of a block.
        small = Stream((64, _BLOCK // 64), self.what.dtype, self.what.encoding, shape=self.what.shape)
        series = start(small.scan_shape, small.dtype, shape=small.shape)
        run = Reconstruction(series, layers(small, channels), choose_device("cpu"), source="benchmark")
        engine = run.prepare()
        rows, sums = engine._assembler.pixels, engine._assembler.sums
        flat = rows.reshape(-1, rows.shape[-1]), sums.reshape(-1, sums.shape[-1])
        numbers = np.arange(_BLOCK)
        block = FrameBlock(1, small.encoding, numbers, self.offsets, self.sizes, self.slab)

        def work() -> None:
            if engine._decoder.decode(block, numbers, *flat).any():
                raise RuntimeError("the decoder did not take every frame")

        try:
            return _timed(work, _BLOCK, seconds)
        finally:
            run.close()


def matrix_products(setup: Setup, seconds: float) -> Stage:
    """The contraction's matrix products by NumPy's BLAS: groups of the passband, 16 rows, one thread a core."""
    band, pixels = setup.passband, len(setup.geometry.bf_pixels)
    real = is_real_kernel(setup.method, setup.probe)
    dtype, columns = (np.float32, 2 * BATCH_ROWS) if real else (np.complex64, BATCH_ROWS)
    rng = np.random.default_rng(6)
    jobs = []
    for group in band.groups:
        entries = int(band.columns[group.stop] - band.columns[group.start]) // len(group)
        kernel = rng.random((len(group), entries, pixels), np.float32).astype(dtype)
        spectra = rng.random((len(group), columns, pixels), np.float32).astype(dtype)
        jobs.append((kernel, spectra.transpose(0, 2, 1), np.empty((len(group), entries, columns), dtype)))

    def work(job: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        np.matmul(job[0], job[1], out=job[2])

    with ThreadPoolExecutor(CORES) as executor, threadpool_limits(1, "blas"):
        return _timed(lambda: list(executor.map(work, jobs)), BATCH_ROWS * setup.scan.shape[1], seconds)
