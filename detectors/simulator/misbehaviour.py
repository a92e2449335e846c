"""What goes wrong between a real detector and its receiver, on purpose, reproducibly and counted."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from detectors.errors import ConfigurationError
from detectors.simulator.source import Payload

#: Random numbers drawn at a time.
_DRAWS = 4096


@dataclass
class MisbehaviourCounts:
    """What was done to the frames, in frames. A frame has at most one fate, so the counts do not overlap."""

    frames: int = 0
    """taken from the source"""
    sent: int = 0
    """handed on: taken - dropped + duplicated, less those still held back when a scan was cut off"""
    dropped: int = 0
    duplicated: int = 0
    reordered: int = 0
    corrupted: int = 0


@dataclass(frozen=True)
class Misbehaviour:
    """How a simulated detector misbehaves.

    ``drop``, ``duplicate``, ``reorder``, ``corrupt``: shares of the frames, 0..1, together at most 1; every frame meets
    at most one of these. A *reordered* frame is held back for 1 to ``reorder_window`` frames. A *corrupted* payload is
    cut short, so that no decoder can unpack it. ``stop_after``: the detector falls silent after that many frames, in
    the middle of the scan and without an end message, unless ``end_when_stopped``. The same ``seed`` does the same.

    Raises ``ConfigurationError`` when a value is out of range.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    stop_after: int | None = None
    seed: int = 0
    reorder_window: int = 50
    end_when_stopped: bool = False

    def __post_init__(self) -> None:
        shares = {"drop": self.drop, "duplicate": self.duplicate, "reorder": self.reorder, "corrupt": self.corrupt}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigurationError(f"the share of frames to {name} must be 0 to 1, got {share!r}")
        if sum(shares.values()) > 1 + 1e-9:
            raise ConfigurationError(f"drop, duplicate, reorder and corrupt add up to {sum(shares.values()):g}, over 1")
        if self.reorder_window < 1:
            raise ConfigurationError(f"reorder_window must be at least 1, got {self.reorder_window!r}")
        if self.stop_after is not None and self.stop_after < 0:
            raise ConfigurationError(f"stop_after must not be negative, got {self.stop_after!r}")

    def apply(
        self, frames: Iterable[tuple[int, Payload]], counts: MisbehaviourCounts | None = None
    ) -> Iterator[tuple[int, Payload]]:
        """Let (index, payload) pairs through, misbehaving; adds what it does to ``counts`` as it goes."""
        counts = counts if counts is not None else MisbehaviourCounts()
        held: list[tuple[int, int, Payload]] = []  # (when due, index, payload), a heap
        for (index, payload), (fate, detail) in zip(self._until_stop(frames), self._draws(), strict=False):
            counts.frames += 1
            while held and held[0][0] < counts.frames:
                yield self._release(held, counts)
            fate -= self.drop
            if fate < 0:
                counts.dropped += 1
                continue
            fate -= self.reorder
            if fate < 0:
                counts.reordered += 1
                heapq.heappush(held, (counts.frames + 1 + int(detail * self.reorder_window), index, payload))
                continue
            fate -= self.corrupt
            if fate < 0:
                counts.corrupted += 1
                payload = memoryview(payload)[: int(detail * memoryview(payload).nbytes)]
            elif fate < self.duplicate:
                counts.duplicated += 1
                counts.sent += 1
                yield index, payload
            counts.sent += 1
            yield index, payload
        # A detector that died takes what it held back with it.
        while held and self.ends(counts):
            yield self._release(held, counts)

    def ends(self, counts: MisbehaviourCounts) -> bool:
        """Whether the series comes to a proper end, with the frames still held back and an end message."""
        return self.end_when_stopped or self.stop_after is None or counts.frames < self.stop_after

    def _release(self, held: list[tuple[int, int, Payload]], counts: MisbehaviourCounts) -> tuple[int, Payload]:
        counts.sent += 1
        _, index, payload = heapq.heappop(held)
        return index, payload

    def _until_stop(self, frames: Iterable[tuple[int, Payload]]) -> Iterator[tuple[int, Payload]]:
        if self.stop_after is None:
            yield from frames
            return
        # The limit comes first: asking the source for one frame more could mean computing a whole scan row.
        for _, frame in zip(range(self.stop_after), frames, strict=False):
            yield frame

    def _draws(self) -> Iterator[tuple[float, float]]:
        rng = np.random.default_rng(self.seed)
        while True:
            yield from map(tuple, rng.random((_DRAWS, 2)).tolist())
