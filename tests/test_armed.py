"""A detector that is armed from here: simulated control interface and stream, over real sockets, through a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from detectors.errors import ConfigurationError, LiveptychoError
from detectors.messages import Encoding, SeriesId, SeriesStart
from detectors.protocols.registry import protocol_named
from detectors.simulator.dcu import SimulatedDCU
from detectors.simulator.merlin_device import SimulatedMerlin
from detectors.simulator.sender import serve
from detectors.simulator.source import EncodedSource
from stream.api import open_session
from tests.live_helpers import ANY_PORT, FRAMES, OPTICS_AND_DISK, PATIENCE_S, SCAN, patiently, snapshot_where

BAD = (3, 4)


class MaskedSource(EncodedSource):
    """The simulated scan on a detector with a bad pixel, of which only REST and the full header tell."""

    def start(self, series: SeriesId) -> SeriesStart:
        mask = np.ones(SCAN.detector_shape, bool)
        mask[BAD] = False
        start = super().start(series)
        return SeriesStart(series, start.detector_shape, start.dtype, None, start.frames, pixel_mask=mask)


@asynccontextmanager
async def detector(protocol: str, rate: float | None = None) -> AsyncIterator[tuple[Any, str, dict[str, str]]]:
    """A simulated detector with its control side: (it, its stream's address, what opens a session on it)."""
    encoding: Encoding = next(iter(protocol_named(protocol).encodings.values()))
    source = MaskedSource(SCAN, encoding, threads=1)
    device: Any = SimulatedMerlin(source) if protocol == "merlin" else SimulatedDCU(source, protocol)
    where = "tcp://127.0.0.1:0" if protocol == "merlin" else "http://127.0.0.1:0"
    async with device.serving(where):
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        options = {"protocol": protocol, "passes": None, "trigger": device, "rate": rate, "ready": ready.set_result}
        sending = asyncio.create_task(serve(device.source, ANY_PORT, **options))
        control = {"control": device.endpoint} if protocol == "merlin" else {"simplon": device.url}
        try:
            yield device, await patiently(ready), control
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


def session_on(endpoint: str, protocol: str, control: dict[str, str], trigger: Any, **options: Any) -> Any:
    return open_session(
        endpoint,
        protocol=protocol,
        trigger=trigger,
        device="cpu",
        threads=2,
        timeout_s=PATIENCE_S,
        series_timeout_s=PATIENCE_S,
        scan_shape=SCAN.scan_shape,
        **control,
        **OPTICS_AND_DISK,
        **options,
    )


def is_idle(device: Any) -> bool:
    if isinstance(device, SimulatedMerlin):
        return device.variables["DETECTORSTATUS"] == "0"
    return bool(device.state == "idle")


TRIGGERS = ["software", "pixel", "line", "gate"]
PROTOCOLS = ["dectris-v1", "dectris-v2", "merlin"]


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_scan_that_is_armed_from_here(protocol: str, trigger: str) -> None:
    async with detector(protocol) as (device, endpoint, control):
        async with session_on(endpoint, protocol, control, trigger) as session:
            result = await patiently(session.wait())
        assert session.incomplete == ""
        assert result is not None
        assert (result.counters.received, result.counters.missing) == (FRAMES, 0)
        assert is_idle(device)
    if protocol != "merlin":  # which has no mask to tell of
        assert np.argwhere(~result.setup.geometry.good).tolist() == [list(BAD)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_scan_that_the_user_stops_leaves_the_detector_idle(protocol: str) -> None:
    async with detector(protocol, rate=200.0) as (device, endpoint, control):
        async with session_on(endpoint, protocol, control, "software") as session:
            await snapshot_where(session, lambda s: s.counters.received > 20)
            session.stop()
            result = await patiently(session.wait())
        assert session.incomplete.startswith("stopped by the user")
        assert result is not None
        assert 0 < result.counters.received < FRAMES
        assert is_idle(device)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_session_that_is_cancelled_leaves_the_detector_idle(protocol: str) -> None:
    async with detector(protocol, rate=200.0) as (device, endpoint, control):

        async def run() -> None:
            async with session_on(endpoint, protocol, control, "software") as session:
                scanning.set_result(session)
                await session.wait()

        scanning: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(run())
        await snapshot_where(await patiently(scanning), lambda s: s.counters.received > 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_idle(device)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_a_detector_that_somebody_else_holds_is_refused(protocol: str) -> None:
    async with detector(protocol, rate=200.0) as (_, endpoint, control):
        async with session_on(endpoint, protocol, control, "software") as first:
            await snapshot_where(first, lambda s: s.counters.received > 20)
            with pytest.raises(LiveptychoError, match=r"another (client|program)"):
                await session_on(endpoint, protocol, control, "software").__aenter__()
            await patiently(first.wait())
        assert first.incomplete == ""  # it was not disturbed


async def test_what_is_asked_of_the_detector_is_only_asked() -> None:
    """Passive: energy and mask come over REST, and nothing is changed there."""
    async with detector("dectris-v2") as (device, endpoint, control):
        before = device.state, {key: device[f"detector/{key}"] for key in ("nimages", "ntrigger", "trigger_mode")}
        async with session_on(endpoint, "dectris-v2", control, None):
            await asyncio.sleep(0.5)
        assert before == (
            device.state,
            {key: device[f"detector/{key}"] for key in ("nimages", "ntrigger", "trigger_mode")},
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"trigger": "pixel"}, "add --simplon or --control"),
        ({"trigger": "pixel", "simplon": "http://127.0.0.1:9", "follow": True}, "leave --follow out"),
        ({"frame_time_s": 1e-3}, "add --trigger"),
        ({"simplon": "http://127.0.0.1:9", "control": "tcp://127.0.0.1:9"}, "give one of them"),
        ({"control": "tcp://127.0.0.1:9"}, "Merlin's control port"),
    ],
)
async def test_settings_that_do_not_go_together(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        open_session("tcp://127.0.0.1:9", protocol="dectris-v2", **options)
