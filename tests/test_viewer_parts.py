"""The viewer's parts that need no Qt: contrast, scales, rendering, geometry, spectrum, checks, sockets, saving."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
import pytest
import zmq

from detectors.errors import ConfigurationError, ConnectionFailed, DataFileError, ProtocolError
from stream.snapshot import Snapshot
from tests.viewer_support import publisher, responder, snapshot, wait_for
from viewer import geometry, render
from viewer.checks import checked
from viewer.contrast import (
    SCALES,
    LinearScale,
    LockedContrast,
    LogScale,
    PeakContrast,
    RobustContrast,
    SymmetricContrast,
    round_down_125,
    round_up_125,
)
from viewer.keys import KEYS, help_html
from viewer.link import ControlClient, SnapshotLink, control_host, normalized
from viewer.model import Model, Presence
from viewer.save import save_pair
from viewer.spectrum import power_spectrum
from viewer.text import length_text, rate_text, value_text


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as context:
        yield context


# Contrast and colours


def test_contrast_looks_at_acquired_positions_only() -> None:
    image = np.full((100, 100), np.nan, dtype=np.float32)
    image[:10] = np.linspace(1, 2, 1000).reshape(10, 100)
    low, high = RobustContrast(0, 100).limits(image) or (0, 0)
    assert (low, high) == pytest.approx((1, 2))


def test_robust_contrast_ignores_a_few_hot_pixels() -> None:
    image = np.random.default_rng(0).random((300, 300)).astype(np.float32)
    image[5, 5] = 1e6
    assert (RobustContrast().limits(image) or (0, 0))[1] < 1.01


@pytest.mark.parametrize("policy", [RobustContrast(), SymmetricContrast()])
def test_nothing_acquired_has_no_limits(policy: RobustContrast | SymmetricContrast) -> None:
    assert policy.limits(np.full((4, 4), np.nan, dtype=np.float32)) is None


@pytest.mark.parametrize("value", [0.0, 7.5, -1e9, 1e-20])
@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.name)
def test_a_flat_image_can_be_drawn(value: float, scale: Any) -> None:
    image = np.full((4, 4), value, dtype=np.float32)
    limits = scale.clip(RobustContrast().limits(image))
    assert limits[0] < limits[1]
    pixels = render.colored(image, limits, scale, render.lookup(np.zeros((256, 3), np.uint8)))
    assert (pixels[..., 3] == 255).all()


def test_peak_contrast_never_misses_the_peak() -> None:
    image = np.zeros((1000, 1000), dtype=np.float32)
    image[500, 501], image[0, 0] = 7, np.nan
    assert PeakContrast().limits(image) == (0, 7)


def test_locked_and_symmetric_contrast() -> None:
    image = np.array([[-1.0, 5.0]], dtype=np.float32)
    assert LockedContrast((0, 3)).limits(image) == (0, 3)
    assert SymmetricContrast(100).limits(image) == (-5, 5)


def test_colors_span_the_limits_and_holes_are_transparent() -> None:
    gray = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    image = np.array([[-9.0, 0.0, 1.0, 9.0, np.nan, np.inf]], dtype=np.float32)
    pixels = render.colored(image, (0.0, 1.0), LinearScale(), render.lookup(gray))
    assert pixels[0, :4, 0].tolist() == [0, 0, 255, 255]
    assert pixels[0, :, 3].tolist() == [255, 255, 255, 255, 0, 0]


def test_log_scale_shows_zero_as_the_lowest_value() -> None:
    image = np.array([[0.0, 1.0, 100.0]], dtype=np.float32)
    limits = LogScale().clip((0.0, 100.0))
    assert limits == pytest.approx((1e-3, 100))
    assert LogScale().ticks(limits, 9) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10, 100])
    pixels = render.colored(image, limits, LogScale(), render.lookup(np.arange(768, dtype=np.uint8).reshape(256, 3)))
    assert (pixels[..., 3] == 255).all()


def test_color_wheel_is_dark_in_the_middle_and_turns_with_the_direction() -> None:
    row, column = np.array([[0.0, 1.0, 0.0, np.nan]]), np.array([[0.0, 0.0, 1.0, 0.0]])
    pixels = render.color_wheel(row, column, 1.0)
    assert pixels[0, 0, :3].tolist() == [0, 0, 0]
    assert pixels[0, 1, :3].tolist() != pixels[0, 2, :3].tolist()
    assert pixels[0, :, 3].tolist() == [255, 255, 255, 0]


# Numbers and planes


@pytest.mark.parametrize(
    ("value", "down", "up"), [(0.3, 0.2, 0.5), (1, 1, 1), (4.99, 2, 5), (5, 5, 5), (730, 500, 1000)]
)
def test_steps_are_one_two_five(value: float, down: float, up: float) -> None:
    assert round_down_125(value) == pytest.approx(down)
    assert round_up_125(value) == pytest.approx(up)


def test_lengths_and_values_carry_units() -> None:
    assert [length_text(x, "Å") for x in (0.5, 5, 10, 200, 10000)] == ["0.5 Å", "5 Å", "1 nm", "20 nm", "1 µm"]
    assert length_text(20, "mrad") == "20 mrad"
    assert value_text(-0.12345, "rad") == "−0.1235 rad"
    assert value_text(math.nan, "rad") == "not acquired"
    assert rate_text(7512.3, "frames/s") == "7,512 frames/s"


def test_the_disk_is_the_middle_of_the_pattern_plane() -> None:
    plane = geometry.pattern_plane(snapshot(), (32, 32))
    assert plane.point(15.5, 16.5) == pytest.approx((0, 0))
    assert geometry.bf_circle(snapshot()) == pytest.approx((20, 20))
    assert plane.pixel(0.5, 0.5) == (16, 17)
    assert plane.pixel(1e4, 0) is None


def test_spectrum_finds_a_lattice_frequency_and_the_cutoff_is_two_alpha_over_lambda() -> None:
    step, period = 0.2, 1.6
    y, _ = np.mgrid[:64, :48] * step
    phase = np.cos(2 * np.pi * y / period).astype(np.float32)
    phase[50:] = np.nan
    power = power_spectrum(phase)
    assert power is not None
    plane = geometry.spectrum_plane(snapshot(scan_step_angstrom=(step, step)), phase.shape)
    row, column = np.unravel_index(int(power.argmax()), power.shape)
    x, y_ = plane.point(int(row), int(column))
    assert (abs(x), abs(y_)) == pytest.approx((0, 1 / period), abs=1e-9)
    assert geometry.cutoff(snapshot()) == pytest.approx(2 * 0.02 / 0.0250793374)
    assert power_spectrum(np.full((8, 8), np.nan)) is None


@pytest.mark.parametrize("shape", [(8, 8), (8, 9), (9, 8), (7, 5)])
def test_spectrum_is_the_plain_one_of_a_whole_image(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    window = np.hanning(shape[0] + 2)[1:-1, None] * np.hanning(shape[1] + 2)[1:-1]
    expected = np.abs(np.fft.fftshift(np.fft.fft2((image - image.mean()) * window))) ** 2 / image.size**2
    np.testing.assert_allclose(power_spectrum(image), expected, rtol=1e-3, atol=1e-7)


# Snapshots from the network


@pytest.mark.parametrize(
    "change",
    [
        {"state": "dancing"},
        {"scan_shape": "ab"},
        {"scan_shape": (0, 5)},
        {"scan_shape": (5, 1e9)},
        {"scan_step_angstrom": (0.0, 1.0)},
        {"energy_kev": math.nan},
        {"bf_radius_px": -3.0},
        {"bf_centre_px": (1.0, 2.0, 3.0)},
        {"aberrations": {"C10": "much"}},
        {"frames_per_s": None},
        {"message": 5},
        {"control_port": 1 << 20},
        {"left_out": None},
        {"left_out": ("df", 5)},
        {"images": {"phase": np.zeros(5, dtype=np.float32)}},
        {"images": {"phase": np.zeros((0, 5), dtype=np.float32)}},
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="damaged"):
        checked(snapshot(**change))


def test_a_sound_snapshot_passes_even_when_almost_nothing_is_known() -> None:
    assert checked(Snapshot.unpack(snapshot().pack())).images["phase"].shape == (48, 64)
    checked(Snapshot(session="s", sequence=0, time_s=0.0, state="waiting"))


def test_link_receives_the_newest_and_counts_the_damaged(context: zmq.Context[Any]) -> None:
    with publisher() as (socket, address):
        link = SnapshotLink(address, context)
        sequence = 0

        def heard() -> Snapshot | None:
            nonlocal sequence
            sequence += 1
            socket.send(snapshot(sequence).pack())
            return link.poll()

        wait_for(heard, "the first snapshot")
        last = sequence + 5
        for n in range(sequence + 1, last + 1):
            socket.send(snapshot(n).pack())
        newest: list[int] = []

        def caught_up() -> bool:
            if received := link.poll():
                newest.append(received.sequence)
            return newest[-1:] == [last]

        wait_for(caught_up, "the newest snapshot")
        assert link.damaged == 0
        for bad in (b"", b"\xc1 nonsense", msgpack.packb([1]), msgpack.packb({"type": "snapshot", "version": 99})):
            before = link.damaged
            socket.send(bad)
            wait_for(lambda before=before: link.poll() is not None or link.damaged > before, "a damaged snapshot")
        assert link.damaged == 4
        assert link.damage
        link.close()


@pytest.mark.parametrize("address", ["", "tcp://", "nonsense", "tcp://host", "tcp://host:99999", "http://host:80"])
def test_an_unusable_address_is_a_sentence(address: str) -> None:
    with pytest.raises(ConfigurationError, match="expected an address"):
        normalized(address)


def test_addresses(context: zmq.Context[Any]) -> None:
    assert normalized("scope:31010") == "tcp://scope:31010"
    assert control_host("tcp://scope:31010") == "scope"
    assert control_host("tcp://[::1]:31010") == "[::1]"
    assert control_host("ipc:///tmp/x") == "127.0.0.1"
    with pytest.raises(ConnectionFailed, match="cannot use"):
        SnapshotLink("carrier-pigeon://home", context)


# Control


def test_requests_are_sent_and_answered_in_order(context: zmq.Context[Any]) -> None:
    with responder() as session:
        client = ControlClient("127.0.0.1", context)
        client.use_port(session.port)
        client.request("rotation", rotation_deg=3.0, transpose=True)
        client.request("reset")
        answers: list[Any] = []

        def both() -> bool:
            answers.extend(client.poll())
            session.serve()
            return len(answers) == 2

        wait_for(both, "two answers")
        rotation = {"command": "rotation", "rotation_deg": 3.0, "transpose": True}
        assert session.requests == [rotation, {"command": "reset"}]
        assert all(answer.ok for answer in answers)
        session.reply = {"ok": False, "error": "not now"}
        client.request("stop")
        answers.clear()
        wait_for(lambda: session.serve() or (answers.extend(client.poll()) or answers), "a refusal")
        wait_for(lambda: answers.extend(client.poll()) or answers, "a refusal")
        assert (answers[0].ok, answers[0].error) == (False, "not now")
        client.close()


def test_a_dead_session_costs_a_timeout_and_never_hears_the_request(context: zmq.Context[Any]) -> None:
    now = [0.0]
    with responder() as session:
        port = session.port
    client = ControlClient("127.0.0.1", context, timeout_s=3, clock=lambda: now[0])
    client.use_port(port)
    client.request("reset")
    assert client.poll() == []
    now[0] = 3.1
    (answer,) = client.poll()
    assert not answer.ok
    assert "no answer" in answer.error
    assert client.poll() == []
    client.close()


def test_a_newer_request_replaces_an_unsent_one_and_another_session_gets_none(context: zmq.Context[Any]) -> None:
    client = ControlClient("127.0.0.1", context)
    client.use_port(1)
    for c10 in (1.0, 2.0):
        client.request("aberrations", values={"C10": c10})
    client.use_port(2)
    assert [answer.command for answer in client.poll()] == ["aberrations"]
    with pytest.raises(ValueError, match="takes"):
        client.request("reset", really=True)
    client.use_port(None)
    client.request("stop")
    assert "takes no control requests" in client.poll()[0].error
    client.close()


# Model


def test_presence_and_notices() -> None:
    now = [0.0]
    model = Model("tcp://here:1", clock=lambda: now[0])
    assert model.presence is Presence.NEVER
    assert model.notice() == "no session at tcp://here:1: waiting"
    assert model.accept(snapshot(1))
    assert not model.accept(snapshot(2))
    assert (model.presence, model.notice()) == (Presence.LIVE, "")
    now[0] = 2.6
    assert model.presence is Presence.GONE
    assert "no session at tcp://here:1: waiting" in model.notice()
    assert model.accept(snapshot(1, session="second"))
    assert model.accept(snapshot(2, session="second", shape=(8, 8), rows=3))
    assert model.presence is Presence.LIVE
    model.accept(snapshot(3, images={}, state="waiting", message="waiting for the detector"))
    assert model.notice() == "waiting for the detector"


def test_freezing_holds_what_is_shown() -> None:
    model = Model("a")
    assert not model.toggle_freeze()
    model.accept(first := snapshot(1))
    assert model.toggle_freeze()
    model.accept(second := snapshot(2))
    assert (model.shown, model.newest) == (first, second)
    assert not model.toggle_freeze()
    assert model.shown is second


# Saving and keys


def test_saving_keeps_every_array_and_field_and_overwrites_nothing(tmp_path: Path) -> None:
    shown = snapshot()
    pairs = [save_pair(tmp_path, shown, lambda path: bool(path.write_bytes(b"png"))) for _ in range(3)]
    assert len({path for pair in pairs for path in pair}) == 6
    assert all(path.exists() for pair in pairs for path in pair)
    with h5py.File(pairs[0][1]) as file:
        np.testing.assert_array_equal(file["phase"], shown.images["phase"])
        assert file["phase"].attrs["unit"] == "rad"
        assert set(file) == set(shown.images)
        assert file.attrs["scan_step_angstrom"].tolist() == [0.2, 0.2]
        assert json.loads(file.attrs["aberrations"]) == {"C10": -100.0, "C30": 1e5}
        assert json.loads(file.attrs["counters"])["received"] == 1000


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataFileError, match="cannot save"):
        save_pair(tmp_path / "file", snapshot(), lambda path: True)


def test_keys_are_bound_once_and_help_lists_each() -> None:
    all_keys = [one for key in KEYS for one in key.keys]
    assert len(all_keys) == len(set(all_keys))
    assert all(key.text in help_html() for key in KEYS)
