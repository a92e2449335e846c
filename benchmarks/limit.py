"""End to end through ZeroMQ, against the slowest of its own stages: how near we come to what the machine can do.

A sender's process to a live session's finished image, and in the same run each stage alone on all cores: the receiving
of the same messages, the decompression, the contraction's matrix products.
"""

from __future__ import annotations

import asyncio
import statistics
from typing import Any

from benchmarks.data import setup, table
from benchmarks.report import Section
from benchmarks.sending import Sender, Stream
from benchmarks.sessions import ALL, BRIGHT, offered, scan
from benchmarks.stages import CORES, Payloads, Stage, matrix_products, receive
from detectors.messages import Encoding

#: Ours over the slowest stage alone.
GOAL = 0.7
#: Frames/s of 192x192 u8 bslz4, Stream V2, one frame a message, on two cores that the sender shares.
GOAL_RATE = 80_000
#: What the fastest detector sends, frames/s by detector side.
DETECTOR_RATES = {192: 30_000, 96: 120_000}

#: detector side, dtype, encoding, (protocol, frames a message) ...
_V2, _SINGLE, _BATCH = ("dectris-v2", 1), ("native", 1), ("native", 64)
_CASES = (
    (192, "u1", Encoding.BSLZ4, (_V2, _SINGLE, _BATCH)),
    (192, "u2", Encoding.BSLZ4, (_V2, _SINGLE, _BATCH)),
    (96, "u1", Encoding.BSLZ4, (_V2, _SINGLE, _BATCH)),
    (192, "u1", Encoding.RAW, (_V2, _SINGLE, _BATCH)),
    (192, "u2", Encoding.RAW, (_V2, _SINGLE, _BATCH)),
)
_BF_PIXELS = 1250


def streams(scan_shape: tuple[int, int]) -> list[Stream]:
    """Every case."""
    return [
        Stream(scan_shape, dtype, encoding, per_message, protocol, (side, side))
        for side, dtype, encoding, wires in _CASES
        for protocol, per_message in wires
    ]


def _chosen(quick: bool, long: bool) -> list[tuple[Stream, list[str]]]:
    """The cases of this run, and what is made of each."""
    every = streams((64, 256) if quick else (256, 256))
    if long:
        return [(stream, [ALL, BRIGHT]) for stream in every]
    if quick:
        return [(every[i], [ALL, BRIGHT]) for i in (0, 2)]
    # Raw frames one by one are limited by the socket, in either protocol.
    few = [s for s in every if s.encoding is Encoding.BSLZ4 or (s.protocol, s.per_message) != _SINGLE]
    both = [s for s in few if s.encoding is Encoding.BSLZ4 and (s.protocol, s.per_message) == _V2]
    return [(s, [ALL, BRIGHT] if s in both else [ALL]) for s in few]


def run(quick: bool, long: bool = False) -> Section:
    """The section of the report."""
    seconds = 0.2 if quick else 0.4
    rows: list[dict[str, Any]] = []
    products: dict[tuple[int, int], Stage] = {}
    payloads: dict[tuple, tuple[Payloads, Stage | None]] = {}
    with Sender(Stream((64, 256))) as sender:
        asyncio.run(scan(sender))  # fills caches
        for stream, channels in _chosen(quick, long):
            shape = stream.scan_shape
            if shape not in products:
                products[shape] = matrix_products(setup(shape, _BF_PIXELS), seconds)
            frames = (stream.shape, stream.dtype, stream.encoding)
            if frames not in payloads:
                made = Payloads(stream)
                payloads = {frames: (made, made.library(seconds))}  # the last one only: raw frames take memory
            sender.load(stream)
            for made_of_it in filter(offered, channels):
                ours = payloads[frames][0].ours(made_of_it, seconds)
                rows.append(_case(sender, made_of_it, payloads[frames][1], ours, products[shape], 1 if quick else 3))
                print(f"  {stream.name}, {made_of_it}: {rows[-1]['ours']:,.0f} frames/s, "
                      f"{rows[-1]['ours/limit']:.2f} of the limit", flush=True)  # fmt: skip
    return Section(_text(rows, shape), {"limit": rows})


def _case(
    sender: Sender, channels: str, library: Stage | None, decoder: Stage, products: Stage, repeats: int
) -> dict[str, Any]:
    stream = sender.stream
    runs, received = [], []
    for _ in range(repeats):  # in turns, so that a busy moment of the machine hits both
        runs.append(asyncio.run(scan(sender, channels=channels)))
        received.append(receive(sender))
    rates = [stream.frames / run.seconds for run in runs]
    taken = Stage(*(statistics.median(column) for column in zip(*received, strict=True)))
    ours = statistics.median(rates)
    stages = {"receive": taken, "GEMM": products} | ({} if library is None else {"library": library})
    limit = min(stage.rate for stage in stages.values())
    own_limit = min(taken.rate, decoder.rate, products.rate)
    sender_us = statistics.median(1e6 * run.sent.cpu_s / stream.frames for run in runs)
    session_us = statistics.median(1e6 * run.cpu_s / stream.frames for run in runs)
    total_us = taken.cpu_us + decoder.cpu_us + products.cpu_us + sender_us
    return {
        "side": stream.shape[0], "case": stream.name, "channels": channels, "ours": ours, "slowest": min(rates),
        "fastest": max(rates), "receive": taken.rate, "library": float("nan") if library is None else library.rate,
        "decoder": decoder.rate, "GEMM": products.rate, "limit": limit, "own limit": own_limit,
        "ours/limit": ours / limit, "ours/own limit": ours / own_limit, "session us": session_us,
        "receive us": taken.cpu_us, "library us": float("nan") if library is None else library.cpu_us,
        "decoder us": decoder.cpu_us, "GEMM us": products.cpu_us, "sender us": sender_us, "total us": total_us,
        "bound": CORES * 1e6 / total_us, "ours/bound": ours * total_us / (CORES * 1e6),
    }  # fmt: skip


def _text(rows: list[dict[str, Any]], scan_shape: tuple[int, int]) -> str:
    rates = table(
        ("stream", "channels", "ours, frames/s", "slowest", "fastest", "receive alone", "decompression alone",
         "own decoder alone", "GEMM alone", "ours/limit", "ours/own limit"),
        [[row[key] for key in ("case", "channels", "ours", "slowest", "fastest", "receive", "library", "decoder",
                               "GEMM", "ours/limit", "ours/own limit")] for row in rows],
    )  # fmt: skip
    costs = table(
        ("stream", "channels", "session", "receive", "decompression", "own decoder", "GEMM", "sender",
         "sum of stages", "bound, frames/s", "ours/bound"),
        [[row[key] for key in ("case", "channels", "session us", "receive us", "library us", "decoder us", "GEMM us",
                               "sender us", "total us", "bound", "ours/bound")] for row in rows],
    )  # fmt: skip
    met = sum(row["ours/limit"] >= GOAL for row in rows)
    own = sum(row["ours/own limit"] >= GOAL for row in rows)
    return (
        f"## Against the limit: end to end through ZeroMQ, {scan_shape[0]}x{scan_shape[1]} scan, about {_BF_PIXELS:,} "
        "BF pixels, in focus\n\n"
        f"{rates}\n\n"
        f'Each stage had all {CORES} cores to itself; "receive alone" shares them with the sender, as ours does.\n\n'
        "- *receive alone*: a compiled loop over libzmq's C interface that lets go of the same messages from the same "
        "sender.\n"
        "- *decompression alone*: the bitshuffle library's C function on whole frames (hdf5plugin's build).\n"
        "- *own decoder alone*: the session's decoder with all that it takes from a frame: the rows of bright-field "
        "pixels, the sums and the mean pattern where the channels want them. It never unpacks a whole frame where it "
        "need not, so it can be faster than the library.\n"
        "- *GEMM alone*: the contraction's matrix products by NumPy's BLAS, 16 rows at a time.\n"
        "- *limit*: the slowest of receiving, the library's decompression and GEMM. *own limit*: the same with our own "
        "decoder, and the stricter one where that is the slower of the two.\n\n"
        f"Goal: {GOAL} of the limit. Reached in {met} of {len(rows)} cases ({own} against the own limit). No frame was "
        "missing, doubled or damaged in any run.\n\n"
        "### CPU time of a frame, µs\n\n"
        f"{costs}\n\n"
        "*session*: everything that the session's process did, all threads. *sender*: the sender's process, on the "
        "same cores. *sum of stages*: receive, own decoder, GEMM and sender; the row FFT, the copies between stages "
        "and the images are not in it. *bound*: the cores there are over that sum: what could be reached if "
        "nothing else had to be done and no core ever waited."
    )


if __name__ == "__main__":
    print(run(quick=False).text)
