"""Rows from time stamps: simulated scans, of which it is known where each frame was exposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.errors import ConfigurationError
from detectors.messages import Encoding, FrameBlock
from stream.row_timing import LEARNT_FROM, RowTiming
from stream.scan import ScanPattern
from tests.data_helpers import Case, accumulate_all, assert_object, block, filled, payload_block, running

PERIOD_NS = 8_300
OUTSIDE = (-1, -1)


@dataclass(frozen=True)
class Frames:
    """Frames in order of arrival: ``index``, ``time`` [ns], and ``place``, the true (pass, row, column) of each."""

    index: np.ndarray
    time: np.ndarray
    place: np.ndarray

    def take(self, which: np.ndarray) -> Frames:
        return Frames(self.index[which], self.time[which], self.place[which])

    def without(self, *positions: int) -> Frames:
        """Lost on the way: their numbers are missing, too."""
        return self.take(np.setdiff1d(np.arange(len(self.index)), positions))

    def never_taken(self, *positions: int) -> Frames:
        """Triggers that the detector missed: it counts on as if nothing had been."""
        out = self.without(*positions)
        return replace(out, index=np.arange(len(out.index)) + self.index[0])


def scanned(
    shape: tuple[int, int],
    *,
    flyback: tuple[float, float] = (4.0, 9.0),
    passes: int = 1,
    extra: int = 0,
    jitter: float = 0.1,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Frames:
    """Rows of exposures, one period apart within ``jitter``, and pauses of ``flyback`` (least, most) periods between.

    ``extra`` frames follow each row without a pause; ``lengths``: how many frames each row has instead.
    """
    rng = np.random.default_rng(seed)
    times, places, now = [], [], 0.0
    for number in range(passes * shape[0]):
        pass_, row = divmod(number, shape[0])
        frames = shape[1] + extra if lengths is None else lengths[number]
        times.append(now + np.arange(frames) + jitter * (rng.random(frames) - 0.5))
        places += [(pass_, row, column) if column < shape[1] else (pass_, *OUTSIDE) for column in range(frames)]
        now += frames - 1 + rng.uniform(*flyback)
    time = (np.concatenate(times) * PERIOD_NS).astype(np.int64) + 1_700_000_000 * 10**9
    return Frames(np.arange(len(time)), time, np.array(places))


def frame_block(frames: Frames, timed: bool = True) -> FrameBlock:
    blank = payload_block([b""] * len(frames.index), frames.index, Encoding.RAW)
    return replace(blank, exposed_ns=frames.time if timed else None)


def located(scan: ScanPattern, frames: Frames, sizes: Sequence[int] = (7,)) -> np.ndarray:
    """(pass, row, column) of each frame, int64 (frames, 3), when they come in blocks of ``sizes``, over and over."""
    timing, out, at, turn = RowTiming(scan), [], 0, 0
    while at < len(frames.index):
        size = sizes[turn % len(sizes)]
        out += timing.take(frame_block(frames.take(np.arange(at, min(at + size, len(frames.index))))))
        at, turn = at + size, turn + 1
    out += timing.rest()
    np.testing.assert_array_equal(np.concatenate([b.indices for b, *_ in out]), frames.index, "frames must not be lost")
    return np.concatenate([np.stack(place, axis=1) for _, *place in out])


SHAPE = (8, 12)
SCAN = ScanPattern(SHAPE, rows_by_time=True)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(3, 40)),
    least=st.floats(2.3, 20),
    spread=st.floats(1, 3),
    passes=st.integers(1, 3),
    extra=st.integers(0, 3),
    jitter=st.floats(0, 0.3),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_whole_rows(
    shape: tuple[int, int],
    least: float,
    spread: float,
    passes: int,
    extra: int,
    jitter: float,
    sizes: list[int],
    seed: int,
) -> None:
    frames = scanned(shape, flyback=(least, least * spread), passes=passes, extra=extra, jitter=jitter, seed=seed)
    np.testing.assert_array_equal(located(ScanPattern(shape, rows_by_time=True), frames, sizes), frames.place)


@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    least=st.floats(1.8, 12),
    spread=st.floats(1, 2.5),
    lost=st.sets(st.integers(0, 8 * 12 - 1), max_size=30),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
)
def test_frames_lost_on_the_way(least: float, spread: float, lost: set[int], sizes: list[int]) -> None:
    """Their numbers are missing: every other frame is where it was, whether a row lost its start, middle or end."""
    frames = scanned(SHAPE, flyback=(least, least * spread)).without(*lost)
    np.testing.assert_array_equal(located(SCAN, frames, sizes), frames.place)


def test_whole_rows_lost_on_the_way() -> None:
    frames = scanned(SHAPE, passes=2).without(*range(5, 5 + 12 * 9 + 4))
    np.testing.assert_array_equal(located(SCAN, frames), frames.place)


@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    least=st.floats(3.1, 12),
    spread=st.floats(1, 2.5),
    rows=st.dictionaries(st.integers(0, 7), st.integers(0, 11)),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
)
def test_missed_triggers(least: float, spread: float, rows: dict[int, int], sizes: list[int]) -> None:
    """One missed exposure a row, which the numbers do not show: the time does, but for that of a row's first one."""
    frames = scanned(SHAPE, flyback=(least, least * spread)).never_taken(*(row * 12 + at for row, at in rows.items()))
    expected = frames.place.copy()
    for row, at in rows.items():
        if at == 0:
            expected[expected[:, 1] == row, 2] -= 1
    np.testing.assert_array_equal(located(SCAN, frames, sizes), expected)


def test_several_missed_triggers_in_one_place() -> None:
    frames = scanned(SHAPE, flyback=(12, 16)).never_taken(*range(5 * 12 + 3, 5 * 12 + 7))
    np.testing.assert_array_equal(located(SCAN, frames), frames.place)


def test_a_short_flyback_is_not_taken_for_a_missed_trigger() -> None:
    """Rows of uneven length, as a detector that is not synchronised makes them: each begins anew."""
    lengths = [12, 12, 12, 12, 9, 12, 11, 13]
    frames = scanned(SHAPE, flyback=(1.9, 2.1), lengths=lengths)
    np.testing.assert_array_equal(located(SCAN, frames), frames.place)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(9, 16), min_size=8, max_size=8))
def test_rows_of_any_length(lengths: list[int]) -> None:
    """Surplus frames lie outside, a short row leaves its rest missing, and the next row begins where it should."""
    frames = scanned(SHAPE, flyback=(6, 9), lengths=lengths)
    np.testing.assert_array_equal(located(SCAN, frames), frames.place)


def test_known_flyback_frames_are_part_of_their_row() -> None:
    """Of a row whose last frames are lost, and the next one's first: how long rows are tells which is which."""
    scan = ScanPattern(SHAPE, flyback_frames_per_row=2, rows_by_time=True)
    frames = scanned(SHAPE, extra=2).without(*range(12, 16))
    np.testing.assert_array_equal(located(scan, frames), frames.place)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    lost=st.sets(st.integers(0, 8 * 12 - 1), max_size=20),
    twice=st.lists(st.integers(0, 8 * 12 - 1), max_size=10),
    seed=st.integers(0, 9),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=3),
)
def test_late_and_double_frames_find_their_row(lost: set[int], twice: list[int], seed: int, sizes: list[int]) -> None:
    """Frames overtake each other by up to half a row, and some come again at the end."""
    whole = scanned(SHAPE)
    kept = np.setdiff1d(np.arange(96), list(lost))
    kept = kept[np.argsort(kept + np.random.default_rng(seed).uniform(0, 6, len(kept)), kind="stable")]
    frames = whole.take(np.concatenate([kept, np.array([i for i in twice if i not in lost], np.int64)]))
    np.testing.assert_array_equal(located(SCAN, frames, sizes), frames.place)


def test_frames_of_rows_that_were_passed_over_come_late() -> None:
    frames = scanned(SHAPE)
    order = np.concatenate([np.arange(15), np.arange(60, 96), np.arange(15, 60)])
    np.testing.assert_array_equal(located(SCAN, frames.take(order)), frames.take(order).place)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    lost=st.sets(st.integers(0, 95), max_size=10),
    missed=st.sets(st.integers(0, 60), max_size=4),
    swapped=st.lists(st.integers(0, 70), max_size=6),
    wild=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 1 << 62), st.integers(-(1 << 62), 1 << 62)), max_size=3),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    others=st.lists(st.integers(1, 60), min_size=1, max_size=5),
)
def test_blocks_change_nothing(
    lost: set[int],
    missed: set[int],
    swapped: list[int],
    wild: list[tuple[int, int, int]],
    sizes: list[int],
    others: list[int],
) -> None:
    """Whatever came, and however mad its numbers and times are."""
    frames = scanned(SHAPE, flyback=(1.4, 9)).without(*lost).never_taken(*missed)
    index, time = frames.index.copy(), frames.time.copy()
    for at in swapped:
        index[[at, at + 3]], time[[at, at + 3]] = index[[at + 3, at]], time[[at + 3, at]]
    for at, number, when in wild:
        index[at], time[at] = number, when // 4
    frames = Frames(index, time, frames.place)
    try:
        expected = located(SCAN, frames, [1])
    except ConfigurationError:
        with pytest.raises(ConfigurationError):
            located(SCAN, frames, sizes)
        return
    np.testing.assert_array_equal(located(SCAN, frames, sizes), expected)
    np.testing.assert_array_equal(located(SCAN, frames, others), expected)


def test_a_mad_frame_number_leaves_the_others_where_they_are() -> None:
    frames = scanned(SHAPE)
    index = frames.index.copy()
    index[50] = 10**15
    found = located(SCAN, replace(frames, index=index))
    others = np.arange(96) != 50
    np.testing.assert_array_equal(found[others], frames.place[others])
    assert tuple(found[50, 1:]) == OUTSIDE


def test_serpentine() -> None:
    frames = scanned(SHAPE)
    found = located(replace(SCAN, serpentine=True), frames)
    odd = frames.place[:, 1] % 2 == 1
    np.testing.assert_array_equal(found[~odd], frames.place[~odd])
    np.testing.assert_array_equal(found[odd, 2], 11 - frames.place[odd, 2])


def test_frames_before_the_first_position() -> None:
    whole = scanned((10, 12))
    found = located(replace(SCAN, start_offset=24), whole)
    assert (found[:24, 0] < 0).all()
    np.testing.assert_array_equal(found[24:], whole.place[:96])


@pytest.mark.parametrize("absent", [5, 12, 31])
def test_positions_before_the_first_frame(absent: int) -> None:
    whole = scanned(SHAPE)
    late = Frames(whole.index[: 96 - absent], whole.time[absent:], whole.place[absent:])
    np.testing.assert_array_equal(located(replace(SCAN, start_offset=-absent), late), late.place)


@pytest.mark.parametrize("count", [1, 2, 3, LEARNT_FROM - 1, LEARNT_FROM])
def test_tiny_series(count: int) -> None:
    frames = scanned((8, 5)).take(np.arange(count))
    np.testing.assert_array_equal(located(ScanPattern((8, 5), rows_by_time=True), frames, [1]), frames.place)


def test_nothing_at_all() -> None:
    assert RowTiming(SCAN).rest() == []


def test_blocks_without_times_among_others_go_on_by_number() -> None:
    frames = scanned(SHAPE)
    timing = RowTiming(SCAN)
    found = []
    for at in range(0, 96, 8):
        part = frames.take(np.arange(at, at + 8))
        found += timing.take(frame_block(part, timed=at not in (0, 40, 48)))
    np.testing.assert_array_equal(np.concatenate([np.stack(place, axis=1) for _, *place in found]), frames.place)


@pytest.mark.parametrize("kind", ["none", "all equal", "backwards"])
def test_useless_time_stamps_are_refused(kind: str) -> None:
    frames = scanned(SHAPE)
    times = {"none": None, "all equal": frames.time * 0, "backwards": -frames.time}[kind]
    timing = RowTiming(SCAN)
    with pytest.raises(ConfigurationError, match="row_starts"):
        timing.take(replace(frame_block(frames), exposed_ns=times))


def test_memory_is_bounded() -> None:
    timing = RowTiming(ScanPattern((2, 3), rows_by_time=True))
    frames = scanned((2, 3), passes=3000)
    timing.take(frame_block(frames))
    assert len(timing._marks) < 1000


# through the engine


def test_the_engine_finds_rows_by_time() -> None:
    case = Case(scan=(7, 10))
    counts = case.counts()
    frames = scanned((7, 10), extra=2).without(3, 29, 30, 52)
    held = np.zeros(case.scan, bool)
    inside = frames.place[:, 1] >= 0
    held[tuple(frames.place[inside, 1:].T)] = True
    flat = np.where(inside, frames.place[:, 1] * 10 + frames.place[:, 2], 0)
    with running(case.setup(scan=ScanPattern((7, 10), rows_by_time=True))) as engine:
        for at in range(0, len(flat), 9):
            part = block(counts, flat[at : at + 9])
            engine.add(replace(part, indices=frames.index[at : at + 9], exposed_ns=frames.time[at : at + 9]))
            accumulate_all(engine)
        engine.finish(84)
        assert_object(engine, case, filled(counts, held))
        counters = engine.counters
        assert counters.received == len(flat)
        assert counters.outside == int((~inside).sum())
        assert counters.missing == int((~held).sum())
        assert engine.beyond == 0


def test_a_series_that_ends_while_the_period_is_learnt() -> None:
    case = Case(scan=(3, 4))
    counts = case.counts()
    frames = scanned((3, 4))
    with running(case.setup(scan=ScanPattern((3, 4), rows_by_time=True))) as engine:
        engine.add(replace(block(counts, range(12)), exposed_ns=frames.time))
        engine.finish()
        assert_object(engine, case, counts)


def test_the_engine_refuses_frames_without_time() -> None:
    case = Case(scan=(7, 10))
    setup = case.setup(scan=ScanPattern((7, 10), rows_by_time=True))
    with running(setup) as engine, pytest.raises(ConfigurationError, match="no time stamps"):
        engine.add(block(case.counts(), range(70)))
