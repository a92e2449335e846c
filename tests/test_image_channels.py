"""Image channels: exactly the images that the user asked for, unchanged by what is left out, and it is always said."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pytest

import stream
from detectors.errors import ConfigurationError
from detectors.messages import SeriesStart
from stream.array import choose_device
from stream.config import Layer, Settings
from stream.kernels import METHODS
from stream.optics import Aberrations, AxesRelation
from stream.parameters import Resolution
from stream.reconstruction import Reconstruction
from stream.result import describe_result
from stream.setup import MemoryPlan, Setup
from stream.snapshot import IMAGE_CHANNELS, IMAGE_UNITS, Snapshot, left_out_sentence
from tests.data_helpers import Case, feed, filled, pass_indices, running
from tests.live_helpers import SCAN, live_options, run_session, scan_file, serving, snapshot_where

CASE = Case(rotation=20.0, transpose=True, aberrations={"C10": -40.0}, masked=((5, 7),))
EVERY = frozenset(IMAGE_CHANNELS)
COMBINATIONS = [
    frozenset(names) for count in range(1, len(EVERY) + 1) for names in itertools.combinations(IMAGE_CHANNELS, count)
]


def images_of(channels: Iterable[str]) -> set[str]:
    return {image for channel in channels for image in IMAGE_CHANNELS[channel]}


def run(setup: Setup, lost: Iterable[int] = (3, 4, 40)) -> dict[str, np.ndarray]:
    """Every image that this set-up makes, of a scan that lost some frames."""
    gone = set(lost)
    with running(setup) as engine:
        feed(engine, CASE.counts(), [index for index in range(CASE.positions) if index not in gone])
        engine.finish()
        assert engine.counters.missing == len(gone)
        return engine.images()


@pytest.fixture(scope="module")
def everything() -> dict[str, np.ndarray]:
    return run(CASE.setup())


def test_every_image_belongs_to_one_channel() -> None:
    assert sorted(image for images in IMAGE_CHANNELS.values() for image in images) == sorted(IMAGE_UNITS)
    assert CASE.setup().image_names == tuple(IMAGE_UNITS), "by default everything is made"
    assert CASE.setup().left_out == ()


# the engine


@pytest.mark.parametrize("channels", COMBINATIONS, ids=lambda names: ",".join(sorted(names)))
def test_exactly_these_images_and_unchanged(channels: frozenset[str], everything: dict[str, np.ndarray]) -> None:
    setup = CASE.setup(channels=channels)
    answer = run(setup)
    assert answer.keys() == images_of(channels) == set(setup.image_names)
    assert setup.left_out == tuple(name for name in IMAGE_CHANNELS if name not in channels)
    for name, image in answer.items():
        if name in ("phase", "amplitude"):
            np.testing.assert_allclose(image, everything[name], rtol=0, atol=1e-7)
        else:
            np.testing.assert_array_equal(image, everything[name])


def test_what_is_left_out_cannot_be_had_by_asking() -> None:
    with running(CASE.setup(channels=frozenset({"bf", "com"}))) as engine:
        feed(engine, CASE.counts())
        assert engine.images(["phase", "mean_pattern", "com_row"]).keys() == {"com_row"}
        assert engine.view().images.keys() == {"bright_field", "com_row", "com_column"}
        with pytest.raises(ConfigurationError, match=r"no object.*left out: phase, df, pattern \(--channels bf,com\)"):
            engine.object()


def test_without_the_phase_there_are_no_kernels_and_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel table was made")

    whole = MemoryPlan.of(CASE.setup(passes=None))
    monkeypatch.setattr(Setup, "make_kernels", refuse)
    setup = CASE.setup(passes=None, channels=EVERY - {"phase"})
    plan = MemoryPlan.of(setup)
    assert (plan.ring, plan.kernels, plan.contracted) == (0, 0, 0)
    assert 0 < plan.work < whole.work
    assert plan.open_rows == whole.open_rows
    with running(setup) as engine:
        feed(engine, CASE.counts())
        engine.change(replace(CASE.probe, aberrations=Aberrations.from_user({"C10": 50.0})), METHODS["ssb-single"])
        assert engine._ring._counts.nbytes == 0
        assert engine.setup.method is METHODS["ssb-single"], "what was changed is remembered"


@pytest.mark.parametrize("averaging", [False, True])
def test_passes_and_reset_without_the_phase(averaging: bool) -> None:
    """Three passes with lost frames, the second one twice as bright; then a reset and half a pass."""
    counts = CASE.counts()
    setups = [CASE.setup(passes=None, averaging=averaging, channels=names) for names in (EVERY, EVERY - {"phase"})]
    with running(setups[0]) as whole, running(setups[1]) as virtual:
        for engine in (whole, virtual):
            for number, bright in enumerate((counts, 2 * counts, counts)):
                feed(engine, bright, np.delete(pass_indices(CASE, number), [5 + number, 20]))
        for engine in (whole, virtual):
            assert engine.images()["bright_field"][0, 0] > 0
        _assert_same(virtual.images(), whole.images(), images_of(EVERY - {"phase"}))
        assert virtual.counters == whole.counters
        for engine in (whole, virtual):
            engine.reset()
            assert not engine.view().images
            feed(engine, counts, pass_indices(CASE, 3)[: CASE.positions // 2])
        _assert_same(virtual.images(), whole.images(), images_of(EVERY - {"phase"}))
        assert np.isnan(virtual.images()["dark_field"][-1]).all()


def _assert_same(answer: dict[str, np.ndarray], expected: dict[str, np.ndarray], names: set[str]) -> None:
    assert answer.keys() == names
    for name in names:
        np.testing.assert_array_equal(answer[name], expected[name])


def test_new_axes_turn_the_centre_of_mass_without_the_phase() -> None:
    turned = replace(CASE.probe, axes=AxesRelation(np.deg2rad(-65.0), False))
    setup = CASE.setup(channels=frozenset({"com"}))
    with running(setup) as engine, running(replace(setup, probe=turned)) as fresh:
        for each in (engine, fresh):
            feed(each, CASE.counts())
        assert not np.allclose(engine.images()["com_row"], fresh.images()["com_row"])
        engine.change(turned, METHODS["ssb"])
        _assert_same(engine.images(), fresh.images(), {"com_row", "com_column"})


def test_the_object_does_not_depend_on_what_is_left_out() -> None:
    """Against brute force: the mean intensity needs the counts outside the disk, though no dark field is made."""
    held = np.ones(CASE.scan, bool)
    held[2, 3:6] = False
    with running(CASE.setup(channels=frozenset({"phase"}))) as engine:
        feed(engine, CASE.counts(), np.flatnonzero(held.ravel()))
        expected = CASE.true_object(filled(CASE.counts(), held))
        np.testing.assert_allclose(engine.object(), expected, atol=2e-6)


# the setting


@pytest.mark.parametrize("value", ["phase,bf", " bf, phase ", ["phase", "bf"], ("bf", "phase")])
def test_ways_to_write_channels(value: Any) -> None:
    assert Layer.of("flag", {"channels": value}).settings.channels == ("phase", "bf")


@pytest.mark.parametrize("value", ["", "phase,", "phase,phase", "threshold_1", "Phase", [], ["bf", "bf"], [3], 7, True])
def test_channels_that_cannot_be_meant(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^flag: channels .*phase, bf, df, com, pattern.* got .*threshold"):
        Layer.of("flag", {"channels": value})


def test_channels_have_a_source_and_are_repeatable(tmp_path: Path) -> None:
    settings = {**CASE.settings, "bf_radius_px": 4.63}
    (tmp_path / "scan.toml").write_text('channels = ["bf", "phase"]\n')
    layers = [
        Layer.of("flag", {"channels": "df,com"}),
        Layer.from_toml(tmp_path / "scan.toml"),
        Layer.of("file", settings),
    ]
    resolution = Resolution(layers)
    assert resolution.notes == ["channels is phase,bf in the config file scan.toml; df,com from the flag is used"]
    parameters = resolution.resolve()
    assert parameters.sources["channels"] == "flag"
    assert parameters.setup(CASE.detector, np.dtype("u2"), 1).channels == {"df", "com"}
    (tmp_path / "again.toml").write_text(parameters.as_toml())
    assert Layer.from_toml(tmp_path / "again.toml").settings.channels == ("df", "com")
    assert Resolution(layers[2:]).resolve().values["channels"] == tuple(IMAGE_CHANNELS)


def test_a_stream_does_not_choose_what_the_user_gets() -> None:
    settings = {**CASE.settings, "bf_radius_px": 5.0, "channels": "nonsense"}
    start = SeriesStart("s", CASE.detector, np.dtype("<u2"), CASE.scan, CASE.positions, settings)
    run = Reconstruction(start, [], choose_device("cpu"), source="test")
    try:
        assert run.prepare().setup.channels == EVERY
    finally:
        run.close()


# result, snapshot, session


def reconstruct(folder: Path, channels: str, **settings: Any) -> stream.Result:
    path = folder / "scan.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            file["data"] = CASE.counts()
            file["pixel_mask"] = CASE.good.astype(np.uint8)
    values = {key: value for key, value in CASE.settings.items() if key != "scan_shape"}
    values["pixel_mask"] = str(path)
    return stream.reconstruct(path, dataset="data", device="cpu", channels=channels, **values, **settings)


@pytest.mark.parametrize(
    ("channels", "default", "datasets"),
    [
        ("phase,bf", "phase", {"object", "phase", "amplitude", "virtual"}),
        ("df", "dark_field", {"virtual"}),
        ("com,pattern", "com", {"com", "mean_pattern"}),
        ("pattern", "mean_pattern", {"mean_pattern"}),
    ],
)
def test_result_file_holds_what_was_made_and_says_what_not(
    channels: str, default: str, datasets: set[str], tmp_path: Path
) -> None:
    result = reconstruct(tmp_path, channels)
    assert result.images.keys() == images_of(channels.split(","))
    assert ",".join(result.channels) == channels
    assert set(result.channels_left_out) == EVERY - set(result.channels)
    result.save(tmp_path / "result.h5")
    with h5py.File(tmp_path / "result.h5") as file:
        assert file.keys() - {"axes", "pixel_mask", "positions_received", "reconstruction"} == datasets
        entry = file["reconstruction"]
        assert entry.attrs["default"] == default
        signal = entry[default][entry[default].attrs["signal"]]
        assert signal.shape[-2:] == (CASE.detector if default == "mean_pattern" else CASE.scan)
        assert list(file.attrs["channels"]) == channels.split(",")
        assert file.attrs["channels_left_out"] == ",".join(result.channels_left_out)
        configuration = str(file.attrs["configuration"])
        if "virtual" in file:
            assert {f"virtual/{name}" for name in file["virtual"]} <= {"virtual/bright_field", "virtual/dark_field"}
    assert dict(describe_result(tmp_path / "result.h5"))["images"] == left_out_sentence(result.channels_left_out)
    (tmp_path / "again.toml").write_text(configuration)
    again = stream.reconstruct(tmp_path / "scan.h5", dataset="data", device="cpu", config=tmp_path / "again.toml")
    _assert_same(dict(again.images), dict(result.images), set(result.images))


def test_a_result_without_the_phase_says_so(tmp_path: Path) -> None:
    result = reconstruct(tmp_path, "bf")
    assert result.object is None
    with pytest.raises(ConfigurationError, match=r"no phase; left out: phase, df, com, pattern \(--channels bf\)"):
        _ = result.phase


def test_hot_pixels_are_still_found_in_the_first_frames(tmp_path: Path) -> None:
    path = scan_file(tmp_path / "scan.h5")
    with h5py.File(path, "r+") as file:
        name = next(name for name, item in file.items() if isinstance(item, h5py.Dataset) and item.ndim == 4)
        file[name][:, :, 2, 3] = 60000
    channels = {"device": "cpu", "channels": "phase,bf"}
    result = stream.reconstruct(path, find_bad_pixels=True, **channels)
    assert not result.setup.geometry.good[2, 3]


def test_snapshot_carries_what_is_left_out() -> None:
    sent = Snapshot("s", 1, 2.0, "scanning", left_out=("df", "com"))
    assert Snapshot.unpack(sent.pack()).left_out == ("df", "com")
    message = msgpack.unpackb(sent.pack())
    assert message["left_out"] == ["df", "com"]
    del message["left_out"]
    assert Snapshot.unpack(msgpack.packb(message)).left_out == (), "of a session that leaves out nothing"


def test_the_sentence() -> None:
    assert left_out_sentence(("df", "com", "pattern")) == "left out: df, com, pattern (--channels phase,bf)"
    assert left_out_sentence(()) == ""


async def test_a_session_without_the_phase(tmp_path: Path) -> None:
    layers = [Layer.of("flag", {"channels": "bf,df"})]
    async with serving() as (address, _):
        options = live_options(address, layers=layers, output=tmp_path / "r.h5", record=tmp_path / "rec.h5")
        session, snapshots = await run_session(options)
    last = snapshots[-1]
    assert last.state == "finished"
    assert last.left_out == ("phase", "com", "pattern")
    assert last.images.keys() == {"bright_field", "dark_field"}
    assert last.rows_acquired == SCAN.scan_shape[0]
    assert session.result is not None
    assert session.result.object is None
    # The recording holds everything: from it the rest can be had later.
    whole = stream.reconstruct(tmp_path / "rec.h5", device="cpu")
    assert whole.channels_left_out == ()
    np.testing.assert_array_equal(last.images["bright_field"], whole.images["bright_field"])
    with h5py.File(tmp_path / "r.h5") as file:
        np.testing.assert_array_equal(file["virtual/dark_field"], whole.images["dark_field"])
        assert "object" not in file


async def test_optics_are_changed_without_the_phase() -> None:
    options = Settings(channels="com").given
    async with (
        serving(rate=1000.0) as (address, _),
        stream.open_session(address, device="cpu", timeout_s=20, linger_s=20, **options) as session,
    ):
        await snapshot_where(session, lambda snapshot: snapshot.rows_acquired > 1)
        await session.change(rotation_deg=-40.0, aberrations={"C10": 30.0}, method="ssb-single")
        shown = await snapshot_where(session, lambda snapshot: snapshot.rotation_deg == -40.0)
        assert shown.method == "ssb-single"
        assert shown.images.keys() == {"com_row", "com_column"}
