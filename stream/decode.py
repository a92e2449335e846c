"""From payloads to rows: each batch of frames is decoded, gathered and summed in one compiled call a thread.

For each frame, without ever making a Python object of it: unpack, copy the bright-field pixels into their row, sum the
counts (total, bright field, first moments) and add the frame to the mean pattern. See ``stream.unpack``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple

import numpy as np

from detectors.messages import Encoding, FrameBlock
from stream.unpack import OK, decode_frames, flush_pattern


def compile_ahead(dtypes: Iterable[str] = ("<u1", "<u2")) -> None:
    """Compile the decoder for these pixel types, or load it from disk, before a stream needs it."""
    nothing, one = np.zeros(0, np.int64), np.zeros(1, bool)
    with ThreadPoolExecutor(1) as executor:
        for name in dtypes:
            dtype = np.dtype(name)
            decoder = FrameDecoder((1, 1), dtype, np.zeros(1, np.int64), one.reshape(1, 1), executor, 1)
            block = FrameBlock(0, Encoding.RAW, nothing, nothing, nothing, np.zeros(0, np.uint8))
            decoder.decode(block, nothing, np.zeros((1, 1), dtype), np.zeros((1, 4), decoder.sums_dtype))
            decoder.mean_pattern()


class _Plan(NamedTuple):
    """What the compiled code must know of a detector."""

    width: int
    bad: np.ndarray
    """int64, ascending flat indices of masked pixels"""
    masked: np.ndarray
    """the value that counts as 0, or nothing"""
    holds_floats: bool
    moments: bool
    pattern: bool
    run_pixel: np.ndarray
    """int64, first pixel of each run of neighbouring bright-field pixels; after the last one a large number"""
    run_slot: np.ndarray
    """int64, where each run stands in a row; after the last one the row's length"""
    # The pixels as words of 64 bits, the first one lowest.
    good_bits: np.ndarray
    """uint64 (words,): which pixels are not masked"""
    bf_words: np.ndarray
    """int64, words that hold bright-field pixels"""
    bf_bits: np.ndarray
    """uint64, which pixels of each of ``bf_words`` those are"""
    bf_slot: np.ndarray
    """int64, where the first of each of ``bf_words`` stands in a row"""
    word_row: np.ndarray
    """int64 (words,): the detector row of each word's first pixel"""
    row_places: np.ndarray
    """uint64 (levels, words): bit ``level`` of how many rows lower each pixel is; none where rows are whole words"""

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        dtype: np.dtype,
        bf_pixels: np.ndarray,
        good: np.ndarray,
        maximum_is_masked: bool,
        moments: bool,
        pattern: bool,
    ) -> _Plan:
        pixels, width = shape[0] * shape[1], shape[1]
        bf = np.asarray(bf_pixels, np.int64)
        starts = np.flatnonzero(np.diff(bf, prepend=-2) != 1)
        bf_bits = _words(np.isin(np.arange(pixels), bf))
        bf_words = np.flatnonzero(bf_bits)
        first = 64 * np.arange(len(bf_bits))
        pixel_row = (first[:, None] + np.arange(64)) // width
        below = pixel_row - pixel_row[:, :1]
        levels = int(below.max()).bit_length()
        is_float = dtype.kind == "f"
        return cls(
            width=width,
            bad=np.flatnonzero(~good.ravel()),
            masked=np.array([np.iinfo(dtype).max] if maximum_is_masked and not is_float else [], dtype),
            holds_floats=is_float,
            moments=moments,
            pattern=pattern,
            run_pixel=np.append(bf[starts], np.iinfo(np.int64).max),
            run_slot=np.append(starts, len(bf)),
            good_bits=_words(good.ravel()),
            bf_words=bf_words,
            bf_bits=bf_bits[bf_words],
            bf_slot=np.searchsorted(bf, 64 * bf_words),
            word_row=first // width,
            row_places=np.array([_words((below >> level & 1).ravel()) for level in range(levels)], np.uint64).reshape(
                levels, len(bf_bits)
            ),
        )


def _words(pixels: np.ndarray) -> np.ndarray:
    """Flags of pixels as bits: uint64 (a 64th of them,), the first pixel lowest."""
    bits = np.packbits(pixels.astype(bool), bitorder="little")
    return np.pad(bits, (0, -len(bits) % 8)).view("<u8").astype(np.uint64)


class _Mean(NamedTuple):
    """The sum of a worker's frames, and the narrow accumulators in front of it."""

    pattern: np.ndarray
    """uint64 or float64 (pixels,)"""
    partial: np.ndarray
    """what was unpacked to pixels, in twice their bits"""
    counters: np.ndarray
    """uint64: what stayed in bit planes, in 16 planes of a word for every 64 pixels, and one more to write zeros to"""
    used: np.ndarray
    """int64 (2,): frames in ``partial`` and in ``counters``"""
    most: np.ndarray
    """int64 (2,): how many they may take"""
    carry: np.ndarray
    """scratch, uint64 (words,)"""
    columns: np.ndarray
    """scratch for sums of columns, in the type of ``partial``"""

    @classmethod
    def of(cls, pixels: int, width: int, dtype: np.dtype) -> _Mean:
        is_float = dtype.kind == "f"
        twice = np.dtype("f8") if is_float else np.dtype(f"u{2 * dtype.itemsize}")
        words = -(-pixels // 64)
        return cls(
            pattern=np.zeros(pixels, np.float64 if is_float else np.uint64),
            partial=np.zeros(pixels, twice),
            counters=np.zeros(17 * words, np.uint64),
            used=np.zeros(2, np.int64),
            most=np.array([1 << 8 * dtype.itemsize, 1 << 8], np.int64),
            carry=np.zeros(words, np.uint64),
            columns=np.zeros(width, twice),
        )


class _Planes(NamedTuple):
    """Scratch space for a frame's bytes as they come out of LZ4."""

    data: np.ndarray
    """uint8 (bytes of a frame and at least 16 more,)"""
    words: np.ndarray
    """the same memory as uint64"""
    ends: np.ndarray
    """int64: for each block, where the zeros begin with which it ends; they have not been written"""
    ones: np.ndarray
    """int64 (planes,): how many bits of each plane of a block are set"""

    @classmethod
    def of(cls, nbytes: int, itemsize: int) -> _Planes:
        words = np.zeros(nbytes // 8 + 3, np.uint64)
        ends = np.zeros(nbytes // (8 * itemsize) + 1, np.int64)
        return cls(words.view(np.uint8), words, ends, np.zeros(8 * itemsize, np.int64))


class _Worker:
    """One decoding thread's accumulators and scratch space. Whoever touches them holds ``lock``."""

    def __init__(self, pixels: int, width: int, dtype: np.dtype) -> None:
        self.scratch = (
            np.zeros(pixels, dtype),
            np.zeros(pixels, dtype),
            _Planes.of(pixels * dtype.itemsize, dtype.itemsize),
        )
        self.mean = _Mean.of(pixels, width, dtype)
        self.frames = 0
        self.lock = threading.Lock()


class FrameDecoder:
    """Decodes blocks of frames of one detector into rows of bright-field pixels and sums.

    ``detector_shape`` (rows, columns), ``dtype`` u1/u2/u4/f4, ``bf_pixels`` int64 (K,) ascending flat indices, ``good``
    bool ``detector_shape`` (False = masked: counts as 0 everywhere). ``threads`` workers share each block. With
    ``maximum_is_masked`` pixels of the largest value that ``dtype`` has count as 0 too, frame by frame; f4 has none.

    Without ``moments`` the first moments are left 0, without ``pattern`` the mean pattern is: what is not wanted costs
    no time. Total and bright field are always there.
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
        moments: bool = True,
        pattern: bool = True,
    ) -> None:
        pixels = detector_shape[0] * detector_shape[1]
        self.detector_shape = detector_shape
        self.dtype = dtype
        self.sums_dtype = np.dtype("f8") if dtype.kind == "f" else np.dtype("i8")
        self._plan = _Plan.of(detector_shape, dtype, bf_pixels, good, maximum_is_masked, moments, pattern)
        self._workers = [_Worker(pixels, detector_shape[1], dtype) for _ in range(threads)]
        self._executor = executor
        self.xp: ModuleType = np
        """the array module that ``rows`` are to be of"""

    @property
    def frames(self) -> int:
        """Sound frames so far: those of the mean pattern."""
        return sum(worker.frames for worker in self._workers)

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
        with worker.lock:
            decode_frames(
                (block.slab, block.offsets[part], block.sizes[part], int(block.encoding)),
                (minus.slab, minus.offsets[minus_part], minus.sizes[minus_part], int(minus.encoding)),
                targets[part],
                self._plan,
                worker.scratch,
                worker.mean,
                rows,
                sums,
                status[part],
            )
            worker.frames += int(np.count_nonzero(status[part] == OK))

    def forget(self) -> None:
        """Begin the mean pattern anew."""
        for worker in self._workers:
            with worker.lock:
                flush_pattern(worker.mean)
                worker.mean.pattern[:] = 0
                worker.frames = 0

    def mean_pattern(self) -> np.ndarray:
        """Mean of all sound frames so far, float64 ``detector_shape`` [counts/frame]; zeros before the first.

        Taken while another thread decodes, it waits for the block being decoded.
        """
        total, frames = np.zeros(self.detector_shape), 0
        for worker in self._workers:
            with worker.lock:
                flush_pattern(worker.mean)
                total += worker.mean.pattern.reshape(self.detector_shape)
                frames += worker.frames
        return total / max(1, frames)
