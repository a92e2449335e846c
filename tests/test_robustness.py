"""What must not be lost when something goes wrong: the scan, its recording, the threads' memory, the last picture."""

from __future__ import annotations

import asyncio
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio

from detectors.errors import ConfigurationError, DoesNotFit
from detectors.simulator.misbehaviour import Misbehaviour
from stream import engine as engine_module
from stream.accumulator import Accumulator
from stream.api import Session, Snapshot
from stream.kernels import METHODS
from stream.recording import open_recording
from stream.threads import in_threads
from tests.data_helpers import Case, assert_object, feed, running
from tests.live_helpers import (
    FRAMES,
    PlainSender,
    all_frames,
    live_options,
    patiently,
    plainly,
    run_session,
    serving,
    snapshot_where,
)


async def test_cancelled_work_in_threads_is_waited_for() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(20)
        ended.set()

    task = asyncio.create_task(in_threads(work))
    await asyncio.to_thread(begun.wait, 20)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await patiently(task)
    assert ended.is_set()


async def test_the_first_error_of_several_threads_is_raised_once_all_have_ended() -> None:
    ended = threading.Event()

    def fail() -> None:
        raise ConfigurationError("first")

    with pytest.raises(ConfigurationError, match="first"):
        await in_threads(fail, ended.set)
    assert ended.is_set()


def test_a_change_of_optics_that_fails_keeps_the_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(scan=(8, 9), rotation=20.0)
    with running(case.setup()) as engine:
        feed(engine, case.counts())
        before = engine.object()
        make = engine_module.Setup.make_kernels
        aberrated = Case(scan=(8, 9), rotation=20.0, aberrations={"C10": 50.0}).probe

        def broken(setup: Any, *given: Any) -> Any:
            if setup.probe.aberrations.coefficients:
                raise MemoryError("no room")
            return make(setup, *given)

        monkeypatch.setattr(engine_module.Setup, "make_kernels", broken)
        with pytest.raises(DoesNotFit, match="the old ones are kept"):
            engine.change(aberrated, METHODS["ssb"])
        np.testing.assert_allclose(engine.object(), before, atol=1e-6)
        assert_object(engine, case, case.counts())


def test_a_change_of_optics_that_fails_leaves_its_memory_to_the_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(scan=(8, 9), rotation=20.0)
    with running(case.setup()) as engine:
        feed(engine, case.counts())
        make, add, failed = engine_module.Setup.make_kernels, Accumulator.add, []
        aberrated = Case(scan=(8, 9), rotation=20.0, aberrations={"C10": 50.0}).probe

        def full(accumulator: Accumulator, rows: np.ndarray) -> None:
            if not failed:
                failed.append(weakref.ref(accumulator))
                raise MemoryError("no room")
            add(accumulator, rows)

        def look(setup: Any, *given: Any) -> Any:
            assert [reference() for reference in failed] in ([], [None])
            return make(setup, *given)

        monkeypatch.setattr(Accumulator, "add", full)
        monkeypatch.setattr(engine_module.Setup, "make_kernels", look)
        with pytest.raises(DoesNotFit, match="the old ones are kept"):
            engine.change(aberrated, METHODS["ssb"])
        assert len(failed) == 1
        assert_object(engine, case, case.counts())


def test_rows_that_come_while_the_optics_change_are_in_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(scan=(8, 9), rotation=20.0)
    counts = case.counts()
    aberrated = Case(scan=(8, 9), rotation=20.0, aberrations={"C10": 50.0})
    with running(case.setup()) as engine:
        feed(engine, counts, np.arange(40))
        make = engine_module.Setup.make_kernels

        def slowly(setup: Any, *given: Any) -> Any:
            assert engine.view(["phase"]).rows_acquired >= 4  # a viewer is answered meanwhile
            feed(engine, counts, np.arange(30, 72))  # and rows go on, late frames among them
            return make(setup, *given)

        monkeypatch.setattr(engine_module.Setup, "make_kernels", slowly)
        engine.change(aberrated.probe, METHODS["ssb"])
        assert_object(engine, aberrated, counts)


@pytest.mark.parametrize("share", [0.05, 0.3])
async def test_passes_end_although_frames_are_lost(share: float) -> None:
    async with serving(passes=None, misbehaviour=Misbehaviour(drop=share, seed=3)) as (endpoint, sending):
        session, snapshots = await run_session(live_options(endpoint, passes=3))
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    assert session.result is not None
    assert session.result.passes == 3
    assert session.result.counters.missing > 0
    assert snapshots[-1].state == "finished"


async def test_a_scan_that_cannot_be_reconstructed_is_still_recorded(tmp_path: Path) -> None:
    patterns = all_frames()
    path = tmp_path / "scan.h5"

    async def send(sender: PlainSender) -> None:
        await sender.start(energy_kev=None)  # a setting is missing
        await sender.scan(patterns, range(FRAMES))
        await sender.end()

    async with plainly(send) as endpoint:
        with pytest.raises(ConfigurationError, match="energy_kev"):
            await run_session(live_options(endpoint, record=path))
    with open_recording(path) as recording:
        assert recording.frames == FRAMES
        assert recording.complete


async def test_an_error_at_the_end_of_a_recorded_series_is_told(tmp_path: Path) -> None:
    """The disk is only looked for among the frames that came: here too few, and empty."""
    path = tmp_path / "scan.h5"
    empty = np.zeros_like(all_frames())

    async def send(sender: PlainSender) -> None:
        await sender.start(bf_centre_px=None)
        await sender.scan(empty, range(20))
        await sender.end()

    async with plainly(send) as endpoint:
        with pytest.raises(ConfigurationError, match="bf_centre_px"):
            await run_session(live_options(endpoint, record=path))
    with open_recording(path) as recording:
        assert recording.frames == 20
        assert recording.complete


async def test_the_series_after_one_that_could_only_be_recorded(tmp_path: Path) -> None:
    patterns, path = all_frames(), tmp_path / "scan.h5"

    async def send(sender: PlainSender) -> None:
        await sender.start("A", energy_kev=None)
        await sender.scan(patterns, range(20), "A")  # and no end
        await sender.start("B")
        await sender.scan(patterns, range(FRAMES), "B")
        await sender.end("B")

    async with (
        plainly(send) as endpoint,
        Session(live_options(endpoint, record=path, follow=True)) as session,
    ):
        await snapshot_where(session, lambda snapshot: snapshot.series == "B" and snapshot.state == "finished")
    assert session.result is not None
    assert session.result.counters.received == FRAMES
    with open_recording(path) as recording:
        assert recording.frames == 20
    with open_recording(tmp_path / "scan-2.h5") as recording:
        assert recording.frames == FRAMES


async def test_the_last_snapshot_reaches_its_viewers() -> None:
    patterns = all_frames()
    context = zmq.asyncio.Context()
    viewer = context.socket(zmq.SUB)
    viewer.setsockopt(zmq.CONFLATE, 1)
    viewer.subscribe(b"")
    try:
        async with PlainSender() as sender:
            async with Session(live_options(sender.endpoint, publish="tcp://127.0.0.1:*")) as session:
                assert session.publish_endpoint is not None
                viewer.connect(session.publish_endpoint)
                last = Snapshot.unpack(await patiently(viewer.recv()))  # its subscription has arrived
                await sender.start()
                await sender.scan(patterns, range(FRAMES))
                await sender.end()
                await snapshot_where(session, lambda snapshot: snapshot.state == "finished")
            while last.state != "finished":
                last = Snapshot.unpack(await patiently(viewer.recv()))
    finally:
        context.destroy(linger=0)


async def test_leaving_a_session_in_peace_saves_what_came(tmp_path: Path) -> None:
    patterns, path = all_frames(), tmp_path / "r.h5"

    async def send(sender: PlainSender) -> None:
        await sender.start()
        await sender.scan(patterns, range(FRAMES // 2))

    async with plainly(send) as endpoint, Session(live_options(endpoint, output=path)) as session:
        await snapshot_where(session, lambda snapshot: snapshot.counters.received == FRAMES // 2)
    assert path.exists()
    assert session.result is not None
    assert session.incomplete == "stopped by the user"
