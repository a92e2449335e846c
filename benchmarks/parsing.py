"""Reading messages, before any decompression: single-frame images, a batch at a time; the native protocol's also with
64 frames each.

Baselines, on the same messages in the same run, which still leave the payloads to be found: ``cbor2.loads`` of each for
DECTRIS Stream V2, ``json.loads`` of an image's three texts for Stream V1, ``msgpack.unpackb`` of the header for the
native protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from time import perf_counter

import cbor2
import msgpack
import numpy as np

from benchmarks.data import DETECTOR_SHAPE, frames, table
from detectors import codec
from detectors.messages import (
    Encoding,
    FrameBlock,
    OutgoingMessage,
    ReceivedBatch,
    SeriesStart,
    StreamDecoder,
    StreamEncoder,
)
from detectors.protocols import dectris_v1, dectris_v2, native

#: messages a batch: what a receiver has in hand at a low rate, and when it is busy
BATCHES = (64, 512, 4096)
CHANNELS = (1, 4)
FRAMES_PER_MESSAGE = (1, 64)

_POOL = 64
_DTYPE = np.dtype("<u2")

_Message = Sequence[bytes]
_Baseline = Callable[[_Message], object]


def run(quick: bool) -> str:
    """The sections of the report."""
    sizes = BATCHES[:-1] if quick else BATCHES
    repeats = 11 if quick else 31
    return "\n\n".join([_stream_v2(sizes, repeats), _stream_v1(sizes, repeats), _native(sizes, repeats)])


def _stream_v2(sizes: Sequence[int], repeats: int) -> str:
    rows = []
    for channels in CHANNELS:
        for size in sizes:
            messages = _packed(dectris_v2.Encoder(), size, channels)
            ours, theirs = _microseconds(dectris_v2.Decoder(), messages, lambda parts: cbor2.loads(parts[0]), repeats)
            rows.append((size, channels, ours, theirs, theirs / ours))
            print(f"  V2: {size} messages, {channels} channels: {ours:.2f} us a message", flush=True)
    head = ("messages a batch", "channels", "ours, µs a message", "cbor2.loads, µs", "cbor2/ours")
    return f"## Reading messages of DECTRIS Stream V2\n\n{table(head, rows)}"


def _stream_v1(sizes: Sequence[int], repeats: int) -> str:
    rows = []
    for size in sizes:
        messages = _packed(dectris_v1.Encoder(), size)
        ours, theirs = _microseconds(dectris_v1.Decoder(), messages, _json_loads, repeats)
        rows.append((size, ours, theirs, theirs / ours))
        print(f"  V1: {size} messages: {ours:.2f} us a message", flush=True)
    head = ("messages a batch", "ours, µs a message", "json.loads, µs", "json/ours")
    return f"## Reading messages of DECTRIS Stream V1\n\n{table(head, rows)}"


def _native(sizes: Sequence[int], repeats: int) -> str:
    rows = []
    for per_message in FRAMES_PER_MESSAGE:
        for size in sizes:
            if size * per_message > max(BATCHES) * 8:
                continue
            messages = _packed(native.Encoder(), size, per_message=per_message)
            ours, theirs = _microseconds(native.Decoder(), messages, lambda parts: msgpack.unpackb(parts[0]), repeats)
            rows.append((size, per_message, ours, theirs, theirs / ours))
            print(f"  native: {size} messages of {per_message} frames: {ours:.2f} us a message", flush=True)
    head = ("messages a batch", "frames a message", "ours, µs a message", "msgpack.unpackb, µs", "msgpack/ours")
    return f"## Reading messages of the native protocol\n\n{table(head, rows)}"


def _packed(encoder: StreamEncoder, count: int, channels: int = 1, per_message: int = 1) -> list[_Message]:
    """``count`` messages of frames as they are sent."""
    names = tuple(f"threshold_{c + 1}" for c in range(channels))
    pool = [codec.encode(frame, Encoding.BSLZ4) for frame in frames(_POOL, _DTYPE.str)]
    encoder.start(SeriesStart(1, DETECTOR_SHAPE, _DTYPE, channels=names))
    sent: list[OutgoingMessage] = []
    # Where a message holds one frame, an encoder makes as many messages as it is given frames.
    at_once = per_message if isinstance(encoder, native.Encoder) else count
    for first in range(0, count * per_message, at_once):
        payloads = [pool[i % _POOL] for i in range(first, first + at_once)]
        others = [(Encoding.BSLZ4, payloads)] * (channels - 1)
        times = range(20 * first + 1, 20 * (first + at_once) + 1, 20)
        sent += encoder.frames(1, first, payloads, Encoding.BSLZ4, others=others, exposed_ns=times)
    return [[bytes(part) for part in message] for message in sent]


def _json_loads(parts: _Message) -> object:
    return json.loads(parts[0]), json.loads(parts[1]), json.loads(parts[3])


def _microseconds(
    decoder: StreamDecoder, messages: list[_Message], baseline: _Baseline, repeats: int
) -> tuple[float, float]:
    """Median times a message: ours, and the baseline's."""
    batch = ReceivedBatch.from_messages(messages)
    blocks = decoder.feed(batch)
    if len(blocks) != 1 or not isinstance(blocks[0], FrameBlock) or len(blocks[0]) % len(messages):
        raise RuntimeError("the messages were not read as one block of frames")
    times: list[list[float]] = [[], []]
    for _ in range(repeats):  # in turns, so that a busy moment of the machine hits both
        began = perf_counter()
        decoder.feed(batch)
        between = perf_counter()
        for parts in messages:
            baseline(parts)
        times[0].append(between - began)
        times[1].append(perf_counter() - between)
    ours, theirs = (float(np.median(each)) / len(messages) * 1e6 for each in times)
    return ours, theirs


if __name__ == "__main__":
    print(run(quick=False))
