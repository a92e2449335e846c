"""The GPU decoder without a GPU: its kernels compiled for the host, its streams simulated; and on a device, if any."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu as gpu_benchmark
from detectors.codec import bitshuffle_library, encode
from detectors.errors import ConfigurationError
from detectors.messages import Encoding, FrameBlock
from stream.array import choose_device
from stream.decode import FrameDecoder
from stream.gpu import decode as gpu_decode
from stream.gpu.decode import GpuFrameDecoder, PinnedFrameDecoder, make_decoder
from stream.gpu.runtime import KERNELS
from stream.kernels import METHODS
from stream.snapshot import IMAGE_UNITS
from tests import gpu_fuzz
from tests.data_helpers import Case, feed, payload_block, running
from tests.gpu_host import SHIM, HostRuntime, HostStream, Kernels, build, signatures

ROOT = Path(__file__).resolve().parents[1]
#: Tails that fill no group of 8, less than a block, several blocks, rows that end within a group and within a block.
SHAPES = [(1, 1), (1, 7), (8, 8), (13, 17), (67, 131), (96, 130)]
DTYPES = ["<u1", "<u2", "<u4"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(build(tmp_path_factory.mktemp("kernels")))


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


# the kernels


def test_lz4_blocks_are_unpacked_by_the_letter_of_the_format(kernels: Kernels) -> None:
    rng = np.random.default_rng(1)
    sizes = [1, 5, 12, 13, 16, 17, 64, 300, 1000, 8192]
    sound = [(gpu_fuzz.sound_block(rng, wanted), wanted) for wanted in sizes for _ in range(10)]
    assert gpu_fuzz.check_lz4(kernels, sound) == len(sound)
    hostile = [(gpu_fuzz.damaged(rng, block), wanted) for block, wanted in sound for _ in range(10)]
    assert 0 < gpu_fuzz.check_lz4(kernels, hostile) < len(hostile)  # noise in literals is still sound


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"\xf0",  # a length without its bytes
        b"\xff" * 5000,
        b"\x1fA\x01\x00" + b"\xff" * 3000 + b"\x00" + b"\x50bcdef",  # a match far beyond the block
        b"\xf0" + b"\xff" * 3000 + b"\x00" + b"a" * 64,
        b"\x40abcd\x00\x00\x50bcdef" + b"\x00" * 20,  # an offset of 0
        b"\x40abcd\x05\x00\x50bcdef" + b"\x00" * 20,  # ... and one before the first byte
        b"\x40abcd\xff\xff\x50bcdef" + b"\x00" * 20,
    ],
)
def test_blocks_made_to_harm(kernels: Kernels, block: bytes) -> None:
    assert gpu_fuzz.check_lz4(kernels, [(block, 64)]) == 0


def test_frames_that_claim_what_they_do_not_hold(kernels: Kernels) -> None:
    rng = np.random.default_rng(1)
    block = gpu_fuzz.sound_block(rng, 1024)

    def status(size: int = 1024, block_bytes: int = 1024, length: int = len(block), rest: bytes = b"") -> int:
        payload = struct.pack(">QII", size, block_bytes, length) + block + rest
        return gpu_fuzz.check_framing(kernels, payload, 1024, 1024, 1024)

    assert status() == gpu_fuzz.SOUND
    for damage in ({"size": 1025}, {"length": len(block) - 1}, {"length": len(block) + 1}, {"rest": b"x"},
                   {"length": 0x7FFFFFFF}, {"length": 0xFFFFFFFF}, {"size": 1 << 63}):  # fmt: skip
        assert status(**damage) == gpu_fuzz.DAMAGED
    for other in (0, 512, 0xFFFFFFFF):
        assert status(block_bytes=other) == gpu_fuzz.ELSEWHERE


def _sanitizer(name: str) -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not at hand")
    library = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    if not os.path.isabs(path := library.stdout.strip()):
        pytest.skip(f"{name} is not at hand")
    return path


def test_no_byte_outside_is_touched(tmp_path: Path) -> None:
    preload = _sanitizer("libasan.so")
    library = build(tmp_path, flags=["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"])
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    tried = subprocess.run(
        [sys.executable, "-m", "tests.gpu_fuzz", str(library), "7", "150"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert tried.returncode == 0, tried.stderr[-3000:]
    assert int(tried.stdout.split()[0]) >= 150


#: Reads blocks (bytes, wanted bytes, block) from a file and unpacks each with LANES threads.
_RACES = r"""
#include <cstdio>
#include "%s"
#include "%s"
int main(int, char** arguments) {
    FILE* file = fopen(arguments[1], "rb");
    int sizes[2];
    while (fread(sizes, 4, 2, file) == 2) {
        std::vector<byte> in(sizes[0] + 1), out(sizes[1] + 1);
        if (fread(in.data(), 1, sizes[0], file) != (size_t)sizes[0]) return 1;
        bool sound[LANES];
        run({1, 1}, LANES, [&] {
            sound[threadIdx.x] = unpack_lz4(in.data(), sizes[0], out.data(), sizes[1], threadIdx.x);
        });
        for (bool lane : sound) {
            if (lane != sound[0]) return 1;
        }
        printf("%%d", sound[0]);
        for (int i = 0; sound[0] && i < sizes[1]; i++) printf("%%02x", out[i]);
        printf("\n");
    }
}
"""


def test_the_threads_of_a_warp_wait_for_each_other(tmp_path: Path) -> None:
    """With four real threads a warp: under a thread sanitizer every read of what another may be writing shows."""
    _sanitizer("libtsan.so")
    source, program = tmp_path / "races.cpp", tmp_path / "races"
    source.write_text(_RACES % (SHIM, KERNELS), encoding="utf-8")
    build(tmp_path)  # skips where the host has no compiler for it
    compiler = str(shutil.which("g++"))
    flags = ["-std=c++20", "-O1", "-g", "-DLANES=4", "-fsanitize=thread", "-pthread", "-Wno-tsan"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    rng = np.random.default_rng(3)
    blocks = [(gpu_fuzz.sound_block(rng, wanted), wanted) for wanted in (16, 64, 200, 1000) for _ in range(6)]
    blocks += [(gpu_fuzz.damaged(rng, block), wanted) for block, wanted in blocks]
    (tmp_path / "blocks").write_bytes(b"".join(struct.pack("<ii", len(b), wanted) + b for b, wanted in blocks))
    ran = subprocess.run([str(program), str(tmp_path / "blocks")], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("this kernel's address space is not one that the thread sanitizer knows")
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = [gpu_fuzz.unpack(block, wanted) for block, wanted in blocks]
    assert ran.stdout.split() == ["0" if bytes_ is None else "1" + bytes_.hex() for bytes_ in expected]


def test_the_cuda_compiler_takes_the_kernels(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    built = subprocess.run(
        ["nvcc", "-std=c++14", "-arch=sm_80", "--cubin", "-o", str(tmp_path / "kernels.cubin"), str(KERNELS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr
    assert set(signatures()) == {"find_blocks", "unpack_blocks", "gather_u1", "gather_u2", "gather_u4", "place_rows"}


# the decoder


def frames_of(shape: tuple[int, int], dtype: str, count: int, seed: int = 0) -> np.ndarray:
    """Frames of all densities, some with pixels of the largest value: (count, *shape)."""
    rng, top = np.random.default_rng(seed), np.iinfo(dtype).max
    out = np.empty((count, *shape), dtype)
    for i, frame in enumerate(out):
        kind = i % 5
        frame[...] = (
            rng.poisson(0.05, shape) if kind < 2
            else rng.integers(0, top, shape, dtype, endpoint=True) if kind == 2
            else np.where(np.arange(shape[0])[:, None] % 40 < 20, rng.poisson(0.1, shape), top) if kind == 3
            else 0
        )  # fmt: skip
    return out


def mask_and_disk(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A mask with random pixels and, in large frames, a whole block of 8 KiB of any type; flat bright-field indices."""
    rng = np.random.default_rng(4)
    good = rng.random(shape) > 0.05
    good.ravel()[:8192] &= good.size < 12000
    return good, np.flatnonzero((rng.random(shape) > 0.6) & good)


class Pair:
    """A decoder and the CPU's, and what each makes of a block."""

    def __init__(
        self, runtime: Any, executor: ThreadPoolExecutor, shape: tuple[int, int], dtype: str, *, kind: str = "gpu",
        maximum_is_masked: bool = False,
    ) -> None:  # fmt: skip
        good, self.bright = mask_and_disk(shape)

        def on_host() -> FrameDecoder:
            return FrameDecoder(
                shape, np.dtype(dtype), self.bright, good, executor, 2, maximum_is_masked=maximum_is_masked
            )

        self.runtime, self.cpu = runtime, on_host()
        pinned = PinnedFrameDecoder(runtime, on_host(), len(self.bright))
        options = {"maximum_is_masked": maximum_is_masked}
        self.gpu = GpuFrameDecoder(runtime, pinned, self.bright, good, **options) if kind == "gpu" else pinned

    def to_host(self, array: Any) -> np.ndarray:
        return array if self.runtime.xp is np else self.runtime.xp.asnumpy(array)

    def check(self, block: FrameBlock, seed: int = 0) -> np.ndarray:
        """Decode with both, in an order of targets of its own; returns the status of each frame."""
        positions = len(block) + 6
        targets = np.random.default_rng(seed).permutation(positions)[: len(block)]
        expected, rows = (xp.full((positions, len(self.bright)), 77, self.cpu.dtype) for xp in (np, self.runtime.xp))
        expected_sums, sums = (np.full((positions, 4), -77, np.int64) for _ in range(2))
        self.gpu.rows_taken()
        status = self.gpu.decode(block, targets, rows, sums)
        np.testing.assert_array_equal(status, self.cpu.decode(block, targets, expected, expected_sums))
        elsewhere = np.setdiff1d(np.arange(positions), targets)
        sound = np.concatenate([targets[status == 0], elsewhere])
        np.testing.assert_array_equal(self.to_host(rows)[sound], expected[sound])
        np.testing.assert_array_equal(sums[sound], expected_sums[sound])
        np.testing.assert_array_equal(self.gpu.mean_pattern(), self.cpu.mean_pattern())
        assert self.gpu.frames == self.cpu.frames
        return status


def block_of(frames: np.ndarray, encoding: Encoding = Encoding.BSLZ4, gap: int = 0) -> FrameBlock:
    """The frames as they would lie in a receiver's slab, ``gap`` bytes before each."""
    payloads = [bytes(gap) + encode(frame, encoding) for frame in frames]
    block = payload_block(payloads, range(len(payloads)), encoding)
    return replace(block, offsets=block.offsets + gap, sizes=block.sizes - gap)


@pytest.mark.parametrize("maximum_is_masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_cpu_to_the_last_bit(
    kernels: Kernels, executor: ThreadPoolExecutor, shape: tuple[int, int], dtype: str, maximum_is_masked: bool
) -> None:
    runtime = HostRuntime(kernels, seed=None)
    pair = Pair(runtime, executor, shape, dtype, maximum_is_masked=maximum_is_masked)
    for seed in range(2):
        assert not pair.check(block_of(frames_of(shape, dtype, 23, seed), gap=30 * seed), seed).any()
    assert set(runtime.launches) >= {"find_blocks", f"gather_u{np.dtype(dtype).itemsize}"}
    assert "place_rows" not in runtime.launches  # nothing was left to the CPU
    runtime.check_guards()
    pair.gpu.forget()
    assert not pair.gpu.mean_pattern().any()


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_copies_and_kernels_wait_for_each_other(
    kernels: Kernels, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """Buffers of three frames, so that both are used many times; gaps, so that payloads are collected one by one."""
    shape, dtype = (67, 131), "<u2"
    monkeypatch.setattr(gpu_decode, "_CHUNK_BYTES", 3 * 67 * 131 * 2 + 100)
    pair = Pair(HostRuntime(kernels, seed), executor, shape, dtype)
    frames = frames_of(shape, dtype, 20)
    for number, gap in enumerate((0, 20, 50_000)):
        assert not pair.check(block_of(frames, gap=gap), number).any()
    pair.runtime.check_guards()


@pytest.mark.parametrize("kind", ["gpu", "pinned"])
def test_a_missing_wait_would_show(
    kernels: Kernels, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The simulated streams are worth something: without the events, what arrives is not what was sent."""
    monkeypatch.setattr(gpu_decode, "_CHUNK_BYTES", 30_000)
    monkeypatch.setattr(HostStream, "record", lambda stream, event: None)
    pair = Pair(HostRuntime(kernels, None), executor, (67, 131), "<u2", kind=kind)
    with pytest.raises(AssertionError):
        pair.check(block_of(frames_of((67, 131), "<u2", 20)))


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_rows_are_written_once_they_were_taken(
    kernels: Kernels, executor: ThreadPoolExecutor, seed: int | None
) -> None:
    """What another thread's work still reads is not overwritten: the decoder waits for ``rows_taken``."""
    shape, dtype = (13, 17), "<u1"
    for kind in ("gpu", "pinned"):
        runtime = HostRuntime(kernels, seed)
        pair = Pair(runtime, executor, shape, dtype, kind=kind)
        frames = frames_of(shape, dtype, 8)
        rows, sums, targets = np.zeros((8, len(pair.bright)), dtype), np.zeros((8, 4), np.int64), np.arange(8)
        first, second = block_of(frames), block_of(frames[::-1])
        pair.gpu.decode(first, targets, rows, sums)
        taken: list[np.ndarray] = []
        runtime.current_stream().put(functools.partial(lambda rows, taken: taken.append(rows.copy()), rows, taken))
        pair.gpu.rows_taken()
        pair.gpu.decode(second, targets, rows, sums)
        np.testing.assert_array_equal(taken[0], frames.reshape(8, -1)[:, pair.bright])
        np.testing.assert_array_equal(rows, frames[::-1].reshape(8, -1)[:, pair.bright])


def test_damage_has_the_same_consequences_as_on_the_cpu(kernels: Kernels, executor: ThreadPoolExecutor) -> None:
    rng = np.random.default_rng(5)
    shape, dtype = (67, 131), "<u2"
    pair = Pair(HostRuntime(kernels, 3), executor, shape, dtype)
    payloads = [encode(frame, Encoding.BSLZ4) for frame in frames_of(shape, dtype, 40)]
    payloads[1] = payloads[1][:-1]
    payloads[2] += b"x"
    payloads[3] = b""
    payloads[5] = payloads[5][:11]
    payloads[7] = bytes(12) + payloads[7][12:]
    payloads[9] = payloads[9][:12] + b"\xff\xff\xff\xff" + payloads[9][16:]
    payloads[11] = payloads[11] + bytes(300_000)
    for i in range(13, 30):  # a token or a length, most likely; never an offset of 0, which the CPU does not refuse
        at = int(rng.integers(16, len(payloads[i])))
        payloads[i] = payloads[i][:at] + b"\xff" + payloads[i][at + 1 :]
    block = payload_block(payloads, range(len(payloads)), Encoding.BSLZ4)
    offsets, sizes = block.offsets.copy(), block.sizes.copy()
    offsets[31], sizes[33], offsets[35], sizes[37] = -1, -1, len(block.slab) + 1, len(block.slab)
    status = pair.check(replace(block, offsets=offsets, sizes=sizes))
    assert set(status) == {0, 1, 2}
    assert not status[[0, 4, 6, 8, 10, 12, 30, 39]].any()
    pair.runtime.check_guards()


def in_blocks_of(frame: np.ndarray, pixels: int) -> bytes:
    """bslz4 with blocks of another size."""
    library, out = bitshuffle_library(), np.empty(2 * frame.nbytes + 1000, np.uint8)
    size = library.bshuf_compress_lz4(frame.ctypes.data, out.ctypes.data, frame.size, frame.itemsize, pixels)
    return struct.pack(">QI", frame.nbytes, pixels * frame.itemsize) + out[:size].tobytes()


def test_blocks_of_other_sizes(kernels: Kernels, executor: ThreadPoolExecutor) -> None:
    shape, dtype = (67, 131), "<u2"
    frames = frames_of(shape, dtype, 12)
    for pixels in (512, 1000, 8 * 1096):  # on the device, whatever the size ...
        pair = Pair(HostRuntime(kernels, 1), executor, shape, dtype)
        payloads = [in_blocks_of(frame, pixels) for frame in frames]
        assert not pair.check(payload_block(payloads, range(12), Encoding.BSLZ4)).any()
        assert "place_rows" not in pair.runtime.launches
    payloads[3], payloads[7] = in_blocks_of(frames[3], 4096), in_blocks_of(frames[7], 8)
    assert not pair.check(payload_block(payloads, range(12), Encoding.BSLZ4)).any()  # ... but one size in a block
    assert "place_rows" in pair.runtime.launches
    tiny = [in_blocks_of(frame, 128) for frame in frames]
    assert not pair.check(payload_block(tiny, range(12), Encoding.BSLZ4)).any()


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.LZ4_BLOCKS, Encoding.RAW_BIG_ENDIAN])
def test_what_is_not_for_the_device_is_decoded_on_the_cpu(
    kernels: Kernels, executor: ThreadPoolExecutor, encoding: Encoding
) -> None:
    shape, dtype = (13, 17), "<u2"
    pair = Pair(HostRuntime(kernels, 1), executor, shape, dtype)
    frames = frames_of(shape, dtype, 20)
    assert not pair.check(block_of(frames, encoding)).any()
    assert not pair.check(block_of(frames)).any()  # one mean pattern of both kinds
    difference = replace(block_of(frames), minus=block_of(frames[::-1]))
    assert not pair.check(difference).any()


@pytest.mark.parametrize("dtype", ["<u1", "<f4"])
def test_pinned_rows(
    kernels: Kernels, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(gpu_decode, "_CHUNK_BYTES", 4 * 3 * 90)
    pair = Pair(HostRuntime(kernels, 2), executor, (13, 17), dtype, kind="pinned")
    assert not pair.check(block_of(frames_of((13, 17), "<u1", 40).astype(dtype))).any()
    pair.runtime.check_guards()


# the test at the start


class Sabotaged:
    """Kernels of which one does not do as it should."""

    def __init__(self, kernels: Kernels, name: str, how: str) -> None:
        self._kernels, self._name, self._how = kernels, name, how

    def __call__(self, name: str, blocks: tuple[int, ...], threads: int, arguments: Any) -> None:
        if name == self._name and self._how == "raises":
            raise RuntimeError("an illegal memory access was encountered")
        if name != self._name or self._how == "differs":
            self._kernels(name, blocks, threads, arguments)
        if name == self._name and self._how == "differs":
            output = {"find_blocks": -1, "unpack_blocks": -2, "gather_u2": -3, "place_rows": -1}[name]
            arguments[output].view(np.uint8)[...] ^= 1


def made(runtime: HostRuntime, executor: ThreadPoolExecutor, dtype: str = "<u2") -> Any:
    good, bright = mask_and_disk((13, 17))
    return make_decoder(
        choose_device("cpu"), (13, 17), np.dtype(dtype), bright, good, executor, 1, runtime=runtime
    )  # fmt: skip


def test_the_best_decoder_that_agrees_is_taken(
    kernels: Kernels, executor: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, pinned = (made(HostRuntime(kernels, 1), executor, dtype) for dtype in ("<u2", "<f4"))
    assert isinstance(gpu, GpuFrameDecoder)
    assert isinstance(pinned, PinnedFrameDecoder)
    assert not caplog.records
    assert (gpu.frames, pinned.frames) == (0, 0)
    assert not gpu.mean_pattern().any()
    assert isinstance(make_decoder(choose_device("cpu"), (3, 5), np.dtype("u1"), np.arange(3), np.ones((3, 5), bool),
                                   executor, 1), FrameDecoder)  # fmt: skip


@pytest.mark.parametrize("how", ["raises", "differs", "does nothing"])
@pytest.mark.parametrize("kernel", ["find_blocks", "unpack_blocks", "gather_u2", "place_rows"])
def test_a_device_that_fails_is_not_used(
    kernels: Kernels, executor: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture, kernel: str, how: str
) -> None:
    decoder = made(HostRuntime(Sabotaged(kernels, kernel, how), None), executor)
    assert type(decoder) is (FrameDecoder if kernel == "place_rows" else PinnedFrameDecoder)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "decoded on the CPU" in warning.getMessage()
    assert decoder.frames == 0
    assert not decoder.mean_pattern().any()


def test_a_gpu_without_its_libraries_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver answers, and the first kernel cannot be compiled."""

    def ones(*_: object) -> None:
        raise RuntimeError("CuPy failed to load\n  libnvrtc.so.12")

    runtime = SimpleNamespace(getDeviceProperties=lambda _: {"name": b"toy"})
    cuda = SimpleNamespace(runtime=runtime, Device=lambda: SimpleNamespace(id=0))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, ones=ones))
    monkeypatch.setitem(sys.modules, "cupyx.scipy.fft", SimpleNamespace())
    assert not choose_device("auto").is_gpu
    with pytest.raises(ConfigurationError, match=r"RuntimeError: CuPy failed to load libnvrtc.so.12.*--device cpu"):
        choose_device("gpu")


# in the engine


@pytest.mark.parametrize("seed", [None, 1])
def test_the_same_image_as_with_the_cpu(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    case = Case(scan=(9, 11), masked=[(3, 4), (7, 7)], aberrations={"C10": 40.0})
    runtime = HostRuntime(kernels, seed)
    options = {"encoding": Encoding.BSLZ4, "damaged": [5]}
    held = np.arange(case.positions) % 11 != 3
    with running(case.setup(passes=2)) as cpu:
        monkeypatch.setattr("stream.engine.make_decoder", functools.partial(make_decoder, runtime=runtime))
        with running(case.setup(passes=2)) as gpu:
            for engine in (cpu, gpu):
                feed(engine, case.counts(0), **options)
                feed(engine, case.counts(1), case.positions + np.flatnonzero(held), **options)
                engine.finish()
            assert "gather_u2" in runtime.launches
            np.testing.assert_array_equal(gpu.object(), cpu.object())
            ours, theirs = gpu.images(IMAGE_UNITS), cpu.images(IMAGE_UNITS)
            for name in IMAGE_UNITS:
                np.testing.assert_array_equal(ours[name], theirs[name])
            assert gpu.counters == cpu.counters


def test_the_benchmark_measures_both_decoders(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stream.engine.make_decoder", functools.partial(make_decoder, runtime=HostRuntime(kernels, None))
    )
    section = gpu_benchmark.measured(choose_device("cpu"), scan=8, scans=(8,), passes=1)
    assert section.count("| GPU |") == section.count("| CPU, pinned |") == 2
    assert section.count("| 8x8 |") == 2


def test_the_benchmark_says_that_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert gpu_benchmark.run(quick=True) == "no CUDA device: not measured"


# on a device


@pytest.mark.gpu
@pytest.mark.parametrize("maximum_is_masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (192, 192), (1024, 1030)])
def test_device_equals_cpu(
    executor: ThreadPoolExecutor, shape: tuple[int, int], dtype: str, maximum_is_masked: bool
) -> None:
    from stream.gpu.runtime import CupyRuntime

    runtime = CupyRuntime(choose_device("gpu").xp)
    count = 600 if shape == (192, 192) else 23
    for kind in ("gpu", "pinned"):
        pair = Pair(runtime, executor, shape, dtype, kind=kind, maximum_is_masked=maximum_is_masked)
        for seed in range(2):
            assert not pair.check(block_of(frames_of(shape, dtype, count, seed), gap=30 * seed), seed).any()
        payloads = [encode(frame, Encoding.BSLZ4)[: -1 - i] for i, frame in enumerate(frames_of(shape, dtype, 5))]
        assert pair.check(payload_block(payloads, range(5), Encoding.BSLZ4)).all()


@pytest.mark.gpu
def test_device_refuses_hostile_blocks() -> None:
    """The fuzzer's blocks on the device: each is sound or refused exactly as the format says."""
    from stream.gpu.runtime import CupyRuntime

    cupy = choose_device("gpu").xp
    runtime = CupyRuntime(cupy)

    class OnDevice:
        def __call__(self, name: str, blocks: tuple[int, ...], threads: int, arguments: Any) -> None:
            there = [cupy.array(a) if isinstance(a, np.ndarray) else a for a in arguments]
            runtime.launch(runtime.current_stream(), name, blocks, threads, there)
            for array, copy in zip(arguments, there, strict=True):
                if isinstance(array, np.ndarray) and array.flags.writeable:
                    array[...] = copy.get()

    kernels: Any = OnDevice()
    rng = np.random.default_rng(8)
    sound = [(gpu_fuzz.sound_block(rng, wanted), wanted) for wanted in (13, 64, 1000, 8192) for _ in range(10)]
    assert gpu_fuzz.check_lz4(kernels, sound) == len(sound)
    gpu_fuzz.check_lz4(kernels, [(gpu_fuzz.damaged(rng, block), wanted) for block, wanted in sound for _ in range(10)])


@pytest.mark.gpu
def test_a_device_is_used_without_a_warning_and_gives_the_same_image(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(scan=(33, 64), masked=[(3, 4)], aberrations={"C10": 40.0})
    with (
        running(case.setup(passes=1)) as cpu,
        running(case.setup(passes=1), device=choose_device("gpu")) as gpu,
    ):
        assert isinstance(gpu._decoder, GpuFrameDecoder)
        for engine in (cpu, gpu):
            feed(engine, case.counts(), encoding=Encoding.BSLZ4, size=500, damaged=[7])
            engine.change(Case(aberrations={"C10": 20.0}).probe, METHODS["ssb"])
            engine.finish()
        ours, theirs = gpu.images(IMAGE_UNITS), cpu.images(IMAGE_UNITS)
        for name in IMAGE_UNITS:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
        assert gpu.counters == cpu.counters
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
