"""``python -m benchmarks.endurance [--minutes 60]``: continuous scanning at full speed; nothing may grow.

A sender that never pauses, one endless series through a live session that also makes and publishes its images, and the
memory of the session's process looked at all the while.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.data import table
from benchmarks.processes import MB, held_bytes
from benchmarks.report import Section
from benchmarks.sending import Sender, Stream
from benchmarks.sessions import layers
from stream.session import Session
from stream.session_options import SessionOptions

_STREAM = Stream((256, 256), protocol="dectris-v2")
_QUICK = Stream((64, 256), protocol="dectris-v2")
#: Memory is looked at so often [s].
_EVERY_S = 10.0
#: The first passes, in which caches fill, are left out of the slope.
_WARM_UP_PASSES = 3


def _session(pipe: Connection, address: str, stream: Stream, every_s: float) -> None:
    async def live() -> tuple[list[tuple[float, int, int]], dict[str, int], int]:
        samples: list[tuple[float, int, int]] = []
        options = SessionOptions(
            [address], stream.protocol, layers=layers(stream), passes=None, publish="tcp://127.0.0.1:*"
        )
        async with Session(options) as session:
            while session.reconstruction is None or session.reconstruction.engine is None:  # noqa: ASYNC110
                await asyncio.sleep(1e-2)
            engine = session.reconstruction.engine
            pipe.send(engine.plan.total)
            ended = asyncio.create_task(session.wait())
            while not ended.done():
                samples.append((time.time(), held_bytes(), engine.counters.received))
                await asyncio.wait([ended], timeout=every_s)
            await ended
        assert session.result is not None
        return samples, session.result.counters.as_dict(), engine.passes_done

    pipe.send(asyncio.run(live()))


def endure(minutes: float, stream: Stream = _STREAM) -> dict[str, Any]:
    """Scan for so long. Raises ``RuntimeError`` when a frame is lost."""
    every_s = min(_EVERY_S, minutes)  # sixty looks at least
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    with Sender(stream) as sender:
        address = sender.begin(None)
        session = context.Process(target=_session, args=(other, address, stream, every_s), daemon=True)
        session.start()
        other.close()
        planned = pipe.recv()
        sender.go(None)
        ending = threading.Timer(60 * minutes, sender.stop)
        ending.start()
        try:
            samples, counters, passes = pipe.recv()
        finally:
            ending.cancel()
            session.join(10)
            session.kill()
        sent = sender.done()
    if counters != {**dict.fromkeys(counters, 0), "received": sent.frames}:
        raise RuntimeError(f"frames went astray: {counters}, {sent.frames} were sent")
    when, held, received = (np.array(column, float) for column in zip(*samples, strict=True))
    steady = received >= _WARM_UP_PASSES * stream.frames
    if steady.sum() < 2:
        raise RuntimeError(f"{passes} passes in {minutes:g} minutes tell nothing; scan for longer")
    # MB in an hour, by a straight line through the samples.
    slope = np.polyfit(when[steady] / 3600 - when[0] / 3600, held[steady] / MB, 1)[0]
    return {
        "scan": f"{stream.scan_shape[0]}x{stream.scan_shape[1]}", "minutes": (when[-1] - when[0]) / 60,
        "frames": sent.frames, "passes": passes, "samples": len(samples),
        "rate": sent.frames / (sent.ended - sent.began), "first MB": held[steady][0] / MB, "last MB": held[-1] / MB,
        "max MB": held.max() / MB, "slope": float(slope), "planned MB": planned / MB,
        "curve": [((t - when[0]) / 60, b / MB, n) for t, b, n in zip(when, held, received, strict=True)],
    }  # fmt: skip


def run(quick: bool, long: bool = False) -> Section:
    """The section of the report."""
    return _section(endure(0.3 if quick else 60 if long else 1, _QUICK if quick else _STREAM))


def _section(went: dict[str, Any]) -> Section:
    text = table(
        ("minutes", "frames", "passes", "frames/s", "after warm-up, MB", "at the end, MB", "most, MB", "slope, MB/h",
         "plan, MB"),
        [[went[key] for key in ("minutes", "frames", "passes", "rate", "first MB", "last MB", "max MB", "slope",
                                "planned MB")]],
    )  # fmt: skip
    return Section(
        "## Endurance: continuous scanning at full speed\n\n"
        f"{text}\n\n"
        f"{went['scan']} scan, 192x192 u8 bslz4, Stream V2, an endless series, images published; resident memory of "
        f"the session's process, {went['samples']} times. The slope is that of a straight line through all that came "
        f"after the first {_WARM_UP_PASSES} passes; over a minute it says little (`make bench-long` takes an hour). No "
        "frame was lost.",
        {"endurance": [went]},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    print(_section(endure(parser.parse_args().minutes)).text)
