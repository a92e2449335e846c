"""Decoding frames into bright-field rows and sums, on one core: our compiled decoder.

Baseline, on the same payloads in the same run: the codec module's decoding of each frame (hdf5plugin's bitshuffle and
LZ4; raw pixels cost it nothing), then the bright-field pixels by ``numpy.take``. It makes none of the sums.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import thread_time

import numpy as np

from benchmarks.data import BF_RADIUS_PX, DETECTOR_SHAPE, frames, table
from detectors import codec
from detectors.messages import Encoding, FrameBlock
from stream.decode import FrameDecoder

_FRAMES = 256


def run(quick: bool) -> str:
    """The section of the report."""
    rows = []
    for dtype in ("<u1", "<u2"):
        for encoding in (Encoding.BSLZ4, Encoding.RAW):
            everything, bright_field, theirs = _microseconds(dtype, encoding, repeats=9 if quick else 31)
            name = f"{np.dtype(dtype).name}, {'bslz4' if encoding is Encoding.BSLZ4 else 'raw'}"
            rows.append((name, everything, bright_field, theirs, theirs / everything, theirs / bright_field))
            print(f"  {name}: {everything:.2f} us a frame, bright field only {bright_field:.2f}", flush=True)
    head = (
        "frames 192x192",
        "all channels, µs a frame",
        "bright field only, µs",
        "decode and take, µs",
        "that/all channels",
        "that/bright field",
    )
    return f"## Decoding, one core\n\n{table(head, rows)}"


def _microseconds(dtype: str, encoding: Encoding, repeats: int) -> tuple[float, float, float]:
    """Median CPU times a frame: with all sums, with bright field and total only, and the baseline's."""
    kind = np.dtype(dtype)
    payloads = [codec.encode(frame, encoding) for frame in frames(_FRAMES, dtype)]
    sizes = np.array([len(payload) for payload in payloads], np.int64)
    slab = np.frombuffer(bytearray(b"".join(payloads)), np.uint8)
    block = FrameBlock(1, encoding, np.arange(_FRAMES), np.cumsum(sizes) - sizes, sizes, slab)
    row, column = np.indices(DETECTOR_SHAPE) - (np.array(DETECTOR_SHAPE) / 2)[:, None, None]
    bf_pixels = np.flatnonzero(np.hypot(row, column) < BF_RADIUS_PX)
    good, targets = np.ones(DETECTOR_SHAPE, bool), np.arange(_FRAMES)
    ours, theirs = np.zeros((2, _FRAMES, len(bf_pixels)), kind)
    with ThreadPoolExecutor(1) as executor:
        decoders = [
            FrameDecoder(DETECTOR_SHAPE, kind, bf_pixels, good, executor, 1, moments=wanted, pattern=wanted)
            for wanted in (True, False)
        ]
        sums = np.zeros((_FRAMES, 4), decoders[0].sums_dtype)
        times = np.empty((repeats + 1, 3))
        for repeat in times:  # in turns, so that a busy moment of the machine hits all
            for way, decoder in enumerate(decoders):
                began = thread_time()
                decoder.decode(block, targets, ours, sums)
                repeat[way] = thread_time() - began
            began = thread_time()
            for number, payload in enumerate(payloads):
                codec.decode(payload, encoding, DETECTOR_SHAPE, kind).take(bf_pixels, out=theirs[number])
            repeat[2] = thread_time() - began
            if not np.array_equal(ours, theirs):
                raise RuntimeError("the two decoders do not agree")
    everything, bright_field, baseline = np.median(times[1:], axis=0) / _FRAMES * 1e6
    return float(everything), float(bright_field), float(baseline)


if __name__ == "__main__":
    print(run(quick=False))
