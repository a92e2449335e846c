"""From frame indices to positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.errors import ConfigurationError
from detectors.messages import SeriesStart
from stream.array import choose_device
from stream.config import Layer
from stream.reconstruction import Reconstruction
from stream.scan import ScanPattern
from tests import oracle
from tests.data_helpers import Case, accumulate_all, assert_object, block, feed, filled, running


def walk(shape: tuple[int, int], per_row: int, per_pass: int, serpentine: bool) -> list[tuple[int, int]]:
    """One pass, frame by frame, as the beam goes; (-1, -1) where it is on no position."""
    path = []
    for row in range(shape[0]):
        columns = list(range(shape[1]))
        path += [(row, column) for column in (columns[::-1] if serpentine and row % 2 else columns)]
        path += [(-1, -1)] * per_row
    return path + [(-1, -1)] * per_pass


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    per_row=st.integers(0, 3),
    per_pass=st.integers(0, 5),
    serpentine=st.booleans(),
    passes=st.integers(1, 3),
    offset=st.integers(-35, 9),
)
def test_raster(
    shape: tuple[int, int], per_row: int, per_pass: int, serpentine: bool, passes: int, offset: int
) -> None:
    path = walk(shape, per_row, per_pass, serpentine)
    offset = max(offset, 1 - len(path))
    scan = ScanPattern(shape, per_row, per_pass, serpentine, start_offset=offset)
    assert scan.frames_per_pass == len(path)
    assert scan.frames_in(passes) == passes * len(path) + offset
    number, row, column = scan.locate(np.arange(scan.frames_in(passes)))
    before, skipped = [(-1, -1)] * offset, max(0, -offset)
    places = np.array((before + path * passes)[skipped:]).reshape(-1, 2)
    inside = number >= 0
    assert not inside[: len(before)].any()
    np.testing.assert_array_equal(number[inside], np.repeat(np.arange(passes), len(path))[skipped:])
    np.testing.assert_array_equal(np.stack([row, column], axis=1)[inside], places[inside])
    # how many positions so many frames cover, and which are to come in each pass
    counts = np.cumsum([0, *(places[:, 0] >= 0)])
    assert [scan.positions_in(frames) for frames in range(len(counts))] == counts.tolist()
    for pass_ in range(passes):
        expected = np.zeros(shape, bool)
        here = (number == pass_) & (row >= 0)
        expected[row[here], column[here]] = True
        np.testing.assert_array_equal(scan.scanned_in(pass_), expected)


def test_indices_far_into_an_endless_scan() -> None:
    scan = ScanPattern((4, 5), flyback_frames_per_row=1, flyback_frames_per_pass=2)
    number, row, column = scan.locate(np.array([26 * 10**12 + 7]))
    assert (number[0], row[0], column[0]) == (10**12, 1, 1)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    serpentine=st.booleans(), rows=st.lists(st.tuples(st.integers(0, 20), st.integers(-2, 9)), min_size=1, max_size=30)
)
def test_places_in_rows_are_those_of_frame_numbers(serpentine: bool, rows: list[tuple[int, int]]) -> None:
    scan = ScanPattern((4, 5), flyback_frames_per_row=3, serpentine=serpentine)
    row, place = np.array(rows).T
    found = scan.locate_in_rows(row, place)
    inside = (place >= 0) & (place < 8)
    np.testing.assert_array_equal(np.stack(found)[:, inside], np.stack(scan.locate(row[inside] * 8 + place[inside])))
    assert (np.stack(found)[1:, ~inside] == -1).all()


def test_a_position_table_after_other_frames() -> None:
    table = np.array([[1, 2], [0, 0], [-1, -1]])
    number, row, column = ScanPattern((3, 4), positions=table, start_offset=2).locate(np.arange(8))
    assert number.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1]
    assert list(zip(row[2:5], column[2:5], strict=True)) == [(1, 2), (0, 0), (-1, -1)]
    assert ScanPattern((3, 4), positions=table, start_offset=-1).scanned_in(0).sum() == 1


def test_negative_indices_lie_in_no_pass() -> None:
    number, _, _ = ScanPattern((4, 5)).locate(np.array([-1, -20, -21, -(1 << 62)]))
    assert (number < 0).all()


@pytest.mark.parametrize("per_pass", [0, 4])
def test_position_table(per_pass: int) -> None:
    table = np.array([[1, 2], [0, 0], [-1, -1], [2, 1], [-5, 1], [0, -1]])
    scan = ScanPattern((3, 4), flyback_frames_per_pass=per_pass, positions=table)
    assert scan.frames_per_pass == 6 + per_pass
    number, row, column = scan.locate(np.arange(2 * (6 + per_pass)))
    one = [(1, 2), (0, 0), (-1, -1), (2, 1), (-1, -1), (-1, -1)] + [(-1, -1)] * per_pass
    np.testing.assert_array_equal(np.stack([row, column], axis=1), one * 2)
    np.testing.assert_array_equal(number, np.repeat([0, 1], 6 + per_pass))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shape": (0, 4)}, "at least 1x1"),
        ({"shape": (4, -1)}, "at least 1x1"),
        ({"flyback_frames_per_row": -1}, "negative"),
        ({"flyback_frames_per_pass": -2}, "negative"),
        ({"positions": np.array([[0, 0, 0]])}, r"integers \(frames, 2\)"),
        ({"positions": np.array([0, 1])}, r"integers \(frames, 2\)"),
        ({"positions": np.array([[0.0, 1.0]])}, r"integers \(frames, 2\)"),
        ({"positions": np.array([[0, 4]])}, "outside the scan of 3x4"),
        ({"positions": np.array([[3, 0]])}, "outside the scan"),
        ({"positions": np.array([[-1, -1]])}, "outside the scan"),
        ({"positions": np.zeros((0, 2), int)}, "outside the scan"),
        ({"positions": np.array([[1, 1], [0, 2], [1, 1]])}, "occurs twice"),
        ({"positions": np.array([[1, 1]]), "serpentine": True}, "no serpentine"),
        ({"positions": np.array([[1, 1]]), "flyback_frames_per_row": 1}, "no flyback"),
        ({"start_offset": -12}, "leaves nothing of a pass of 12"),
        ({"positions": np.array([[1, 1]]), "rows_by_time": True}, "time gaps only in a raster"),
        ({"shape": (9, 1), "rows_by_time": True}, "at least two columns"),
        ({"flyback_frames_per_pass": 3, "rows_by_time": True}, "without flyback_frames_per_pass"),
    ],
)
def test_impossible_scans(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ScanPattern(**{"shape": (3, 4), **settings})


# through the reconstruction


@pytest.mark.parametrize(
    ("frames", "offset", "noted"),
    [(70, 0, False), (75, 0, True), (75, 5, False), (70, 5, True), (65, -5, False), (70, -5, False), (71, -5, True)],
)
def test_announced_frames_and_the_start_offset(frames: int, offset: int, noted: bool) -> None:
    case = Case()
    counts = case.counts()
    begun = SeriesStart("series", case.detector, np.dtype(case.dtype), case.scan, frames)
    layers = [Layer.of("flag", {**case.settings, "start_offset": offset})]
    run = Reconstruction(begun, layers, choose_device("cpu"), source="test", threads=1)
    try:
        come = np.arange(max(0, -offset), 70)
        indices = come + offset
        run.add(replace(block(counts, come), indices=indices))
        if offset > 0:
            run.add(block(counts, range(offset)))
        run.finish()
        found = run.result()
        assert found.counters.outside == max(0, offset)
        assert found.counters.missing == 0
        assert found.positions_received.sum() == len(come)
        assert found.passes == 1
        assert any("announces" in note for note in run.notes) == noted
        assert run.engine is not None
        assert run.engine.passes_done == 1
        if offset >= 0:
            assert oracle.relative_error(found.object, case.true_object(counts)) < 3e-6
    finally:
        run.close()


@pytest.mark.parametrize("absent", [4, 10, 23])
@pytest.mark.parametrize("passes", [1, 2, None])
def test_positions_before_the_first_frame_are_not_missed(absent: int, passes: int | None) -> None:
    """They have no frames in the first pass, and are neither missing nor waited for; in the second pass they are."""
    case = Case()
    counts, positions = case.counts(), case.positions
    first = np.zeros(case.scan, bool)
    first.ravel()[absent:] = True
    setup = case.setup(scan=ScanPattern(case.scan, start_offset=-absent), passes=passes)
    with running(setup) as engine:
        for at in range(absent, positions, 9):
            come = np.arange(at, min(at + 9, positions))
            engine.add(replace(block(counts, come), indices=come - absent))
        engine.close_rows()
        accumulate_all(engine)
        assert_object(engine, case, filled(counts, first))
        assert engine.counters.missing == 0
        if passes == 1:
            assert engine.passes_done == 1
            assert engine.beyond == 0
        else:
            come = np.setdiff1d(np.arange(positions), [1, 2, 50])
            engine.add(replace(block(counts, come), indices=come + positions - absent))
        engine.finish()
        assert engine.counters.missing == (0 if passes == 1 else 3)
        assert engine.counters.outside == 0


def test_frames_beyond_the_last_pass_are_counted() -> None:
    case = Case()
    with running(case.setup(scan=ScanPattern(case.scan, start_offset=3))) as engine:
        feed(engine, case.counts(), range(80))
        assert engine.beyond == 7
        assert engine.counters.outside == 10
