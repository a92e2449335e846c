"""One scan, sent in every protocol over real sockets: the same image each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.messages import Encoding
from detectors.protocols.registry import PROTOCOLS
from detectors.simulator.sender import Exposures
from stream.api import Result
from stream.config import Layer
from stream.recording import open_recording
from tests.live_helpers import OPTICS_AND_DISK, SCAN, all_frames, live_options, patiently, run_session, serving

#: What no vendor's stream says, and the user gives: the same for every protocol.
FLAGS: dict[str, Any] = {**OPTICS_AND_DISK, "scan_shape": SCAN.scan_shape}

WAYS = [
    (name, encoding)
    for name, protocol in PROTOCOLS.items()
    for encoding in protocol.encodings
    if "raw-" not in encoding  # Merlin's packed modes: counts of this scan need not fit
]


async def live(protocol: str, encoding: Encoding, **options: Any) -> Result:
    async with serving(protocol=protocol, encoding=encoding) as (endpoint, sending):
        session, _ = await run_session(
            live_options(endpoint, protocol=protocol, layers=[Layer.of("flag", FLAGS)], **options)
        )
        await patiently(sending)
    assert session.result is not None
    assert session.incomplete == ""
    return session.result


@pytest.fixture(scope="module")
def patterns() -> np.ndarray:
    return all_frames()


def assert_same(result: Result, wanted: Result) -> None:
    """Integer sums are the same to the last bit; the object up to the order in which rows were added."""
    assert result.counters == wanted.counters
    for name in ("bright_field", "dark_field", "mean_pattern"):
        np.testing.assert_array_equal(result.images[name], wanted.images[name])
    np.testing.assert_allclose(result.object, wanted.object, rtol=0, atol=2e-6)


@pytest.mark.parametrize("protocol", ["dectris-v1", "dectris-v2", "merlin"])
async def test_rows_are_found_in_the_time_stamps(protocol: str) -> None:
    """Free running: nothing but the pause after each row tells where the next one begins."""
    spoken = PROTOCOLS[protocol]
    wanted = await live(protocol, next(iter(spoken.encodings.values())))
    exposures = Exposures(frame_time_ns=100_000, columns=SCAN.scan_shape[1], row_pause_ns=450_000)
    options = {"encoding": next(iter(spoken.encodings.values())), "protocol": protocol, "exposures": exposures}
    async with serving(**options) as (endpoint, sending):
        flags = Layer.of("flag", {**FLAGS, "row_starts": "time-gaps"})
        session, _ = await run_session(live_options(endpoint, protocol=protocol, layers=[flags]))
        await patiently(sending)
    assert session.result is not None
    assert_same(session.result, wanted)


@pytest.mark.parametrize(("protocol", "encoding"), WAYS)
async def test_every_protocol_gives_the_same_image(protocol: str, encoding: str, tmp_path: Path) -> None:
    wanted = await live("native", Encoding.RAW)
    path = tmp_path / "scan.h5"
    result = await live(protocol, PROTOCOLS[protocol].encodings[encoding], record=path)
    assert_same(result, wanted)
    with open_recording(path) as recording:
        assert recording.protocol == protocol
        assert recording.frames == len(all_frames())
