"""The simulated detector: frames from a source, spoken in a stream protocol, over the protocol's wire, at a set rate.

The pattern is that of the real detectors: a PUSH or TCP socket waits for its receiver and loses nothing; a PUB socket
sends to whoever listens. Sending never blocks the event loop: messages go out in a tight loop of non-blocking sends,
which yields every few milliseconds and waits for the wire only when the receiver is behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from detectors.errors import ConfigurationError
from detectors.messages import Encoding, OutgoingMessage, SeriesId, SeriesStart, StreamEncoder
from detectors.protocols.registry import protocol_named
from detectors.simulator.grouping import Group, message_groups
from detectors.simulator.misbehaviour import Misbehaviour, MisbehaviourCounts
from detectors.simulator.source import FrameSource
from detectors.simulator.wire import Wire, open_wire, send

#: The event loop gets its turn at least this often [s], and paced frames leave in bursts of this length.
_TURN_S = 2e-3
#: At a set rate, a sender that was held up catches up on at most this much [s]: detectors do not send in floods.
_CATCH_UP_S = 0.1
_REPEAT_START_S = 1.0
_PROGRESS_S = 0.1
#: With a trigger, an end message that nobody takes is given up after so long [s].
_END_WAIT_S = 2.0


@dataclass(frozen=True)
class SendReport:
    """What has been sent so far. ``frames`` counts frames as sent, ``payload_bytes`` their packed size, ``seconds``
    the time since the start message went out. ``misbehaviour`` also counts what waits to be sent next.
    """

    frames: int
    messages: int
    payload_bytes: int
    seconds: float
    misbehaviour: MisbehaviourCounts


class Trigger(Protocol):
    """What a simulated detector waits for: its control interface, on which somebody arms and triggers it."""

    async def start_series(self) -> SeriesId | None:
        """Wait until a series is to begin (arm, STARTACQUISITION), then its id; None: there will be no more.

        Awaited before each start message.
        """
        ...

    async def before_frames(self) -> None:
        """Wait until frames are to come (trigger), or the series is ended without any. Awaited after the start."""
        ...

    def remaining(self, sent: int) -> int:
        """How many more frames are wanted, with ``sent`` sent in this series; 0 ends it (done, disarmed, aborted),
        ``sys.maxsize`` is for ever.

        Asked often, also before the start message, which announces no more frames than ``remaining(0)``.
        """
        ...


@dataclass(frozen=True)
class Exposures:
    """The simulated detector's clock: a frame every ``frame_time_ns``, and a pause after each row of ``columns``."""

    frame_time_ns: int
    columns: int = 1
    row_pause_ns: int = 0

    def begin_ns(self, first: int, count: int) -> list[int]:
        """When the exposures of ``count`` frames from number ``first`` on begin [ns]."""
        return [
            number * self.frame_time_ns + number // self.columns * self.row_pause_ns
            for number in range(first, first + count)
        ]


async def serve(
    source: FrameSource,
    address: str,
    *,
    protocol: str = "native",
    pattern: Literal["push", "pub"] = "push",
    bind: bool = True,
    series: SeriesId = 1,
    passes: int | None = 1,
    rate: float | None = None,
    frames_per_message: int = 1,
    misbehaviour: Misbehaviour | None = None,
    trigger: Trigger | None = None,
    ready: Callable[[str], object] | None = None,
    exposures: Exposures | None = None,
    progress: Callable[[SendReport], object] | None = None,
    subscriber_wait_s: float = 5.0,
    linger_s: float = 60.0,
) -> SendReport:
    """Send ``passes`` passes of ``source`` (None: for ever) as one series, then the end message.

    ``address``: such as ``tcp://127.0.0.1:31000``; bound, or connected to when ``bind`` is False. ``tcp://127.0.0.1:*``
    takes any free port; ``ready`` is called with the real endpoint (a future's ``set_result`` will do). ``rate``:
    frames per second, None for as fast as the receiver accepts. ``progress`` is called about ten times a second and at
    the end.

    ``pattern="push"`` waits for a receiver, however long that takes. ``"pub"`` waits for a subscriber for at most
    ``subscriber_wait_s`` and repeats the start message about once a second for those who come later; a subscriber that
    falls behind slows the sender down and loses nothing.

    ``exposures``: the time stamps that the frames carry, in protocols that have any.

    With a ``trigger``, the source is sent once for every series that is armed there, under the id given there, and the
    report is about all of them together.

    Returns when everything has been delivered, or ``linger_s`` after the last frame. Cancelling it ends it at once.
    Raises ``ConfigurationError`` for values out of range and ``ConnectionFailed`` when the address cannot be used.
    """
    if rate is not None and not rate > 0:
        raise ConfigurationError(f"the frame rate must be positive, got {rate!r}")
    if frames_per_message < 1 or (passes is not None and passes < 1):
        raise ConfigurationError("passes and frames_per_message must be at least 1")
    spoken = protocol_named(protocol)
    wire = open_wire(spoken, address, pattern=pattern, bind=bind)
    counts = MisbehaviourCounts()
    sending = _Sending(wire, spoken.encoder(), source.encoding, rate, counts, trigger, progress, exposures)
    try:
        if ready is not None:
            ready(wire.endpoint)
        await wire.wait_for_subscriber(subscriber_wait_s)
        armed: SeriesId | None = series if trigger is None else await trigger.start_series()
        while armed is not None:
            start = source.start(armed)
            wanted = sys.maxsize if passes is None else passes * source.frames_per_pass
            if trigger is not None:
                wanted = min(wanted, trigger.remaining(0))
            groups = message_groups(source, passes, frames_per_message, misbehaviour, counts)
            await sending.series(
                dataclasses.replace(start, frames=None if wanted == sys.maxsize else wanted), groups, misbehaviour
            )
            armed = None if trigger is None else await trigger.start_series()
        if progress is not None:
            progress(sending.report())
        await wire.flush(linger_s)
        return sending.report()
    finally:
        wire.close()


class _Sending:
    """What is under way on a wire: pace, counters, repeated start messages."""

    def __init__(
        self,
        wire: Wire,
        encoder: StreamEncoder,
        encoding: Encoding,
        rate: float | None,
        counts: MisbehaviourCounts,
        trigger: Trigger | None,
        progress: Callable[[SendReport], object] | None,
        exposures: Exposures | None,
    ) -> None:
        self.wire, self.encoder, self.encoding, self.exposures = wire, encoder, encoding, exposures
        self.rate, self.counts, self.trigger, self.progress = rate, counts, trigger, progress
        self.start_messages: list[OutgoingMessage] = []
        self.frames = self.messages = self.payload_bytes = 0
        self.sent_before, self.seconds_before = 0, 0.0
        """frames and time of the series before this one"""
        self.began: float | None = None
        # Frames are due at scheduled + n / rate, counted from the last time that the schedule had to be given up.
        self.scheduled, self.sent_on_schedule = 0.0, 0
        self.next_turn = self.next_start = self.next_progress = 0.0

    def report(self) -> SendReport:
        seconds = self.seconds_before + (0.0 if self.began is None else time.perf_counter() - self.began)
        return SendReport(self.frames, self.messages, self.payload_bytes, seconds, dataclasses.replace(self.counts))

    async def series(
        self, start: SeriesStart, groups: Generator[list[Group], None, None], misbehaviour: Misbehaviour | None
    ) -> None:
        """Send one series, from start to end."""
        self.sent_before = self.frames
        self.start_messages = self.encoder.start(start)
        ahead = _WorkAhead(groups)
        try:
            await self.announce()
            if self.trigger is not None:
                await self.trigger.before_frames()
            self.began = self.scheduled = time.perf_counter()  # the start message is through: there is a receiver
            self.sent_on_schedule = self.frames
            self.next_turn, self.next_start = self.began + _TURN_S, self.began + _REPEAT_START_S
            while self.remaining and (batch := await ahead.next()) is not None:
                await self.send(start.series, batch)
        finally:
            ahead.close()
        if misbehaviour is None or misbehaviour.ends(self.counts):
            for message in self.encoder.end(start.series):
                await self._end(message)
        self.seconds_before += time.perf_counter() - self.began
        self.began = None

    @property
    def remaining(self) -> int:
        """Frames that this series may still send."""
        return sys.maxsize if self.trigger is None else self.trigger.remaining(self.frames - self.sent_before)

    async def announce(self) -> None:
        """Send the start of the series."""
        for message in self.start_messages:
            await self._put(message)

    async def _put(self, message: OutgoingMessage) -> bool:
        """Send a message, waiting for a receiver with room for it; False if the series is ended meanwhile."""
        while not self.wire.try_send(message):
            if not self.remaining:
                return False
            await self.wire.wait(1.0)
        return True

    async def _end(self, message: OutgoingMessage) -> None:
        """Send an end message; whoever armed and ended a series without a receiver wants the next one, and no wait."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if self.trigger is None else _END_WAIT_S):
                await send(self.wire, message)

    async def send(self, series: SeriesId, batch: list[Group]) -> None:
        credit = 0
        for first, group in batch:
            if credit <= 0:
                credit = await self._credit(len(group))
            payloads = group if self.trigger is None else group[: self.remaining]
            if not payloads:
                return
            times = None if self.exposures is None else self.exposures.begin_ns(first, len(payloads))
            messages = self.encoder.frames(series, first, payloads, self.encoding, exposed_ns=times)
            for message in messages:
                if not self.wire.try_send(message) and not await self._put(message):
                    return
            credit -= len(payloads)
            self.frames += len(payloads)
            self.messages += len(messages)
            self.payload_bytes += sum(map(len, payloads))

    async def _credit(self, needed: int) -> int:
        """Wait until at least ``needed`` frames may leave, and say how many may before the next look at the clock."""
        while True:
            now = time.perf_counter()
            if now >= self.next_turn:
                await asyncio.sleep(0)
                await self._housekeeping(now)
                now = time.perf_counter()
                self.next_turn = now + _TURN_S
            if self.rate is None:
                return 32
            due = int((now - self.scheduled) * self.rate) + 1 - (self.frames - self.sent_on_schedule)
            if due >= needed:
                if due > _CATCH_UP_S * self.rate + needed:
                    self.scheduled, self.sent_on_schedule, due = now, self.frames, needed
                return due
            # A little late rather than a sleep for every frame. A message larger than a burst waits for all of it.
            await asyncio.sleep(min(max((needed - due) / self.rate, _TURN_S), _REPEAT_START_S))

    async def _housekeeping(self, now: float) -> None:
        if self.wire.publishes and now >= self.next_start:
            self.next_start = now + _REPEAT_START_S
            await self.announce()
        if self.progress is not None and now >= self.next_progress:
            self.next_progress = now + _PROGRESS_S
            self.progress(self.report())


class _WorkAhead:
    """Takes items from a blocking iterator in a thread of its own, one item ahead of its consumer."""

    def __init__(self, items: Generator[list[Group], None, None]) -> None:
        self.items = items
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="frame-source")
        self.coming = self.thread.submit(next, items, None)

    async def next(self) -> list[Group] | None:
        item = await asyncio.wrap_future(self.coming)
        if item is not None:
            self.coming = self.thread.submit(next, self.items, None)
        return item

    def close(self) -> None:
        # The generators are closed by the thread that runs them, after the step that it may be in.
        self.thread.submit(self.items.close)
        self.thread.shutdown(wait=False)
