"""A detector that does not wait: rising rates until the first frame is lost.

The sender stands for a detector with a small buffer. It sends at a set rate, whatever the receiver does; frames that do
not fit into its buffer any more are dropped, and counted.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.data import table
from benchmarks.limit import DETECTOR_RATES, GOAL_RATE, streams
from benchmarks.report import Section
from benchmarks.sending import Sender, Stream
from benchmarks.sessions import ALL, BRIGHT, offer, offered, scan
from detectors.messages import Encoding

#: Frames that the detector can hold back.
BUFFER = 4096
#: Rates that are tried, as parts of the one that a session took when the sender waited for it.
_STEPS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)


def _chosen(quick: bool, long: bool) -> list[tuple[Stream, str]]:
    every = streams((64, 256) if quick else (256, 256))
    if quick:
        return [(every[0], ALL)]
    v2 = [stream for stream in every if stream.protocol == "dectris-v2" and stream.encoding is Encoding.BSLZ4]
    if long:
        return [(stream, channels) for stream in every for channels in (ALL, BRIGHT)]
    return [(v2[0], ALL), (v2[0], BRIGHT), (v2[2], ALL)]


def run(quick: bool, long: bool = False) -> Section:
    """The section of the report."""
    rows: list[dict[str, Any]] = []
    with Sender(Stream((64, 256))) as sender:
        asyncio.run(scan(sender))  # fills caches
        for stream, channels in _chosen(quick, long):
            if not offered(channels):
                continue
            sender.load(stream)
            rows.append(_case(sender, channels, _STEPS[1::3] if quick else _STEPS))
            print(f"  {stream.name}, {channels}: {rows[-1]['held']:,.0f} frames/s without loss", flush=True)
    text = table(
        ("stream", "channels", "sender waits, frames/s", "highest rate without loss", "first rate with loss",
         "lost there", "held/waiting", "held/fastest detector"),
        [[row[key] for key in ("case", "channels", "waiting", "held", "lost_at", "lost", "held/waiting",
                               "held/detector")] for row in rows],
    )  # fmt: skip
    return Section(
        "## Rising rates until the first frame is lost\n\n"
        f"{text}\n\n"
        f"One scan at each rate, from a detector that can hold back {BUFFER:,} frames and drops what does not fit. "
        "Every frame that it dropped was counted as missing by the session, and no other. The fastest detector on sale "
        "sends "
        f"{DETECTOR_RATES[192]:,} frames/s of 192x192 or {DETECTOR_RATES[96]:,} of 96x96. Goal on two cores: "
        f"{GOAL_RATE:,} frames/s of 192x192 u8 in single-frame messages of Stream V2.",
        {"rates": rows},
    )


def _case(sender: Sender, channels: str, steps: tuple[float, ...]) -> dict[str, Any]:
    stream = sender.stream
    waiting = stream.frames / asyncio.run(scan(sender, channels=channels)).seconds
    held, lost_at, lost = float("nan"), float("nan"), 0
    for step in steps:
        went = asyncio.run(offer(sender, step * waiting, BUFFER, channels=channels))
        if went.sent.dropped:
            lost_at, lost = step * waiting, went.sent.dropped
            break
        held = step * waiting
    return {
        "case": stream.name, "channels": channels, "waiting": waiting, "held": held, "lost_at": lost_at, "lost": lost,
        "held/waiting": held / waiting, "held/detector": held / DETECTOR_RATES[stream.shape[0]],
    }  # fmt: skip


if __name__ == "__main__":
    print(run(quick=False).text)
