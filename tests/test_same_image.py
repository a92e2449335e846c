"""One scan, sent in every protocol over real sockets: the same image each time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.messages import Encoding
from detectors.protocols.registry import PROTOCOLS
from detectors.simulator.sender import Exposures, serve
from stream.api import Result
from stream.config import Layer
from stream.files import open_dataset
from stream.offline import file_source
from stream.recording import open_recording
from tests.dectris_files import payloads, write_legacy
from tests.live_helpers import (
    ANY_PORT,
    OPTICS_AND_DISK,
    SCAN,
    all_frames,
    live_options,
    offline,
    patiently,
    run_session,
    serving,
)

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


@pytest.mark.parametrize("protocol", ["dectris-v1", "dectris-v2"])
async def test_a_dectris_file_and_its_stream_give_the_same_image(protocol: str, tmp_path: Path) -> None:
    """Reconstructed as it lies there, and sent as a stream without being unpacked."""
    wanted = await live("native", Encoding.RAW)
    master = write_legacy(tmp_path, all_frames())
    layers = [Layer.of("flag", FLAGS)]
    assert_same(offline(master, layers=layers), wanted)

    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    with open_dataset(master) as dataset:
        source = file_source(dataset, PROTOCOLS[protocol], "as-stored")
        sending = asyncio.create_task(serve(source, ANY_PORT, protocol=protocol, ready=ready.set_result))
        options = live_options(await patiently(ready), protocol=protocol, layers=layers, record=tmp_path / "scan.h5")
        session, _ = await run_session(options)
        await patiently(sending)
    assert session.result is not None
    assert_same(session.result, wanted)
    with open_dataset(master) as dataset, open_recording(tmp_path / "scan.h5") as recording:
        stored, heard = dataset.packed_blocks(), recording.blocks()
        assert [bytes(p) for b in stored for p in payloads(b)] == [bytes(p) for b in heard for p in payloads(b)]


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
