"""The compiled decoder against NumPy and the plain decoder: every encoding, dtype, shape and mask, and damage."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import lz4.block
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.codec import bitshuffle_library, decode, encode
from detectors.errors import ProtocolError
from detectors.messages import Encoding
from stream.decode import FrameDecoder
from stream.unpack import BRIGHT_FIELD, MOMENT_COLUMN, MOMENT_ROW, REASONS, TOTAL
from tests.data_helpers import payload_block

DTYPES = ["<u1", "<u2", "<u4", "<f4"]
#: Tails that fill no group of 8 pixels, frames of less than one block and of several, blocks that end within a row.
SHAPES = [(1, 1), (1, 7), (3, 5), (8, 8), (13, 17), (64, 64), (67, 131), (96, 130)]
GUARD = 3


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def frames_of(shape: tuple[int, int], dtype: str, kind: str, count: int, seed: int = 0) -> np.ndarray:
    """``kind``: sparse (single counts), dense, full (the largest values there are), or zero."""
    rng, size = np.random.default_rng(seed), (count, *shape)
    if kind == "zero":
        return np.zeros(size, dtype)
    if kind == "sparse":
        return rng.poisson(0.02, size).astype(dtype)
    if kind == "striped":  # blocks of both kinds in one frame
        return np.where(np.arange(shape[0])[:, None] % 64 < 32, rng.poisson(0.01, size), 250).astype(dtype)
    if dtype == "<f4":
        return rng.normal(0, 1e3, size).astype(dtype)
    top = np.iinfo(dtype).max
    return np.full(size, top, dtype) if kind == "full" else rng.integers(0, top, size, dtype, endpoint=True)


def decoder(
    executor: ThreadPoolExecutor, shape: tuple[int, int], dtype: str, seed: int = 0, threads: int = 1
) -> tuple[FrameDecoder, np.ndarray, np.ndarray]:
    """A decoder with random bright-field pixels and mask; returns both too: flat indices, bool ``shape``."""
    rng = np.random.default_rng(seed)
    good = rng.random(shape) > 0.05
    bright = np.flatnonzero((rng.random(shape) > 0.6) & good)
    return FrameDecoder(shape, np.dtype(dtype), bright, good, executor, threads), bright, good


class Rows:
    """Guarded targets for decoded frames: rows and sums with cells around them that nothing may touch."""

    def __init__(self, positions: int, pixels: int, decoder: FrameDecoder) -> None:
        self.block = np.full((positions + 2 * GUARD, pixels), 77, decoder.dtype)
        self.sums = np.full((positions + 2 * GUARD, 4), -77, decoder.sums_dtype)

    def check(self, positions: int) -> None:
        for array, mark in ((self.block, 77), (self.sums, -77)):
            assert (array[:GUARD] == mark).all()
            assert (array[GUARD + positions :] == mark).all()


def check_sums(sums: np.ndarray, frames: np.ndarray, bright: np.ndarray, good: np.ndarray) -> None:
    exact = np.where(good, frames, 0).astype(np.float64)
    flat = exact.reshape(len(frames), -1)
    row, column = np.indices(frames.shape[1:])
    tolerance = {"rtol": 1e-9, "atol": 1e-6 * max(1.0, float(np.abs(flat).max()))} if frames.dtype.kind == "f" else {}
    for at, expected in (
        (TOTAL, flat.sum(axis=1)),
        (BRIGHT_FIELD, flat[:, bright].sum(axis=1)),
        (MOMENT_ROW, (exact * row).sum(axis=(1, 2))),
        (MOMENT_COLUMN, (exact * column).sum(axis=(1, 2))),
    ):
        np.testing.assert_allclose(sums[:, at], expected, **{"rtol": 1e-13, **tolerance})


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_frame(
    executor: ThreadPoolExecutor, shape: tuple[int, int], dtype: str, encoding: Encoding
) -> None:
    kinds = ("sparse", "dense", "striped", "full", "zero", "sparse")
    frames = np.concatenate([frames_of(shape, dtype, kind, 2, seed) for seed, kind in enumerate(kinds)])
    payloads = [encode(frame, encoding) for frame in frames]
    for payload, frame in zip(payloads, frames, strict=True):
        np.testing.assert_array_equal(decode(payload, encoding, shape, np.dtype(dtype)), frame)
    fast, bright, good = decoder(executor, shape, dtype)
    rows = Rows(len(frames), len(bright), fast)
    order = np.random.default_rng(1).permutation(len(frames))
    block = payload_block(payloads, range(len(frames)), encoding)
    status = fast.decode(block, GUARD + order, rows.block, rows.sums)
    assert not status.any()
    rows.check(len(frames))
    np.testing.assert_array_equal(rows.block[GUARD + order], frames.reshape(len(frames), -1)[:, bright])
    check_sums(rows.sums[GUARD + order], frames, bright, good)
    mean = np.where(good, frames, 0).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(fast.mean_pattern(), mean, rtol=1e-12, atol=1e-9)
    fast.forget()
    assert not fast.mean_pattern().any()
    assert fast.frames == 0


def bitshuffled(frame: np.ndarray, block_bytes: int, header: int | None = None) -> bytes:
    """A bslz4 payload with blocks of another size than usual."""
    library, elements = bitshuffle_library(), block_bytes // frame.itemsize
    out = np.empty(library.bshuf_compress_lz4_bound(frame.size, frame.itemsize, elements) + 12, np.uint8)
    size = library.bshuf_compress_lz4(frame.ctypes.data, out.ctypes.data, frame.size, frame.itemsize, elements)
    assert size > 0
    return struct.pack(">QI", frame.nbytes, block_bytes if header is None else header) + out[:size].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [1, 8, 24, 500])
def test_blocks_of_other_sizes(executor: ThreadPoolExecutor, dtype: str, blocks: int) -> None:
    shape, group = (41, 43), 8 * np.dtype(dtype).itemsize
    frames = np.concatenate([frames_of(shape, dtype, kind, 1) for kind in ("sparse", "dense", "striped")])
    fast, bright, good = decoder(executor, shape, dtype)
    rows = Rows(3, len(bright), fast)
    payloads = [bitshuffled(frame, blocks * group) for frame in frames]
    status = fast.decode(payload_block(payloads, range(3), Encoding.BSLZ4), GUARD + np.arange(3), rows.block, rows.sums)
    assert not status.any()
    np.testing.assert_array_equal(rows.block[GUARD:-GUARD], frames.reshape(3, -1)[:, bright])
    check_sums(rows.sums[GUARD:-GUARD], frames, bright, good)


def test_a_block_size_of_zero_means_the_usual_one(executor: ThreadPoolExecutor) -> None:
    frames = frames_of((96, 130), "<u2", "dense", 1)
    fast, bright, _ = decoder(executor, (96, 130), "<u2")
    rows = Rows(1, len(bright), fast)
    block = payload_block([bitshuffled(frames[0], 8192, header=0)], [0], Encoding.BSLZ4)
    assert not fast.decode(block, np.array([GUARD]), rows.block, rows.sums).any()
    np.testing.assert_array_equal(rows.block[GUARD], frames[0].ravel()[bright])


def test_many_threads_share_a_block(executor: ThreadPoolExecutor) -> None:
    frames = frames_of((13, 17), "<u2", "dense", 100)
    fast, bright, good = decoder(executor, (13, 17), "<u2", threads=3)
    rows = Rows(100, len(bright), fast)
    payloads = [encode(frame, Encoding.LZ4) for frame in frames]
    payloads[40] = payloads[40][:-3]
    status = fast.decode(
        payload_block(payloads, range(100), Encoding.LZ4), GUARD + np.arange(100), rows.block, rows.sums
    )
    sound = np.arange(100) != 40
    np.testing.assert_array_equal(status == 0, sound)
    np.testing.assert_array_equal(rows.block[GUARD:-GUARD][sound], frames.reshape(100, -1)[sound][:, bright])
    assert fast.frames == 99
    np.testing.assert_allclose(fast.mean_pattern(), np.where(good, frames[sound], 0).mean(axis=0))


def test_an_empty_block(executor: ThreadPoolExecutor) -> None:
    fast, bright, _ = decoder(executor, (3, 5), "<u2")
    rows = Rows(1, len(bright), fast)
    status = fast.decode(payload_block([], [], Encoding.RAW), np.zeros(0, np.int64), rows.block, rows.sums)
    assert len(status) == 0


def test_the_mean_pattern_outlasts_its_narrow_accumulators(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts are added in 32 bits and moved on before they can overflow."""
    monkeypatch.setattr("stream.decode._FLUSH_FRAMES", 8)
    frames = frames_of((3, 5), "<u2", "full", 6)
    fast, bright, good = decoder(executor, (3, 5), "<u2")
    fast._workers[0].pattern[:] = 0
    rows = Rows(6, len(bright), fast)
    block = payload_block([encode(frame, Encoding.RAW) for frame in frames], range(6), Encoding.RAW)
    for _ in range(5):
        assert not fast.decode(block, GUARD + np.arange(6), rows.block, rows.sums).any()
        assert fast._workers[0].frames < 8
    np.testing.assert_allclose(fast.mean_pattern(), np.where(good, 65535.0, 0))


def test_masked_pixels_that_are_not_numbers(executor: ThreadPoolExecutor) -> None:
    """A detector may mark dead pixels with NaN; masked, they do no harm."""
    frames = frames_of((8, 8), "<f4", "dense", 1)
    fast, bright, good = decoder(executor, (8, 8), "<f4")
    frames[0][~good] = np.nan
    rows = Rows(1, len(bright), fast)
    block = payload_block([encode(frames[0], Encoding.BSLZ4)], [0], Encoding.BSLZ4)
    assert not fast.decode(block, np.array([GUARD]), rows.block, rows.sums).any()
    check_sums(rows.sums[GUARD:-GUARD], frames, bright, good)
    assert np.isfinite(fast.mean_pattern()).all()


# damage


def damaged_payloads() -> dict[str, tuple[Encoding, bytes]]:
    frame = frames_of((13, 17), "<u2", "dense", 1)[0]
    raw, packed, shuffled = (encode(frame, encoding) for encoding in (Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4))
    group = 16
    return {
        "raw, empty": (Encoding.RAW, b""),
        "raw, short": (Encoding.RAW, raw[:-1]),
        "raw, long": (Encoding.RAW, raw + b"\0"),
        "lz4, empty": (Encoding.LZ4, b""),
        "lz4, short": (Encoding.LZ4, packed[:-1]),
        "lz4, too much": (Encoding.LZ4, lz4.block.compress(raw + b"12", store_size=False)),
        "lz4, too little": (Encoding.LZ4, lz4.block.compress(raw[:-2], store_size=False)),
        "bslz4, empty": (Encoding.BSLZ4, b""),
        "bslz4, no header": (Encoding.BSLZ4, shuffled[:11]),
        "bslz4, header only": (Encoding.BSLZ4, shuffled[:12]),
        "bslz4, short": (Encoding.BSLZ4, shuffled[:-1]),
        "bslz4, long": (Encoding.BSLZ4, shuffled + b"\0"),
        "bslz4, wrong size": (Encoding.BSLZ4, struct.pack(">Q", frame.nbytes + 2) + shuffled[8:]),
        "bslz4, huge size": (Encoding.BSLZ4, b"\xff" * 8 + shuffled[8:]),
        "bslz4, odd block": (Encoding.BSLZ4, shuffled[:8] + struct.pack(">I", group + 2) + shuffled[12:]),
        "bslz4, huge block": (Encoding.BSLZ4, shuffled[:8] + struct.pack(">I", 0xFFFFFFF0) + shuffled[12:]),
        "bslz4, tiny block": (Encoding.BSLZ4, shuffled[:8] + struct.pack(">I", group) + shuffled[12:]),
        "bslz4, huge length": (Encoding.BSLZ4, shuffled[:12] + b"\xff\xff\xff\xff" + shuffled[16:]),
        "bslz4, length of zero": (Encoding.BSLZ4, shuffled[:12] + b"\0\0\0\0" + shuffled[16:]),
        "raw pixels called lz4": (Encoding.LZ4, raw),
        "lz4 called bslz4": (Encoding.BSLZ4, packed),
    }


@pytest.mark.parametrize("name", damaged_payloads())
def test_damaged_payloads(executor: ThreadPoolExecutor, name: str) -> None:
    encoding, payload = damaged_payloads()[name]
    if name != "bslz4, huge block":  # absurd but harmless: the plain decoder takes it
        with pytest.raises(ProtocolError):
            decode(payload, encoding, (13, 17), np.dtype("<u2"))
    fast, bright, _ = decoder(executor, (13, 17), "<u2")
    rows = Rows(2, len(bright), fast)
    good = frames_of((13, 17), "<u2", "dense", 1, seed=5)[0]
    # twice, with a sound frame after it: damage must leave nothing behind
    for _ in range(2):
        block = payload_block([payload, encode(good, encoding)], [0, 1], encoding)
        status = fast.decode(block, GUARD + np.arange(2), rows.block, rows.sums)
        assert int(status[0]) in REASONS
        assert status[1] == 0
    rows.check(2)
    assert fast.frames == 2
    np.testing.assert_array_equal(rows.block[GUARD + 1], good.ravel()[bright])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    encoding=st.sampled_from([Encoding.LZ4, Encoding.BSLZ4]),
    dtype=st.sampled_from(["<u1", "<u2"]),
    kind=st.sampled_from(["sparse", "dense"]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    keep=st.floats(0, 1),
    tail=st.binary(max_size=8),
)
def test_damage_never_gets_out_of_the_frame(
    encoding: Encoding, dtype: str, kind: str, flips: list[tuple[float, int]], keep: float, tail: bytes
) -> None:
    """Whatever bytes come: a reason or a frame, the same as the plain decoder's, and nothing else is written."""
    shape = (37, 41)
    frames = frames_of(shape, dtype, kind, 2)
    payload = bytearray(encode(frames[0], encoding))
    for where, value in flips:
        payload[int(where * min(len(payload), 200 if value % 2 else len(payload)))] = value
    payload = payload[: round(keep * len(payload))] if keep < 0.9 else payload
    payload += tail if keep < 0.5 else b""
    with ThreadPoolExecutor(1) as executor:
        fast, bright, good = decoder(executor, shape, dtype)
        rows = Rows(2, len(bright), fast)
        block = payload_block([bytes(payload), encode(frames[1], encoding)], [0, 1], encoding)
        status = fast.decode(block, GUARD + np.arange(2), rows.block, rows.sums)
    rows.check(2)
    assert status[1] == 0
    np.testing.assert_array_equal(rows.block[GUARD + 1], frames[1].ravel()[bright])
    check_sums(rows.sums[GUARD + 1 : GUARD + 2], frames[1:], bright, good)
    if status[0] == 0:
        taken = decode(bytes(payload), encoding, shape, np.dtype(dtype))
        np.testing.assert_array_equal(rows.block[GUARD], taken.ravel()[bright])
        check_sums(rows.sums[GUARD : GUARD + 1], taken[None], bright, good)
    else:
        assert int(status[0]) in REASONS
        with pytest.raises(ProtocolError):
            decode(bytes(payload), encoding, shape, np.dtype(dtype))
    mean = np.where(good, frames[1], 0).astype(float)
    if status[0] == 0:
        mean = (mean + np.where(good, taken, 0)) / 2
    np.testing.assert_allclose(fast.mean_pattern(), mean)
