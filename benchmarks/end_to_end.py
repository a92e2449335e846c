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

from benchmarks.data import DETECTOR_SHAPE, setup, start, table
from benchmarks.sending import Sender
from detectors import codec
from detectors.messages import Encoding
from detectors.protocols.native import ENCODINGS
from stream.config import Layer
from stream.session import Session
from stream.session_options import SessionOptions

#: dtype, encoding, frames a message, protocol
CASES = (
    ("u1", Encoding.BSLZ4, 1, "dectris-v2"),
    ("u1", Encoding.BSLZ4, 1, "native"),
    ("u1", Encoding.BSLZ4, 64, "native"),
    ("u1", Encoding.RAW, 1, "native"),
    ("u1", Encoding.RAW, 64, "native"),
    ("u2", Encoding.BSLZ4, 1, "native"),
    ("u2", Encoding.BSLZ4, 1, "dectris-v2"),
    ("u2", Encoding.RAW, 1, "native"),
)

#: What a vendor's stream does not say; the native one says it itself.
_OPTICS = Layer.of("flag", {**start((256, 256), "u1").settings})


async def session_seconds(sender: Sender, protocol: str = "native", passes: int = 1) -> float:
    """From the first frame's departure to the last row in the image; raises when a frame is lost."""
    address = sender.begin(passes)
    async with Session(SessionOptions([address], protocol, layers=[_OPTICS])) as session:
        while session.reconstruction is None or session.reconstruction.engine is None:  # noqa: ASYNC110
            await asyncio.sleep(1e-3)
        engine = session.reconstruction.engine
        await asyncio.to_thread(engine.wait_until_ready)  # what can be sustained, without the set-up
        sender.go(passes)
        while engine.passes_done < passes or engine.closed_rows:  # noqa: ASYNC110
            await asyncio.sleep(2e-3)
        await asyncio.to_thread(engine.object)  # waits for the rows that are being contracted
        ended = time.time()
        await session.wait()
    assert session.result is not None
    expected = sender.frames * passes
    counters = session.result.counters.as_dict()
    if counters != {**dict.fromkeys(counters, 0), "received": expected}:
        raise RuntimeError(f"frames went astray: {counters}")
    return ended - sender.done()[0]


def limit_seconds(sender: Sender) -> float:
    """The same messages, received in a plain loop and thrown away."""
    address = sender.begin()
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.connect(address)
        socket.recv_multipart()
        sender.go()
        received, last = 0, False
        while not last:
            socket.recv(copy=False)
            last = not socket.get(zmq.RCVMORE)
            if last:
                received += 1
                last = received == sender.messages
        ended = time.time()
        socket.close(linger=0)
    return ended - sender.done()[0]


async def naive_seconds(sender: Sender, dtype: str, messages: int) -> float:
    """The first messages with one ``await`` each, unpacked frame by frame; no reconstruction."""
    geometry = setup((sender.rows, sender.columns), 1250, dtype=dtype).geometry
    side = geometry.shape[0]
    row, column = np.divmod(geometry.bf_pixels, side)
    corner = (np.array(DETECTOR_SHAPE) - side) // 2
    pixels = (row + corner[0]) * DETECTOR_SHAPE[1] + column + corner[1]
    rows = np.empty((sender.columns, len(pixels)), np.float32)
    address = sender.begin()
    with zmq.asyncio.Context() as context, context.socket(zmq.PULL) as socket:
        socket.connect(address)
        await socket.recv_multipart()
        sender.go(limit=messages)
        for _ in range(messages):
            head, payload = await socket.recv_multipart()
            header = msgpack.unpackb(head)
            at = 0
            for i, size in enumerate(header["sizes"]):
                encoding = ENCODINGS[header["encoding"]]
                frame = codec.decode(payload[at : at + size], encoding, DETECTOR_SHAPE, np.dtype(dtype))
                rows[(header["first"] + i) % len(rows)] = frame.ravel()[pixels]
                at += size
        ended = time.time()
        socket.close(linger=0)
    return ended - sender.done()[0]


def run(quick: bool) -> str:
    """The section of the report."""
    scan = (64, 256) if quick else (256, 256)
    repeats = 1 if quick else 3
    rows = []
    for dtype, encoding, per_message, protocol in CASES[:3] if quick else CASES:
        with Sender(scan, dtype, encoding, per_message, protocol) as sender:
            asyncio.run(session_seconds(sender, protocol))  # the first one also fills caches
            ours, limit = [], []
            for _ in range(repeats):  # in turns, so that a busy moment of the machine hits both
                ours.append(sender.frames / asyncio.run(session_seconds(sender, protocol)))
                limit.append(sender.frames / limit_seconds(sender))
            few = max(1, (4096 if quick else 8192) // per_message)
            naive = float("nan")
            if protocol == "native":
                naive = few * per_message / asyncio.run(naive_seconds(sender, dtype, few))
        mine, most = statistics.median(ours), statistics.median(limit)
        name = f"{protocol} u{8 * np.dtype(dtype).itemsize} {encoding.name.lower()}"
        rows.append((name, per_message, mine, min(ours), max(ours), most, naive, mine / most, mine / naive))
        print(f"  {name} x{per_message}: {mine:,.0f} frames/s", flush=True)
    head = ("192x192", "frames a message", "ours, frames/s", "slowest", "fastest", "receive and discard",
            "naive, no image", "ours/discard", "ours/naive")  # fmt: skip
    return (
        f"## End to end: {scan[0]}x{scan[1]} scan, about 1,250 BF pixels, in focus\n\n{table(head, rows)}\n\n"
        "Sender and session are two processes on the same cores. No frame was missing, doubled or damaged in any run.\n"
        "The naive receiver gathers bright-field pixels and computes nothing else: no sums, no image."
    )


if __name__ == "__main__":
    print(run(quick=False))
