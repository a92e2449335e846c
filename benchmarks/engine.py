"""The engine alone: bright-field rows that are there already, into the image. No receiving, no decoding.

Baselines, on the same counts in the same run: ``sketch``, DESIGN.md section 3 in a dozen lines of NumPy, and ``batch``,
what one would do after the scan: an FFT over the whole cube, then the contraction.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.data import bf_counts, median_seconds, setup, table
from stream.accumulator import Accumulator
from stream.array import choose_device
from stream.engine import BATCH_ROWS, Setup
from stream.kernels import KernelTable, RunTable, make_kernels
from stream.passband import Passband
from stream.ring import RowRing

#: scan side, BF pixels
CASES = ((64, 1250), (128, 1250), (256, 300), (256, 1250), (512, 1250))
QUICK = ((64, 1250), (128, 1250), (256, 1250))

#: Counts repeat after so many rows.
_ROWS = 32
_CORES = len(os.sched_getaffinity(0))


class Ours:
    """The engine's own ring and accumulator, row by row in batches."""

    def __init__(self, what: Setup, kernels: KernelTable | RunTable, counts: np.ndarray) -> None:
        self._device = choose_device("cpu")
        self._what, self._kernels, self._counts = what, kernels, counts
        self._executor = ThreadPoolExecutor(_CORES)
        self._ring = RowRing(what.scan.shape, counts.shape[2], what.dtype, self._device, False)
        self._pass = -1

    def one_pass(self) -> None:
        self._pass += 1
        self._accumulator = Accumulator(
            self._kernels, self._ring, self._device, keep_contracted=False, executor=self._executor, threads=_CORES
        )
        received = np.ones(self._what.scan.shape[1], bool)
        rows = np.arange(self._what.scan.shape[0])
        for first in range(0, len(rows), BATCH_ROWS):
            batch = rows[first : first + BATCH_ROWS]
            for row in batch:
                self._ring.commit(int(row), self._pass, self._counts[row % _ROWS], received)
            self._accumulator.add(batch)

    def object(self, mean_intensity: float) -> np.ndarray:
        return self._accumulator.object(mean_intensity)


def sketch(kernels: KernelTable, counts: np.ndarray, executor: ThreadPoolExecutor) -> np.ndarray:
    """Psi at the passband's entries: batches of rows, ``np.fft.rfft``, one complex matrix product per qx."""
    band, weights = kernels.passband, kernels.weights
    ny = band.scan_shape[0]
    psi = np.zeros(band.entries, np.complex128)
    turn = np.exp(-2j * np.pi * np.outer(np.arange(ny), np.arange(ny)) / ny)

    def contract(part: np.ndarray) -> None:
        for i in part:
            here = slice(band.columns[i], band.columns[i + 1])
            product = weights[here] @ spectra[:, i].T
            psi[here] += (turn[band.row[here], rows[0] : rows[-1] + 1] * product).sum(axis=1)

    with threadpool_limits(1, "blas"):
        for first in range(0, ny, BATCH_ROWS):
            rows = np.arange(first, min(first + BATCH_ROWS, ny))
            halves = np.array_split(rows, _CORES)
            spectra = np.concatenate(
                list(executor.map(lambda half: np.fft.rfft(counts[half % _ROWS].astype(np.float32), axis=1), halves))
            )
            list(executor.map(contract, np.array_split(np.arange(band.column_count), 4 * _CORES)))
    return psi


def batch(kernels: KernelTable, counts: np.ndarray) -> np.ndarray:
    """Psi at the passband's entries, after the scan: ``np.fft.fft2`` of the cube, a block of pixels at a time."""
    band = kernels.passband
    places = band.row, band.column()
    psi = np.zeros(band.entries, np.complex128)
    for first in range(0, counts.shape[2], 64):
        pixels = slice(first, first + 64)
        cube = counts[np.arange(band.scan_shape[0]) % _ROWS, :, pixels].astype(np.float32)
        psi += (kernels.weights[:, pixels] * np.fft.fft2(cube, axes=(0, 1))[places]).sum(axis=1, dtype=np.complex128)
    return psi


def object_of(psi: np.ndarray, band: Passband, mean_intensity: float) -> np.ndarray:
    """The complex object of a spectrum given at the passband's entries."""
    source, to, signed, to_mirror = band.spectrum_indices()
    spectrum = np.zeros(band.scan_shape[0] * band.scan_shape[1], np.complex128)
    spectrum[to] = psi[source]
    spectrum[to_mirror] = np.sign(signed) * psi[np.abs(signed) - 1].conj()
    return np.fft.ifft2(spectrum.reshape(band.scan_shape)) / mean_intensity + 1


def relative_error(ours: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of two objects against the contrast of the second."""
    return float(np.abs(ours - other).max() / np.abs(other - 1).max())


def run(quick: bool) -> str:
    """The section of the report."""
    rows = []
    for side, pixels in QUICK if quick else CASES:
        for aberrated in (False, True):
            rows.append(_case(side, pixels, aberrated, repeats=3 if side > 64 else 7))
            print(f"  {side}x{side}, {pixels} px: {rows[-1][4]:,.0f} frames/s", flush=True)
    head = ("scan", "BF px", "optics", "entries", "ours, frames/s", "NumPy sketch", "batch FFT", "ours/sketch",
            "ours/batch", "rel. error")  # fmt: skip
    return f"## Engine alone\n\n{table(head, rows)}"


def _case(side: int, pixels: int, aberrated: bool, repeats: int) -> tuple:
    what = setup((side, side), pixels, aberrated=aberrated)
    device = choose_device("cpu")
    kernels = what.make_kernels(device)
    k = what.geometry.bf_k(what.probe.wavelength)
    dense = make_kernels(what.method, what.probe, k, what.passband, what.scan_step, device)
    as_complex = KernelTable(dense.method, dense.passband, dense.weights.astype(np.complex64, copy=False))
    counts = bf_counts((_ROWS, side), kernels.pixels, what.dtype)
    frames, intensity = side * side, float(counts.sum(axis=2).mean())
    ours = Ours(what, kernels, counts)
    ours.one_pass()
    times: dict[str, list[float]] = {"ours": [], "sketch": []}
    with ThreadPoolExecutor(_CORES) as executor:
        for _ in range(repeats):  # in turns, so that a busy moment of the machine hits both
            times["ours"].append(median_seconds(ours.one_pass, 1))
            times["sketch"].append(median_seconds(lambda: sketch(as_complex, counts, executor), 1))
    began = perf_counter()
    psi = batch(dense, counts)
    batch_rate = frames / (perf_counter() - began)
    error = relative_error(ours.object(intensity), object_of(psi, kernels.passband, intensity))
    if error > 1e-4:
        raise RuntimeError(f"{side}x{side}, {pixels} px: the results differ by {error:.1e}")
    mine, theirs = (frames / float(np.median(times[name])) for name in ("ours", "sketch"))
    return (
        f"{side}x{side}", kernels.pixels, "aberrated" if aberrated else "in focus", kernels.passband.entries,
        mine, theirs, batch_rate, mine / theirs, mine / batch_rate, error,
    )  # fmt: skip


if __name__ == "__main__":
    print(run(quick=False))
