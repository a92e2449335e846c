"""docs/protocol.md is what others write their senders from: its bytes and its example must be right."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import numpy as np

import stream
from detectors import codec
from detectors.messages import Encoding, FrameBlock, ReceivedBatch, SeriesStart
from detectors.protocols.native import Decoder as NativeDecoder

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "protocol.md").read_text(encoding="utf-8")


def dump(after: str) -> list[bytes]:
    """The hexadecimal parts of the first indented block after a sentence; a new part begins at ``part N``."""
    lines = TEXT[TEXT.index(after) :].split("\n\n", 2)[1].splitlines()
    parts: list[bytes] = [b""]
    for line in lines:
        if re.match(r" +part [2-9]", line):
            parts.append(b"")
        text = re.sub(r"^ +(part \d)?", "", line)
        pairs = re.match(r"\s*((?:[0-9a-f]{2}(?:\s+|$))+)", text)
        assert pairs, line
        parts[-1] += bytes.fromhex(re.sub(r"\s", "", pairs[1]))
    return parts


def test_the_bytes_are_what_the_decoder_takes() -> None:
    batch = ReceivedBatch.from_messages([dump("start, `{"), dump("frames, `{")])
    start, block = NativeDecoder().feed(batch)
    assert isinstance(start, SeriesStart)
    assert isinstance(block, FrameBlock)
    assert (start.series, start.detector_shape, start.dtype, start.scan_shape) == (7, (2, 2), np.uint8, (2, 2))
    assert block.indices.tolist() == [2, 3]
    payloads = [block.slab[o : o + n].tolist() for o, n in zip(block.offsets, block.sizes, strict=True)]
    assert payloads == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_bslz4_vector_is_decoded() -> None:
    (payload,) = dump("A `bslz4` payload of the 3×3")
    frame = codec.decode(payload, Encoding.BSLZ4, (3, 3), np.dtype("<u2"))
    assert frame.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_example_is_short() -> None:
    assert len((DOCS / "send_frames.py").read_text(encoding="utf-8").splitlines()) < 40


async def test_the_example_is_reconstructed() -> None:
    async with stream.open_session("tcp://127.0.0.1:*", bind=True, timeout_s=30, series_timeout_s=30) as session:
        sender = await asyncio.create_subprocess_exec(
            sys.executable, str(DOCS / "send_frames.py"), session.endpoints[0]
        )
        result = await session.wait()
        assert await sender.wait() == 0
    assert result is not None
    assert result.counters.received == 32 * 32
    assert result.counters.missing == 0
    assert result.positions_received.all()
    # The "detector" saw a disk of radius 20 / 1.5 pixels and nothing else.
    assert result.images["dark_field"].max() == 0
    assert abs(result.images["bright_field"].mean() - 2 * np.pi * (20 / 1.5) ** 2) < 25
