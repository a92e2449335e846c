"""What a reconstruction rests on, and the memory that it will take: known before the first frame."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np

from detectors.errors import DoesNotFit
from stream.accumulator import contracted_bytes
from stream.array import Device, choose_device
from stream.geometry import DetectorGeometry
from stream.kernels import (
    KernelTable,
    Method,
    RunTable,
    StreamedKernels,
    column_blocks,
    is_real_kernel,
    make_kernels,
    make_runs,
    run_table_bytes,
    stream_kernels,
    table_bytes,
)
from stream.optics import Probe
from stream.passband import Passband
from stream.ring import ring_bytes
from stream.scan import ScanPattern
from stream.snapshot import IMAGE_CHANNELS, IMAGE_UNITS, channels_without

#: Rows contracted in one go when they are there: the lanes of the compiled contraction.
BATCH_ROWS = 16

#: Open rows take at most about this much memory (and never fewer rows than two batches).
_OPEN_ROWS_BYTES = 256 << 20


#: Sums, spectrum, object and two sets of images (the one being made, the one being looked at), per scan position.
_POSITION_BYTES = 160

#: Tables, sums and the scratch of two decoding threads, per detector pixel.
DETECTOR_PIXEL_BYTES = 80

#: A plan may take this share of the free memory.
_MOST_OF_FREE = 0.9

#: Kernels take no more than this share of the free memory; larger tables are made in blocks ...
_KERNEL_SHARE = 0.5
#: ... of up to this many bytes, and of at least one qx bin. All rows are transformed anew for each block: where there
#: are 512 x 512 positions, that takes as long as making 150 MB of kernels.
_BLOCK_BYTES = 1 << 30


@dataclass(frozen=True)
class Setup:
    """Everything that a reconstruction rests on. Lengths in Å, angles of the probe in rad.

    ``scan_step`` (row, column) [Å]; ``dtype`` of the frames; ``passes`` None for continuous scanning; ``averaging``
    averages the passes instead of letting the newest one replace the others. ``maximum_is_masked``: pixels of the
    dtype's largest value are not counts. ``channels``: which images are made, by names of ``IMAGE_CHANNELS``; without
    ``phase`` no bright-field pixels are kept and nothing is contracted. ``kernel_bytes``: how large a kernel table may
    be; larger ones are made in blocks of at most as much. None: half of the free memory, and blocks of up to 1 GiB.
    """

    geometry: DetectorGeometry
    probe: Probe
    scan: ScanPattern
    scan_step: tuple[float, float]
    dtype: np.dtype
    method: Method
    passes: int | None = 1
    averaging: bool = False
    maximum_is_masked: bool = False
    channels: frozenset[str] = frozenset(IMAGE_CHANNELS)
    kernel_bytes: int | None = None

    @property
    def image_names(self) -> tuple[str, ...]:
        """The images that are made, in the order of ``IMAGE_UNITS``."""
        wanted = {image for channel in self.channels for image in IMAGE_CHANNELS[channel]}
        return tuple(name for name in IMAGE_UNITS if name in wanted)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The channels whose images are not made."""
        return channels_without(self.channels)

    @property
    def kept_pixels(self) -> int:
        """How many bright-field pixels of each position are kept for the phase."""
        return len(self.geometry.bf_pixels) if "phase" in self.channels else 0

    @property
    def passband(self) -> Passband:
        return Passband.select(self.scan.shape, self.scan_step, self.probe.cutoff, self.method.antisymmetric)

    def has_runs(self, device: Device) -> bool:
        """Whether the kernels are kept as runs of equal weights there."""
        return not device.is_gpu and self.method.step is not None and is_real_kernel(self.method, self.probe)

    @property
    def detector_rows(self) -> np.ndarray:
        """The detector row of each bright-field pixel, int64 (K,)."""
        return self.geometry.bf_pixels // self.geometry.shape[1]

    def make_kernels(
        self,
        device: Device,
        go_on: Callable[[], bool] = lambda: True,
        executor: Executor | None = None,
        threads: int = 1,
    ) -> KernelTable | RunTable:
        """The kernel table of this set-up, on ``device``. ``go_on``, ``executor`` and ``threads`` as for
        ``kernels.make_kernels``; raises ``Abandoned`` when ``go_on`` says no.
        """
        k = self.geometry.bf_k(self.probe.wavelength)
        rows, band, step = self.detector_rows, self.passband, self.scan_step
        if self.has_runs(device):
            return make_runs(
                self.method, self.probe, k, rows, band, step, device, go_on=go_on, executor=executor, threads=threads
            )
        if device.is_gpu:
            executor = None
        return make_kernels(
            self.method, self.probe, k, band, step, device, go_on=go_on, executor=executor, threads=threads
        )

    def stream_kernels(self, device: Device, block_bytes: int) -> StreamedKernels:
        """The same, to be made in blocks of ``block_bytes`` (or one qx bin) whenever they are needed."""
        k = self.geometry.bf_k(self.probe.wavelength)
        return stream_kernels(self.method, self.probe, k, self.passband, self.scan_step, device, block_bytes)


@dataclass(frozen=True)
class MemoryPlan:
    """What a reconstruction will hold, in bytes, before any of it is taken. It is a bound: nothing grows with time."""

    ring: int
    kernels: int
    contracted: int
    work: int
    open_rows: int
    set_aside: int = 0
    """rows that changed in the ring while a sweep was reading them"""
    block_bytes: int | None = None
    """where kernels are made in blocks: how large these may be"""

    @classmethod
    def of(cls, setup: Setup, device: Device | None = None, held: MemoryPlan | None = None) -> MemoryPlan:
        """The plan for ``device``, by default the CPU.

        Kernels are made in blocks where a table would take more than ``setup.kernel_bytes``, or else would not fit or
        take more than half of what is free, if that takes less memory altogether. ``held``: as for :meth:`check`.
        """
        device = device or choose_device("cpu")
        pixels = len(setup.geometry.bf_pixels)
        shape, dtype = setup.scan.shape, setup.dtype
        images = math.prod(shape) * _POSITION_BYTES + math.prod(setup.geometry.shape) * DETECTOR_PIXEL_BYTES
        opened = open_rows(setup) * shape[1] * (pixels * dtype.itemsize + 33)
        if "phase" not in setup.channels:
            return cls(ring=0, kernels=0, contracted=0, work=images, open_rows=opened)
        passband = setup.passband
        whole = cls(
            ring=ring_bytes(shape, pixels, dtype, setup.averaging),
            kernels=run_table_bytes(passband, pixels, len(np.unique(setup.detector_rows)))
            if setup.has_runs(device)
            else table_bytes(passband, pixels, is_real_kernel(setup.method, setup.probe)),
            contracted=contracted_bytes(passband) if setup.passes != 1 else 0,
            work=batch_bytes(shape, pixels, passband.column_count, device) + images,
            open_rows=opened,
        )
        if setup.has_runs(device):
            return whole
        if setup.kernel_bytes is not None:
            if whole.kernels <= setup.kernel_bytes:
                return whole
            return whole._in_blocks(setup, device, setup.kernel_bytes)
        free = _free_bytes(device, held)
        if whole.kernels <= _KERNEL_SHARE * free and whole.total <= _MOST_OF_FREE * free:
            return whole
        least = whole._in_blocks(setup, device, 0)
        spare = int(_MOST_OF_FREE * free) - least.total
        blocks = whole._in_blocks(setup, device, min(_BLOCK_BYTES, spare // 2)) if spare > 0 else least
        return blocks if blocks.total < whole.total else whole

    def _in_blocks(self, setup: Setup, device: Device, block_bytes: int) -> MemoryPlan:
        """The same with kernels in blocks."""
        passband, (ny, nx) = setup.passband, setup.scan.shape
        pixels = len(setup.geometry.bf_pixels)
        real = is_real_kernel(setup.method, setup.probe)
        blocks = column_blocks(passband, pixels, real, block_bytes)
        columns = max(len(block) for block in blocks)
        sizes = (table_bytes(passband, pixels, real, block) for block in (range(1), *blocks))
        # The Psi and row sums that a sweep works on, besides those of the image, and which frames it has found.
        sweep = passband.entries * 16 + ny * pixels * 4 + 4 * ny * nx
        return replace(
            self,
            kernels=next(sizes) + max(sizes),
            contracted=0,
            work=self.work - batch_bytes((ny, nx), pixels, passband.column_count, device)
            + batch_bytes((ny, nx), pixels, columns, device) + sweep,
            set_aside=self.ring if setup.passes != 1 else 0,
            block_bytes=block_bytes,
        )  # fmt: skip

    @property
    def device_bytes(self) -> int:
        return self.ring + self.kernels + self.contracted + self.set_aside + self.work

    @property
    def total(self) -> int:
        """Everything together, on device and host."""
        return self.device_bytes + self.open_rows

    def check(self, device: Device, held: MemoryPlan | None = None) -> None:
        """Raise ``DoesNotFit`` with advice when the device has too little free memory: open rows are held there too.

        ``held``: the plan whose memory is in use already and will be used again.
        """
        free = _free_bytes(device, held)
        if self.total > _MOST_OF_FREE * free:
            raise DoesNotFit(
                f"this reconstruction needs {self.total / 1e9:.2f} GB on the {device.name} ({self}), and "
                f"{free / 1e9:.2f} GB are free: use a smaller scan, a smaller semiangle_mrad (fewer "
                "bright-field pixels), detector binning, or a device with more memory"
            )

    def __str__(self) -> str:
        parts = {
            "ring": self.ring,
            "kernels" if self.block_bytes is None else "kernels in blocks": self.kernels,
            "contracted rows": self.contracted,
            "rows set aside": self.set_aside,
            "work": self.work,
            "open rows": self.open_rows,
        }
        return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in parts.items() if size)


def _free_bytes(device: Device, held: MemoryPlan | None) -> int:
    return device.free_bytes() + (0 if held is None else held.total)


def batch_bytes(scan_shape: tuple[int, int], pixels: int, columns: int, device: Device) -> int:
    """What contracting a batch of rows takes, with K ``pixels`` and the ``columns`` of the passband, in bytes."""
    ny, nx = scan_shape
    counts = BATCH_ROWS * nx * pixels * 4
    if device.is_gpu:
        return counts + BATCH_ROWS * columns * pixels * 16
    # Counts are copied only where frames are missing; besides the spectra, turns and each thread's part of the FFT.
    threads = len(os.sched_getaffinity(0))
    return counts + 128 * columns * pixels + 256 * ny + threads * (1280 * nx + 2048)


def open_rows(setup: Setup) -> int:
    """How many rows can be open at a time: all of them where memory allows, so that any order of frames is cheap."""
    row_bytes = setup.scan.shape[1] * len(setup.geometry.bf_pixels) * setup.dtype.itemsize
    rows = setup.scan.shape[0]
    return max(2 * BATCH_ROWS, min(rows, _OPEN_ROWS_BYTES // row_bytes)) + BATCH_ROWS
