"""Row by row, exactly: the spectrum Psi(q) of what has been acquired, and the complex object from it.

    F_y(k,qx)   = rfft over x of row y
    C_y(qy,qx)  = sum_k T(k;qy,qx) F_y(k,qx)              one matrix product per qx, for a batch of rows
    Psi(qy,qx) += exp(-2 pi i qy y / Ny) C_y(qy,qx)

Psi is summed in double precision, and a row is taken out again by exactly the numbers with which it was put in (they
are kept while passes go round): nothing accumulates rounding, however long the microscope scans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from stream.array import Device
from stream.kernels import KernelTable, Passband
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
        kernels: KernelTable,
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
        self._executor, self._threads = executor, 1 if device.is_gpu else threads
        self._psi = xp.zeros(passband.entries, np.complex128)
        self._contracted = (
            xp.zeros((passband.scan_shape[0], passband.entries), np.complex64) if keep_contracted else None
        )
        self._row_sums = xp.zeros((passband.scan_shape[0], kernels.weights.shape[1]), np.float32)
        self._in_psi = np.zeros(passband.scan_shape[0], bool)
        self._entry_row = xp.asarray(passband.row)
        self._turn = xp.exp(-2j * np.pi * xp.arange(passband.scan_shape[0]) / passband.scan_shape[0])
        self._places = tuple(xp.asarray(index) for index in passband.spectrum_indices())
        # BLAS threads would fight with ours and with the receiver's for the same cores.
        self._blas = ThreadpoolController()

    def add(self, rows: np.ndarray) -> None:
        """Put the ring's present content of ``rows`` (int64, all different) into Psi."""
        self._sum(rows, self._row_spectra(rows), +1)
        self._in_psi[rows] = True

    def remove(self, rows: np.ndarray) -> None:
        """Take rows out of Psi, before the ring changes them; rows that are not in it are passed over."""
        rows = rows[self._in_psi[rows]]
        if len(rows) == 0:
            return
        if self._contracted is None:
            self._sum(rows, self._row_spectra(rows), -1)
        else:
            held = self._contracted[self._device.xp.asarray(rows)]
            self._psi -= (self._turns(rows)[self._entry_row] * held.T).sum(axis=1)
        self._in_psi[rows] = False

    def clear(self) -> None:
        """Take every row out at once."""
        self._psi[...] = 0
        self._in_psi[:] = False

    def missing(self) -> np.ndarray:
        """The rows of the ring that are not in Psi (yet), int64."""
        return np.flatnonzero(self._ring.acquired & ~self._in_psi)

    def _turns(self, rows: np.ndarray) -> Any:
        """exp(-2 pi i qy y / Ny) for every qy bin and the given rows: complex128 (Ny, rows)."""
        ny = len(self._turn)
        return self._turn[self._device.xp.asarray(np.outer(np.arange(ny), rows) % ny)]

    def _row_spectra(self, rows: np.ndarray) -> Any:
        """F_y(k,qx) of the rows, qx pruned to the passband: complex64 (rows, qx bins, K)."""
        columns = self.kernels.passband.column_count
        pixels = self.kernels.weights.shape[1]
        spectra = self._device.xp.empty((len(rows), columns, pixels), np.complex64)

        def transform(part: slice) -> None:
            spectra[part] = self._device.fft.rfft(self._ring.filled(rows[part]), axis=1)[:, :columns]

        # One row at a time stays in a core's cache; a GPU wants them all at once.
        step = len(rows) if self._device.is_gpu else 1
        self._map(transform, [slice(start, start + step) for start in range(0, len(rows), step)])
        self._row_sums[self._device.xp.asarray(rows)] = spectra[:, 0].real
        return spectra

    def _sum(self, rows: np.ndarray, spectra: Any, sign: int) -> None:
        """Contract k and add ``sign`` times the result to Psi, shared out by qx bins."""
        xp = self._device.xp
        count = len(rows)
        columns, weights = self.kernels.passband.columns, self.kernels.weights
        turns = sign * self._turns(rows)
        slots = xp.asarray(rows)

        def contract(group: range) -> None:
            # A whole group in one batched product: each call that takes the interpreter's lock may have to wait for it.
            entries = slice(int(columns[group.start]), int(columns[group.stop]))
            kernel = weights[entries].reshape(len(group), -1, weights.shape[1])
            here = spectra[:, group.start : group.stop]
            if self.kernels.is_real:
                # A real kernel: the real and imaginary parts are two real rows, for half the multiplications.
                parts = xp.empty((len(group), 2 * count, weights.shape[1]), np.float32)
                parts[:, :count], parts[:, count:] = here.real.transpose(1, 0, 2), here.imag.transpose(1, 0, 2)
                both = xp.matmul(kernel, parts.transpose(0, 2, 1)).reshape(-1, 2 * count)
                product = both[:, :count] + 1j * both[:, count:]
            else:
                product = xp.matmul(kernel, here.transpose(1, 2, 0)).reshape(-1, count)
            if self._contracted is not None:
                self._contracted[slots, entries] = product.T
            self._psi[entries] += (turns[self._entry_row[entries]] * product).sum(axis=1)

        with self._blas.limit(limits=1):
            self._map(contract, self.kernels.passband.groups)

    def _map(self, function: Callable[[Any], None], parts: Iterable[Any]) -> None:
        if self._threads == 1:
            for part in parts:
                function(part)
        else:
            list(self._executor.map(function, parts))

    def mean_bf_pattern(self) -> Any:
        """mu(k): the mean of the acquired rows' bright-field patterns, float32 (K,) on the device [counts/frame]."""
        rows = self._device.xp.asarray(np.flatnonzero(self._in_psi))
        return self._row_sums[rows].mean(axis=0) / self.kernels.passband.scan_shape[1]

    def object(self, mean_intensity: float) -> np.ndarray:
        """The complex object of what is in Psi: complex64 scan shape, on the host; dimensionless, mean 1.

        ``mean_intensity``: mean counts of a frame. Rows that are not there count as the mean pattern, which changes the
        column qx = 0 only. At q = 0, Psi = sum_k abs(G(k,0)) over the whole detector, so the object's mean is 1.
        """
        xp = self._device.xp
        ny, nx = self.kernels.passband.scan_shape
        psi = self._psi
        if not self._in_psi.all():
            zero = slice(0, int(self.kernels.passband.columns[1]))
            present = self._turns(np.flatnonzero(self._in_psi)).sum(axis=1)
            mean_weight = self.kernels.weights[zero] @ self.mean_bf_pattern()
            psi = psi.copy()
            psi[zero] -= nx * present[self._entry_row[zero]] * mean_weight
        source, to, signed, to_mirror = self._places
        spectrum = xp.zeros(ny * nx, np.complex64)
        spectrum[to] = psi[source]
        spectrum[to_mirror] = xp.sign(signed) * psi[xp.abs(signed) - 1].conj()
        # The mean is added afterwards: in single precision it would swamp the image.
        image = self._device.fft.ifft2(spectrum.reshape(ny, nx)) * np.float32(1 / mean_intensity)
        return self._device.to_host(image + np.float32(1)).astype(np.complex64, copy=False)
