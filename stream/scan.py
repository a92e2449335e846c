"""From a frame's index to its place in the scan: pass, row and column. Arrival order plays no part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from detectors.errors import ConfigurationError


@dataclass(frozen=True)
class ScanPattern:
    """How the beam goes over the specimen.

    ``shape`` (rows, columns) of the scan. After each row come ``flyback_frames_per_row`` frames that belong to no
    position, and after each pass ``flyback_frames_per_pass``. With ``serpentine``, every second row runs backwards.
    ``positions``: instead of all this, int64 (frames per pass, 2) the (row, column) of each frame, negative for a frame
    that belongs to none; every position may occur once. ``start_offset``: so many frames come before the first
    position, once a series; below 0, so many positions come before the first frame. ``rows_by_time``: where a row
    begins is seen from the exposures' times (``stream.row_timing``) instead of counted. Raises ``ConfigurationError``
    for impossible values.
    """

    shape: tuple[int, int]
    flyback_frames_per_row: int = 0
    flyback_frames_per_pass: int = 0
    serpentine: bool = False
    positions: np.ndarray | None = None
    start_offset: int = 0
    rows_by_time: bool = False

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or min(self.flyback_frames_per_row, self.flyback_frames_per_pass) < 0:
            raise ConfigurationError(
                f"a scan needs at least 1x1 positions and no negative numbers of flyback frames, got {self.shape}, "
                f"{self.flyback_frames_per_row} per row, {self.flyback_frames_per_pass} per pass"
            )
        if self.positions is not None:
            self._check_table(self.positions)
        if -self.start_offset >= self.frames_per_pass:
            raise ConfigurationError(
                f"a start_offset of {self.start_offset} leaves nothing of a pass of {self.frames_per_pass} frames"
            )
        if self.rows_by_time and (self.positions is not None or self.shape[1] < 2 or self.flyback_frames_per_pass):
            raise ConfigurationError(
                "rows can be found by time gaps only in a raster of at least two columns, without "
                "flyback_frames_per_pass: leave row_starts out"
            )

    def _check_table(self, table: np.ndarray) -> None:
        if table.ndim != 2 or table.shape[1] != 2 or not np.issubdtype(table.dtype, np.integer):
            raise ConfigurationError(f"a position table is integers (frames, 2), got {table.dtype} {table.shape}")
        if self.flyback_frames_per_row or self.serpentine:
            raise ConfigurationError(
                "a position table already says where each frame lies: no flyback per row, no serpentine"
            )
        used = table[(table >= 0).all(axis=1)]
        if len(used) == 0 or (used >= np.array(self.shape)).any():
            raise ConfigurationError(
                f"a position of the table lies outside the scan of {self.shape[0]}x{self.shape[1]}"
            )
        if len(np.unique(used[:, 0] * self.shape[1] + used[:, 1])) != len(used):
            raise ConfigurationError("a position occurs twice in the position table")

    @cached_property
    def scanned(self) -> np.ndarray:
        """bool ``shape``: the positions that frames come for; all but those that a table leaves out."""
        if self.positions is None:
            return np.ones(self.shape, bool)
        out = np.zeros(self.shape, bool)
        out[tuple(self.positions[(self.positions >= 0).all(axis=1)].T)] = True
        return out

    def scanned_in(self, pass_: int) -> np.ndarray:
        """The same for one pass: a negative ``start_offset`` leaves out some of the first."""
        return self.scanned if pass_ > 0 else self._scanned_first

    @cached_property
    def _scanned_first(self) -> np.ndarray:
        _, row, column = self.locate(np.arange(self.start_offset, 0))
        out = self.scanned.copy()
        out[row[row >= 0], column[row >= 0]] = False
        return out

    @property
    def frames_per_pass(self) -> int:
        """Frames from the start of one pass to the start of the next, flyback included."""
        body = (
            self.shape[0] * (self.shape[1] + self.flyback_frames_per_row)
            if self.positions is None
            else len(self.positions)
        )
        return body + self.flyback_frames_per_pass

    def frames_in(self, passes: int) -> int:
        """How many frames a series of so many passes has, ``start_offset`` included."""
        return passes * self.frames_per_pass + self.start_offset

    def positions_in(self, frames: int) -> int:
        """How many of the frames 0 ... ``frames`` - 1 belong to a position (where rows are counted)."""
        return max(0, self._positions_before(frames - self.start_offset) - self._positions_before(-self.start_offset))

    def _positions_before(self, frames: int) -> int:
        """... of that many frames from the first position on."""
        if frames <= 0:
            return 0
        passes, rest = divmod(frames, self.frames_per_pass)
        if self.positions is not None:
            return passes * int(self.scanned.sum()) + int(np.count_nonzero((self.positions[:rest] >= 0).all(axis=1)))
        rows, frames_in_row = divmod(rest, self.shape[1] + self.flyback_frames_per_row)
        begun = min(frames_in_row, self.shape[1]) if rows < self.shape[0] else 0
        return (passes * self.shape[0] + min(rows, self.shape[0])) * self.shape[1] + begun

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pass, row, column) of each frame index, int64 arrays; row and column are -1 for a frame without position."""
        passes, within = np.divmod(indices - self.start_offset, self.frames_per_pass)
        if self.positions is not None:
            outside = within >= len(self.positions)
            row, column = self.positions[np.where(outside, 0, within)].T
            outside |= (row < 0) | (column < 0)
        else:
            row, column = np.divmod(within, self.shape[1] + self.flyback_frames_per_row)
            outside = (row >= self.shape[0]) | (column >= self.shape[1])
            column = self._turned(row, column)
        return passes, np.where(outside, -1, row), np.where(outside, -1, column)

    def locate_in_rows(self, rows: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same for frames of which it is known, as int64 arrays, that they are number ``places`` (from 0) of their
        row, and ``rows`` before it, counted over all passes."""
        passes, row = np.divmod(rows, self.shape[0])
        outside = (places < 0) | (places >= self.shape[1])
        return passes, np.where(outside, -1, row), np.where(outside, -1, self._turned(row, places))

    def _turned(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        return np.where(row % 2 == 1, self.shape[1] - 1 - column, column) if self.serpentine else column
