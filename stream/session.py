"""A live session: one stream received, recorded, reconstructed and published, as it comes.

    receiver -> decoder -> recorder
                        -> reconstruction (engine) -> snapshots -> publisher -> viewers

One asyncio process. What takes time runs in threads on code that releases the GIL; the event loop only passes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from detectors.errors import ConfigurationError, ConnectionFailed, LiveptychoError
from detectors.messages import FrameBlock, Message, SeriesEnd, SeriesStart, Undecodable
from detectors.registry import protocol_named
from stream import decode
from stream.array import choose_device
from stream.config import Layer
from stream.intake import Orphans, Silence, messages
from stream.publish import Publisher
from stream.receiver import Receiver
from stream.reconstruction import CHANGEABLE, Reconstruction
from stream.recording import Recorder
from stream.result import Result
from stream.snapshot import IMAGE_UNITS, Snapshot

logger = logging.getLogger(__name__)

#: Snapshots are at least this far apart [s], and never take more than about a quarter of a core.
_FASTEST_S = 1 / 30
_SNAPSHOT_SHARE = 0.25
#: ... and at most so far apart [s]: a viewer takes a longer silence for the session's end.
_SLOWEST_S = 1.0
#: Once the end message came, or every pass is complete, stragglers are waited for so long [s].
_GRACE_S = 0.5
#: When nothing comes at all, advice is given after so long [s].
_ADVICE_S = 5.0


@dataclass(frozen=True)
class SessionOptions:
    """What a session does. Times in seconds."""

    addresses: Sequence[str]
    """ZeroMQ endpoints of the detector; several share the load of one stream"""
    protocol: str = "native"
    bind: bool = False
    pattern: str = "pull"
    layers: Sequence[Layer] = ()
    """settings, in order of precedence, before what the stream says of itself"""
    passes: int | None = 0
    """how many passes to take; None for ever, 0 as many as the series announces"""
    device: str = "auto"
    record: Path | None = None
    output: Path | None = None
    """where the result of each finished series is written; from the second on with -2, -3, ... in the name"""
    publish: str | None = None
    follow: bool = False
    """wait for the next series after one has ended"""
    linger_s: float = 0.0
    """keep publishing and answering control requests for so long after the last series; ``math.inf`` until stopped"""
    timeout_s: float | None = None
    """give up when nothing came for so long before the first series"""
    series_timeout_s: float | None = None
    """take a series for ended, incomplete, when nothing came for so long in the middle of it"""
    row_timeout_s: float = 1.0
    """close open rows when nothing came for so long"""
    threads: int | None = None


def numbered(path: Path, count: int) -> Path:
    """``path`` for the first series, ``path-2`` for the second, ..., before the suffix."""
    return path if count <= 1 else path.with_name(f"{path.stem}-{count}{path.suffix}")


class Session:
    """Runs one live session. Use as an async context manager, and iterate over its snapshots:

        async with Session(SessionOptions(["tcp://127.0.0.1:31000"])) as session:
            async for snapshot in session:
                show(snapshot.images["phase"])
        result = session.result

    Iteration ends with the session. Only the newest snapshot is kept for a slow reader. What ends a session before its
    time (``ConfigurationError``, ``ConnectionFailed``, ``DoesNotFit``, ``DataFileError``) is raised by the iteration
    and by ``wait``.
    """

    def __init__(self, options: SessionOptions) -> None:
        self.options = options
        record, output = options.record, options.output
        if record is not None and output is not None and record.absolute() == output.absolute():
            raise ConfigurationError(f"recording and result would both be {record}; choose two names")
        self._protocol = protocol_named(options.protocol)
        self._device = choose_device(options.device)
        self._id = uuid.uuid4().hex[:12]
        self._state, self._message, self._link = "waiting", f"waiting for {', '.join(options.addresses)}", "waiting"
        self._run: Reconstruction | None = None
        self._recorder: Recorder | None = None
        self._orphans = Orphans()
        self._unread: deque[tuple[int, str]] = deque(maxlen=1000)
        self._skip: object = None
        self._series_count = 0
        self._ending = False
        self._stop = asyncio.Event()
        self._rows = asyncio.Event()
        self._dirty = True
        self._snapshot = Snapshot(self._id, 0, time.time(), self._state, self._message)
        self._fresh = asyncio.Condition()
        self._over = False
        self._rate = _Rate()
        self.result: Result | None = None
        """the result of the series that finished last"""
        self.incomplete: str = ""
        """why the last series is not complete, in words; empty when it is"""
        self.endpoints: list[str] = []
        self.publish_endpoint: str | None = None

    async def __aenter__(self) -> Session:
        options = self.options
        self._stack = AsyncExitStack()
        # The first run on a machine takes seconds here, later ones find the compiled code on disk.
        await asyncio.to_thread(decode.compile_ahead)
        try:
            self._receiver = await self._stack.enter_async_context(
                Receiver(options.addresses, bind=options.bind, pattern=options.pattern)
            )
            self.endpoints = self._receiver.endpoints
            self._publisher = None
            if options.publish is not None:
                self._publisher = await self._stack.enter_async_context(Publisher(options.publish, self.control))
                self.publish_endpoint = self._publisher.endpoint
        except BaseException:
            await self._stack.aclose()
            raise
        self._task = asyncio.create_task(self._main(), name="session")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if not self._task.done():
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._close_series()
        await self._stack.aclose()

    def stop(self) -> None:
        """End the session; what has come so far is finished and saved."""
        self._stop.set()

    async def wait(self) -> Result | None:
        """Wait for the session's end; the last series' result, None when there was none."""
        await asyncio.shield(self._task)
        return self.result

    async def __aiter__(self) -> AsyncIterator[Snapshot]:
        seen = 0
        while True:
            async with self._fresh:
                while self._snapshot.sequence == seen and not self._over:
                    await self._fresh.wait()
                snapshot = self._snapshot
            if snapshot.sequence == seen:
                break
            seen = snapshot.sequence
            yield snapshot
        await self.wait()

    @property
    def snapshot(self) -> Snapshot:
        """The newest snapshot."""
        return self._snapshot

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The series in progress, or the last one."""
        return self._run

    # the tasks

    async def _main(self) -> None:
        helpers = [
            asyncio.create_task(self._compute(), name="compute"),
            asyncio.create_task(self._publish(), name="publish"),
        ]
        if self._publisher is not None:
            helpers.append(asyncio.create_task(self._publisher.answer(), name="control"))
        intake = asyncio.create_task(self._intake(), name="intake")
        try:
            done, _ = await asyncio.wait([intake, *helpers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a helper only ends by failing
            self._link, self._dirty = "silent", True
            if self.options.linger_s > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if math.isinf(self.options.linger_s) else self.options.linger_s):
                        await self._stop.wait()
        except LiveptychoError as error:
            self._set_state("failed", str(error))
            raise
        finally:
            for task in (intake, *helpers):
                task.cancel()
            await asyncio.gather(intake, *helpers, return_exceptions=True)
            self._close_series()
            await self._emit()
            async with self._fresh:
                self._over = True
                self._fresh.notify_all()

    async def _intake(self) -> None:
        """Take messages until the last series has ended."""
        stopped = asyncio.create_task(self._stop.wait())
        stream = messages(self._receiver, self._protocol.decoder())
        following: asyncio.Future[Message | Silence] | None = None
        try:
            while not self._stop.is_set():
                following = asyncio.ensure_future(anext(stream))
                await asyncio.wait([following, stopped], return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    break
                if await self._handle(following.result()) and not self.options.follow:
                    return
        finally:
            # Left pending, it would keep the generator running, which then could not be closed.
            waiting = [task for task in (stopped, following) if task is not None]
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await stream.aclose()
        if self._run is not None and self._state in ("calibrating", "scanning"):
            await self._finish("stopped by the user", "stopped")
        else:
            self._set_state("stopped", "stopped")

    async def _handle(self, item: Message | Silence) -> bool:
        """Take one message; True when a series has ended with it."""
        if not isinstance(item, Silence):
            self._link = "receiving"
        if isinstance(item, FrameBlock):
            return await self._frames(item)
        if isinstance(item, Silence):
            return await self._silence(item.seconds)
        if isinstance(item, SeriesStart):
            return await self._start(item)
        if isinstance(item, SeriesEnd):
            return await self._end(item)
        if isinstance(item, Undecodable):
            logger.info("undecodable: %s", item.reason)
            self._dirty = True
            self._message = f"undecodable message: {item.reason}"
            if self._run is not None:
                self._run.undecodable(item.frames, item.reason)
            else:
                self._unread.append((item.frames, item.reason))
            if self._recorder is not None:
                self._recorder.undecodable(1)
        return False

    async def _start(self, start: SeriesStart) -> bool:
        if self._run is not None and self._active and start.series == self._run.start.series:
            return False  # repeated, as publishers do for those who come late
        ended = False
        if self._active:
            await self._finish(f"series {start.series} began before its end")
            ended = not self.options.follow
        if ended:
            return True
        self._close_series()
        self._series_count += 1
        self._skip, self._ending = None, False
        options = self.options
        try:
            if options.record is not None:
                path = numbered(options.record, self._series_count)
                self._recorder = Recorder(path, start, options.protocol, version("liveptycho"))
            self._run = Reconstruction(
                start,
                options.layers,
                self._device,
                source=f"series {start.series} from {', '.join(options.addresses)}",
                passes=options.passes,
                threads=options.threads,
            )
            self._set_state("calibrating", f"series {start.series}: making ready")
            if not self._run.needs_disk:
                await asyncio.to_thread(self._run.prepare)
        except LiveptychoError as error:
            return self._give_up(error)
        for frames, reason in self._unread:
            self._run.undecodable(frames, reason)
        self._unread.clear()
        if self._run.engine is not None:
            logger.info("memory: %s", self._run.engine.plan)
        for block in self._orphans.claim(start):
            await self._frames(block)
        return False

    def _give_up(self, error: LiveptychoError) -> bool:
        """This series cannot be reconstructed: the session's end, unless it waits for others."""
        if not self.options.follow:
            raise error
        self._skip = None if self._run is None else self._run.start.series
        self._close_recorder()
        logger.error("%s", error)
        self._set_state("failed", str(error))
        return False

    @property
    def _active(self) -> bool:
        return self._run is not None and self._state in ("calibrating", "scanning")

    async def _frames(self, block: FrameBlock) -> bool:
        run = self._run
        if not self._active or run is None or block.series != run.start.series:
            if block.series != self._skip and (run is None or block.series != run.start.series):
                self._orphans.keep(block)
                self._message = f"frames of series {block.series} arrive, but its start message did not come (yet)"
            return False
        self._rate.count(len(block), int(block.sizes.sum()))
        try:
            # Recording and decoding read the same memory at the same time; both must be done before it is reused.
            work = [asyncio.to_thread(run.add, block)]
            if self._recorder is not None:
                work.append(asyncio.to_thread(self._recorder.write, block))
            outcomes = await asyncio.gather(*work, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome
        except LiveptychoError as error:
            return self._give_up(error)
        if run.engine is not None and self._state == "calibrating":
            self._set_state("scanning", "")
        self._dirty = True
        self._rows.set()
        return await self._finish_if_complete(block)

    async def _finish_if_complete(self, block: FrameBlock) -> bool:
        run = self._run
        assert run is not None
        if run.engine is None:
            return False
        passes = run.engine.setup.passes
        if passes is None or run.engine.passes_done < passes:
            return False
        # Everything is there: the end message should follow, unless the stream goes on beyond what was asked for.
        self._ending = True
        if int(block.indices.max()) >= passes * run.engine.setup.scan.frames_per_pass:
            await self._finish("")
            return True
        return False

    async def _silence(self, seconds: float) -> bool:
        if seconds >= _SLOWEST_S and self._link == "receiving":
            self._link, self._dirty = "silent", True
        if self._active and self._run is not None:
            if self._ending and seconds >= _GRACE_S:
                await self._finish("")
                return True
            if seconds >= self.options.row_timeout_s and self._run.engine is not None:
                self._run.engine.close_rows()
                self._rows.set()
        timeout = self.options.series_timeout_s if self._active else self.options.timeout_s
        if not self._active and not self._series_count and seconds >= _ADVICE_S:
            self._message = self._nobody_there(seconds)
        if timeout is None or seconds < timeout:
            return False
        if self._active:
            await self._finish(f"nothing came for {timeout:g} s, and no end message")
            return True
        if not self._series_count:
            raise ConnectionFailed(self._nobody_there(timeout))
        return False

    def _nobody_there(self, seconds: float) -> str:
        where = ", ".join(self.options.addresses)
        if (series := self._orphans.series) is not None:
            return (
                f"frames of series {series} came from {where}, but no start message within {seconds:.0f} s: start "
                "liveptycho before the detector is armed"
            )
        return (
            f"nothing came from {where} within {seconds:.0f} s: is the detector's stream switched on, armed, and the "
            f"address right? `liveptycho check {where}` looks closer"
        )

    async def _end(self, end: SeriesEnd) -> bool:
        run = self._run
        if not self._active or run is None or end.series != run.start.series:
            return False
        if self._recorder is not None:
            await asyncio.to_thread(self._recorder.end, end)
        expected = run.start.frames
        if len(self.options.addresses) > 1 and (expected is None or run.counters.received < expected):
            self._ending = True  # the other sockets may still hold frames
            return False
        await self._finish("")
        return True

    async def _finish(self, incomplete: str, state: str = "finished") -> None:
        run = self._run
        assert run is not None
        self.incomplete = incomplete
        if incomplete:
            logger.warning("series %s: %s", run.start.series, incomplete)
        try:
            await asyncio.to_thread(run.finish)
            self.result = await asyncio.to_thread(run.result)
            if self.options.output is not None:
                path = numbered(self.options.output, self._series_count)
                await asyncio.to_thread(self.result.save, path)
        except LiveptychoError as error:
            self._give_up(error)
            return
        finally:
            self._close_recorder()
        counters = run.counters
        lost = f"{counters.missing} frames missing" if counters.missing else "complete"
        self._set_state(state, incomplete or f"series {run.start.series}: {lost}")

    def _close_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def _close_series(self) -> None:
        self._close_recorder()
        if self._run is not None:
            self._run.close()

    async def _compute(self) -> None:
        """Let closed rows into the image as they come."""
        while True:
            await self._rows.wait()
            self._rows.clear()
            while (run := self._run) is not None and await asyncio.to_thread(run.accumulate) > 0:
                self._dirty = True

    # snapshots

    def _set_state(self, state: str, message: str) -> None:
        self._state, self._message, self._dirty = state, message, True

    async def _publish(self) -> None:
        """Snapshots while something changes, and once a second in any case."""
        last = 0.0
        while True:
            started = time.monotonic()
            if self._dirty or started - last >= _SLOWEST_S:
                await self._emit()
                last = started
            cost = time.monotonic() - started
            await asyncio.sleep(max(_FASTEST_S, cost / _SNAPSHOT_SHARE) if last == started else _FASTEST_S)

    async def _emit(self) -> None:
        self._dirty = False
        snapshot = await asyncio.to_thread(self._make_snapshot)
        async with self._fresh:
            self._snapshot = snapshot
            self._fresh.notify_all()
        if self._publisher is not None:
            await self._publisher.send(await asyncio.to_thread(snapshot.pack))

    def _make_snapshot(self) -> Snapshot:
        run = self._run
        snapshot = Snapshot(
            self._id,
            self._snapshot.sequence + 1,
            time.time(),
            self._state,
            self._message,
            self._link,
            control_port=None if self._publisher is None else self._publisher.control_port,
        )
        if run is None:
            return snapshot
        frames_per_s, bytes_per_s = self._rate.now()
        snapshot = replace(
            snapshot,
            series=run.start.series,
            detector_shape=run.start.detector_shape,
            counters=run.counters,
            frames_per_s=frames_per_s,
            megabytes_per_s=bytes_per_s / 1e6,
        )
        engine, parameters = run.engine, run.parameters
        if engine is None or parameters is None:
            return snapshot
        value = parameters.values
        view = engine.view(IMAGE_UNITS)
        last_row = view.last_row
        now = time.time()
        return replace(
            snapshot,
            time_s=now,
            passes_done=engine.passes_done,
            scan_row=None if last_row is None else last_row.row,
            rows_acquired=view.rows_acquired,
            counters=view.counters,
            scan_shape=engine.setup.scan.shape,
            scan_step_angstrom=engine.setup.scan_step,
            detector_pixel_mrad=value["detector_pixel_mrad"],
            bf_centre_px=value["bf_centre_px"],
            bf_radius_px=value["bf_radius_px"],
            bad_pixels=int((~engine.setup.geometry.good).sum()),
            energy_kev=value["energy_kev"],
            semiangle_mrad=value["semiangle_mrad"],
            rotation_deg=value["rotation_deg"],
            transpose=value["transpose"],
            aberrations=value["aberrations"],
            method=value["method"],
            latency_ms=None
            if last_row is None or self._state != "scanning"
            else max(0.0, now * 1e3 - last_row.time_ns * 1e-6),
            images=view.images,
        )

    # control

    async def change(self, **settings: Any) -> None:
        """Other optics or another method: ``aberrations``, ``rotation_deg``, ``transpose``, ``method``.

        Every row that is there is shown anew. Before a series, they apply from its start. Raises
        ``ConfigurationError``.
        """
        if unknown := settings.keys() - CHANGEABLE:
            raise ConfigurationError(
                f"{', '.join(sorted(unknown))} cannot be changed while scanning; {', '.join(CHANGEABLE)} can"
            )
        if self._run is None:
            self.options = replace(self.options, layers=[Layer.of("control", settings), *self.options.layers])
        else:
            await asyncio.to_thread(self._run.change, settings)
        self._dirty = True

    async def control(self, command: str, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out a control command (see ``stream.snapshot.COMMANDS``); the reply's keys besides ``ok``.

        Raises ``LiveptychoError`` with a sentence for whoever asked.
        """
        if command == "stop":
            self.stop()
            return {}
        if command == "snapshot":
            return {"snapshot": await asyncio.to_thread(lambda: self._make_snapshot().pack())}
        if command == "reset":
            if self._run is not None and self._run.engine is not None:
                await asyncio.to_thread(self._run.engine.reset)
            self._dirty = True
            return {}
        await self.change(**_changes(command, request))
        return {}


def _changes(command: str, request: dict[str, Any]) -> dict[str, Any]:
    """The settings that a control request changes."""
    if command == "aberrations":
        if not isinstance(request.get("values"), dict):
            raise ConfigurationError("aberrations needs values, a map such as {'C10': -100.0} [Å, degrees]")
        return {"aberrations": request["values"]}
    if not request:
        raise ConfigurationError(f"{command} needs its value")
    return request


class _Rate:
    """Frames and bytes a second, over about the last second."""

    def __init__(self) -> None:
        self._frames = self._bytes = 0
        self._since = time.monotonic()
        self._value = (0.0, 0.0)

    def count(self, frames: int, size: int) -> None:
        self._frames += frames
        self._bytes += size

    def now(self) -> tuple[float, float]:
        elapsed = time.monotonic() - self._since
        if elapsed >= 1.0:
            self._value = (self._frames / elapsed, self._bytes / elapsed)
            self._frames = self._bytes = 0
            self._since = time.monotonic()
        return self._value
