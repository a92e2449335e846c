"""The engine: blocks of frames in, images out. Live sessions, replay and offline reconstruction all run on this one.

Two sides work at the same time. ``add`` (one thread) finds each frame's position, decodes it and collects scan rows;
``accumulate`` (another) takes closed rows into the ring and into Psi. When rows close faster than they are accumulated,
``add`` does a share of that work itself: the sender is slowed down, and nothing is dropped.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from detectors.errors import ConfigurationError, DoesNotFit
from detectors.messages import FrameBlock
from stream.accumulator import Accumulator, SweepingAccumulator
from stream.array import Device
from stream.assembler import ClosedRow, RowAssembler, groups
from stream.gpu.decode import make_decoder
from stream.kernels import Abandoned, Method
from stream.optics import Probe
from stream.ring import RowRing
from stream.row_timing import RowTiming
from stream.setup import BATCH_ROWS, MemoryPlan, Setup, open_rows
from stream.snapshot import Counters, left_out_sentence
from stream.unpack import BRIGHT_FIELD, MOMENT_COLUMN, MOMENT_ROW, REASONS, TOTAL

_MOMENTS = (TOTAL, MOMENT_ROW, MOMENT_COLUMN)

#: Virtual images -> the sums over each frame that they are made from.
_SUMS_FOR: dict[str, tuple[int, ...]] = {
    "bright_field": (BRIGHT_FIELD,),
    "dark_field": (TOTAL, BRIGHT_FIELD),
    "com_row": _MOMENTS,
    "com_column": _MOMENTS,
}


@dataclass(frozen=True)
class View:
    """What an engine shows at one moment: ``images`` by name, how many scan rows hold data, the row that came last."""

    images: Mapping[str, np.ndarray]
    rows_acquired: int
    last_row: ClosedRow | None
    counters: Counters


class Engine:
    """One reconstruction, from its first frame on. Make it with the final optics; they can be changed later.

    ``threads``: how many the decoder and the contraction may use each (default: the cores there are). The kernels are
    made first, or, with ``in_background``, while frames are taken already: rows then wait in the ring.

    Where the plan has kernels in blocks, rows wait for a sweep. One begins in the background when the phase is looked
    at, none is under way and as much time has passed as the last one took; until it ends, images show what the one
    before has found. ``object`` and ``finish`` wait for a sweep of all rows that are there.
    """

    def __init__(
        self, setup: Setup, device: Device, *, threads: int | None = None, in_background: bool = False
    ) -> None:
        plan = MemoryPlan.of(setup, device)
        plan.check(device)
        self.setup, self.device, self.plan = setup, device, plan
        self._threads = threads or len(os.sched_getaffinity(0))
        # Two sides work at a time, each with its share of the threads, and a third makes the first kernels.
        self._executor = ThreadPoolExecutor(2 * self._threads + 1, thread_name_prefix="engine")
        geometry, shape = setup.geometry, setup.scan.shape
        pixels = len(geometry.bf_pixels)
        self._decoder = make_decoder(
            device,
            geometry.shape,
            setup.dtype,
            geometry.bf_pixels,
            geometry.good,
            self._executor,
            self._threads,
            maximum_is_masked=setup.maximum_is_masked,
            moments="com" in setup.channels,
            pattern="pattern" in setup.channels,
        )
        self._assembler = RowAssembler(
            shape,
            pixels,
            setup.dtype,
            self._decoder.sums_dtype,
            open_rows(setup),
            in_order=setup.scan.positions is None,
            scanned=setup.scan.scanned_in(0) if setup.passes == 1 else setup.scan.scanned,
            xp=self._decoder.xp,
        )
        self._decoder.rows_taken()
        self._timing = RowTiming(setup.scan) if setup.scan.rows_by_time else None
        self._rows_lock = threading.Lock()
        self._compute_lock = threading.RLock()
        # Without a phase the ring keeps no pixels: only which frames came.
        self._ring = RowRing(shape, setup.kept_pixels, setup.dtype, device, setup.averaging)
        self._accumulator: Accumulator | SweepingAccumulator | None = None
        """None while its kernels are being made, and where the phase is left out"""
        self._coming: Accumulator | SweepingAccumulator | None = None
        """the accumulator that is catching up with the ring: of the first kernels, or of changed optics"""
        self._first_kernels: Future[None] | None = None
        self._sweeping: Future[bool] | None = None
        """the sweep in the background that began last"""
        self._sweep_lock = threading.Lock()
        """held during a sweep; never waited for with the compute lock in hand"""
        self._next_sweep = 0.0
        self._closing = False
        self._changing = threading.Lock()
        self._last_view: View | None = None
        self._sums = np.zeros((*shape, 4), np.float64)
        self._missing_of_row = np.zeros(shape[0], np.int64)
        self._row_intensity = np.zeros(shape[0], np.float64)
        """mean counts of a frame in each row"""
        self._received = self._accepted = self._outside = self._duplicate = self._late = self._undecodable = 0
        self._missing_before = 0
        self._passes_of_row = np.zeros(shape[0], np.int64)
        self._finished_missing: int | None = None
        self._frames_ahead = 0
        self.last_row: ClosedRow | None = None
        """the row that was accumulated last"""
        self.renewed = 0
        """how often the image has become another one without new rows: kernels were ready, or a sweep has ended"""
        self.beyond = 0
        """frames of passes beyond those that are taken"""
        self.last_reason = ""
        """why the last undecodable frame was one"""
        if "phase" in setup.channels:
            self._first_kernels = self._executor.submit(self._contract_anew, setup, plan)
            if not device.is_gpu:
                self._executor.submit(self._warm_up)
            if not in_background:
                self.wait_until_ready()

    def _warm_up(self) -> None:
        """Let the first rows find their memory cleared, and the first image its FFT: they come at full speed."""
        for row in range(self.setup.scan.shape[0]):
            if self._closing:
                return
            with self._compute_lock:
                self._ring.touch(row)
        self.device.fft.ifft2(np.zeros(self.setup.scan.shape, np.complex64))

    @property
    def preparing(self) -> bool:
        """Whether kernels are being made, so that the phase is not there yet, or not of the newest rows."""
        return "phase" in self.setup.channels and self._accumulator is None

    def wait_until_ready(self) -> None:
        """Wait for kernels that are being made in the background. Raises ``DoesNotFit`` when that has failed."""
        if self._first_kernels is not None:
            try:
                self._first_kernels.result()
            except Exception as error:  # memory that the plan did not foresee, or the device's own errors
                raise DoesNotFit(f"the kernels could not be made: {error}") from error

    def close(self) -> None:
        """End the engine's threads, and a sweep or the making of kernels that is under way.

        Images can still be taken; rows that wait do not get into them any more.
        """
        with self._compute_lock:  # never in the middle of a batch, which needs the threads
            self._closing = True
        with self._sweep_lock:  # it uses threads of the executor to its end; none begins after this
            pass
        self._executor.shutdown(wait=True)

    def _make_accumulator(self, setup: Setup, plan: MemoryPlan) -> Accumulator | SweepingAccumulator:
        several = setup.passes != 1
        if plan.block_bytes is None:
            return Accumulator(
                setup.make_kernels(self.device, lambda: not self._closing, self._executor, self._threads),
                self._ring,
                self.device,
                keep_contracted=several,
                executor=self._executor,
                threads=self._threads,
            )
        return SweepingAccumulator(
            setup.stream_kernels(self.device, plan.block_bytes),
            self._ring,
            self.device,
            rewritten=several,
            executor=self._executor,
            threads=self._threads,
        )

    # frames in

    def add(self, block: FrameBlock) -> None:
        """Take a block of frames of this series. Frames are counted, whatever becomes of them; none raises.

        Raises ``ConfigurationError`` when rows are to be found by time, and the frames have no time stamps, and
        ``DoesNotFit`` when the kernels could not be made.
        """
        if self._first_kernels is not None and self._first_kernels.done():
            self.wait_until_ready()
        if (sweeping := self._sweeping) is not None and sweeping.done() and (error := sweeping.exception()) is not None:
            raise DoesNotFit(f"the kernels could not be made: {error}") from error
        self._received += len(block)
        scan, timing = self.setup.scan, self._timing
        if timing is None:
            # Each frame has a position of its own, unless its number comes twice.
            distinct = bool((block.indices[1:] > block.indices[:-1]).all())
            self._add_located(block, *scan.locate(block.indices), distinct=distinct)
            return
        for located in timing.take(block):
            self._add_located(*located)

    def _add_located(
        self, block: FrameBlock, passes: np.ndarray, rows: np.ndarray, columns: np.ndarray, *, distinct: bool = False
    ) -> None:
        if self.setup.passes is not None:
            self.beyond += int(np.count_nonzero(passes >= self.setup.passes))
        inside = (rows >= 0) & (passes >= 0) & self._plausible(passes)
        self._outside += int(np.count_nonzero(~inside))
        which = np.flatnonzero(inside)
        while len(which):
            which = self._add_unique(block, which, passes, rows, columns, distinct)

    def _plausible(self, passes: np.ndarray) -> np.ndarray:
        """Frames of an announced pass; in an endless series, not of one far ahead unless a whole row says so."""
        if self.setup.passes is not None:
            return passes < self.setup.passes
        # A large block of a small scan holds many passes.
        near = passes <= self._assembler.newest_pass + 1 + len(passes) // self.setup.scan.frames_per_pass
        self._frames_ahead = 0 if near.any() else self._frames_ahead + len(passes)
        return near | (self._frames_ahead > self.setup.scan.shape[1])

    def _add_unique(
        self,
        block: FrameBlock,
        which: np.ndarray,
        passes: np.ndarray,
        rows: np.ndarray,
        columns: np.ndarray,
        distinct: bool,
    ) -> np.ndarray:
        """Add the first frame of each position (of which each has but one if ``distinct``), as many as can be added
        together; returns the others, to be looked at again.

        A second frame is a duplicate only if the first one was sound.
        """
        with self._rows_lock:
            late, duplicate = self._assembler.classify(passes[which], rows[which], columns[which])
        self._late += int(np.count_nonzero(late))
        self._duplicate += int(np.count_nonzero(duplicate))
        which = which[~late & ~duplicate]
        if len(which) == 0:
            return which
        ny, nx = self.setup.scan.shape
        # One pass at a time: a row's frames of two passes must never be looked at together.
        take = passes[which] == passes[which].min()
        row_key = passes[which] * ny + rows[which]
        if not distinct:
            _, first = np.unique(row_key * nx + columns[which], return_index=True)
            take &= np.isin(np.arange(len(which)), first)
        # More rows at a time than there are slots could never be placed together.
        keys, _ = groups(row_key[take])
        if len(keys) > BATCH_ROWS:
            take &= row_key <= keys[BATCH_ROWS - 1]
        chosen = which[take]
        slots = self._slots_for(passes[chosen], rows[chosen])
        targets = slots * nx + columns[chosen]
        assembler = self._assembler
        status = self._decoder.decode(
            block if len(chosen) == len(block) else block.take(chosen),
            targets,
            assembler.pixels.reshape(-1, assembler.pixels.shape[2]),
            assembler.sums.reshape(-1, 4),
        )
        sound = status == 0
        good, slots = (chosen, slots) if sound.all() else (chosen[sound], slots[sound])
        if len(good) < len(chosen):
            self._undecodable += len(chosen) - len(good)
            self.last_reason = REASONS[int(status[~sound][-1])]
        with self._rows_lock:
            assembler.mark(slots, passes[good], rows[good], columns[good], block.time_ns)
        self._accepted += len(good)
        return which[~take]

    def _slots_for(self, passes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        while True:
            with self._rows_lock:
                slots = self._assembler.open_slots(passes, rows)
                if slots is None and not self._assembler.closed:
                    self._assembler.close_oldest()
            if slots is not None:
                return slots
            if self._closing:
                raise RuntimeError("frames for an engine that is closed")
            self.accumulate()

    def undecodable(self, frames: int, reason: str) -> None:
        """Count frames that the protocol could not read at all."""
        self._received += frames
        self._undecodable += frames
        self.last_reason = reason

    def close_rows(self) -> None:
        """Close every open row with what it has: the series is over, or silent."""
        with self._rows_lock:
            self._assembler.close_all()

    def finish(self, announced: int | None = None) -> None:
        """The series is over: close and accumulate everything, and settle how many frames are missing.

        ``announced``: how many frames the series was to have; by default whole passes, or, of an endless series, the
        passes that began.
        """
        for located in self._timing.rest() if self._timing is not None else ():
            self._add_located(*located)
        self.close_rows()
        while self.accumulate():
            pass
        self.wait_until_ready()
        with self._changing:
            self._let_wait_no_longer()
        passes = self.setup.passes or max(1, self._assembler.newest_pass + 1)
        expected = self.setup.scan.frames_in(passes)
        if announced is not None:
            expected = min(announced, expected) if self.setup.passes else announced
        self._finished_missing = max(0, self.setup.scan.positions_in(expected) - self._accepted)

    # rows into the image

    @property
    def closed_rows(self) -> int:
        """Rows that wait for ``accumulate``."""
        return 0 if self._closing else len(self._assembler.closed)

    def accumulate(self, most: int = BATCH_ROWS) -> int:
        """Take up to ``most`` closed rows into the ring and into Psi; returns how many."""
        with self._compute_lock:
            if self._closing:
                return 0
            batch: list[ClosedRow] = []
            with self._rows_lock:
                closed = self._assembler.closed
                while closed and len(batch) < most and closed[0].row not in {other.row for other in batch}:
                    batch.append(closed.popleft())
            if not batch:
                return 0
            rows = np.array([item.row for item in batch])
            if (current := self._accumulator or self._coming) is not None:
                current.remove(rows)
            for item in batch:
                self._commit(item)
            self._decoder.rows_taken()
            # Without an accumulator, kernels are being made, and whoever does it adds the rows; or there is no phase.
            # And a sweep finds them in the ring.
            if isinstance(self._accumulator, Accumulator):
                self._accumulator.add(rows)
            with self._rows_lock:
                for item in batch:
                    self._assembler.release(item.slot)
            self.last_row = batch[-1]
            return len(batch)

    def _commit(self, item: ClosedRow) -> None:
        ring, sums = self._ring, self._sums[item.row]
        received = self._assembler.received[item.slot]
        if item.pass_ != ring.pass_of_row[item.row]:
            if ring.averaging:
                self._passes_of_row[item.row] += 1
            elif ring.pass_of_row[item.row] >= 0:
                self._missing_before += int(self._missing_of_row[item.row])
                sums[:] = 0
        ring.commit(item.row, item.pass_, self._assembler.pixels[item.slot][:, : self.setup.kept_pixels], received)
        sums[received] += self._assembler.sums[item.slot][received]
        self._missing_of_row[item.row] = self._missing_in(item.row)
        held = ring.frames[item.row] > 0
        self._row_intensity[item.row] = (sums[held, TOTAL] / ring.frames[item.row][held]).mean()

    def _missing_in(self, row: int) -> int:
        expected = self._passes_of_row[row] if self._ring.averaging else 1
        scanned = self.setup.scan.scanned_in(int(self._ring.pass_of_row[row]))[row]
        return int((expected - self._ring.frames[row])[scanned].sum())

    # images out

    def change(self, probe: Probe, method: Method) -> None:
        """New optics or another method, without a new scan: every row in the ring is contracted again.

        Energy and semi-angle must stay what they were, since they decide which pixels the ring holds. Where the phase
        is left out, only the axes matter, to the centre of mass.
        """
        kept = (self.setup.probe.energy_ev, self.setup.probe.semiangle)
        if (probe.energy_ev, probe.semiangle) != kept:
            raise ValueError("energy and semi-angle cannot be changed while scanning")
        self.wait_until_ready()
        setup = replace(self.setup, probe=probe, method=method)
        plan = MemoryPlan.of(setup, self.device, held=self.plan)
        plan.check(self.device, held=self.plan)
        if "phase" not in setup.channels:
            with self._compute_lock:
                self.setup, self.plan = setup, plan
            return
        with self._changing:
            before = self.setup, self.plan
            try:
                self._contract_anew(setup, plan)
            except Exception as error:
                # The scan must not be lost with it: back to what could be done before, for which the memory is needed
                # that the failed attempt holds.
                traceback.clear_frames(error.__traceback__)
                self._contract_anew(*before)
                raise DoesNotFit(f"the new optics could not be applied ({error}); the old ones are kept") from error

    def _contract_anew(self, setup: Setup, plan: MemoryPlan) -> None:
        with self._compute_lock:
            self._last_view = self.view() if self._accumulator is not None else self._last_view
            # The old kernels go before the new ones come: both together were not planned for. Meanwhile rows go on
            # into the ring, and viewers see what there was.
            if isinstance(self._accumulator, SweepingAccumulator):
                self._accumulator.call_off()
            self._accumulator = self._coming = None
            self.setup, self.plan = setup, plan
        with self._sweep_lock:  # the old kernels' last sweep holds some of them until it ends
            pass
        try:
            self._coming = coming = self._make_accumulator(setup, plan)
        except Abandoned:  # the engine is being closed
            return
        if isinstance(coming, SweepingAccumulator):
            while not self._sweep(coming):
                if self._closing:
                    return
        while True:
            with self._compute_lock:
                rows = coming.missing()[:BATCH_ROWS]
                if len(rows) == 0 or isinstance(coming, SweepingAccumulator):
                    self._accumulator, self._coming, self._last_view = coming, None, None
                    self.renewed += 1
                    return
                coming.add(rows)

    def _sweep(self, accumulator: SweepingAccumulator) -> bool:
        """Let the rows that wait into its Psi, after a sweep that is under way; False where it was called off."""
        with self._sweep_lock:
            if self._closing:
                return False
            with self._compute_lock:
                if accumulator not in (self._accumulator, self._coming):
                    return False
                sweep = accumulator.begin(self._mean_intensity())
            began = time.monotonic()
            done = False
            try:
                done = accumulator.run(sweep, lambda: not self._closing)
            finally:
                with self._compute_lock:
                    self._next_sweep = 2 * time.monotonic() - began
                    if not (done := done and accumulator.end(sweep)):
                        accumulator.call_off()
                    self.renewed += done
            return done

    def _let_wait_no_longer(self) -> None:
        """Wait until every row that is there by now is in the image. Raises ``DoesNotFit``."""
        while isinstance(accumulator := self._accumulator, SweepingAccumulator) and not self._closing:
            with self._compute_lock:
                waiting = len(accumulator.missing())
            try:
                if not waiting or self._sweep(accumulator):
                    return
            except Exception as error:  # memory that the plan did not foresee, or the device's own errors
                raise DoesNotFit(f"the kernels could not be made: {error}") from error

    def _begin_sweep(self) -> None:
        """Have a sweep in the background, if there is cause. With the compute lock in hand."""
        accumulator = self._accumulator
        if not isinstance(accumulator, SweepingAccumulator) or self._closing or time.monotonic() < self._next_sweep:
            return
        if self._sweep_lock.locked() or not (self._sweeping is None or self._sweeping.done()):
            return
        if len(accumulator.missing()):
            self._sweeping = self._executor.submit(self._sweep, accumulator)

    def reset(self) -> None:
        """Forget every row and the mean pattern; counters stay. Rows to come are shown as they come."""
        with self._compute_lock:
            if (current := self._accumulator or self._coming) is not None:
                current.clear()
            self._last_view = None
            self._missing_before += int(self._missing_of_row.sum())
            self._missing_of_row[:] = 0
            self._ring.pass_of_row[:] = -1
            self._ring.frames[:] = 0
            self._passes_of_row[:] = 0
            self._sums[:] = 0
            self._decoder.forget()

    @property
    def counters(self) -> Counters:
        """What became of the frames so far."""
        missing = self._finished_missing
        if missing is None:
            missing = self._missing_before + int(self._missing_of_row.sum())
        return Counters(self._received, missing, self._duplicate, self._late, self._undecodable, self._outside)

    @property
    def passes_done(self) -> int:
        """How many passes are over."""
        with self._rows_lock:
            return self._assembler.passes_done

    @property
    def rows_acquired(self) -> np.ndarray:
        """bool (scan rows,): the rows that hold data."""
        return self._ring.acquired

    @property
    def positions_received(self) -> np.ndarray:
        """bool scan shape: the positions whose frame came."""
        return self._ring.frames > 0

    def object(self) -> np.ndarray:
        """The complex object, complex64 scan shape; ones before the first row. See ``Accumulator.object``.

        Waits for kernels that are being made, and for a sweep where rows wait for one. Raises ``DoesNotFit`` when that
        has failed, and ``ConfigurationError`` where the phase is left out.
        """
        if "phase" not in self.setup.channels:
            raise ConfigurationError(f"there is no object without the phase; {left_out_sentence(self.setup.left_out)}")
        self.wait_until_ready()
        with self._changing:
            self._let_wait_no_longer()
            with self._compute_lock:
                return self._object()

    def _object(self) -> np.ndarray:
        mean_intensity, accumulator = self._mean_intensity(), self._accumulator
        if mean_intensity is None:
            return np.ones(self.setup.scan.shape, np.complex64)
        if isinstance(accumulator, SweepingAccumulator):
            mean_intensity = accumulator.mean_intensity  # of the rows that its image shows
        if accumulator is None or mean_intensity is None:  # nothing of it is known yet
            return np.full(self.setup.scan.shape, np.nan, np.complex64)
        return accumulator.object(mean_intensity)

    def _mean_intensity(self) -> float | None:
        """Mean counts of a frame; a missing frame counts as its row's mean, a missing row as the mean row."""
        rows = self._ring.acquired
        intensity = float(self._row_intensity[rows].mean()) if rows.any() else 0.0
        return intensity if intensity > 0 else None

    def view(self, names: Iterable[str] | None = None) -> View:
        """Images (see ``images``) together with what they show, all of one moment; no images before the first row."""
        wanted = set(self.setup.image_names if names is None else names)
        # That waits for frames that are being decoded, which should not keep rows waiting.
        pattern = self.images(wanted & {"mean_pattern"})
        with self._compute_lock:
            if self._accumulator is None and self._last_view is not None:
                return replace(self._last_view, last_row=self.last_row, counters=self.counters)
            rows, last_row, counters = int(self.rows_acquired.sum()), self.last_row, self.counters
            images = {} if rows == 0 else self.images(wanted - {"mean_pattern"}) | pattern
            return View(images, rows, last_row, counters)

    def images(self, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Images by name (see ``stream.snapshot.IMAGE_UNITS``): float32, NaN where there is nothing yet.

        ``names``: by default all that this set-up makes; there are no others.
        """
        made = set(self.setup.image_names)
        names = made if names is None else made & set(names)
        out: dict[str, np.ndarray] = {}
        columns = {column for name in names for column in _SUMS_FOR.get(name, ())}
        with self._compute_lock:
            acquired = self._ring.acquired
            if names & {"phase", "amplitude"}:
                obj = self._object()
                unknown = ~acquired if self._accumulator is None else ~(acquired & self._accumulator.in_psi)
                obj[unknown] = np.nan
                out["phase"], out["amplitude"] = np.angle(obj), np.abs(obj)
                out["phase"][unknown] = np.nan
                self._begin_sweep()
            frames = np.where(self._ring.frames > 0, self._ring.frames, np.nan) if columns else np.nan
            sums = {column: self._sums[..., column] / frames for column in columns}
        if "bright_field" in names:
            out["bright_field"] = sums[BRIGHT_FIELD]
        if "dark_field" in names:
            out["dark_field"] = sums[TOTAL] - sums[BRIGHT_FIELD]
        if names & {"com_row", "com_column"}:
            out["com_row"], out["com_column"] = self._centre_of_mass(sums)
        if "mean_pattern" in names:
            out["mean_pattern"] = self._decoder.mean_pattern()
        return {name: np.ascontiguousarray(image, np.float32) for name, image in out.items() if name in names}

    def _centre_of_mass(self, sums: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Centre of mass of each whole pattern relative to the disk's centre, in the scan frame [mrad].

        CoM_scan = R(theta) T CoM_detector, with the rotation of the reconstruction.
        """
        geometry = self.setup.geometry
        with np.errstate(invalid="ignore", divide="ignore"):
            row, column = (
                (sums[moment] / sums[TOTAL] - centre) * pixel
                for moment, centre, pixel in zip(
                    (MOMENT_ROW, MOMENT_COLUMN), geometry.bf_centre_px, geometry.pixel_mrad, strict=True
                )
            )
        return self.setup.probe.axes.to_scan(row, column)
