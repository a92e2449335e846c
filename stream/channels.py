"""Several thresholds a frame: which of them is reconstructed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from detectors.errors import ConfigurationError
from detectors.messages import FrameBlock


def choose_channel(channels: Sequence[str], wanted: str | None) -> Callable[[FrameBlock], FrameBlock]:
    """How to get the wanted channel of a block.

    ``channels``: the names in the order of the stream; empty where there is one without a name. ``wanted``: a name, or
    ``A-B`` for a channel minus another one (for a detector that does not send its own ``difference``); None is the
    first. Raises ``ConfigurationError`` for a channel that the stream does not have.
    """
    if wanted is None:
        return lambda block: block.channel(0)
    if wanted in channels:
        number = channels.index(wanted)
        return lambda block: block.channel(number)
    minuend, minus, subtrahend = wanted.partition("-")
    if minus and minuend in channels and subtrahend in channels:
        first, second = channels.index(minuend), channels.index(subtrahend)
        return lambda block: replace(block.channel(first), minus=block.channel(second))
    have = f"the channels {', '.join(channels)}" if channels else "one channel only, without a name"
    raise ConfigurationError(
        f"channel {wanted!r} was asked for, the stream has {have}; a difference of two is written A-B "
        "(images are chosen with channels)"
    )
