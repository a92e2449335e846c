"""A live session: one stream received, recorded, reconstructed and published, as it comes.

    receiver -> decoder -> recorder
                        -> reconstruction (engine) -> snapshots -> publisher -> viewers

One asyncio process. What takes time runs in threads on code that releases the GIL; the event loop only passes on.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from detectors.errors import ConfigurationError, ConnectionFailed
from detectors.messages import Message
from detectors.protocols.registry import protocol_named
from stream import contraction, decode
from stream.acquisition import Acquisition
from stream.config import Layer
from stream.control import ActiveScan, DetectorControl, Finished, ScanPlan
from stream.intake import Silence, messages
from stream.parameters import Resolution
from stream.probe import CONNECT_S, reach
from stream.publish import Publisher
from stream.receiving import open_receiver
from stream.reconstruction import CHANGEABLE, Reconstruction
from stream.report import fill_snapshot
from stream.result import Result
from stream.session_options import SessionOptions, check_files, check_trigger
from stream.setup import BATCH_ROWS
from stream.snapshot import Snapshot
from stream.threads import in_threads

logger = logging.getLogger(__name__)

#: Snapshots are at least this far apart [s], and never take more than about a quarter of a core ...
_FASTEST_S = 1 / 60
_SHARE = 0.25
#: ... or, where most of the machine is busy with the frames, this much, as these go first.
_BUSY_SHARE = 0.08
_BUSY_LOAD = 0.7
#: Letting in few rows for a snapshot takes a thread no more than this much of its time: many at a time cost less.
_ROWS_SHARE = 0.4
#: What is not in the images (state, counters, rates) is shown after so long [s], without waiting for a row.
_STATUS_S = 0.1
#: ... and at most so far apart [s]: a viewer takes a longer silence for the session's end.
_SLOWEST_S = 1.0
#: Leaving a session waits at most so long for its series to be finished and saved [s].
_FINISH_S = 60.0
#: Without a connection for so long, what is at the address is looked at [s].
_PROBE_S = 3.0
#: A detector that is to be armed has so long to take the connection to its stream [s].
_CONNECTION_S = 15.0


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
        check_files(options)
        check_trigger(options)
        self._protocol = protocol_named(options.protocol)
        self._acquisition = Acquisition(options)
        self._changes: dict[str, Any] = {}
        self._change_lock = asyncio.Lock()
        self._id = uuid.uuid4().hex[:12]
        self._stop = asyncio.Event()
        self._snapshot = Snapshot(self._id, 0, time.time(), self._acquisition.state, self._acquisition.message)
        self._fresh = asyncio.Condition()
        self._news = asyncio.Event()
        """there are rows that no snapshot has shown yet"""
        self._over = False
        self._scan: ActiveScan | None = None
        self._probed = False
        self.endpoints: list[str] = []
        self.publish_endpoint: str | None = None

    async def __aenter__(self) -> Session:
        options = self.options
        self._stack = AsyncExitStack()
        # The first run on a machine takes seconds here, later ones find the compiled code on disk.
        await in_threads(decode.compile_ahead, contraction.compile_ahead)
        # The compiler leaves 160,000 objects behind: going over them for garbage stops every thread for 0.1 s.
        await asyncio.to_thread(gc.collect)
        gc.freeze()
        self._stack.callback(gc.unfreeze)
        try:
            if options.control is not None:
                await self._ask_detector(await self._stack.enter_async_context(options.control))
            self._receiver = await self._stack.enter_async_context(
                open_receiver(self._protocol, options.addresses, bind=options.bind, pattern=options.pattern)
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
        if error is None:
            # Left in peace: what came so far is finished and saved.
            await asyncio.wait([self._task], timeout=_FINISH_S)
        if not self._task.done():
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._acquisition.close()
        await self._stack.aclose()

    async def _ask_detector(self, control: DetectorControl) -> None:
        """What it says of itself; and configure it, where it is to be armed: before the stream is connected."""
        acquisition, options = self._acquisition, self.options
        acquisition.facts = await control.describe()
        for warning in acquisition.facts.warnings:
            logger.warning("%s", warning)
        if options.trigger is None:
            return
        own = Layer.of("detector", acquisition.facts.settings, ignore_unknown=True)
        parameters = Resolution([*options.layers, own])
        plan = ScanPlan.of(
            options.trigger,
            parameters.scan_pattern(),
            1 if options.passes == 0 else options.passes,
            count_time_s=options.count_time_s,
            frame_time_s=options.frame_time_s,
        )
        self._scan = ActiveScan(control, plan)
        for note in (await self._scan.prepare()).notes:
            logger.warning("%s", note)
        # As it is set now: header_detail decides whether the stream brings the mask.
        acquisition.facts = await control.describe()

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
    def options(self) -> SessionOptions:
        """What the session was asked to do."""
        return self._acquisition.options

    @property
    def result(self) -> Result | None:
        """The result of the series that finished last."""
        return self._acquisition.result

    @property
    def saved(self) -> Path | None:
        """Where the last series' result was written."""
        return self._acquisition.saved

    @property
    def recorded(self) -> Path | None:
        """Where the last series was recorded."""
        return self._acquisition.recorded

    @property
    def incomplete(self) -> str:
        """Why the last series is not complete, in words; empty when it is."""
        return self._acquisition.incomplete

    @property
    def snapshot(self) -> Snapshot:
        """The newest snapshot."""
        return self._snapshot

    @property
    def reconstruction(self) -> Reconstruction | None:
        """The series in progress, or the last one."""
        return self._acquisition.run

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
            self._acquisition.link, self._acquisition.changed = "silent", True
            if self.options.linger_s > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if math.isinf(self.options.linger_s) else self.options.linger_s):
                        await self._stop.wait()
        except Exception as error:
            self._acquisition.set_state("failed", str(error))
            raise
        finally:
            for task in (intake, *helpers):
                task.cancel()
            await asyncio.gather(intake, *helpers, return_exceptions=True)
            try:
                await self._emit()  # before the engine's threads end: rows may still wait for it
            finally:  # whatever happened, nobody must wait for more snapshots
                async with self._fresh:
                    self._over = True
                    self._fresh.notify_all()
                self._acquisition.close()

    async def _intake(self) -> None:
        """Take messages until the last series has ended."""
        acquisition = self._acquisition
        stopped = asyncio.create_task(self._stop.wait())
        stream = messages(self._receiver, self._protocol)
        following: asyncio.Future[Message | Silence] | None = None
        try:
            while not self._stop.is_set():
                following = asyncio.ensure_future(anext(stream))
                await asyncio.wait([following, stopped], return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    break
                if await self._take(following.result()):
                    await self._leave_detector()
                    if not self.options.follow:
                        return
            scanning = acquisition.active
            await acquisition.stop()  # first of all, what came is saved
            if self._scan is not None or scanning:
                await self._leave_detector()
        finally:
            # Left pending, it would keep the generator running, which then could not be closed.
            waiting = [task for task in (stopped, following) if task is not None]
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await stream.aclose()
            if self._scan is not None:
                # After an error, or when this task is cancelled: the detector must not stay armed.
                await asyncio.shield(self._scan.end(at_once=True))

    async def _take(self, item: Message | Silence) -> bool:
        """Take one message; True when a series has ended with it."""
        acquisition, scan = self._acquisition, self._scan
        if scan is not None:
            if not scan.begun and isinstance(item, Silence) and (trouble := self._receiver.link):
                # Armed without a connection, the detector would throw the header away.
                acquisition.message = trouble
                if item.seconds > _CONNECTION_S:
                    raise ConnectionFailed(f"the detector is not armed without its stream: {trouble}")
                return False
            if not await scan.admits(item):
                acquisition.drop(item)
                return False
            if isinstance(item, Silence) and (problem := await scan.watch()):
                if not acquisition.active:
                    raise ConnectionFailed(problem)
                await acquisition.finish(problem)
                return True
            if not acquisition.active and scan.waiting_for:
                acquisition.message = f"waiting for {scan.waiting_for}"
        if isinstance(item, Silence) and not acquisition.active and (link := self._receiver.link):
            acquisition.message = link
            if item.seconds >= _PROBE_S and not (self._probed or self.options.bind):
                # Once: who is there instead?
                self._probed = True
                verdict, text = await reach(self.options.addresses[0], self._protocol, self.options.pattern, CONNECT_S)
                acquisition.trouble = text if verdict == "ERROR" else ""
        elif acquisition.trouble:
            acquisition.trouble = ""
        return await acquisition.take(item)

    async def _leave_detector(self) -> None:
        """Disarm the detector if it was armed here, and hear what it lost."""
        acquisition, control = self._acquisition, self.options.control
        if self._scan is not None:
            finished = await self._scan.end()
        elif control is not None:
            finished = Finished(await control.dropped())
        else:
            return
        sentence = finished.message
        if finished.dropped and not sentence:
            sentence = f"the detector dropped {finished.dropped} images that nobody took"
        if sentence:
            logger.warning("%s", sentence)
            acquisition.incomplete = acquisition.incomplete or sentence
            acquisition.set_state(acquisition.state, f"{acquisition.message}; {sentence}".removeprefix("; "))

    async def _compute(self) -> None:
        """Let closed rows into the image, as many at a time as cost no more than one; the rest before it is shown."""
        acquisition = self._acquisition
        while True:
            await acquisition.rows.wait()
            acquisition.rows.clear()
            while (run := acquisition.run) is not None and run.closed_rows >= BATCH_ROWS:
                await in_threads(run.accumulate)
                self._news.set()
            if run is not None and run.closed_rows:
                self._news.set()

    # snapshots

    async def _publish(self) -> None:
        """Snapshots as soon as there are rows to show, while anything else changes, and once a second in any case."""
        last, renewed = 0.0, 0
        load = _Load()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_STATUS_S):
                    await self._news.wait()
            # Rows also come without frames: when a silence closes them.
            fresh = self._news.is_set() or self._acquisition.changed
            self._news.clear()
            # ... and the image changes without rows, when kernels are ready.
            if (run := self._acquisition.run) is not None and run.renewed != renewed:
                fresh, renewed = True, run.renewed
            started = time.monotonic()
            if fresh or started - last >= _SLOWEST_S:
                last = started
                rows_s, images_s = await self._emit()
                share = _BUSY_SHARE if load.busy() else _SHARE
                pause = min(max(_FASTEST_S, rows_s / _ROWS_SHARE, images_s / share), _SLOWEST_S)
                await asyncio.sleep(started + pause - time.monotonic())

    def _let_in_rows(self) -> None:
        """The rows that are closed by now get into the image."""
        run = self._acquisition.run
        left = 0 if run is None else run.closed_rows
        while run is not None and left > 0 and (rows := run.accumulate()):
            left -= rows

    async def _emit(self) -> tuple[float, float]:
        """Make and publish a snapshot; returns what letting rows in and the images cost a thread [s of CPU].

        Not wall time: on busy cores, that is mostly waiting.
        """
        self._acquisition.changed = False
        ((snapshot, part, costs),) = await in_threads(self._packed_snapshot)
        async with self._fresh:
            self._snapshot = snapshot
            self._fresh.notify_all()
        if self._publisher is not None:
            await self._publisher.send(part)
        return costs

    def _packed_snapshot(self) -> tuple[Snapshot, bytes, tuple[float, float]]:
        began = time.thread_time()
        self._let_in_rows()
        shown = time.thread_time()
        snapshot = self._make_snapshot()
        part = b"" if self._publisher is None else snapshot.pack()
        return snapshot, part, (shown - began, time.thread_time() - shown)

    def _make_snapshot(self) -> Snapshot:
        port = None if self._publisher is None else self._publisher.control_port
        blank = Snapshot(self._id, self._snapshot.sequence + 1, time.time(), "waiting", control_port=port)
        return fill_snapshot(blank, self._acquisition)

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
        async with self._change_lock:
            await self._apply(settings)

    async def _apply(self, settings: dict[str, Any]) -> None:
        acquisition = self._acquisition
        changes = {**self._changes, **settings}
        layers = [Layer.of("control", changes), *acquisition.options.layers[1 if self._changes else 0 :]]
        if acquisition.run is not None:
            await in_threads(partial(acquisition.run.change, settings))
        # Series to come begin with what was changed last.
        acquisition.options = replace(acquisition.options, layers=layers)
        self._changes = changes
        if acquisition.result is not None and not acquisition.active and acquisition.run is not None:
            (acquisition.result,) = await in_threads(acquisition.run.result)
            await acquisition.save()
        acquisition.changed = True

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
            run = self._acquisition.run
            if run is not None and run.engine is not None:
                await asyncio.to_thread(run.engine.reset)
            self._acquisition.changed = True
            return {}
        await self.change(**_changes(command, request))
        return {}


class _Load:
    """How much of the cores this process has taken since it was last asked."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0))
        self._seen = time.monotonic(), time.process_time()

    def busy(self) -> bool:
        """Whether it was most of them."""
        (before, cpu_before), self._seen = self._seen, (time.monotonic(), time.process_time())
        now, cpu = self._seen
        return cpu - cpu_before > _BUSY_LOAD * self._cores * (now - before)


def _changes(command: str, request: dict[str, Any]) -> dict[str, Any]:
    """The settings that a control request changes."""
    if command == "aberrations":
        if not isinstance(request.get("values"), dict):
            raise ConfigurationError("aberrations needs values, a map such as {'C10': -100.0} [Å, degrees]")
        return {"aberrations": request["values"]}
    for key, value in request.items():
        if not _CHANGE_TYPES[key](value):
            raise ConfigurationError(f"{key} cannot be {value!r}")
    if not request:
        raise ConfigurationError(f"{command} needs its value")
    return request


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


#: What a control request may hold; settings from flags and files are more lenient about text.
_CHANGE_TYPES: dict[str, Callable[[object], bool]] = {
    "rotation_deg": _is_number,
    "transpose": lambda value: isinstance(value, bool),
    "method": lambda value: isinstance(value, str),
}
