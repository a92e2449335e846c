"""The weights of both methods on the CPU, compiled: the same numbers as ``kernels.Method.weights``, sooner.

With A(k) = a(k) exp(-i chi(k)) and chi a polynomial, chi(k+q) - chi(k) = O + E falls into a part that is odd in q and
one that is even, and the overlap function becomes

    conj(Gamma(k,q)) = a(k) exp(-i O) [a(k-q) exp(i E) - a(k+q) exp(-i E)]

For given q both are polynomials of lower degree, and along a detector row they depend on one component of k only. So
no root, cosine or arc tangent is left but those that a loop without branches does for many pixels at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from stream.optics import Probe

#: Aberrations of fifth order make chi a polynomial of degree six.
_TERMS = 7

_BINOMIALS = np.array([[math.comb(n, k) for k in range(_TERMS)] for n in range(_TERMS)], np.float64)


@dataclass(frozen=True)
class CompiledWeights:
    """The weights of some pixels for one optical setting, for any scan frequencies. Only read: threads may share it.

    ``runs`` int64 (runs + 1,): where pixels begin that have one row component and ascending column components;
    ``k_row``, ``k_column`` float64 (K,) [1/Å]; ``amplitude`` float32 (K,): a(k); ``chi`` float64 (7, 7): the
    coefficients of k_row^i k_column^j in chi, in turns; ``radius``, ``edge``: of the aperture and of its soft edge
    [1/Å]; ``single``: a(k) a(k-q) (1 - a(k+q)) decides, instead of a(k) (a(k-q) - a(k+q)).
    """

    runs: np.ndarray
    k_row: np.ndarray
    k_column: np.ndarray
    amplitude: np.ndarray
    chi: np.ndarray
    radius: float
    edge: float
    single: bool
    threshold: float

    @classmethod
    def of(
        cls, probe: Probe, k: tuple[np.ndarray, np.ndarray], *, single: bool = False, threshold: float
    ) -> CompiledWeights:
        """``k``: detector-frame components [1/Å], (K,). ``single``: one sideband of hard disks without aberrations.

        A weight is 0 unless abs(Gamma) > ``threshold``.
        """
        row, column = (np.ascontiguousarray(part, np.float64) for part in k)
        begins = np.flatnonzero((row[1:] != row[:-1]) | (column[1:] < column[:-1])) + 1
        radius, edge = probe.semiangle / probe.wavelength, 0.0 if single else probe.rolloff / probe.wavelength
        # Of a hard disk, as of a soft one, the edge itself is outside.
        inside = row * row + column * column < radius * radius
        amplitude = inside.astype(np.float32) if single else probe.aperture(row, column)
        chi = np.zeros((_TERMS, _TERMS)) if single else _chi_in_turns(probe)
        runs = np.concatenate([[0], begins, [len(row)]]).astype(np.int64)
        return cls(runs, row, column, amplitude, chi, radius, edge, single, threshold)

    def levels(self, q_row: np.ndarray, q_column: np.ndarray, out: np.ndarray) -> None:
        """Without aberrations: 0, 1 or -1 for the weights' sign, into ``out`` int8 (entries, K).

        ``q_row``, ``q_column``: detector-frame components of the scan frequencies [1/Å], float64 (entries,).
        """
        _fill_levels(
            q_row, q_column, self.runs, self.k_row, self.k_column, self.amplitude, self.radius, self.edge, self.single,
            self.threshold, out,
        )  # fmt: skip

    def fill(self, q_row: np.ndarray, q_column: np.ndarray, mirrored: np.ndarray, out: np.ndarray) -> None:
        """With aberrations: the weights, conjugated where ``mirrored``, into ``out`` complex64 (entries, K)."""
        degree = max((i + j for i, j in np.argwhere(self.chi)), default=0)
        _fill_weights(
            q_row, q_column, mirrored, self.runs, self.k_row, self.k_column, self.amplitude, self.chi, degree,
            self.radius, self.edge, self.threshold, out.view(np.float32),
        )  # fmt: skip


def _chi_in_turns(probe: Probe) -> np.ndarray:
    """chi / 2 pi as a polynomial in detector-frame k: see ``optics.aberration_phase``, of which this is the sum."""
    chi = np.zeros((_TERMS, _TERMS))
    for n, m, magnitude, azimuth in probe.aberrations.table(probe.axes):
        term = np.zeros((_TERMS, _TERMS), complex)
        term[0, 0] = 1
        for _ in range(int(m)):
            term = np.exp(-1j * azimuth) * (np.roll(term, 1, axis=0) + 1j * np.roll(term, 1, axis=1))
        real = term.real
        for _ in range(int(n + 1 - m) // 2):
            real = np.roll(real, 2, axis=0) + np.roll(real, 2, axis=1)
        chi += magnitude / (n + 1) * probe.wavelength**n * real
    return chi


# Compiled. Loops over pixels have no branches, so that the compiler does several pixels at a time. Products may be
# contracted with sums, and nothing else be rearranged: rounding to whole turns rests on the order of additions.

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})

_F = np.float32
_ROUNDING = 1.5 * 2.0**52
_HALF_PI_POWERS = [(-1) ** (n // 2) * math.pi**n / math.factorial(n) for n in range(13)]
_, _S1, _C2, _S3, _C4, _S5, _C6, _S7, _C8, _S9, _C10, _S11, _C12 = map(_F, _HALF_PI_POWERS)


@_compiled
def _sin_pi(x: Any) -> Any:
    """sin(pi x) for abs(x) <= 1/2, float32, to 1e-7: the Taylor series."""
    s = x * x
    return x * (_S1 + s * (_S3 + s * (_S5 + s * (_S7 + s * (_S9 + s * _S11)))))


@_compiled
def _cos_pi(x: Any) -> Any:
    s = x * x
    return _F(1) + s * (_C2 + s * (_C4 + s * (_C6 + s * (_C8 + s * (_C10 + s * _C12)))))


@_compiled
def _soft(inside: Any, radius: Any, square: Any, steepness: Any) -> Any:
    """The aperture where radius^2 - abs(k)^2 = ``inside`` and radius^2 = ``square``: see ``aperture_amplitude``."""
    rest = square - inside
    size = np.sqrt(rest if rest > _F(0) else _F(0))
    # radius - abs(k), without the digits that a difference of roots would lose.
    height = inside / (radius + size) * steepness
    height = height if height < _F(1) else _F(1)
    height = height if height > _F(0) else _F(0)
    return _F(0.5) + _F(0.5) * _sin_pi(height - _F(0.5))


@_compiled
def _first_above(values: Any, first: Any, stop: Any, limit: Any) -> Any:
    """Of ascending values[first:stop], the first that is above ``limit``, else ``stop``."""
    while first < stop:
        middle = (first + stop) // 2
        if values[middle] > limit:
            stop = middle
        else:
            first = middle + 1
    return first


@_compiled
def _lit(minus: float, plus: float, column: float) -> tuple[float, float]:
    """From where to where a detector row lies in either shifted disk; ``minus``, ``plus``: half chords, squared."""
    low, high = np.inf, -np.inf
    if minus > 0:
        low, high = min(low, column - math.sqrt(minus)), max(high, column + math.sqrt(minus))
    if plus > 0:
        low, high = min(low, -column - math.sqrt(plus)), max(high, -column + math.sqrt(plus))
    return low, high


@_compiled
def _fill_levels(
    q_row: Any, q_column: Any, runs: Any, k_row: Any, k_column: Any, amplitude: Any, radius: float, edge: float,
    single: bool, threshold: float, out: Any,
) -> None:  # fmt: skip
    square = radius * radius
    radius_, square_, threshold_ = _F(radius), _F(square), _F(threshold)
    # Any edge that is narrower than the numbers' last digits is a hard one.
    steepness = _F(1 / edge if edge > 0 else 1e30)
    for e in range(len(q_row)):
        row, column = q_row[e], q_column[e]
        for r in range(len(runs) - 1):
            first, stop = runs[r], runs[r + 1]
            here = k_row[first]
            minus, plus = square - (here - row) ** 2, square - (here + row) ** 2
            low, high = _lit(minus, plus, column)
            begin = _first_above(k_column, first, stop, low)
            end = _first_above(k_column, begin, stop, high)
            for i in range(np.uint64(first), np.uint64(begin)):
                out[e, i] = 0
            for i in range(np.uint64(end), np.uint64(stop)):
                out[e, i] = 0
            for i in range(np.uint64(begin), np.uint64(end)):
                y = k_column[i]
                a = _soft(_F(minus - (y - column) * (y - column)), radius_, square_, steepness)
                b = _soft(_F(plus - (y + column) * (y + column)), radius_, square_, steepness)
                gamma = amplitude[i] * (a - b * (a if single else _F(1)))
                out[e, i] = np.int8(gamma > threshold_) - np.int8(gamma < -threshold_)


@_compiled
def _fill_weights(
    q_row: Any, q_column: Any, mirrored: Any, runs: Any, k_row: Any, k_column: Any, amplitude: Any, chi: Any,
    degree: int, radius: float, edge: float, threshold: float, out: Any,
) -> None:  # fmt: skip
    square = radius * radius
    radius_, square_, threshold_ = _F(radius), _F(square), _F(threshold)
    steepness = _F(1 / edge if edge > 0 else 1e30)
    odd, even = np.zeros((_TERMS, _TERMS)), np.zeros((_TERMS, _TERMS))
    odd_row, even_row = np.zeros(_TERMS), np.zeros(_TERMS)
    for e in range(len(q_row)):
        row, column = q_row[e], q_column[e]
        for i in range(degree):
            for j in range(degree - i):
                odd_sum = even_sum = 0.0
                row_power = 1.0
                for u in range(degree + 1 - i - j):
                    power = row_power
                    for v in range(degree + 1 - i - j - u):
                        term = chi[i + u, j + v] * _BINOMIALS[i + u, i] * _BINOMIALS[j + v, j] * power
                        if (u + v) % 2:
                            odd_sum += term
                        elif u + v:
                            even_sum += term
                        power *= column
                    row_power *= row
                odd[i, j], even[i, j] = odd_sum, even_sum
        sign = _F(-1) if mirrored[e] else _F(1)
        for r in range(len(runs) - 1):
            first, stop = runs[r], runs[r + 1]
            here = k_row[first]
            minus, plus = square - (here - row) ** 2, square - (here + row) ** 2
            low, high = _lit(minus, plus, column)
            begin = _first_above(k_column, first, stop, low)
            end = _first_above(k_column, begin, stop, high)
            for i in range(np.uint64(2 * first), np.uint64(2 * begin)):
                out[e, i] = 0
            for i in range(np.uint64(2 * end), np.uint64(2 * stop)):
                out[e, i] = 0
            if begin == end:
                continue
            for j in range(degree):
                odd_sum = even_sum = 0.0
                for i in range(degree - 1 - j, -1, -1):
                    odd_sum, even_sum = odd_sum * here + odd[i, j], even_sum * here + even[i, j]
                odd_row[j], even_row[j] = odd_sum, even_sum
            o0, o1, o2, o3, o4, o5 = odd_row[0], odd_row[1], odd_row[2], odd_row[3], odd_row[4], odd_row[5]
            e0, e1, e2, e3, e4 = even_row[0], even_row[1], even_row[2], even_row[3], even_row[4]
            for i in range(np.uint64(begin), np.uint64(end)):
                y = k_column[i]
                a = _soft(_F(minus - (y - column) * (y - column)), radius_, square_, steepness)
                b = _soft(_F(plus - (y + column) * (y + column)), radius_, square_, steepness)
                turns = o0 + y * (o1 + y * (o2 + y * (o3 + y * (o4 + y * o5))))
                half = _F(turns - ((turns + _ROUNDING) - _ROUNDING))
                sin, cos = _sin_pi(half), _cos_pi(half)
                odd_sin, odd_cos = _F(2) * sin * cos, _F(1) - _F(2) * sin * sin
                turns = e0 + y * (e1 + y * (e2 + y * (e3 + y * e4)))
                half = _F(turns - ((turns + _ROUNDING) - _ROUNDING))
                sin, cos = _sin_pi(half), _cos_pi(half)
                real, imag = (a - b) * (_F(1) - _F(2) * sin * sin), (a + b) * (_F(2) * sin * cos)
                size = np.sqrt(real * real + imag * imag)
                scale = _F(1) / size if amplitude[i] * size > threshold_ else _F(0)
                real, imag = real * scale, imag * scale
                at = np.uint64(2) * i
                out[e, at] = real * odd_cos + imag * odd_sin
                out[e, at + np.uint64(1)] = sign * (imag * odd_cos - real * odd_sin)
