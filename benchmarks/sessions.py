"""A live session fed by the sender of ``benchmarks.sending``, from start to end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import start
from benchmarks.sending import Sender, Sent, Stream
from stream.config import Layer, Settings
from stream.session import Session
from stream.session_options import SessionOptions

#: What a session makes: everything, or only what needs no pixel outside the bright-field disk.
ALL, BRIGHT = "all", "phase,bf"


def offered(channels: str) -> bool:
    """Whether this version can leave channels out."""
    return channels == ALL or "channels" in Settings.model_fields


def layers(stream: Stream, channels: str = ALL) -> list[Layer]:
    """The settings of a session; a vendor's stream does not say them, the native one does so itself."""
    settings: dict[str, Any] = {**start(stream.scan_shape, stream.dtype, shape=stream.shape).settings}
    if channels != ALL:
        settings["channels"] = channels
    return [Layer.of("flag", {**settings, "scan_shape": stream.scan_shape})]


@dataclass(frozen=True)
class Run:
    """How a session went: from the first frame's departure to the last row in the image [s], the CPU time of this
    process meanwhile [s], what the sender says, and the session's counters."""

    seconds: float
    cpu_s: float
    sent: Sent
    counters: dict[str, int]


async def scan(sender: Sender, *, channels: str = ALL, record: Path | None = None) -> Run:
    """One pass at full speed. Raises ``RuntimeError`` when a frame is lost, doubled or damaged."""
    stream = sender.stream
    address = sender.begin()
    options = SessionOptions([address], stream.protocol, layers=layers(stream, channels), record=record)
    async with Session(options) as session:
        engine = await engine_of(session, sender)
        cpu = time.process_time()
        sender.go()
        while engine.passes_done < 1 or engine.closed_rows:
            _require(session, sender)
            await asyncio.sleep(2e-3)
        if channels == ALL or "phase" in channels:
            await asyncio.to_thread(engine.object)  # waits for the rows that are being contracted
        ended, cpu = time.time(), time.process_time() - cpu
        await session.wait()
    assert session.result is not None
    counters = session.result.counters.as_dict()
    if counters != {**dict.fromkeys(counters, 0), "received": stream.frames}:
        raise RuntimeError(f"frames went astray: {counters}")
    sent = sender.done()
    return Run(ended - sent.began, cpu, sent, counters)


async def offer(sender: Sender, rate: float, buffer: int, *, channels: str = ALL, record: Path | None = None) -> Run:
    """One pass at ``rate`` frames/s from a detector that drops what does not fit into its ``buffer`` of frames."""
    stream = sender.stream
    address = sender.begin()
    options = SessionOptions([address], stream.protocol, layers=layers(stream, channels), record=record)
    async with Session(options) as session:
        await engine_of(session, sender)
        cpu = time.process_time()
        sender.go(rate=rate, buffer=buffer)
        await session.wait()
        ended, cpu = time.time(), time.process_time() - cpu
    assert session.result is not None
    sent, counters = sender.done(), session.result.counters.as_dict()
    if counters["received"] != sent.frames or counters["missing"] != sent.dropped:
        raise RuntimeError(f"{sent.frames} frames were sent and {sent.dropped} dropped by the sender; {counters}")
    return Run(ended - sent.began, cpu, sent, counters)


async def engine_of(session: Session, sender: Sender) -> Any:
    """The session's engine, once it has its kernels: what can be sustained, without the set-up."""
    while session.reconstruction is None or session.reconstruction.engine is None:
        _require(session, sender)
        await asyncio.sleep(1e-3)
    engine = session.reconstruction.engine
    await asyncio.to_thread(engine.wait_until_ready)
    return engine


def _require(session: Session, sender: Sender) -> None:
    if not sender.running:
        raise RuntimeError("the sender has failed")
    if session.snapshot.state == "failed":
        raise RuntimeError(f"the session has failed: {session.snapshot.message}")
