"""From blocks of frames, as a source hands them out, to the frames of each message."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Sequence

from detectors.simulator.misbehaviour import Misbehaviour, MisbehaviourCounts
from detectors.simulator.source import FrameSource, Payload

#: One message's worth: index of the first frame, payloads of consecutive frames.
Group = tuple[int, Sequence[Payload]]

#: Messages handed over at a time, and for how long [s] they are gathered.
_BATCH_MESSAGES = 512
_BATCH_S = 5e-3

#: A message is kept below this size, whatever was asked for: ZeroMQ queues messages by their number.
_MESSAGE_BYTES = 4 << 20


def message_groups(
    source: FrameSource,
    passes: int | None,
    frames_per_message: int,
    misbehaviour: Misbehaviour | None,
    counts: MisbehaviourCounts,
) -> Generator[list[Group], None, None]:
    """``passes`` passes of ``source`` (None: for ever) as batches of messages, ``frames_per_message`` frames each.

    The frame index runs on from pass to pass. Where it jumps, and at the end, a message holds fewer frames.
    ``misbehaviour`` acts on single frames, before they are put together; ``counts`` follows what happens to them.
    """
    blocks: Iterator[Group] = (
        (number * source.frames_per_pass + first, payloads)
        for number in (itertools.count() if passes is None else range(passes))
        for first, payloads in source.blocks()
    )
    if misbehaviour is not None:
        frames = ((first + i, payload) for first, payloads in blocks for i, payload in enumerate(payloads))
        blocks = ((index, (payload,)) for index, payload in misbehaviour.apply(frames, counts))
    else:
        blocks = _counted(blocks, counts)
    batch: list[Group] = []
    began = time.perf_counter()
    for group in _split(blocks) if frames_per_message == 1 else _joined(blocks, frames_per_message):
        batch.append(group)
        # The clock is for a source that is slower than the wire: its frames must not pile up here.
        if len(batch) >= _BATCH_MESSAGES or time.perf_counter() - began > _BATCH_S:
            yield batch
            batch, began = [], time.perf_counter()
    if batch:
        yield batch


def _counted(blocks: Iterator[Group], counts: MisbehaviourCounts) -> Iterator[Group]:
    for first, payloads in blocks:
        counts.frames += len(payloads)
        counts.sent += len(payloads)
        yield first, payloads


def _split(blocks: Iterator[Group]) -> Iterator[Group]:
    """Every frame a message of its own."""
    return ((first + i, (payload,)) for first, payloads in blocks for i, payload in enumerate(payloads))


def _joined(blocks: Iterator[Group], most: int) -> Iterator[Group]:
    """Consecutive frames in messages of ``most``; fewer where the index jumps, at the end, and of large frames."""
    first = 0
    pending: list[Payload] = []
    for start, payloads in blocks:
        largest = max((len(payload) for payload in payloads), default=0)
        most = max(1, min(most, _MESSAGE_BYTES // max(1, largest)))
        if pending and start != first + len(pending):
            yield first, pending
            pending = []
        if not pending:
            first = start
        pending = [*pending, *payloads]
        while len(pending) >= most:
            yield first, pending[:most]
            first, pending = first + most, pending[most:]
    if pending:
        yield first, pending
