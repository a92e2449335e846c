"""A scan's frames as the messages of a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detectors import codec
from detectors.messages import Encoding, SeriesStart
from detectors.protocols.registry import protocol_named


def packed(data: np.ndarray) -> list[bytes]:
    """All frames of (scan rows, columns, detector rows, columns), bitshuffle-LZ4."""
    return [codec.encode(frame, Encoding.BSLZ4) for frame in data.reshape(-1, *data.shape[2:])]


def series(data: np.ndarray) -> SeriesStart:
    """The start of a series of these frames, which says nothing of the optics."""
    return SeriesStart(1, data.shape[2:], data.dtype, frames=data.shape[0] * data.shape[1])


def save_v1_stream(path: Path, data: np.ndarray) -> int:
    """Write the Stream V1 messages of a scan as the simulator wants them; returns the largest frame in bytes.

    Each part is preceded by its length, a little-endian int64.
    """
    encoder = protocol_named("dectris-v1").encoder()
    payloads = packed(data)
    header, end = encoder.start(series(data)), encoder.end(1)
    # The simulator wants the two parts of a basic header, without the user's text behind them.
    messages = [header[0][:2], *encoder.frames(1, 0, payloads, Encoding.BSLZ4), *end]
    with path.open("wb") as file:
        for part in (part for message in messages for part in message):
            file.write(len(part).to_bytes(8, "little"))
            file.write(part)
    return max(map(len, payloads))
