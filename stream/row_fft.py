"""The row FFT of the CPU: counts of a batch of scan rows as they lie in the ring -> F_y(k,qx), in one compiled call.

The rows of a batch are the lanes of vectors, so that the result lies as the contraction reads it. Two pixels, being
real, make one complex transform. Everything between counts and spectra stays in a core's cache.

Source: Stockham's self-sorting FFT in mixed radices, e.g. Van Loan, Computational Frameworks for the FFT (1992).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from stream.lanes import (
    COUNTS,
    LANES,
    first_lanes,
    load,
    load_counts,
    multiply_add,
    splat,
    store,
    store_transposed,
    take_part,
)

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

#: Elements of one complex value in all lanes.
_VALUE = 2 * LANES

#: Where a row's numbers come from when it is not the ring; otherwise one of ``COUNTS``.
_FILLED = -1
_FLOAT = COUNTS.index("f4")


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array whose first element lies on a cache line: vectors then never straddle two."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size].view(dtype).reshape(shape)


def with_slack(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array behind which a vector may be read: what is read there is thrown away."""
    return np.empty(int(np.prod(shape)) + LANES, dtype)[:-LANES].reshape(shape)


def _factors(length: int) -> list[int]:
    out = []
    for radix in (4, 2, *range(3, length + 1, 2)):
        while length % radix == 0:
            out.append(radix)
            length //= radix
    return out


@dataclass(frozen=True)
class RowFft:
    """The transform of scan rows with ``length`` positions: ``columns`` qx bins of it, from ``first`` on."""

    length: int
    first: int
    columns: int
    factors: np.ndarray
    twiddles: np.ndarray
    """complex64: exp(-2 pi i p j / n) of each pass, j = 1 ... radix - 1 for one p after the other"""
    roots: np.ndarray
    """complex64: exp(-2 pi i j / radix), j < radix, of each pass"""

    @classmethod
    def plan(cls, length: int, columns: int, first: int = 0) -> RowFft:
        factors = _factors(length)
        twiddles, roots = [np.zeros(0)], [np.zeros(0)]
        n = length
        for radix in factors:
            p, j = np.meshgrid(np.arange(n // radix), np.arange(1, radix), indexing="ij")
            twiddles.append(np.exp(-2j * np.pi * (p * j).ravel() / n))
            roots.append(np.exp(-2j * np.pi * np.arange(radix) / radix))
            n //= radix
        return cls(
            length,
            first,
            columns,
            np.array(factors, np.int64),
            np.concatenate(twiddles).astype(np.complex64),
            np.concatenate(roots).astype(np.complex64),
        )

    @property
    def work_elements(self) -> int:
        """float32 elements of scratch that a thread needs."""
        return (LANES // 2 + 2) * self.length * _VALUE + LANES * LANES

    def transform(
        self,
        next_part: np.ndarray,
        counts: np.ndarray,
        rows: np.ndarray,
        scale: np.ndarray,
        filled: np.ndarray,
        work: np.ndarray,
        spectra: np.ndarray,
    ) -> None:
        """Transform up to 16 rows; threads that call this with the same ``next_part`` (int64 [0]) share the work.

        ``counts`` (scan rows, length, K) with slack; ``rows`` int64; ``scale`` float32 (rows,) by which counts are
        multiplied, NaN for rows that are taken from ``filled``, float32 (any, length, K) with slack, in their order.
        ``work`` float32 (work_elements,). ``spectra`` float32 (columns, K, 2, 16): real and imaginary parts, rows last.
        """
        kind = COUNTS.index(f"{counts.dtype.kind}{counts.dtype.itemsize}")
        pixels, item = counts.shape[2], counts.dtype.itemsize
        from_filled = np.isnan(scale)
        kinds = np.where(from_filled, _FILLED, kind)
        offsets = np.where(from_filled, 4 * (np.cumsum(from_filled) - 1), item * rows) * self.length * pixels
        halves = np.where(from_filled, 0.5, scale * 0.5).astype(np.float32)
        _transform(
            next_part, _bytes(counts), _bytes(filled), kinds, item, offsets, halves, self.length, pixels, self.first,
            self.columns, self.factors, self.twiddles, self.roots, work, spectra.reshape(-1),
        )  # fmt: skip


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


@_compiled
def _radix_2(x: Any, a: int, b: int, n: int, s: int, twiddles: Any, t: int) -> None:
    m = n // 2
    for p in range(m):
        c, d = splat(twiddles[t + p].real), splat(twiddles[t + p].imag)
        for q in range(s):
            i = a + (q + s * p) * 2 * LANES
            j = i + s * m * 2 * LANES
            o = b + (q + s * 2 * p) * 2 * LANES
            re, im = load(x, i) - load(x, j), load(x, i + LANES) - load(x, j + LANES)
            store(x, o, load(x, i) + load(x, j))
            store(x, o + LANES, load(x, i + LANES) + load(x, j + LANES))
            o += s * 2 * LANES
            store(x, o, c * re - d * im)
            store(x, o + LANES, multiply_add(c, im, d * re))


@_compiled
def _radix_4(x: Any, a: int, b: int, n: int, s: int, twiddles: Any, t: int) -> None:
    m = n // 4
    step = s * m * 2 * LANES
    for p in range(m):
        c1, d1 = splat(twiddles[t + 3 * p].real), splat(twiddles[t + 3 * p].imag)
        c2, d2 = splat(twiddles[t + 3 * p + 1].real), splat(twiddles[t + 3 * p + 1].imag)
        c3, d3 = splat(twiddles[t + 3 * p + 2].real), splat(twiddles[t + 3 * p + 2].imag)
        for q in range(s):
            i = a + (q + s * p) * 2 * LANES
            r0, i0 = load(x, i), load(x, i + LANES)
            r1, i1 = load(x, i + step), load(x, i + step + LANES)
            r2, i2 = load(x, i + 2 * step), load(x, i + 2 * step + LANES)
            r3, i3 = load(x, i + 3 * step), load(x, i + 3 * step + LANES)
            sr, si, dr, di = r0 + r2, i0 + i2, r0 - r2, i0 - i2
            tr, ti, er, ei = r1 + r3, i1 + i3, r1 - r3, i1 - i3
            o = b + (q + s * 4 * p) * 2 * LANES
            store(x, o, sr + tr)
            store(x, o + LANES, si + ti)
            o += s * 2 * LANES
            re, im = dr + ei, di - er
            store(x, o, c1 * re - d1 * im)
            store(x, o + LANES, multiply_add(c1, im, d1 * re))
            o += s * 2 * LANES
            re, im = sr - tr, si - ti
            store(x, o, c2 * re - d2 * im)
            store(x, o + LANES, multiply_add(c2, im, d2 * re))
            o += s * 2 * LANES
            re, im = dr - ei, di + er
            store(x, o, c3 * re - d3 * im)
            store(x, o + LANES, multiply_add(c3, im, d3 * re))


@_compiled
def _radix_odd(x: Any, a: int, b: int, n: int, s: int, radix: int, twiddles: Any, t: int, roots: Any, u: int) -> None:
    """Any odd radix: sums and differences of the values at j and -j halve the work twice."""
    m = n // radix
    step = s * m * 2 * LANES
    half = radix // 2
    for p in range(m):
        for q in range(s):
            i = a + (q + s * p) * 2 * LANES
            o = b + (q + s * radix * p) * 2 * LANES
            re, im = load(x, i), load(x, i + LANES)
            for g in range(1, radix):
                re, im = re + load(x, i + g * step), im + load(x, i + g * step + LANES)
            store(x, o, re)
            store(x, o + LANES, im)
            for j in range(1, half + 1):
                re, im = load(x, i), load(x, i + LANES)
                odd_re, odd_im = re - re, re - re
                turn = 0
                for g in range(1, half + 1):
                    turn += j
                    if turn >= radix:
                        turn -= radix
                    c, d = splat(roots[u + turn].real), splat(roots[u + turn].imag)
                    r1, i1 = load(x, i + g * step), load(x, i + g * step + LANES)
                    r2, i2 = load(x, i + (radix - g) * step), load(x, i + (radix - g) * step + LANES)
                    re, im = multiply_add(c, r1 + r2, re), multiply_add(c, i1 + i2, im)
                    odd_re, odd_im = multiply_add(d, i1 - i2, odd_re), multiply_add(d, r1 - r2, odd_im)
                w = twiddles[t + p * (radix - 1) + j - 1]
                c, d = splat(w.real), splat(w.imag)
                r1, i1 = re - odd_re, im + odd_im
                store(x, o + j * s * 2 * LANES, c * r1 - d * i1)
                store(x, o + j * s * 2 * LANES + LANES, multiply_add(c, i1, d * r1))
                w = twiddles[t + p * (radix - 1) + radix - j - 1]
                c, d = splat(w.real), splat(w.imag)
                r1, i1 = re + odd_re, im - odd_im
                store(x, o + (radix - j) * s * 2 * LANES, c * r1 - d * i1)
                store(x, o + (radix - j) * s * 2 * LANES + LANES, multiply_add(c, i1, d * r1))


@_compiled
def _fft(x: Any, a: int, b: int, other: int, length: int, factors: Any, twiddles: Any, roots: Any) -> int:
    """Transform what lies at ``a``; the result lies at the place that is returned, ``b`` or ``other``."""
    n, s, t, u = length, 1, 0, 0
    for radix in factors:
        if radix == 4:
            _radix_4(x, a, b, n, s, twiddles, t)
        elif radix == 2:
            _radix_2(x, a, b, n, s, twiddles, t)
        else:
            _radix_odd(x, a, b, n, s, radix, twiddles, t, roots, u)
        t += n // radix * (radix - 1)
        u += radix
        n //= radix
        s *= radix
        a, b, other = b, other, b
    return a


@_compiled
def _transform(
    next_part: Any, counts: Any, filled: Any, kinds: Any, item: int, offsets: Any, scale: Any, length: int,
    pixels: int, first_column: int, columns: int, factors: Any, twiddles: Any, roots: Any, work: Any, spectra: Any,
) -> None:  # fmt: skip
    value = 2 * LANES
    one = length * value
    square = work[LANES // 2 * one + 2 * one :]
    for i in range(LANES * LANES):
        square[i] = 0
    while True:
        first = LANES * take_part(next_part)
        if first >= pixels:
            return
        count = min(LANES, pixels - first)
        for x in range(length):
            for i in range(len(kinds)):
                place = x * pixels + first
                if kinds[i] == _FILLED:
                    values = load_counts(filled, offsets[i] + 4 * place, _FLOAT)
                else:
                    values = load_counts(counts, offsets[i] + item * place, kinds[i])
                if count < LANES:
                    values = first_lanes(values, count)
                store(square, i * LANES, values * splat(scale[i]))
            store_transposed(square, work, x * value, one)
        for pair in range((count + 1) // 2):
            z = _fft(work, pair * one, 8 * one, 9 * one, length, factors, twiddles, roots)
            for q in range(first_column, first_column + columns):
                i, j = z + q * value, z + (length - q if q else 0) * value
                r1, i1, r2, i2 = load(work, i), load(work, i + LANES), load(work, j), load(work, j + LANES)
                o = ((q - first_column) * pixels + first + 2 * pair) * value
                store(spectra, o, r1 + r2)
                store(spectra, o + LANES, i1 - i2)
                if 2 * pair + 1 < count:
                    store(spectra, o + value, i1 + i2)
                    store(spectra, o + value + LANES, r2 - r1)
