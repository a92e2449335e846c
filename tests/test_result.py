"""The result: what is in the file, how it is described, and that it holds enough to do it all again."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import stream
from detectors.errors import ConfigurationError, DataFileError
from stream.offline import describe_file
from stream.optics import electron_wavelength
from stream.result import describe_result, is_result
from tests import oracle
from tests.data_helpers import Case

CASE = Case(
    scan=(9, 12), rotation=20.0, transpose=True, aberrations={"C10": -40.0, "C12": 9.0, "phi12": 25.0}, masked=((5, 7),)
)


def data_file(folder: Path, case: Case = CASE, name: str = "scan.h5") -> Path:
    path = folder / name
    with h5py.File(path, "w") as file:
        file["data"] = case.counts()
        file["pixel_mask"] = case.good.astype(np.uint8)
    return path


def reconstruct(path: Path, case: Case = CASE, **settings: Any) -> stream.Result:
    values = {key: value for key, value in case.settings.items() if key != "scan_shape"}
    mask = path.with_name("mask.npy")
    np.save(mask, case.good)
    return stream.reconstruct(path, dataset="data", device="cpu", **{"pixel_mask": str(mask), **values, **settings})


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> stream.Result:
    return reconstruct(data_file(tmp_path_factory.mktemp("data")))


@pytest.fixture
def saved(result: stream.Result, tmp_path: Path) -> Path:
    path = tmp_path / "new folder" / "result.h5"
    result.save(path)
    return path


def test_public_call_gives_the_oracles_answer(result: stream.Result) -> None:
    expected = CASE.true_object(CASE.counts())
    assert result.object.dtype == np.complex64
    assert oracle.relative_error(result.object, expected) < 5e-6
    np.testing.assert_allclose(result.phase, np.angle(expected), atol=1e-6)
    assert result.positions_received.all()
    assert result.source == "scan.h5"


def test_arrays_in_the_file(saved: Path, result: stream.Result) -> None:
    with h5py.File(saved) as file:
        np.testing.assert_array_equal(file["object"], result.object)
        for name, image in (
            ("phase", "phase"),
            ("amplitude", "amplitude"),
            ("virtual/bright_field", "bright_field"),
            ("virtual/dark_field", "dark_field"),
            ("mean_pattern", "mean_pattern"),
        ):
            np.testing.assert_array_equal(file[name], result.images[image])
            assert file[name].dtype == np.float32
        np.testing.assert_array_equal(file["com"], [result.images["com_row"], result.images["com_column"]])
        np.testing.assert_array_equal(file["pixel_mask"], CASE.good)
        np.testing.assert_array_equal(file["positions_received"], result.positions_received)
        units = {name: file[name].attrs["units"] for name in ("object", "phase", "amplitude", "com", "mean_pattern")}
        assert units == {
            "object": "1",
            "phase": "rad",
            "amplitude": "1",
            "com": "mrad",
            "mean_pattern": "counts/frame",
        }
        assert file["virtual/bright_field"].attrs["units"] == "counts"


def test_a_generic_viewer_finds_its_way(saved: Path) -> None:
    """NeXus: default attributes lead from the root to a signal with its axes."""
    with h5py.File(saved) as file:
        assert file.attrs["NX_class"] == "NXroot"
        entry = file[file.attrs["default"]]
        assert entry.attrs["NX_class"] == "NXentry"
        groups = {name: entry[name] for name in entry if isinstance(entry[name], h5py.Group)}
        assert entry.attrs["default"] == "phase"
        assert groups.keys() == {"phase", "amplitude", "bright_field", "dark_field", "com", "mean_pattern"}
        for name, group in groups.items():
            assert group.attrs["NX_class"] == "NXdata"
            signal = group[group.attrs["signal"]]
            assert len(group.attrs["axes"]) == signal.ndim
            assert "units" in signal.attrs
            if name == "mean_pattern":
                assert signal.shape == CASE.detector
                continue
            assert signal.shape[-2:] == CASE.scan
            for axis, count, step in zip(group.attrs["axes"][-2:], CASE.scan, CASE.step, strict=True):
                np.testing.assert_allclose(group[axis], np.arange(count) * step)
                assert group[axis].attrs["units"] == "angstrom"
        assert "scan.h5" in entry["title"][()].decode()


def test_attributes(saved: Path, result: stream.Result) -> None:
    with h5py.File(saved) as file:
        attributes = dict(file.attrs)
    assert attributes["energy_kev"] == 200.0
    assert attributes["semiangle_mrad"] == 9.7
    assert tuple(attributes["scan_shape"]) == CASE.scan
    assert tuple(attributes["scan_step_angstrom"]) == CASE.step
    assert tuple(attributes["bf_centre_px"]) == CASE.centre
    assert bool(attributes["transpose"]) is True
    assert attributes["method"] == "ssb"
    assert json.loads(attributes["aberrations"]) == CASE.aberrations
    assert attributes["wavelength_angstrom"] == electron_wavelength(2e5)
    assert attributes["passes"] == 1
    assert attributes["frames_received"] == CASE.positions
    for name in ("missing", "duplicate", "late", "undecodable", "outside"):
        assert attributes[f"frames_{name}"] == 0
    assert json.loads(attributes["sources"])["energy_kev"] == "argument"
    assert tomllib.loads(attributes["configuration"])["energy_kev"] == 200.0
    assert attributes["program_version"]
    assert attributes["source"] == "scan.h5"


@pytest.mark.parametrize("known", ["everything", "no centre", ("no centre, a hot pixel")])
def test_the_configuration_in_the_file_does_it_again(tmp_path: Path, known: str) -> None:
    """... exactly, also when the disk was looked for the first time."""
    case = Case(scan=(9, 12), detector=(40, 44), pixel=(1.0, 1.0), centre=(19.3, 22.6), rotation=-15.0, rolloff=1.0)
    row, column = np.indices(case.detector)
    disk = np.hypot(row - case.centre[0], column - case.centre[1]) < case.semiangle
    counts = np.random.default_rng(0).poisson(0.02 + 8.0 * disk, (*case.scan, *case.detector)).astype(np.uint16)
    if "hot" in known:
        counts[..., 20, 25] = 5000
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        file["data"] = counts
    values = {key: value for key, value in case.settings.items() if key != "scan_shape"}
    if "no centre" in known:
        del values["bf_centre_px"]
    first = stream.reconstruct(path, dataset="data", device="cpu", **values)
    assert first.setup.geometry.good[20, 25] == ("hot" not in known)
    first.save(tmp_path / "result.h5")
    with h5py.File(tmp_path / "result.h5") as file:
        (tmp_path / "again.toml").write_text(file.attrs["configuration"], encoding="utf-8")
    again = stream.reconstruct(path, dataset="data", device="cpu", config=tmp_path / "again.toml")
    assert again.object.tobytes() == first.object.tobytes()
    for key, value in first.parameters.values.items():
        assert key == "find_bad_pixels" or again.parameters.values[key] == value
    np.testing.assert_array_equal(again.setup.geometry.good, first.setup.geometry.good)


def test_an_existing_result_is_replaced(saved: Path, result: stream.Result) -> None:
    saved.write_bytes(b"something else")
    result.save(saved)
    assert is_result(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["result.h5"]


def test_a_result_that_cannot_be_written(tmp_path: Path, result: stream.Result) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataFileError, match="cannot write"):
        result.save(folder)
    assert list(tmp_path.iterdir()) == [folder], "no unfinished file stays behind"


def test_a_result_below_a_file(tmp_path: Path, result: stream.Result) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataFileError, match="cannot write"):
        result.save(tmp_path / "file" / "result.h5")


def test_unfinished_results_say_what_is_missing(tmp_path: Path) -> None:
    """A file that ends early: rows without data are NaN, the object there is that of the mean pattern."""
    counts = CASE.counts()
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        file["data"] = counts[:5]
    result = reconstruct(path, scan_shape=CASE.scan)
    assert result.counters == stream.Counters(received=60), "missing are only frames that the file announces"
    assert np.isnan(result.phase[5:]).all()
    assert np.isfinite(result.phase[:5]).all()
    assert np.isfinite(result.object).all()
    np.testing.assert_array_equal(result.positions_received, np.repeat(np.arange(9) < 5, 12).reshape(9, 12))
    result.save(tmp_path / "result.h5")
    with h5py.File(tmp_path / "result.h5") as file:
        assert file.attrs["frames_received"] == 60
        assert np.isnan(file["virtual/bright_field"][5:]).all()


def test_describing_a_result(saved: Path, tmp_path: Path) -> None:
    rows = dict(describe_result(saved))
    assert rows["layout"] == "liveptycho result"
    assert rows["phase"] == "float32 (9, 12)"
    assert rows["channels"] == "phase, bf, df, com, pattern"
    assert "images" not in rows, "nothing is left out"
    assert rows["energy_kev"] == "200.0"
    assert dict(describe_file(saved).rows) == rows
    assert is_result(saved)
    assert not is_result(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    assert not is_result(tmp_path / "text.h5")
    with pytest.raises(DataFileError):
        describe_result(tmp_path / "missing.h5")


def test_progress_is_told(tmp_path: Path) -> None:
    said: list[tuple[int, int]] = []
    reconstruct(data_file(tmp_path), progress=lambda done, total: said.append((done, total)))
    assert said[-1] == (CASE.positions, CASE.positions)
    assert [done for done, _ in said] == sorted(done for done, _ in said)


def test_mistakes_in_the_call(tmp_path: Path) -> None:
    path = data_file(tmp_path)
    with pytest.raises(ConfigurationError, match="unknown key 'energy'"):
        reconstruct(path, energy=3)
    with pytest.raises(DataFileError):
        reconstruct(tmp_path / "missing.h5")
    with pytest.raises(ConfigurationError, match="missing: energy_kev, scan_step_angstrom, semiangle_mrad"):
        stream.reconstruct(path, dataset="data", device="cpu")
