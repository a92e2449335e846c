"""The scan frequencies that are computed: the passband of the half plane, in columns, and groups of equal columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

#: Columns are contracted together while their padding costs less than this share ...
_MOST_PADDING = 0.06
#: ... and there are not too many of them to be shared out among threads.
_LARGEST_GROUP = 16


@dataclass(frozen=True)
class _Column:
    """The qy bins of one qx bin: direct and mirrored ones, and which direct ones their mirror image follows from."""

    direct: np.ndarray
    mirrored: np.ndarray
    follows: np.ndarray
    pads: bool

    @property
    def count(self) -> int:
        return len(self.direct) + len(self.mirrored)

    def beyond(self, ny: int) -> np.ndarray:
        """The qy bins beyond the cutoff; none where the mirror image is in the same column."""
        return np.setdiff1d(np.arange(ny), self.direct) if self.pads else self.direct[:0]

    def most(self, ny: int) -> int:
        """How many bins it can be padded to."""
        return self.count + 2 * (ny - len(self.direct)) * self.pads

    def padded(self, count: int, ny: int) -> _Column:
        """The same with ``count`` bins, the additional ones beyond the cutoff."""
        beyond = self.beyond(ny)
        more = beyond[: count - self.count]
        still = beyond[: count - self.count - len(more)]
        follows = np.concatenate([self.follows, np.zeros(len(more), bool)])
        return _Column(np.concatenate([self.direct, more]), np.concatenate([self.mirrored, still]), follows, self.pads)


def _group(chosen: list[_Column], ny: int) -> list[range]:
    """Runs of columns that lose little when all are padded to the largest."""
    groups = []
    first = 0
    for stop in range(1, len(chosen) + 1):
        wider = chosen[first : stop + 1]
        counts = [column.count for column in wider]
        padding = len(wider) * max(counts) - sum(counts)
        fits = max(counts) <= min(column.most(ny) for column in wider) and padding <= _MOST_PADDING * sum(counts)
        if stop == len(chosen) or len(wider) > _LARGEST_GROUP or not fits:
            groups.append(range(first, stop))
            first = stop
    return groups


@dataclass(frozen=True)
class Passband:
    """The scan frequencies that are computed, column by column (qx bins of the rfft), as flat *entries*.

    ``columns[i] : columns[i + 1]`` are the entries of qx bin i; ``row`` int64 (entries,) is the qy bin of each.
    An entry is *direct*, Psi(q) = sum_k T(k;q) G(k,q), or *mirrored*, Psi(-q) = conj(sum_k conj(T(k;-q)) G(k,q)).
    Some lie beyond the cutoff, where every kernel is 0, so that whole groups of columns have equally many.
    """

    scan_shape: tuple[int, int]
    columns: np.ndarray
    row: np.ndarray
    mirrored: np.ndarray
    follows: np.ndarray
    """bool (entries,): Psi(-q) = -conj(Psi(q)) follows from this direct entry"""
    groups: tuple[range, ...]
    """runs of columns with equal numbers of entries, for which one batched matrix product does"""
    first_column: int = 0
    """the qx bin of column 0: not 0 in a part of a passband"""

    @classmethod
    @lru_cache(maxsize=2)  # it is asked for again with every plan, and takes a second for thousands of rows
    def select(
        cls, scan_shape: tuple[int, int], scan_step: tuple[float, float], cutoff: float, antisymmetric: bool
    ) -> Passband:
        """All q != 0 with abs(q) < ``cutoff`` [1/Å]; ``scan_step`` (row, column) [Å]."""
        ny, nx = scan_shape
        qy, qx = np.fft.fftfreq(ny, scan_step[0]), np.fft.fftfreq(nx, scan_step[1])
        chosen = []
        for ix in range(nx // 2 + 1):
            inside = np.flatnonzero(np.hypot(qy, qx[ix]) < cutoff)
            if ix == 0:
                inside = inside[inside != 0]
            elif len(inside) == 0:
                break
            # Columns 0 and Nyquist are their own mirror images: every qy is computed there. On the row of the Nyquist
            # frequency -q and q share a bin but not a kernel, so both signs are computed there too.
            own_mirror = ix == 0 or 2 * ix == nx
            nyquist = 2 * inside == ny
            extra = inside[:0] if own_mirror else inside[nyquist] if antisymmetric else inside
            derived = np.full(len(inside), antisymmetric and not own_mirror) & ~nyquist
            chosen.append(_Column(inside, extra, derived, pads=not own_mirror))
        groups = _group(chosen, ny)
        padded = []
        for group in groups:
            count = max(chosen[ix].count for ix in group)
            padded += [chosen[ix].padded(count, ny) for ix in group]
        return cls(
            scan_shape,
            np.cumsum([0, *(column.count for column in padded)]),
            np.concatenate([part for column in padded for part in (column.direct, column.mirrored)]),
            np.concatenate([np.arange(column.count) >= len(column.direct) for column in padded]),
            np.concatenate([part for c in padded for part in (c.follows, np.zeros(len(c.mirrored), bool))]),
            tuple(groups),
        )

    @property
    def entries(self) -> int:
        return len(self.row)

    @property
    def column_count(self) -> int:
        return len(self.columns) - 1

    def column(self) -> np.ndarray:
        """The qx bin of each entry, int64 (entries,)."""
        return np.repeat(self.first_column + np.arange(self.column_count), np.diff(self.columns))

    def part(self, columns: range) -> Passband:
        """Some of the columns, for a block of kernels. It fills no spectrum of its own."""
        entries = slice(int(self.columns[columns.start]), int(self.columns[columns.stop]))
        groups = [range(max(g.start, columns.start), min(g.stop, columns.stop)) for g in self.groups]
        return Passband(
            self.scan_shape,
            self.columns[columns.start : columns.stop + 1] - entries.start,
            self.row[entries],
            self.mirrored[entries],
            self.follows[entries],
            tuple(range(g.start - columns.start, g.stop - columns.start) for g in groups if len(g)),
            self.first_column + columns.start,
        )

    def frequencies(self, scan_step: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """The (row, column) components of the frequency that each entry's kernel is evaluated at [1/Å], scan frame."""
        ny, nx = self.scan_shape
        sign = np.where(self.mirrored, -1, 1)
        return (
            np.fft.fftfreq(ny, scan_step[0])[sign * self.row % ny],
            np.fft.fftfreq(nx, scan_step[1])[sign * self.column() % nx],
        )

    def spectrum_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """How entries e fill the flat spectrum: ``psi[to] = e[source]``, ``psi[to_mirror] = ± conj(e[source_mirror])``.

        Returns int64 arrays (source, to, ±(source_mirror + 1), to_mirror); the third carries the sign of its entry.
        """
        ny, nx = self.scan_shape
        column = self.column()
        flat, flat_mirror = self.row * nx + column, (-self.row % ny) * nx + (-column % nx)
        source = np.flatnonzero(~self.mirrored)
        explicit, derived = np.flatnonzero(self.mirrored), np.flatnonzero(self.follows)
        signed = np.concatenate([explicit + 1, -(derived + 1)])
        return source, flat[source], signed, flat_mirror[np.concatenate([explicit, derived])]
