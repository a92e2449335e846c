"""What a reconstruction rests on, and the memory that it will take: known before the first frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from detectors.errors import DoesNotFit
from stream.accumulator import contracted_bytes
from stream.array import Device
from stream.geometry import DetectorGeometry
from stream.kernels import KernelTable, Method, Passband, is_real_kernel, make_kernels, table_bytes
from stream.optics import Probe
from stream.ring import ring_bytes
from stream.scan import ScanPattern

#: Rows contracted in one go when they are there: the matrix products gain little beyond.
BATCH_ROWS = 16

#: Open rows take at most about this much memory (and never fewer rows than two batches).
_OPEN_ROWS_BYTES = 256 << 20


#: Sums, spectrum, object and two sets of images (the one being made, the one being looked at), per scan position.
_POSITION_BYTES = 160

#: Tables, sums and the scratch of two decoding threads, per detector pixel.
DETECTOR_PIXEL_BYTES = 80


@dataclass(frozen=True)
class Setup:
    """Everything that a reconstruction rests on. Lengths in Å, angles of the probe in rad.

    ``scan_step`` (row, column) [Å]; ``dtype`` of the frames; ``passes`` None for continuous scanning; ``averaging``
    averages the passes instead of letting the newest one replace the others. ``maximum_is_masked``: pixels of the
    dtype's largest value are not counts.
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

    @property
    def passband(self) -> Passband:
        return Passband.select(self.scan.shape, self.scan_step, self.probe.cutoff, self.method.antisymmetric)

    def make_kernels(self, device: Device) -> KernelTable:
        """The kernel table of this set-up, on ``device``."""
        k = self.geometry.bf_k(self.probe.wavelength)
        return make_kernels(self.method, self.probe, k, self.passband, self.scan_step, device)


@dataclass(frozen=True)
class MemoryPlan:
    """What a reconstruction will hold, in bytes, before any of it is taken. It is a bound: nothing grows with time."""

    ring: int
    kernels: int
    contracted: int
    work: int
    open_rows: int

    @classmethod
    def of(cls, setup: Setup) -> MemoryPlan:
        pixels = len(setup.geometry.bf_pixels)
        shape, dtype = setup.scan.shape, setup.dtype
        passband = setup.passband
        return cls(
            ring=ring_bytes(shape, pixels, dtype, setup.averaging),
            kernels=table_bytes(passband, pixels, is_real_kernel(setup.method, setup.probe)),
            contracted=contracted_bytes(passband) if setup.passes != 1 else 0,
            work=BATCH_ROWS * (shape[1] * pixels * 4 + passband.column_count * pixels * 16)
            + math.prod(shape) * _POSITION_BYTES
            + math.prod(setup.geometry.shape) * DETECTOR_PIXEL_BYTES,
            open_rows=open_rows(setup) * shape[1] * (pixels * dtype.itemsize + 33),
        )

    @property
    def device_bytes(self) -> int:
        return self.ring + self.kernels + self.contracted + self.work

    @property
    def total(self) -> int:
        """Everything together, on device and host."""
        return self.device_bytes + self.open_rows

    def check(self, device: Device, held: MemoryPlan | None = None) -> None:
        """Raise ``DoesNotFit`` with advice when the device has too little free memory: open rows are held there too.

        ``held``: the plan whose memory is in use already and will be used again.
        """
        free = device.free_bytes() + (0 if held is None else held.total)
        if self.total > 0.9 * free:
            raise DoesNotFit(
                f"this reconstruction needs {self.total / 1e9:.2f} GB on the {device.name} ({self}), and "
                f"{free / 1e9:.2f} GB are free: use a smaller scan, a smaller semiangle_mrad (fewer "
                "bright-field pixels), detector binning, or a device with more memory"
            )

    def __str__(self) -> str:
        parts = {
            "ring": self.ring,
            "kernels": self.kernels,
            "contracted rows": self.contracted,
            "work": self.work,
            "open rows": self.open_rows,
        }
        return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in parts.items() if size)


def open_rows(setup: Setup) -> int:
    """How many rows can be open at a time: all of them where memory allows, so that any order of frames is cheap."""
    row_bytes = setup.scan.shape[1] * len(setup.geometry.bf_pixels) * setup.dtype.itemsize
    rows = setup.scan.shape[0]
    return max(2 * BATCH_ROWS, min(rows, _OPEN_ROWS_BYTES // row_bytes)) + BATCH_ROWS
