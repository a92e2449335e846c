"""Another client at the same detector: messages are handed out in turn, and what one client gets the others miss."""

from __future__ import annotations

from collections import deque

import numpy as np

#: So many of the newest frames are looked at.
_LOOKED_AT = 4096
#: Fewer frames show no pattern.
_FEWEST_FRAMES = 20
#: Fewer interruptions show none, either.
_FEWEST_GAPS = 8
#: Share of the gaps that must be alike, and of the runs between them.
_ALIKE = 0.9


class GapPattern:
    """Recognises frame numbers that are missing in turn: every second one, two of three, ...; runs of them alike, when
    messages hold several frames. One for each series; frames may come in any order."""

    def __init__(self) -> None:
        self._recent: deque[np.ndarray] = deque()
        self._frames = 0

    def take(self, indices: np.ndarray) -> None:
        """Note the numbers of frames that came, int64 (frames,)."""
        indices = indices[-_LOOKED_AT:].copy()
        self._recent.append(indices)
        self._frames += len(indices)
        while self._frames - len(self._recent[0]) >= _LOOKED_AT:
            self._frames -= len(self._recent.popleft())

    @property
    def sentence(self) -> str:
        """What the user should know, or nothing."""
        if self._frames <= _FEWEST_FRAMES:
            return ""
        numbers = np.unique(np.concatenate(list(self._recent)))
        steps = np.diff(numbers)
        gaps = np.flatnonzero(steps > 1)
        if len(gaps) < _FEWEST_GAPS:
            return ""
        run, runs_alike = _usual(np.diff(gaps))
        gap, gaps_alike = _usual(steps[gaps] - 1)
        others, rest = divmod(gap, run)
        if rest or min(runs_alike, gaps_alike) < _ALIKE:
            return ""
        one, many = ("frame", "frames") if run == 1 else (f"run of {run} frames", f"runs of {run} frames")
        if others == 1:
            return f"every second {one} is missing: is another client connected?"
        return f"{others} of {others + 1} {many} are missing: are {others} other clients connected?"


def _usual(numbers: np.ndarray) -> tuple[int, float]:
    """The most frequent number, and its share."""
    values, counts = np.unique(numbers, return_counts=True)
    most = int(counts.argmax())
    return int(values[most]), float(counts[most] / len(numbers))
