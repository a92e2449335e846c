"""The compiled decoder against NumPy and the plain decoder: every encoding, dtype, shape and mask, and damage."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lz4.block
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.codec import bitshuffle_library, decode, encode
from detectors.errors import ConfigurationError, ProtocolError
from detectors.messages import Encoding, FrameBlock
from stream.decode import FrameDecoder
from stream.recording.payload_check import whole_frames
from stream.unpack import BRIGHT_FIELD, DAMAGED, MOMENT_COLUMN, MOMENT_ROW, REASONS, TOTAL, WRONG_SIZE
from tests.data_helpers import Case, feed, payload_block, running
from tests.merlin_oracle import encode_raw

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
    executor: ThreadPoolExecutor, shape: tuple[int, int], dtype: str, seed: int = 0, threads: int = 1, **options: bool
) -> tuple[FrameDecoder, np.ndarray, np.ndarray]:
    """A decoder with random bright-field pixels and mask; returns both too: flat indices, bool ``shape``."""
    rng = np.random.default_rng(seed)
    good = rng.random(shape) > 0.05
    bright = np.flatnonzero((rng.random(shape) > 0.6) & good)
    return FrameDecoder(shape, np.dtype(dtype), bright, good, executor, threads, **options), bright, good


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


ANY_PIXELS = [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4, Encoding.LZ4_BLOCKS, Encoding.RAW_BIG_ENDIAN]
MERLIN = {
    Encoding.MERLIN_1BIT: ("<u1", 1),
    Encoding.MERLIN_6BIT: ("<u1", 6),
    Encoding.MERLIN_12BIT: ("<u2", 12),
    Encoding.MERLIN_QUAD_1BIT: ("<u1", 1),
    Encoding.MERLIN_QUAD_6BIT: ("<u1", 6),
    Encoding.MERLIN_QUAD_12BIT: ("<u2", 12),
}


@pytest.mark.parametrize("encoding", ANY_PIXELS)
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
@pytest.mark.parametrize("blocks", [1, 8, 24, 500, (1 << 32) // 32 - 1])
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


#: PROTOCOLS' wire vectors, checked with DECTRIS' own decoder: a 3x3 and a 4x6 image of uint16.
SMALL = np.arange(9, dtype="<u2").reshape(3, 3)
DOT = np.zeros((4, 6), "<u2")
DOT[1, 2] = 1
VECTORS = [
    (SMALL, Encoding.BSLZ4, "0000000000000012 00002000 0000000d 43aaccf00001005000 00000000 0800"),
    (DOT, Encoding.BSLZ4, "0000000000000030 00002000 0000000d 3f0001000100155000 00000000"),
    (DOT, Encoding.LZ4, "1b0001001b0110000702005000 00000000"),
    (DOT, Encoding.LZ4_BLOCKS, "0000000000000030 00000030 00000011 1b0001001b0110000702005000 00000000"),
]


@pytest.mark.parametrize(("frame", "encoding", "text"), VECTORS)
def test_wire_vectors(executor: ThreadPoolExecutor, frame: np.ndarray, encoding: Encoding, text: str) -> None:
    payload = bytes.fromhex(text.replace(" ", ""))
    np.testing.assert_array_equal(decode(payload, encoding, frame.shape, frame.dtype), frame)
    check_decoded(executor, [payload], encoding, frame[None])


def check_decoded(
    executor: ThreadPoolExecutor,
    payloads: list[bytes],
    encoding: Encoding,
    frames: np.ndarray,
    minus: FrameBlock | None = None,
    **options: bool,
) -> None:
    """The compiled decoder's rows, sums and mean pattern are those of ``frames``."""
    fast, bright, good = decoder(executor, frames.shape[1:], frames.dtype.str, **options)
    rows = Rows(len(frames), len(bright), fast)
    block = replace(payload_block(payloads, range(len(frames)), encoding), minus=minus)
    assert not fast.decode(block, GUARD + np.arange(len(frames)), rows.block, rows.sums).any()
    rows.check(len(frames))
    np.testing.assert_array_equal(rows.block[GUARD:-GUARD], frames.reshape(len(frames), -1)[:, bright])
    check_sums(rows.sums[GUARD:-GUARD], frames, bright, good)
    mean = np.where(good, frames, 0).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(fast.mean_pattern(), mean, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_bytes", [8, 1000, 8192, 0xFFFFFFF0])
def test_lz4_blocks_of_other_sizes(executor: ThreadPoolExecutor, dtype: str, block_bytes: int) -> None:
    """Stored blocks too: of the size of their contents."""
    shape = (41, 43)
    frames = np.concatenate([frames_of(shape, dtype, kind, 1) for kind in ("sparse", "dense", "striped", "zero")])
    payloads, stored = [], 0
    for raw in (frame.tobytes() for frame in frames):
        payload = struct.pack(">QI", len(raw), block_bytes)
        for at in range(0, len(raw), block_bytes):
            contents = raw[at : at + block_bytes]
            packed = lz4.block.compress(contents, store_size=False)
            stored += len(packed) >= len(contents)
            packed = min(contents, packed, key=len)
            payload += struct.pack(">I", len(packed)) + packed
        payloads.append(payload)
    assert stored  # both kinds
    for payload, frame in zip(payloads, frames, strict=True):
        np.testing.assert_array_equal(decode(payload, Encoding.LZ4_BLOCKS, shape, np.dtype(dtype)), frame)
    check_decoded(executor, payloads, Encoding.LZ4_BLOCKS, frames)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<f4"])
def test_big_endian_pixels_are_what_numpy_says(executor: ThreadPoolExecutor, dtype: str) -> None:
    frames = frames_of((13, 17), dtype, "dense", 3)
    payloads = [frame.astype(frame.dtype.newbyteorder(">")).tobytes() for frame in frames]
    assert [encode(frame, Encoding.RAW_BIG_ENDIAN) for frame in frames] == payloads
    check_decoded(executor, payloads, Encoding.RAW_BIG_ENDIAN, frames)


# Merlin's raw modes


@pytest.mark.parametrize("encoding", MERLIN)
@pytest.mark.parametrize("shape", [(2, 128), (10, 384), (256, 256), (512, 512)])
def test_merlin_raw_modes(executor: ThreadPoolExecutor, shape: tuple[int, int], encoding: Encoding) -> None:
    dtype, bits = MERLIN[encoding]
    frames = np.random.default_rng(bits).integers(0, 1 << bits, (2, *shape), dtype)
    payloads = [encode_raw(frame, bits, quad=encoding.name.startswith("MERLIN_QUAD")) for frame in frames]
    assert [encode(frame, encoding) for frame in frames] == payloads
    np.testing.assert_array_equal(decode(payloads[1], encoding, shape, np.dtype(dtype)), frames[1])
    check_decoded(executor, payloads, encoding, frames)


@pytest.mark.parametrize("encoding", MERLIN)
def test_any_merlin_payload_comes_back(encoding: Encoding) -> None:
    """Also with bits set that the mode does not have."""
    dtype, bits = MERLIN[encoding]
    size = 128 * 4 // 8 if bits == 1 else 128 * 4 * np.dtype(dtype).itemsize
    payload = np.random.default_rng(0).bytes(size)
    frame = decode(payload, encoding, (4, 128), np.dtype(dtype))
    assert encode(frame, encoding, fitting=False) == payload
    if bits > 1:
        with pytest.raises(ConfigurationError, match=f"raw {bits}-bit frames: a pixel of this frame counts"):
            encode(frame, encoding)


@pytest.mark.parametrize("encoding", MERLIN)
def test_merlin_frames_that_cannot_be(executor: ThreadPoolExecutor, encoding: Encoding) -> None:
    dtype, _ = MERLIN[encoding]
    other = "<u2" if dtype == "<u1" else "<u1"
    odd = (3, 128) if encoding.name.startswith("MERLIN_QUAD") else (3, 130)
    for shape, its_dtype in (((4, 128), other), ((4, 128), "<f4"), ((4, 66), dtype), (odd, dtype)):
        frame = np.zeros(shape, its_dtype)
        with pytest.raises(ConfigurationError, match="use another encoding"):
            encode(frame, encoding)
        for size in (0, 1, frame.size // 8, frame.nbytes, frame.nbytes + 1):
            with pytest.raises(ProtocolError, match="Merlin's raw"):
                decode(bytes(size), encoding, shape, frame.dtype)
            fast, bright, _ = decoder(executor, shape, its_dtype)
            rows = Rows(1, len(bright), fast)
            status = fast.decode(payload_block([bytes(size)], [0], encoding), np.array([GUARD]), rows.block, rows.sums)
            assert status.tolist() == [WRONG_SIZE]


@pytest.mark.parametrize(("name", "shape", "header", "encoding"), [
    ("Single", (256, 256), 384, Encoding.MERLIN_1BIT),
    ("Quad", (512, 512), 768, Encoding.MERLIN_QUAD_1BIT),
])  # fmt: skip
def test_real_raw_and_binary_frames_are_alike(
    shared_data: Path, name: str, shape: tuple[int, int], header: int, encoding: Encoding
) -> None:
    """Of two exposures, one a format: most electrons hit the same pixels, as the lit ones are few and bright."""
    path = shared_data / "streams" / "merlin_mib" / "Merlin_Single_Quad.zip"
    if not path.exists():
        pytest.skip(f"no {path}")
    with zipfile.ZipFile(path) as file:
        raw, binary = (file.read(f"{name}_1_Frame_CounterDepth_1_Rows_256{end}.mib")[header:] for end in ("RAW", ""))
    lit = decode(raw, encoding, shape, np.dtype("u1")) > 0
    expected = np.frombuffer(binary, np.uint8).reshape(shape) > 0
    assert expected.mean() > 0.02
    assert (lit == expected).mean() > 0.999


# pixels that are no counts


def with_maxima(frames: np.ndarray) -> np.ndarray:
    """A gap between two chips, whole rows of the largest value, and single such pixels; others come close."""
    out = frames.copy()
    top = np.iinfo(frames.dtype).max
    out[:, len(out[0]) // 2 :][:, :3] = top
    rng = np.random.default_rng(4)
    out[rng.random(out.shape) < 0.002] = top
    out[rng.random(out.shape) < 0.002] = top - 1
    out[rng.random(out.shape) < 0.002] = top ^ 4
    return out


@pytest.mark.parametrize("encoding", ANY_PIXELS)
@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
@pytest.mark.parametrize("shape", [(1, 7), (13, 17), (64, 64), (96, 130)])
def test_the_largest_value_counts_as_nothing(
    executor: ThreadPoolExecutor, shape: tuple[int, int], dtype: str, encoding: Encoding
) -> None:
    kinds = ("sparse", "dense", "striped", "full", "zero", "sparse")
    frames = np.concatenate([frames_of(shape, dtype, kind, 2, seed) for seed, kind in enumerate(kinds)])
    frames[:4] = with_maxima(frames[:4])
    frames[-2:] = with_maxima(frames[-2:])
    payloads = [encode(frame, encoding) for frame in frames]
    check_decoded(executor, payloads, encoding, frames)
    expected = np.where(frames == np.iinfo(dtype).max, 0, frames).astype(dtype)
    check_decoded(executor, payloads, encoding, expected, maximum_is_masked=True)


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.BSLZ4])
def test_the_engine_does_not_count_the_largest_value(encoding: Encoding) -> None:
    case = Case()
    counts = case.counts()
    gap = np.zeros(case.detector, bool)
    gap[5:7] = True  # through the disk
    objects = []
    for in_gap, masked in ((65535, True), (0, False), (65535, False)):
        with running(case.setup(maximum_is_masked=masked)) as engine:
            feed(engine, np.where(gap, in_gap, counts).astype(case.dtype), encoding=encoding)
            engine.finish()
            objects.append(engine.object())
    np.testing.assert_array_equal(objects[0], objects[1])
    assert not np.allclose(objects[2], objects[1])


def test_floats_have_no_largest_value(executor: ThreadPoolExecutor) -> None:
    frames = frames_of((8, 8), "<f4", "dense", 2)
    frames[0, 3] = np.finfo("f4").max
    payloads = [encode(frame, Encoding.BSLZ4) for frame in frames]
    check_decoded(executor, payloads, Encoding.BSLZ4, frames, maximum_is_masked=True)


def test_the_largest_bits_of_sparse_counts(executor: ThreadPoolExecutor) -> None:
    frames = np.zeros((2, 64, 64), "<u4")
    frames[0, 5, 6], frames[0, 50, 60], frames[1, 0, 0] = 1 << 31, 0xFFFFFFFF, 0xFFFFFFFE
    check_decoded(executor, [encode(frame, Encoding.BSLZ4) for frame in frames], Encoding.BSLZ4, frames)


# the difference of two channels


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("encoding", "other"), [
    (Encoding.BSLZ4, Encoding.BSLZ4),
    (Encoding.LZ4_BLOCKS, Encoding.RAW),
    (Encoding.RAW_BIG_ENDIAN, Encoding.BSLZ4),
])  # fmt: skip
def test_the_difference_of_two_channels(
    executor: ThreadPoolExecutor, encoding: Encoding, other: Encoding, dtype: str, masked: bool
) -> None:
    low, high = (
        np.concatenate([frames_of((13, 17), dtype, kind, 2, seed + i) for i, kind in enumerate(kinds)])
        for seed, kinds in ((0, ("dense", "sparse", "dense")), (7, ("dense", "sparse", "sparse")))
    )
    if dtype != "<f4":
        low[:2], high[1:4] = with_maxima(low[:2]), with_maxima(high[1:4])
    expected = np.where(low > high, low - high, 0).astype(dtype)
    if masked and dtype != "<f4":
        top = np.iinfo(dtype).max
        assert (high == top).any()
        expected[(low == top) | (high == top)] = 0
    minus = payload_block([encode(frame, other) for frame in high], range(len(high)), other)
    payloads = [encode(frame, encoding) for frame in low]
    check_decoded(executor, payloads, encoding, expected, minus, maximum_is_masked=masked)


def test_a_damaged_subtrahend(executor: ThreadPoolExecutor) -> None:
    frames = frames_of((13, 17), "<u2", "dense", 40)
    fast, bright, _ = decoder(executor, (13, 17), "<u2", threads=2)
    payloads = [encode(frame, Encoding.BSLZ4) for frame in frames]
    minus = payload_block([payloads[0], payloads[1][:-2], *payloads[2:]], range(40), Encoding.BSLZ4)
    minus.offsets[2] = 1 << 40
    block = replace(payload_block(payloads, range(40), Encoding.BSLZ4), minus=minus)
    rows = Rows(40, len(bright), fast)
    status = fast.decode(block, GUARD + np.arange(40), rows.block, rows.sums)
    assert status.tolist() == [0, DAMAGED, WRONG_SIZE] + [0] * 37
    assert not rows.block[GUARD:-GUARD][status == 0].any()  # each minus itself
    assert not fast.mean_pattern().any()
    with pytest.raises(ValueError, match="39 frames to be subtracted from 40"):
        fast.decode(replace(block, minus=minus.take(np.arange(39))), GUARD + np.arange(40), rows.block, rows.sums)


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
    group, blocks = 16, encode(frame, Encoding.LZ4_BLOCKS)
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
        "bslz4, tiny block": (Encoding.BSLZ4, shuffled[:8] + struct.pack(">I", group) + shuffled[12:]),
        "bslz4, huge length": (Encoding.BSLZ4, shuffled[:12] + b"\xff\xff\xff\xff" + shuffled[16:]),
        "bslz4, length of zero": (Encoding.BSLZ4, shuffled[:12] + b"\0\0\0\0" + shuffled[16:]),
        "big-endian, short": (Encoding.RAW_BIG_ENDIAN, raw[:-1]),
        "blocks, empty": (Encoding.LZ4_BLOCKS, b""),
        "blocks, header only": (Encoding.LZ4_BLOCKS, blocks[:12]),
        "blocks, short": (Encoding.LZ4_BLOCKS, blocks[:-1]),
        "blocks, long": (Encoding.LZ4_BLOCKS, blocks + b"\0"),
        "blocks, wrong size": (Encoding.LZ4_BLOCKS, struct.pack(">Q", frame.nbytes + 2) + blocks[8:]),
        "blocks, huge size": (Encoding.LZ4_BLOCKS, b"\xff" * 8 + blocks[8:]),
        "blocks of nothing": (Encoding.LZ4_BLOCKS, blocks[:8] + bytes(4) + blocks[12:]),
        "blocks, tiny": (Encoding.LZ4_BLOCKS, blocks[:8] + struct.pack(">I", 1) + blocks[12:]),
        "blocks, huge length": (Encoding.LZ4_BLOCKS, blocks[:12] + b"\xff\xff\xff\xff" + blocks[16:]),
        "blocks, length of zero": (Encoding.LZ4_BLOCKS, blocks[:12] + b"\0\0\0\0" + blocks[16:]),
        "lz4 called blocks": (Encoding.LZ4_BLOCKS, packed),
        "raw pixels called lz4": (Encoding.LZ4, raw),
        "lz4 called bslz4": (Encoding.BSLZ4, packed),
    }


@pytest.mark.parametrize("name", damaged_payloads())
def test_damaged_payloads(executor: ThreadPoolExecutor, name: str) -> None:
    encoding, payload = damaged_payloads()[name]
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


def test_payloads_outside_their_slab_and_unknown_encodings(executor: ThreadPoolExecutor) -> None:
    fast, bright, _ = decoder(executor, (13, 17), "<u2")
    for encoding in [*Encoding, 99]:
        where = np.array([-1, 1, 10, 1 << 62, 0, 0]), np.array([442, 442, -442, 442, 1 << 62, -(1 << 62)])
        block = FrameBlock(7, encoding, np.arange(6), *where, np.zeros(442, np.uint8))  # type: ignore[arg-type]
        rows = Rows(6, len(bright), fast)
        assert fast.decode(block, GUARD + np.arange(6), rows.block, rows.sums).tolist() == [WRONG_SIZE] * 6
        rows.check(6)
    block = replace(payload_block([bytes(442)], [0], Encoding.RAW), encoding=99)  # type: ignore[arg-type]
    assert fast.decode(block, np.array([GUARD]), rows.block, rows.sums).tolist() == [WRONG_SIZE]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    encoding=st.sampled_from([Encoding.LZ4, Encoding.BSLZ4, Encoding.LZ4_BLOCKS]),
    dtype=st.sampled_from(["<u1", "<u2", "<u4"]),
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
        assert not whole_frames(block, shape, np.dtype(dtype))[0]
        if encoding is not Encoding.BSLZ4:  # there, the library lets pass what the format forbids: test_decode_fuzz.py
            with pytest.raises(ProtocolError):
                decode(bytes(payload), encoding, shape, np.dtype(dtype))
    mean = np.where(good, frames[1], 0).astype(float)
    if status[0] == 0:
        mean = (mean + np.where(good, taken, 0)) / 2
    np.testing.assert_allclose(fast.mean_pattern(), mean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_masked_pixels_are_not_unpacked(executor: ThreadPoolExecutor, dtype: str) -> None:
    """They hold no pixel that is wanted: not even damage in them is noticed, and damage elsewhere is."""
    shape, kind = (96, 130), np.dtype(dtype)
    good = np.zeros(shape, bool)
    good[40:60, 30:90] = True
    bright = np.flatnonzero(good)[::3]
    frames = frames_of(shape, dtype, "sparse" if kind.kind == "u" else "dense", 2)
    payload = bytearray(encode(frames[0], Encoding.BSLZ4))
    blocks, at = [], 12  # where each block's packed bytes begin and end
    while at + 4 < len(payload):
        length = struct.unpack_from(">I", payload, at)[0]
        blocks.append((at + 4, at + 4 + length))
        at += 4 + length
    in_block = 8192 // kind.itemsize
    wanted = [good.ravel()[n * in_block : (n + 1) * in_block].any() for n in range(len(blocks))]
    assert any(wanted)
    assert not all(wanted) or kind.itemsize == 1
    for (start, stop), is_wanted in zip(blocks, wanted, strict=False):
        damaged = bytearray(payload)
        damaged[start:stop] = b"\xff" * (stop - start)
        case = FrameDecoder(shape, kind, bright, good, executor, 1)
        target = Rows(1, len(bright), case)
        (status,) = case.decode(
            payload_block([bytes(damaged)], range(1), Encoding.BSLZ4), np.array([GUARD]), target.block, target.sums
        )
        assert (status == DAMAGED) is is_wanted
        if not is_wanted:
            np.testing.assert_array_equal(target.block[GUARD], frames[0].ravel()[bright])
            check_sums(target.sums[GUARD : GUARD + 1], frames[:1], bright, good)
            target.check(1)
