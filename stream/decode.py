"""From payloads to rows: each batch of frames is decoded, gathered and summed in one compiled call a thread.

For each frame, without ever making a Python object of it: unpack, copy the bright-field pixels into their row, sum the
counts (total, bright field, first moments) and add the frame to the mean pattern. See ``stream.unpack``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from types import ModuleType

import numpy as np

from detectors.messages import Encoding, FrameBlock
from stream.unpack import OK, decode_frames

#: Frames that a 32-bit accumulator takes before it could overflow (65,535 counts each).
_FLUSH_FRAMES = 1 << 16


def compile_ahead(dtypes: Iterable[str] = ("<u1", "<u2")) -> None:
    """Compile the decoder for these pixel types, or load it from disk, before a stream needs it."""
    nothing, one = np.zeros(0, np.int64), np.zeros(1, bool)
    with ThreadPoolExecutor(1) as executor:
        for name in dtypes:
            dtype = np.dtype(name)
            decoder = FrameDecoder((1, 1), dtype, np.zeros(1, np.int64), one.reshape(1, 1), executor, 1)
            block = FrameBlock(0, Encoding.RAW, nothing, nothing, nothing, np.zeros(0, np.uint8))
            decoder.decode(block, nothing, np.zeros((1, 1), dtype), np.zeros((1, 4), decoder.sums_dtype))


class _Worker:
    """The scratch space of one decoding thread."""

    def __init__(self, pixels: int, width: int, dtype: np.dtype) -> None:
        wide = np.dtype("f8") if dtype.kind == "f" else np.dtype("u4") if dtype.itemsize < 4 else np.dtype("u8")
        self.scratch = (np.zeros(pixels, dtype), np.zeros(pixels, dtype), np.zeros(pixels * dtype.itemsize, np.uint8))
        self.pattern = np.zeros(pixels, wide)
        self.column_sums = np.zeros(width, wide)
        self.frames = 0


class FrameDecoder:
    """Decodes blocks of frames of one detector into rows of bright-field pixels and sums.

    ``detector_shape`` (rows, columns), ``dtype`` u1/u2/u4/f4, ``bf_pixels`` int64 (K,) ascending flat indices, ``good``
    bool ``detector_shape`` (False = masked: counts as 0 everywhere). ``threads`` workers share each block. With
    ``maximum_is_masked`` pixels of the largest value that ``dtype`` has count as 0 too, frame by frame; f4 has none.
    """

    def __init__(
        self,
        detector_shape: tuple[int, int],
        dtype: np.dtype,
        bf_pixels: np.ndarray,
        good: np.ndarray,
        executor: Executor,
        threads: int,
        *,
        maximum_is_masked: bool = False,
    ) -> None:
        pixels = detector_shape[0] * detector_shape[1]
        bad = np.flatnonzero(~good.ravel())
        bf_slot = np.full(pixels, -1, np.int32)
        bf_slot[bf_pixels] = np.arange(len(bf_pixels))
        bf_slot[bad] = -2
        self.detector_shape = detector_shape
        self.dtype = dtype
        self.sums_dtype = np.dtype("f8") if dtype.kind == "f" else np.dtype("i8")
        is_float = dtype.kind == "f"
        masked = np.array([np.iinfo(dtype).max] if maximum_is_masked and not is_float else [], dtype)
        self._plan = (bf_pixels.astype(np.int64), bf_slot, bad.astype(np.int64), detector_shape[1], masked, is_float)
        self._workers = [_Worker(pixels, detector_shape[1], dtype) for _ in range(threads)]
        self._executor = executor
        self._pattern = np.zeros(pixels, np.float64 if dtype.kind == "f" else np.uint64)
        self._pattern_lock = threading.Lock()
        self.frames = 0
        self.xp: ModuleType = np
        """the array module that ``rows`` are to be of"""

    def rows_taken(self) -> None:
        """``rows`` as they are now were read by what this thread has begun: decoders on a device wait for that."""

    def decode(self, block: FrameBlock, targets: np.ndarray, rows: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Decode each frame of ``block`` into ``rows[target]`` (positions, K) and ``sums[target]`` (positions, 4).

        Where ``block.minus`` is given, its frames are subtracted first, never below 0. ``targets`` int64 (frames,), all
        different. Returns the status of each frame, uint8 (frames,): 0 is sound, others are keys of
        ``stream.unpack.REASONS`` and have left their target untouched or undefined.
        """
        if block.minus is not None and len(block.minus) != len(block):
            raise ValueError(f"{len(block.minus)} frames to be subtracted from {len(block)}")
        status = np.empty(len(block), np.uint8)
        # A share of at least 16 frames: handing less to a thread costs more than it saves.
        shares = min(len(self._workers), max(1, len(block) // 16))
        bounds = np.linspace(0, len(block), shares + 1).astype(int)
        jobs = []
        for worker, start, stop in zip(self._workers, bounds[:-1], bounds[1:], strict=False):
            args = (worker, block, slice(start, stop), targets, rows, sums, status)
            if stop == len(block):
                self._share(*args)
            else:
                jobs.append(self._executor.submit(self._share, *args))
        for job in jobs:
            job.result()
        self.frames += int(np.count_nonzero(status == OK))
        for worker in self._workers:
            if worker.frames >= _FLUSH_FRAMES // 2:
                self._flush(worker)
        return status

    def _share(
        self,
        worker: _Worker,
        block: FrameBlock,
        part: slice,
        targets: np.ndarray,
        rows: np.ndarray,
        sums: np.ndarray,
        status: np.ndarray,
    ) -> None:
        minus = block if block.minus is None else block.minus
        minus_part = slice(0, 0) if block.minus is None else part
        decode_frames(
            (block.slab, block.offsets[part], block.sizes[part], int(block.encoding)),
            (minus.slab, minus.offsets[minus_part], minus.sizes[minus_part], int(minus.encoding)),
            targets[part],
            self._plan,
            worker.scratch,
            worker.pattern,
            worker.column_sums,
            rows,
            sums,
            status[part],
        )
        worker.frames += part.stop - part.start

    def _flush(self, worker: _Worker) -> None:
        with self._pattern_lock:
            self._pattern += worker.pattern.astype(self._pattern.dtype)
            worker.pattern[:] = 0
            worker.frames = 0

    def forget(self) -> None:
        """Begin the mean pattern anew."""
        with self._pattern_lock:
            for worker in self._workers:
                worker.pattern[:] = 0
            self._pattern[:] = 0
            self.frames = 0

    def mean_pattern(self) -> np.ndarray:
        """Mean of all sound frames so far, float64 ``detector_shape`` [counts/frame]; zeros before the first.

        Taken while another thread decodes, it may miss the frames being added at that moment.
        """
        with self._pattern_lock:
            total = self._pattern.astype(np.float64)
            for worker in self._workers:
                total += worker.pattern
        return (total / max(1, self.frames)).reshape(self.detector_shape)
