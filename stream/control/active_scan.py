"""Asking and steering the detector beside its stream: what it says of itself, and a scan that is armed from here.

Passive, a control only asks, and changes nothing. Active, ``ActiveScan`` goes through one series: configure, let old
messages run out of the connected stream, arm, trigger or wait for the scan generator's triggers, disarm, ask what was
lost. It owns no socket: ``Session`` shows it every message and asks which ones belong to the series.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import numpy as np

from detectors.errors import ConfigurationError, LiveptychoError
from detectors.messages import Announced, FrameBlock, Message, SeriesEnd, SeriesId, SeriesStart
from stream.intake import Silence
from stream.scan import ScanPattern

logger = logging.getLogger(__name__)

Trigger = Literal["software", "pixel", "line", "gate"]

#: The header follows the arming at once, or something is wrong [s].
_HEADER_S = 10.0
#: The same for frames after a software trigger; slow ones may take as many frame times.
_FRAME_S = 5.0
_FRAME_TIMES = 20
#: Messages of earlier series wait in the connection for at most so long [s].
_DRAIN_S = 10.0
#: Some detectors give the last image of a triggered series away only when they are disarmed: after so long [s].
_FLUSH_S = 2.0


@dataclass(frozen=True)
class ScanPlan:
    """What a detector is armed for: ``frames`` in all, ``frames_per_line`` from one line trigger to the next.

    ``trigger``: ``software`` (one command starts it all), ``pixel``, ``line`` (the scan generator's pulse for each), or
    ``gate`` (it is exposed while the pixel's pulse is high). ``count_time_s``, ``frame_time_s``: None leaves them.
    """

    trigger: Trigger
    frames: int
    frames_per_line: int
    count_time_s: float | None = None
    frame_time_s: float | None = None

    @classmethod
    def of(
        cls,
        trigger: Trigger,
        scan: ScanPattern,
        passes: int | None,
        *,
        count_time_s: float | None = None,
        frame_time_s: float | None = None,
    ) -> ScanPlan:
        """The plan for ``passes`` passes of ``scan``. Raises ``ConfigurationError`` for what cannot be armed."""
        if passes is None:
            raise ConfigurationError("a detector is armed for a number of frames: say how many with --passes")
        if any(seconds is not None and not 0 < seconds < math.inf for seconds in (count_time_s, frame_time_s)):
            raise ConfigurationError(f"count and frame time are positive, got {count_time_s} and {frame_time_s} s")
        if trigger == "line" and (scan.positions is not None or scan.flyback_frames_per_pass):
            raise ConfigurationError(
                "a line trigger needs lines of equal length: no position table, no flyback_frames_per_pass"
            )
        line = scan.shape[1] + scan.flyback_frames_per_row
        if trigger == "line" and scan.frames_in(passes) % line:
            raise ConfigurationError(
                f"a line trigger brings whole lines of {line} frames; start_offset {scan.start_offset} does not fit"
            )
        return cls(trigger, scan.frames_in(passes), line, count_time_s, frame_time_s)


@dataclass(frozen=True)
class DetectorFacts:
    """What a detector says of itself beside its stream; whatever it does not tell is missing.

    ``settings``: as ``SeriesStart.settings``. ``detector_shape`` (rows, columns), ``dtype``, ``pixel_mask`` (bool
    ``detector_shape``, True = good) may be None. ``warnings``: sentences for the user.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    detector_shape: tuple[int, int] | None = None
    dtype: np.dtype | None = None
    pixel_mask: np.ndarray | None = field(default=None, compare=False)
    warnings: tuple[str, ...] = ()

    def added_to(self, start: SeriesStart) -> SeriesStart:
        """``start`` with what it does not say itself. A mask of another detector area than the frames' is left out."""
        mask = self.pixel_mask if start.pixel_mask is None else start.pixel_mask
        if mask is not None and mask.shape != start.detector_shape:
            logger.warning("the detector's pixel mask is not as large as its frames, and is not used")
            mask = start.pixel_mask
        return replace(start, settings={**self.settings, **start.settings}, pixel_mask=mask)


@dataclass(frozen=True)
class Prepared:
    """A configured detector: its ``frame_time_s`` where it tells; ``notes``: what differs from what was asked for."""

    frame_time_s: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """``dropped``: images that the detector had to throw away, None where it does not count them. ``message``: what
    the user should know, in words; else empty."""

    dropped: int | None = None
    message: str = ""


class DetectorControl(Protocol):
    """One detector's control interface. Everything raises ``LiveptychoError`` with a sentence for the user."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...

    async def describe(self) -> DetectorFacts:
        """Ask only; nothing is changed."""
        ...

    async def prepare(self, plan: ScanPlan) -> Prepared:
        """Configure the detector; refused while somebody else holds it."""
        ...

    async def arm(self) -> SeriesId:
        """Arm it, once the stream is connected; the series that begins."""
        ...

    async def trigger(self) -> None:
        """Give the software trigger. May last as long as the series."""
        ...

    async def flush(self) -> None:
        """Have the detector send what it still holds: no more triggers will come."""
        ...

    async def finish(self) -> Finished:
        """Leave the detector idle after a series, whole or not, and ask what was lost."""
        ...

    async def abort(self) -> None:
        """Leave the detector idle at once; what it holds is lost."""
        ...

    async def dropped(self) -> int | None:
        """Images that nobody took since it was armed last, None where it does not count; asks only."""
        ...


class ActiveScan:
    """One series that is armed from here. ``Session`` prepares it, connects the stream, and shows it each message:

        await scan.prepare()            # refused while somebody else holds the detector
        ...                             # connect the PULL socket: before arming, or the header is lost
        async for item in messages(...):
            if not await scan.admits(item):
                continue                # of an earlier series
            if isinstance(item, Silence) and (problem := await scan.watch()):
                ...                     # finish with what there is, for this reason
            ...
        finished = await scan.end()     # in any case

    ``waiting_for`` says in words what is awaited. ``clock``: seconds, monotonic.
    """

    def __init__(
        self, control: DetectorControl, plan: ScanPlan, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan, self.waiting_for = plan, "the detector to be armed"
        self._control, self._clock = control, clock
        self._draining_since: float | None = None
        self._prepared = Prepared()
        self._arming: asyncio.Task[SeriesId] | None = None
        self._triggering: asyncio.Task[None] | None = None
        self._stale: set[SeriesId] = set()
        self._started: SeriesId | None = None
        self._latest = 0.0
        self._frames = 0
        self._flushed = self._announced = False
        self._ending: asyncio.Task[Finished] | None = None

    async def prepare(self) -> Prepared:
        """Configure the detector. Raises ``LiveptychoError`` when that cannot be."""
        self._prepared = await self._control.prepare(self.plan)
        return self._prepared

    @property
    def begun(self) -> bool:
        """Whether arming has begun."""
        return self._arming is not None

    @property
    def series(self) -> SeriesId | None:
        """The series as its messages call it, once it has begun."""
        return self._started

    async def admits(self, item: Message | Silence) -> bool:
        """Whether ``item`` is to be taken. The first silence arms the detector: nothing old waits in the connection
        any more. Raises what went wrong with arming."""
        if self._arming is None:
            self._draining_since = self._draining_since or self._clock()
            if isinstance(item, Silence):
                self._arming = asyncio.create_task(self._arm(), name="arm")
            elif self._clock() - self._draining_since > _DRAIN_S:
                raise ConfigurationError(
                    f"the detector is idle, but its stream has not been silent for {_DRAIN_S:.0f} s: does the address "
                    "belong to another detector, or does another program send there?"
                )
            elif isinstance(item, Announced | SeriesStart | FrameBlock | SeriesEnd):
                self._stale.add(item.series)
            return False
        if isinstance(item, Announced):
            self._announced |= item.series not in self._stale
        if isinstance(item, SeriesStart):
            # The header may be faster than the answer that says its number.
            return self._is_ours(item, await asyncio.shield(self._arming))
        if self._arming.done():
            self._arming.result()
        if isinstance(item, FrameBlock):
            if item.series != self._started:
                return False
            self._latest = self._clock()
            self._frames = max(self._frames, int(item.indices.max(initial=-1)) + 1)
            self.waiting_for = "" if self._frames >= self.plan.frames else self._next
        return not isinstance(item, SeriesEnd) or item.series == self._started

    async def _arm(self) -> SeriesId:
        self.waiting_for = "the detector to be armed"
        series = await self._control.arm()
        self._latest = self._clock()
        self.waiting_for = "the header of the series" if self.plan.trigger == "software" else self._next
        if self.plan.trigger == "software":
            # A task of its own: the command is answered when the series is over.
            self._triggering = asyncio.create_task(self._control.trigger(), name="trigger")
        return series

    def _is_ours(self, start: SeriesStart, armed: SeriesId) -> bool:
        if start.series == self._started:
            return True  # said again, for those who come late
        if start.series != armed:
            # Simulators count commands where detectors count series: a number that was not there before arming, in a
            # series as long as ours, cannot be an old one.
            old = start.series in self._stale or self._started is not None
            if old or start.frames not in (None, self.plan.frames):
                logger.info("series %s is not the one that was armed, %s: ignored", start.series, armed)
                return False
            logger.info("the detector was armed for series %s, and its stream calls it %s", armed, start.series)
        self._started, self._latest, self._frames = start.series, self._clock(), 0
        self.waiting_for = self._next
        return True

    @property
    def _next(self) -> str:
        pulses = {
            "software": "frames",
            "pixel": "trigger pulses, one a frame, from the scan generator",
            "line": f"trigger pulses, one a line of {self.plan.frames_per_line} frames, from the scan generator",
            "gate": "trigger pulses, each as long as an exposure, from the scan generator",
        }
        return pulses[self.plan.trigger]

    async def watch(self) -> str:
        """To be asked while nothing comes: why the series should be given up, in words; empty while all is well."""
        if self._arming is None or not self._arming.done():
            return ""
        self._arming.result()
        silent = self._clock() - self._latest
        failed = self._trigger_failure()
        # Once frames come, the command was heard: a connection may break off during a long series.
        if failed and not self._frames:
            return failed
        if self._started is None and not self._announced:
            return (
                f"the detector was armed, but the header of its series did not come within {_HEADER_S:.0f} s: is the "
                "address that of its stream, and is another client connected, which took it?"
                if silent > _HEADER_S
                else ""
            )
        if self.plan.trigger == "software":
            patience = max(_FRAME_S, _FRAME_TIMES * (self._prepared.frame_time_s or 0.0))
            if self._frames < self.plan.frames and silent > patience:
                because = f": {failed}" if failed else ""
                return f"the detector was triggered, but no frame came for {patience:.0f} s{because}"
        elif self._frames == self.plan.frames - 1 and silent > _FLUSH_S and self._frames and not self._flushed:
            self._flushed = True
            try:
                await self._control.flush()
            except LiveptychoError as error:  # one frame fewer is no reason to lose the others
                logger.warning("the last frame could not be asked for: %s", error)
        return ""

    def _trigger_failure(self) -> str:
        """What went wrong with the software trigger, in words."""
        if self._triggering is None or not self._triggering.done() or self._triggering.cancelled():
            return ""
        error = self._triggering.exception()
        if error is not None and not isinstance(error, LiveptychoError):
            raise error
        return "" if error is None else str(error)

    async def end(self, *, at_once: bool = False) -> Finished:
        """Leave the detector idle, whatever the series came to; ``at_once``: what it still holds is lost.

        Never raises ``LiveptychoError``: what failed is in the message. Goes on when whoever waits for it is cancelled;
        called again, it waits for the first call's end.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(at_once), name="disarm")
        return await asyncio.shield(self._ending)

    async def _end(self, at_once: bool) -> Finished:
        arming, self._arming = self._arming, None
        try:
            if arming is None:
                return Finished()
            if not arming.done():
                # Not cancelled: the detector would be armed all the same.
                await asyncio.wait([arming])
            if arming.cancelled() or arming.exception() is not None:
                return Finished()
            if at_once:
                await self._control.abort()
                return Finished()
            return await self._control.finish()
        except LiveptychoError as error:
            return Finished(None, f"the detector may still be armed: {error}")
        finally:
            if self._triggering is not None:
                self._triggering.cancel()
                await asyncio.gather(self._triggering, return_exceptions=True)
