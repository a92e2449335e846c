"""The kernel T(k;q) of each linear method, on the pruned half plane of scan frequencies.

    Psi(q) = sum_k T(k;q) G(k,q),    G(k,q) = fft2 of the counts over the scan

A method is one function of (probe, k, q) and one line in ``METHODS``. Counts are real, so G(k,-q) = conj(G(k,q)) and
only the half plane qx >= 0 is ever transformed; ``Passband`` says which of its frequencies can be non-zero and how the
other half follows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np

from detectors.errors import ConfigurationError
from stream.array import Device, namespace
from stream.optics import Probe
from stream.passband import Passband
from stream.weights import CompiledWeights

#: An overlap function below this counts as no overlap (py4DSTEM's threshold; see docs/mathematics.md).
OVERLAP_THRESHOLD = 1e-3

#: Matrix elements that are computed at a time: small enough for a core's cache, large enough for a GPU. Temporaries of
#: NumPy that are larger cost page faults. Compiled functions have none, and take less than a millisecond so.
_BLOCK_ELEMENTS = {"numpy": 1 << 14, "gpu": 1 << 21, "compiled": 1 << 17}


class Abandoned(Exception):
    """Nobody wants the kernels any more that were being made."""


def overlap_function(probe: Probe, k: tuple[Any, Any], q: tuple[Any, Any]) -> Any:
    """Gamma(k,q) = A*(k) A(k-q) - A(k) A*(k+q).

    ``k``, ``q``: (row, column) components in the detector frame [1/Å], arrays that broadcast against each other.
    Returns float32 for an aberration-free probe, else complex64, of the broadcast shape. Source: Pennycook et al.,
    Ultramicroscopy 151 (2015) 160, with the phase compensation of Yang et al., Ultramicroscopy 180 (2017) 173.
    """
    centre = probe(*k)
    minus = probe(k[0] - q[0], k[1] - q[1])
    plus = probe(k[0] + q[0], k[1] + q[1])
    return centre.conj() * minus - centre * plus.conj()


@dataclass(frozen=True)
class OverlapMasks:
    """Where the disks of a hard aperture overlap at one scan frequency; bool, the broadcast shape of k and q.

    ``aperture`` A(k); ``minus`` A(k-q) and ``plus`` A(k+q), the shifted apertures; ``double`` the single-sideband
    region A(k) A(k-q) without the triple overlap; ``triple`` where all three meet.
    """

    aperture: Any
    minus: Any
    plus: Any

    @property
    def double(self) -> Any:
        return self.aperture & self.minus & ~self.plus

    @property
    def triple(self) -> Any:
        return self.aperture & self.minus & self.plus


def overlap_masks(probe: Probe, k: tuple[Any, Any], q: tuple[Any, Any]) -> OverlapMasks:
    """The overlap regions at scan frequency ``q``, of a hard aperture; components as in :func:`overlap_function`."""

    def inside(k_row: Any, k_column: Any) -> Any:
        return probe.wavelength * namespace(k_row).sqrt(k_row * k_row + k_column * k_column) < probe.semiangle

    return OverlapMasks(inside(*k), inside(k[0] - q[0], k[1] - q[1]), inside(k[0] + q[0], k[1] + q[1]))


def ssb(probe: Probe, k: tuple[Any, Any], q: tuple[Any, Any]) -> Any:
    """Both sidebands, phase compensated: conj(Gamma)/abs(Gamma) where abs(Gamma) > 1e-3, else 0."""
    gamma = overlap_function(probe, k, q)
    xp = namespace(gamma)
    size = xp.abs(gamma)
    return gamma.conj() * ((size > OVERLAP_THRESHOLD) / xp.maximum(size, np.float32(OVERLAP_THRESHOLD)))


def ssb_single(probe: Probe, k: tuple[Any, Any], q: tuple[Any, Any]) -> Any:
    """One sideband, the textbook form: 2 in the double overlap of hard disks, else 0. Aberrations are ignored."""
    return 2 * overlap_masks(probe, k, q).double.astype(np.float32)


@dataclass(frozen=True)
class Method:
    """A linear method. ``antisymmetric`` means T(k;-q) = -conj(T(k;q)): the half plane then holds everything.

    ``step``: where the kernel is real, every weight is 0, ``step`` or ``-step``; None where it is not so.
    ``compiled`` makes the same ``weights`` of the pixels ``k`` sooner, on the CPU; it needs a ``step``.
    """

    name: str
    weights: Callable[[Probe, tuple[Any, Any], tuple[Any, Any]], Any]
    antisymmetric: bool
    uses_aberrations: bool
    step: float | None = None
    compiled: Callable[[Probe, tuple[np.ndarray, np.ndarray]], CompiledWeights] | None = None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "ssb",
            ssb,
            antisymmetric=True,
            uses_aberrations=True,
            step=1.0,
            compiled=partial(CompiledWeights.of, threshold=OVERLAP_THRESHOLD),
        ),
        Method(
            "ssb-single",
            ssb_single,
            antisymmetric=False,
            uses_aberrations=False,
            step=2.0,
            compiled=partial(CompiledWeights.of, threshold=0.5, single=True),
        ),
    )
}


def method_named(name: str) -> Method:
    """Look a method up. Raises ``ConfigurationError`` naming the known ones."""
    if name not in METHODS:
        raise ConfigurationError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]


@dataclass(frozen=True)
class KernelTable:
    """T(k;q) of one method and one optical setting, ready for the contraction.

    ``weights``: (entries, K), float32 where the kernel is real, else complex64, on the device; mirrored entries hold
    conj(T(k;-q)).
    """

    method: Method
    passband: Passband
    weights: Any

    @property
    def is_real(self) -> bool:
        return self.weights.dtype == np.float32

    @property
    def pixels(self) -> int:
        return int(self.weights.shape[1])

    @property
    def nbytes(self) -> int:
        return int(self.weights.nbytes)

    def sums_at_zero(self, pattern: Any) -> Any:
        """sum_k T(k;q) pattern(k) for the entries of qx bin 0; ``pattern`` (K,) on the device."""
        return self.weights[: int(self.passband.columns[1])] @ pattern


@dataclass(frozen=True)
class RunTable:
    """T(k;q) of a method whose weights are 0, ``step`` or ``-step``, as the ends of runs of equal weights. On the host.

    With D(k) = T(k) - T(k+1) within a detector row, T(k+1) being 0 behind its last pixel, sum_k T(k) F(k) =
    sum_k D(k) P(k), where P are the prefix sums of F along detector rows. Of entry e, ``lookups`` holds the k with
    D = step at ``bounds[2 e] : bounds[2 e + 1]`` and those with D = -step up to ``bounds[2 e + 2]`` (k with twice that
    come twice). ``ends`` uint8 (K,): the last pixels of detector rows.
    """

    method: Method
    passband: Passband
    step: float
    bounds: np.ndarray
    lookups: np.ndarray
    ends: np.ndarray

    @property
    def pixels(self) -> int:
        return len(self.ends)

    @property
    def nbytes(self) -> int:
        return self.bounds.nbytes + self.lookups.nbytes + self.ends.nbytes

    def sums_at_zero(self, pattern: np.ndarray) -> np.ndarray:
        """sum_k T(k;q) pattern(k) for the entries of qx bin 0; ``pattern`` (K,)."""
        prefix = np.cumsum(pattern, dtype=np.float64)
        last = np.flatnonzero(self.ends)
        before = np.repeat(np.concatenate([[0.0], prefix[last[:-1]]]), np.diff(last, prepend=-1))
        prefix -= before
        bounds = self.bounds[: 2 * int(self.passband.columns[1]) + 1]
        running = np.concatenate([[0.0], np.cumsum(prefix[self.lookups[: bounds[-1]]])])
        runs = np.diff(running[bounds]).reshape(-1, 2)
        return self.step * (runs[:, 0] - runs[:, 1])


@dataclass(frozen=True)
class StreamedKernels:
    """T(k;q) where a table of it would be too large: made anew for every sweep over the passband, block by block.

    ``k``, ``scan_step``: as for :func:`make_kernels`; ``blocks``: the qx bins of each, from :func:`column_blocks`.
    ``at_zero``: the kernel of qx bin 0, which is kept.
    """

    method: Method
    probe: Probe
    k: tuple[np.ndarray, np.ndarray]
    passband: Passband
    scan_step: tuple[float, float]
    device: Device
    blocks: tuple[range, ...]
    at_zero: KernelTable

    @property
    def pixels(self) -> int:
        return len(self.k[0])

    @property
    def nbytes(self) -> int:
        """What is held during a sweep, at most."""
        return self.at_zero.nbytes + self._elements * self.at_zero.weights.dtype.itemsize

    @property
    def _elements(self) -> int:
        return self.pixels * max((_entries_in(self.passband, block) for block in self.blocks), default=0)

    def tables(
        self, go_on: Callable[[], bool], executor: Executor | None = None, threads: int = 1
    ) -> Iterator[tuple[slice, KernelTable]]:
        """Each block after the others: (its entries, its table). All lie in the same memory: only the last one counts.

        ``executor`` with ``threads`` shares the work on the CPU. Ends early when ``go_on``, which is asked many times a
        second and by every thread, says no: then it must go on saying so.
        """
        memory = self.device.xp.empty(self._elements, self.at_zero.weights.dtype)
        for block in self.blocks:
            part = self.passband.part(block)
            weights = memory[: part.entries * self.pixels].reshape(part.entries, self.pixels)
            maker = _Maker(self.method, self.probe, self.k, part, self.scan_step, self.device)
            _share(partial(maker.fill, weights), maker.parts(), go_on, executor, threads)
            if not go_on():
                return
            first = int(self.passband.columns[block.start])
            yield slice(first, first + part.entries), KernelTable(self.method, part, weights)

    def sums_at_zero(self, pattern: Any) -> Any:
        """sum_k T(k;q) pattern(k) for the entries of qx bin 0; ``pattern`` (K,) on the device."""
        return self.at_zero.sums_at_zero(pattern)


def _entries_in(passband: Passband, columns: range) -> int:
    return int(passband.columns[columns.stop] - passband.columns[columns.start])


def column_blocks(passband: Passband, pixels: int, real: bool, most_bytes: int) -> tuple[range, ...]:
    """The passband's columns in runs whose kernels take at most ``most_bytes``, or are those of a single column."""
    blocks: list[range] = []
    first = 0
    for stop in range(1, passband.column_count + 1):
        end = stop == passband.column_count
        if end or table_bytes(passband, pixels, real, range(first, stop + 1)) > most_bytes:
            blocks.append(range(first, stop))
            first = stop
    return tuple(blocks)


#: Ends of runs in a detector row, at most: on either side of the line k.q = 0 the weights have one sign, and what is
#: not 0 there lies outside the disk in which A(k-q) and A(k+q) are equal: two runs a side, with two ends each.
_ENDS_PER_ROW = 8


def run_table_bytes(passband: Passband, pixels: int, detector_rows: int) -> int:
    """Memory of a run table, at most, in bytes; ``detector_rows`` that hold any of the K ``pixels``."""
    ends = min(_ENDS_PER_ROW * detector_rows, 2 * pixels)
    return passband.entries * (ends * _lookup_dtype(pixels).itemsize + 16) + 8 + pixels


def _lookup_dtype(pixels: int) -> np.dtype:
    return np.dtype(np.uint16 if pixels <= 1 << 16 else np.uint32)


def table_bytes(passband: Passband, pixels: int, real: bool, columns: range | None = None) -> int:
    """Memory of a kernel table in bytes, of all or some of the passband's columns."""
    entries = passband.entries if columns is None else _entries_in(passband, columns)
    return entries * pixels * (4 if real else 8)


def is_real_kernel(method: Method, probe: Probe) -> bool:
    """Without aberrations A(k) is real, and so is every kernel made from it."""
    return not (method.uses_aberrations and probe.aberrations.coefficients)


def _always() -> bool:
    return True


def make_kernels(
    method: Method,
    probe: Probe,
    k: tuple[np.ndarray, np.ndarray],
    passband: Passband,
    scan_step: tuple[float, float],
    device: Device,
    *,
    go_on: Callable[[], bool] = _always,
    executor: Executor | None = None,
    threads: int = 1,
) -> KernelTable:
    """Evaluate the kernel at every entry of the passband.

    ``k``: detector-frame components of the K bright-field pixels [1/Å], float64 (K,). ``scan_step`` [Å]. ``executor``
    with ``threads`` shares the work on the CPU; the result does not depend on it. Raises ``Abandoned`` soon after
    ``go_on``, which is asked many times a second and by every thread, says no: then it must go on saying so.
    """
    real = is_real_kernel(method, probe)
    weights = device.xp.empty((passband.entries, len(k[0])), dtype=np.float32 if real else np.complex64)
    maker = _Maker(method, probe, k, passband, scan_step, device)
    _share(partial(maker.fill, weights), maker.parts(), go_on, executor, threads)
    if not go_on():
        raise Abandoned
    return KernelTable(method, passband, weights)


def stream_kernels(
    method: Method,
    probe: Probe,
    k: tuple[np.ndarray, np.ndarray],
    passband: Passband,
    scan_step: tuple[float, float],
    device: Device,
    most_bytes: int,
) -> StreamedKernels:
    """The kernel of :func:`make_kernels`, to be made in blocks of ``most_bytes`` or of one column."""
    at_zero = make_kernels(method, probe, k, passband.part(range(1)), scan_step, device)
    blocks = column_blocks(passband, len(k[0]), at_zero.is_real, most_bytes)
    return StreamedKernels(method, probe, k, passband, scan_step, device, blocks, at_zero)


def make_runs(
    method: Method,
    probe: Probe,
    k: tuple[np.ndarray, np.ndarray],
    detector_row: np.ndarray,
    passband: Passband,
    scan_step: tuple[float, float],
    device: Device,
    *,
    go_on: Callable[[], bool] = _always,
    executor: Executor | None = None,
    threads: int = 1,
) -> RunTable:
    """Evaluate a kernel that is 0, ``method.step`` or ``-method.step``, and keep the ends of runs only.

    As :func:`make_kernels`, on the CPU; ``detector_row`` int64 (K,) ascending: the detector row of each pixel.
    """
    if method.step is None or not is_real_kernel(method, probe):
        raise ValueError(f"the kernel of {method.name} has more values than 0 and plus or minus one number here")
    pixels = len(k[0])
    ends = np.append(detector_row[1:] != detector_row[:-1], True).astype(np.uint8)
    bounds = np.zeros(2 * passband.entries + 1, np.int64)
    # What is not written to takes no memory, and what is left over is given back.
    lookups = np.empty(passband.entries * min(_ENDS_PER_ROW * int(ends.sum()), 2 * pixels), _lookup_dtype(pixels))
    maker = _Maker(method, probe, k, passband, scan_step, device)
    lock = threading.Lock()
    early: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    written = 0

    def find(part: slice) -> None:
        """Find the ends of some entries, and write what has its turn."""
        nonlocal written
        levels = maker.levels(part)
        here, found = np.zeros(2 * len(levels) + 1, np.int64), np.empty(2 * levels.size, lookups.dtype)
        _find_ends(levels, ends, here, found)
        with lock:
            early[part.start] = here, found[: here[-1]]
            while written in early:
                here, found = early.pop(written)
                first, stop = int(bounds[2 * written]), 2 * written + len(here)
                bounds[2 * written : stop] = first + here
                lookups[first : first + len(found)] = found
                written = stop // 2

    _share(find, maker.parts(), go_on, executor, threads)
    if not go_on():
        raise Abandoned
    lookups.resize(int(bounds[-1]), refcheck=False)
    return RunTable(method, passband, method.step, bounds, lookups, ends)


def _share(
    function: Callable[[slice], None],
    parts: list[slice],
    go_on: Callable[[], bool],
    executor: Executor | None,
    threads: int,
) -> None:
    """Call ``function`` with each of the parts, in this thread and others, until none is left or ``go_on`` says no."""
    remaining = iter(parts)  # of a list, as a generator cannot be asked by two threads at a time

    def work() -> None:
        for part in remaining:
            if not go_on():
                return
            function(part)

    others = [] if executor is None else [executor.submit(work) for _ in range(min(threads, len(parts)) - 1)]
    try:
        work()
    finally:
        # A thread that has not begun by now would find nothing left to do.
        for other in others:
            if not other.cancel():
                other.result()


class _Maker:
    """Makes the kernel at some entries at a time: any of them, in any thread. Arguments as of :func:`make_kernels`."""

    def __init__(
        self,
        method: Method,
        probe: Probe,
        k: tuple[np.ndarray, np.ndarray],
        passband: Passband,
        scan_step: tuple[float, float],
        device: Device,
    ) -> None:
        xp = device.xp
        self._method, self._probe, self._xp = method, probe, xp
        self._real, self._pixels, self._entries = is_real_kernel(method, probe), len(k[0]), passband.entries
        self._k = (xp.asarray(k[0])[None, :], xp.asarray(k[1])[None, :])
        self._q_row, self._q_column = map(xp.asarray, probe.axes.to_detector(*passband.frequencies(scan_step)))
        self._mirrored = xp.asarray(passband.mirrored)
        self._has_mirrored = bool(passband.mirrored.any())
        self._compiled = None if device.is_gpu or method.compiled is None else method.compiled(probe, k)
        kind = "gpu" if device.is_gpu else "numpy" if self._compiled is None else "compiled"
        self._step = max(1, _BLOCK_ELEMENTS[kind] // max(1, self._pixels))

    def parts(self) -> list[slice]:
        """All entries, in runs that are made at a time."""
        return [slice(start, min(start + self._step, self._entries)) for start in range(0, self._entries, self._step)]

    def fill(self, weights: Any, part: slice) -> None:
        """The kernel at the entries ``part``, into ``weights[part]``; ``weights`` (entries, K) on the device."""
        if self._compiled is None:
            weights[part] = self._weights(part)
        elif self._real:
            np.multiply(self.levels(part), np.float32(self._method.step or 0), out=weights[part])
        else:
            self._compiled.fill(self._q_row[part], self._q_column[part], self._mirrored[part], weights[part])

    def levels(self, part: slice) -> np.ndarray:
        """A real kernel at the entries ``part`` in units of ``method.step``: int8 (entries, K), on the CPU."""
        if self._compiled is None:
            return np.rint(self._weights(part) / self._method.step).astype(np.int8)
        out = np.empty((part.stop - part.start, self._pixels), np.int8)
        self._compiled.levels(self._q_row[part], self._q_column[part], out)
        return out

    def _weights(self, part: slice) -> Any:
        q = (self._q_row[part, None], self._q_column[part, None])
        block = self._method.weights(self._probe, self._k, q)
        if self._real or not self._has_mirrored:
            return block
        return self._xp.where(self._mirrored[part, None], block.conj(), block)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _find_ends(levels: Any, ends: Any, bounds: Any, lookups: Any) -> None:
    """Write where the runs of int8 (entries, K) ``levels`` end: see :class:`RunTable`, of these entries alone."""
    pixels = levels.shape[1]
    change, negative = np.zeros((pixels + 7) // 8 * 8, np.int8), np.zeros(2 * pixels, np.int64)
    words = change.view(np.int64)
    at = 0
    for i in range(levels.shape[0]):
        # Ends are few: most of the time goes into not finding any, so that is done for many pixels at a time.
        for k in range(pixels - 1):
            change[k] = levels[i, k] - levels[i, k + 1] * np.int8(1 - ends[k])
        change[pixels - 1] = levels[i, pixels - 1]
        count = 0
        for word in range(len(words)):
            if words[word]:
                for k in range(8 * word, 8 * word + 8):
                    for _ in range(change[k]):
                        lookups[at] = k
                        at += 1
                    for _ in range(-change[k]):
                        negative[count] = k
                        count += 1
        bounds[2 * i + 1] = at
        for j in range(count):
            lookups[at] = negative[j]
            at += 1
        bounds[2 * i + 2] = at
