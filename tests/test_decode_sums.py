"""The compiled sums against NumPy: bit planes in words of 64 pixels, narrow accumulators, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest

from detectors.codec import encode
from detectors.messages import Encoding
from stream.decode import FrameDecoder
from stream.unpack import BRIGHT_FIELD, MOMENT_COLUMN, MOMENT_ROW, TOTAL
from tests.data_helpers import payload_block

#: Rows of whole words, words of two rows and of many; frames of whole words and of others, of one block or more.
SHAPES = [(192, 192), (5, 64), (96, 130), (100, 100), (64, 20), (512, 3), (128, 1), (3, 4100), (67, 131)]


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def disk(shape: tuple[int, int], radius: float) -> np.ndarray:
    row, column = np.indices(shape) - (np.array(shape) // 2)[:, None, None]
    return np.hypot(row, column) < radius


def check(
    fast: FrameDecoder,
    frames: np.ndarray,
    bright: np.ndarray,
    good: np.ndarray,
    encoding: Encoding,
    wanted: tuple[bool, bool] = (True, True),
    times: int = 1,
) -> None:
    """Decode ``frames`` so many ``times``; everything must be as NumPy says. ``wanted``: moments, pattern."""
    count = len(frames)
    block = payload_block([encode(frame, encoding) for frame in frames] * times, range(count * times), encoding)
    rows = np.full((count * times, len(bright)), 9, fast.dtype)
    sums = np.full((count * times, 4), -1, fast.sums_dtype)
    assert not fast.decode(block, np.arange(count * times), rows, sums).any()
    exact = np.where(good, frames, 0).astype(object if frames.dtype.itemsize == 4 else np.int64)
    flat = exact.reshape(count, -1)
    row, column = (axis.ravel() for axis in np.indices(frames.shape[1:]))
    expected = np.zeros((count, 4), np.int64)
    expected[:, TOTAL] = flat.sum(axis=1)
    expected[:, BRIGHT_FIELD] = flat[:, bright].sum(axis=1)
    if wanted[0]:
        expected[:, MOMENT_ROW] = (flat * row).sum(axis=1)
        expected[:, MOMENT_COLUMN] = (flat * column).sum(axis=1)
    np.testing.assert_array_equal(rows, np.tile(frames.reshape(count, -1)[:, bright], (times, 1)))
    np.testing.assert_array_equal(sums, np.tile(expected, (times, 1)))
    assert fast.frames == count * times
    mean = exact.mean(axis=0).astype(np.float64) if wanted[1] else np.zeros(frames.shape[1:])
    for _ in range(2):  # taking it changes nothing
        np.testing.assert_allclose(fast.mean_pattern(), mean, rtol=1e-12)


@pytest.mark.parametrize("encoding", [Encoding.BSLZ4, Encoding.RAW])
@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_sums_of_every_shape(
    executor: ThreadPoolExecutor, shape: tuple[int, int], dtype: str, encoding: Encoding, wanted: tuple[bool, bool]
) -> None:
    """Sparse, dense, nearly empty, hot pixels; a mask that cuts words; half of the frames in each of two threads."""
    rng = np.random.default_rng(3)
    frames = np.stack([rng.poisson(mean, shape) for mean in (0.1, 0.02, 1.5, 40, 0.001, 0)] * 6).astype(dtype)
    top = np.iinfo(dtype).max
    frames[::4, shape[0] // 2, shape[1] // 2] = top
    frames[1::5, -1, -1] = top
    frames[2::5, 0, 0] = 129
    good = rng.random(shape) > 0.03
    bright = np.flatnonzero(disk(shape, 21) & good)
    for threads in (1, 2):
        fast = FrameDecoder(
            shape, np.dtype(dtype), bright, good, executor, threads, moments=wanted[0], pattern=wanted[1]
        )
        check(fast, frames, bright, good, encoding, wanted)


@pytest.mark.parametrize("encoding", [Encoding.BSLZ4, Encoding.RAW])
@pytest.mark.parametrize(("dtype", "frames", "times"), [("<u1", 90, 8), ("<u2", 90, 8), ("<u2", 1024, 65)])
def test_the_mean_pattern_outlasts_its_narrow_accumulators(
    executor: ThreadPoolExecutor, dtype: str, frames: int, times: int, encoding: Encoding
) -> None:
    """Each pixel that counts always counts the most there is: sums of 8, 16 and 32 bits would overflow."""
    shape = (8, 64)
    counts = np.zeros((frames, *shape), dtype)
    counts[:, 3, 5::9] = np.iinfo(dtype).max
    counts[::2, 7, 63] = 255
    fast = FrameDecoder(shape, np.dtype(dtype), np.arange(100), np.ones(shape, bool), executor, 1)
    check(fast, counts, np.arange(100), np.ones(shape, bool), encoding, times=times)


@pytest.mark.parametrize("dtype", ["<u1", "<u2"])
def test_dense_frames_outlast_the_narrow_accumulators(executor: ThreadPoolExecutor, dtype: str) -> None:
    """Rows and columns of the most there is, more of them than a narrow sum could take."""
    shape = (300, 520)
    frames = np.full((3, *shape), np.iinfo(dtype).max, dtype)
    fast = FrameDecoder(shape, np.dtype(dtype), np.arange(7), np.ones(shape, bool), executor, 1)
    for times in (1, 90):
        fast.forget()
        check(fast, frames, np.arange(7), np.ones(shape, bool), Encoding.RAW, times=times)


def test_bright_field_pixels_in_any_places(executor: ThreadPoolExecutor) -> None:
    shape, rng = (40, 96), np.random.default_rng(8)
    good = np.ones(shape, bool)
    frames = np.stack([rng.poisson(mean, shape) for mean in (0.1, 3)]).astype("<u2")
    for bright in ([], [0], [3839], [62, 63, 64, 65, 128], range(3840), range(0, 3840, 2), range(64, 128)):
        for encoding in (Encoding.BSLZ4, Encoding.RAW):
            bf = np.array(bright, np.int64)
            check(FrameDecoder(shape, np.dtype("<u2"), bf, good, executor, 1), frames, bf, good, encoding)


def test_raw_frames_at_odd_addresses(executor: ThreadPoolExecutor) -> None:
    frames = np.random.default_rng(0).integers(0, 1000, (3, 12, 20)).astype("<u2")
    bright, good = np.arange(30, 90), np.ones((12, 20), bool)
    payload = b"x" + frames.tobytes()
    block = payload_block([payload], [0], Encoding.RAW).take(np.zeros(3, np.int64))
    block.offsets[:], block.sizes[:] = 1 + 480 * np.arange(3), 480
    fast = FrameDecoder((12, 20), np.dtype("<u2"), bright, good, executor, 1)
    rows, sums = np.zeros((3, 60), "<u2"), np.zeros((3, 4), np.int64)
    assert not fast.decode(block, np.arange(3), rows, sums).any()
    np.testing.assert_array_equal(rows, frames.reshape(3, -1)[:, bright])
    np.testing.assert_array_equal(sums[:, TOTAL], frames.sum(axis=(1, 2)))


def test_the_mean_pattern_while_another_thread_decodes(executor: ThreadPoolExecutor) -> None:
    """Whenever it is taken, it is the mean of whole frames: equal ones here, so always the same."""
    shape = (192, 192)
    rng = np.random.default_rng(6)
    frame = rng.poisson(0.3, shape).astype("<u1")
    block = payload_block([encode(frame, Encoding.BSLZ4)] * 400, range(400), Encoding.BSLZ4)
    fast = FrameDecoder(shape, np.dtype("<u1"), np.arange(50), np.ones(shape, bool), executor, 1)
    rows, sums = np.zeros((400, 50), "<u1"), np.zeros((400, 4), np.int64)
    fast.decode(block, np.arange(400), rows, sums)
    done = Event()

    def decode() -> None:
        while not done.is_set():
            fast.decode(block, np.arange(400), rows, sums)

    job = executor.submit(decode)
    try:
        for _ in range(50):
            np.testing.assert_array_equal(fast.mean_pattern(), frame)
    finally:
        done.set()
        job.result()
    assert fast.frames >= 400
