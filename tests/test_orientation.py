"""Frames that come mirrored or upside down: with the orientation set, every image is that of the frames put right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from detectors.messages import SeriesStart
from stream.array import choose_device
from stream.config import Layer
from stream.optics import ORIENTATIONS, AxesRelation
from stream.reconstruction import Reconstruction
from stream.result import Result
from stream.snapshot import IMAGE_UNITS
from tests import oracle
from tests.data_helpers import Case, block

CASE = Case(
    rotation=28.0,
    aberrations={"C10": -60.0, "C12": 25.0, "phi12": 30.0, "C21": 700.0, "phi21": -50.0, "C30": 2e4},
    masked=((5, 7), (2, 11)),
)


def flips(orientation: str) -> tuple[slice, slice]:
    """Written out once more: which way the detector's rows and columns come."""
    back, on = slice(None, None, -1), slice(None)
    return {
        "as-sent": (on, on),
        "flip-rows": (back, on),
        "flip-columns": (on, back),
        "rotate-180": (back, back),
        "arina-before-2024.1": (on, back),
    }[orientation]


def reconstruction(case: Case, start: dict[str, Any], settings: dict[str, Any]) -> Reconstruction:
    begun = SeriesStart("series", case.detector, np.dtype(case.dtype), case.scan, case.positions, **start)
    return Reconstruction(
        begun, [Layer.of("flag", {**case.settings, **settings})], choose_device("cpu"), source="test", threads=2
    )


def result(
    case: Case, orientation: str, method: str = "ssb", change: dict[str, object] | None = None, **settings: Any
) -> Result:
    """Of frames that were sent in this orientation, with the setting that says so."""
    rows, columns = flips(orientation)
    counts = case.counts()[:, :, rows, columns]
    centre = tuple(
        size - 1 - at if flip.step else at
        for size, at, flip in zip(case.detector, case.centre, (rows, columns), strict=True)
    )
    if orientation != "as-sent":
        settings["orientation"] = orientation
    run = reconstruction(
        case, {"pixel_mask": case.good[rows, columns]}, {"bf_centre_px": centre, "method": method, **settings}
    )
    try:
        run.add(block(counts, range(40)))
        if change is not None:
            run.change(change)
        run.add(block(counts, range(40, case.positions)))
        run.finish()
        return run.result()
    finally:
        run.close()


@pytest.mark.parametrize("method", ["ssb", "ssb-single"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_flipped_frames_give_the_same_images(orientation: str, transpose: bool, method: str) -> None:
    case = replace(CASE, transpose=transpose)
    found = result(case, orientation, method)
    assert oracle.relative_error(found.object, case.true_object(case.counts(), method)) < 3e-6
    plain = result(case, "as-sent", method)
    rows, columns = flips(orientation)
    for name in IMAGE_UNITS:
        expected = plain.images[name]
        expected = expected[rows, columns] if name == "mean_pattern" else expected
        np.testing.assert_allclose(found.images[name], expected, rtol=1e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_changed_rotation_keeps_the_orientation(orientation: str) -> None:
    changed = replace(CASE, rotation=-75.0, transpose=True)
    found = result(CASE, orientation, change={"rotation_deg": -75.0, "transpose": True})
    assert oracle.relative_error(found.object, changed.true_object(CASE.counts())) < 3e-6
    assert found.parameters.values["orientation"] == orientation
    assert found.parameters.values["rotation_deg"] == -75.0


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_flip_of_the_axes(rows: bool, columns: bool, transpose: bool) -> None:
    axes = AxesRelation(0.3, transpose)
    q = np.random.default_rng(0).normal(size=(2, 20))
    k_row, k_column = axes.to_detector(*q)
    flipped = axes.flipped(rows, columns)
    found = flipped.to_detector(*q)
    np.testing.assert_allclose(found, (-k_row if rows else k_row, -k_column if columns else k_column), atol=1e-15)
    np.testing.assert_allclose(flipped.to_scan(*found), q, atol=1e-15)


def test_every_orientation_is_known_here() -> None:
    assert {name: tuple(axis.step == -1 for axis in flips(name)) for name in ORIENTATIONS} == ORIENTATIONS


@pytest.mark.parametrize(
    ("said", "settings", "noted"),
    [
        ({"detector": "Dectris ARINA Si", "firmware": "release-2022.1.2rc2"}, {}, True),
        ({"detector": "Dectris ARINA CZT", "firmware": "release-2023.2"}, {}, True),
        ({"detector": "arina", "software_version": "2023.1.0"}, {}, True),
        ({"detector": "Dectris ARINA CZT", "firmware": "release-2024.1", "software_version": "1.8.0"}, {}, False),
        ({"detector": "Dectris ARINA CZT", "firmware": "release-2025.10"}, {}, False),
        ({"detector": "Dectris ARINA CZT", "software_version": "1.8.0"}, {}, False),
        ({"detector": "Dectris ARINA CZT"}, {}, False),
        ({"detector": "Dectris QUADRO", "firmware": "release-2022.1.2rc2"}, {}, False),
        ({"firmware": "release-2022.1.2rc2"}, {}, False),
        ({"detector": ["ARINA"], "firmware": {"release": 2022.1}}, {}, True),
        ({"detector": "ARINA", "firmware": "release-2022.1"}, {"orientation": "as-sent"}, False),
        ({"detector": "ARINA", "firmware": "release-2022.1"}, {"orientation": "arina-before-2024.1"}, False),
    ],
)
def test_an_arina_that_mirrors_its_images_is_noted(said: dict, settings: dict, noted: bool) -> None:
    run = reconstruction(CASE, {"settings": said}, settings)
    assert any("--orientation arina-before-2024.1" in note for note in run.notes) == noted
    run.close()
