"""Frames that another client takes away."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.neighbours import GapPattern

ONE = "every second frame is missing: is another client connected?"


def said(indices: np.ndarray, size: int = 5) -> str:
    pattern = GapPattern()
    for at in range(0, len(indices), size):
        pattern.take(indices[at : at + size])
    return pattern.sentence


def dealt(frames: int, clients: int, run: int = 1, first: int = 0) -> np.ndarray:
    """The frames that the first of several clients gets, ``run`` of them in a message."""
    indices = np.arange(frames)
    return indices[indices // run % clients == 0] + first


@pytest.mark.parametrize(
    ("indices", "sentence"),
    [
        (dealt(200, 2), ONE),
        (dealt(44, 2, first=1), ONE),
        (dealt(200, 3), "2 of 3 frames are missing: are 2 other clients connected?"),
        (dealt(200, 4), "3 of 4 frames are missing: are 3 other clients connected?"),
        (dealt(4000, 2, 64), "every second run of 64 frames is missing: is another client connected?"),
        (dealt(4000, 3, 16), "2 of 3 runs of 16 frames are missing: are 2 other clients connected?"),
    ],
)
def test_frames_that_are_handed_out_in_turn(indices: np.ndarray, sentence: str) -> None:
    assert said(indices) == sentence
    assert said(indices, 1) == sentence
    assert said(np.random.default_rng(0).permutation(indices)) == sentence


def test_a_few_frames_show_nothing_yet() -> None:
    assert said(dealt(40, 2)) == ""
    assert said(np.arange(0)) == ""


def test_a_client_that_comes_and_goes() -> None:
    pattern = GapPattern()
    pattern.take(np.arange(1000))
    assert pattern.sentence == ""
    pattern.take(dealt(100, 2, first=1000))
    assert pattern.sentence == ONE
    pattern.take(np.arange(1100, 7000))
    assert pattern.sentence == ""


def test_some_frames_lost_besides() -> None:
    indices = dealt(1000, 2)
    assert said(np.delete(indices, [17, 200, 201, 333])) == ONE


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.9))
def test_frames_lost_at_random(seed: int, share: float) -> None:
    indices = np.arange(2000)
    assert said(indices[np.random.default_rng(seed).random(2000) > share]) == ""


@pytest.mark.parametrize("indices", [np.arange(5000), np.arange(5000)[np.arange(5000) % 130 < 128], np.full(500, 3)])
def test_nothing_is_said_of_other_series(indices: np.ndarray) -> None:
    """Complete ones, flyback frames that are not sent, one frame over and over."""
    assert said(indices) == ""


def test_memory_is_bounded_and_blocks_are_not_kept() -> None:
    pattern = GapPattern()
    for first in range(0, 100_000, 7):
        pattern.take(np.arange(first, first + 7))
    assert sum(map(len, pattern._recent)) < 5000
    large = np.arange(1 << 20)
    pattern.take(large)
    assert sum(map(len, pattern._recent)) < 10_000
