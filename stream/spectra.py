"""G(k,q) at one scan frequency: what the engine sums over k row by row, for whoever wants to look at it.

The engine itself never holds G (see ``stream.accumulator``); tutorials, notebooks and diagnostic pictures need it at a
few frequencies only.
"""

from __future__ import annotations

import math
from typing import Any

from stream.array import namespace


def spectrum_at(data: Any, row: int, column: int) -> Any:
    """G(k,q) = sum_r I(r,k) exp(-2 pi i q.r) at one bin of the scan's discrete Fourier transform.

    ``data``: counts, real, (scan rows, scan columns, ...), NumPy or CuPy; ``row``, ``column``: the bin of q as
    ``numpy.fft`` counts it, negative ones too, so that ``spectrum_at(data, -row, -column)`` is the complex conjugate.
    Returns complex128 of the remaining shape: ``fft2(data, axes=(0, 1))[row, column]``, without the memory of the
    whole transform (one scan row is converted at a time).
    """
    xp = namespace(data)
    turn_row, turn_column = (
        xp.exp(-2j * math.pi * (bin_ * xp.arange(n) % n) / n)
        for bin_, n in zip((row, column), data.shape[:2], strict=True)
    )
    parts = xp.stack([turn_column.real, turn_column.imag])
    total = xp.zeros(data.shape[2:], xp.complex128)
    for turn, line in zip(turn_row, data, strict=True):
        real, imag = xp.tensordot(parts, line.astype(xp.float64), 1)
        total += turn * (real + 1j * imag)
    return total
