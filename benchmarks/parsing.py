"""Reading messages of DECTRIS Stream V2, before any decompression: single-frame images, a batch at a time.

Baseline, on the same messages in the same run: ``cbor2.loads`` of each, which still leaves the payloads to be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import cbor2
import numpy as np

from benchmarks.data import DETECTOR_SHAPE, frames, table
from detectors import codec
from detectors.messages import Encoding, FrameBlock, ReceivedBatch, SeriesStart
from detectors.protocols.dectris_v2 import Decoder, Encoder

#: messages a batch: what a receiver has in hand at a low rate, and when it is busy
BATCHES = (64, 512, 4096)
CHANNELS = (1, 4)

_POOL = 64
_DTYPE = np.dtype("<u2")


def run(quick: bool) -> str:
    """The section of the report."""
    rows = []
    for channels in CHANNELS:
        for size in BATCHES[:-1] if quick else BATCHES:
            ours, theirs = _microseconds(_messages(size, channels), repeats=11 if quick else 31)
            rows.append((size, channels, ours, theirs, theirs / ours))
            print(f"  {size} messages, {channels} channels: {ours:.2f} us a message", flush=True)
    head = ("messages a batch", "channels", "ours, µs a message", "cbor2.loads, µs", "cbor2/ours")
    return f"## Reading messages of DECTRIS Stream V2\n\n{table(head, rows)}"


def _messages(count: int, channels: int) -> list[Sequence[bytes]]:
    names = tuple(f"threshold_{c + 1}" for c in range(channels))
    pool = [codec.encode(frame, Encoding.BSLZ4) for frame in frames(_POOL, _DTYPE.str)]
    payloads = [pool[i % _POOL] for i in range(count)]
    encoder = Encoder()
    encoder.start(SeriesStart(1, DETECTOR_SHAPE, _DTYPE, channels=names))
    others = [(Encoding.BSLZ4, payloads)] * (channels - 1)
    return [
        [bytes(part) for part in message]
        for message in encoder.frames(
            1, 0, payloads, Encoding.BSLZ4, others=others, exposed_ns=range(0, count * 20, 20)
        )
    ]


def _microseconds(messages: list[Sequence[bytes]], repeats: int) -> tuple[float, float]:
    """Median times a message: ours, and cbor2's."""
    batch = ReceivedBatch.from_messages(messages)
    decoder = Decoder()
    (block,) = decoder.feed(batch)
    if not isinstance(block, FrameBlock) or len(block) != len(messages):
        raise RuntimeError("the messages were not read as one block of frames")
    times: list[list[float]] = [[], []]
    for _ in range(repeats):  # in turns, so that a busy moment of the machine hits both
        began = perf_counter()
        decoder.feed(batch)
        between = perf_counter()
        for (message,) in messages:
            cbor2.loads(message)
        times[0].append(between - began)
        times[1].append(perf_counter() - between)
    ours, theirs = (float(np.median(each)) / len(messages) * 1e6 for each in times)
    return ours, theirs


if __name__ == "__main__":
    print(run(quick=False))
