"""Reading 4D-STEM files: each layout, each chunking, each way in which a file can be wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from detectors.errors import DataFileError
from stream.files import Dataset4D, open_dataset
from stream.optics import ABERRATION_SYMBOLS, electron_wavelength

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

# Written with py4DSTEM 0.14.18 (a throw-away environment, not a dependency):
#   data = np.random.default_rng(7).poisson(20, (6, 5, 16, 16)).astype(np.float32)
#   cube = py4DSTEM.DataCube(data=data); c = cube.calibration
#   c.set_R_pixel_size(0.25); c.set_R_pixel_units("A"); c.set_Q_pixel_size(0.04); c.set_Q_pixel_units("A^-1")
#   c.set_convergence_semiangle_mrad(20.0); c.set_QR_rotation_degrees(-15.0); c.set_probe_param((3.5, 7.6, 8.2))
#   py4DSTEM.save("py4dstem_datacube.h5", cube, mode="o")
PY4DSTEM = Path(__file__).parent / "data" / "py4dstem_datacube.h5"

SETTINGS = {
    "energy_kev",
    "semiangle_mrad",
    "scan_step_angstrom",
    "detector_pixel_mrad",
    "detector_pixel_inv_angstrom",
    "rotation_deg",
    "transpose",
    "aberrations",
    "rolloff_mrad",
    "bf_centre_px",
    "bf_radius_px",
}

FRAMES = np.random.default_rng(1).integers(0, 200, (6, 5, 8, 10)).astype(np.uint16)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write a file from {path: array or (array, create_dataset options)}; ``attrs`` go to the root."""

    def write(contents: dict[str, Any], attrs: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "file.h5"
        with h5py.File(path, "w") as file:
            for name, value in contents.items():
                data, options = value if isinstance(value, tuple) else (value, {})
                file.create_dataset(name, data=data, **options)
            file.attrs.update(attrs or {})
        return path

    return write


def read_all(data: Dataset4D, **options: Any) -> np.ndarray:
    """All blocks joined, after checking that they follow each other."""
    parts, expected = [], 0
    for first, block in data.blocks(**options):
        assert first == expected
        assert block.flags.c_contiguous
        assert block.dtype == data.dtype
        assert block.shape[1:] == data.detector_shape
        parts.append(block)
        expected += len(block)
    assert expected == data.frames
    return np.concatenate(parts)


# ---- layouts ----


@pytest.mark.parametrize("name", ["sto_32x32x96x96", "sto_defocus_64x64x128x128", "particle_128x128x128x128"])
def test_delivered_data(name: str) -> None:
    path = SHARED / f"{name}.h5"
    if not path.exists():
        pytest.skip(f"needs the delivered data set {path}")
    with open_dataset(path) as data, h5py.File(path) as file:
        assert data.layout == "liveptycho-data"
        assert (*data.scan_shape, *data.detector_shape) == file["data"].shape
        assert data.dtype == file["data"].dtype
        assert data.settings["energy_kev"] == file.attrs["energy_eV"] / 1e3
        assert data.settings["rotation_deg"] == file.attrs["rotation_deg"]
        assert data.settings["transpose"] is False
        np.testing.assert_array_equal(data.settings["scan_step_angstrom"], file.attrs["scan_step_A"])
        np.testing.assert_array_equal(data.settings["detector_pixel_mrad"], file.attrs["det_pixel_mrad"])
        np.testing.assert_array_equal(data.settings["bf_centre_px"], file.attrs["bf_centre_px"])
        assert data.settings.keys() <= SETTINGS
        assert not data.notes
        columns = data.scan_shape[1]
        for first, block in data.blocks():
            if first == 0:
                np.testing.assert_array_equal(block[:columns], file["data"][0])
            break


def test_delivered_aberrations() -> None:
    path = SHARED / "sto_defocus_64x64x128x128.h5"
    if not path.exists():
        pytest.skip(f"needs the delivered data set {path}")
    with open_dataset(path) as data:
        assert data.settings["aberrations"] == pytest.approx({"C10": -100, "C12": 20, "phi12": 30, "C30": 1e5})


def test_own_layout_every_setting(make: Callable[..., Path]) -> None:
    mask = np.ones((8, 10), np.uint8)
    mask[2, 3] = 0
    attrs = {
        "energy_eV": 80e3,
        "semiangle_mrad": np.array([21.0]),
        "scan_step_A": [0.4, 0.5],
        "det_pixel_invA": 0.03,
        "rotation_deg": -7,
        "transpose": 1,
        "rolloff_mrad": 0.0,
        "bf_centre_px": [3.5, 5.25],
        "bf_radius_px": 2.5,
        "C10_A": 0.0,
        "phi10_rad": 0.0,
        "C56_A": 1e7,
        "phi56_rad": -0.1,
        "C21_A": 300.0,
        "phi99_rad": 1.0,
        "conventions": "some text",
        "periodic_scan": 1,
    }
    with open_dataset(make({"data": FRAMES, "pixel_mask": mask, "more": np.zeros((2, 2, 2, 2))}, attrs)) as data:
        assert data.layout == "liveptycho-data"
        assert data.dataset == "/data"
        expected = 0.03 * electron_wavelength(80e3) * 1e3
        assert data.settings == {
            "energy_kev": 80.0,
            "semiangle_mrad": 21.0,
            "scan_step_angstrom": [0.4, 0.5],
            "detector_pixel_mrad": [expected, expected],
            "rotation_deg": -7.0,
            "transpose": True,
            "rolloff_mrad": 0.0,
            "bf_centre_px": [3.5, 5.25],
            "bf_radius_px": 2.5,
            "aberrations": {"C21": 300.0, "phi21": 0.0, "C56": 1e7, "phi56": math.degrees(-0.1)},
        }
        assert data.pixel_mask.dtype == bool
        np.testing.assert_array_equal(data.pixel_mask, mask != 0)
        rows = dict(data.describe())
        assert rows["bad pixels"] == "1 of 80"
        assert rows["scan"] == "6 x 5 positions"
        assert all(isinstance(text, str) for row in data.describe() for text in row)


def test_a_pixel_mask_is_enough(make: Callable[..., Path]) -> None:
    with open_dataset(make({"data": FRAMES, "pixel_mask": np.eye(8, 10, dtype=bool)})) as data:
        assert (data.layout, data.settings) == ("liveptycho-data", {})
        assert data.pixel_mask.sum() == 8


@pytest.mark.parametrize("symbol", ABERRATION_SYMBOLS)
def test_every_aberration(make: Callable[..., Path], symbol: str) -> None:
    attrs = {f"{symbol}_A": 12.0, "energy_eV": 1e5}
    with open_dataset(make({"data": FRAMES}, attrs)) as data:
        assert data.settings["aberrations"][symbol] == 12.0


def test_pixel_in_inverse_angstrom_without_energy(make: Callable[..., Path]) -> None:
    with open_dataset(make({"data": FRAMES}, {"det_pixel_invA": [0.03, 0.04]})) as data:
        assert data.settings == {"detector_pixel_inv_angstrom": [0.03, 0.04]}


def test_pixel_sizes_that_disagree_are_told(make: Callable[..., Path]) -> None:
    attrs = {"energy_eV": 2e5, "det_pixel_invA": 0.04, "det_pixel_mrad": 2.0}
    with open_dataset(make({"data": FRAMES}, attrs)) as data:
        assert data.settings["detector_pixel_mrad"] == [2.0, 2.0]
        assert "det_pixel_mrad says 2" in data.notes[0]
        assert ("note", data.notes[0]) in data.describe()


def test_py4dstem_file() -> None:
    expected = np.random.default_rng(7).poisson(20, (30, 16, 16)).astype(np.float32)
    with open_dataset(PY4DSTEM) as data:
        assert data.layout == "EMD 1.0 (py4DSTEM)"
        assert (data.scan_shape, data.detector_shape, data.frames) == ((6, 5), (16, 16), 30)
        assert data.dtype == np.dtype("<f4")
        assert data.pixel_mask is None
        np.testing.assert_array_equal(read_all(data), expected)
        # No energy in the file, so the pixel stays 1/Å; the rotation's sign is not certain, so it is only a note.
        assert data.settings == {
            "semiangle_mrad": 20.0,
            "scan_step_angstrom": [0.25, 0.25],
            "detector_pixel_inv_angstrom": [0.04, 0.04],
        }
        assert any("rotation_deg = -15" in note for note in data.notes)
        assert any("(7.6, 8.2)" in note for note in data.notes)


def test_py4dstem_file_with_the_dataset_named() -> None:
    for name in ("datacube_root/datacube", "/datacube_root/datacube/data"):
        with open_dataset(PY4DSTEM, name) as data:
            assert data.layout == "EMD 1.0 (py4DSTEM)"
            assert data.settings["semiangle_mrad"] == 20.0


def emd1(path: Path, calibration: dict[str, Any], *, dims: tuple[Any, ...] = ()) -> Path:
    """An EMD 1.0 file as emdfile writes it, its bytes and text types included."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"emd_group_type": "file", "version_major": 1, "version_minor": 0})
        root = file.create_group("root")
        root.attrs["emd_group_type"] = "root"
        cube = root.create_group("cube")
        cube.attrs.update({"emd_group_type": "array", "python_class": "Array"})
        cube["data"] = FRAMES
        for axis, (steps, unit) in enumerate(dims):
            cube[f"dim{axis}"] = np.array(steps, dtype=float)
            cube[f"dim{axis}"].attrs["units"] = unit
        group = root.create_group("metadatabundle/calibration")
        for name, value in calibration.items():
            group[name] = "_None" if value is None else value.encode() if isinstance(value, str) else value
            group[name].attrs["type"] = b"None" if value is None else b"number"
    return path


@pytest.mark.parametrize(
    ("name", "value", "kev"),
    [
        ("voltage", 2e5, 200),
        ("beam_energy", 300, 300),
        ("accelerating_voltage_kV", 4, 4),
        ("energy_eV", 60e3, 60),
        ("accelerating_voltage", 80000, 80),
        ("beam_energy", 0, None),
        ("energy", 100.0, None),
        ("voltage", None, None),
    ],
)
def test_emd_energy(tmp_path: Path, name: str, value: Any, kev: float | None) -> None:
    path = emd1(tmp_path / "a", {"Q_pixel_size": 0.02, "Q_pixel_units": "A^-1", name: value})
    with open_dataset(path) as data:
        assert data.layout == "EMD 1.0"
        assert data.settings.get("energy_kev") == kev
        if kev is None:
            assert data.settings == {"detector_pixel_inv_angstrom": [0.02, 0.02]}
        else:
            expected = 0.02 * electron_wavelength(kev * 1e3) * 1e3
            assert data.settings["detector_pixel_mrad"] == pytest.approx([expected] * 2)


@pytest.mark.parametrize(
    ("size", "unit", "angstrom"),
    [
        (0.3, "A", 0.3),
        (0.3, "Å", 0.3),
        (0.3, "\u212b", 0.3),
        (0.03, "nm", 0.3),
        (0.03, "[n_m]", 0.3),
        (1, "pixels", None),
    ],
)
def test_emd_scan_units(tmp_path: Path, size: float, unit: str, angstrom: float | None) -> None:
    calibration = {"R_pixel_size": size, "R_pixel_units": unit, "Q_pixel_size": 1.5, "Q_pixel_units": "mrad"}
    with open_dataset(emd1(tmp_path / "a", calibration)) as data:
        expected = {"detector_pixel_mrad": [1.5, 1.5]}
        if angstrom is not None:
            expected["scan_step_angstrom"] = [pytest.approx(angstrom)] * 2
        assert data.settings == expected
        assert not data.notes


def test_emd_unknown_unit_is_told(tmp_path: Path) -> None:
    with open_dataset(emd1(tmp_path / "a", {"R_pixel_size": 3.0, "R_pixel_units": "furlong"})) as data:
        assert data.settings == {}
        assert "furlong" in data.notes[0]


def test_emd_steps_from_its_dimensions(tmp_path: Path) -> None:
    dims = (([0, 0.2], "A"), ([0, 0.25], "A"), ([-2.0, -1.5], "mrad"), ([-2.0, -1.25], "mrad"))
    path = emd1(tmp_path / "a", {"R_pixel_size": 1, "R_pixel_units": "pixels"}, dims=dims)
    with open_dataset(path) as data:
        assert data.settings == {"scan_step_angstrom": [0.2, 0.25], "detector_pixel_mrad": [0.5, 0.75]}


def test_emd_flip_alone_is_told(tmp_path: Path) -> None:
    with open_dataset(emd1(tmp_path / "a", {"QR_flip": True, "QR_rotation": 0.5})) as data:
        assert "rotation_deg" not in data.settings
        assert "transpose = true" in data.notes[0]
        assert "rotation_deg = 28.65" in data.notes[0]


def test_emd_bad_calibration(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"R_pixel_size must be 1 or 2 positive finite numbers, got nan"):
        open_dataset(emd1(tmp_path / "a", {"R_pixel_size": math.nan, "R_pixel_units": "A"}))


def test_py4dstem_0_12_file(tmp_path: Path) -> None:
    # The layout as py4DSTEM 0.12's io/native/write.py made it.
    path = tmp_path / "old.h5"
    with h5py.File(path, "w") as file:
        top = file.create_group("4DSTEM_experiment")
        top.attrs.update({"emd_group_type": 2, "version_major": "0", "version_minor": "12", "version_release": "6"})
        cube = top.create_group("data/datacubes/datacube_0")
        cube.attrs["emd_group_type"] = 1
        cube["data"] = FRAMES
        for axis in range(4):
            cube[f"dim{axis + 1}"] = np.arange(FRAMES.shape[axis], dtype=np.float32)
            cube[f"dim{axis + 1}"].attrs["units"] = np.bytes_("[pix]")
        for name, value in {
            "microscope/beam_energy": 2e5,
            "microscope/convergence_semiangle_mrad": 21.4,
            "calibration/R_pixel_size": 0.05,
            "calibration/R_pixel_units": "nm",
            "calibration/Q_pixel_size": 0.04,
            "calibration/Q_pixel_units": "A^-1",
            "calibration/QR_rotation": 10.0,
            "calibration/QR_rotation_units": "deg",
        }.items():
            top[f"metadata/{name}"] = value
    with open_dataset(path) as data:
        assert data.layout == "EMD (py4DSTEM 0.12)"
        assert data.settings["energy_kev"] == 200
        assert data.settings["semiangle_mrad"] == 21.4
        assert data.settings["scan_step_angstrom"] == [0.5, 0.5]
        assert data.settings["detector_pixel_mrad"] == pytest.approx([0.04 * electron_wavelength(2e5) * 1e3] * 2)
        assert any("rotation_deg = 10 " in note for note in data.notes)


def test_py4dstem_0_13_file(tmp_path: Path) -> None:
    path = tmp_path / "old.h5"
    with h5py.File(path, "w") as file:
        root = file.create_group("root")
        root.attrs.update({"emd_group_type": "root", "version_major": 0, "version_minor": 13})
        cube = root.create_group("datacube")
        cube.attrs.update({"emd_group_type": 1, "py4dstem_class": "DataCube"})
        cube["data"] = FRAMES
        calibration = root.create_group("cal")
        calibration.attrs.update({"emd_group_type": 0, "py4dstem_class": "Calibration"})
        for name, value in {"R_pixel_size": 2.0, "R_pixel_units": "A", "QR_rotation_degrees": 4.0}.items():
            calibration[name] = np.bytes_(value) if isinstance(value, str) else value
    with open_dataset(path) as data:
        assert data.layout == "EMD (py4DSTEM 0.13)"
        assert data.settings == {"scan_step_angstrom": [2.0, 2.0]}
        assert "QR_rotation 4 degrees" in data.notes[0]


def test_any_hdf5_file(make: Callable[..., Path]) -> None:
    path = make({"entry/images": FRAMES, "entry/stack": FRAMES[0], "entry/mean": FRAMES[0, 0]})
    with open_dataset(path) as data:
        assert (data.layout, data.dataset, data.settings) == ("HDF5 dataset", "/entry/images", {})
    with open_dataset(path, dataset="entry/stack") as data:
        assert (data.scan_shape, data.frames, data.detector_shape) == (None, 5, (8, 10))
        np.testing.assert_array_equal(read_all(data), FRAMES[0])
        assert dict(data.describe())["scan"] == "5 frames, scan shape not given"


def test_one_stack_of_frames(make: Callable[..., Path]) -> None:
    path = make({"data": FRAMES.reshape(30, 8, 10)}, {"energy_eV": 1e5})
    with open_dataset(str(path)) as data:
        assert (data.layout, data.scan_shape, data.frames) == ("liveptycho-data", None, 30)


# ---- frames ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (1, 5, 8, 10), "compression": "gzip", "shuffle": True},
        {"chunks": (1, 2, 8, 10)},
        {"chunks": (4, 3, 8, 10), "compression": "gzip"},
        {"chunks": (6, 5, 4, 5)},
        {"chunks": (1, 1, 3, 10)},
    ],
)
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7, 10, 12, 20, 29, 30, 1000])
def test_blocks_are_the_array(make: Callable[..., Path], options: dict[str, Any], frames: int) -> None:
    size = FRAMES[0, 0].nbytes
    with open_dataset(make({"data": (FRAMES, options)})) as data:
        np.testing.assert_array_equal(read_all(data, max_bytes=frames * size), FRAMES.reshape(-1, 8, 10))
        assert max(block.nbytes for _, block in data.blocks(frames * size)) <= frames * size


@pytest.mark.parametrize("chunk", [1, 4, 7, 30])
@pytest.mark.parametrize("frames", [1, 5, 8, 30])
def test_blocks_of_a_stack(make: Callable[..., Path], chunk: int, frames: int) -> None:
    stack = FRAMES.reshape(30, 8, 10)
    with open_dataset(make({"stack": (stack, {"chunks": (chunk, 8, 10)})})) as data:
        np.testing.assert_array_equal(read_all(data, max_bytes=frames * stack[0].nbytes), stack)


def test_blocks_keep_to_chunks(make: Callable[..., Path]) -> None:
    size = FRAMES[0, 0].nbytes
    with open_dataset(make({"data": (FRAMES, {"chunks": (2, 5, 8, 10)})})) as data:
        # Five rows would fit, but the third chunk band would then be read twice.
        assert [first for first, _ in data.blocks(25 * size)] == [0, 20]
        # Less than a band fits: it is read in parts that never reach into the next band.
        assert [first for first, _ in data.blocks(9 * size)] == [0, 5, 10, 15, 20, 25]
    with open_dataset(make({"data": (FRAMES, {"chunks": (1, 2, 8, 10)})})) as data:
        assert [first for first, _ in data.blocks(3 * size)][:4] == [0, 2, 4, 5]


def test_a_frame_larger_than_the_limit(make: Callable[..., Path]) -> None:
    with open_dataset(make({"data": FRAMES})) as data:
        assert [len(block) for _, block in data.blocks(1)] == [1] * 30


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ("<u1", "<u1"),
        ("<u2", "<u2"),
        (">u2", "<u2"),
        ("<u4", "<u4"),
        (">u4", "<u4"),
        ("<f4", "<f4"),
        (">f4", "<f4"),
        ("?", "<u1"),
        ("i1", "<f4"),
        ("<i2", "<f4"),
        (">i4", "<f4"),
        ("<i8", "<f4"),
        ("<u8", "<f4"),
        ("<f8", "<f4"),
        ("<f2", "<f4"),
    ],
)
def test_pixel_types(make: Callable[..., Path], stored: str, given: str) -> None:
    values = (FRAMES % 2 if stored == "?" else FRAMES % 100).astype(stored)
    if values.dtype.kind in "if":
        values[1, 2] = -3
    with open_dataset(make({"data": (values, {"chunks": (1, 5, 8, 10)})})) as data:
        assert data.dtype == np.dtype(given)
        np.testing.assert_array_equal(read_all(data), values.reshape(-1, 8, 10).astype(given))
        assert data.dtype.name in dict(data.describe())["pixel type"]


def test_converted_blocks_stay_small(make: Callable[..., Path]) -> None:
    values = FRAMES.astype(np.float64)
    with open_dataset(make({"data": values})) as data:
        assert max(len(block) for _, block in data.blocks(10 * values[0, 0].nbytes)) == 10


def test_values_beyond_float32(make: Callable[..., Path]) -> None:
    values = FRAMES.astype(np.float64)
    values[3, 1, 0, 0] = 1e60
    with (
        open_dataset(make({"data": values})) as data,
        pytest.raises(DataFileError, match=r"frames 15 to 19 .* beyond float32"),
    ):
        read_all(data, max_bytes=5 * values[0, 0].nbytes)


# ---- what can be wrong ----


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="no such file"):
        open_dataset(tmp_path / "nothing.h5")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="this is a directory"):
        open_dataset(tmp_path)


def test_permission_denied(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand, since for root (as in containers) no file is forbidden.
    def refuse(*_args: Any, **_options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = make({"data": FRAMES})
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataFileError, match="not permitted"):
        open_dataset(path)


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all" * 100])
def test_not_hdf5(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=r"an HDF5 file was expected.*convert"):
        open_dataset(path)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_truncated(make: Callable[..., Path], part: float) -> None:
    path = make({"data": FRAMES})
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(DataFileError, match="truncated or damaged"):
        open_dataset(path)


def test_file_being_written(make: Callable[..., Path]) -> None:
    path = make({"data": FRAMES})
    # Another process, since HDF5 locks only against those; it says when it has the file, and ends when its input does.
    code = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read(); f.close()"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(DataFileError, match="another program is writing"):
            open_dataset(path)
        writer.stdin.close()
    with open_dataset(path) as data:
        assert data.frames == 30


def test_no_frames(make: Callable[..., Path]) -> None:
    with pytest.raises(DataFileError, match=r"a 4-D dataset .* was expected, the file has none"):
        open_dataset(make({"image": FRAMES[0, 0]}))


def test_several_datasets(make: Callable[..., Path]) -> None:
    path = make({"a": FRAMES, "deep/b": FRAMES[:2]})
    with pytest.raises(DataFileError, match=r"/a \(6x5x8x10 uint16\), /deep/b \(2x5x8x10 uint16\).*--dataset"):
        open_dataset(path)
    with open_dataset(path, "/deep/b") as data:
        assert data.scan_shape == (2, 5)
    with pytest.raises(DataFileError, match=r"14: .* and 2 more"):
        open_dataset(make({f"d{i}": FRAMES[0] for i in range(14)}))


@pytest.mark.parametrize("name", ["wrong", "deep/wrong", "/", ""])
def test_wrong_dataset_name(make: Callable[..., Path], name: str) -> None:
    with pytest.raises(DataFileError, match=r"it has /deep/b \(6x5x8x10 uint16\)"):
        open_dataset(make({"deep/b": FRAMES}), name)


def test_broken_link(make: Callable[..., Path]) -> None:
    path = make({"b": FRAMES})
    with h5py.File(path, "r+") as file:
        file["gone"] = h5py.ExternalLink("elsewhere.h5", "/data")
    with pytest.raises(DataFileError, match="'gone'; it has /b"):
        open_dataset(path, "gone")
    with open_dataset(path) as data:
        assert data.dataset == "/b"


def test_virtual_dataset(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file["frames"] = FRAMES
    layout = h5py.VirtualLayout(FRAMES.shape, FRAMES.dtype)
    layout[...] = h5py.VirtualSource("part.h5", "frames", FRAMES.shape)
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file.create_virtual_dataset("frames", layout)
    with open_dataset(tmp_path / "whole.h5") as data:
        np.testing.assert_array_equal(read_all(data), FRAMES.reshape(-1, 8, 10))
    (tmp_path / "part.h5").unlink()
    with pytest.raises(DataFileError, match=r"takes frames from part\.h5, which is missing"):
        open_dataset(tmp_path / "whole.h5")


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 2, 2, 2), (5,)])
def test_wrong_number_of_dimensions(make: Callable[..., Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(DataFileError, match=f"has {len(shape)} dimensions, 4 .*were expected; it has"):
        open_dataset(make({"a": np.zeros(shape), "b": FRAMES}), "a")


@pytest.mark.parametrize("dtype", ["c8", "S3", [("x", "f4"), ("y", "f4")]])
def test_unsupported_pixel_type(make: Callable[..., Path], dtype: Any) -> None:
    with pytest.raises(DataFileError, match=r"/a holds .* values; frames need real numbers"):
        open_dataset(make({"a": np.zeros((2, 2, 2, 2), dtype)}))


def test_text_as_frames(make: Callable[..., Path]) -> None:
    with pytest.raises(DataFileError, match="frames need real numbers"):
        open_dataset(make({"a": np.full((2, 2, 2, 2), "x", dtype=h5py.string_dtype())}))


@pytest.mark.parametrize("shape", [(0, 5, 8, 8), (5, 5, 8, 0)])
def test_empty_dataset(make: Callable[..., Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(DataFileError, match="is empty"):
        open_dataset(make({"a": np.zeros(shape)}))


def test_null_dataset(make: Callable[..., Path]) -> None:
    with pytest.raises(DataFileError, match="is empty"):
        open_dataset(make({"a": h5py.Empty("f4"), "b": FRAMES}), "a")


def test_missing_filter(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((1, 5, 8, 10))
        plist.set_filter(305, h5py.h5z.FLAG_OPTIONAL)  # LZO: registered with the HDF Group, shipped by nobody
        space = h5py.h5s.create_simple(FRAMES.shape)
        h5py.h5d.create(file.id, b"data", h5py.h5t.STD_U16LE, space, plist).close()
    with pytest.raises(DataFileError, match=r"filter 305 .* not installed"):
        open_dataset(path)


def test_damaged_chunk(make: Callable[..., Path]) -> None:
    path = make({"data": (FRAMES, {"chunks": (1, 5, 8, 10), "compression": "gzip"})})
    with h5py.File(path) as file:
        chunk = file["data"].id.get_chunk_info(3)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    with open_dataset(path) as data:
        blocks = data.blocks(FRAMES[0].nbytes)
        assert [next(blocks)[0] for _ in range(3)] == [0, 5, 10]
        with pytest.raises(DataFileError, match=r"frames 15 to 19 of /data cannot be read .*copy the file again"):
            next(blocks)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("energy_eV", -1.0),
        ("energy_eV", math.nan),
        ("energy_eV", "much"),
        ("energy_eV", [1e5, 1e5]),
        ("semiangle_mrad", 0.0),
        ("semiangle_mrad", h5py.Empty("f8")),
        ("scan_step_A", [0.1, 0.1, 0.1]),
        ("scan_step_A", [0.1, math.inf]),
        ("det_pixel_mrad", [0.0, 1.0]),
        ("det_pixel_invA", math.nan),
        ("rotation_deg", math.nan),
        ("rotation_deg", 1j),
        ("transpose", 2),
        ("rolloff_mrad", -1.0),
        ("bf_centre_px", 4.0),
        ("bf_radius_px", -1.0),
        ("C10_A", math.nan),
        ("C12_A", [1.0, 2.0]),
        ("phi12_rad", math.nan),
        ("C13_A", 1.0),
    ],
)
def test_bad_attribute(make: Callable[..., Path], name: str, value: Any) -> None:
    attrs = {"energy_eV": 1e5, "C12_A": 10.0, name: value}
    with pytest.raises(DataFileError, match=f"attribute '{name}'"):
        open_dataset(make({"data": FRAMES}, attrs))


def test_unreadable_attribute(make: Callable[..., Path]) -> None:
    path = make({"data": FRAMES}, {"rotation_deg": 3.0})
    with h5py.File(path, "r+") as file:
        # h5py has no NumPy type for an HDF5 time.
        h5py.h5a.create(file.id, b"energy_eV", h5py.h5t.UNIX_D32LE, h5py.h5s.create(h5py.h5s.SCALAR))
    with pytest.raises(DataFileError, match="attribute 'energy_eV'"):
        open_dataset(path)


@pytest.mark.parametrize(
    "mask",
    [np.ones((10, 8)), np.zeros((8, 10)), np.full((8, 10), math.nan), np.full((8, 10), 7), np.ones((8, 10), "c8")],
)
def test_bad_pixel_mask(make: Callable[..., Path], mask: np.ndarray) -> None:
    with pytest.raises(DataFileError, match="pixel_mask"):
        open_dataset(make({"data": FRAMES, "pixel_mask": mask}, {"energy_eV": 1e5}))


def test_the_file_is_closed_after_use_and_after_an_error(make: Callable[..., Path]) -> None:
    path = make({"data": FRAMES}, {"energy_eV": 1e5})
    with open_dataset(path) as data:
        assert data.frames == 30
    data.close()
    with h5py.File(path, "r+") as file:  # impossible while it is open for reading elsewhere in this process
        file.attrs["energy_eV"] = math.nan
    with pytest.raises(DataFileError):
        open_dataset(path)
    with h5py.File(path, "r+"):
        pass
