"""From frame indices to positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.errors import ConfigurationError
from stream.scan import ScanPattern


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
)
def test_raster(shape: tuple[int, int], per_row: int, per_pass: int, serpentine: bool, passes: int) -> None:
    scan = ScanPattern(shape, per_row, per_pass, serpentine)
    path = walk(shape, per_row, per_pass, serpentine)
    assert scan.frames_per_pass == len(path)
    number, row, column = scan.locate(np.arange(passes * len(path)))
    np.testing.assert_array_equal(number, np.repeat(np.arange(passes), len(path)))
    np.testing.assert_array_equal(np.stack([row, column], axis=1), path * passes)


def test_indices_far_into_an_endless_scan() -> None:
    scan = ScanPattern((4, 5), flyback_frames_per_row=1, flyback_frames_per_pass=2)
    number, row, column = scan.locate(np.array([26 * 10**12 + 7]))
    assert (number[0], row[0], column[0]) == (10**12, 1, 1)


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
    ],
)
def test_impossible_scans(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ScanPattern(**{"shape": (3, 4), **settings})
