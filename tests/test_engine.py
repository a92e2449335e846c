"""The engine against float64 brute force: complete, unfinished and damaged scans, one pass and many."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.errors import DoesNotFit
from detectors.messages import Encoding
from stream.array import Device, choose_device
from stream.engine import Engine
from stream.kernels import METHODS
from stream.optics import Aberrations, AxesRelation, Probe
from stream.scan import ScanPattern
from stream.setup import MemoryPlan, Setup
from stream.snapshot import IMAGE_UNITS, Counters
from stream.weights import CompiledWeights
from tests import oracle
from tests.data_helpers import (
    Case,
    accumulate_all,
    assert_object,
    block,
    feed,
    filled,
    pass_indices,
    running,
)

ABERRATIONS = {"C10": -60.0, "C12": 25.0, "phi12": 30.0, "C21": 700.0, "phi21": -50.0, "C30": 2e4}
FIFTH = {"C10": 40.0, "C34": 3e4, "phi34": 17.0, "C50": 4e6, "C23": 900.0, "phi23": 100.0, "C32": 1e4, "phi32": -20.0}

BOTH = pytest.mark.parametrize("method", ["ssb", "ssb-single"])

CASES = {
    "plain": Case(),
    "odd scan": Case(scan=(7, 9)),
    "even scan": Case(scan=(16, 12)),
    "odd rows, even columns": Case(scan=(9, 12), rotation=33.0),
    "square": Case(scan=(12, 12), detector=(13, 13), pixel=(2.03, 2.03), centre=(6.04, 5.98), step=(0.83, 0.83)),
    "fine steps": Case(scan=(12, 16), step=(0.31, 0.37), rotation=-15.0),
    "very coarse steps": Case(scan=(8, 10), step=(3.1, 2.7), rotation=10.0),
    "60 kV": Case(energy_kev=60.0, semiangle=30.3, pixel=(5.9, 6.4), step=(0.8, 0.7), rotation=20.0),
    "300 kV": Case(energy_kev=300.0, semiangle=17.1, pixel=(3.4, 3.1), step=(0.4, 0.5)),
    "80 kV, rotated, aberrated": Case(energy_kev=80.0, rotation=-75.0, aberrations=ABERRATIONS, step=(1.3, 1.7)),
    "rotated by 90": Case(rotation=90.0),
    "rotated by 180": Case(rotation=180.0, aberrations={"C10": 90.0}),
    "rotated by -127.3": Case(rotation=-127.3),
    "transposed": Case(transpose=True, rotation=25.0, aberrations=ABERRATIONS),
    "transposed, even scan": Case(scan=(6, 8), transpose=True, rotation=-101.0),
    "aberrated": Case(aberrations=ABERRATIONS, scan=(8, 8)),
    "fifth order": Case(aberrations=FIFTH, rotation=48.0, semiangle=21.3, pixel=(3.9, 4.1), step=(0.41, 0.37)),
    "hard edge": Case(rolloff=0.0, scan=(8, 10)),
    "hard edge, aberrated": Case(rolloff=0.0, aberrations=ABERRATIONS, transpose=True),
    "all edge": Case(rolloff=9.7, scan=(8, 7)),
    "narrow edge": Case(rolloff=0.35),
    "off centre": Case(centre=(3.37, 9.42), rotation=12.0),
    "partly cut": Case(centre=(2.13, 13.6), rotation=-33.0),
    "disk centre outside": Case(centre=(-1.7, 6.2)),
    "masked pixels": Case(masked=((5, 7), (0, 0), (6, 4), (11, 14)), rotation=61.0),
    "8 bit": Case(dtype="<u1", dose=3.0),
    "32 bit": Case(dtype="<u4", dose=90000.0),
    "float": Case(dtype="<f4", dose=40.0),
    "single row": Case(scan=(1, 12)),
    "single column": Case(scan=(11, 1)),
    "two by two": Case(scan=(2, 2)),
}


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_complete_scan(name: str, method: str) -> None:
    case = CASES[name]
    counts = case.counts()
    with running(case.setup(method)) as engine:
        feed(engine, counts)
        engine.finish()
        assert_object(engine, case, counts, method)
        assert engine.counters == Counters(received=case.positions)


def test_one_position() -> None:
    case = Case(scan=(1, 1))
    with running(case.setup()) as engine:
        feed(engine, case.counts())
        engine.finish()
        np.testing.assert_array_equal(engine.object(), np.ones((1, 1), np.complex64))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any sensible small scan. Numbers are odd so that no pixel lies exactly on an aperture's edge."""
    number = st.floats(0, 1, width=16).map(lambda x: 0.013 + 0.9617 * x)
    names = draw(st.lists(st.sampled_from(["C10", "C12", "C21", "C23", "C30", "C32", "C34"]), unique=True, max_size=4))
    size = {"1": 80.0, "2": 900.0, "3": 2e4}
    aberrations = {name: size[name[1]] * (2 * draw(number) - 1) for name in names}
    aberrations |= {f"phi{name[1:]}": 360 * draw(number) for name in names if name[2] != "0"}
    return Case(
        scan=(draw(st.integers(2, 9)), draw(st.integers(2, 9))),
        detector=(draw(st.integers(7, 13)), draw(st.integers(7, 13))),
        pixel=(1.7 + draw(number), 1.7 + draw(number)),
        centre=(1.1 + 6 * draw(number), 1.1 + 6 * draw(number)),
        semiangle=7.1 + 3 * draw(number),
        energy_kev=60 + 240 * draw(number),
        step=(0.4 + 2 * draw(number), 0.4 + 2 * draw(number)),
        rotation=-200 + 400 * draw(number),
        transpose=draw(st.booleans()),
        rolloff=draw(st.sampled_from([0.0, 0.7, 2.0, 6.1])),
        aberrations=aberrations,
        masked=draw(st.sampled_from([(), ((4, 4),), ((0, 0), (5, 3))])),
    )


@settings(max_examples=40, derandomize=True, deadline=None)
@given(case=cases(), method=st.sampled_from(["ssb", "ssb-single"]))
def test_complete_scan_of_any_kind(case: Case, method: str) -> None:
    counts = case.counts()
    with running(case.setup(method), threads=1) as engine:
        feed(engine, counts)
        engine.finish()
        expected = case.true_object(counts, method)
        if np.abs(expected - 1).max() < 1e-9:  # nothing in the passband
            assert np.abs(engine.object() - 1).max() < 1e-6
        else:
            assert_object(engine, case, counts, method, limit=1e-4)


# unfinished


@BOTH
@pytest.mark.parametrize("order", ["scanned", "random"])
def test_after_every_row(method: str, order: str) -> None:
    case = Case(scan=(8, 9), rotation=-15.0, centre=(4.3, 9.1), aberrations={"C10": -50.0})
    counts = case.counts()
    rows = np.arange(8) if order == "scanned" else np.random.default_rng(3).permutation(8)
    held = np.zeros(case.scan, bool)
    with running(case.setup(method)) as engine:
        for row in rows:
            feed(engine, counts, row * 9 + np.arange(9))
            held[row] = True
            assert_object(engine, case, filled(counts, held), method)
            np.testing.assert_array_equal(engine.rows_acquired, held.all(axis=1))
            np.testing.assert_array_equal(engine.positions_received, held)
            assert engine.last_row is not None
            assert engine.last_row.row == row


@BOTH
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_part_of_the_rows(method: str, share: float) -> None:
    case = Case(scan=(16, 12), rotation=40.0)
    counts = case.counts()
    held = np.zeros(case.scan, bool)
    held[: int(16 * share)] = True
    with running(case.setup(method)) as engine:
        feed(engine, counts, np.flatnonzero(held))
        assert_object(engine, case, filled(counts, held), method)
        engine.finish()
        assert_object(engine, case, filled(counts, held), method)
        assert engine.counters.missing == np.count_nonzero(~held)


def test_before_the_first_row() -> None:
    case = Case()
    with running(case.setup()) as engine:
        np.testing.assert_array_equal(engine.object(), np.ones(case.scan))
        images = engine.images(IMAGE_UNITS)
        assert all(np.isnan(images[name]).all() for name in IMAGE_UNITS if name != "mean_pattern")
        assert not images["mean_pattern"].any()
        assert engine.counters == Counters()
        assert engine.passes_done == 0
        engine.finish()
        assert engine.counters.missing == case.positions


def test_a_row_is_shown_once_it_is_full() -> None:
    case = Case()
    with running(case.setup()) as engine:
        engine.add(block(case.counts(), range(9)))
        assert engine.closed_rows == 0
        engine.add(block(case.counts(), [9]))
        assert engine.closed_rows == 1
        assert engine.accumulate() == 1
        assert engine.accumulate() == 0


def test_dark_frames_only() -> None:
    case = Case()
    with running(case.setup()) as engine:
        feed(engine, np.zeros_like(case.counts()))
        engine.finish()
        np.testing.assert_array_equal(engine.object(), np.ones(case.scan))
        images = engine.images(IMAGE_UNITS)
        assert not images["phase"].any()
        assert np.isnan(images["com_row"]).all()


# lost, doubled, late and damaged frames


@BOTH
def test_missing_frames_hold_their_rows_mean(method: str) -> None:
    case = Case(scan=(8, 9), rotation=20.0)
    counts = case.counts()
    held = np.random.default_rng(5).random(case.scan) > 0.2
    held[3] = False
    held[3, 4] = True
    with running(case.setup(method)) as engine:
        feed(engine, counts, np.flatnonzero(held))
        engine.finish()
        assert_object(engine, case, filled(counts, held), method)
        missing = np.count_nonzero(~held)
        assert engine.counters == Counters(received=int(held.sum()), missing=missing)
        np.testing.assert_array_equal(engine.positions_received, held)
        np.testing.assert_array_equal(np.isnan(engine.images(["bright_field"])["bright_field"]), ~held)


def test_a_full_row_closes_incomplete_older_ones_and_counts_them() -> None:
    case = Case(scan=(4, 5))
    with running(case.setup()) as engine:
        engine.add(block(case.counts(), [0, 1, 2, 4]))
        assert engine.closed_rows == 0
        engine.add(block(case.counts(), range(5, 10)))
        assert engine.closed_rows == 2
        accumulate_all(engine)
        assert engine.counters == Counters(received=9, missing=1)


def test_rows_are_shown_though_every_one_lacks_a_frame() -> None:
    """Steady loss must not freeze the live image until a lucky row is complete."""
    case = Case(scan=(12, 8))
    counts = case.counts()
    held = np.ones(case.scan, bool)
    held[np.arange(12), np.arange(12) % 7] = False
    with running(case.setup()) as engine:
        shown = []
        for row in range(12):
            feed(engine, counts, row * 8 + np.flatnonzero(held[row]))
            shown.append(int(engine.rows_acquired.sum()))
        assert shown[5] >= 2
        assert shown == sorted(shown)
        engine.finish()
        assert_object(engine, case, filled(counts, held))
        assert engine.counters == Counters(received=84, missing=12)


def test_late_frames_of_a_closed_row_are_merged() -> None:
    case = Case(scan=(5, 6))
    counts = case.counts()
    with running(case.setup()) as engine:
        feed(engine, counts, [i for i in range(30) if i not in (7, 9)])
        assert engine.counters.missing == 2
        feed(engine, counts, [9])
        feed(engine, counts, [7])
        assert engine.counters.missing == 0
        engine.finish()
        assert_object(engine, case, counts)
        np.testing.assert_allclose(engine.images(["bright_field"])["bright_field"], virtual_bright_field(case, counts))
        assert engine.counters == Counters(received=30)


def test_duplicates_are_dropped_and_counted() -> None:
    case = Case(scan=(5, 6))
    counts = case.counts()
    other = counts + 7  # were a duplicate used, the image would tell
    with running(case.setup()) as engine:
        for row in range(5):
            engine.add(block(counts, [*range(row * 6, row * 6 + 4), row * 6, row * 6 + 1]))
            engine.add(block(other, [row * 6 + 1, row * 6 + 2]))
            engine.add(block(counts, [row * 6 + 4, row * 6 + 5]))
            accumulate_all(engine)
        engine.add(block(other, range(30)))
        engine.finish()
        assert_object(engine, case, counts)
        assert engine.counters == Counters(received=30 + 20 + 30, duplicate=50)
        mean = engine.images(["mean_pattern"])["mean_pattern"]
        np.testing.assert_allclose(mean, counts.mean(axis=(0, 1)), rtol=1e-6)


def test_frames_outside_the_scan_are_counted() -> None:
    case = Case(scan=(5, 6))
    counts = case.counts()
    with running(case.setup()) as engine:
        feed(engine, counts, [*range(30), 30, 31, 1000, 1 << 40, (1 << 62) + 3, -1, -30, -(1 << 62)])
        engine.finish()
        assert_object(engine, case, counts)
        assert engine.counters == Counters(received=38, outside=8)


def test_flyback_frames_are_counted_outside_and_left_out() -> None:
    case = Case(scan=(5, 6))
    counts = case.counts()
    scan = ScanPattern((5, 6), flyback_frames_per_row=2, flyback_frames_per_pass=3)
    whole = np.full((5, 8, *case.detector), 99, counts.dtype)
    whole[:, :6] = counts
    frames = np.concatenate([whole.reshape(-1, *case.detector), np.full((3, *case.detector), 88, counts.dtype)])
    with running(case.setup(scan=scan, passes=2)) as engine:
        for number in range(2):
            feed(engine, frames[None], np.arange(43) + number * 43)
        engine.finish(86)
        assert_object(engine, case, counts)
        assert engine.counters == Counters(received=86, outside=26)


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4])
def test_damaged_payloads_are_counted_and_their_good_copies_taken(encoding: Encoding) -> None:
    case = Case(scan=(5, 6))
    counts = case.counts()
    with running(case.setup()) as engine:
        # a damaged frame, and a good copy after it in the same block
        engine.add(block(counts, [0, 1, 2, 2, 3, 4, 5], encoding, damaged=[2]))
        assert engine.counters == Counters(received=7, undecodable=1)
        assert engine.closed_rows == 1
        # a good copy in a later block, after the row was closed
        feed(engine, counts, range(6, 18), encoding=encoding, damaged=[3], size=12)
        assert engine.counters == Counters(received=19, undecodable=2, missing=1)
        feed(engine, counts, [9], encoding=encoding)
        assert engine.counters == Counters(received=20, undecodable=2)
        # three damaged copies of one frame, and none of another row that is sound
        engine.add(block(counts, [18, 18, 18, *range(19, 24)], encoding, damaged=[0, 1, 2]))
        engine.add(block(counts, range(24, 30), encoding, damaged=range(6)))
        engine.finish()
        held = np.ones(case.scan, bool)
        held[3, 0] = held[4, :] = False
        assert_object(engine, case, filled(counts, held))
        assert engine.counters == Counters(received=34, undecodable=2 + 3 + 6, missing=7)
        assert engine.last_reason
        mean = engine.images(["mean_pattern"])["mean_pattern"]
        np.testing.assert_allclose(mean, counts[held].mean(axis=0), rtol=1e-6)


def test_a_damaged_copy_of_a_sound_frame_is_a_duplicate() -> None:
    case = Case(scan=(5, 6))
    with running(case.setup()) as engine:
        engine.add(block(case.counts(), [0, 0, 1], Encoding.LZ4, damaged=[1]))
        assert engine.counters == Counters(received=3, duplicate=1)


def test_messages_that_hold_no_frames_are_counted() -> None:
    with running(Case().setup()) as engine:
        engine.undecodable(3, "no header")
        assert engine.counters == Counters(received=3, undecodable=3)
        assert engine.last_reason == "no header"


def test_announced_frames_decide_what_is_missing() -> None:
    case = Case(scan=(5, 6))
    with running(case.setup()) as engine:
        feed(engine, case.counts(), range(11))
        engine.finish(announced=12)
        assert engine.counters == Counters(received=11, missing=1)


def test_rows_closed_by_silence() -> None:
    case = Case(scan=(5, 6))
    counts = case.counts()
    held = np.zeros(case.scan, bool)
    held.flat[:8] = True
    with running(case.setup()) as engine:
        feed(engine, counts, range(8))
        engine.close_rows()
        accumulate_all(engine)
        assert_object(engine, case, filled(counts, held))
        feed(engine, counts, range(8, 30))
        engine.finish()
        assert_object(engine, case, counts)
        assert engine.counters == Counters(received=30)


# any order


@st.composite
def deliveries(draw: st.DrawFn, positions: int) -> list[list[tuple[int, bool]]]:
    """Blocks of (position, damaged): every frame arrives whole at least once, in any order, any number of times."""
    order = draw(st.permutations(range(positions)))
    extra = draw(st.lists(st.tuples(st.integers(0, positions - 1), st.booleans()), max_size=15))
    sequence = [(position, False) for position in order]
    for position, damaged in extra:
        sequence.insert(draw(st.integers(0, len(sequence))), (position, damaged))
    cuts = sorted(draw(st.lists(st.integers(0, len(sequence)), max_size=6)))
    return [sequence[a:b] for a, b in zip([0, *cuts], [*cuts, len(sequence)], strict=True) if b > a]


@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_order_and_any_copies_give_the_same_image(data: st.DataObject) -> None:
    case = Case(scan=(6, 5), rotation=30.0)
    counts = case.counts()
    blocks = data.draw(deliveries(case.positions))
    duplicates = undecodable = 0
    sound: set[int] = set()
    for position, damaged in (item for part in blocks for item in part):
        duplicates += position in sound
        undecodable += position not in sound and damaged
        sound |= set() if damaged else {position}
    with running(case.setup(), threads=1) as engine:
        for part in blocks:
            damaged = [place for place, (_, bad) in enumerate(part) if bad]
            engine.add(block(counts, [position for position, _ in part], Encoding.LZ4, damaged=damaged))
            if data.draw(st.booleans()):
                accumulate_all(engine)
        engine.finish()
        assert_object(engine, case, counts, limit=1e-5)
        received = sum(map(len, blocks))
        assert engine.counters == Counters(received, duplicate=duplicates, undecodable=undecodable)


def model_of_passes(sequence: list[int], positions: int, columns: int) -> tuple[dict[int, int], int, int]:
    """What rolling scanning promises: the pass shown at each position, late frames and duplicates.

    A row shows the newest pass that reached it; frames of older ones are late from then on.
    """
    newest: dict[int, int] = {}
    shown: dict[int, int] = {}
    late = duplicate = 0
    for index in sequence:
        number, position = divmod(index, positions)
        row = position // columns
        if number < newest.get(row, -1):
            late += 1
            continue
        if number > newest.get(row, -1):
            newest[row] = number
            for other in range(row * columns, (row + 1) * columns):
                shown.pop(other, None)
        duplicate += position in shown
        shown[position] = number
    return shown, late, duplicate


def assert_shows_passes(engine: Engine, case: Case, passes: list[np.ndarray], shown: dict[int, int]) -> None:
    """The image is that of the given pass at each position."""
    frames = [counts.reshape(-1, *case.detector) for counts in passes]
    mixed, held = frames[0].copy(), np.zeros(case.positions, bool)
    for position, number in shown.items():
        mixed[position], held[position] = frames[number][position], True
    mixed = mixed.reshape(*case.scan, *case.detector)
    assert_object(engine, case, filled(mixed, held.reshape(case.scan)), limit=1e-5)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_order_over_the_borders_of_passes_in_blocks_of_one(data: st.DataObject) -> None:
    """Frame by frame, arrival order decides which frames are late: the model is exact then."""
    case = Case(scan=(4, 5), rotation=30.0)
    passes = [case.counts(seed) for seed in range(3)]
    window = data.draw(st.integers(0, 25))
    shifts = data.draw(st.lists(st.integers(0, window), min_size=60, max_size=60))
    sequence = sorted(range(60), key=lambda index: index + shifts[index])
    with running(case.setup(passes=3), threads=1) as engine:
        for index in sequence:
            engine.add(block(passes[index // 20], [index]))
            accumulate_all(engine)
        engine.finish()
        shown, late, duplicate = model_of_passes(sequence, 20, 5)
        counters = engine.counters
        assert (counters.received, counters.late, counters.duplicate, counters.outside) == (60, late, duplicate, 0)
        assert counters.missing == late
        assert_shows_passes(engine, case, passes, shown)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(data=st.data())
def test_order_within_blocks_over_the_borders_of_passes(data: st.DataObject) -> None:
    """However blocks are cut and shuffled inside, a complete delivery in about the right order loses nothing."""
    case = Case(scan=(4, 5), rotation=30.0)
    passes = [case.counts(seed) for seed in range(3)]
    cuts = sorted(data.draw(st.sets(st.integers(1, 59), max_size=6)))
    frames = np.concatenate([counts.reshape(-1, *case.detector) for counts in passes])
    with running(case.setup(passes=3), threads=1) as engine:
        for start, stop in zip([0, *cuts], [*cuts, 60], strict=True):
            engine.add(block(frames[None], data.draw(st.permutations(range(start, stop)))))
            if data.draw(st.booleans()):
                accumulate_all(engine)
        engine.finish()
        counters = engine.counters
        assert counters.received == 60
        assert (counters.missing, counters.duplicate, counters.outside) == (counters.late, 0, 0)
        assert counters.late == 0
        assert_object(engine, case, passes[2], limit=1e-5)


# pass after pass


def test_a_block_may_end_in_the_middle_of_a_row_of_the_next_pass() -> None:
    case = Case(scan=(4, 5))
    passes = [case.counts(seed) for seed in range(2)]
    frames = np.concatenate([counts.reshape(-1, *case.detector) for counts in passes])[None]
    with running(case.setup(passes=2)) as engine:
        engine.add(block(frames, range(23)))
        engine.add(block(frames, range(23, 40)))
        engine.finish()
        assert engine.counters == Counters(received=40)
        assert_object(engine, case, passes[1])


def test_a_block_may_hold_many_passes_of_an_endless_scan() -> None:
    case = Case(scan=(4, 5))
    passes = [case.counts(seed) for seed in range(6)]
    frames = np.concatenate([counts.reshape(-1, *case.detector) for counts in passes])[None]
    with running(case.setup(passes=None)) as engine:
        engine.add(block(frames, range(120)))
        engine.finish()
        assert engine.counters == Counters(received=120)
        assert_object(engine, case, passes[5])


def test_an_older_incomplete_row_does_not_replace_a_newer_one() -> None:
    case = Case(scan=(3, 5))
    passes = [case.counts(seed) for seed in range(2)]
    with running(case.setup(passes=2)) as engine:
        for row in range(3):  # every row of the first pass lacks a frame, so none is full
            feed(engine, passes[0], row * 5 + np.arange(4))
        feed(engine, passes[1], pass_indices(case, 1))
        engine.finish()
        assert_object(engine, case, passes[1])
        assert engine.counters == Counters(received=27, missing=3)


@BOTH
@pytest.mark.parametrize("passes", [None, 20])
def test_twenty_rolling_passes_leave_no_trace(method: str, passes: int | None) -> None:
    case = Case(scan=(8, 9), rotation=20.0)
    with running(case.setup(method, passes=passes)) as engine, running(case.setup(method)) as fresh:
        for number in range(20):
            counts = case.counts(number)
            feed(engine, counts, pass_indices(case, number))
            assert engine.passes_done == number + 1
        engine.finish()
        feed(fresh, counts)
        assert oracle.relative_error(engine.object(), fresh.object()) < 1e-6
        assert_object(engine, case, counts, method)
        assert engine.counters == Counters(received=20 * 72)
        ours, theirs = engine.images(["bright_field", "com_row"]), fresh.images(["bright_field", "com_row"])
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_partly_replaced_pass() -> None:
    case = Case(scan=(8, 9), rotation=20.0)
    old, new = case.counts(0), case.counts(1)
    with running(case.setup(passes=None)) as engine:
        feed(engine, old)
        for row in range(8):
            feed(engine, new, 72 + row * 9 + np.arange(9))
            mixed = np.concatenate([new[: row + 1], old[row + 1 :]])
            assert_object(engine, case, mixed)
            assert engine.passes_done == (2 if row == 7 else 1)


def test_incomplete_rows_of_a_later_pass() -> None:
    """A row of a new pass replaces the old one whole: what it lacks is its own mean, not the old frame."""
    case = Case(scan=(4, 6))
    old, new = case.counts(0), case.counts(1)
    held = np.ones(case.scan, bool)
    held[1, 2] = held[1, 5] = False
    with running(case.setup(passes=2)) as engine:
        feed(engine, old)
        feed(engine, new, 24 + np.flatnonzero(held))
        assert engine.counters.missing == 2
        assert_object(engine, case, filled(new, held))
        feed(engine, old, [8])  # an old frame for the gap: late
        feed(engine, new, [24 + 8])
        held[1, 2] = True
        engine.finish()
        assert_object(engine, case, filled(new, held))
        assert engine.counters == Counters(received=24 + 22 + 2, late=1, missing=1)


def test_frames_of_an_older_pass_are_late() -> None:
    case = Case(scan=(4, 5))
    old, new = case.counts(0), case.counts(1)
    with running(case.setup(passes=None)) as engine:
        feed(engine, old, range(17))
        feed(engine, new, 20 + np.arange(20))
        feed(engine, old, range(20))
        engine.finish()
        assert_object(engine, case, new)
        assert engine.counters == Counters(received=57, late=20, missing=3)


def test_a_frame_far_ahead_does_not_throw_an_endless_scan_off() -> None:
    case = Case(scan=(4, 5))
    counts = case.counts()
    with running(case.setup(passes=None)) as engine:
        feed(engine, counts, [*range(7), 20_000_000, *range(7, 20)], size=1)
        assert_object(engine, case, counts)
        assert engine.counters == Counters(received=21, outside=1)


def test_an_endless_scan_joined_late() -> None:
    case = Case(scan=(4, 5))
    counts = case.counts()
    with running(case.setup(passes=None)) as engine:
        feed(engine, counts, 20 * 1000 + np.arange(60), size=4)
        assert_object(engine, case, counts)
        assert engine.counters.outside <= 2 * 5


@BOTH
def test_averaging_is_the_mean_of_the_passes(method: str) -> None:
    case = Case(scan=(6, 9), rotation=20.0)
    passes = [case.counts(seed) for seed in range(5)]
    with running(case.setup(method, passes=5, averaging=True)) as engine:
        for number, counts in enumerate(passes):
            feed(engine, counts, pass_indices(case, number))
            assert_object(engine, case, np.mean(passes[: number + 1], axis=0), method)
        engine.finish()
        assert engine.counters == Counters(received=5 * 54)
        images = engine.images(IMAGE_UNITS)
        np.testing.assert_allclose(
            images["bright_field"], virtual_bright_field(case, np.mean(passes, axis=0)), rtol=1e-6
        )
        np.testing.assert_allclose(images["mean_pattern"], np.mean(passes, axis=(0, 1, 2)), rtol=1e-6)


def test_averaging_with_gaps() -> None:
    """Each position is the mean of the frames that it got; a row in the middle of a pass mixes old and new weights."""
    case = Case(scan=(5, 6))
    passes = [case.counts(seed) for seed in range(3)]
    present = np.random.default_rng(1).random((3, *case.scan)) > 0.3
    present[:, 2, 3] = False
    with running(case.setup(passes=3, averaging=True)) as engine:
        for number, counts in enumerate(passes):
            feed(engine, counts, number * 30 + np.flatnonzero(present[number]))
        engine.finish()
        frames = present.sum(axis=0)
        weighted = (present[..., None, None] * np.array(passes)).sum(axis=0)
        mean = weighted / np.maximum(frames, 1)[..., None, None]
        assert_object(engine, case, filled(mean, frames > 0))
        assert engine.counters == Counters(received=int(present.sum()), missing=int((~present).sum()))


def test_averaging_counts_missing_frames_once() -> None:
    case = Case(scan=(3, 5))
    with running(case.setup(passes=4, averaging=True)) as engine:
        feed(engine, case.counts(), [i for i in range(60) if i != 7], size=5)
        assert engine.counters.missing == 1


def test_averaging_sixteen_bit_counts_does_not_overflow() -> None:
    case = Case(scan=(3, 4), dose=60000.0)
    passes = [np.minimum(case.counts(seed).astype(np.int64) + 20000, 65535).astype(np.uint16) for seed in range(9)]
    with running(case.setup(passes=9, averaging=True)) as engine:
        for number, counts in enumerate(passes):
            feed(engine, counts, pass_indices(case, number))
        assert_object(engine, case, np.mean(passes, axis=0), limit=1e-5)


# other optics, and beginning anew


OTHER_OPTICS = {
    "aberrations": (Case(aberrations=ABERRATIONS), "ssb"),
    "rotation": (Case(rotation=70.0, transpose=True), "ssb"),
    "rolloff": (Case(rolloff=0.5), "ssb"),
    "method": (Case(), "ssb-single"),
}


@pytest.mark.parametrize("name", OTHER_OPTICS)
@pytest.mark.parametrize("passes", [1, 2])
def test_change_of_optics(name: str, passes: int) -> None:
    first, (second, method) = Case(), OTHER_OPTICS[name]
    counts, newer = first.counts(), first.counts(1)
    held = np.zeros(first.scan, bool)
    held[:4] = True
    with running(first.setup(passes=passes)) as engine:
        feed(engine, counts, np.flatnonzero(held))
        engine.change(second.probe, METHODS[method])
        assert_object(engine, second, filled(counts, held), method)
        feed(engine, counts, np.flatnonzero(~held))
        assert_object(engine, second, counts, method)
        if passes == 2:
            feed(engine, newer, first.positions + np.flatnonzero(held))
            assert_object(engine, second, np.concatenate([newer[:4], counts[4:]]), method)
        engine.change(first.probe, METHODS["ssb"])
        engine.finish()
        expected = counts if passes == 1 else np.concatenate([newer[:4], counts[4:]])
        assert_object(engine, first, expected)


def test_change_keeps_what_decides_the_pixels() -> None:
    case = Case()
    with running(case.setup()) as engine:
        for probe in (replace(case.probe, energy_ev=1e5), replace(case.probe, semiangle=0.01)):
            with pytest.raises(ValueError, match="cannot be changed"):
                engine.change(probe, METHODS["ssb"])


@pytest.mark.parametrize("passes", [1, 3])
def test_reset_forgets_what_was_there(passes: int) -> None:
    case = Case(scan=(6, 5))
    counts, newer = case.counts(), case.counts(1)
    held = np.zeros(case.scan, bool)
    held[3:] = True
    with running(case.setup(passes=passes)) as engine:
        feed(engine, counts, range(15))
        engine.reset()
        np.testing.assert_array_equal(engine.object(), np.ones(case.scan))
        assert not engine.positions_received.any()
        assert np.isnan(engine.images(["bright_field"])["bright_field"]).all()
        feed(engine, counts, range(15, 30))
        assert_object(engine, case, filled(counts, held))
        mean = engine.images(["mean_pattern"])["mean_pattern"]
        np.testing.assert_allclose(mean, counts[3:].mean(axis=(0, 1)), rtol=1e-6)
        if passes == 3:
            feed(engine, newer, pass_indices(case, 1))
            assert_object(engine, case, newer)
        assert engine.counters.missing == 0


# the other images


def virtual_bright_field(case: Case, counts: np.ndarray) -> np.ndarray:
    row, column = np.indices(case.detector)
    angle = np.hypot((row - case.centre[0]) * case.pixel[0], (column - case.centre[1]) * case.pixel[1])
    return counts[:, :, (angle < case.semiangle) & case.good].sum(axis=2)


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4])
@pytest.mark.parametrize("name", ["masked pixels", "transposed", "partly cut", "rotated by 90", "8 bit", "float"])
def test_virtual_images_and_centre_of_mass(name: str, encoding: Encoding) -> None:
    case = CASES[name]
    counts = case.counts()
    with running(case.setup()) as engine:
        feed(engine, counts, encoding=encoding)
        images = engine.images(IMAGE_UNITS)
    assert {image.dtype for image in images.values()} == {np.dtype("f4")}
    whole = np.where(case.good, counts, 0).astype(np.float64)
    bright = virtual_bright_field(case, counts.astype(np.float64))
    np.testing.assert_allclose(images["bright_field"], bright, rtol=1e-6)
    np.testing.assert_allclose(images["dark_field"], whole.sum(axis=(2, 3)) - bright, rtol=1e-5)
    np.testing.assert_allclose(images["mean_pattern"], whole.mean(axis=(0, 1)), rtol=1e-6)

    row, column = np.indices(case.detector)
    total = whole.sum(axis=(2, 3))
    detector = [
        ((whole * (axis - centre) * pixel).sum(axis=(2, 3))) / total
        for axis, centre, pixel in zip((row, column), case.centre, case.pixel, strict=True)
    ]
    if case.transpose:
        detector.reverse()
    cos, sin = np.cos(np.deg2rad(case.rotation)), np.sin(np.deg2rad(case.rotation))
    np.testing.assert_allclose(images["com_row"], cos * detector[0] - sin * detector[1], atol=1e-5)
    np.testing.assert_allclose(images["com_column"], sin * detector[0] + cos * detector[1], atol=1e-5)

    obj = case.true_object(counts)
    np.testing.assert_allclose(images["phase"], np.angle(obj), atol=1e-5)
    np.testing.assert_allclose(images["amplitude"], np.abs(obj), atol=1e-5)


def test_only_the_images_that_were_asked_for() -> None:
    case = Case()
    with running(case.setup()) as engine:
        feed(engine, case.counts())
        for name in IMAGE_UNITS:
            assert set(engine.images([name])) == {name}
        assert engine.images([]) == {}


# order of frames in the scan


@pytest.mark.parametrize("kind", ["serpentine", "table", "table with flyback"])
def test_other_ways_over_the_specimen(kind: str) -> None:
    case = Case(scan=(5, 6))
    counts = case.counts()
    row, column = np.divmod(np.arange(30), 6)
    if kind == "serpentine":
        scan = ScanPattern((5, 6), serpentine=True)
        column = np.where(row % 2, 5 - column, column)
        frames = counts[row, column]
    else:
        order = np.random.default_rng(0).permutation(30)
        row, column = row[order], column[order]
        frames, table = counts[row, column], np.stack([row, column], axis=1)
        if kind == "table with flyback":
            frames = np.insert(frames, 7, 99, axis=0)
            table = np.insert(table, 7, -1, axis=0)
        scan = ScanPattern((5, 6), positions=table)
    with running(case.setup(scan=scan)) as engine:
        feed(engine, frames[None])
        engine.finish()
        assert_object(engine, case, counts)
        assert engine.counters == Counters(received=len(frames), outside=len(frames) - 30)


def test_a_position_table_that_leaves_positions_out() -> None:
    case = Case(scan=(5, 6))
    counts = case.counts()
    held = np.random.default_rng(2).random(case.scan) > 0.3
    table = np.argwhere(held)
    scan = ScanPattern((5, 6), positions=table)
    with running(case.setup(scan=scan)) as engine:
        feed(engine, counts[held][None], range(len(table)))
        assert engine.rows_acquired.all(), "rows are complete once every position of the table is there"
        engine.finish()
        assert_object(engine, case, filled(counts, held))
        assert engine.counters == Counters(received=len(table))
        assert engine.passes_done == 1


# memory, threads, repeatability


def test_more_rows_than_slots() -> None:
    """Frames in columns instead of rows: every row is open at once, and there are more rows than slots for them."""
    case = Case(scan=(70, 5), step=(0.9, 0.9))
    counts = case.counts()
    order = np.arange(350).reshape(70, 5).T.ravel()
    with running(case.setup(), threads=1) as engine:
        for start in range(0, 350, 100):
            engine.add(block(counts, order[start : start + 100]))
        engine.finish()
        assert_object(engine, case, counts)
        assert engine.counters == Counters(received=350)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    case = Case(scan=(9, 8), aberrations=ABERRATIONS)
    counts = case.counts()
    with running(case.setup(), threads=threads) as engine:
        feed(engine, counts, size=64)
        assert_object(engine, case, counts)


@pytest.mark.parametrize("passes", [1, 2])
@BOTH
def test_bit_for_bit(method: str, passes: int) -> None:
    case = Case(scan=(17, 8), rotation=13.0)
    answers = []
    for _ in range(2):
        with running(case.setup(method, passes=passes)) as engine:
            for number in range(passes):
                feed(engine, case.counts(number), pass_indices(case, number), size=31)
            images = engine.images(IMAGE_UNITS)
            answers.append((engine.object().tobytes(), {name: image.tobytes() for name, image in images.items()}))
    assert answers[0] == answers[1]


def held_bytes(engine: Engine) -> dict[str, int]:
    """What the engine's lasting arrays take, by the parts of its plan."""
    ring, accumulator, assembler = engine._ring, engine._accumulator, engine._assembler
    sums, contraction = accumulator._sums, accumulator._contraction
    batch = [contraction._spectra, contraction._turns, *contraction._work]
    return {
        "ring": ring._counts.nbytes,
        "kernels": accumulator.kernels.nbytes,
        "contracted": 0 if sums.contracted is None else sums.contracted.nbytes,
        "work": sum(a.nbytes for a in (sums.psi, sums.row_sums, engine._sums, ring.frames, *batch)),
        "open_rows": assembler.pixels.nbytes + assembler.sums.nbytes + assembler.received.nbytes,
    }


@BOTH
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (Case(), {}),
        (Case(scan=(40, 30), aberrations=ABERRATIONS), {"passes": None}),
        (Case(scan=(40, 3), dtype="<u1"), {"passes": None, "averaging": True}),
        (Case(scan=(3, 40), dtype="<f4"), {"passes": 2, "averaging": True}),
    ],
)
def test_the_memory_plan_is_a_bound(case: Case, changes: dict, method: str) -> None:
    setup = case.setup(method, **changes)
    plan = MemoryPlan.of(setup)
    with running(setup) as engine:
        feed(engine, case.counts(), size=128)
        for part, size in held_bytes(engine).items():
            assert size <= getattr(plan, part), part
        exact = held_bytes(engine)
        assert (plan.ring, plan.contracted) == (exact["ring"], exact["contracted"])
        assert plan.kernels == exact["kernels"] or method == "ssb-single" or not case.aberrations
        assert plan.total == plan.device_bytes + plan.open_rows
        assert "ring" in str(plan)


def test_the_memory_plan_holds_for_optics_to_come() -> None:
    case = Case(scan=(16, 16))
    with running(case.setup(passes=None)) as engine:
        feed(engine, case.counts())
        engine.change(Case(aberrations=ABERRATIONS).probe, METHODS["ssb"])
        assert held_bytes(engine)["kernels"] <= engine.plan.kernels


class _SmallDevice(Device):
    def free_bytes(self) -> int:
        return 100_000


def test_what_does_not_fit_is_refused_with_advice() -> None:
    small = _SmallDevice(np, choose_device("cpu").fft, "toy")
    with pytest.raises(DoesNotFit, match=r"needs .* on the toy .*semiangle_mrad"):
        Engine(Case(scan=(64, 64)).setup(), small)


# kernels that are made while frames come


@pytest.mark.parametrize("aberrations", [{}, ABERRATIONS])
def test_frames_do_not_wait_for_the_kernels(aberrations: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, make = threading.Event(), Setup.make_kernels

    def slowly(setup: Setup, *given: Any) -> Any:
        assert go_on.wait(60)
        return make(setup, *given)

    monkeypatch.setattr(Setup, "make_kernels", slowly)
    case = Case(scan=(16, 12), aberrations=aberrations)
    counts = case.counts()
    engine = Engine(case.setup(), choose_device("cpu"), threads=2, in_background=True)
    try:
        feed(engine, counts, range(150))
        view = engine.view(IMAGE_UNITS)
        assert view.rows_acquired == 12
        assert np.isnan(view.images["phase"]).all()
        np.testing.assert_array_equal(view.images["bright_field"][:12], virtual_bright_field(case, counts)[:12])
        go_on.set()
        feed(engine, counts, range(150, case.positions))
        engine.finish()
        assert_object(engine, case, counts, "ssb")
        assert engine.counters == Counters(received=case.positions)
    finally:
        go_on.set()
        engine.close()


@BOTH
def test_rows_that_wait_when_the_engine_is_closed_stay_outside(method: str) -> None:
    case = Case()
    counts = case.counts()
    engine = Engine(case.setup(method), choose_device("cpu"), threads=2)
    engine.add(block(counts, range(2 * case.scan[1])))
    accumulate_all(engine)
    engine.add(block(counts, range(2 * case.scan[1], 4 * case.scan[1])))
    before = engine.object()
    assert engine.closed_rows == 2
    engine.close()
    assert engine.closed_rows == 0, "nobody must wait for them"
    assert engine.accumulate() == 0
    assert engine.view().rows_acquired == 2
    np.testing.assert_array_equal(engine.object(), before)


def test_kernels_that_cannot_be_made_are_told_with_the_next_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setup: Setup, *given: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(Setup, "make_kernels", fail)
    case = Case()
    engine = Engine(case.setup(), choose_device("cpu"), in_background=True)
    try:
        with pytest.raises(DoesNotFit, match="kernels could not be made: no room"):
            engine.object()
        with pytest.raises(DoesNotFit, match="no room"):
            feed(engine, case.counts())
    finally:
        engine.close()


@pytest.mark.parametrize("aberrations", [{}, ABERRATIONS])
def test_kernels_are_given_up_when_the_engine_is_closed(
    aberrations: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread ends the part that it is at, of the many that there are."""
    begun, known, parts = threading.Event(), threading.Event(), []

    def until_closing(make: Any) -> Any:
        def made(*given: Any) -> None:
            parts.append(given)
            begun.set()
            assert known.wait(60)
            while not engine._closing:
                threading.Event().wait(0.005)
            make(*given)

        return made

    monkeypatch.setattr("stream.kernels._BLOCK_ELEMENTS", {"compiled": 100})
    for name in ("fill", "levels"):
        monkeypatch.setattr(CompiledWeights, name, until_closing(getattr(CompiledWeights, name)))
    case = Case(scan=(32, 32), step=(0.4, 0.4), aberrations=aberrations)
    engine = Engine(case.setup(), choose_device("cpu"), threads=2, in_background=True)
    known.set()
    engine.add(block(case.counts(), range(2 * case.scan[1])))
    accumulate_all(engine)
    assert begun.wait(60)
    engine.close()
    assert len(parts) <= 2
    view = engine.view(IMAGE_UNITS)
    assert view.rows_acquired == 2, "what came can still be looked at"
    assert np.isnan(view.images["phase"]).all()


# the other device


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("name", ["plain", "aberrated", "transposed", "float", "masked pixels"])
def test_gpu_equals_cpu(name: str, method: str) -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        cupy.zeros(1).sum().item()
    except Exception as error:  # CUDA's own error types
        pytest.skip(f"CUDA does not answer: {error}")
    case = CASES[name]
    passes = [case.counts(seed) for seed in range(2)]
    held = np.arange(case.positions) % 11 != 3
    with (
        running(case.setup(method, passes=2)) as cpu,
        running(case.setup(method, passes=2), device=choose_device("gpu")) as gpu,
    ):
        for engine in (cpu, gpu):
            feed(engine, passes[0])
            feed(engine, passes[1], case.positions + np.flatnonzero(held))
        assert oracle.relative_error(gpu.object(), cpu.object()) < 1e-5
        ours, theirs = gpu.images(IMAGE_UNITS), cpu.images(IMAGE_UNITS)
        for image in IMAGE_UNITS:
            np.testing.assert_allclose(ours[image], theirs[image], rtol=1e-4, atol=1e-5)
        probe = Probe(
            case.probe.energy_ev,
            case.probe.semiangle,
            case.probe.rolloff,
            Aberrations.from_user({"C10": 30.0}),
            AxesRelation(0.4),
        )
        for engine in (cpu, gpu):
            engine.change(probe, METHODS[method])
            engine.finish()
        assert oracle.relative_error(gpu.object(), cpu.object()) < 1e-5
        assert gpu.counters == cpu.counters
