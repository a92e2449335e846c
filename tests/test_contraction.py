"""The three forms of the contraction, the compiled row FFT and the run table: against float64 brute force."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.errors import ConfigurationError
from stream.array import choose_device
from stream.contraction import (
    Contraction,
    Dense,
    Product,
    Runs,
    Sums,
    _contract_dense,
    _contract_runs,
    _subtract,
    compile_ahead,
    contraction,
)
from stream.kernels import METHODS, KernelTable, RunTable, _find_ends, make_kernels, make_runs, run_table_bytes
from stream.ring import RowRing
from stream.row_fft import RowFft, _transform, aligned, with_slack
from stream.setup import Setup
from stream.weights import _fill_levels, _fill_weights
from tests.data_helpers import Case

CPU = choose_device("cpu")
ABERRATIONS = {"C10": -60.0, "C12": 25.0, "phi12": 30.0, "C21": 700.0, "phi21": -50.0}

CASES = {
    "plain": Case(),
    "odd scan": Case(scan=(7, 9), rotation=33.0),
    "Nyquist rows and columns": Case(scan=(8, 10), rotation=-71.0, step=(0.6, 0.6)),
    "more rows than lanes": Case(scan=(37, 6), transpose=True),
    "masked pixels": Case(masked=((5, 7), (0, 0), (6, 4), (5, 8), (11, 14)), rotation=61.0),
    "off centre": Case(centre=(3.37, 9.42), rotation=12.0),
    "partly cut": Case(centre=(2.13, 13.6), rotation=-33.0),
    "hard edge": Case(rolloff=0.0, scan=(8, 10)),
    "all edge": Case(rolloff=9.7, scan=(8, 7)),
    "many pixels": Case(detector=(40, 44), pixel=(0.53, 0.49), centre=(19.6, 21.3), scan=(9, 8)),
    "8 bit": Case(dtype="<u1"),
    "32 bit": Case(dtype="<u4", dose=9000.0),
    "float": Case(dtype="<f4", dose=40.0),
}


def dense_kernels(setup: Setup) -> KernelTable:
    k = setup.geometry.bf_k(setup.probe.wavelength)
    return make_kernels(setup.method, setup.probe, k, setup.passband, setup.scan_step, CPU)


def true_weights(setup: Setup) -> np.ndarray:
    """The kernel at every entry in complex128, from the overlap function written out."""
    probe, band = setup.probe, setup.passband
    k_row, k_column = (part[None] for part in setup.geometry.bf_k(probe.wavelength))
    q_row, q_column = (part[:, None] for part in probe.axes.to_detector(*band.frequencies(setup.scan_step)))
    weights = setup.method.weights(probe, (k_row, k_column), (q_row, q_column)).astype(np.complex128)
    weights[band.mirrored] = weights[band.mirrored].conj()
    return weights


def true_rows(setup: Setup, counts: np.ndarray) -> np.ndarray:
    """C_y of each row, complex128 (scan rows, entries), by a direct Fourier sum; ``counts`` (rows, columns, K)."""
    band, nx = setup.passband, counts.shape[1]
    wave = np.exp(-2j * np.pi * np.outer(np.arange(nx), np.arange(band.column_count)) / nx)
    spectra = np.einsum("yxk,xq->yqk", counts.astype(np.float64), wave)
    return np.einsum("ek,yek->ye", true_weights(setup), spectra[:, band.column()])


def true_psi(setup: Setup, rows: np.ndarray) -> np.ndarray:
    """Psi of all rows' C_y, complex128 (entries,)."""
    band = setup.passband
    ny = band.scan_shape[0]
    return np.einsum("ye,ye->e", np.exp(-2j * np.pi * np.outer(np.arange(ny), band.row) / ny), rows)


def full_ring(case: Case, setup: Setup, averaging: bool = False) -> tuple[RowRing, np.ndarray]:
    """A ring that holds a scan, and its counts (scan rows, scan columns, K)."""
    counts = case.counts().reshape(*case.scan, -1)[:, :, setup.geometry.bf_pixels]
    ring = RowRing(case.scan, counts.shape[2], setup.dtype, CPU, averaging)
    for row in range(case.scan[0]):
        ring.commit(row, 0, counts[row], np.ones(case.scan[1], bool))
    return ring, counts


def form_of(
    name: str, setup: Setup, ring: RowRing, executor: ThreadPoolExecutor, threads: int = 2, keep: bool = True
) -> tuple[Contraction, Sums]:
    """One of the forms, forced."""
    kernels = setup.make_kernels(CPU) if name == "Runs" else dense_kernels(setup)
    sums = Sums.zeros(kernels.passband, kernels.pixels, keep, CPU)
    if name == "Runs":
        assert isinstance(kernels, RunTable)
        return Runs(kernels, ring, sums, executor, threads), sums
    assert isinstance(kernels, KernelTable)
    if name == "Product":
        return Product(kernels, ring, sums, CPU, executor, threads), sums
    as_complex = KernelTable(kernels.method, kernels.passband, kernels.weights.astype(np.complex64))
    return Dense(as_complex, ring, sums, executor, threads), sums


def assert_close(ours: np.ndarray, true: np.ndarray, limit: float = 1e-5) -> None:
    assert np.linalg.norm(ours - true) < limit * np.linalg.norm(true)


# the forms


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("form", "method", "aberrations"),
    [
        (form, method, aberrations)
        for form in ("Product", "Dense", "Runs")
        for method in ("ssb", "ssb-single")
        for aberrations in ({}, ABERRATIONS)
        if form != "Runs" or method == "ssb-single" or not aberrations
    ],
)
def test_every_form(form: str, name: str, method: str, aberrations: dict, threads: int) -> None:
    case = CASES[name]
    case = Case(**{**case.__dict__, "aberrations": aberrations})
    setup = case.setup(method)
    ring, counts = full_ring(case, setup)
    rows = true_rows(setup, counts)
    order = np.random.default_rng(0).permutation(case.scan[0])
    with ThreadPoolExecutor(threads) as executor:
        contraction, sums = form_of(form, setup, ring, executor, threads)
        contraction.add(order[:3], +1)
        contraction.add(order[3:], +1)
        assert_close(sums.psi, true_psi(setup, rows))
        assert sums.contracted is not None
        assert_close(sums.contracted, rows)
        np.testing.assert_allclose(sums.row_sums, counts.sum(axis=1, dtype=np.float64), rtol=1e-5)
        # out again, by the numbers that were put in: nothing but double precision's rounding is left; BLAS makes other
        # numbers of other batches
        contraction.subtract(order[2:7])
        contraction.add(np.delete(order, np.s_[2:7]), -1)
        limit = 1e-6 if form == "Product" else 1e-13
        assert np.abs(sums.psi).max() < limit * np.abs(true_psi(setup, rows)).max() * len(order)


@pytest.mark.parametrize("form", ["Product", "Dense", "Runs"])
def test_rows_with_missing_frames_and_averaged_passes(form: str) -> None:
    case = Case(scan=(20, 9), rotation=10.0)
    setup = case.setup()
    ring, counts = full_ring(case, setup, averaging=True)
    expected = counts.astype(np.float64)
    again = case.counts(1).reshape(*case.scan, -1)[:, :, setup.geometry.bf_pixels]
    # every other row has two passes, every fifth of those only part of the second; one row lacks a frame altogether
    for row in range(0, 20, 2):
        received = np.ones(9, bool)
        received[3:5] = row % 10 != 0
        ring.commit(row, 1, again[row], received)
        expected[row, received] = (expected[row, received] + again[row, received]) / 2
    ring.frames[5, 2] = 0
    expected[5, 2] = np.delete(expected[5], 2, axis=0).mean(axis=0)
    with ThreadPoolExecutor(2) as executor:
        contraction, sums = form_of(form, setup, ring, executor)
        contraction.add(np.arange(20), +1)
        assert sums.contracted is not None
        assert_close(sums.contracted, true_rows(setup, expected))


def test_the_form_that_suits() -> None:
    with ThreadPoolExecutor(1) as executor:
        for aberrations, method, expected in (
            ({}, "ssb", Runs),
            (ABERRATIONS, "ssb", Dense),
            (ABERRATIONS, "ssb-single", Runs),
        ):
            case = Case(aberrations=aberrations)
            setup = case.setup(method)
            ring, _ = full_ring(case, setup)
            kernels = setup.make_kernels(CPU)
            sums = Sums.zeros(kernels.passband, kernels.pixels, False, CPU)
            assert type(contraction(kernels, ring, sums, CPU, executor, 1)) is expected


def test_nothing_is_compiled_that_was_not_compiled_ahead() -> None:
    """One signature does for every dtype, with contracted rows or without, complete rows or not."""
    compile_ahead()
    compiled = (_contract_runs, _contract_dense, _subtract, _transform, _find_ends, _fill_levels, _fill_weights)
    ahead = [set(function.signatures) for function in compiled]
    for method, aberrations, dtype in (("ssb", {}, "<u2"), ("ssb-single", {}, "<u1"), ("ssb", ABERRATIONS, "<f4")):
        case = Case(aberrations=aberrations, dtype=dtype)
        setup = case.setup(method)
        ring, _ = full_ring(case, setup)
        ring.frames[3, 2] = 0
        for keep in (False, True):
            with ThreadPoolExecutor(2) as executor:
                kernels = setup.make_kernels(CPU)
                sums = Sums.zeros(kernels.passband, kernels.pixels, keep, CPU)
                contraction(kernels, ring, sums, CPU, executor, 2).add(np.flatnonzero(ring.acquired), +1)
    assert [set(function.signatures) for function in compiled] == ahead
    assert [len(signatures) for signatures in ahead] == [1] * len(compiled)


def test_rows_have_the_same_numbers_in_any_company() -> None:
    """What a row adds does not depend on the batch it comes in, nor on the threads: it can be taken out exactly."""
    case = Case(scan=(30, 12), aberrations=ABERRATIONS)
    setup = case.setup()
    ring, _ = full_ring(case, setup)
    with ThreadPoolExecutor(3) as executor:
        one, sums_one = form_of("Dense", setup, ring, executor, 1)
        all_, sums_all = form_of("Dense", setup, ring, executor, 3)
        all_.add(np.arange(30), +1)
        for row in np.random.default_rng(0).permutation(30):
            one.add(np.array([row]), +1)
    assert sums_one.contracted is not None
    np.testing.assert_array_equal(sums_one.contracted, sums_all.contracted)


# the run table


def weights_of(table: RunTable) -> np.ndarray:
    """The kernel that a run table stands for, (entries, K)."""
    out = np.zeros((table.passband.entries, table.pixels))
    for e in range(len(out)):
        first, minus, stop = table.bounds[2 * e : 2 * e + 3]
        np.add.at(out[e], table.lookups[first:minus], table.step)
        np.add.at(out[e], table.lookups[minus:stop], -table.step)
    last = np.flatnonzero(table.ends)
    for first, stop in zip([0, *(last[:-1] + 1)], last + 1, strict=True):
        out[:, first:stop] = np.cumsum(out[:, first:stop][:, ::-1], axis=1)[:, ::-1]
    return out


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    scan=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    centre=st.tuples(st.floats(-3, 25), st.floats(-3, 25)),
    rotation=st.floats(-180, 180),
    transpose=st.booleans(),
    rolloff=st.sampled_from([0.0, 0.7, 2.0, 6.1, 9.7]),
    step=st.floats(0.2, 2.0),
    masked=st.sets(st.tuples(st.integers(0, 22), st.integers(0, 20)), max_size=60),
    method=st.sampled_from(["ssb", "ssb-single"]),
)
def test_a_run_table_holds_the_kernel_and_stays_within_its_bound(
    scan: tuple, centre: tuple, rotation: float, transpose: bool, rolloff: float, step: float, masked: set, method: str
) -> None:
    case = Case(scan=scan, detector=(23, 21), pixel=(0.93, 0.89), centre=centre, rotation=rotation, rolloff=rolloff,
                transpose=transpose, step=(step, 1.1 * step), masked=tuple(masked))  # fmt: skip
    setup = case.setup(method)
    try:
        pixels = setup.geometry.bf_pixels
    except ConfigurationError:  # no pixel is left
        return
    table = setup.make_kernels(CPU)
    assert isinstance(table, RunTable)
    np.testing.assert_allclose(weights_of(table), dense_kernels(setup).weights, atol=1e-6)
    assert table.nbytes <= run_table_bytes(setup.passband, len(pixels), len(np.unique(pixels // 21)))
    pattern = np.random.default_rng(0).random(len(pixels))
    zero = int(setup.passband.columns[1])
    np.testing.assert_allclose(table.sums_at_zero(pattern), weights_of(table)[:zero] @ pattern, atol=1e-9)


def test_no_runs_of_a_complex_kernel() -> None:
    setup = Case(aberrations=ABERRATIONS).setup()
    k = setup.geometry.bf_k(setup.probe.wavelength)
    with pytest.raises(ValueError, match="ssb has more values"):
        make_runs(METHODS["ssb"], setup.probe, k, setup.detector_rows, setup.passband, setup.scan_step, CPU)


# the row FFT


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4", "f8"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 30, 49, 60, 64, 97, 101, 256])
def test_row_fft(length: int, dtype: str) -> None:
    """Every radix, numbers of pixels that are odd and no multiple of the lanes, rows in any order."""
    rng = np.random.default_rng(length)
    for pixels, row_count, columns in ((1, 1, 1), (17, 16, length // 2 + 1), (38, 5, length // 3 + 1)):
        counts = with_slack((19, length, pixels), dtype)
        counts[...] = rng.poisson(9, counts.shape)
        rows = rng.permutation(19)[:row_count]
        plan = RowFft.plan(length, columns)
        spectra = aligned((columns, pixels, 2, 16), np.float32)
        scale = np.ones(row_count, np.float32)
        scale[-1] = np.nan
        filled = with_slack((1, length, pixels), np.float32)
        filled[0] = rng.random((length, pixels))
        work = aligned((plan.work_elements,), np.float32)
        plan.transform(np.zeros(1, np.int64), counts, rows, scale, filled, work, spectra)
        values = counts[rows].astype(np.float64)
        values[-1] = filled[0]
        expected = np.fft.rfft(values, axis=1)[:, :columns]
        ours = (spectra[:, :, 0, :row_count] + 1j * spectra[:, :, 1, :row_count]).transpose(2, 0, 1)
        assert np.abs(ours - expected).max() < 2e-6 * np.abs(expected).max()
        assert not spectra[..., row_count:].any(), "lanes without a row are 0"


def test_a_row_fft_reads_nothing_beyond_the_counts() -> None:
    """What lies in the slack behind them, be it no number at all, is thrown away."""
    counts = np.full(3 * 5 + 16, np.nan, np.float32)
    counts[:15] = np.random.default_rng(0).random(15)
    plan = RowFft.plan(5, 3)
    spectra = aligned((3, 3, 2, 16), np.float32)
    work = aligned((plan.work_elements,), np.float32)
    row, scale = np.zeros(1, np.int64), np.ones(1, np.float32)
    plan.transform(
        np.zeros(1, np.int64), counts[:15].reshape(1, 5, 3), row, scale, with_slack((0, 5, 3), "f4"), work, spectra
    )
    expected = np.fft.rfft(counts[:15].reshape(5, 3).astype(np.float64), axis=0)
    np.testing.assert_allclose(spectra[:, :, 0, 0] + 1j * spectra[:, :, 1, 0], expected, atol=1e-6)
