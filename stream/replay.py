"""Replay: a recorded stream is sent again, in recorded time, scaled, or as fast as the receiver takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from detectors.errors import ConfigurationError
from detectors.messages import FrameBlock
from detectors.protocols.registry import protocol_named
from detectors.simulator.wire import Wire, open_wire, send
from stream.recording import Recording, open_recording

#: Frames that came together go out in messages of at most so many.
_FRAMES_PER_MESSAGE = 64

#: A publisher waits for its first subscriber for at most so long [s].
_SUBSCRIBER_WAIT_S = 5.0


async def replay_recording(
    path: Path,
    address: str,
    *,
    speed: float | None = 1.0,
    pattern: str = "push",
    progress: Callable[[int, int | None], None] | None = None,
    ready: Callable[[str], object] | None = None,
    linger_s: float = 60.0,
) -> int:
    """Send a recording from ``address`` (bound); returns how many frames were delivered.

    ``speed``: factor on the recorded speed, None for as fast as possible. Frames go out in the order in which they
    came, doubled and damaged ones included, their payloads byte for byte; the end message only if it had come.
    ``ready`` is called with the real endpoint, ``progress`` with (frames sent, frames in all). Raises
    ``DataFileError``, ``ConnectionFailed``, or ``ConfigurationError`` for a speed that is not positive.
    """
    if speed is not None and not speed > 0:
        raise ConfigurationError(f"the speed must be positive, got {speed!r}")
    with open_recording(path) as recording:
        wire = open_wire(protocol_named(recording.protocol), address, pattern=pattern)
        try:
            if ready is not None:
                ready(wire.endpoint)
            await wire.wait_for_subscriber(_SUBSCRIBER_WAIT_S)
            sent = await _send(recording, wire, speed, progress)
            await wire.flush(linger_s)
        finally:
            wire.close()
    return sent


async def _send(
    recording: Recording, wire: Wire, speed: float | None, progress: Callable[[int, int | None], None] | None
) -> int:
    encoder = protocol_named(recording.protocol).encoder()
    series = recording.start.series
    announced = encoder.start(recording.start)  # also where the recorded one is sent: encoders remember shape and type
    for message in [list(recording.start.header)] if recording.start.header else announced:
        await send(wire, message)
    loop = asyncio.get_running_loop()
    began, first_ns = loop.time(), None
    sent = 0
    blocks = recording.blocks(keep_batches=speed is not None)
    while (block := await asyncio.to_thread(next, blocks, None)) is not None:
        if speed is not None:
            first_ns = block.time_ns if first_ns is None else first_ns
            await asyncio.sleep(max(0.0, began + (block.time_ns - first_ns) * 1e-9 / speed - loop.time()))
        for run in _consecutive(block):
            others = [(other.encoding, _payloads(other)) for other in run.others]
            exposed_ns = None if run.exposed_ns is None else run.exposed_ns.tolist()
            for message in encoder.frames(
                series, int(run.indices[0]), _payloads(run), run.encoding, others=others, exposed_ns=exposed_ns
            ):
                await send(wire, message)
        sent += len(block)
        if progress is not None:
            progress(sent, recording.frames)
    if recording.end is not None:
        for message in [list(recording.end.header)] if recording.end.header else encoder.end(series):
            await send(wire, message)
    return sent


def _payloads(block: FrameBlock) -> list[memoryview]:
    return [block.slab[o : o + n].data for o, n in zip(block.offsets, block.sizes, strict=True)]


def _consecutive(block: FrameBlock) -> Iterator[FrameBlock]:
    """Runs of frames with consecutive indices, as one message can hold them."""
    breaks = np.flatnonzero(np.diff(block.indices) != 1) + 1
    for part in np.split(np.arange(len(block)), breaks):
        for start in range(0, len(part), _FRAMES_PER_MESSAGE):
            yield block.take(part[start : start + _FRAMES_PER_MESSAGE])
