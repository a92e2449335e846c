"""Row by row, exactly: the spectrum Psi(q) of what has been acquired, and the complex object from it.

    F_y(k,qx)   = rfft over x of row y
    C_y(qy,qx)  = sum_k T(k;qy,qx) F_y(k,qx)              one matrix product per qx, for a batch of rows
    Psi(qy,qx) += exp(-2 pi i qy y / Ny) C_y(qy,qx)

Psi is summed in double precision, and a row is taken out again by exactly the numbers with which it was put in (they
are kept while passes go round): nothing accumulates rounding, however long the microscope scans.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np

from stream.array import Device
from stream.contraction import Sums, contraction
from stream.kernels import KernelTable, Passband, RunTable
from stream.ring import RowRing


def contracted_bytes(passband: Passband) -> int:
    """Memory that keeping each row's contraction takes, in bytes."""
    return passband.scan_shape[0] * passband.entries * 8


class Accumulator:
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
        xp = device.xp
        passband = kernels.passband
        self.kernels = kernels
        self._ring, self._device = ring, device
        self._sums = Sums.zeros(passband, kernels.pixels, keep_contracted, device)
        self._contraction = contraction(kernels, ring, self._sums, device, executor, threads)
        self._in_psi = np.zeros(passband.scan_shape[0], bool)
        zero = passband.row[: int(passband.columns[1])]
        ny = passband.scan_shape[0]
        self._turn_at_zero = np.exp(-2j * np.pi * (np.outer(zero, np.arange(ny)) % ny) / ny)
        self._places = tuple(xp.asarray(index) for index in passband.spectrum_indices())

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

    def mean_bf_pattern(self) -> Any:
        """mu(k): the mean of the acquired rows' bright-field patterns, float32 (K,) on the device [counts/frame]."""
        rows = self._device.xp.asarray(np.flatnonzero(self._in_psi))
        return self._sums.row_sums[rows].mean(axis=0) / self.kernels.passband.scan_shape[1]

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
