"""RowRing: the newest scan rows, as bright-field pixels in their native dtype, in device memory.

One slot a scan row. A row of a newer pass takes the slot of the older one, or is added to it when passes are averaged.
Everything that is ever shown can be made again from here: new optics need no new scan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from stream.array import Device

#: Elements behind the last pixel.
_SLACK = 16


def ring_dtype(dtype: np.dtype, averaging: bool) -> np.dtype:
    """Counts are kept as they came; sums over passes need room for 65,537 passes of 16-bit counts, or exact doubles."""
    if not averaging:
        return dtype
    return np.dtype("u4") if dtype.itemsize < 4 else np.dtype("f8")


def ring_bytes(scan_shape: tuple[int, int], pixels: int, dtype: np.dtype, averaging: bool) -> int:
    """Device memory of a ring, in bytes: it never takes more."""
    return scan_shape[0] * scan_shape[1] * pixels * ring_dtype(dtype, averaging).itemsize


class RowRing:
    """``scan_shape`` (rows, columns), ``pixels`` K, ``dtype`` of the counts. Not thread-safe: the engine locks."""

    def __init__(
        self, scan_shape: tuple[int, int], pixels: int, dtype: np.dtype, device: Device, averaging: bool
    ) -> None:
        self.scan_shape = scan_shape
        self.averaging = averaging
        self.pass_of_row = np.full(scan_shape[0], -1, np.int64)
        self.frames = np.zeros(scan_shape, np.int32)
        """int32 ``scan_shape``: frames held at each position; 0 or 1 unless passes are averaged"""
        self._device = device
        # Vectors may be read beyond the last pixel.
        size = math.prod(scan_shape) * pixels
        memory = device.xp.empty(size + _SLACK, ring_dtype(dtype, averaging))
        self._counts = memory[:size].reshape(*scan_shape, pixels)
        self._aside: dict[int, Any] = {}

    @property
    def acquired(self) -> np.ndarray:
        """bool (scan rows,): which rows hold anything."""
        return self.pass_of_row >= 0

    def touch(self, row: int) -> None:
        """Let the system hand out the memory of a row that holds nothing yet: it clears it first, which takes time."""
        if self.pass_of_row[row] < 0:
            self._counts[row] = 0

    def commit(self, row: int, pass_: int, counts: Any, received: np.ndarray) -> None:
        """Take a row over, or its late rest: ``counts`` (columns, K), ``received`` bool (columns,) on the host."""
        slot, new = self._counts[row], self._device.xp.asarray(counts)
        fresh = self.pass_of_row[row] < 0 or (pass_ != self.pass_of_row[row] and not self.averaging)
        if received.all():
            if fresh or not self.averaging:
                slot[...] = new
            else:
                slot += new
        else:
            # Columns without a frame are never read, so a fresh slot needs no clearing.
            xp = self._device.xp
            columns = np.flatnonzero(received)
            first = fresh | (self.frames[row, columns] == 0)
            chosen = xp.asarray(columns[first])
            slot[chosen] = new[chosen]
            if not first.all():
                chosen = xp.asarray(columns[~first])
                slot[chosen] += new[chosen]
        self.frames[row] = received if fresh else self.frames[row] + received
        self.pass_of_row[row] = max(pass_, self.pass_of_row[row])

    def lying(self, rows: np.ndarray) -> tuple[Any, np.ndarray, Any]:
        """The counts as they lie, (scan rows, columns, K) with 16 elements of slack behind them, and what to do with
        them: float32 (len(rows),) by which to multiply each of ``rows`` to get mean counts a frame.

        NaN for a row in which positions have different numbers of frames, or that was set aside. These rows, in their
        order, are the third item: float32 (any, columns, K) with slack, as from :meth:`filled`; None where there are
        none.
        """
        frames = self.frames[rows]
        least = frames.min(axis=1)
        aside = np.array([int(row) in self._aside for row in rows], bool)
        uneven = (least == 0) | (frames.max(axis=1) != least) | aside
        scale = np.where(uneven, np.nan, 1 / np.maximum(least, 1)).astype(np.float32)
        return self._counts, scale, self.filled(rows[uneven]) if uneven.any() else None

    def filled(self, rows: np.ndarray) -> Any:
        """The rows as mean counts a frame, float32 (len(rows), columns, K) on the device.

        A position without a frame holds its row's mean pattern. ``rows`` must be acquired.
        """
        xp = self._device.xp
        shape = (len(rows), *self._counts.shape[1:])
        out = xp.empty(math.prod(shape) + _SLACK, np.float32)[:-_SLACK].reshape(shape)
        for i, row in enumerate(rows):
            out[i] = self._aside.get(int(row), self._counts[row])
            frames = self.frames[row]
            if (frames == 1).all():
                continue
            held = xp.asarray(np.flatnonzero(frames))
            out[i, held] /= xp.asarray(frames[frames > 0], dtype=np.float32)[:, None]
            if not (frames > 0).all():
                out[i, xp.asarray(np.flatnonzero(frames == 0))] = out[i, held].mean(axis=0)
        return out

    def set_aside(self, rows: Iterable[int]) -> int:
        """How many of ``rows`` lie elsewhere than in the ring. What was read while it grew must be read again."""
        return sum(int(row) in self._aside for row in rows)


class FrozenRing(RowRing):
    """A ring as it is at this moment, for a reader that does not lock, while rows go on into ``ring``.

    It shares the counts. Frames that come later to a row's gaps change nothing here: what is held is written down in
    ``frames``. A row that is written over, or added to, must be put aside first.
    """

    def __init__(self, ring: RowRing) -> None:
        self.__dict__.update(ring.__dict__)
        self.pass_of_row, self.frames = ring.pass_of_row.copy(), ring.frames.copy()
        self._aside = {}

    def put_aside(self, rows: Iterable[int]) -> None:
        """Copy what ``rows`` (acquired) hold now, unless that was done before."""
        for row in rows:
            if int(row) not in self._aside:
                self._aside[int(row)] = self._counts[row].copy()
