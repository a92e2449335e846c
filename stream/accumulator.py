"""Row by row, exactly: the spectrum Psi(q) of what has been acquired, and the complex object from it.

    F_y(k,qx)   = rfft over x of row y
    C_y(qy,qx)  = sum_k T(k;qy,qx) F_y(k,qx)              one matrix product per qx, for a batch of rows
    Psi(qy,qx) += exp(-2 pi i qy y / Ny) C_y(qy,qx)

Psi is summed in double precision, and a row is taken out again by exactly the numbers with which it was put in (they
are kept while passes go round): nothing accumulates rounding, however long the microscope scans.

Where a table of T would be too large, ``SweepingAccumulator`` lets rows wait in the ring, and makes T block by block
for all that wait together: a *sweep*. The image is then the one of the last sweep, whole.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stream.array import Device
from stream.contraction import Sums, contraction
from stream.kernels import KernelTable, RunTable, StreamedKernels
from stream.lanes import LANES
from stream.passband import Passband
from stream.ring import FrozenRing, RowRing


def contracted_bytes(passband: Passband) -> int:
    """Memory that keeping each row's contraction takes, in bytes."""
    return passband.scan_shape[0] * passband.entries * 8


class _Psi:
    """Psi of some rows of a ring, and the object that follows from it."""

    def __init__(
        self, kernels: KernelTable | RunTable | StreamedKernels, ring: RowRing, sums: Sums, device: Device
    ) -> None:
        passband = kernels.passband
        self.kernels = kernels
        self._ring, self._device, self._sums = ring, device, sums
        self._in_psi = np.zeros(passband.scan_shape[0], bool)
        zero = passband.row[: int(passband.columns[1])]
        ny = passband.scan_shape[0]
        self._turn_at_zero = np.exp(-2j * np.pi * (np.outer(zero, np.arange(ny)) % ny) / ny)
        self._places = tuple(device.xp.asarray(index) for index in passband.spectrum_indices())

    @property
    def in_psi(self) -> np.ndarray:
        """bool (scan rows,): the rows that the object is made of."""
        return self._in_psi

    def mean_bf_pattern(self) -> Any:
        """mu(k): the mean of the acquired rows' bright-field patterns, float32 (K,) on the device [counts/frame]."""
        rows, row_sums = self._device.xp.asarray(np.flatnonzero(self._in_psi)), self._sums.row_sums
        assert row_sums is not None  # qx bin 0 is among the columns
        return row_sums[rows].mean(axis=0) / self.kernels.passband.scan_shape[1]

    def object(self, mean_intensity: float) -> np.ndarray:
        """The complex object of what is in Psi: complex64 scan shape, on the host; dimensionless, mean 1.

        ``mean_intensity``: mean counts of a frame. Rows that are not there count as the mean pattern, which changes the
        column qx = 0 only. At q = 0, Psi = sum_k abs(G(k,0)) over the whole detector, so the object's mean is 1.
        """
        xp = self._device.xp
        ny, nx = self.kernels.passband.scan_shape
        psi = self._sums.psi
        if not self._in_psi.all():
            present = self._device.xp.asarray(self._turn_at_zero[:, self._in_psi].sum(axis=1))
            psi = psi.copy()
            psi[: len(present)] -= nx * present * self.kernels.sums_at_zero(self.mean_bf_pattern())
        source, to, signed, to_mirror = self._places
        spectrum = xp.zeros(ny * nx, np.complex64)
        spectrum[to] = psi[source]
        spectrum[to_mirror] = xp.sign(signed) * psi[xp.abs(signed) - 1].conj()
        # The mean is added afterwards: in single precision it would swamp the image.
        image = self._device.fft.ifft2(spectrum.reshape(ny, nx)) * np.float32(1 / mean_intensity)
        return self._device.to_host(image + np.float32(1)).astype(np.complex64, copy=False)


class Accumulator(_Psi):
    """Psi of the rows in a ring, for one kernel table.

    ``keep_contracted``: remember C_y of each row, so that it can be replaced without contracting the old row again.
    ``executor`` with ``threads`` shares the work on the CPU. Not thread-safe: the engine locks.
    """

    def __init__(
        self,
        kernels: KernelTable | RunTable,
        ring: RowRing,
        device: Device,
        *,
        keep_contracted: bool,
        executor: Executor,
        threads: int,
    ) -> None:
        super().__init__(kernels, ring, Sums.zeros(kernels.passband, kernels.pixels, keep_contracted, device), device)
        self._contraction = contraction(kernels, ring, self._sums, device, executor, threads)

    def add(self, rows: np.ndarray) -> None:
        """Put the ring's present content of ``rows`` (int64, all different) into Psi."""
        self._contraction.add(rows, +1)
        self._in_psi[rows] = True

    def remove(self, rows: np.ndarray) -> None:
        """Take rows out of Psi, before the ring changes them; rows that are not in it are passed over."""
        rows = rows[self._in_psi[rows]]
        if len(rows) == 0:
            return
        if self._sums.contracted is None:
            self._contraction.add(rows, -1)
        else:
            self._contraction.subtract(rows)
        self._in_psi[rows] = False

    def clear(self) -> None:
        """Take every row out at once."""
        self._sums.psi[...] = 0
        self._in_psi[:] = False

    def missing(self) -> np.ndarray:
        """The rows of the ring that are not in Psi (yet), int64."""
        return np.flatnonzero(self._ring.acquired & ~self._in_psi)


@dataclass
class Sweep:
    """One sweep over the passband: everything in it is of the moment when it began.

    ``rows`` int64 are contracted, and then Psi holds the rows ``included``. ``mean_intensity``: mean counts of a frame,
    None where there are none. ``changed`` bool (scan rows,): rows whose content in the ring is another one by now.
    """

    ring: FrozenRing
    sums: Sums
    rows: np.ndarray
    included: np.ndarray
    mean_intensity: float | None
    changed: np.ndarray = field(init=False)
    called_off: bool = False

    def __post_init__(self) -> None:
        self.changed = np.zeros(len(self.included), bool)


class SweepingAccumulator(_Psi):
    """Psi of the rows in a ring as the last sweep found them, for kernels that are made block by block.

    A sweep contracts the rows that wait. Once a row that is in Psi has changed in the ring, it sums all of them anew:
    what was put in is not remembered. A row that is about to change while a sweep reads it is copied first
    (``rewritten``: rows are replaced or added to, so all of them may have to be; with one pass, frames only come to
    gaps, and it is enough to remember where the gaps were). The engine locks around everything but ``run``, and runs
    one sweep at a time. On the CPU and on a GPU alike.
    """

    kernels: StreamedKernels

    def __init__(
        self,
        kernels: StreamedKernels,
        ring: RowRing,
        device: Device,
        *,
        rewritten: bool,
        executor: Executor,
        threads: int,
    ) -> None:
        super().__init__(kernels, ring, Sums.zeros(kernels.passband, kernels.pixels, False, device), device)
        self._rewritten, self._executor, self._threads = rewritten, executor, threads
        self._behind = np.zeros(len(self._in_psi), bool)
        self._sweep: Sweep | None = None
        self.mean_intensity: float | None = None
        """of the rows in Psi; None before the first sweep"""

    def remove(self, rows: np.ndarray) -> None:
        """``rows`` are about to change in the ring: until the next sweep the image shows what they were."""
        self._behind[rows] |= self._in_psi[rows]
        if self._sweep is not None:
            self._sweep.changed[rows] = True
            if self._rewritten:
                self._sweep.ring.put_aside(np.intersect1d(rows, self._sweep.rows))

    def clear(self) -> None:
        """Take every row out at once, and call a sweep off that is under way."""
        self.call_off()
        self._sums.psi[...] = 0
        self._in_psi[:] = self._behind[:] = False
        self.mean_intensity = None

    def call_off(self) -> None:
        """The sweep that is under way ends without effect."""
        if self._sweep is not None:
            self._sweep.called_off = True
            self._sweep = None

    def missing(self) -> np.ndarray:
        """The rows of the ring whose present content is not in Psi, int64."""
        return np.flatnonzero(self._ring.acquired & (~self._in_psi | self._behind))

    def begin(self, mean_intensity: float | None) -> Sweep:
        """The sweep that lets in every row that waits now."""
        included = self._ring.acquired
        if anew := bool(self._behind.any()):
            sums = Sums.zeros(self.kernels.passband, self.kernels.pixels, False, self._device)
        else:
            row_sums = self._sums.row_sums
            assert row_sums is not None
            sums = Sums(self._sums.psi.copy(), None, row_sums.copy())
        rows = np.flatnonzero(included if anew else included & ~self._in_psi)
        self._sweep = Sweep(FrozenRing(self._ring), sums, rows, included, mean_intensity)
        return self._sweep

    def run(self, sweep: Sweep, go_on: Callable[[], bool]) -> bool:
        """Make the kernels and contract; False where it was called off, or ``go_on`` said no. Needs no lock."""

        def goes_on() -> bool:
            return go_on() and not sweep.called_off

        if len(sweep.rows):
            executor = None if self._device.is_gpu else self._executor
            for entries, kernels in self.kernels.tables(goes_on, executor, self._threads):
                at_zero = kernels.passband.first_column == 0
                sums = Sums(sweep.sums.psi[entries], None, sweep.sums.row_sums if at_zero else None)
                form = contraction(kernels, sweep.ring, sums, self._device, self._executor, self._threads)
                for start in range(0, len(sweep.rows), LANES):
                    if not goes_on():
                        return False
                    form.add(sweep.rows[start : start + LANES], +1)
                del form
        return goes_on()

    def end(self, sweep: Sweep) -> bool:
        """Show what the sweep has found, whole; False where it was called off in the last moment."""
        if sweep.called_off:
            return False
        self._sums, self._in_psi, self.mean_intensity = sweep.sums, sweep.included, sweep.mean_intensity
        self._behind = sweep.changed & sweep.included
        self._sweep = None
        return True
