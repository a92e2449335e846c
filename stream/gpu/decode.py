"""From payloads to rows on the GPU: the interface of ``stream.decode.FrameDecoder``, with ``rows`` in device memory.

``GpuFrameDecoder`` sends compressed bytes to the device and unpacks them there. Copies have a stream of their own and
two buffers, so that bytes are collected, copied and unpacked at the same time, and all of it beside the contraction,
which uses CuPy's own stream. ``PinnedFrameDecoder`` unpacks on the CPU and copies rows over from pinned memory, two
buffers likewise: for whatever the other does not take, and in its place where the device fails the test at the start.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Executor
from types import ModuleType
from typing import Any

import numpy as np

from detectors.codec import BLOCK_BYTES, encode
from detectors.messages import Encoding, FrameBlock
from stream.array import Device
from stream.decode import FrameDecoder
from stream.gpu.runtime import CupyRuntime, Runtime
from stream.unpack import OK

logger = logging.getLogger(__name__)

#: Pixels or payloads that go to the device at a time, in bytes: enough to keep it busy, little enough to come in turns.
#: Three such buffers are all the device memory that a decoder takes, unless a frame is larger.
_CHUNK_BYTES = 16 << 20
_CHUNK_FRAMES = 4096

#: A frame that the device leaves to the CPU; shared with ``kernels.cu``.
_ELSEWHERE = 4
#: Blocks of fewer bytes are left to the CPU: thousands of them, and no detector sends such.
_SMALLEST_BLOCK = 1024
#: Positions in a buffer and in a frame are 32-bit numbers on the device.
_LARGEST_FRAME = 1 << 28

_LANES = 32
_UNPACK_THREADS = 4 * _LANES
_GATHER_THREADS = 256


def make_decoder(
    device: Device,
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
    runtime: Runtime | None = None,
) -> FrameDecoder | PinnedFrameDecoder | GpuFrameDecoder:
    """The best decoder that ``device`` has, for rows in ``decoder.xp``'s arrays. Parameters as of ``FrameDecoder``.

    On a GPU each is tried on known frames first and compared with the CPU's results. The first that does not agree in
    every bit, or raises, is told of in one warning and is not used. There, ``moments`` and ``pattern`` are made in any
    case: they cost next to nothing. ``runtime``: another than CuPy's.
    """

    def on_host(moments: bool = True, pattern: bool = True) -> FrameDecoder:
        return FrameDecoder(
            detector_shape, dtype, bf_pixels, good, executor, threads, maximum_is_masked=maximum_is_masked,
            moments=moments, pattern=pattern,
        )  # fmt: skip

    if not device.is_gpu and runtime is None:
        return on_host(moments, pattern)
    host = on_host()
    best: FrameDecoder | PinnedFrameDecoder | GpuFrameDecoder = host
    try:
        runtime = runtime or CupyRuntime(device.xp)
        reference, known = on_host(), known_frames(detector_shape, dtype)
        pinned = PinnedFrameDecoder(runtime, host, len(bf_pixels))
        check_against(reference, pinned, known, len(bf_pixels))
        best = pinned
        if dtype.kind == "u":
            gpu = GpuFrameDecoder(runtime, pinned, bf_pixels, good, maximum_is_masked=maximum_is_masked)
            check_against(reference, gpu, known, len(bf_pixels))
            best = gpu
    except Exception as error:  # CUDA's and CuPy's own kinds, and whatever a broken installation raises
        reason = " ".join(str(error).split())
        logger.warning(
            "frames are decoded on the CPU, and not on %s: the test at the start failed (%s: %s). Results are the "
            "same, only slower", device.name, type(error).__name__, reason,
        )  # fmt: skip
    best.forget()
    return best


# the test at the start


def known_frames(shape: tuple[int, int], dtype: np.dtype) -> FrameBlock:
    """Frames of all kinds, packed with bitshuffle and LZ4: empty, sparse, dense, full, mixed, and damaged ones."""
    rng = np.random.default_rng(1)
    size = shape[0] * shape[1]
    sparse = (rng.random(size) < 0.02).astype(dtype)
    dense = rng.integers(0, 200, size).astype(dtype)
    largest = np.full(size, np.finfo(dtype).max if dtype.kind == "f" else np.iinfo(dtype).max, dtype)
    mixed = np.where(np.arange(size) % 4096 < 2048, sparse, largest)
    frames = [frame.reshape(shape) for frame in (np.zeros(size, dtype), sparse, dense, largest, mixed, sparse[::-1])]
    payloads = [encode(frame, Encoding.BSLZ4) for frame in frames]
    longest = max(payloads, key=len)
    payloads += [longest[:-1], longest[: len(longest) // 2], b"", b"\0" + longest[12:], longest + b"\0", payloads[2]]
    sizes = np.array([len(payload) for payload in payloads], np.int64)
    slab = np.frombuffer(b"".join(payloads), np.uint8)
    return FrameBlock("test", Encoding.BSLZ4, np.arange(len(sizes)), np.cumsum(sizes) - sizes, sizes, slab)


def check_against(
    reference: FrameDecoder, decoder: PinnedFrameDecoder | GpuFrameDecoder, known: FrameBlock, pixels: int
) -> None:
    """Raise ``RuntimeError`` unless both decode ``known`` into the same ``pixels``, sums and pattern."""
    frames = len(known)
    targets = np.random.default_rng(2).permutation(frames)
    expected, rows = np.zeros((frames, pixels), reference.dtype), decoder.xp.zeros((frames, pixels), reference.dtype)
    expected_sums, sums = np.zeros((frames, 4), reference.sums_dtype), np.zeros((frames, 4), decoder.sums_dtype)
    for each in (reference, decoder):
        each.forget()
    decoder.rows_taken()  # or, of an array that has just been made: it may be written
    expected_status = reference.decode(known, targets, expected, expected_sums)
    status = decoder.decode(known, targets, rows, sums)
    sound = targets[expected_status == OK]
    ours = rows if decoder.xp is np else decoder.xp.asnumpy(rows)
    for what, ours_, theirs in (
        ("states of frames", status, expected_status),
        ("pixels", ours[sound], expected[sound]),
        ("sums", sums[sound], expected_sums[sound]),
        ("mean pattern", decoder.mean_pattern(), reference.mean_pattern()),
    ):
        if not np.array_equal(ours_, theirs):
            raise RuntimeError(f"the {what} of known frames differ from the CPU's")


# unpacked on the CPU


class PinnedFrameDecoder:
    """A ``FrameDecoder`` for ``rows`` on the device, ``pixels`` wide: decodes into pinned memory, copies from there."""

    def __init__(self, runtime: Runtime, host: FrameDecoder, pixels: int) -> None:
        self.xp: ModuleType = runtime.xp
        self.detector_shape, self.dtype, self.sums_dtype = host.detector_shape, host.dtype, host.sums_dtype
        self.runtime, self.stream = runtime, runtime.stream()
        self._host, self._pixels = host, pixels
        self._row_bytes = pixels * host.dtype.itemsize
        self._frames = max(1, min(_CHUNK_FRAMES, (_CHUNK_BYTES // 4) // max(1, self._row_bytes)))
        # First the rows, then their targets, so that one copy takes both; a row's bytes need no alignment there.
        size = self._frames * (8 + self._row_bytes)
        self._staging = [(runtime.pinned(size), runtime.empty(size), runtime.event()) for _ in range(2)]
        self._taken = runtime.event()

    @property
    def frames(self) -> int:
        return self._host.frames

    def rows_taken(self) -> None:
        """See ``FrameDecoder.rows_taken``: what is decoded from now on waits for this thread's work so far."""
        self.runtime.current_stream().record(self._taken)

    def await_rows(self) -> None:
        """Let the stream's further work wait until ``rows`` may be written."""
        self.stream.wait_event(self._taken)

    def decode(self, block: FrameBlock, targets: np.ndarray, rows: Any, sums: np.ndarray) -> np.ndarray:
        """See ``FrameDecoder.decode``; ``rows`` (positions, K) on the device, complete when this returns."""
        status = np.empty(len(block), np.uint8)
        self.await_rows()
        for number, first in enumerate(range(0, len(block), self._frames)):
            part = np.arange(first, min(first + self._frames, len(block)))
            pinned, device, done = self._staging[number % 2]
            done.synchronize()
            head = 8 * len(part)
            used = head + len(part) * self._row_bytes
            pinned[:head].view(np.int64)[:] = targets[part]
            staged_sums = np.zeros((len(part), 4), self.sums_dtype)
            staged = pinned[head:used].view(self.dtype).reshape(len(part), self._pixels)
            status[part] = self._host.decode(block.take(part), np.arange(len(part)), staged, staged_sums)
            sound = status[part] == OK
            sums[targets[part][sound]] = staged_sums[sound]
            self.runtime.upload(self.stream, device[:used], pinned[:used])
            self.runtime.launch(
                self.stream,
                "place_rows",
                (len(part),),
                _GATHER_THREADS,
                (device[head:], device, np.int64(self._row_bytes), rows),
            )
            self.stream.record(done)
        for _, _, done in self._staging:
            done.synchronize()
        return status

    def forget(self) -> None:
        """Begin the mean pattern anew."""
        self._host.forget()

    def mean_pattern(self) -> np.ndarray:
        """See ``FrameDecoder.mean_pattern``."""
        return self._host.mean_pattern()


# unpacked on the GPU


class _Buffer:
    """One of the two that take turns: payloads on their way to the device, results on their way back."""

    def __init__(self, runtime: Runtime, payload_bytes: int, result_bytes: int) -> None:
        self.payloads, self.device_payloads = runtime.pinned(payload_bytes), runtime.empty(payload_bytes)
        self.results, self.device_results = runtime.pinned(result_bytes), runtime.empty(result_bytes)
        self.copied, self.done = runtime.event(), runtime.event()
        self.part: np.ndarray | None = None
        """which frames of the block are in it, until their results have been taken"""


class GpuFrameDecoder:
    """Decodes bitshuffle-LZ4 frames of u1/u2/u4 on the device, everything else by ``host``. See ``FrameDecoder``.

    ``bf_pixels`` int64 (K,) ascending flat indices, ``good`` bool detector shape, as ``host`` was made with.
    """

    def __init__(
        self,
        runtime: Runtime,
        host: PinnedFrameDecoder,
        bf_pixels: np.ndarray,
        good: np.ndarray,
        *,
        maximum_is_masked: bool,
    ) -> None:
        self.xp: ModuleType = runtime.xp
        self.detector_shape, self.dtype, self.sums_dtype = host.detector_shape, host.dtype, host.sums_dtype
        self._runtime, self._host = runtime, host
        self._good, self._bf_pixels, self._maximum_is_masked = good.ravel(), len(bf_pixels), maximum_is_masked
        pixels, itemsize = good.size, self.dtype.itemsize
        self._frame_bytes = pixels * itemsize
        self._packed_bytes = pixels // 8 * 8 * itemsize
        self._most_frame_bytes = 2 * self._frame_bytes + 4096
        self._chunk_frames = max(1, min(_CHUNK_FRAMES, _CHUNK_BYTES // self._frame_bytes))
        self._payload_bytes = max(_CHUNK_BYTES, self._most_frame_bytes)
        slot = np.full(pixels, -1, np.int32)
        slot[bf_pixels] = np.arange(len(bf_pixels))
        slot[~self._good] = -2
        self._bf_slot = runtime.constant(slot)
        self._wanted_blocks: dict[int, Any] = {}
        # The copies' stream; kernels share theirs with the copies of rows that the CPU decoded.
        self._copies, self._stream = runtime.stream(), host.stream
        sizes = (24 * self._chunk_frames + self._payload_bytes, 36 * self._chunk_frames)
        self._buffers = [_Buffer(runtime, *sizes) for _ in range(2)]
        self._planes = runtime.empty(self._chunk_frames * self._frame_bytes)
        most_blocks = -(-self._packed_bytes // _SMALLEST_BLOCK)
        self._starts, self._lengths = (runtime.empty(4 * self._chunk_frames * most_blocks) for _ in range(2))
        self._pattern = runtime.empty(8 * pixels)
        self._pattern_seen, self._pattern_copied = runtime.pinned(8 * pixels), runtime.event()
        self._pattern_lock = threading.Lock()
        self._frames = 0
        self.forget()

    @property
    def frames(self) -> int:
        return self._frames + self._host.frames

    def rows_taken(self) -> None:
        """See ``FrameDecoder.rows_taken``."""
        self._host.rows_taken()

    def decode(self, block: FrameBlock, targets: np.ndarray, rows: Any, sums: np.ndarray) -> np.ndarray:
        """See ``FrameDecoder.decode``; ``rows`` (positions, K) on the device, complete when this returns."""
        status = np.full(len(block), _ELSEWHERE, np.uint8)
        which = self._taken_here(block)
        if len(which) and (block_bytes := self._block_bytes(block, int(which[0]))):
            self._host.await_rows()
            try:
                for number, part in enumerate(self._parts(block, which)):
                    buffer = self._buffers[number % 2]
                    self._collect(buffer, status, targets, sums)
                    self._send(buffer, block, part, targets)
                    self._unpack(buffer, len(part), block_bytes, rows)
                    buffer.part = part
                for buffer in self._buffers:
                    self._collect(buffer, status, targets, sums)
            finally:
                for buffer in self._buffers:  # after an error, nothing of this block may get into the next one
                    buffer.part = None
            with self._pattern_lock:
                self._frames += int(np.count_nonzero(status == OK))
        rest = np.flatnonzero(status == _ELSEWHERE)
        if len(rest):
            status[rest] = self._host.decode(block.take(rest), targets[rest], rows, sums)
        return status

    def _taken_here(self, block: FrameBlock) -> np.ndarray:
        """Which frames may go to the device: payloads that lie in the slab and have a plausible size."""
        if block.encoding is not Encoding.BSLZ4 or block.minus is not None or self._frame_bytes > _LARGEST_FRAME:
            return np.zeros(0, np.int64)
        offsets, sizes = block.offsets, block.sizes
        inside = (offsets >= 0) & (sizes >= 12) & (offsets <= len(block.slab) - sizes)
        return np.flatnonzero(inside & (sizes <= self._most_frame_bytes))

    def _block_bytes(self, block: FrameBlock, frame: int) -> int:
        """The bytes of pixels in a block, as this frame's header says; 0 where the device does not take such blocks."""
        at = int(block.offsets[frame]) + 8
        size = int.from_bytes(block.slab[at : at + 4].tobytes(), "big") or BLOCK_BYTES
        return size if size % (8 * self.dtype.itemsize) == 0 and _SMALLEST_BLOCK <= size <= _LARGEST_FRAME else 0

    def _parts(self, block: FrameBlock, which: np.ndarray) -> list[np.ndarray]:
        """``which`` in runs that fit a buffer."""
        ends = np.cumsum(block.sizes[which])
        parts, first, before = [], 0, 0
        while first < len(which):
            stop = int(np.searchsorted(ends, before + self._payload_bytes, side="right"))
            stop = min(stop, first + self._chunk_frames)
            parts.append(which[first:stop])
            first, before = stop, int(ends[stop - 1])
        return parts

    def _send(self, buffer: _Buffer, block: FrameBlock, part: np.ndarray, targets: np.ndarray) -> None:
        """Copy offsets, sizes, targets and payloads to the device, from pinned memory and in one piece."""
        frames = len(part)
        offsets, sizes = block.offsets[part], block.sizes[part]
        total, low, high = int(sizes.sum()), int(offsets.min()), int((offsets + sizes).max())
        head, data = buffer.payloads[: 24 * frames].view(np.int64).reshape(3, frames), buffer.payloads[24 * frames :]
        if high - low <= min(self._payload_bytes, total + total // 4 + 4096):
            # Little lies between the payloads: all in one copy, and headers of messages with them.
            data[: high - low] = block.slab[low:high]
            head[0], used = offsets - low, high - low
        else:
            head[0], used = np.cumsum(sizes) - sizes, total
            for to, at, size in zip(head[0].tolist(), offsets.tolist(), sizes.tolist(), strict=True):
                data[to : to + size] = block.slab[at : at + size]
        head[1], head[2] = sizes, targets[part]
        used += 24 * frames
        self._runtime.upload(self._copies, buffer.device_payloads[:used], buffer.payloads[:used])
        self._copies.record(buffer.copied)

    def _unpack(self, buffer: _Buffer, frames: int, block_bytes: int, rows: Any) -> None:
        """The kernels for one buffer, and the way back of status and sums."""
        launch, stream = self._runtime.launch, self._stream
        stream.wait_event(buffer.copied)
        offsets, sizes, targets = (buffer.device_payloads[8 * frames * i :] for i in range(3))
        slab = buffer.device_payloads[24 * frames :]
        sums, status = buffer.device_results, buffer.device_results[32 * frames :]
        frame_bytes, packed_bytes = np.int64(self._frame_bytes), np.int64(self._packed_bytes)
        blocks = -(-self._packed_bytes // block_bytes)
        framing = np.int32(block_bytes), np.int32(blocks)
        pixels = len(self._good)
        launch(
            stream,
            "find_blocks",
            (-(-frames // 64),),
            64,
            (slab, offsets, sizes, np.int32(frames), frame_bytes, packed_bytes, *framing, np.int32(BLOCK_BYTES),
             self._starts, self._lengths, self._planes, status, sums),
        )  # fmt: skip
        if blocks:
            launch(
                stream,
                "unpack_blocks",
                (-(-frames * blocks * _LANES // _UNPACK_THREADS),),
                _UNPACK_THREADS,
                (slab, self._starts, self._lengths, self._blocks_with_good_pixels(block_bytes, blocks),
                 np.int32(frames), frame_bytes, packed_bytes, *framing, self._planes, status),
            )  # fmt: skip
        launch(
            stream,
            f"gather_u{self.dtype.itemsize}",
            (frames, max(1, min(64, pixels // (32 * _GATHER_THREADS)))),
            _GATHER_THREADS,
            (self._planes, status, targets, frame_bytes, packed_bytes, framing[0], np.int32(pixels),
             np.int32(self.detector_shape[1]), self._bf_slot, np.int32(self._bf_pixels),
             np.int32(self._maximum_is_masked), rows, sums, self._pattern),
        )  # fmt: skip
        used = 36 * frames
        self._runtime.download(stream, buffer.results[:used], buffer.device_results[:used])
        stream.record(buffer.done)

    def _blocks_with_good_pixels(self, block_bytes: int, blocks: int) -> Any:
        """uint8 (blocks,) on the device: 0 where every pixel is masked. The CPU does not look at such blocks either."""
        if block_bytes not in self._wanted_blocks:
            starts = np.arange(blocks) * (block_bytes // self.dtype.itemsize)
            packed = self._good[: self._packed_bytes // self.dtype.itemsize]
            wanted = np.logical_or.reduceat(packed, starts).view(np.uint8)
            self._wanted_blocks = {block_bytes: self._runtime.constant(wanted)}
        return self._wanted_blocks[block_bytes]

    def _collect(self, buffer: _Buffer, status: np.ndarray, targets: np.ndarray, sums: np.ndarray) -> None:
        """Wait for a buffer's results, if it has any under way, and take them."""
        if buffer.part is None:
            return
        buffer.done.synchronize()
        part, frames = buffer.part, len(buffer.part)
        buffer.part = None
        status[part] = buffer.results[32 * frames : 36 * frames].view(np.int32)
        sound = status[part] == OK
        sums[targets[part][sound]] = buffer.results[: 32 * frames].view(np.int64).reshape(frames, 4)[sound]

    def forget(self) -> None:
        """Begin the mean pattern anew."""
        with self._pattern_lock:
            self._runtime.clear(self._stream, self._pattern)
            self._frames = 0
            self._host.forget()

    def mean_pattern(self) -> np.ndarray:
        """See ``FrameDecoder.mean_pattern``."""
        with self._pattern_lock:
            self._runtime.download(self._stream, self._pattern_seen, self._pattern)
            self._stream.record(self._pattern_copied)
            self._pattern_copied.synchronize()
            total = self._pattern_seen.view(np.uint64).astype(np.float64)
            total += self._host.mean_pattern().ravel() * self._host.frames
            return (total / max(1, self.frames)).reshape(self.detector_shape)
