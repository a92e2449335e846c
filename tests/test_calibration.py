"""The bright-field disk is where it was put: simulated disks with all that detectors do to them, and the real sets."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.errors import ConfigurationError
from stream.calibration import BrightFieldDisk, Survey, find_bf_disk

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = ["sto_32x32x96x96", "sto_defocus_64x64x128x128", "particle_128x128x128x128"]


def disk(shape: tuple[int, int], centre: tuple[float, float], radius: float, ramp_px: float = 1.0) -> np.ndarray:
    """Intensity of a disk whose amplitude is a linear ramp ``ramp_px`` wide, 1/2 at ``radius``; 1 inside."""
    rows, columns = np.indices(shape)
    distance = np.hypot(rows - centre[0], columns - centre[1])
    return np.clip((radius - distance) / ramp_px + 0.5, 0.0, 1.0) ** 2


def measured(intensity: np.ndarray, frames: int, electrons: float, seed: int = 0) -> np.ndarray:
    """Mean of ``frames`` frames with Poisson noise, ``electrons`` in each."""
    rng = np.random.default_rng(seed)
    return rng.poisson(intensity * (electrons * frames / intensity.sum())) / frames


def centre_error(found: BrightFieldDisk, centre: tuple[float, float]) -> float:
    return float(np.hypot(*np.subtract(found.centre_px, centre)))


@pytest.mark.parametrize("frames", [16, 64, 256, 1024])
@pytest.mark.parametrize("name", SETS)
def test_given_sets(name: str, frames: int) -> None:
    path = DATA / f"{name}.h5"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with h5py.File(path) as file:
        centre, radius = tuple(file.attrs["bf_centre_px"]), float(file.attrs["bf_radius_px"])
        data = file["data"]
        rows = -(-frames // data.shape[1])
        first = data[:rows].reshape(-1, *data.shape[2:])[:frames]
    survey = Survey(first.shape[1:], first.dtype)
    for block in np.array_split(first, 3):
        survey.add(block)
    found = survey.find()
    assert survey.frames == frames
    assert not found.bad_pixels.any()
    assert centre_error(found, centre) < 0.05
    assert found.radius_px == pytest.approx(radius, abs=0.05)
    assert found.contrast > 100


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    row=st.floats(30, 66), column=st.floats(30, 98), radius=st.floats(5, 28), frames=st.sampled_from([16, 64, 1024]),
    electrons=st.floats(200, 5000), halo=st.floats(0, 0.1), hot=st.integers(0, 8), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_any_disk(
    row: float, column: float, radius: float, frames: int, electrons: float, halo: float, hot: int, seed: int
) -> None:
    shape, rng = (96, 128), np.random.default_rng(seed)
    rows, columns = np.indices(shape)
    glow = halo * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * radius) ** 2)
    pattern = measured(disk(shape, (row, column), radius) + glow, frames, electrons, seed)
    where = rng.choice(pattern.size, hot, replace=False)
    pattern.flat[where] = 10 ** rng.uniform(3.5, 6, hot)
    found = find_bf_disk(pattern, frames=frames)
    assert centre_error(found, (row, column)) < 0.05 * radius
    assert abs(found.radius_px - radius) < 0.05 * radius
    np.testing.assert_array_equal(np.flatnonzero(found.bad_pixels), np.sort(where))


@pytest.mark.parametrize(
    ("shape", "centre", "radius"),
    [((128, 128), (60.3, 70.8), 25.0), ((256, 256), (120.2, 133.9), 60.0), ((512, 512), (250.4, 261.1), 100.0)],
)
def test_very_few_electrons(shape: tuple[int, int], centre: tuple[float, float], radius: float) -> None:
    for seed in range(5):
        found = find_bf_disk(measured(disk(shape, centre, radius) + 0.005, 16, 200, seed), frames=16)
        assert centre_error(found, centre) < 0.05 * radius
        assert abs(found.radius_px - radius) < 0.05 * radius
        assert not found.bad_pixels.any()


@pytest.mark.parametrize("centre", [(127.5, 70.2), (110.0, 112.4), (-6.3, 60.0)])
def test_disk_cut_by_the_border(centre: tuple[float, float]) -> None:
    found = find_bf_disk(measured(disk((128, 128), centre, 25.0), 256, 500), frames=256)
    assert centre_error(found, centre) < 0.15
    assert found.radius_px == pytest.approx(25.0, abs=0.15)


def test_uneven_disk_of_a_crystal() -> None:
    centre, radius = (61.4, 66.7), 25.0
    direct = disk((128, 128), centre, radius)
    pattern = direct * (1 + 0.3 * np.cos(np.arange(128) / 9))
    for row, column in [(30, 8), (-30, -8), (8, -30), (-8, 30)]:
        bragg = disk((128, 128), (centre[0] + row, centre[1] + column), radius)
        pattern += 0.7 * bragg * direct + 0.1 * bragg
    found = find_bf_disk(measured(pattern, 64, 1000), frames=64)
    assert centre_error(found, centre) < 0.1
    assert found.radius_px == pytest.approx(radius, abs=0.15)
    assert not found.bad_pixels.any()


def test_hot_and_dead_pixels_rows_and_gaps() -> None:
    centre, radius, shape = (50.3, 61.9), 22.0, (110, 128)
    pattern = measured(disk(shape, centre, radius) + 0.02, 256, 2000)
    good = np.ones(shape, dtype=bool)
    good[55:59] = good[:, 70:74] = False
    pattern[~good] = 2.0**32 - 1
    bad = np.zeros(shape, dtype=bool)
    hot, dead = [(5, 5, 1e6), (50, 60, 255.0), (45, 80, 65535.0), (0, 0, 7e3)], [(52, 50, 0.0), (40, 64, 0.0)]
    for row, column, value in hot + dead:
        pattern[row, column], bad[row, column] = value, True
    pattern[44], pattern[:, 57] = 0.0, 0.0
    found = find_bf_disk(pattern, good=good, frames=256)
    assert centre_error(found, centre) < 0.05
    assert found.radius_px == pytest.approx(radius, abs=0.05)
    assert found.bad_pixels[bad].all()
    assert not found.bad_pixels[~good].any()
    assert found.bad_pixels[44, 45:57].all()
    assert found.bad_pixels[36:55, 57].all()
    surplus = found.bad_pixels & ~bad & (pattern > 0)
    assert not surplus.any()


def test_counts_need_not_be_electrons() -> None:
    pattern = 512.0 * measured(disk((96, 96), (47.2, 50.8), 20.0), 16, 300)
    for frames in (16, None):
        found = find_bf_disk(pattern, frames=frames)
        assert centre_error(found, (47.2, 50.8)) < 0.5
        assert found.radius_px == pytest.approx(20.0, abs=0.5)
        assert not found.bad_pixels.any()


def test_no_noise_and_a_broad_edge() -> None:
    pattern = disk((96, 96), (47.2, 50.8), 20.0, ramp_px=4.0)
    found = find_bf_disk(pattern)
    assert centre_error(found, (47.2, 50.8)) < 0.02
    assert found.radius_px == pytest.approx(20.0, abs=0.1)
    assert found.edge_px == pytest.approx(5.0, abs=1.0)  # a raised cosine is as steep as a ramp of 2/pi its width
    # The ramp's intensity is one half where its amplitude is sqrt(1/2).
    assert found.half_height_radius_px == pytest.approx(20.0 - 4 * (np.sqrt(0.5) - 0.5), abs=0.15)
    assert not found.bad_pixels.any()


def test_given_values_are_kept() -> None:
    pattern = measured(disk((96, 96), (47.2, 50.8), 20.0), 64, 1000)
    radius_only = find_bf_disk(pattern, frames=64, centre_px=(47.2, 50.8))
    assert radius_only.centre_px == (47.2, 50.8)
    assert radius_only.radius_px == pytest.approx(20.0, abs=0.05)
    assert radius_only.uncertainty_px[0] == 0 < radius_only.uncertainty_px[1]
    centre_only = find_bf_disk(pattern, frames=64, radius_px=20.5)
    assert centre_only.radius_px == 20.5
    assert centre_error(centre_only, (47.2, 50.8)) < 0.05
    pattern[48, 50] = 0
    both = find_bf_disk(pattern, frames=64, centre_px=(46.0, 50.0), radius_px=18.0)
    assert (both.centre_px, both.radius_px, both.uncertainty_px) == ((46.0, 50.0), 18.0, (0.0, 0.0))
    assert np.argwhere(both.bad_pixels).tolist() == [[48, 50]]
    assert find_bf_disk(0 * pattern, centre_px=(46.0, 50.0), radius_px=18.0).radius_px == 18.0


def test_uncertainty_is_about_the_scatter() -> None:
    centre = (40.3, 44.8)
    found = [find_bf_disk(measured(disk((80, 90), centre, 15.0), 16, 300, seed), frames=16) for seed in range(30)]
    scatter = np.sqrt(np.mean([np.square(np.subtract(f.centre_px, centre)) for f in found]))
    assert 0.4 < scatter / np.mean([f.uncertainty_px[0] for f in found]) < 2


def _no_disk_patterns() -> dict[str, np.ndarray]:
    rng, shape = np.random.default_rng(3), (96, 96)
    rows, columns = np.indices(shape)
    one = np.zeros(shape)
    one[40, 50] = 1e5
    return {
        "zeros": np.zeros(shape),
        "negative": -np.ones(shape),
        "uniform": np.ones(shape),
        "nan": np.full(shape, np.nan),
        "one hot pixel": one,
        "faint noise": rng.poisson(0.05, shape) / 16,
        "strong noise": rng.poisson(900.0, shape) / 16,
        "readout noise": rng.normal(0.0, 1.0, shape),
        "larger than the detector": rng.poisson(50 * disk(shape, (50, 45), 90.0)) / 16,
        "gradient": rng.poisson(columns) / 16,
        "half": rng.poisson(50.0 * (columns > 40)) / 16,
        "no edge": rng.poisson(300 * np.exp(-np.hypot(rows - 50, columns - 45) / 20)) / 16,
    }


@pytest.mark.parametrize("kind", _no_disk_patterns())
def test_no_disk(kind: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no bright-field disk.*Give bf_centre_px.*bf_radius_px"):
        find_bf_disk(_no_disk_patterns()[kind], frames=16)


def test_wrong_arguments() -> None:
    pattern = disk((32, 32), (16, 16), 8.0)
    with pytest.raises(ConfigurationError, match=r"\(rows, columns\).*got shape \(4, 32, 32\)"):
        find_bf_disk(np.zeros((4, 32, 32)))
    with pytest.raises(ConfigurationError, match="pixel mask has shape"):
        find_bf_disk(pattern, good=np.ones((32, 31), dtype=bool))
    with pytest.raises(ConfigurationError, match="bf_radius_px must be a positive number, got -1"):
        find_bf_disk(pattern, radius_px=-1)
    with pytest.raises(ConfigurationError, match="bf_centre_px must be two finite numbers"):
        find_bf_disk(pattern, centre_px=(float("nan"), 3.0))
    with pytest.raises(ConfigurationError, match=r"expected frames of shape \(n, 32, 32\)"):
        Survey((32, 32), np.uint16).add(np.zeros((32, 32), dtype=np.uint16))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_survey_leaves_out_stuck_pixels(dtype: type[np.unsignedinteger]) -> None:
    rng, centre = np.random.default_rng(5), (30.6, 35.1)
    frames = rng.poisson(3 * disk((64, 72), centre, 14.0), (64, 64, 72)).astype(dtype)
    largest = np.iinfo(dtype).max
    good = np.ones((64, 72), dtype=bool)
    good[:, 40:42] = False
    frames[:, :, 40:42] = largest  # a gap, in the mask
    frames[:, 33, 30] = largest  # not in the mask
    frames[:50, 10, 60] = largest
    frames[7, 5, 5] = 20 if dtype is np.uint8 else 3  # an electron or a few are no hot pixel
    survey = Survey((64, 72), dtype, good=good)
    survey.add(frames[:40])
    survey.add(frames[40:])
    found = survey.find()
    assert centre_error(found, centre) < 0.1
    assert found.radius_px == pytest.approx(14.0, abs=0.1)
    assert survey.mean_pattern[33, 30] == survey.mean_pattern[20, 40] == 0
    assert survey.mean_pattern[30, 30] == pytest.approx(3, abs=1)
    if dtype is not np.uint8:
        assert np.argwhere(found.bad_pixels).tolist() == [[10, 60], [33, 30]]


def test_an_empty_survey_finds_nothing() -> None:
    with pytest.raises(ConfigurationError, match="empty"):
        Survey((32, 32), np.uint8).find()
