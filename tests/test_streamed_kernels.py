"""Kernels that are made in blocks, for all rows that wait: against resident ones, and against float64 brute force."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stream.accumulator
import stream.setup
from detectors.errors import DoesNotFit
from stream.accumulator import SweepingAccumulator
from stream.api import SessionOptions
from stream.array import Device, choose_device
from stream.config import Layer
from stream.contraction import Product
from stream.engine import Engine
from stream.kernels import METHODS, KernelTable, StreamedKernels, column_blocks, table_bytes
from stream.offline import reconstruct_file
from stream.ring import FrozenRing, RowRing
from stream.setup import MemoryPlan, Setup
from stream.snapshot import Counters
from tests import oracle
from tests.data_helpers import Case, accumulate_all, assert_object, block, feed, filled, pass_indices, running
from tests.live_helpers import (
    OPTICS_AND_DISK,
    SCAN,
    assert_same_object,
    run_session,
    scan_file,
    serving,
)
from tests.test_contraction import full_ring

CPU = choose_device("cpu")
ABERRATIONS = {"C10": -60.0, "C12": 25.0, "phi12": 30.0, "C21": 700.0, "phi21": -50.0}
#: More rows than the contraction takes at a time.
CASE = Case(scan=(19, 10), aberrations=ABERRATIONS)
#: Three to five blocks, and one a column.
BUDGET, LEAST = 25_000, 1

CASES = {
    "more rows than lanes": CASE,
    "odd scan": Case(scan=(7, 9), rotation=33.0, aberrations=ABERRATIONS),
    "Nyquist rows and columns": Case(scan=(8, 10), rotation=-71.0, step=(0.6, 0.6), aberrations=ABERRATIONS),
    "transposed, masked": Case(transpose=True, masked=((5, 7), (6, 4)), aberrations=ABERRATIONS),
    "one column": Case(scan=(9, 1), aberrations=ABERRATIONS),
    "float": Case(dtype="<f4", dose=40.0, aberrations=ABERRATIONS),
}


def streamed(case: Case, budget: int = BUDGET, **changes: Any) -> Setup:
    return case.setup(kernel_bytes=budget, **changes)


def shown(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    """What a viewer sees at once: the complex object, and which rows it shows."""
    images = engine.images(["phase", "amplitude"])
    rows = np.isfinite(images["phase"]).all(axis=1)
    assert np.isnan(images["phase"][~rows]).all()
    return images["amplitude"] * np.exp(1j * images["phase"]), rows


def assert_shows(engine: Engine, case: Case, counts: np.ndarray, held: np.ndarray | None = None) -> None:
    """A viewer sees, at once, the object of ``counts``, where the rows of ``held`` (bool scan shape) are there."""
    held = np.ones(case.scan, bool) if held is None else held
    answer, rows = shown(engine)
    np.testing.assert_array_equal(rows, held.any(axis=1))
    expected = case.true_object(filled(counts, held))
    assert np.abs(answer - expected)[rows].max() < 2e-5 * np.abs(expected - expected.mean()).max()


class Halting:
    """Sweeps that stop after their first block until they are told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on, self.armed = threading.Event(), threading.Event(), False
        tables, halting = StreamedKernels.tables, self

        def slowly(kernels: StreamedKernels, *given: Any) -> Iterator[tuple[slice, KernelTable]]:
            for number, item in enumerate(tables(kernels, *given)):
                if number == 1 and halting.armed:
                    halting.reached.set()
                    assert halting.go_on.wait(60)
                yield item

        monkeypatch.setattr(StreamedKernels, "tables", slowly)

    def begin(self, engine: Engine) -> None:
        """Have a sweep in the background, and return in its middle."""
        self.reached.clear()
        self.go_on.clear()
        self.armed = True
        engine._next_sweep = 0.0
        engine.images(["phase"])
        assert self.reached.wait(60), "nobody swept"

    def end(self, engine: Engine) -> bool:
        """Let it end; whether it was of use."""
        self.armed = False
        self.go_on.set()
        assert engine._sweeping is not None
        return engine._sweeping.result(60)


@pytest.fixture
def halting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Halting]:
    halting = Halting(monkeypatch)
    yield halting
    halting.go_on.set()


# the blocks


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [LEAST, 4_000, BUDGET, 1 << 30])
@pytest.mark.parametrize("name", CASES)
def test_the_blocks_make_up_the_table(name: str, budget: int, threads: int) -> None:
    setup = CASES[name].setup()
    whole, parts = setup.make_kernels(CPU), setup.stream_kernels(CPU, budget)
    assert isinstance(whole, KernelTable)
    band, pixels = whole.passband, whole.pixels
    assert [ix for some in parts.blocks for ix in some] == list(range(band.column_count))
    stop, most = 0, 0
    executor = ThreadPoolExecutor(2) if threads > 1 else None
    for some, (entries, table) in zip(parts.blocks, parts.tables(lambda: True, executor, threads), strict=True):
        assert entries.start == stop
        stop, most = entries.stop, max(most, table.nbytes)
        np.testing.assert_array_equal(table.weights, whole.weights[entries])
        assert table.nbytes == table_bytes(band, pixels, False, some)
        assert table.nbytes <= budget or len(some) == 1
        assert [ix for group in table.passband.groups for ix in group] == list(range(len(some)))
    if executor is not None:
        executor.shutdown()
    assert stop == band.entries
    assert parts.nbytes == most + parts.at_zero.nbytes
    pattern = np.random.default_rng(0).random(pixels).astype(np.float32)
    np.testing.assert_array_equal(parts.sums_at_zero(pattern), whole.sums_at_zero(pattern))


def test_making_blocks_can_be_broken_off() -> None:
    kernels = CASE.setup().stream_kernels(CPU, BUDGET)
    assert len(kernels.blocks) > 2
    wanted = [True]
    with ThreadPoolExecutor(2) as executor:
        for given in ((), (executor, 3)):
            wanted[0] = True
            tables = kernels.tables(lambda: wanted[0], *given)
            next(tables)
            wanted[0] = False
            assert list(tables) == []


# a frozen ring


@pytest.mark.parametrize("averaging", [False, True])
def test_a_frozen_ring_holds_what_it_held(averaging: bool) -> None:
    rng = np.random.default_rng(0)
    ring = RowRing((3, 5), 7, np.dtype("u2"), CPU, averaging)
    some = np.array([True, False, True, True, False])
    for row, received in enumerate((some, np.ones(5, bool), np.ones(5, bool))):
        ring.commit(row, 0, rng.integers(0, 99, (5, 7), "u2"), received)
    rows = np.arange(3)
    before, frozen = ring.filled(rows), FrozenRing(ring)
    if averaging:  # else the gaps alone are remembered
        frozen.put_aside([0])
    ring.commit(0, 0, rng.integers(0, 99, (5, 7), "u2"), ~some)
    frozen.put_aside([2])
    assert frozen.set_aside(rows) == 1 + averaging
    ring.commit(2, 1, rng.integers(0, 99, (5, 7), "u2"), some)
    frozen.put_aside([2])
    np.testing.assert_array_equal(frozen.filled(rows), before)
    counts, scale, others = frozen.lying(rows)
    np.testing.assert_array_equal(np.isnan(scale), [True, False, True])
    np.testing.assert_array_equal(others, before[[0, 2]])
    np.testing.assert_array_equal(counts[1], before[1])
    assert ring.set_aside(rows) == 0


# images


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("budget", [LEAST, BUDGET])
@pytest.mark.parametrize("name", CASES)
def test_streamed_equals_resident_and_the_oracle(name: str, budget: int, threads: int) -> None:
    case = CASES[name]
    counts = case.counts()
    with running(streamed(case, budget), threads=threads) as engine, running(case.setup()) as resident:
        if name == "more rows than lanes":
            assert isinstance(engine._accumulator, SweepingAccumulator)
        for other in (engine, resident):
            feed(other, counts)
            other.finish()
        assert_object(engine, case, counts)
        assert oracle.relative_error(engine.object(), resident.object()) < 1e-6 or case.scan[1] == 1
        assert_shows(engine, case, counts)
        assert engine.counters == resident.counters == Counters(received=case.positions)


def test_an_unfinished_pass() -> None:
    counts = CASE.counts()
    held = np.zeros(CASE.scan, bool)
    held[:7] = True
    held[3, 4] = held[6, 0] = False
    with running(streamed(CASE)) as engine:
        np.testing.assert_array_equal(engine.object(), np.ones(CASE.scan))
        feed(engine, counts, np.flatnonzero(held))
        assert_object(engine, CASE, filled(counts, held[: CASE.scan[0]] & (np.arange(19) < 6)[:, None]))
        engine.finish()
        assert_object(engine, CASE, filled(counts, held))
        assert_shows(engine, CASE, counts, held)


def test_neither_frames_nor_viewers_wait_for_a_sweep(halting: Halting) -> None:
    counts = CASE.counts()
    held = np.zeros(CASE.scan, bool)
    held[:5] = True
    with running(streamed(CASE)) as engine:
        feed(engine, counts, range(50))
        assert not shown(engine)[1].any(), "nothing is known before the first sweep"
        assert engine._sweeping is not None
        assert engine._sweeping.result(60)
        assert_shows(engine, CASE, counts, held)
        feed(engine, counts, range(50, 90))
        halting.begin(engine)
        feed(engine, counts, range(90, 150))
        assert_shows(engine, CASE, counts, held)
        view = engine.view()
        assert view.rows_acquired == 15
        assert np.isfinite(view.images["bright_field"]).sum() == 150
        assert halting.end(engine)
        held[:9] = True
        assert_shows(engine, CASE, counts, held)
        feed(engine, counts, range(150, 190))
        engine.finish()
        assert_shows(engine, CASE, counts)


def test_sweeps_leave_as_much_time_as_they_take() -> None:
    with running(streamed(CASE)) as engine:
        feed(engine, CASE.counts(), range(50))
        engine._next_sweep = float("inf")
        shown(engine)
        assert engine._sweeping is None
        engine._next_sweep = 0.0
        shown(engine)
        assert engine._sweeping is not None
        assert engine._sweeping.result(60)
        shown(engine)
        assert engine._sweeping.done(), "no row waits, so none begins"


def test_late_frames_of_a_row_during_a_sweep(halting: Halting) -> None:
    """They are in the image after the next sweep, and this one is of what was there."""
    counts = CASE.counts()
    held = np.zeros(CASE.scan, bool)
    held[:6] = True
    held[2, 3:7] = held[5, 9] = False
    with running(streamed(CASE)) as engine:
        feed(engine, counts, np.flatnonzero(held))
        engine.close_rows()
        accumulate_all(engine)
        halting.begin(engine)
        feed(engine, counts, [*range(23, 27), 59])
        engine.close_rows()
        accumulate_all(engine)
        assert halting.end(engine)
        assert_shows(engine, CASE, counts, held)
        held[:6] = True
        assert_object(engine, CASE, filled(counts, held))
        feed(engine, counts, range(60, 190))
        engine.finish()
        assert_object(engine, CASE, counts)
        assert engine.counters == Counters(received=190)


@pytest.mark.parametrize("passes", [None, 4])
def test_rows_are_replaced_during_a_sweep(halting: Halting, passes: int | None) -> None:
    """A sweep shows the rows as they were when it began, however many are replaced meanwhile, some of them twice."""
    counts = [CASE.counts(seed) for seed in range(4)]
    with running(streamed(CASE, passes=passes)) as engine:
        feed(engine, counts[0])
        halting.begin(engine)
        feed(engine, counts[1], pass_indices(CASE, 1))
        feed(engine, counts[2], pass_indices(CASE, 2)[:70])
        assert halting.end(engine)
        assert_shows(engine, CASE, counts[0])
        mixed = np.concatenate([counts[2][:7], counts[1][7:]])
        halting.begin(engine)
        feed(engine, counts[2], pass_indices(CASE, 2)[70:])
        assert_shows(engine, CASE, counts[0])
        assert halting.end(engine)
        assert_shows(engine, CASE, mixed)
        feed(engine, counts[3], pass_indices(CASE, 3))
        engine.finish()
        assert_object(engine, CASE, counts[3])
        assert engine.counters == Counters(received=4 * 190)


def test_twenty_rolling_passes_leave_no_trace() -> None:
    with running(streamed(CASE, passes=None)) as engine, running(streamed(CASE)) as fresh:
        for number in range(20):
            counts = CASE.counts(number)
            feed(engine, counts, pass_indices(CASE, number))
            shown(engine)
        engine.finish()
        feed(fresh, counts)
        np.testing.assert_array_equal(engine.object(), fresh.object())


def test_averaging_during_a_sweep(halting: Halting) -> None:
    counts = [CASE.counts(seed) for seed in range(3)]
    with running(streamed(CASE, passes=3, averaging=True)) as engine:
        feed(engine, counts[0])
        halting.begin(engine)
        feed(engine, counts[1], pass_indices(CASE, 1))
        assert halting.end(engine)
        assert_shows(engine, CASE, counts[0].astype(float))
        feed(engine, counts[2], pass_indices(CASE, 2))
        engine.finish()
        assert_object(engine, CASE, np.mean(counts, axis=0))


@pytest.mark.parametrize("passes", [1, None])
def test_reset_during_a_sweep(halting: Halting, passes: int | None) -> None:
    counts = CASE.counts()
    held = np.zeros(CASE.scan, bool)
    held[9:] = True
    with running(streamed(CASE, passes=passes)) as engine:
        feed(engine, counts, range(40))
        halting.begin(engine)
        feed(engine, counts, range(40, 90))
        engine.reset()
        feed(engine, counts, range(90, 110))
        assert not halting.end(engine), "what it found is forgotten"
        assert not shown(engine)[1].any()
        feed(engine, counts, range(110, 190))
        engine.finish()
        assert_object(engine, CASE, filled(counts, held))
        engine.reset()
        np.testing.assert_array_equal(engine.object(), np.ones(CASE.scan))


def test_other_optics_during_a_sweep(halting: Halting) -> None:
    other = replace(CASE, rotation=70.0, aberrations={"C10": 40.0})
    counts, newer = CASE.counts(), CASE.counts(1)
    with running(streamed(CASE, passes=2)) as engine:
        feed(engine, counts)
        halting.begin(engine)
        halting.armed = False
        changing = threading.Thread(target=engine.change, args=(other.probe, METHODS["ssb"]))
        changing.start()
        feed(engine, newer, pass_indices(CASE, 1)[:60])
        halting.end(engine)
        changing.join(60)
        assert not changing.is_alive()
        feed(engine, newer, pass_indices(CASE, 1)[60:])
        engine.finish()
        assert_object(engine, other, newer)
        engine.change(CASE.probe, METHODS["ssb"])
        assert_shows(engine, CASE, newer)


def test_rows_that_come_while_other_optics_are_swept(halting: Halting) -> None:
    other = replace(CASE, aberrations={"C10": 40.0})
    counts, newer = CASE.counts(), CASE.counts(1)
    with running(streamed(CASE, passes=2)) as engine:
        feed(engine, counts)
        engine.object()
        halting.armed = True
        changing = threading.Thread(target=engine.change, args=(other.probe, METHODS["ssb"]))
        changing.start()
        assert halting.reached.wait(60)
        feed(engine, newer, pass_indices(CASE, 1))
        assert_object_of_view(engine, CASE, counts)
        halting.armed = False
        halting.go_on.set()
        changing.join(60)
        assert_shows(engine, other, counts)
        engine.finish()
        assert_object(engine, other, newer)


def assert_object_of_view(engine: Engine, case: Case, counts: np.ndarray) -> None:
    """While optics change, a viewer sees what there was."""
    images = engine.view().images
    expected = case.true_object(counts)
    np.testing.assert_allclose(images["phase"], np.angle(expected), atol=1e-5)


def test_in_focus_and_back_during_a_scan() -> None:
    """Without aberrations the kernels are small, and no sweep is needed."""
    focus = replace(CASE, aberrations={})
    counts = CASE.counts()
    with running(streamed(CASE)) as engine:
        feed(engine, counts, range(100))
        engine.change(focus.probe, METHODS["ssb"])
        assert not isinstance(engine._accumulator, SweepingAccumulator)
        assert engine.plan.block_bytes is None
        feed(engine, counts, range(100, 150))
        engine.change(CASE.probe, METHODS["ssb"])
        assert isinstance(engine._accumulator, SweepingAccumulator)
        feed(engine, counts, range(150, 190))
        engine.finish()
        assert_object(engine, CASE, counts)


def test_the_end_of_the_series_during_a_sweep(halting: Halting) -> None:
    counts = CASE.counts()
    with running(streamed(CASE)) as engine:
        feed(engine, counts, range(120))
        halting.begin(engine)
        feed(engine, counts, range(120, 190))
        halting.armed = False
        finishing = threading.Thread(target=engine.finish)
        finishing.start()
        finishing.join(0.2)
        assert finishing.is_alive(), "it waits for a sweep of all rows"
        assert halting.end(engine)
        finishing.join(60)
        assert not finishing.is_alive()
        assert_shows(engine, CASE, counts)


def test_closing_breaks_a_sweep_off(halting: Halting) -> None:
    counts = CASE.counts()
    held = np.zeros(CASE.scan, bool)
    held[:5] = True
    engine = Engine(streamed(CASE), CPU, threads=2)
    feed(engine, counts, range(50))
    engine.object()
    feed(engine, counts, range(50, 190))
    halting.begin(engine)
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    assert not halting.end(engine)
    closing.join(60)
    assert not closing.is_alive()
    assert_shows(engine, CASE, counts, held)
    assert not engine._sweep(engine._accumulator), "none begins any more"


def test_kernels_that_cannot_be_made_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kernels: StreamedKernels, *given: Any) -> Any:
        raise MemoryError("no room")

    counts = CASE.counts()
    with running(streamed(CASE)) as engine:
        with monkeypatch.context() as broken:
            broken.setattr(StreamedKernels, "tables", fail)
            feed(engine, counts, range(50))
            with pytest.raises(DoesNotFit, match="kernels could not be made: no room"):
                engine.object()
            engine._next_sweep = 0.0
            shown(engine)
            assert engine._sweeping is not None
            assert isinstance(engine._sweeping.exception(60), MemoryError)
            with pytest.raises(DoesNotFit, match="no room"):
                engine.add(block(counts, [50]))
        engine._next_sweep = 0.0
        shown(engine)
        assert engine._sweeping.result(60)
        feed(engine, counts, range(50, 190))
        engine.finish()
        assert_object(engine, CASE, counts)


# below the engine


def swept(setup: Setup, ring: RowRing, executor: ThreadPoolExecutor) -> SweepingAccumulator:
    kernels = setup.stream_kernels(CPU, BUDGET)
    return SweepingAccumulator(kernels, ring, CPU, rewritten=True, executor=executor, threads=2)


@pytest.mark.parametrize("aberrations", [ABERRATIONS, {}])
@pytest.mark.parametrize("method", ["ssb", "ssb-single"])
def test_matrix_products_with_blocks(
    method: str, aberrations: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that a GPU takes, of complex kernels and of real ones."""
    monkeypatch.setattr(stream.accumulator, "contraction", Product)
    case = replace(CASE, aberrations=aberrations)
    setup = case.setup(method)
    ring, counts = full_ring(case, setup)
    with ThreadPoolExecutor(2) as executor:
        accumulator = swept(setup, ring, executor)
        assert len(accumulator.kernels.blocks) > 1
        sweep = accumulator.begin(1.0)
        assert accumulator.run(sweep, lambda: True)
        assert accumulator.end(sweep)
    mean = float(case.counts()[:, :, case.good].sum(axis=2).mean())
    expected = case.true_object(case.counts(), method)
    assert oracle.relative_error(accumulator.object(mean), expected) < 3e-6
    np.testing.assert_allclose(accumulator.mean_bf_pattern(), counts.mean(axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize("form", ["Dense", "Product"])
def test_a_row_that_is_replaced_while_it_is_read(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of it may be half old and half new: it is read again, from where it was set aside."""
    setup = CASE.setup(passes=None)
    ring, _ = full_ring(CASE, setup)
    new = CASE.counts(1).reshape(*CASE.scan, -1)[:, :, setup.geometry.bf_pixels]
    if form == "Product":
        monkeypatch.setattr(stream.accumulator, "contraction", Product)
    name = "lying" if form == "Dense" else "filled"
    read, left = getattr(RowRing, name), [3, 17]

    def replacing(self: RowRing, rows: np.ndarray) -> Any:
        result = read(self, rows)
        replaced = [row for row in left if row in rows and isinstance(self, FrozenRing)]
        for row in replaced:
            left.remove(row)
            accumulator.remove(np.array([row]))
            ring.commit(row, 1, new[row], np.ones(CASE.scan[1], bool))
        # A copy would be the old row, and what is about to be read where it lies is the new one by now.
        return read(ring, rows) if replaced and form == "Product" else result

    with ThreadPoolExecutor(2) as executor:
        accumulator = swept(setup, ring, executor)
        sweep = accumulator.begin(1.0)
        monkeypatch.setattr(RowRing, name, replacing)
        assert accumulator.run(sweep, lambda: True)
        assert accumulator.end(sweep)
        assert left == []
        mean = float(CASE.counts()[:, :, CASE.good].sum(axis=2).mean())
        assert oracle.relative_error(accumulator.object(mean), CASE.true_object(CASE.counts())) < 3e-6
        np.testing.assert_array_equal(accumulator.missing(), [3, 17])


# memory


class Measuring:
    """The largest arrays of a sweep: the blocks of kernels, and what a block's contraction works with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels = self.work = 0
        contraction = stream.accumulator.contraction

        def measured(kernels: KernelTable, *others: Any) -> Any:
            form = contraction(kernels, *others)
            self.kernels = max(self.kernels, kernels.weights.base.nbytes)
            work = [form._spectra, form._turns, *form._work]
            self.work = max(self.work, sum(array.nbytes for array in work))
            return form

        monkeypatch.setattr(stream.accumulator, "contraction", measured)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (CASE, {}),
        (Case(scan=(40, 30), aberrations=ABERRATIONS), {"passes": None}),
        (Case(scan=(3, 40), dtype="<f4", aberrations=ABERRATIONS), {"passes": 2, "averaging": True}),
    ],
)
@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_the_memory_plan_is_a_bound(
    case: Case, changes: dict[str, Any], share: float, halting: Halting, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = streamed(case, int(share * MemoryPlan.of(case.setup()).kernels), **changes)
    plan, measuring = MemoryPlan.of(setup), Measuring(monkeypatch)
    with running(setup) as engine:
        feed(engine, case.counts())
        halting.begin(engine)
        accumulator = engine._accumulator
        assert isinstance(accumulator, SweepingAccumulator)
        sweep = accumulator._sweep
        assert sweep is not None
        if setup.passes != 1:
            feed(engine, case.counts(1), pass_indices(case, 1))
        aside = sum(row.nbytes for row in sweep.ring._aside.values())
        assert aside == (0 if setup.passes == 1 else engine._ring._counts.nbytes)
        sums = [array for part in (accumulator._sums, sweep.sums) for array in (part.psi, part.row_sums)]
        others = [engine._sums, engine._ring.frames, sweep.ring.frames]
        halting.end(engine)
        assert plan.set_aside == aside
        assert plan.kernels == measuring.kernels + accumulator.kernels.at_zero.nbytes == accumulator.kernels.nbytes
        assert plan.work >= measuring.work + sum(array.nbytes for array in [*sums, *others])
        assert plan.contracted == 0
        assert plan.total == plan.device_bytes + plan.open_rows
        assert plan.device_bytes == plan.ring + plan.kernels + plan.set_aside + plan.work
        assert "kernels in blocks" in str(plan)
        assert ("rows set aside" in str(plan)) == (setup.passes != 1)


class _Room(Device):
    """A device with so much free memory."""

    room = 0

    def free_bytes(self) -> int:
        return self.room


@pytest.mark.parametrize("aberrations", [ABERRATIONS, {}])
def test_blocks_are_chosen_where_the_table_would_not_fit(aberrations: dict[str, float]) -> None:
    case = Case(scan=(64, 60), detector=(64, 64), pixel=(0.41, 0.43), centre=(31.3, 32.1), aberrations=aberrations)
    setup, room = case.setup(), _Room(np, CPU.fft, "toy")
    object.__setattr__(room, "room", 1 << 40)
    whole = MemoryPlan.of(setup, room)
    assert whole.block_bytes is None
    assert "blocks" not in str(whole)
    if not aberrations:
        object.__setattr__(room, "room", whole.kernels)
        assert MemoryPlan.of(setup, room).block_bytes is None, "runs are small"
        return
    object.__setattr__(room, "room", int(1.95 * whole.kernels))
    assert whole.kernels > room.room / 2
    blocks = MemoryPlan.of(setup, room)
    assert blocks.block_bytes is not None
    assert blocks.total < whole.total
    least = MemoryPlan.of(replace(setup, kernel_bytes=1), room)
    for free in (whole.total, int(1.2 * least.total)):
        object.__setattr__(room, "room", free)
        blocks = MemoryPlan.of(setup, room)
        assert blocks.block_bytes is not None
        blocks.check(room)
    object.__setattr__(room, "room", whole.ring // 2)
    with pytest.raises(DoesNotFit, match=r"kernels in blocks .* use a smaller scan"):
        MemoryPlan.of(setup, room).check(room)
    # What another plan holds is there again once it is dropped.
    assert MemoryPlan.of(setup, room, held=replace(whole, ring=1 << 40)).block_bytes is None


def test_column_blocks_are_whole_columns() -> None:
    band = CASE.setup().passband
    pixels = 50
    assert column_blocks(band, pixels, False, 0) == tuple(range(ix, ix + 1) for ix in range(band.column_count))
    assert column_blocks(band, pixels, False, table_bytes(band, pixels, False)) == (range(band.column_count),)
    assert len(column_blocks(band, pixels, False, table_bytes(band, pixels, False) - 1)) == 2


# from end to end


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if memory were short: kernels are made in small blocks wherever they are complex."""
    monkeypatch.setattr(stream.setup, "_KERNEL_SHARE", 0.0)
    monkeypatch.setattr(stream.setup, "_BLOCK_BYTES", 50_000)


async def test_a_live_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reconstruct_file(scan_file(tmp_path / "scan.h5"), [Layer.of("test", OPTICS_AND_DISK)])
    monkeypatch.setattr(stream.setup, "_KERNEL_SHARE", 0.0)
    monkeypatch.setattr(stream.setup, "_BLOCK_BYTES", 50_000)
    async with serving(SCAN) as (address, _):
        options = SessionOptions((address,), layers=[Layer.of("test", OPTICS_AND_DISK)])
        session, snapshots = await run_session(options)
    assert session.reconstruction is not None
    assert session.reconstruction.engine is not None
    assert session.reconstruction.engine.plan.block_bytes == 50_000
    assert any("made in blocks" in note for note in session.reconstruction.notes)
    assert session.result is not None
    assert_same_object(session.result, expected)
    last = snapshots[-1]
    assert last.state == "finished"
    np.testing.assert_allclose(last.images["phase"], np.angle(expected.object), atol=1e-5)


@pytest.mark.usefixtures("tight")
def test_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = []
    run = SweepingAccumulator.run

    def counted(*arguments: Any) -> bool:
        sweeps.append(1)
        return run(*arguments)

    path = scan_file(tmp_path / "scan.h5")
    monkeypatch.setattr(SweepingAccumulator, "run", counted)
    streamed_result = reconstruct_file(path, [Layer.of("test", OPTICS_AND_DISK)])
    assert len(sweeps) <= 2, "one before the first row, and one at the end"
    monkeypatch.undo()
    assert_same_object(streamed_result, reconstruct_file(path, [Layer.of("test", OPTICS_AND_DISK)]))


@pytest.mark.gpu
@pytest.mark.parametrize("aberrations", [ABERRATIONS, {}])
def test_on_a_gpu(aberrations: dict[str, float]) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    case = replace(CASE, aberrations=aberrations)
    counts = [case.counts(seed) for seed in range(3)]
    with running(streamed(case, passes=3), device=choose_device("gpu")) as engine:
        assert isinstance(engine._accumulator, SweepingAccumulator)
        for number, some in enumerate(counts):
            feed(engine, some, pass_indices(case, number))
            shown(engine)
        engine.finish()
        assert_object(engine, case, counts[2], limit=1e-5)
        engine.change(replace(case, rotation=20.0).probe, METHODS["ssb"])
        assert_object(engine, replace(case, rotation=20.0), counts[2], limit=1e-5)
