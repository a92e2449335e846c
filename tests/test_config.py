"""Settings: layers and where values come from, what is derived, what is refused and how it is said."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detectors.errors import ConfigurationError
from stream.api import layers
from stream.config import Layer, Settings, parse_shape
from stream.optics import electron_wavelength
from stream.parameters import MeasuredDisk, Parameters, Resolution, load_pixel_mask, load_positions
from tests.data_helpers import Case

COMPLETE: dict[str, Any] = {
    "scan_shape": (7, 10),
    "energy_kev": 200.0,
    "semiangle_mrad": 20.0,
    "scan_step_angstrom": 0.5,
    "detector_pixel_mrad": 1.0,
    "bf_centre_px": (24.5, 23.0),
}


def resolved(*settings: dict[str, Any], disk: MeasuredDisk | None = None) -> Parameters:
    return Resolution([Layer.of(f"layer {i}", values) for i, values in enumerate(settings)]).resolve(disk)


def disk(**changes: Any) -> MeasuredDisk:
    bad = np.zeros((48, 50), bool)
    bad[3, 4] = True
    return MeasuredDisk(**{"centre_px": (24.1, 22.9), "radius_px": 19.0, "bad_pixels": bad, "frames": 64, **changes})


# layers


def test_first_layer_wins_and_its_source_is_remembered() -> None:
    resolution = Resolution(
        [
            Layer.of("flag", {"energy_kev": 80}),
            Layer.of("config file a.toml", {"energy_kev": 200, "semiangle_mrad": 30}),
            Layer.of("stream", {**COMPLETE, "method": "ssb-single"}),
        ]
    )
    parameters = resolution.resolve()
    assert parameters.values["energy_kev"] == 80
    assert parameters.values["semiangle_mrad"] == 30
    assert parameters.values["method"] == "ssb-single"
    assert parameters.values["scan_step_angstrom"] == (0.5, 0.5)
    sources = parameters.sources
    assert sources["energy_kev"] == "flag"
    assert sources["semiangle_mrad"] == "config file a.toml"
    assert sources["method"] == "stream"
    assert sources["rolloff_mrad"] == "default"
    assert set(parameters.values) == set(sources) == set(Settings.model_fields)
    notes = " | ".join(resolution.notes)
    assert "energy_kev is 200.0 in the config file a.toml; 80.0 from the flag is used" in notes
    assert "semiangle_mrad is 20.0 in the stream" in notes
    assert len(resolution.notes) == 3


def test_no_note_where_layers_agree() -> None:
    assert not Resolution([Layer.of("flag", COMPLETE), Layer.of("stream", COMPLETE)]).notes


def test_defaults() -> None:
    values = resolved(COMPLETE).values
    assert values["rolloff_mrad"] == 2.0
    assert values["rotation_deg"] == 0.0
    assert values["transpose"] is False
    assert values["aberrations"] == {}
    assert values["method"] == "ssb"
    assert values["flyback_frames_per_row"] == values["flyback_frames_per_pass"] == 0
    assert values["serpentine"] is False
    assert values["averaging"] is False
    assert values["positions"] is None
    assert (values["start_offset"], values["row_starts"], values["orientation"]) == (0, "index", "as-sent")
    assert values["frames_per_trigger"] is None
    assert values["channel"] is None


def test_falsy_values_are_values() -> None:
    values = resolved(
        {"rolloff_mrad": 0, "transpose": False, "rotation_deg": 0}, {**COMPLETE, "rolloff_mrad": 1}
    ).values
    assert values["rolloff_mrad"] == 0
    assert resolved({"transpose": False}, {**COMPLETE, "transpose": True}).values["transpose"] is False


def test_overlaid() -> None:
    resolution = Resolution([Layer.of("flag", COMPLETE)])
    over = resolution.overlaid(Layer.of("control", {"rotation_deg": 33}))
    assert over.resolve().values["rotation_deg"] == 33
    assert over.resolve().sources["rotation_deg"] == "control"
    assert "rotation_deg" not in resolution.known


def test_arguments_come_before_the_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("energy_kev = 60\nrotation_deg = 5\n")
    parameters = Resolution([*layers(path, {"energy_kev": 80}), Layer.of("file", COMPLETE)]).resolve()
    assert parameters.values["energy_kev"] == 80
    assert parameters.values["rotation_deg"] == 5
    assert parameters.sources["rotation_deg"] == "config file a.toml"


# what follows from what


def test_radius_from_semiangle_and_pixel() -> None:
    parameters = resolved({**COMPLETE, "detector_pixel_mrad": (0.8, 1.25)})
    assert parameters.values["bf_radius_px"] == pytest.approx((20 / 0.8 + 20 / 1.25) / 2)
    assert "derived" in parameters.sources["bf_radius_px"]


def test_pixel_from_radius_and_semiangle() -> None:
    without = {key: value for key, value in COMPLETE.items() if key != "detector_pixel_mrad"}
    parameters = resolved({**without, "bf_radius_px": 25})
    assert parameters.values["detector_pixel_mrad"] == pytest.approx((0.8, 0.8))
    assert "derived" in parameters.sources["detector_pixel_mrad"]


def test_semiangle_from_radius_and_pixel() -> None:
    without = {key: value for key, value in COMPLETE.items() if key != "semiangle_mrad"}
    parameters = resolved({**without, "bf_radius_px": 25})
    assert parameters.values["semiangle_mrad"] == pytest.approx(25.0)
    assert parameters.probe.semiangle == pytest.approx(0.025)


def test_pixel_from_spatial_frequency() -> None:
    without = {key: value for key, value in COMPLETE.items() if key != "detector_pixel_mrad"}
    parameters = resolved({**without, "detector_pixel_inv_angstrom": (0.02, 0.03)})
    wavelength = electron_wavelength(2e5)
    assert parameters.values["detector_pixel_mrad"] == pytest.approx((20 * wavelength, 30 * wavelength))
    assert "energy_kev" in parameters.sources["detector_pixel_mrad"]


def test_measured_disk_fills_what_is_missing() -> None:
    without = {key: value for key, value in COMPLETE.items() if key not in ("bf_centre_px", "detector_pixel_mrad")}
    resolution = Resolution([Layer.of("flag", without)])
    assert resolution.needs_disk
    parameters = resolution.resolve(disk())
    assert parameters.values["bf_centre_px"] == (24.1, 22.9)
    assert parameters.values["detector_pixel_mrad"] == pytest.approx((20 / 19, 20 / 19))
    assert parameters.sources["bf_centre_px"] == "measured in the first 64 frames"
    setup = parameters.setup((48, 50), np.dtype("u2"), 1)
    assert not setup.geometry.good[3, 4]
    assert setup.geometry.good.sum() == 48 * 50 - 1


def test_given_values_come_before_measured_ones() -> None:
    known = Resolution([Layer.of("flag", {**COMPLETE, "find_bad_pixels": True})])
    assert known.needs_disk
    parameters = known.resolve(disk())
    assert parameters.values["bf_centre_px"] == (24.5, 23.0)
    assert parameters.values["bf_radius_px"] == 20
    assert parameters.bad_pixels is not None
    assert not Resolution([Layer.of("flag", COMPLETE)]).needs_disk


def test_bad_pixels_are_left_alone_where_the_user_says_so() -> None:
    without = {key: value for key, value in COMPLETE.items() if key != "bf_centre_px"}
    assert resolved({**without, "find_bad_pixels": False}, disk=disk()).bad_pixels is None


def test_setup_in_other_units() -> None:
    case = Case(rotation=30.0, transpose=True, aberrations={"C10": -40.0, "C12": 3.0, "phi12": 90.0})
    parameters = resolved({**case.settings, "flyback_frames_per_row": 2, "serpentine": True, "averaging": True})
    setup = parameters.setup(case.detector, np.dtype("u2"), None)
    assert setup.probe.energy_ev == pytest.approx(2e5)
    assert setup.probe.semiangle == pytest.approx(9.7e-3)
    assert setup.probe.rolloff == pytest.approx(2e-3)
    assert setup.probe.axes.rotation_rad == pytest.approx(math.pi / 6)
    assert setup.probe.axes.transpose
    assert setup.probe.aberrations.coefficients["C12"] == pytest.approx((3.0, math.pi / 2))
    assert setup.scan.shape == case.scan
    assert setup.scan.flyback_frames_per_row == 2
    assert setup.scan.serpentine
    assert setup.averaging
    assert setup.passes is None
    assert setup.scan_step == case.step
    assert setup.geometry.pixel_mrad == case.pixel


# line triggers

WITHOUT_SHAPE = {key: value for key, value in COMPLETE.items() if key != "scan_shape"}


def triggered(frames: int | None, *layers: dict[str, Any]) -> Resolution:
    return Resolution([Layer.of(f"layer {i}", values) for i, values in enumerate(layers)], frames)


@pytest.mark.parametrize(
    ("frames", "given_", "flyback"),
    [
        (7 * 12, {"frames_per_trigger": 12}, 2),
        (7 * 10, {"frames_per_trigger": 10}, 0),
        (9 * 12, {"frames_per_trigger": 12}, 2),  # two rows before the scan
        (9 * 12, {"frames_per_trigger": 12, "start_offset": 24}, 2),
        (2 * 7 * 12, {"frames_per_trigger": 12}, 2),
        (None, {"frames_per_trigger": 12}, 2),
        (7 * 12, {"frames_per_trigger": 12, "flyback_frames_per_row": 2}, 2),
        (70, {"frames_per_trigger": 1}, 0),
        (3 * 70, {"frames_per_trigger": 70}, 0),  # a trigger for each pass
        (7 * 80, {"frames_per_trigger": 80}, 0),
        (70, {}, 0),
    ],
)
def test_flyback_of_a_line_trigger(frames: int | None, given_: dict[str, Any], flyback: int) -> None:
    resolution = triggered(frames, COMPLETE, given_)
    parameters = resolution.resolve()
    assert parameters.values["flyback_frames_per_row"] == flyback
    assert not resolution.notes
    if flyback and "flyback_frames_per_row" not in given_:
        assert parameters.sources["flyback_frames_per_row"] == (
            "derived from scan_shape and frames_per_trigger of the layer 1"
        )


@pytest.mark.parametrize(
    ("frames", "given_", "said"),
    [
        (4 * 70, {"frames_per_trigger": 4}, "for a position of its own"),
        (7 * 12, {"frames_per_trigger": 12, "flyback_frames_per_row": 3}, "10 positions and 3 frames of flyback"),
        (5 * 12, {"frames_per_trigger": 12}, r"\(5 triggers\), and each of the 7 rows"),
        (None, {"frames_per_trigger": 9}, "takes 9 frames for each trigger, and"),
    ],
)
def test_triggers_that_do_not_fit_are_noted(frames: int | None, given_: dict[str, Any], said: str) -> None:
    resolution = triggered(frames, COMPLETE, given_)
    assert len(resolution.notes) == 1
    assert re.search(said, resolution.notes[0])
    assert resolution.resolve().values["flyback_frames_per_row"] == given_.get("flyback_frames_per_row", 0)


@pytest.mark.parametrize(
    ("frames", "given_", "shape"),
    [
        (7 * 12, {"frames_per_trigger": 12}, (7, 12)),
        (7 * 12 + 5, {"frames_per_trigger": 12}, (7, 12)),
        (7 * 12, {"frames_per_trigger": 12, "start_offset": 12}, (6, 12)),
        (7 * 12, {"frames_per_trigger": 12, "flyback_frames_per_row": 2}, (7, 10)),
    ],
)
def test_scan_shape_of_a_line_trigger(frames: int, given_: dict[str, Any], shape: tuple[int, int]) -> None:
    resolution = triggered(frames, WITHOUT_SHAPE, given_)
    parameters = resolution.resolve()
    assert parameters.values["scan_shape"] == shape
    assert parameters.sources["scan_shape"] == (f"derived from frames_per_trigger of the layer 1 and {frames} frames")
    assert resolution.overlaid(Layer.of("control", {"rotation_deg": 5})).resolve().values["scan_shape"] == shape


@pytest.mark.parametrize(
    ("frames", "given_"),
    [
        (None, {"frames_per_trigger": 12}),
        (84, {"frames_per_trigger": 84}),
        (84, {"frames_per_trigger": 1}),
        (84, {"frames_per_trigger": 12, "flyback_frames_per_row": 12}),
        (1 << 40, {"frames_per_trigger": 2}),
        (84, {}),
    ],
)
def test_no_scan_shape_where_triggers_do_not_tell(frames: int | None, given_: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^missing: scan_shape"):
        triggered(frames, WITHOUT_SHAPE, given_).require()


def test_a_given_scan_shape_comes_before_that_of_the_triggers() -> None:
    parameters = triggered(84, {"frames_per_trigger": 12}, COMPLETE).resolve()
    assert parameters.values["scan_shape"] == (7, 10)
    assert parameters.sources["scan_shape"] == "layer 1"


def test_the_scan_of_the_settings() -> None:
    values = {**COMPLETE, "start_offset": -3, "row_starts": "time-gaps"}
    scan = resolved(values).setup((48, 50), np.dtype("u2"), 1).scan
    assert (scan.start_offset, scan.rows_by_time) == (-3, True)
    scan = resolved({**COMPLETE, "row_starts": "index"}).setup((48, 50), np.dtype("u2"), 1).scan
    assert (scan.start_offset, scan.rows_by_time) == (0, False)


def test_toml_round_trip_of_a_triggered_scan(tmp_path: Path) -> None:
    given_ = {"frames_per_trigger": 12, "start_offset": -2, "orientation": "flip-rows", "channel": "high-low"}
    parameters = triggered(84, COMPLETE, given_, {"row_starts": "time-gaps"}).resolve()
    assert round_trip(parameters, tmp_path).values == parameters.values


# what is refused


def test_one_error_names_everything_that_is_missing() -> None:
    with pytest.raises(ConfigurationError) as error:
        Resolution([Layer.of("flag", {"rotation_deg": 3})]).require()
    text = str(error.value)
    for key in ("scan_shape", "energy_kev", "scan_step_angstrom", "semiangle_mrad", "detector_pixel_mrad"):
        assert key in text
    assert "--scan-shape --energy-kev --scan-step-angstrom --semiangle-mrad --detector-pixel-mrad" in text


@pytest.mark.parametrize("key", ["scan_shape", "energy_kev", "scan_step_angstrom"])
def test_a_missing_key_is_named_alone(key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^missing: {key}; give"):
        Resolution([Layer.of("flag", {k: v for k, v in COMPLETE.items() if k != key})]).resolve()


@pytest.mark.parametrize(
    "values",
    [
        {"energy_kev": math.nan},
        {"energy_kev": math.inf},
        {"energy_kev": 0},
        {"energy_kev": -200},
        {"energy_kev": 200_000},
        {"energy_kev": "fast"},
        {"energy_kev": [200]},
        {"semiangle_mrad": 0},
        {"semiangle_mrad": 1e4},
        {"semiangle_mrad": math.nan},
        {"scan_step_angstrom": 0},
        {"scan_step_angstrom": (1, -1)},
        {"scan_step_angstrom": (1, math.nan)},
        {"scan_step_angstrom": (1, 2, 3)},
        {"scan_step_angstrom": "1,x"},
        {"scan_step_angstrom": {}},
        {"detector_pixel_mrad": 0},
        {"detector_pixel_mrad": math.inf},
        {"detector_pixel_inv_angstrom": -1},
        {"rotation_deg": math.nan},
        {"rotation_deg": 1e5},
        {"rolloff_mrad": -1},
        {"bf_centre_px": math.nan},
        {"bf_centre_px": "middle"},
        {"bf_radius_px": 0},
        {"scan_shape": "128"},
        {"scan_shape": "128x"},
        {"scan_shape": "-1x5"},
        {"scan_shape": "axb"},
        {"scan_shape": (0, 5)},
        {"scan_shape": (5,)},
        {"scan_shape": (5, 5, 5)},
        {"scan_shape": (5.5, 5)},
        {"scan_shape": (100_000, 5)},
        {"transpose": "perhaps"},
        {"serpentine": 7},
        {"flyback_frames_per_row": -1},
        {"flyback_frames_per_row": 0.5},
        {"flyback_frames_per_pass": -3},
        {"start_offset": 0.5},
        {"start_offset": "late"},
        {"frames_per_trigger": 0},
        {"row_starts": "time"},
        {"orientation": "upside-down"},
        {"orientation": 3},
        {"channel": 3},
        {"aberrations": {"C10": math.nan}},
        {"aberrations": {"C10": "x"}},
        {"aberrations": {"C99": 1}},
        {"aberrations": {"phi12": 1}},
        {"aberrations": [1, 2]},
        {"aberrations": "C10=5"},
        {"method": "wdd"},
        {"method": 3},
        {"pixel_mask": 3},
        {"unheard_of": 1},
    ],
)
def test_absurd_values_are_refused_with_source_and_key(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as error:
        Layer.of("config file a.toml", values)
    text = str(error.value)
    assert "\n" not in text
    if "method" not in values:
        assert text.startswith("config file a.toml: ")
    if "aberrations" not in values:
        wanted = "shape" if values.get("scan_shape") else next(iter(values))
        assert wanted in text


def test_a_single_number_is_no_scan_shape() -> None:
    with pytest.raises(ConfigurationError, match="scan_shape"):
        Layer.of("flag", {"scan_shape": 128})


def test_an_unknown_method_is_refused_with_its_source() -> None:
    with pytest.raises(ConfigurationError, match=r"config file a\.toml"):
        Layer.of("config file a.toml", {"method": "wdd"})


def test_unknown_keys() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown key 'energy'; known are scan_shape, energy_kev"):
        Layer.of("config file a.toml", {"energy": 200})
    layer = Layer.of(
        "stream", {"energy": 200, "detector": "toy", "energy_kev": 80, "rotation_deg": None}, ignore_unknown=True
    )
    assert layer.settings.given == {"energy_kev": 80}


@pytest.mark.parametrize(
    ("given_", "taken"),
    [
        ({"scan_shape": "128x64"}, (128, 64)),
        ({"scan_shape": " 128 X 64"}, (128, 64)),
        ({"scan_shape": "128×64"}, (128, 64)),
        ({"scan_shape": [128, 64]}, (128, 64)),
        ({"scan_shape": np.array([128, 64])}, (128, 64)),
        ({"scan_step_angstrom": 0.5}, (0.5, 0.5)),
        ({"scan_step_angstrom": "0.5"}, (0.5, 0.5)),
        ({"scan_step_angstrom": "0.5,0.25"}, (0.5, 0.25)),
        ({"scan_step_angstrom": [0.5]}, (0.5, 0.5)),
        ({"scan_step_angstrom": np.array([0.5, 0.25])}, (0.5, 0.25)),
        ({"bf_centre_px": "-3,4.5"}, (-3.0, 4.5)),
        ({"energy_kev": np.float32(80)}, 80.0),
        ({"energy_kev": "80"}, 80.0),
        ({"transpose": True}, True),
    ],
)
def test_ways_of_writing_values(given_: dict[str, Any], taken: Any) -> None:
    (value,) = Layer.of("flag", given_).settings.given.values()
    assert value == taken


def test_shapes_in_text() -> None:
    assert parse_shape("3x4") == (3, 4)
    for text in ("", "x", "3x4x5", "3,4", "3 4", "²x3"):
        with pytest.raises(ConfigurationError, match="ROWSxCOLUMNS"):
            parse_shape(text)


def test_rolloff_wider_than_the_aperture() -> None:
    with pytest.raises(ConfigurationError, match="rolloff_mrad"):
        resolved({**COMPLETE, "rolloff_mrad": 21}).setup((48, 50), np.dtype("u2"), 1)


def test_a_radius_that_contradicts_semiangle_and_pixel_is_noted() -> None:
    assert Resolution([Layer.of("flag", {**COMPLETE, "bf_radius_px": 10})]).notes


# TOML


def test_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "scan.toml"
    path.write_text(
        'scan_shape = "7x10"\nenergy_kev = 80\nscan_step_angstrom = [0.5, 0.25]\npixel_mask = "mask.npy"\n'
        "[aberrations]\nC10 = -100\nC12 = 20.5\nphi12 = 30\n"
    )
    layer = Layer.from_toml(path)
    assert layer.source == "config file scan.toml"
    assert layer.settings.given == {
        "scan_shape": (7, 10),
        "energy_kev": 80.0,
        "scan_step_angstrom": (0.5, 0.25),
        "pixel_mask": str(tmp_path / "mask.npy"),
        "aberrations": {"C10": -100.0, "C12": 20.5, "phi12": 30.0},
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"energy_kev = \n", "not a TOML file"),
        (b"\xff\xfe\x00", "not a TOML file"),
        (b"energy = 3\n", "config file bad.toml: unknown key 'energy'"),
        (b"energy_kev = 'x'\n", "config file bad.toml: energy_kev"),
        (b"[energy_kev]\nvalue = 3\n", "config file bad.toml: energy_kev"),
        (b"energy_kev = nan\n", "config file bad.toml: energy_kev"),
        (None, "cannot read the configuration file"),
    ],
)
def test_configuration_files_that_are_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=said):
        Layer.from_toml(path)


def test_a_folder_is_no_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        Layer.from_toml(tmp_path)


def round_trip(parameters: Parameters, folder: Path) -> Parameters:
    path = folder / "again.toml"
    path.write_text(parameters.as_toml(), encoding="utf-8")
    return Resolution([Layer.from_toml(path)]).resolve()


numbers = st.floats(1e-3, 50, allow_subnormal=False)


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    energy=st.floats(1, 5000),
    step=st.tuples(numbers, numbers),
    centre=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)),
    aberrations=st.dictionaries(st.sampled_from(["C10", "C12", "C30", "C45"]), st.floats(-1e9, 1e9)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    method=st.sampled_from(["ssb", "ssb-single"]),
    positions=st.none() | st.text(st.characters(exclude_categories=["C"]), min_size=1),
)
def test_toml_round_trip(
    tmp_path: Path,
    energy: float,
    step: tuple[float, float],
    centre: tuple[float, float],
    aberrations: dict[str, float],
    flags: tuple[bool, bool, bool],
    method: str,
    positions: str | None,
) -> None:
    parameters = resolved(
        {
            **COMPLETE,
            "energy_kev": energy,
            "scan_step_angstrom": step,
            "bf_centre_px": centre,
            "aberrations": aberrations,
            "transpose": flags[0],
            "serpentine": flags[1],
            "averaging": flags[2],
            "method": method,
            "positions": None if positions is None else str(tmp_path / positions),
        }
    )
    again = round_trip(parameters, tmp_path)
    assert again.values == parameters.values
    tomllib.loads(parameters.as_toml())


def test_toml_round_trip_of_measured_values(tmp_path: Path) -> None:
    without = {key: value for key, value in COMPLETE.items() if key != "bf_centre_px"}
    parameters = resolved(without, disk=disk(bad_pixels=np.zeros((48, 50), bool)))
    assert round_trip(parameters, tmp_path).values == parameters.values


def test_toml_round_trip_looks_for_bad_pixels_again(tmp_path: Path) -> None:
    without = {key: value for key, value in COMPLETE.items() if key != "bf_centre_px"}
    parameters = resolved(without, disk=disk())
    assert parameters.bad_pixels is not None
    path = tmp_path / "again.toml"
    path.write_text(parameters.as_toml())
    assert Resolution([Layer.from_toml(path)]).needs_disk


def test_toml_round_trip_of_odd_names(tmp_path: Path) -> None:
    name = str(tmp_path / 'a "b" \\ c\tå.npy')
    assert round_trip(resolved({**COMPLETE, "positions": name}), tmp_path).values["positions"] == name


def test_toml_in_another_folder_finds_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("mask.npy", np.ones((48, 50), bool))
    parameters = resolved({**COMPLETE, "pixel_mask": "mask.npy"})
    (tmp_path / "results").mkdir()
    again = round_trip(parameters, tmp_path / "results")
    assert again.setup((48, 50), np.dtype("u2"), 1).geometry.good.all()


def test_toml_names_the_sources() -> None:
    text = resolved({**COMPLETE, "energy_kev": 80}).as_toml()
    assert "energy_kev = 80.0  # layer 0" in text
    assert 'method = "ssb"  # default' in text


# files that settings point to


def test_pixel_masks(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((48, 50)) > 0.1
    np.save(tmp_path / "mask.npy", mask.astype(np.uint8))
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        file["pixel_mask"] = mask.astype(np.int32)
    for name in ("mask.npy", "mask.h5"):
        np.testing.assert_array_equal(load_pixel_mask(tmp_path / name), mask)
        parameters = resolved({**COMPLETE, "pixel_mask": str(tmp_path / name)})
        geometry = parameters.setup((48, 50), np.dtype("u2"), 1, np.ones((48, 50), bool)).geometry
        np.testing.assert_array_equal(geometry.good, mask)
    with pytest.raises(ConfigurationError, match=r"pixel mask .*48x50.* detector .*50x48"):
        parameters.setup((50, 48), np.dtype("u2"), 1)


def test_the_datas_own_mask_is_used_where_no_other_is_given() -> None:
    mask = np.ones((48, 50), bool)
    mask[7, 7] = False
    geometry = resolved(COMPLETE).setup((48, 50), np.dtype("u2"), 1, mask).geometry
    np.testing.assert_array_equal(geometry.good, mask)


def write_bad_file(path: Path, kind: str) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 4)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "group":
        with h5py.File(path, "w") as file:
            file.create_group("pixel_mask")
    elif kind == "nothing inside":
        h5py.File(path, "w").close()


BAD_MASKS = [
    ("a.npy", "missing"),
    ("a.npy", "noise"),
    ("a.npy", "folder"),
    ("a.npy", "pickle"),
    ("a.h5", "missing"),
    ("a.h5", "empty"),
    ("a.h5", "noise"),
    ("a.h5", "folder"),
    ("a.h5", "nothing inside"),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*BAD_MASKS, ("a.npy", "empty"), ("a.h5", "group")],
)
def test_pixel_masks_that_are_none(tmp_path: Path, name: str, kind: str) -> None:
    write_bad_file(tmp_path / name, kind)
    with pytest.raises(ConfigurationError, match="cannot read the pixel mask"):
        load_pixel_mask(tmp_path / name)


def test_a_mask_of_three_dimensions(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3, 4)))
    with pytest.raises(ConfigurationError, match="2 dimensions"):
        load_pixel_mask(tmp_path / "a.npy")


def test_position_tables(tmp_path: Path) -> None:
    table = np.argwhere(np.ones((7, 10)))[::-1]
    np.save(tmp_path / "a.npy", table.astype(np.int32))
    np.savetxt(tmp_path / "a.txt", table, fmt="%d", header="row column")
    for name in ("a.npy", "a.txt"):
        np.testing.assert_array_equal(load_positions(tmp_path / name), table)
        scan = resolved({**COMPLETE, "positions": str(tmp_path / name)}).setup((48, 50), np.dtype("u2"), 1).scan
        np.testing.assert_array_equal(scan.positions, table)
    (tmp_path / "one.txt").write_text("3 4\n")
    assert load_positions(tmp_path / "one.txt").shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.npy", "missing"),
        ("a.txt", "missing"),
        ("a.npy", "noise"),
        ("a.txt", "noise"),
        ("a.npy", "folder"),
        ("a.npy", "pickle"),
        ("a.npy", "empty"),
        ("a.txt", "empty"),
    ],
)
def test_position_tables_that_are_none(tmp_path: Path, name: str, kind: str) -> None:
    write_bad_file(tmp_path / name, kind)
    with pytest.raises(ConfigurationError, match="position table"):
        load_positions(tmp_path / name)


def test_position_tables_of_fractions(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0.5, 1.0]]))
    with pytest.raises(ConfigurationError, match="integers"):
        resolved({**COMPLETE, "positions": str(tmp_path / "a.npy")}).setup((48, 50), np.dtype("u2"), 1)
    (tmp_path / "a.txt").write_text("0.5 1.0\n")
    with pytest.raises(ConfigurationError, match="position table"):
        load_positions(tmp_path / "a.txt")
