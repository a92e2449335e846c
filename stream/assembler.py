"""Open rows: where decoded frames collect until their scan row is full, or closed with what it has.

Frames may come in any order, twice, or not at all. Each position remembers whether its frame of the newest pass is
there; a frame that comes after its row was closed opens the row again and is merged into it later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

#: Rows that an incomplete row may lie behind the newest frame before it is shown; grows when frames prove late.
_SMALLEST_LAG = 2


@dataclass(frozen=True)
class ClosedRow:
    """A row, or the late rest of one, on its way into the ring. ``slot`` is to be given back with ``release``."""

    slot: int
    pass_: int
    row: int
    time_ns: int
    """arrival of the frame that came last before it was closed, ns since the epoch"""


def groups(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ``keys`` (int64, not empty) in ascending order, and for each element which of them it is."""
    if (keys[1:] >= keys[:-1]).all():  # as they nearly always come; sorting takes many times as long
        new = np.concatenate([[True], keys[1:] > keys[:-1]])
        return keys[new], np.cumsum(new) - 1
    return np.unique(keys, return_inverse=True)


class RowAssembler:
    """``slots`` open rows of ``columns`` positions with ``pixels`` bright-field pixels each, in arrays of ``xp``.

    ``in_order``: rows are scanned in ascending order, so that a full row says that older ones will not be completed.
    ``scanned``: bool ``scan_shape``, the positions that frames can come for (by default all).
    Not thread-safe: the engine locks.
    """

    def __init__(
        self,
        scan_shape: tuple[int, int],
        pixels: int,
        dtype: np.dtype,
        sums_dtype: np.dtype,
        slots: int,
        in_order: bool,
        scanned: np.ndarray | None = None,
        xp: ModuleType = np,
    ) -> None:
        self.scan_shape = scan_shape
        self.pixels: Any = xp.empty((slots, scan_shape[1], pixels), dtype)
        self.sums = np.empty((slots, scan_shape[1], 4), sums_dtype)
        self.received = np.zeros((slots, scan_shape[1]), bool)
        self.closed: deque[ClosedRow] = deque()
        self._time_ns = 0
        self._in_order = in_order
        self._free = list(range(slots))
        self._open: dict[tuple[int, int], int] = {}
        self._newest_pass = np.full(scan_shape[0], -1, np.int64)
        self._closed_pass = np.full(scan_shape[0], -1, np.int64)
        # Positions that no frame can come for count as held, so that their row can be full.
        self._never = np.zeros(scan_shape, bool) if scanned is None else ~scanned
        self._held = self._never.copy()
        self._lag = _SMALLEST_LAG

    def classify(self, passes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which frames are late (of an older pass than their row's newest), and which duplicates: two bool arrays."""
        newest = self._newest_pass[rows]
        late = passes < newest
        return late, ~late & (passes == newest) & self._held[rows, columns]

    def open_slots(self, passes: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """A slot for each frame, int64 (frames,); opens rows as needed. None when there are not enough free slots."""
        ny = self.scan_shape[0]
        keys, inverse = groups(passes * ny + rows)
        pairs = [divmod(int(key), ny) for key in keys]
        new = [pair for pair in pairs if pair not in self._open]
        if len(new) > len(self._free):
            return None
        for pass_, row in new:
            newest = int(self._newest_pass[row])
            if pass_ > newest:
                # What an older pass left open goes into the ring first: it must never replace the newer one.
                if (newest, row) in self._open:
                    self.close((newest, row))
                self._newest_pass[row] = pass_
                self._held[row] = self._never[row]
            elif (self._held[row] & ~self._never[row]).any():
                self._lag = min(2 * self._lag, ny)  # closed too early: frames come in less order than thought
            slot = self._free.pop()
            self._open[pass_, row] = slot
            self.received[slot] = False
        return np.array([self._open[pair] for pair in pairs], np.int64)[inverse]

    def mark(self, slots: np.ndarray, passes: np.ndarray, rows: np.ndarray, columns: np.ndarray, time_ns: int) -> None:
        """Note that these frames are in their slots; closes rows that are full now, and rows older than those."""
        self._time_ns = time_ns
        self.received[slots, columns] = True
        self._held[rows, columns] = True
        done = None
        changes = np.flatnonzero(np.concatenate([[True], slots[1:] != slots[:-1]])[: len(slots)])
        _, first = np.unique(slots[changes], return_index=True)
        for at in changes[first].tolist():
            pair = int(passes[at]), int(rows[at])
            if pair in self._open and self._held[pair[1]].all():
                self.close(pair)
                done = max(done or pair, pair)
        if self._in_order and len(slots):
            # A full row, or a row well ahead: older ones will hardly be completed.
            behind = divmod(int((passes * len(self._held) + rows).max()) - self._lag, len(self._held))
            limit = max(done or behind, behind)
            for older in sorted(other for other in self._open if other < limit):
                self.close(older)

    def close(self, pair: tuple[int, int]) -> None:
        """Close one open row (pass, row) with what it has."""
        slot = self._open.pop(pair)
        self._closed_pass[pair[1]] = max(pair[0], self._closed_pass[pair[1]])
        if self.received[slot].any():
            self.closed.append(ClosedRow(slot, *pair, self._time_ns))
        else:  # opened for a frame that could not be decoded
            self.release(slot)

    def close_oldest(self) -> None:
        """Close the open row that was scanned first, to make room; nothing happens when none is open."""
        if self._open:
            self.close(min(self._open))

    def close_all(self) -> None:
        """Close every open row, in scan order: the series is over, or silent."""
        for pair in sorted(self._open):
            self.close(pair)

    def release(self, slot: int) -> None:
        """Give a slot back once its content is in the ring."""
        self._free.append(slot)

    @property
    def newest_pass(self) -> int:
        """The newest pass that any frame belonged to, -1 before the first."""
        return int(self._newest_pass.max())

    @property
    def passes_done(self) -> int:
        """How many passes are over: those before the newest, and that one when all of its rows were closed."""
        newest = self.newest_pass
        scanned = ~self._never.all(axis=1)
        return max(0, newest + int((self._closed_pass[scanned] == newest).all()))
