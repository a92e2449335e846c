"""End to end through ZeroMQ: a sender's process to a live session's finished image, against what the socket can carry.

Baselines, on the same messages in the same run: a loop that receives and throws away (what libzmq's Python binding can
do at most), and a receiver written the obvious way (one ``await`` a frame, unpack with the codec, take with NumPy).
"""

from __future__ import annotations

import asyncio
import statistics
import time

import msgpack
import numpy as np
import zmq
import zmq.asyncio

from benchmarks.data import DETECTOR_SHAPE, setup, table
from benchmarks.sending import Sender
from detectors import codec
from detectors.messages import Encoding
from detectors.native import ENCODINGS
from stream.session import Session, SessionOptions

#: dtype, encoding, frames a message
CASES = (
    ("u1", Encoding.BSLZ4, 1),
    ("u1", Encoding.BSLZ4, 64),
    ("u1", Encoding.RAW, 1),
    ("u1", Encoding.RAW, 64),
    ("u2", Encoding.BSLZ4, 1),
    ("u2", Encoding.RAW, 1),
)


async def session_seconds(sender: Sender, passes: int = 1) -> float:
    """From the first frame's departure to the last row in the image; raises when a frame is lost."""
    address = sender.begin(passes)
    async with Session(SessionOptions([address])) as session:
        while session.reconstruction is None or session.reconstruction.engine is None:
            await asyncio.sleep(1e-3)
        engine = session.reconstruction.engine
        sender.go(passes)
        while engine.passes_done < passes or engine.closed_rows:
            await asyncio.sleep(2e-3)
        await asyncio.to_thread(engine.object)  # waits for the rows that are being contracted
        ended = time.time()
        await session.wait()
    expected = sender.frames * passes
    counters = session.result.counters.as_dict()
    if counters != {**dict.fromkeys(counters, 0), "received": expected}:
        raise RuntimeError(f"frames went astray: {counters}")
    return ended - sender.done()[0]
