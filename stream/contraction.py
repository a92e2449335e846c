"""The contraction C_y(qy,qx) = sum_k T(k;qy,qx) F_y(k,qx) of a batch of rows, and its sum into Psi: in three forms.

``Product``: any kernel on any device, one matrix product for a group of qx bins.
``Dense``: complex kernels on the CPU, one compiled call a thread: a matrix product over 12 frequencies by 16 rows at a
time, kept in registers.
``Runs``: kernels that are 0 or plus or minus one number, on the CPU. The sum over k is then one over runs of pixels,
and with prefix sums P(k) along each detector row a run is a difference of two of them:

    sum_k T(k) F(k) = sum_k (T(k) - T(k+1)) P(k),    T(k+1) = 0 behind a detector row's last pixel

of which all terms vanish but those at the ends of runs: about a tenth of the additions, and a twentieth of the memory.
Prefix sums begin anew at every detector row: over the whole disk they would lose digits against the term itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numba
import numpy as np
from threadpoolctl import ThreadpoolController

from stream.array import Device, choose_device
from stream.kernels import METHODS, KernelTable, RunTable, make_kernels, make_runs
from stream.lanes import LANES, TILE, dense_row, dense_tile, load, splat, store, take_part, turned_sum
from stream.optics import Aberrations, Probe
from stream.passband import Passband
from stream.ring import RowRing
from stream.row_fft import RowFft, aligned, with_slack


@dataclass(frozen=True)
class Sums:
    """What rows are summed into, on the device.

    ``psi`` complex128 (entries,); ``contracted`` complex64 (scan rows, entries), each row's C_y, or None;
    ``row_sums`` float32 (scan rows, K), each row's counts: from qx bin 0, and None where that is not among the columns.
    """

    psi: Any
    contracted: Any | None
    row_sums: Any | None

    @classmethod
    def zeros(cls, passband: Passband, pixels: int, keep_contracted: bool, device: Device) -> Sums:
        xp, ny = device.xp, passband.scan_shape[0]
        contracted = xp.zeros((ny, passband.entries), np.complex64) if keep_contracted else None
        return cls(xp.zeros(passband.entries, np.complex128), contracted, xp.zeros((ny, pixels), np.float32))


class Contraction(Protocol):
    """One form of it. Rows are int64, all different and acquired."""

    def add(self, rows: np.ndarray, sign: int) -> None:
        """Add ``sign`` times the rows' part to Psi, and remember their C_y where that is wanted."""

    def subtract(self, rows: np.ndarray) -> None:
        """Subtract the rows' remembered C_y from Psi."""


def contraction(
    kernels: KernelTable | RunTable, ring: RowRing, sums: Sums, device: Device, executor: Executor, threads: int
) -> Contraction:
    """The form that suits the kernels and the device."""
    if isinstance(kernels, RunTable):
        return Runs(kernels, ring, sums, executor, threads)
    if device.is_gpu or kernels.is_real:
        return Product(kernels, ring, sums, device, executor, threads)
    return Dense(kernels, ring, sums, executor, threads)


def compile_ahead() -> None:
    """Compile the CPU's forms, or load them from disk, before a stream needs them."""
    device, method, probe, step = choose_device("cpu"), METHODS["ssb"], Probe(2e5, 0.02), (1.0, 1.0)
    one, rows = np.zeros(1), np.arange(2)
    passband = Passband.select((2, 2), step, probe.cutoff, method.antisymmetric)
    runs = make_runs(method, probe, (one, one), one.astype(np.int64), passband, step, device)
    aberrated = Probe(2e5, 0.02, aberrations=Aberrations.from_user({"C10": 1.0}))
    dense = make_kernels(method, aberrated, (one, one), passband, step, device)
    ring = RowRing((2, 2), 1, np.dtype("u1"), device, False)
    for row in range(2):
        ring.commit(row, 0, np.ones((2, 1), np.uint8), np.ones(2, bool))
    with ThreadPoolExecutor(1) as executor:
        for kernels in (runs, dense):
            form = contraction(kernels, ring, Sums.zeros(passband, 1, True, device), device, executor, 1)
            form.add(rows, +1)
            form.subtract(rows)


class Product:
    """Matrix products, through ``xp``."""

    def __init__(
        self, kernels: KernelTable, ring: RowRing, sums: Sums, device: Device, executor: Executor, threads: int
    ) -> None:
        self._kernels, self._ring, self._sums, self._device = kernels, ring, sums, device
        self._executor, self._threads = executor, 1 if device.is_gpu else threads
        self._entry_row = device.xp.asarray(kernels.passband.row)
        ny = kernels.passband.scan_shape[0]
        self._turn = device.xp.asarray(np.exp(-2j * np.pi * np.arange(ny) / ny))
        # BLAS threads would fight with ours and with the receiver's for the same cores.
        self._blas = ThreadpoolController()

    def _turns(self, rows: np.ndarray) -> Any:
        """exp(-2 pi i qy y / Ny) for every qy bin and the given rows: complex128 (Ny, rows)."""
        ny = len(self._turn)
        return self._turn[self._device.xp.asarray(np.outer(np.arange(ny), rows) % ny)]

    def add(self, rows: np.ndarray, sign: int) -> None:
        xp, sums = self._device.xp, self._sums
        spectra = self._spectra(rows)
        count = len(rows)
        columns, weights = self._kernels.passband.columns, self._kernels.weights
        turns = sign * self._turns(rows)
        slots = xp.asarray(rows)

        def contract(group: range) -> None:
            # A whole group in one batched product: each call that takes the interpreter's lock may have to wait for it.
            entries = slice(int(columns[group.start]), int(columns[group.stop]))
            kernel = weights[entries].reshape(len(group), -1, weights.shape[1])
            here = spectra[:, group.start : group.stop]
            if self._kernels.is_real:
                # A real kernel: the real and imaginary parts are two real rows, for half the multiplications.
                parts = xp.empty((len(group), 2 * count, weights.shape[1]), np.float32)
                parts[:, :count], parts[:, count:] = here.real.transpose(1, 0, 2), here.imag.transpose(1, 0, 2)
                both = xp.matmul(kernel, parts.transpose(0, 2, 1)).reshape(-1, 2 * count)
                product = both[:, :count] + 1j * both[:, count:]
            else:
                product = xp.matmul(kernel, here.transpose(1, 2, 0)).reshape(-1, count)
            if sums.contracted is not None:
                sums.contracted[slots, entries] = product.T
            sums.psi[entries] += (turns[self._entry_row[entries]] * product).sum(axis=1)

        with self._blas.limit(limits=1):
            self._map(contract, self._kernels.passband.groups)

    def subtract(self, rows: np.ndarray) -> None:
        held = self._sums.contracted[self._device.xp.asarray(rows)]  # type: ignore[index]
        self._sums.psi[...] -= (self._turns(rows)[self._entry_row] * held.T).sum(axis=1)

    def _spectra(self, rows: np.ndarray) -> Any:
        """F_y(k,qx) of the rows, qx pruned to the passband: complex64 (rows, qx bins, K)."""
        band = self._kernels.passband
        columns = slice(band.first_column, band.first_column + band.column_count)
        spectra = self._device.xp.empty((len(rows), band.column_count, self._kernels.pixels), np.complex64)

        def transform(part: slice) -> None:
            while True:
                aside = self._ring.set_aside(rows[part])
                spectra[part] = self._device.fft.rfft(self._ring.filled(rows[part]), axis=1)[:, columns]
                if self._ring.set_aside(rows[part]) == aside:
                    return

        # One row at a time stays in a core's cache; a GPU wants them all at once.
        step = len(rows) if self._device.is_gpu else 1
        self._map(transform, [slice(start, start + step) for start in range(0, len(rows), step)])
        if self._sums.row_sums is not None:
            self._sums.row_sums[self._device.xp.asarray(rows)] = spectra[:, 0].real
        return spectra

    def _map(self, function: Callable[[Any], None], parts: Iterable[Any]) -> None:
        if self._threads == 1:
            for part in parts:
                function(part)
        else:
            list(self._executor.map(function, parts))


#: Entries that a thread takes out at a time.
_SUBTRACT_ENTRIES = 1024


class _Compiled(ABC):
    """What the compiled forms share: row FFTs, buffers that are kept, threads that take parts until none is left."""

    def __init__(
        self, kernels: KernelTable | RunTable, ring: RowRing, sums: Sums, executor: Executor, threads: int
    ) -> None:
        band = kernels.passband
        self._ring, self._sums = ring, sums
        self._executor = executor
        self._pixels, self._columns, self._entry_row = kernels.pixels, band.columns.astype(np.int64), band.row
        ny, nx = band.scan_shape
        self._turn = np.exp(-2j * np.pi * np.arange(ny) / ny)
        self._turns = aligned((ny, 2, LANES), np.float64)
        self._fft = RowFft.plan(nx, band.column_count, band.first_column)
        self._work = [aligned((self._fft.work_elements,), np.float32) for _ in range(threads)]
        self._spectra = aligned((band.column_count, kernels.pixels, 2, LANES), np.float32)
        self._nothing = with_slack((0, nx, kernels.pixels), np.float32)
        contracted = sums.contracted
        self._contracted = np.zeros((0, 0, 2), np.float32) if contracted is None else contracted.view(np.float32)

    def add(self, rows: np.ndarray, sign: int) -> None:
        for start in range(0, len(rows), LANES):
            part = rows[start : start + LANES]
            self._transform(part)
            self._set_turns(part, sign)
            self._share(partial(self._contract, part))

    def subtract(self, rows: np.ndarray) -> None:
        for start in range(0, len(rows), LANES):
            part = rows[start : start + LANES]
            self._set_turns(part, -1)
            self._share(partial(self._subtract, part))

    def _subtract(self, rows: np.ndarray, next_part: np.ndarray, work: np.ndarray) -> None:
        _subtract(
            next_part, self._contracted.reshape(-1), len(self._entry_row), rows, self._entry_row,
            self._turns.reshape(-1), self._sums.psi, work,
        )  # fmt: skip

    @abstractmethod
    def _contract(self, rows: np.ndarray, next_part: np.ndarray, work: np.ndarray) -> None:
        """Contract the spectra of up to 16 rows, qx bin by qx bin."""

    def _transform(self, rows: np.ndarray) -> None:
        while True:
            aside = self._ring.set_aside(rows)
            counts, scale, filled = self._ring.lying(rows)
            source = self._nothing if filled is None else filled
            given = {"counts": counts, "rows": rows, "scale": scale, "filled": source}
            self._share(partial(self._fft.transform, spectra=self._spectra, **given))
            if self._ring.set_aside(rows) == aside:
                break
        if self._sums.row_sums is not None:
            self._sums.row_sums[rows] = self._spectra[0, :, 0, : len(rows)].T

    def _set_turns(self, rows: np.ndarray, sign: int) -> None:
        """Lanes without a row do not turn up in any sum."""
        ny = len(self._turn)
        turns = sign * self._turn[np.outer(np.arange(ny), rows) % ny]
        self._turns[:, :, len(rows) :] = 0
        self._turns[:, 0, : len(rows)], self._turns[:, 1, : len(rows)] = turns.real, turns.imag

    def _share(self, function: Callable[..., None]) -> None:
        """Call ``function(shared counter, work=scratch)`` in every thread, this one included."""
        next_part = np.zeros(1, np.int64)
        others = [self._executor.submit(function, next_part, work=work) for work in self._work[1:]]
        try:
            function(next_part, work=self._work[0])
        finally:
            # A thread that has not begun by now would find nothing left to do.
            for other in others:
                if not other.cancel():
                    other.result()


class Runs(_Compiled):
    """Sums over the ends of runs, for a :class:`RunTable`."""

    def __init__(self, kernels: RunTable, ring: RowRing, sums: Sums, executor: Executor, threads: int) -> None:
        super().__init__(kernels, ring, sums, executor, threads)
        self._kernels = kernels

    def _contract(self, rows: np.ndarray, next_part: np.ndarray, work: np.ndarray) -> None:
        kernels = self._kernels
        _contract_runs(
            next_part, kernels.bounds, kernels.lookups, np.float32(kernels.step), kernels.ends, self._columns,
            self._entry_row, self._spectra.reshape(-1), self._pixels, rows, self._turns.reshape(-1), self._sums.psi,
            self._contracted.reshape(-1), work,
        )  # fmt: skip


class Dense(_Compiled):
    """A matrix product for each qx bin, for a complex :class:`KernelTable`."""

    def __init__(self, kernels: KernelTable, ring: RowRing, sums: Sums, executor: Executor, threads: int) -> None:
        super().__init__(kernels, ring, sums, executor, threads)
        self._weights = kernels.weights

    def _contract(self, rows: np.ndarray, next_part: np.ndarray, work: np.ndarray) -> None:
        _contract_dense(
            next_part, self._weights, self._columns, self._entry_row, self._spectra.reshape(-1), self._pixels, rows,
            self._turns.reshape(-1), self._sums.psi, self._contracted.reshape(-1), work,
        )  # fmt: skip


# Compiled. Whatever takes arrays is written out instead of called: a call counts references to each of them, under a
# lock that all threads share.

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _contract_runs(
    next_part: Any, bounds: Any, lookups: Any, step: Any, ends: Any, columns: Any, entry_row: Any, spectra: Any,
    pixels: int, rows: Any, turns: Any, psi: Any, contracted: Any, work: Any,
) -> None:  # fmt: skip
    value = 2 * LANES
    entries = len(entry_row)
    while True:
        column = take_part(next_part)
        if column >= len(columns) - 1:
            return
        base = column * pixels * value
        zero = splat(np.float32(0))
        re, im = zero, zero
        for k in range(pixels):
            at = base + k * value
            re, im = re + load(spectra, at), im + load(spectra, at + LANES)
            store(spectra, at, re)
            store(spectra, at + LANES, im)
            if ends[k]:
                re, im = zero, zero
        for e in range(columns[column], columns[column + 1]):
            re, im, more_re, more_im = zero, zero, zero, zero
            first, minus, stop = bounds[2 * e], bounds[2 * e + 1], bounds[2 * e + 2]
            for i in range(first, minus - 1, 2):
                at, then = base + np.int64(lookups[i]) * value, base + np.int64(lookups[i + 1]) * value
                re, im = re + load(spectra, at), im + load(spectra, at + LANES)
                more_re, more_im = more_re + load(spectra, then), more_im + load(spectra, then + LANES)
            if (minus - first) % 2:
                at = base + np.int64(lookups[minus - 1]) * value
                re, im = re + load(spectra, at), im + load(spectra, at + LANES)
            for i in range(minus, stop - 1, 2):
                at, then = base + np.int64(lookups[i]) * value, base + np.int64(lookups[i + 1]) * value
                re, im = re - load(spectra, at), im - load(spectra, at + LANES)
                more_re, more_im = more_re - load(spectra, then), more_im - load(spectra, then + LANES)
            if (stop - minus) % 2:
                at = base + np.int64(lookups[stop - 1]) * value
                re, im = re - load(spectra, at), im - load(spectra, at + LANES)
            re, im = (re + more_re) * splat(step), (im + more_im) * splat(step)
            real, imag = turned_sum(re, im, turns, entry_row[e] * value)
            psi[e] += complex(real, imag)
            if len(contracted):
                store(work, 0, re)
                store(work, LANES, im)
                for i in range(len(rows)):
                    at = 2 * (rows[i] * entries + e)
                    contracted[at], contracted[at + 1] = work[i], work[LANES + i]


@_compiled
def _contract_dense(
    next_part: Any, weights: Any, columns: Any, entry_row: Any, spectra: Any, pixels: int, rows: Any, turns: Any,
    psi: Any, contracted: Any, work: Any,
) -> None:  # fmt: skip
    value = 2 * LANES
    entries = len(entry_row)
    while True:
        column = take_part(next_part)
        if column >= len(columns) - 1:
            return
        base = column * pixels * value
        begin, stop = columns[column], columns[column + 1]
        done = begin
        while done < stop:
            # The last tile of a column reaches back over entries that are done: they are made and thrown away.
            first = done
            if stop - begin >= TILE:
                first = min(done, stop - TILE)
                dense_tile(weights, first, pixels, spectra, base, pixels, work)
                last = first + TILE
            else:
                dense_row(weights, first, pixels, spectra, base, pixels, work)
                last = first + 1
            for e in range(done, last):
                here = (e - first) * value
                real, imag = turned_sum(load(work, here), load(work, here + LANES), turns, entry_row[e] * value)
                psi[e] += complex(real, imag)
                if len(contracted):
                    for i in range(len(rows)):
                        at = 2 * (rows[i] * entries + e)
                        contracted[at], contracted[at + 1] = work[here + i], work[here + LANES + i]
            done = last


@_compiled
def _subtract(
    next_part: Any, contracted: Any, entries: int, rows: Any, entry_row: Any, turns: Any, psi: Any, work: Any
) -> None:
    value = 2 * LANES
    for i in range(value):
        work[i] = 0
    while True:
        first = _SUBTRACT_ENTRIES * take_part(next_part)
        if first >= entries:
            return
        for e in range(first, min(first + _SUBTRACT_ENTRIES, entries)):
            for i in range(len(rows)):
                at = 2 * (rows[i] * entries + e)
                work[i], work[LANES + i] = contracted[at], contracted[at + 1]
            real, imag = turned_sum(load(work, 0), load(work, LANES), turns, entry_row[e] * value)
            psi[e] += complex(real, imag)
