"""Recording a stream, live or alone, and replaying it: the same frames, the same image."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.codec import encode
from detectors.errors import ConfigurationError, ConnectionFailed, DataFileError
from detectors.messages import Announced, Encoding, FrameBlock, ReceivedBatch, SeriesEnd, SeriesStart
from detectors.protocols.registry import protocol_named
from detectors.simulator.misbehaviour import Misbehaviour
from stream.intake import Silence, messages
from stream.receiving import open_receiver
from stream.record import Recorded, record_stream
from stream.recording import Recorder, open_recording
from stream.replay import replay_recording
from tests.live_helpers import (
    ANY_PORT,
    FRAMES,
    PlainSender,
    all_frames,
    assert_same_object,
    live_options,
    offline,
    patiently,
    payloads_of,
    run_session,
    scan_file,
    serving,
)


@contextlib.asynccontextmanager
async def replaying(path: Path, **options: Any) -> AsyncIterator[tuple[str, asyncio.Task[int]]]:
    """A replay under way: its endpoint, and the task that sends."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    options.setdefault("speed", None)
    task = asyncio.create_task(replay_recording(path, ANY_PORT, ready=ready.set_result, **options))
    try:
        yield await patiently(ready), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def recorded(path: Path, **options: Any) -> Recorded:
    """A served ``SCAN``, recorded without a reconstruction."""
    async with serving(**options) as (endpoint, sending):
        done = await patiently(record_stream([endpoint], path, timeout_s=options.pop("timeout_s", 10.0)))
        await asyncio.gather(sending)
    return done


async def heard(endpoint: str, protocol: str = "native") -> list[Any]:
    """Every message until the end; blocks with payloads of their own."""
    out: list[Any] = []
    async with open_receiver(protocol_named(protocol), [endpoint]) as receiver:
        stream = messages(receiver, protocol_named(protocol))
        async with contextlib.aclosing(stream):
            async for item in stream:
                if not isinstance(item, Silence | Announced):
                    out.append(item.compact() if isinstance(item, FrameBlock) else item)
                if isinstance(item, SeriesEnd):
                    return out
    return out


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4])
async def test_live_recorded_and_replayed_agree(encoding: Encoding, tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    async with serving(encoding=encoding) as (endpoint, _):
        live, _ = await run_session(live_options(endpoint, record=path))
    async with replaying(path) as (endpoint, task):
        again, _ = await run_session(live_options(endpoint))
        assert await patiently(task) == FRAMES
    assert live.result is not None
    assert again.result is not None
    assert_same_object(again.result, live.result)
    assert_same_object(offline(path), live.result)
    assert_same_object(offline(scan_file(tmp_path / "scan.h5")), live.result)
    assert again.result.counters == live.result.counters


async def test_a_stream_is_recorded_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    async with serving() as (endpoint, _):
        sent = await heard(endpoint)
    assert await recorded(path) == Recorded(FRAMES)
    with open_recording(path) as recording:
        assert recording.frames == FRAMES
        assert recording.complete
        assert recording.start.header == sent[0].header
        assert payloads_of(recording.blocks()) == payloads_of(sent)


async def test_a_replay_is_what_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    wrong = Misbehaviour(drop=0.1, duplicate=0.1, reorder=0.2, corrupt=0.1, seed=7)
    async with serving(misbehaviour=wrong) as (endpoint, _):
        sent = await heard(endpoint)
    done = await recorded(path, misbehaviour=wrong)
    assert done.frames == len(payloads_of(sent))
    async with replaying(path) as (endpoint, task):
        again = await heard(endpoint)
        assert await patiently(task) == done.frames
    assert payloads_of(again) == payloads_of(sent)
    assert isinstance(again[0], SeriesStart)
    assert again[0].header == sent[0].header
    assert isinstance(again[-1], SeriesEnd)
    assert again[-1].header == sent[-1].header


def spoken(
    protocol: str, encoding: Encoding, dtype: str, shape: tuple[int, int], channels: tuple[str, ...] = ()
) -> list[Any]:
    """What a detector of this protocol sends, as messages: 12 frames in disorder, two of them damaged."""
    pixels = np.random.default_rng(1).integers(0, 2, (12, max(1, len(channels)), *shape), dtype)
    mask = np.ones(shape, bool)
    mask[3, 4] = False
    start = SeriesStart(
        1, shape, np.dtype(dtype), frames=12, channels=channels, pixel_mask=mask, maximum_is_masked=True
    )
    encoder = protocol_named(protocol).encoder()
    wire = encoder.start(start)
    for i in (0, 1, 2, 5, 4, 3, 3, *range(6, 12)):
        first, *others = ([encode(frame, encoding)] for frame in pixels[i])
        if i == 7 and protocol_named(protocol).framing is None:  # a Merlin's frame is as long as its header says
            first[0] = first[0][:-2]
        if i == 8 and protocol_named(protocol).framing is None:
            first[0] = b""
        options = {"others": [(encoding, other) for other in others], "exposed_ns": [10**18 + 1000 * i]}
        wire += encoder.frames(1, i, first, encoding, **options)
    wire += encoder.end(1)
    whole = wire if protocol_named(protocol).framing is None else [[b"".join(parts)] for parts in wire]
    items = protocol_named(protocol).decoder().feed(ReceivedBatch.from_messages(whole, time_ns=5))
    return [item for item in items if not isinstance(item, Announced)]


def frames_heard(items: list[Any]) -> list[Any]:
    """Every frame with its channels, and the time since the first one's exposure."""
    blocks = [item for item in items if isinstance(item, FrameBlock)]
    began = None if blocks[0].exposed_ns is None else int(blocks[0].exposed_ns[0])
    return [
        (
            int(block.indices[i]),
            None if block.exposed_ns is None or began is None else int(block.exposed_ns[i]) - began,
            [
                (each.encoding, each.slab[each.offsets[i] :][: each.sizes[i]].tobytes())
                for each in (block, *block.others)
            ],
        )
        for block in blocks
        for i in range(len(block))
    ]


@pytest.mark.parametrize(("protocol", "encoding", "dtype", "shape", "channels"), [
    ("native", Encoding.LZ4, "<u2", (12, 10), ()),
    ("dectris-v1", Encoding.LZ4, "<u2", (12, 10), ()),
    ("dectris-v1", Encoding.BSLZ4, "<u4", (12, 10), ()),
    ("dectris-v2", Encoding.LZ4_BLOCKS, "<u1", (12, 10), ()),
    ("dectris-v2", Encoding.BSLZ4, "<u2", (12, 10), ("threshold_1", "threshold_2")),
    ("dectris-v2", Encoding.RAW, "<u4", (12, 10), ("threshold_1", "threshold_2", "difference")),
    ("merlin", Encoding.RAW_BIG_ENDIAN, "<u2", (256, 256), ()),
    ("merlin", Encoding.MERLIN_12BIT, "<u2", (256, 256), ()),
    ("merlin", Encoding.MERLIN_QUAD_1BIT, "<u1", (512, 512), ()),
])  # fmt: skip
async def test_every_protocol_is_replayed_as_it_came(
    protocol: str,
    encoding: Encoding,
    dtype: str,
    shape: tuple[int, int],
    channels: tuple[str, ...],
    tmp_path: Path,
) -> None:
    sent = spoken(protocol, encoding, dtype, shape, channels)
    start, blocks = sent[0], [item for item in sent if isinstance(item, FrameBlock)]
    assert isinstance(start, SeriesStart)
    assert sum(map(len, blocks)) == 13
    assert blocks[0].exposed_ns is not None or protocol == "native"
    path = tmp_path / "recording.h5"
    with Recorder(path, start, protocol, "1") as recorder:
        for block in blocks:
            recorder.write(block)
        assert recorder.damaged == (0 if protocol == "merlin" else 2)
        recorder.end(sent[-1] if isinstance(sent[-1], SeriesEnd) else None)
    async with replaying(path) as (endpoint, task):
        again = await patiently(heard(endpoint, protocol))
        assert await patiently(task) == 13
    assert isinstance(again[-1], SeriesEnd)
    assert (again[0], again[-1]) == (start, sent[-1])
    assert frames_heard(again) == frames_heard(sent)
    if start.pixel_mask is not None:
        np.testing.assert_array_equal(again[0].pixel_mask, start.pixel_mask)


async def test_misbehaviour_comes_again_with_a_replay(tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    wrong = Misbehaviour(drop=0.05, duplicate=0.1, reorder=0.2, corrupt=0.05, seed=9)
    async with serving(misbehaviour=wrong) as (endpoint, _):
        live, _ = await run_session(live_options(endpoint, record=path))
    async with replaying(path) as (endpoint, _):
        again, _ = await run_session(live_options(endpoint))
    assert live.result is not None
    assert again.result is not None
    assert again.result.counters == live.result.counters
    assert_same_object(again.result, live.result)


@pytest.mark.parametrize("speed", [1.0, 1e9])
async def test_recorded_time(speed: float, tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    await recorded(path, rate=1000.0)
    with open_recording(path) as recording:
        took = recording.duration_s
    assert took > 0.15
    loop = asyncio.get_running_loop()
    async with replaying(path, speed=speed) as (endpoint, _):
        began = loop.time()
        again = await heard(endpoint)
        elapsed = loop.time() - began
    assert len(payloads_of(again)) == FRAMES
    if speed == 1.0:
        assert elapsed > 0.9 * took
    else:
        assert elapsed < took + 5.0


async def test_a_recording_without_an_end_is_replayed_without(tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    async with serving(misbehaviour=Misbehaviour(stop_after=100)) as (endpoint, _):
        done = await patiently(record_stream([endpoint], path, timeout_s=0.5))
    lost = FRAMES - 100
    assert done == Recorded(100, f"nothing came for 0.5 s, and no end message; {lost} of {FRAMES} frames did not come")
    async with replaying(path) as (endpoint, task):
        session, _ = await run_session(live_options(endpoint, series_timeout_s=0.5))
        assert await patiently(task) == 100
    assert "no end message" in session.incomplete
    assert session.result is not None
    assert session.result.counters.received == 100


async def test_a_replay_to_subscribers(tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    await recorded(path)
    # A publisher does not wait for its subscribers; whoever is there from the start must hear everything.
    async with replaying(path, pattern="pub") as (endpoint, _):
        session, _ = await run_session(live_options(endpoint, pattern="sub", timeout_s=2.0))
    assert session.result is not None
    assert session.result.counters.received == FRAMES


async def test_missing_frames_are_told(tmp_path: Path) -> None:
    done = await recorded(tmp_path / "recording.h5", misbehaviour=Misbehaviour(drop=0.5, seed=1))
    assert done.incomplete == f"{FRAMES - done.frames} of {FRAMES} frames did not come"


async def test_early_frames_and_those_of_others(tmp_path: Path) -> None:
    frames = all_frames()
    async with PlainSender() as sender:
        recording = asyncio.create_task(record_stream([sender.endpoint], tmp_path / "recording.h5", timeout_s=10.0))
        await sender.scan(frames, range(10), "A")
        await sender.start("A")
        await sender.frames([b"x"], series="B")
        await sender.raw(b"junk")
        await sender.scan(frames, range(10, 100), "A")
        await sender.start("B")
        await sender.frames([frames[0].tobytes()] * 3, series="B")
        await sender.end("B")
        done = await patiently(recording)
    # The newest is the one that is wanted; what there was of the other one is kept.
    assert done == Recorded(4, f"{FRAMES - 4} of {FRAMES} frames did not come")
    with open_recording(tmp_path / "recording.h5") as file:
        assert (file.start.series, file.frames, file.complete) == ("B", 4, True)
    with open_recording(tmp_path / "recording-aborted-1.h5") as file:
        assert (file.start.series, file.frames, file.complete) == ("A", 100, False)
        assert file.undecodable_messages == 1


async def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    async with serving() as (endpoint, _):
        await patiently(record_stream([endpoint], tmp_path / "r.h5", progress=lambda *now: told.append(now)))
    assert told[-1] == (FRAMES, FRAMES)
    told.clear()
    async with replaying(tmp_path / "r.h5", progress=lambda *now: told.append(now)) as (endpoint, _):
        await heard(endpoint)
    assert told[-1] == (FRAMES, FRAMES)
    assert told == sorted(told)  # type: ignore[type-var]


async def test_an_existing_file_is_refused_before_anything_is_received(tmp_path: Path) -> None:
    path = tmp_path / "recording.h5"
    path.write_bytes(b"precious")
    with pytest.raises(DataFileError, match="exists already; recordings are never overwritten"):
        await record_stream([ANY_PORT], path)
    assert path.read_bytes() == b"precious"


async def test_nobody_to_record(tmp_path: Path) -> None:
    async with PlainSender() as sender:
        with pytest.raises(ConnectionFailed, match=r"nothing came from .* within 0\.3 s"):
            await patiently(record_stream([sender.endpoint], tmp_path / "r.h5", timeout_s=0.3))
    assert not (tmp_path / "r.h5").exists()


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    async with serving() as (endpoint, _):
        done = await patiently(record_stream([endpoint], tmp_path / "no" / "r.h5"))
    assert done == Recorded(FRAMES)
    with pytest.raises(DataFileError, match="is not a folder"):  # at once, and not when the series begins
        await patiently(record_stream(["tcp://127.0.0.1:9"], tmp_path / "no" / "r.h5" / "r.h5"))


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
async def test_a_speed_that_is_none_is_refused(speed: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="speed must be positive"):
        await replay_recording(tmp_path / "r.h5", ANY_PORT, speed=speed)


async def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="no such file"):
        await replay_recording(tmp_path / "nothing.h5", ANY_PORT)
    with pytest.raises(DataFileError, match="a recording by liveptycho was expected"):
        await replay_recording(scan_file(tmp_path / "scan.h5"), ANY_PORT)


async def test_a_port_in_use(tmp_path: Path) -> None:
    await recorded(tmp_path / "r.h5")
    async with PlainSender() as sender:
        with pytest.raises(ConnectionFailed, match="port is in use by another program"):
            await replay_recording(tmp_path / "r.h5", sender.endpoint)
