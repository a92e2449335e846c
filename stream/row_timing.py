"""Rows from time stamps: where frame numbers do not tell where a scan row begins, pauses between exposures do.

For detectors that are started row by row, or miss triggers. The beam's way back shows as a pause of more than one and
a half exposure periods, and each row counts its frames anew: a frame that was lost, or one too many, moves the rest of
its own row and no other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from statistics import median, median_low

import numpy as np

from detectors.errors import ConfigurationError
from detectors.messages import FrameBlock
from stream.scan import ScanPattern

#: Frames that the exposure period is learnt from, the first to arrive.
LEARNT_FROM = 32
#: A pause is longer than so many periods.
_PAUSE = 1.5
#: How many of the newest rows say how long a row and its flyback usually are.
_REMEMBERED = 31
#: Rows that count as seen before the first one: as long as the settings say.
_ASSUMED = 3
#: So many frames in a row must have come faster than the detector can, before their numbers are believed.
_DOUBTED = 8
#: Rows that were lost as a whole, each of which can still be filled by late frames.
_LATE_ROWS = 64

#: Beyond every row and place, whatever frame numbers a stream makes up.
_ANYWHERE = 1 << 62

#: A block and its frames' places: pass, row and column, as ``ScanPattern.locate`` gives them.
Located = tuple[FrameBlock, np.ndarray, np.ndarray, np.ndarray]


class RowTiming:
    """Finds the places of one series' frames. However the frames are cut into blocks, the places are the same.

    ``scan``: a raster; its ``flyback_frames_per_row`` are those that come without a pause behind the row. Frames beyond
    the columns of their row lie outside.
    """

    def __init__(self, scan: ScanPattern) -> None:
        self._scan = scan
        self._held: list[FrameBlock] = []
        self._period: float | None = None
        # The newest frame, by its number: at first, the one before the first position.
        self._index, self._row, self._place = scan.start_offset - 1, 0, -1
        self._time: int | None = None
        self._doubts = 0
        self._pauses: deque[float] = deque(maxlen=_REMEMBERED)
        row_frames = scan.shape[1] + scan.flyback_frames_per_row
        self._lengths: deque[int] = deque([row_frames] * _ASSUMED, maxlen=_REMEMBERED)
        # From each of these frame numbers on, places follow from numbers: for frames that come late, or twice.
        self._marks: list[tuple[int, int, int]] = [(scan.start_offset, 0, 0)]

    def take(self, block: FrameBlock) -> list[Located]:
        """Locate a block, or hold it (compact) until the exposure period is known; what was held comes first.

        Raises ``ConfigurationError`` when the frames have no time stamps, or none that tell them apart.
        """
        if self._period is not None:
            return [self._locate(block, self._period)]
        self._held.append(block.compact())
        return self.rest() if sum(map(len, self._held)) >= LEARNT_FROM else []

    def rest(self) -> list[Located]:
        """What is still held, at the end of a series. Raises like :meth:`take`."""
        if not self._held:
            return []
        self._period = period = _exposure_period(self._held)
        held, self._held = self._held, []
        return [self._locate(block, period) for block in held]

    def _locate(self, block: FrameBlock, period: float) -> Located:
        indices, times, count = block.indices, block.exposed_ns, len(block)
        rows, places = np.empty(count, np.int64), np.empty(count, np.int64)
        if times is None:
            stops = np.arange(1, count + 1)
        else:  # runs of frames that follow each other without a pause need no closer look than their first one
            smooth = (np.diff(indices) == 1) & (np.diff(times) <= _PAUSE * period)
            stops = np.append(np.flatnonzero(~smooth) + 1, count)
        at = 0
        while at < count:
            index = int(indices[at])
            row, place = self._step(index, None if times is None else int(times[at]), period)
            rows[at], places[at] = min(row, _ANYWHERE), min(place, _ANYWHERE)
            stop = at + 1
            if times is not None and self._index == index and self._time is not None:
                stop = int(stops[np.searchsorted(stops, at, side="right")])
                rows[at + 1 : stop] = self._row
                places[at + 1 : stop] = self._place + np.arange(1, stop - at)
                self._index, self._place = self._index + stop - at - 1, self._place + stop - at - 1
                self._time = int(times[stop - 1])
            at = stop
        return block, *self._scan.locate_in_rows(rows, places)

    def _step(self, index: int, time: int | None, period: float) -> tuple[int, int]:
        """(row, place in the row) of the next frame to arrive; -1 where it is not to be believed."""
        step = index - self._index
        if step <= 0:
            first, row, place = self._marks[bisect_right(self._marks, (index, _ANYWHERE, 0)) - 1]
            return (row, place + index - first) if index >= first else (-1, -1)
        # Without a time, the frame came when its number says.
        elapsed = step * period if time is None or self._time is None else time - self._time
        if step > 1 and elapsed < step * period / 2 and self._doubts < _DOUBTED:
            self._doubts += 1
            return -1, -1
        self._doubts = 0
        pause = elapsed - (step - 1) * period  # if frames were lost, they took their time
        usual = median_low(self._lengths)
        unseen = max(1, round(pause / period) - 1) if pause > _PAUSE * period else 0
        place = self._place + step + unseen
        full = place >= usual and (unseen > 0 or time is None or self._time is None)
        if full or (unseen and pause >= self._row_pause(period)):
            if step == 1:
                self._pauses.append(pause)
                self._lengths.append(self._place + 1)
            self._begin_row(index, step, usual)
        else:
            self._place = place
            if unseen:
                self._mark(index, self._row, place)
        self._index, self._time = index, time
        return self._row, self._place

    def _row_pause(self, period: float) -> float:
        """A pause so long ends a row that is not full, too. A shorter one means exposures that are missing in the row:
        about one, or as many as could be if flyback clearly takes longer."""
        usual = median(self._pauses) if len(self._pauses) >= _ASSUMED else None
        if usual is None:
            return (_PAUSE + 1) * period
        return max((_PAUSE + 1) * period, usual / 2) if usual > (_PAUSE + 1.25) * period else 0.0

    def _begin_row(self, index: int, step: int, usual: int) -> None:
        """Frame ``index`` belongs to another row than the newest one, ``step`` before it. The frames that are missing
        between them are taken to have filled that row up first."""
        lost = min(step - 1, max(0, self._place + step - usual))
        skipped, self._place = divmod(lost, usual)
        self._row += 1 + skipped
        for back in range(min(skipped, _LATE_ROWS), -1, -1):
            self._mark(index - self._place - back * usual, self._row - back, 0)

    def _mark(self, index: int, row: int, place: int) -> None:
        self._marks.append((index, row, place))
        keep = 2 * self._scan.shape[0] + _LATE_ROWS
        if len(self._marks) > 2 * keep:
            del self._marks[:-keep]


def _exposure_period(blocks: list[FrameBlock]) -> float:
    """The time [ns] from one exposure to the next within a row, from the first frames that came.

    It is the median of what is no pause beside the shorter ones: rows may be as short as two frames.
    """
    stamped = [block for block in blocks if block.exposed_ns is not None]
    if not stamped:
        raise ConfigurationError(
            "rows were to be found by time gaps, but the stream sends no time stamps: leave row_starts out"
        )
    indices, first = np.unique(np.concatenate([b.indices for b in stamped])[:LEARNT_FROM], return_index=True)
    times = np.concatenate([b.exposed_ns for b in stamped if b.exposed_ns is not None])[first]
    periods = np.diff(times) / np.diff(indices)
    if len(periods) == 0:
        return 1.0  # a single frame has no neighbour to be far from
    short = float(np.quantile(periods, 0.25, method="lower"))
    if not short > 0:
        raise ConfigurationError(
            "rows were to be found by time gaps, but the stream's time stamps do not advance from frame to frame: "
            "leave row_starts out"
        )
    return float(np.median(periods[periods <= _PAUSE * short]))
