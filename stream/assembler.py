"""Open rows: where decoded frames collect until their scan row is full, or closed with what it has.

Frames may come in any order, twice, or not at all. Each position remembers whether its frame of the newest pass is
there; a frame that comes after its row was closed opens the row again and is merged into it later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClosedRow:
    """A row, or the late rest of one, on its way into the ring. ``slot`` is to be given back with ``release``."""

    slot: int
    pass_: int
    row: int
    time_ns: int
    """arrival of the frame that came last before it was closed, ns since the epoch"""


class RowAssembler:
    """``slots`` open rows of ``columns`` positions with ``pixels`` bright-field pixels each, on the host.

    ``in_order``: rows are scanned in ascending order, so that a full row says that older ones will not be completed.
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
    ) -> None:
        self.scan_shape = scan_shape
        self.pixels = np.empty((slots, scan_shape[1], pixels), dtype)
        self.sums = np.empty((slots, scan_shape[1], 4), sums_dtype)
        self.received = np.zeros((slots, scan_shape[1]), bool)
        self.closed: deque[ClosedRow] = deque()
        self._time_ns = 0
        self._in_order = in_order
        self._free = list(range(slots))
        self._open: dict[tuple[int, int], int] = {}
        self._newest_pass = np.full(scan_shape[0], -1, np.int64)
        self._held = np.zeros(scan_shape, bool)

    def classify(self, passes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which frames are late (of an older pass than their row's newest), and which duplicates: two bool arrays."""
        newest = self._newest_pass[rows]
        late = passes < newest
        return late, ~late & (passes == newest) & self._held[rows, columns]

    def open_slots(self, passes: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """A slot for each frame, int64 (frames,); opens rows as needed. None when there are not enough free slots."""
        ny = self.scan_shape[0]
        keys, inverse = np.unique(passes * ny + rows, return_inverse=True)
        pairs = [divmod(int(key), ny) for key in keys]
        new = [pair for pair in pairs if pair not in self._open]
        if len(new) > len(self._free):
            return None
        for pair in new:
            slot = self._free.pop()
            self._open[pair] = slot
            self.received[slot] = False
        for pass_, row in pairs:
            if pass_ > self._newest_pass[row]:
                self._newest_pass[row] = pass_
                self._held[row] = False
        return np.array([self._open[pair] for pair in pairs], np.int64)[inverse]

    def mark(self, slots: np.ndarray, passes: np.ndarray, rows: np.ndarray, columns: np.ndarray, time_ns: int) -> None:
        """Note that these frames are in their slots; closes rows that are full now, and rows older than those."""
        self._time_ns = time_ns
        self.received[slots, columns] = True
        self._held[rows, columns] = True
        for slot in np.unique(slots):
            at = np.flatnonzero(slots == slot)[0]
            pair = int(passes[at]), int(rows[at])
            if pair in self._open and self._held[pair[1]].all():
                self.close(pair)
                if self._in_order:
                    for older in sorted(other for other in self._open if other < pair):
                        self.close(older)

    def close(self, pair: tuple[int, int]) -> None:
        """Close one open row (pass, row) with what it has."""
        slot = self._open.pop(pair)
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
        """How many passes are over: every row has been reached by a newer pass, or is full."""
        return max(0, int((self._newest_pass + self._held.all(axis=1)).min()))
