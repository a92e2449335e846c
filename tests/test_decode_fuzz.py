"""Hostile bytes for the compiled decoder, odd sizes for the compiled contraction: in memory with nothing around it.

Both read and write unchecked addresses. Here every array lies right in front of, or behind, a page that cannot be
touched, so that one byte too far ends the process: hence a process of its own. More and other cases than the suite has
time for: ``python -c "from tests.test_decode_fuzz import *; hostile_payloads(SEED, COUNT)"``.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lz4.block
import numpy as np
import pytest

from detectors.codec import decode, encode
from detectors.errors import ProtocolError
from detectors.messages import Encoding, FrameBlock
from stream import contraction
from stream.array import Device, choose_device
from stream.contraction import Dense, Runs, Sums
from stream.decode import FrameDecoder
from stream.recording.payload_check import whole_frames
from stream.ring import RowRing
from stream.unpack import BRIGHT_FIELD, DAMAGED, NO_NUMBER, OK, TOTAL
from tests.data_helpers import payload_block
from tests.gpu_fuzz import damaged, unpack
from tests.test_decode import bitshuffled, frames_of

#: (shape, dtype, bytes of a block): tails, blocks of one group and of whole words, more planes than are counted.
FORMS = [
    ((1, 7), "<u1", 8),
    ((8, 8), "<u1", 64),
    ((3, 43), "<u1", 8),
    ((13, 17), "<u2", 64),
    ((64, 64), "<u1", 512),
    ((67, 131), "<u1", 8192),
    ((64, 130), "<u2", 8192),
    ((40, 64), "<u4", 2048),
    ((40, 64), "<f4", 2048),
]


# LZ4 by hand


def block_of(sequences: Sequence[tuple[bytes, int, int]], last: bytes) -> bytes:
    """An LZ4 block: (literals, offset, length of the match) one after another, then ``last`` literals."""

    def extended(value: int) -> bytes:
        return b"" if value < 15 else b"\xff" * ((value - 15) // 255) + bytes([(value - 15) % 255])

    out = b""
    for literals, offset, match in sequences:
        out += bytes([min(15, len(literals)) << 4 | min(15, match - 4)]) + extended(len(literals)) + literals
        out += struct.pack("<H", offset) + extended(match - 4)
    return out + bytes([min(15, len(last)) << 4]) + extended(len(last)) + last


def hand_made() -> dict[str, tuple[list[tuple[bytes, int, int]], int, bool]]:
    """(sequences, last literals, is it sound) of blocks of 1024 bytes, some smaller than a third of that."""
    noise = np.random.default_rng(3).integers(1, 256, 1024, np.uint8).tobytes()
    return {
        "sparse": ([(b"\1", 1, 900)], 123, True),
        "dense": ([(noise[:700], 300, 200)], 124, True),
        "an offset of 0, sparse": ([(b"\1", 0, 900)], 123, False),
        "an offset of 0, dense": ([(noise[:700], 0, 200)], 124, False),
        "an offset of 0 at the beginning": ([(b"", 0, 900)], 124, False),
        "as far back as can be": ([(noise[:20], 20, 900)], 104, True),
        "before the beginning, sparse": ([(noise[:20], 21, 900)], 104, False),
        "before the beginning, dense": ([(noise[:700], 701, 200)], 124, False),
        "at the very beginning": ([(b"", 1, 900)], 124, False),
        "five last literals, sparse": ([(b"\1", 1, 1018)], 5, True),
        "four last literals, sparse": ([(b"\1", 1, 1019)], 4, False),
        "five last literals, dense": ([(noise[:992], 500, 27)], 5, True),
        # A match that the library copies before it looks at the end.
        "four last literals, dense": ([(noise[:600], 500, 388), (noise[:14], 500, 18)], 4, False),
        "a match in the last twelve bytes": ([(b"\1", 1, 1012), (b"", 1, 4)], 7, False),
        "a match before them": ([(b"\1", 1, 1011), (b"", 1, 4)], 8, True),
        "too short": ([(b"\1", 1, 900)], 122, False),
        "too long": ([(b"\1", 1, 900)], 124, False),
    }


@pytest.mark.parametrize("name", hand_made())
def test_rules_of_lz4(name: str) -> None:
    """The decoder and the check go by the letter of the format, whichever loop unpacks a block."""
    sequences, last, sound = hand_made()[name]
    block = block_of(sequences, bytes(range(1, 1 + last)))
    assert (unpack(block, 1024) is not None) == sound
    payload = struct.pack(">QII", 1024, 8192, len(block)) + block
    shape, dtype = (8, 128), np.dtype("u1")
    frame = payload_block([payload], [0], Encoding.BSLZ4)
    rows, sums = np.zeros((1, 1024), dtype), np.zeros((1, 4), np.int64)
    with ThreadPoolExecutor(1) as executor:
        fast = FrameDecoder(shape, dtype, np.arange(1024), np.ones(shape, bool), executor, 1)
        (status,) = fast.decode(frame, np.array([0]), rows, sums)
    assert status == (OK if sound else DAMAGED)
    assert whole_frames(frame, shape, dtype).tolist() == [sound]
    if sound:
        np.testing.assert_array_equal(rows[0], decode(payload, Encoding.BSLZ4, shape, dtype).ravel())


# with guards


def guarded(array: np.ndarray, front: bool = False) -> np.ndarray:
    """A copy that ends where memory ends, or begins where it begins."""
    page = mmap.PAGESIZE
    room = max(1, -(-array.nbytes // page)) * page
    base = np.frombuffer(mmap.mmap(-1, room + 2 * page), np.uint8)
    for at in (0, page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base.ctypes.data + at), page, 0) == 0
    at = page if front else page + room - array.nbytes
    copy = base[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def guard(decoder: FrameDecoder) -> None:
    """Everything that the decoder reads and writes is guarded."""

    def fields(of: Any) -> Any:
        return of._replace(**{k: guarded(v) for k, v in of._asdict().items() if isinstance(v, np.ndarray)})

    decoder._plan = fields(decoder._plan)
    for worker in decoder._workers:
        frame, other, planes = worker.scratch
        words = guarded(planes.words)
        planes = planes._replace(
            words=words, data=words.view(np.uint8), ends=guarded(planes.ends), ones=guarded(planes.ones)
        )
        worker.scratch = guarded(frame), guarded(other), planes
        worker.mean = fields(worker.mean)


def payload_of(rng: np.random.Generator, frame: np.ndarray, encoding: Encoding, block_bytes: int) -> bytes:
    """The frame in blocks of any compressor's making."""
    if encoding == Encoding.LZ4:
        return lz4.block.compress(frame, store_size=False, **compressor(rng))
    if encoding == Encoding.LZ4_BLOCKS:
        return encode(frame, encoding)
    chunk = bitshuffled(frame, block_bytes)
    packed = frame.nbytes - frame.nbytes % (8 * frame.itemsize)
    return chunk[:12] + b"".join(
        struct.pack(">I", len(new)) + new
        for old, wanted in blocks_of(chunk, packed)
        for new in [lz4.block.compress(lz4.block.decompress(old, wanted), store_size=False, **compressor(rng))]
    ) + chunk[len(chunk) - (frame.nbytes - packed) :]  # fmt: skip


def compressor(rng: np.random.Generator) -> dict[str, Any]:
    if rng.integers(2):
        return {"mode": "high_compression", "compression": int(rng.integers(1, 13))}
    return {"mode": "fast", "acceleration": int(rng.integers(1, 9))}


def blocks_of(chunk: bytes, packed: int) -> list[tuple[bytes, int]]:
    """(LZ4 block, bytes in it) of a chunk whose framing is sound."""
    block_bytes, at, found = struct.unpack_from(">I", chunk, 8)[0] or 8192, 12, []
    for first in range(0, packed, block_bytes):
        (size,) = struct.unpack_from(">I", chunk, at)
        found.append((chunk[at + 4 : at + 4 + size], min(block_bytes, packed - first)))
        at += 4 + size
    return found


def hostile(rng: np.random.Generator, payload: bytes, other: bytes, encoding: Encoding, packed: int) -> bytes:
    """The payload as it is, damaged, joined with another, or with damage in blocks of a sound framing."""
    kind = int(rng.integers(8))
    if kind == 0:
        return payload
    if kind == 1:
        return damaged(rng, payload)
    if kind == 2:
        cut = int(rng.integers(len(payload)))
        return payload[:cut] + other[min(cut, int(rng.integers(len(other)))) :]
    if kind == 3 and encoding != Encoding.LZ4:
        head = bytearray(payload)
        field, value = rng.choice([8, 12]), rng.choice([0, 1, 8, 64, 2**31 - 1, 2**31, 2**32 - 1, len(payload)])
        head[field : field + 4] = struct.pack(">I", value)
        return bytes(head)
    if encoding != Encoding.BSLZ4:
        return damaged(rng, payload)
    out, end = payload[:12], 12
    chosen = int(rng.integers(max(1, len(blocks_of(payload, packed)))))
    for number, (block, wanted) in enumerate(blocks_of(payload, packed)):
        end += 4 + len(block)
        if number == chosen:
            block = damaged(rng, block) if kind < 7 else rng.integers(0, 256, wanted // 2, np.uint8).tobytes()
        out += struct.pack(">I", len(block)) + block
    return out + payload[end:]


def is_sound(payload: bytes, encoding: Encoding, packed: int, nbytes: int) -> bool:
    """Whether all LZ4 blocks of a payload that the library takes keep to the format."""
    if encoding == Encoding.LZ4:
        return unpack(payload, nbytes) is not None
    return all(
        unpack(block, wanted) is not None or (encoding == Encoding.LZ4_BLOCKS and len(block) == wanted)
        for block, wanted in blocks_of(payload, packed)
    )


def hostile_payloads(seed: int, count: int) -> None:
    """Decode ``count`` payloads of each form and encoding, alone in memory; compare with the libraries."""
    rng = np.random.default_rng(seed)
    taken = refused = 0
    executor = ThreadPoolExecutor(1)  # one share: nothing is ever handed to it
    for number, (shape, dtype, block_bytes) in enumerate(FORMS):
        kind, good = np.dtype(dtype), np.ones(shape, bool)
        pixels = shape[0] * shape[1]
        bright = np.flatnonzero(rng.random(pixels) < 0.6)
        bright = bright if len(bright) else np.array([0])
        frames = [frames_of(shape, dtype, name, 1, seed)[0] for name in ("sparse", "dense", "zero", "striped")]
        for encoding in (Encoding.BSLZ4, Encoding.BSLZ4, Encoding.LZ4, Encoding.LZ4_BLOCKS):
            group = 8 * kind.itemsize if encoding == Encoding.BSLZ4 else 1
            packed = pixels * kind.itemsize // group * group
            sound = [payload_of(rng, frame, encoding, block_bytes) for frame in frames for _ in range(4)]
            fast = FrameDecoder(shape, kind, bright, good, executor, 1)
            guard(fast)
            rows = guarded(np.zeros((1, len(bright)), kind), front=bool(number % 2))
            sums = guarded(np.zeros((1, 4), fast.sums_dtype))
            slabs = [guarded(np.zeros(1 << 18, np.uint8), front) for front in (False, True)]
            for case in range(count):
                payload = hostile(rng, *(sound[i] for i in rng.integers(len(sound), size=2)), encoding, packed)
                size = len(payload)
                # Right in front of the end, with or without bytes before it; or at the beginning, and nothing behind.
                place = case % 3
                slab = slabs[0] if place == 0 else slabs[0][len(slabs[0]) - size :] if place == 1 else slabs[1][:size]
                at = len(slab) - size
                slab[at:] = np.frombuffer(payload, np.uint8)
                slab = slab.view()
                slab.flags.writeable = False  # as the other tests' slabs, for which the decoder is compiled already
                block = FrameBlock(0, encoding, np.arange(1), np.array([at]), np.array([size]), slab)
                (status,) = fast.decode(block, np.array([0]), rows, sums)
                (whole,) = whole_frames(block, shape, kind)
                try:
                    frame = decode(payload, encoding, shape, kind)
                except ProtocolError:
                    frame = None
                where = payload.hex(), shape, dtype, encoding
                if status == NO_NUMBER and frame is not None and not np.isfinite(frame).all():
                    status = OK  # as far as bytes go
                assert status in (OK, DAMAGED), where
                if frame is None:
                    assert (status, whole) == (DAMAGED, False), where
                elif not whole or status != OK:
                    assert not whole, where
                    assert status == DAMAGED or encoding != Encoding.BSLZ4, where
                    assert not is_sound(payload, encoding, packed, pixels * kind.itemsize), where
                if status == OK and whole:
                    taken += 1
                    if kind.kind == "u":
                        assert (rows[0] == frame.ravel()[bright]).all(), where
                        assert sums[0, TOTAL] == frame.sum(dtype=np.int64), where
                        assert sums[0, BRIGHT_FIELD] == frame.ravel()[bright].sum(dtype=np.int64), where
                else:
                    refused += 1
            fast.mean_pattern()
    print(f"{taken} taken, {refused} refused")  # noqa: T201 - the test reads it


class GuardedModule:
    """NumPy, whose ``empty`` is guarded."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(shape: Any, dtype: Any) -> np.ndarray:
        return guarded(np.full(shape, 7, dtype))


def random_kernels(rng: np.random.Generator, scan: tuple[int, int], pixels: int) -> tuple[Any, Any, np.ndarray]:
    """Any weights for any number of entries in each qx bin: dense, as runs, and the latter as complex128."""
    columns = np.concatenate([[0], np.cumsum(rng.choice([0, 1, 2, 11, 12, 13, 25], scan[1] // 2 + 1))])
    columns[-1] += 1
    entries, ends = int(columns[-1]), (rng.random(pixels) < 0.3).astype(np.uint8)
    ends[-1] = 1
    band = SimpleNamespace(
        first_column=0,
        columns=columns, column_count=len(columns) - 1, row=rng.integers(0, scan[0], entries), scan_shape=scan,
        entries=entries,
    )  # fmt: skip
    weights = (rng.normal(size=(2, entries, pixels)) * [[[1]], [[1j]]]).sum(axis=0)
    dense = SimpleNamespace(passband=band, pixels=pixels, weights=guarded(weights.astype(np.complex64)))
    signs = rng.integers(-1, 2, (entries, pixels))
    following = np.roll(signs, -1, axis=1) * (ends == 0)
    lookups, bounds = [], [0]
    for difference in signs - following:
        for part in (difference, -difference):
            lookups.append(np.repeat(np.arange(pixels), part.clip(0)))
            bounds.append(bounds[-1] + len(lookups[-1]))
    runs = SimpleNamespace(
        passband=band, pixels=pixels, step=0.5, ends=guarded(ends), bounds=guarded(np.array(bounds)),
        lookups=guarded(np.concatenate(lookups).astype(np.uint16)),
    )  # fmt: skip
    return dense, runs, 0.5 * signs


def odd_sizes(seed: int) -> None:
    """Contract scans of sizes that fit no vector, with the ring and all else guarded; compare with float64."""
    rng = np.random.default_rng(seed)
    cpu, done = choose_device("cpu"), 0
    device = Device(GuardedModule(), cpu.fft, "guarded")  # type: ignore[arg-type]
    executor = ThreadPoolExecutor(1)
    for nx in (1, 2, 3, 5, 16, 17, 31):
        for pixels in (1, 2, 3, 15, 16, 17, 33):
            ny, missing = int(rng.choice([1, 2, 7, 17])), bool(rng.integers(2))
            dtype, averaging = rng.choice(["u1", "u2", "u4", "f4"]), bool(rng.integers(2))
            ring = RowRing((ny, nx), pixels, np.dtype(dtype), device, averaging)
            counts = rng.integers(0, 200, (ny, nx, pixels)).astype(dtype)
            for row in range(ny):
                received = rng.random(nx) < 0.7 if missing and row % 2 else np.ones(nx, bool)
                received[0] = True
                ring.commit(row, 0, counts[row], received)
            dense, runs, true_runs = random_kernels(rng, (ny, nx), pixels)
            band = dense.passband
            spectra = np.fft.rfft(ring.filled(np.arange(ny)).astype(np.float64), axis=1)
            there = np.repeat(spectra, np.diff(band.columns), axis=1)  # (rows, entries, K)
            turns = np.exp(-2j * np.pi * np.outer(np.arange(ny), band.row) / ny)
            for form, kernels, weights in ((Dense, dense, dense.weights), (Runs, runs, true_runs)):
                sums = Sums(*(guarded(a) for a in vars(Sums.zeros(band, pixels, True, cpu)).values()))
                with (
                    patch.object(contraction, "aligned", GuardedModule.empty),
                    patch.object(
                        contraction, "with_slack", lambda shape, kind: guarded(np.zeros(16, kind))[:0].reshape(shape)
                    ),
                ):
                    made = form(kernels, ring, sums, executor, 1)
                made.add(np.arange(ny)[::-1].copy(), +1)
                true = np.einsum("ek,yek->ye", weights, there)
                scale = np.abs(true).max() + 1
                np.testing.assert_allclose(sums.contracted, true, atol=1e-5 * scale * ny)
                np.testing.assert_allclose(sums.psi, (turns * true).sum(axis=0), atol=1e-5 * scale * ny)
                made.subtract(np.arange(ny))
                np.testing.assert_allclose(sums.psi, 0, atol=1e-4 * scale * ny)
                done += 1
    print(f"{done} sizes")  # noqa: T201 - the test reads it


def alone(call: str) -> str:
    """What a function of this file prints in a process of its own, in which it may crash."""
    script = f"from tests import test_decode_fuzz\ntest_decode_fuzz.{call}"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_no_payload_gets_out_of_its_memory() -> None:
    taken, _, refused, _ = alone("hostile_payloads(0, 200)").split()
    assert int(taken) > 1000
    assert int(refused) > 1000


def test_no_size_gets_out_of_its_memory() -> None:
    assert alone("odd_sizes(0)") == "98 sizes\n"
