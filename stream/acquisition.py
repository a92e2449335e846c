"""From messages to series: each one is begun, recorded, reconstructed, finished and saved as its messages say.

Owns no socket and no task. ``Session`` feeds it, looks at its state, and lets rows into the image.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

from detectors.errors import ConnectionFailed, DataFileError, LiveptychoError
from detectors.messages import Announced, FrameBlock, Message, SeriesEnd, SeriesId, SeriesStart, Undecodable
from stream.array import choose_device
from stream.control import DetectorFacts
from stream.intake import Orphans, Silence
from stream.neighbours import GapPattern
from stream.reconstruction import Reconstruction
from stream.recording import Recorder
from stream.result import Result
from stream.session_options import SessionOptions, aside, numbered, unused_number
from stream.threads import in_threads

logger = logging.getLogger(__name__)

#: Once the end message came, or every pass is complete, stragglers are waited for so long [s].
_GRACE_S = 0.5
#: When nothing comes at all, advice is given after so long [s].
_ADVICE_S = 5.0
#: The link counts as silent after so long [s].
_SILENT_S = 1.0


class Acquisition:
    """The series of one session, one after the other. It lives on the event loop; what takes time runs in threads."""

    def __init__(self, options: SessionOptions) -> None:
        self.options = options
        self.run: Reconstruction | None = None
        """the series in progress, or the last one"""
        self.state, self.message, self.link = "waiting", f"waiting for {', '.join(options.addresses)}", "waiting"
        """as in ``Snapshot``"""
        self.changed = True
        """something happened that a new snapshot would show"""
        self.rows = asyncio.Event()
        """rows may have been closed, and wait to be let into the image"""
        self.rate = Rate()
        self.result: Result | None = None
        self.saved: Path | None = None
        self.recorded: Path | None = None
        """the files of the last series"""
        self.incomplete = ""
        self._device = choose_device(options.device)
        self._recorder: Recorder | None = None
        self._orphans = Orphans()
        self._unread: deque[tuple[int, str]] = deque(maxlen=1000)
        self._refused: SeriesStart | None = None
        self._recording_only: LiveptychoError | None = None
        self._dropped = 0
        self._series_count = self._aside = 0
        self._announced: SeriesId | None = None
        self._had_enough_of: SeriesStart | None = None
        self._ending = False
        self.facts = DetectorFacts()
        """what the detector says of itself beside its stream"""
        self.trouble = ""
        """why there is no connection to its stream, in words"""
        self._gaps = GapPattern()

    @property
    def unclaimed(self) -> int:
        """Frames that belonged to no series in progress, and were dropped."""
        return self._dropped + self._orphans.lost

    @property
    def told(self) -> str:
        """The sentence for the user, or what the frames' numbers look like."""
        if self.message or self.state != "scanning":
            return self.message
        if self.run is not None and self.run.engine is not None and self.run.engine.preparing:
            return "the kernels are being made: the phase follows, and no frame waits for it"
        return self._gaps.sentence

    def set_state(self, state: str, message: str) -> None:
        """Enter a state (see ``Snapshot``), with a sentence for the user."""
        self.state, self.message, self.changed = state, message, True

    async def take(self, item: Message | Silence) -> bool:
        """Take one message; True when a series has ended with it. Raises ``LiveptychoError``: see ``Session``."""
        if not isinstance(item, Silence):
            self.link = "receiving"
        if isinstance(item, FrameBlock):
            return await self._frames(item)
        if isinstance(item, Silence):
            return await self._silence(item.seconds)
        if isinstance(item, SeriesStart):
            return await self._start(item)
        if isinstance(item, SeriesEnd):
            return await self._end(item)
        if isinstance(item, Announced):
            self._announced = item.series
        if isinstance(item, Undecodable):
            logger.info("undecodable: %s", item.reason)
            self.changed = True
            self.message = f"undecodable message: {item.reason}"
            if self.run is not None:
                self.run.undecodable(item.frames, item.reason)
            else:
                self._unread.append((item.frames, item.reason))
            if self._recorder is not None:
                self._recorder.undecodable(item.frames)
        return False

    def drop(self, item: Message | Silence) -> None:
        """Leave out a message of a series that is not wanted; its frames are counted."""
        self._dropped += len(item) if isinstance(item, FrameBlock) else 0

    async def _start(self, start: SeriesStart) -> bool:
        start = self.facts.added_to(start)
        # Publishers repeat their start for those who come late; one that was refused is refused until it differs.
        # Both series and header: a detector may begin two series with the very same bytes, or with none.
        known = [self.run.start if self.active and self.run is not None else None, self._refused, self._had_enough_of]
        if any(old is not None and (old.series, old.header) == (start.series, start.header) for old in known):
            return False
        if self._recording_only is not None:
            await self._end_recording(None)
        if self.active:
            await self._set_aside(start)
        await in_threads(self.close)  # its kernels may still be in the making
        self._series_count += 1
        self._refused, self._had_enough_of, self._ending = None, None, False
        self._gaps = GapPattern()
        options = self.options
        try:
            if options.record is not None:
                self.recorded = self._free_name(options.record)
                make = partial(Recorder, self.recorded, start, options.protocol, version("liveptycho"))
                (self._recorder,) = await in_threads(make)
            (self.run,) = await in_threads(
                partial(
                    Reconstruction,
                    start,
                    options.layers,
                    self._device,
                    source=f"series {start.series} from {', '.join(options.addresses)}",
                    passes=options.passes,
                    threads=options.threads,
                    live=True,
                )
            )
            self.set_state("calibrating", f"series {start.series}: making ready")
            if not self.run.needs_disk:
                await in_threads(self.run.prepare)
        except LiveptychoError as error:
            return self._give_up(error, start)
        for frames, reason in self._unread:
            self.run.undecodable(frames, reason)
        self._unread.clear()
        if self.run.engine is not None:
            logger.info("memory: %s", self.run.engine.plan)
        for block in self._orphans.claim(start):
            if await self._frames(block):
                return True
        return False

    async def _set_aside(self, newer: SeriesStart) -> None:
        """An aborted series, or the rest of an old one: the newest is wanted, and gets the files' names."""
        options, recorded = self.options, self.recorded
        if not options.follow:
            self._aside = unused_number(options.record, options.output)
        try:
            await self.finish(f"series {newer.series} began before its end")
        except LiveptychoError as error:  # too little came to make an image of
            logger.warning("%s", error)
        if not options.follow:
            if recorded is not None:
                await in_threads(partial(recorded.rename, aside(recorded, self._aside)))
                logger.warning("what was recorded of it is in %s", aside(recorded, self._aside))
            self._aside, self._series_count, self.result = 0, self._series_count - 1, None

    def _free_name(self, path: Path) -> Path:
        """Where this series is recorded. What an earlier session left does not cost the second series of this one."""
        later = itertools.count(self._series_count)
        if self._series_count == 1:
            return path
        return next(name for number in later if not (name := numbered(path, number)).exists())

    def _give_up(self, error: LiveptychoError, start: SeriesStart | None = None) -> bool:
        """This series cannot be reconstructed: the session's end, unless it waits for others."""
        if start is None and self.run is not None:
            start = self.run.start
        self._refused = start
        self.set_state("failed", str(error))
        if self._recorder is not None and not isinstance(error, DataFileError) and self._recorder.start is start:
            # The scan may never come again: it is recorded to its end, and the error told then.
            logger.error("%s; recording goes on", error)
            self.message += "; recording goes on"
            self._recording_only = error
            return False
        self._close_recorder()
        if not self.options.follow:
            raise error
        logger.error("%s", error)
        return False

    def _only_records(self, series: SeriesId) -> bool:
        recorder = self._recorder
        return self._recording_only is not None and recorder is not None and recorder.start.series == series

    async def _end_recording(self, end: SeriesEnd | None) -> bool:
        """The end of a series that could only be recorded."""
        error, recorder = self._recording_only, self._recorder
        assert error is not None
        assert recorder is not None
        await in_threads(partial(recorder.end, end))
        await in_threads(self._close_recorder)
        self._recording_only = None
        if not self.options.follow:
            raise error
        return False

    @property
    def active(self) -> bool:
        """Whether a series is in progress."""
        return self.run is not None and self.state in ("calibrating", "scanning")

    async def _frames(self, block: FrameBlock) -> bool:
        run = self.run
        if self._only_records(block.series):
            assert self._recorder is not None
            self.rate.count(len(block), block.payload_bytes)
            await in_threads(partial(self._recorder.write, block))
            return False
        if not self.active or run is None or block.series != run.start.series:
            refused = self._refused is not None and block.series == self._refused.series
            if refused or (run is not None and block.series == run.start.series):
                self._dropped += len(block)
            else:
                self._gaps.take(block.indices)
                self._orphans.keep(block)
                self.message = f"frames of series {block.series} arrive, but its start message did not come (yet)"
            self.changed = True
            return False
        self.rate.count(len(block), block.payload_bytes)
        self._gaps.take(block.indices)
        try:
            # Recording and decoding read the same memory at the same time; both must be done before it is reused.
            work: list[Callable[[], object]] = [partial(run.add, block)]
            if self._recorder is not None:
                work.append(partial(self._recorder.write, block))
            await in_threads(*work)
        except LiveptychoError as error:
            return self._give_up(error)
        if run.engine is not None and self.state == "calibrating":
            self.set_state("scanning", "")
        self.changed = True
        self.rows.set()
        return await self._finish_if_complete()

    async def _finish_if_complete(self) -> bool:
        run = self.run
        assert run is not None
        if run.engine is None:
            return False
        passes, scan = run.engine.setup.passes, run.engine.setup.scan
        if passes is None:
            return False
        # Once everything is there, the end message should follow. When the stream goes on beyond what was asked for,
        # what is missing by then (a row's worth of frames later, for those that come late) will not come.
        done = run.engine.passes_done >= passes
        self._ending = self._ending or done
        if run.engine.beyond > (0 if done else scan.shape[1]):
            await self.finish("")
            self._had_enough_of = run.start  # it goes on, and a publisher repeats its start
            return True
        return False

    async def _silence(self, seconds: float) -> bool:
        if seconds >= _SILENT_S and self.link == "receiving":
            self.link, self.changed = "silent", True
            if self._recorder is not None:
                await in_threads(self._recorder.flush)  # it is not asked to write until frames come again
        if self.active and self.run is not None:
            if self._ending and seconds >= _GRACE_S:
                await self.finish("")
                return True
            if seconds >= self.options.row_timeout_s and self.run.engine is not None:
                self.run.engine.close_rows()
                self.rows.set()
        if self._recording_only is not None and seconds >= (self.options.series_timeout_s or math.inf):
            return await self._end_recording(None)
        timeout = self.options.series_timeout_s if self.active else self.options.timeout_s
        if not self.active and not self._series_count and seconds >= _ADVICE_S:
            self.message = self._nobody_there(seconds)
        if timeout is None or seconds < timeout:
            return False
        if self.active:
            await self.finish(f"nothing came for {timeout:g} s, and no end message")
            return True
        if not self._series_count:
            raise ConnectionFailed(self._nobody_there(timeout))
        return False

    def _nobody_there(self, seconds: float) -> str:
        where = ", ".join(self.options.addresses)
        if self._announced is not None:
            return f"series {self._announced} was announced, and its first frame did not come within {seconds:.0f} s"
        if (series := self._orphans.series) is not None:
            return f"frames of series {series} came from {where}, but no start message within {seconds:.0f} s: " + (
                self._gaps.sentence or "start liveptycho before the detector is armed"
            )
        closer = f"`liveptycho check {where} --protocol {self.options.protocol}` looks closer"
        if self.trouble:
            return f"nothing came within {seconds:.0f} s: {self.trouble}"
        if self._unread:
            return f"nothing that came from {where} could be read: {self._unread[-1][1]}; {closer}"
        return (
            f"nothing came from {where} within {seconds:.0f} s: is the detector's stream switched on, armed, and the "
            f"address right? {closer}"
        )

    async def _end(self, end: SeriesEnd) -> bool:
        run = self.run
        if self._only_records(end.series):
            return await self._end_recording(end)
        if not self.active or run is None or end.series != run.start.series:
            self._orphans.forget(end.series)
            return False
        if self._recorder is not None:
            await in_threads(partial(self._recorder.end, end))
        expected = run.start.frames
        if len(self.options.addresses) > 1 if expected is None else run.counters.received < expected:
            self._ending = True  # the other sockets may still hold frames, or some are late
            return False
        await self.finish("")
        return True

    async def finish(self, incomplete: str, state: str = "finished") -> None:
        """End the series: its result is made and written. ``incomplete`` says in words why it is not whole."""
        run = self.run
        assert run is not None
        self.incomplete = incomplete
        if incomplete:
            logger.warning("series %s: %s", run.start.series, incomplete)
        # Nothing more comes to be recorded, whatever becomes of the result.
        await in_threads(self._close_recorder)
        try:
            await in_threads(run.finish)
            (self.result,) = await in_threads(run.result)
            await self.save()
        except LiveptychoError as error:
            self._give_up(error)
            return
        counters = run.counters
        if not counters.received:
            self.incomplete = incomplete = incomplete or "it ended before any frame came"
        lost = f"{counters.missing} frames missing" if counters.missing else "complete"
        told = incomplete or f"series {run.start.series}: {lost}"
        if counters.missing:
            told = f"{told}; {self._gaps.sentence}" if self._gaps.sentence else told
            self.incomplete = told
        self.set_state(state, told)

    async def stop(self) -> None:
        """The user has had enough: what has come so far is finished and saved."""
        if self._recording_only is not None:
            await self._end_recording(None)
        if self.active:
            await self.finish("stopped by the user", "stopped")
        else:
            self.set_state("stopped", "stopped")

    async def save(self) -> None:
        """Write the result where the options say, if they do. Raises ``DataFileError``."""
        if self.result is not None and self.options.output is not None:
            output = self.options.output
            self.saved = aside(output, self._aside) if self._aside else numbered(output, self._series_count)
            await in_threads(partial(self.result.save, self.saved))

    def _close_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def close(self) -> None:
        """Let go of files and threads; images can still be taken."""
        self._close_recorder()
        if self.run is not None:
            self.run.close()


class Rate:
    """Frames and bytes a second, over about the last second."""

    def __init__(self) -> None:
        self._frames = self._bytes = 0
        self._since = time.monotonic()
        self._value = (0.0, 0.0)

    def count(self, frames: int, size: int) -> None:
        """Note frames that came."""
        self._frames += frames
        self._bytes += size

    def now(self) -> tuple[float, float]:
        """Frames a second, bytes a second."""
        elapsed = time.monotonic() - self._since
        if elapsed >= 1.0:
            self._value = (self._frames / elapsed, self._bytes / elapsed)
            self._frames = self._bytes = 0
            self._since = time.monotonic()
        return self._value
