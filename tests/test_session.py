"""Live sessions: the same image as offline, whatever happens on the way; every mistake a sentence; nothing hangs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

import stream.acquisition as acquisition_module
import stream.reconstruction as reconstruction_module
import stream.session as session_module
from detectors.codec import encode
from detectors.errors import ConfigurationError, ConnectionFailed, DataFileError, DoesNotFit
from detectors.messages import Encoding
from detectors.simulator.misbehaviour import Misbehaviour
from detectors.simulator.simulation import SimulatedScan
from stream.api import Result, Session, open_session
from stream.config import Layer
from stream.recording import Recorder, open_recording
from stream.setup import Setup
from tests.live_helpers import (
    ANY_PORT,
    COLUMNS,
    FRAMES,
    OPTICS_AND_DISK,
    PATIENCE_S,
    ROWS,
    SCAN,
    PlainSender,
    Send,
    all_frames,
    assert_same_object,
    live_options,
    offline,
    patiently,
    plainly,
    run_session,
    scan_file,
    serving,
    snapshot_where,
)

DISK = [Layer.of("flag", {"bf_centre_px": SCAN.centre_px, "bf_radius_px": 10.0})]


@pytest.fixture(scope="module")
def patterns() -> np.ndarray:
    """Every pattern of ``SCAN``."""
    return all_frames()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """``SCAN`` reconstructed from a file."""
    return offline(scan_file(tmp_path_factory.mktemp("scan") / "scan.h5"))


@pytest.fixture(scope="module")
def expected_given_disk(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """``SCAN`` reconstructed from a file, with the disk that plain senders announce."""
    return offline(scan_file(tmp_path_factory.mktemp("scan") / "scan.h5"), layers=DISK)


async def sent_plainly(send: Send, **options: Any) -> Session:
    """A session on a plain sender, run to its end."""
    async with plainly(send) as endpoint:
        session, _ = await run_session(live_options(endpoint, **options))
    return session


# live is offline


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4])
async def test_live_is_offline(encoding: Encoding, expected: Result) -> None:
    async with serving(encoding=encoding) as (endpoint, sending):
        session, snapshots = await run_session(live_options(endpoint))
        await patiently(sending)
    result = session.result
    assert result is not None
    assert_same_object(result, expected)
    for name, image in expected.images.items():
        np.testing.assert_allclose(result.images[name], image, rtol=1e-5, atol=1e-5, err_msg=name)
    assert result.positions_received.all()
    assert result.counters.as_dict() == expected.counters.as_dict()
    assert session.incomplete == ""
    assert snapshots[-1].state == "finished"
    assert snapshots[-1].rows_acquired == ROWS
    np.testing.assert_array_equal(snapshots[-1].images["phase"], result.phase)


@pytest.mark.parametrize("frames_per_message", [1, 7, FRAMES])
async def test_the_size_of_the_messages_does_not_matter(frames_per_message: int, expected: Result) -> None:
    async with serving(frames_per_message=frames_per_message) as (endpoint, _):
        session, _ = await run_session(live_options(endpoint))
    assert session.result is not None
    assert_same_object(session.result, expected)


@pytest.mark.parametrize("order", ["shuffled", "backwards", "doubled", "columns first"])
async def test_the_order_of_the_frames_does_not_matter(
    order: str, patterns: np.ndarray, expected_given_disk: Result
) -> None:
    indices = {
        "shuffled": np.random.default_rng(1).permutation(FRAMES),
        "backwards": np.arange(FRAMES)[::-1],
        "doubled": np.repeat(np.arange(FRAMES), 2),
        "columns first": np.arange(FRAMES).reshape(ROWS, COLUMNS).T.ravel(),
    }[order]

    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.scan(patterns, indices)
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    assert_same_object(result, expected_given_disk)
    assert result.counters.received == len(indices)
    assert result.counters.duplicate == len(indices) - FRAMES
    assert result.counters.missing == result.counters.late == 0


async def test_a_large_shuffled_scan(tmp_path: Path) -> None:
    scan = SimulatedScan(scan_shape=(48, 64), detector_shape=(16, 16), detector_pixel_mrad=(4.0, 4.0), seed=2)
    reference = offline(scan_file(tmp_path / "scan.h5", scan))
    disk = {key: list(reference.parameters.values[key]) for key in ("bf_centre_px",)}
    patterns = all_frames(scan)

    async def send(sender: PlainSender) -> None:
        settings = {**scan.start(1).settings, **disk, "bf_radius_px": reference.parameters.values["bf_radius_px"]}
        await sender.start(scan_shape=[48, 64], detector_shape=[16, 16], frames=48 * 64, **settings)
        await sender.scan(patterns, np.random.default_rng(3).permutation(48 * 64))
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    assert_same_object(result, reference)
    assert result.counters.missing == result.counters.duplicate == result.counters.late == 0


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "float32"])
@pytest.mark.parametrize("encoding", ["raw", "bslz4"])
async def test_every_pixel_type(dtype: str, encoding: str, patterns: np.ndarray, expected_given_disk: Result) -> None:
    frames = patterns.astype(dtype)
    assert (frames == patterns).all()
    payloads = [encode(frame, Encoding[encoding.upper()]) for frame in frames]

    async def send(sender: PlainSender) -> None:
        await sender.start(dtype=dtype)
        for first in range(0, FRAMES, 32):
            await sender.frames(payloads[first : first + 32], first, encoding=encoding)
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    assert_same_object(result, expected_given_disk)


@pytest.mark.parametrize("shape", [(1, FRAMES), (FRAMES, 1), (2, FRAMES // 2), (1, 1)])
async def test_scans_of_one_row_or_column(shape: tuple[int, int], patterns: np.ndarray) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start(scan_shape=list(shape), frames=math.prod(shape))
        await sender.scan(patterns, range(math.prod(shape)))
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    assert result.object.shape == shape
    assert np.isfinite(result.object).all()
    assert result.positions_received.all()


# what goes wrong on the way


async def test_misbehaviour_is_counted_and_survived(tmp_path: Path) -> None:
    wrong = Misbehaviour(drop=0.08, duplicate=0.07, reorder=0.2, corrupt=0.06, seed=4)
    path = tmp_path / "recording.h5"
    async with serving(misbehaviour=wrong, frames_per_message=3) as (endpoint, sending):
        session, _ = await run_session(live_options(endpoint, record=path))
        done = (await patiently(sending)).misbehaviour
    result = session.result
    assert result is not None
    counters = result.counters
    assert counters.received == done.sent
    assert counters.duplicate == done.duplicated
    assert counters.undecodable == done.corrupted
    assert counters.missing == done.dropped + done.corrupted
    assert counters.late == counters.outside == 0
    assert np.count_nonzero(~result.positions_received) == counters.missing
    assert min(done.dropped, done.duplicated, done.reordered, done.corrupted) > 0
    again = offline(path)
    assert_same_object(result, again)
    assert again.counters.as_dict() == counters.as_dict()
    with open_recording(path) as recording:
        assert recording.frames == done.sent
        assert recording.damaged_frames == done.corrupted
        assert recording.complete


@pytest.mark.parametrize("pattern", ["pull", "sub"])
async def test_a_detector_that_dies_leaves_an_incomplete_series(pattern: str, tmp_path: Path) -> None:
    wrong, kind = Misbehaviour(stop_after=100), "pub" if pattern == "sub" else "push"
    async with serving(misbehaviour=wrong, pattern=kind) as (endpoint, _):
        session, snapshots = await run_session(
            live_options(endpoint, pattern=pattern, series_timeout_s=0.6, output=tmp_path / "r.h5")
        )
    assert "nothing came for 0.6 s, and no end message" in session.incomplete
    assert snapshots[-1].state == "finished"
    result = session.result
    assert result is not None
    assert result.counters.received == 100
    assert np.count_nonzero(result.positions_received) == 100
    assert np.isfinite(result.object).all()
    assert (tmp_path / "r.h5").exists()


async def test_payloads_and_numbers_that_are_wrong(patterns: np.ndarray, expected_given_disk: Result) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start()
        for payload in (b"", b"abc", patterns[0].tobytes() + b"x"):
            await sender.frames([payload], 0)
        await sender.frames([patterns[0].tobytes()] * 3, FRAMES)  # beyond the scan
        await sender.frames([patterns[0].tobytes()], 2**53)
        await sender.raw(b"junk")
        await sender.raw(b"")
        await sender.frames([patterns[0].tobytes()], -1)
        await sender.frames([b"not lz4"], 1, encoding="lz4")
        await sender.frames([b"\xff" * 40], 1, encoding="bslz4")
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    session = await sent_plainly(send)
    result = session.result
    assert result is not None
    assert_same_object(result, expected_given_disk)
    counters = result.counters
    assert counters.undecodable == 3 + 3 + 2
    assert counters.outside == 4
    assert counters.missing == counters.duplicate == 0
    assert counters.received == FRAMES + counters.undecodable + counters.outside


async def test_undecodable_messages_before_the_start_are_counted(patterns: np.ndarray) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.raw(b"junk")
        await sender.start()
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    assert result.counters.undecodable == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("pixel", [(0, 0), (15, 16)])
async def test_a_float_that_is_no_number_spoils_its_frame_only(
    value: float, pixel: tuple[int, int], patterns: np.ndarray, expected_given_disk: Result
) -> None:
    frames = patterns.astype(np.float32)
    frames[(40, *pixel)] = value

    async def send(sender: PlainSender) -> None:
        await sender.start(dtype="float32")
        await sender.scan(frames, range(FRAMES))
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    # One frame of 256 may be missing, and no more.
    assert_same_object(result, expected_given_disk, tolerance=0.2)


async def test_start_repeated_and_frames_before_it(patterns: np.ndarray, expected_given_disk: Result) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.scan(patterns, range(40))
        await sender.start()
        await sender.scan(patterns, range(40, 100))
        await sender.start()
        await sender.scan(patterns, range(100, FRAMES))
        await sender.end()
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    assert_same_object(result, expected_given_disk)
    assert result.counters.received == FRAMES


async def test_an_end_before_the_last_frames(patterns: np.ndarray, expected_given_disk: Result) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.end()
        await sender.start()
        await sender.end()
        await sender.scan(patterns, range(FRAMES))

    session = await sent_plainly(send)
    assert session.incomplete == ""
    assert session.result is not None
    assert_same_object(session.result, expected_given_disk)


async def test_an_end_without_any_frame() -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.end()

    session = await sent_plainly(send)
    assert "ended before any frame came" in session.incomplete
    assert session.result is not None
    assert session.result.counters.missing == FRAMES
    assert not session.result.positions_received.any()


async def test_the_rest_of_a_series_does_not_get_into_one_of_the_same_number(
    patterns: np.ndarray, expected_given_disk: Result
) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.scan(patterns[::-1], range(80))
        await sender.end()
        await sender.start()
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    session = await sent_plainly(send)
    assert session.result is not None
    assert session.result.counters.duplicate == 0
    assert_same_object(session.result, expected_given_disk)


async def test_frames_of_an_unknown_series_are_named() -> None:
    async def send(sender: PlainSender) -> None:
        await sender.frames([b"x"], series="elsewhere")

    with pytest.raises(ConnectionFailed, match=r"frames of series elsewhere came .* but no start message"):
        await sent_plainly(send, timeout_s=0.5)


async def test_nobody_sends() -> None:
    async def send(sender: PlainSender) -> None: ...

    with pytest.raises(ConnectionFailed, match=r"nothing came from tcp://127.0.0.1:\d+ within .*liveptycho check"):
        await sent_plainly(send, timeout_s=0.5)


# settings


async def test_what_is_there_instead_of_the_stream() -> None:
    """Nothing comes from a publisher when it is pulled from, and the user hears why."""
    async with PlainSender(zmq.XPUB) as sender:
        with pytest.raises(ConnectionFailed, match="the detector publishes, use --sub"):
            await run_session(live_options(sender.endpoint, timeout_s=6.0))


async def test_missing_settings_are_one_error_that_names_all() -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start(**dict.fromkeys(OPTICS_AND_DISK), scan_shape=None)

    with pytest.raises(ConfigurationError) as caught:
        await sent_plainly(send)
    for key in ("scan_shape", "energy_kev", "scan_step_angstrom", "semiangle_mrad", "--scan-shape", "--energy-kev"):
        assert key in str(caught.value)


async def test_a_setting_wins_over_a_contradicting_header_and_is_noted(patterns: np.ndarray) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    async with plainly(send) as endpoint:
        layers = [Layer.of("flag", {"scan_shape": (8, 32), "energy_kev": 80.0})]
        session, _ = await run_session(live_options(endpoint, layers=layers))
    result, run = session.result, session.reconstruction
    assert result is not None
    assert run is not None
    assert result.object.shape == (8, 32)
    assert result.parameters.values["energy_kev"] == 80.0
    assert any("scan_shape is 16x16 in the stream; 8x32 from the flag is used" in note for note in run.notes)
    assert any("energy_kev is 200.0 in the stream" in note for note in run.notes)


async def test_a_number_of_frames_that_does_not_fit_the_scan_is_noted(patterns: np.ndarray) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start(frames=300)
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    session = await sent_plainly(send)
    assert session.reconstruction is not None
    assert any("announces 300 frames" in note for note in session.reconstruction.notes)


@pytest.mark.parametrize("given_disk", [True, False])
async def test_a_pixel_mask_of_another_detector_is_refused(
    given_disk: bool, tmp_path: Path, patterns: np.ndarray
) -> None:
    np.save(tmp_path / "mask.npy", np.ones((8, 8), bool))

    async def send(sender: PlainSender) -> None:
        await sender.start(**({} if given_disk else {"bf_centre_px": None}))
        await sender.scan(patterns, range(FRAMES))

    layers = [Layer.of("flag", {"pixel_mask": str(tmp_path / "mask.npy")})]
    with pytest.raises(ConfigurationError, match=r"pixel mask.*8x8|pixel mask.*\(8, 8\)"):
        await sent_plainly(send, layers=layers)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"energy_kev": math.nan}, "stream: energy_kev"),
        ({"energy_kev": -1}, "stream: energy_kev"),
        ({"energy_kev": "fast"}, "stream: energy_kev"),
        ({"energy_kev": [1, 2]}, "stream: energy_kev"),
        ({"scan_step_angstrom": []}, "stream: scan_step_angstrom"),
        ({"scan_step_angstrom": {"x": 1}}, "stream: scan_step_angstrom"),
        ({"aberrations": {"C10": math.inf}}, "stream: aberrations.C10"),
        ({"aberrations": {"Z9": 1.0}}, "unknown aberration 'Z9'"),
        ({"aberrations": 5}, "stream: aberrations"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"bf_centre_px": [1e4, 1e4]}, "no good detector pixel lies inside"),
        ({"rolloff_mrad": 50.0}, "rolloff_mrad"),
        ({"transpose": "perhaps"}, "stream: transpose"),
    ],
)
async def test_a_header_that_cannot_be_true_is_one_sentence(keys: dict[str, Any], reason: str) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start(**keys)

    with pytest.raises(ConfigurationError, match=reason) as caught:
        await sent_plainly(send)
    assert "\n" not in str(caught.value)


async def test_aberrations_beyond_all_sense_are_refused() -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start(aberrations={"C10": 1e300})

    with pytest.raises(ConfigurationError, match="C10"):
        await sent_plainly(send, series_timeout_s=0.5)


async def test_a_stream_cannot_make_us_read_files(
    tmp_path: Path, patterns: np.ndarray, expected_given_disk: Result
) -> None:
    (tmp_path / "private.txt").write_text("nobody's business")

    async def send(sender: PlainSender) -> None:
        await sender.start(positions=str(tmp_path / "private.txt"))
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    assert_same_object(result, expected_given_disk)


async def test_a_series_without_a_disk_is_one_sentence() -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start(bf_centre_px=None)
        for index in range(FRAMES):
            await sender.frames([bytes(32 * 32 * 2)], index)

    with pytest.raises(ConfigurationError, match="no bright-field disk was found"):
        await sent_plainly(send)


async def test_an_address_in_use_is_one_sentence() -> None:
    async with PlainSender() as sender:
        with pytest.raises(ConnectionFailed, match=r"cannot bind .* in use"):
            await run_session(live_options(sender.endpoint, bind=True))
        with pytest.raises(ConnectionFailed, match=r"cannot publish .* in use"):
            await run_session(live_options(sender.endpoint, publish=sender.endpoint))


# more than one socket, pass or series


async def test_two_sockets_share_a_stream(patterns: np.ndarray, expected_given_disk: Result) -> None:
    payloads = [frame.tobytes() for frame in patterns]

    async def send_half(sender: PlainSender, half: int) -> None:
        if half == 0:
            await sender.start()
        for first in range(half * 4, FRAMES, 8):
            await sender.frames(payloads[first : first + 4], first)
        if half == 0:
            await sender.end()  # likely before the other half is through

    async with plainly(lambda s: send_half(s, 0)) as one, plainly(lambda s: send_half(s, 1)) as other:
        session, _ = await run_session(live_options(one, other))
    assert session.result is not None
    assert session.incomplete == ""
    assert session.result.counters.missing == 0
    assert_same_object(session.result, expected_given_disk)


async def test_an_endless_series_on_two_sockets(patterns: np.ndarray) -> None:
    payloads = [frame.tobytes() for frame in patterns]
    async with (
        PlainSender() as one,
        PlainSender() as other,
        Session(live_options(one.endpoint, other.endpoint, passes=None)) as session,
    ):
        await one.start(frames=None)
        await one.frames(payloads[:100])
        await snapshot_where(session, lambda s: s.counters.received == 100)
        await one.end()
        ended = asyncio.create_task(session.wait())
        await asyncio.wait([ended], timeout=0.2)  # long enough to see the end, shorter than stragglers are waited for
        await other.frames(payloads[100:], 100)
        await patiently(ended)
    assert session.result is not None
    assert session.result.counters.received == FRAMES


async def test_a_publisher(expected: Result) -> None:
    async with serving(pattern="pub") as (endpoint, _):
        session, _ = await run_session(live_options(endpoint, pattern="sub"))
    assert session.result is not None
    assert_same_object(session.result, expected)


async def test_a_session_that_binds(expected: Result) -> None:
    async with (
        Session(live_options(ANY_PORT, bind=True)) as session,
        serving(address=session.endpoints[0], bind=False) as (_, sending),
    ):
        await patiently(sending)
        result = await patiently(session.wait())
    assert result is not None
    assert_same_object(result, expected)


@pytest.mark.parametrize("averaging", [False, True])
async def test_so_many_passes_of_an_endless_scan(averaging: bool, expected: Result) -> None:
    layers = [Layer.of("flag", {"averaging": averaging})]
    async with serving(passes=None) as (endpoint, sending):
        session, _ = await run_session(live_options(endpoint, passes=3, layers=layers))
        assert not sending.done()
    assert session.result is not None
    assert session.result.passes == 3
    assert session.result.counters.missing == 0
    assert_same_object(session.result, expected)


async def test_announced_passes_are_taken(expected: Result) -> None:
    async with serving(passes=4) as (endpoint, sending):
        session, snapshots = await run_session(live_options(endpoint))
        await patiently(sending)
    assert session.result is not None
    assert session.result.counters.received == 4 * FRAMES
    assert snapshots[-1].passes_done == 4
    assert_same_object(session.result, expected)


async def test_the_newest_series_is_the_one_that_is_wanted(
    patterns: np.ndarray, expected_given_disk: Result, tmp_path: Path
) -> None:
    """The rest of an aborted scan, without an end message, is not taken for the scan, and takes no name from it."""

    async def send(sender: PlainSender) -> None:
        await sender.start("A")
        await sender.scan(patterns, range(100), "A")
        await sender.start("B")
        await sender.scan(patterns, range(FRAMES), "B")
        await sender.end("B")

    session = await sent_plainly(send, record=tmp_path / "s.h5", output=tmp_path / "r.h5")
    assert session.incomplete == ""
    assert session.result is not None
    assert session.result.counters.received == FRAMES
    assert_same_object(session.result, expected_given_disk)
    assert sorted(os.listdir(tmp_path)) == ["r-aborted-1.h5", "r.h5", "s-aborted-1.h5", "s.h5"]
    for name, frames in (("s.h5", FRAMES), ("s-aborted-1.h5", 100)):
        with open_recording(tmp_path / name) as recording:
            assert recording.frames == frames
    assert (session.saved, session.recorded) == (tmp_path / "r.h5", tmp_path / "s.h5")


async def test_the_rest_of_a_series_without_frames_is_no_trouble(
    patterns: np.ndarray, expected_given_disk: Result
) -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start("A", bf_centre_px=None)  # the disk would have to be found, in nothing
        await sender.start("B")
        await sender.scan(patterns, range(FRAMES), "B")
        await sender.end("B")

    session = await sent_plainly(send)
    assert session.result is not None
    assert_same_object(session.result, expected_given_disk)


async def test_a_publisher_that_goes_on_is_not_begun_with_again(patterns: np.ndarray, tmp_path: Path) -> None:
    """So many passes of an endless series are taken; its start is repeated for those who come late."""

    async def send(sender: PlainSender) -> None:
        endless = np.concatenate([patterns] * 3)
        for number in range(3):
            await sender.start(frames=None)
            await sender.scan(endless, range(number * FRAMES, (number + 1) * FRAMES))

    async with plainly(send) as endpoint:
        options = live_options(endpoint, passes=1, follow=True, output=tmp_path / "r.h5")
        async with Session(options) as session:
            await snapshot_where(session, lambda s: s.counters.unclaimed >= FRAMES)
    assert os.listdir(tmp_path) == ["r.h5"]


async def test_following_from_series_to_series(
    patterns: np.ndarray, expected_given_disk: Result, tmp_path: Path
) -> None:
    async def send(sender: PlainSender) -> None:
        for series in ("A", "B", "C"):
            await sender.start(series)
            await sender.scan(patterns, range(100 if series == "B" else FRAMES), series)
            if series != "B":  # C begins before its end
                await sender.end(series)

    async with plainly(send) as endpoint:
        options = live_options(endpoint, follow=True, output=tmp_path / "r.h5", record=tmp_path / "s.h5")
        async with Session(options) as session:
            await snapshot_where(session, lambda s: s.series == "C" and s.state == "finished")
            session.stop()
            result = await patiently(session.wait())
    assert result is not None
    assert_same_object(result, expected_given_disk)
    assert sorted(os.listdir(tmp_path)) == ["r-2.h5", "r-3.h5", "r.h5", "s-2.h5", "s-3.h5", "s.h5"]
    for name, frames in (("s.h5", FRAMES), ("s-2.h5", 100), ("s-3.h5", FRAMES)):
        with open_recording(tmp_path / name) as recording:
            assert recording.frames == frames


@pytest.mark.parametrize(
    "first",
    [
        pytest.param({"energy_kev": None}, id="missing key"),
        pytest.param(
            {"bf_centre_px": None, "frames": 100},
            id="no disk, found at its end",
        ),
        pytest.param({"bf_centre_px": None}, id="no disk, found among its frames"),
    ],
)
async def test_a_series_that_cannot_be_reconstructed_is_not_the_end_of_following(
    first: dict[str, Any], patterns: np.ndarray, expected_given_disk: Result
) -> None:
    empty = np.zeros_like(patterns)

    async def send(sender: PlainSender) -> None:
        await sender.start("A", **first)
        await sender.scan(empty, range(first.get("frames", FRAMES) or 0), "A")
        await sender.end("A")
        await sender.start("B")
        await sender.scan(patterns, range(FRAMES), "B")
        await sender.end("B")

    async with plainly(send) as endpoint, Session(live_options(endpoint, follow=True)) as session:
        await snapshot_where(session, lambda s: s.series == "B" and s.state == "finished")
        assert session.result is not None
        assert_same_object(session.result, expected_given_disk)


# other optics while it runs


async def test_other_optics_while_scanning_and_afterwards(patterns: np.ndarray, tmp_path: Path) -> None:
    path = scan_file(tmp_path / "scan.h5")

    def fresh(**settings: Any) -> Result:
        return offline(path, layers=[Layer.of("flag", settings), *DISK])

    early = {"aberrations": {"C10": 30.0, "C12": 10.0, "phi12": 20.0}, "rotation_deg": -30.0, "transpose": True}
    async with PlainSender() as sender, Session(live_options(sender.endpoint, linger_s=math.inf)) as session:
        await sender.start()
        await sender.scan(patterns, range(100))
        await snapshot_where(session, lambda s: s.rows_acquired >= 6)
        await session.change(**early)
        await sender.scan(patterns, range(100, FRAMES))
        await sender.end()
        last = await snapshot_where(session, lambda s: s.state == "finished")
        assert (last.rotation_deg, last.transpose) == (-30.0, True)
        assert session.result is not None
        assert_same_object(session.result, fresh(**early))
        assert session.result.parameters.sources["rotation_deg"] == "control"

        await session.change(method="ssb-single", aberrations={})
        wanted = fresh(**{**early, "method": "ssb-single", "aberrations": {}})
        after = await snapshot_where(session, lambda s: s.method == "ssb-single")
        np.testing.assert_allclose(after.images["phase"], wanted.phase, atol=1e-5)


async def test_optics_that_are_changed_before_the_series(patterns: np.ndarray) -> None:
    async with PlainSender() as sender, Session(live_options(sender.endpoint)) as session:
        await session.change(aberrations={"C10": 33.0})
        await sender.start()
        await sender.scan(patterns, range(FRAMES))
        await sender.end()
        result = await patiently(session.wait())
    assert result is not None
    assert result.parameters.values["aberrations"] == {"C10": 33.0}


async def test_optics_that_are_changed_while_the_kernels_are_made(
    patterns: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    class SlowEngine(reconstruction_module.Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            inside.set()
            assert go_on.wait(PATIENCE_S)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(reconstruction_module, "Engine", SlowEngine)

    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    async with plainly(send) as endpoint, Session(live_options(endpoint)) as session:
        assert await asyncio.to_thread(inside.wait, PATIENCE_S)
        changing = asyncio.create_task(session.change(aberrations={"C10": 33.0}))
        await asyncio.wait([changing], timeout=0.2)  # it may have to wait for the kernels, or not
        go_on.set()
        await patiently(changing)
        result = await patiently(session.wait())
    assert result is not None
    assert result.parameters.values["aberrations"] == {"C10": 33.0}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"energy_kev": 80.0}, "energy_kev cannot be changed while scanning"),
        ({"method": "magic"}, "unknown method"),
        ({"rotation_deg": math.nan}, "rotation_deg"),
        ({"rotation_deg": "north"}, "rotation_deg"),
        ({"aberrations": {"C99": 1.0}}, "unknown aberration"),
        ({"aberrations": {"C10": math.nan}}, "C10"),
    ],
)
@pytest.mark.parametrize("when", ["before", "while"])
async def test_changes_that_cannot_be_meant_are_refused(
    when: str, settings: dict[str, Any], reason: str, patterns: np.ndarray
) -> None:
    async with PlainSender() as sender, Session(live_options(sender.endpoint)) as session:
        if when == "while":
            await sender.start()
            await sender.scan(patterns, range(100))
            await snapshot_where(session, lambda s: s.rows_acquired > 0)
        with pytest.raises(ConfigurationError, match=reason):
            await session.change(**settings)
        assert session.snapshot.state in ("waiting", "scanning")


# the session itself


async def test_snapshots_count_up_and_end() -> None:
    async with serving(rate=600.0) as (endpoint, _):
        _, snapshots = await run_session(live_options(endpoint, layers=DISK))
    sequence = [snapshot.sequence for snapshot in snapshots]
    assert sequence == sorted(set(sequence))
    assert len({snapshot.session for snapshot in snapshots}) == 1
    states = list(dict.fromkeys(snapshot.state for snapshot in snapshots))
    assert states[-2:] == ["scanning", "finished"]
    rows = [snapshot.rows_acquired for snapshot in snapshots if snapshot.state == "scanning"]
    assert rows == sorted(rows)
    for snapshot in snapshots:
        if "phase" in snapshot.images:
            assert np.isfinite(snapshot.images["phase"]).all(axis=1).sum() == snapshot.rows_acquired


async def test_stopping_saves_what_came(patterns: np.ndarray, tmp_path: Path) -> None:
    path, recording_path = tmp_path / "r.h5", tmp_path / "s.h5"
    async with (
        PlainSender() as sender,
        Session(live_options(sender.endpoint, output=path, record=recording_path)) as session,
    ):
        await sender.start()
        await sender.scan(patterns, range(100))
        await snapshot_where(session, lambda s: s.counters.received == 100)
        session.stop()
        result = await patiently(session.wait(), 2.0)
    assert result is not None
    assert session.incomplete == "stopped by the user"
    assert session.snapshot.state == "stopped"
    assert np.count_nonzero(result.positions_received) == 100
    assert path.exists()
    with open_recording(recording_path) as recording:
        assert recording.frames == 100
        assert not recording.complete


async def test_stopping_while_waiting() -> None:
    async with PlainSender() as sender, Session(live_options(sender.endpoint)) as session:
        session.stop()
        assert await patiently(session.wait(), 2.0) is None
        assert session.snapshot.state == "stopped"


@pytest.mark.parametrize("when", ["waiting", "scanning"])
async def test_leaving_ends_everything_at_once(when: str, patterns: np.ndarray) -> None:
    async with PlainSender() as sender:
        session = Session(live_options(sender.endpoint, publish=ANY_PORT))
        async with asyncio.timeout(PATIENCE_S), session:
            if when == "scanning":
                await sender.start()
                await sender.scan(patterns, range(100))
                await snapshot_where(session, lambda s: s.state == "scanning")


async def test_rows_that_cannot_complete_are_shown_after_a_while(patterns: np.ndarray) -> None:
    async with PlainSender() as sender, Session(live_options(sender.endpoint, row_timeout_s=0.3)) as session:
        await sender.start()
        await sender.scan(patterns, range(COLUMNS + 3))
        await snapshot_where(session, lambda s: s.rows_acquired == 2)
        await sender.scan(patterns, range(COLUMNS + 3, 2 * COLUMNS))
        snapshot = await snapshot_where(session, lambda s: s.counters.received == 2 * COLUMNS)
        snapshot = await snapshot_where(session, lambda s: s.counters.missing == 0)
        assert snapshot.counters.late == 0
        assert np.isfinite(snapshot.images["bright_field"][:2]).all()


async def test_rows_closed_by_a_silence_are_shown_without_any_other_news(
    patterns: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "_SLOWEST_S", math.inf)
    monkeypatch.setattr(acquisition_module, "_SILENT_S", math.inf)
    async with PlainSender() as sender, Session(live_options(sender.endpoint, row_timeout_s=0.3)) as session:
        await sender.start()
        await sender.scan(patterns, range(COLUMNS + 3))
        snapshot = await snapshot_where(session, lambda s: s.rows_acquired == 2)
        assert snapshot.state == "scanning", "and not only at the end"


async def test_the_api_opens_a_session(expected: Result, tmp_path: Path) -> None:
    toml = tmp_path / "scan.toml"
    toml.write_text("rotation_deg = 5.0\n[aberrations]\nC10 = 1.0\n")
    async with (
        serving() as (endpoint, _),
        open_session(endpoint, config=toml, device="cpu", timeout_s=PATIENCE_S, rotation_deg=20.0) as session,
    ):
        result = await patiently(session.wait())
    assert result is not None
    assert result.parameters.values["rotation_deg"] == 20.0
    assert result.parameters.values["aberrations"] == {"C10": 1.0}
    assert result.object.shape == expected.object.shape


async def test_a_recording_that_exists_is_not_replaced(tmp_path: Path, patterns: np.ndarray) -> None:
    path = tmp_path / "s.h5"
    path.write_bytes(b"precious")

    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.scan(patterns, range(FRAMES))

    with pytest.raises(DataFileError, match="exists"):
        await sent_plainly(send, record=path)
    assert path.read_bytes() == b"precious"


async def test_an_error_is_told_and_what_came_is_shown(
    tmp_path: Path, patterns: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows that are closed and not in the image yet must not get into the error's way.
    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.frames([frame.tobytes() for frame in patterns])

    def full(*_: object) -> None:
        assert session.reconstruction is not None
        assert session.reconstruction.engine is not None
        session.reconstruction.engine.wait_until_ready()
        raise DataFileError("the disk is full")

    monkeypatch.setattr(Recorder, "write", full)
    monkeypatch.setattr(Session, "_publish", lambda self: asyncio.Event().wait())
    async with plainly(send) as endpoint:
        with pytest.raises(DataFileError, match="the disk is full"):
            async with Session(live_options(endpoint, record=tmp_path / "s.h5")) as session:
                await patiently(session.wait())
    assert session.snapshot.state == "failed"
    assert session.snapshot.rows_acquired == ROWS
    assert np.isfinite(session.snapshot.images["phase"]).all()


async def test_a_result_does_not_replace_the_recording_of_its_own_series(tmp_path: Path, patterns: np.ndarray) -> None:
    path = tmp_path / "s.h5"

    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    with contextlib.suppress(ConfigurationError):
        await sent_plainly(send, record=path, output=path)
    if path.exists():
        open_recording(path).close()


async def test_big_frames(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).poisson(2.0, (1024, 1024)).astype(np.uint16)
    count = 16

    async def send(sender: PlainSender) -> None:
        await sender.start(
            detector_shape=[1024, 1024], scan_shape=[4, 4], frames=count, bf_centre_px=[500.0, 520.0],
            detector_pixel_mrad=0.1, bf_radius_px=200.0,
        )  # fmt: skip
        for index in range(count):
            await sender.frames([frame.tobytes()], index)
        await sender.end()

    result = (await sent_plainly(send)).result
    assert result is not None
    assert result.counters.received == count
    assert result.positions_received.all()
    np.testing.assert_allclose(result.images["mean_pattern"], frame, rtol=1e-6)


async def test_a_detector_beyond_the_memory_is_refused() -> None:
    async def send(sender: PlainSender) -> None:
        await sender.start(scan_shape=[4096, 4096], frames=4096**2, detector_shape=[512, 512], bf_centre_px=[256, 256],
                           detector_pixel_mrad=0.1, bf_radius_px=200.0)  # fmt: skip

    with pytest.raises(DoesNotFit, match="use a smaller scan"):
        await sent_plainly(send)


async def test_a_session_says_that_the_kernels_are_being_made(
    patterns: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, make = threading.Event(), Setup.make_kernels

    def slowly(setup: Setup, *given: Any) -> Any:
        assert go_on.wait(PATIENCE_S)
        return make(setup, *given)

    monkeypatch.setattr(Setup, "make_kernels", slowly)
    async with PlainSender() as sender, Session(live_options(sender.endpoint)) as session:
        await sender.start()
        await sender.scan(patterns, range(FRAMES))
        async for snapshot in session:
            if snapshot.rows_acquired:
                assert "the kernels are being made" in snapshot.message
                assert snapshot.latency_ms is None
                assert np.isnan(snapshot.images["phase"]).all()
                assert np.isfinite(snapshot.images["bright_field"]).any()
                break
        go_on.set()
        await sender.end()
        result = await patiently(session.wait())
    assert result is not None
    assert np.isfinite(result.phase).all()
