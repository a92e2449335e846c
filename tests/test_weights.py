"""The compiled weights against the formulas: as ``Method.weights`` states them, and written out in double precision."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.array import choose_device
from stream.kernels import METHODS, OVERLAP_THRESHOLD, Abandoned, KernelTable, RunTable, make_kernels, make_runs
from stream.optics import ABERRATION_SYMBOLS, Aberrations, Probe
from stream.setup import Setup
from stream.weights import CompiledWeights
from tests import oracle
from tests.data_helpers import Case
from tests.test_engine import ABERRATIONS, CASES
from tests.test_kernels import ALL_ORDERS

CPU = choose_device("cpu")

#: Single precision leaves open whether abs(Gamma) is above the threshold where it is as close to it as this.
UNSURE = 1e-5


def frequencies(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    return setup.probe.axes.to_detector(*setup.passband.frequencies(setup.scan_step))


def true_gamma(case: Case, setup: Setup) -> np.ndarray:
    """Gamma(k,q) at every entry, complex128 (entries, K), of the oracle's aperture and chi."""
    wavelength = oracle.wavelength(case.energy_kev * 1e3)
    coefficients, theta = oracle.coefficients(case.aberrations), np.deg2rad(case.rotation)
    k_row, k_column = (part[None] for part in setup.geometry.bf_k(wavelength))
    q_row, q_column = (part[:, None] for part in frequencies(setup))

    def probe(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        soft = oracle.aperture(wavelength * np.hypot(row, column), case.semiangle * 1e-3, case.rolloff * 1e-3)
        return soft * np.exp(-1j * oracle.chi(row, column, coefficients, theta, case.transpose, wavelength))

    centre = probe(k_row, k_column)
    minus, plus = probe(k_row - q_row, k_column - q_column), probe(k_row + q_row, k_column + q_column)
    return centre.conj() * minus - centre * plus.conj()


def assert_weights(ours: np.ndarray, expected: np.ndarray, gamma: np.ndarray, limit: float) -> None:
    """Equal where abs(Gamma) is clearly above the threshold, 0 where it is clearly below.

    An error of Gamma turns a weight by the more the smaller Gamma is.
    """
    size = np.abs(gamma)
    assert (size > OVERLAP_THRESHOLD + UNSURE).any() or len(gamma) < 5
    sure = np.abs(size - OVERLAP_THRESHOLD) > UNSURE
    assert np.abs((ours - expected) * size)[sure].max(initial=0) < limit
    assert not ours[size < OVERLAP_THRESHOLD - UNSURE].any()
    made = np.abs(ours[ours != 0])
    np.testing.assert_allclose(made, 1, atol=1e-6)


def check(case: Case) -> None:
    setup = case.setup()
    table = make_kernels(
        setup.method, setup.probe, setup.geometry.bf_k(setup.probe.wavelength), setup.passband, setup.scan_step, CPU
    )
    band, gamma = setup.passband, true_gamma(case, setup)
    expected = np.where(np.abs(gamma) > OVERLAP_THRESHOLD, gamma.conj() / np.maximum(np.abs(gamma), 1e-9), 0)
    if not case.aberrations:
        assert table.weights.dtype == np.float32
        expected = expected.real
    expected[band.mirrored] = expected[band.mirrored].conj()
    assert_weights(table.weights, expected, gamma, 1e-6)
    k_row, k_column = (part[None] for part in setup.geometry.bf_k(setup.probe.wavelength))
    q_row, q_column = (part[:, None] for part in frequencies(setup))
    plain = METHODS["ssb"].weights(setup.probe, (k_row, k_column), (q_row, q_column))
    plain[band.mirrored] = plain[band.mirrored].conj()
    assert_weights(table.weights, plain, gamma, 3e-6)


@pytest.mark.parametrize("name", CASES)
def test_both_sidebands(name: str) -> None:
    check(CASES[name])
    check(dataclasses.replace(CASES[name], aberrations=ABERRATIONS))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("symbol", [*ABERRATION_SYMBOLS, "all"])
def test_every_aberration(symbol: str, transpose: bool) -> None:
    user = ALL_ORDERS if symbol == "all" else {k: v for k, v in ALL_ORDERS.items() if k[-2:] == symbol[1:]}
    # Of about a turn at the edge of the aperture, and more with all together.
    user = {k: v * (1 if k.startswith("phi") else 20 * 10 ** (int(k[1]) - 1)) for k, v in user.items()}
    check(Case(aberrations=user, rotation=-41.0, transpose=transpose, scan=(8, 9)))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    scan=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    centre=st.tuples(st.floats(-1, 13), st.floats(-1, 15)),
    rotation=st.floats(-180, 180),
    transpose=st.booleans(),
    rolloff=st.sampled_from([0.0, 0.01, 0.7, 2.0, 9.7, 14.0]),
    step=st.floats(0.2, 2.0),
    masked=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 14)), max_size=40),
    aberrations=st.sampled_from([{}, ABERRATIONS, {"C10": -3000.0, "C30": 5e6}, {"C56": 1e6, "phi56": 13.0}]),
)
def test_any_pixels_and_frequencies(
    scan: tuple, centre: tuple, rotation: float, transpose: bool, rolloff: float, step: float, masked: set,
    aberrations: dict,
) -> None:  # fmt: skip
    case = Case(scan=scan, centre=centre, rotation=rotation, transpose=transpose, rolloff=rolloff,
                step=(step, 1.1 * step), masked=((0, 0), *masked), aberrations=aberrations)  # fmt: skip
    compare(case)


def compare(case: Case) -> None:
    """Compiled and not, of both methods, where the oracle's edges may lie on a pixel."""
    wavelength = case.probe.wavelength
    row, column = np.indices(case.detector)
    k = tuple(
        ((index - centre) * pixel * 1e-3 / wavelength)[case.good]
        for index, centre, pixel in zip((row, column), case.centre, case.pixel, strict=True)
    )
    for name, method in METHODS.items():
        band, axes = case.setup(name).passband, case.probe.axes
        q_row, q_column = (part[:, None] for part in axes.to_detector(*band.frequencies(case.step)))
        plain = method.weights(case.probe, (k[0][None], k[1][None]), (q_row, q_column))
        plain[band.mirrored] = plain[band.mirrored].conj()
        ours = make_kernels(method, case.probe, k, band, case.step, CPU).weights
        assert ours.dtype == plain.dtype
        # On the threshold, or on a hard edge, the last digit decides.
        differing = np.abs(ours - plain) > 2e-3
        assert np.count_nonzero(differing) <= 1e-4 * plain.size + 2
        np.testing.assert_allclose(ours[~differing], plain[~differing], atol=2e-3)


def test_pixels_in_any_order() -> None:
    """Rows are found among the pixels, whatever these are."""
    case = Case(aberrations=ABERRATIONS, scan=(6, 8))
    setup = case.setup()
    k_row, k_column = setup.geometry.bf_k(setup.probe.wavelength)
    shuffled = np.random.default_rng(0).permutation(len(k_row))
    for probe in (case.probe, Case().probe):
        given = (setup.method, probe)
        rest = (setup.passband, setup.scan_step, CPU)
        table = make_kernels(*given, (k_row, k_column), *rest).weights
        other = make_kernels(*given, (k_row[shuffled], k_column[shuffled]), *rest).weights
        np.testing.assert_allclose(other, table[:, shuffled], atol=1e-4)


def test_a_phase_of_many_turns() -> None:
    """Chi is reduced in double precision: thousands of turns cost no accuracy."""
    case = Case(semiangle=30.0, pixel=(5.1, 5.3), aberrations={"C10": 1e5, "C30": 1e8}, step=(0.4, 0.4))
    check_against = true_gamma(case, case.setup())
    weights = case.setup().make_kernels(CPU)
    assert isinstance(weights, KernelTable)
    band = case.setup().passband
    expected = check_against.conj()
    expected[band.mirrored] = expected[band.mirrored].conj()
    size = np.abs(expected)
    clear = np.abs(size - OVERLAP_THRESHOLD) > UNSURE
    expected = np.where(size > OVERLAP_THRESHOLD, expected / np.maximum(size, 1e-9), 0)
    assert np.abs((weights.weights - expected) * size)[clear].max() < 2e-6


# shared, and given up

FORMS = pytest.mark.parametrize(
    ("method", "aberrations"), [("ssb", {}), ("ssb", ABERRATIONS), ("ssb-single", {})], ids=["runs", "dense", "single"]
)


@FORMS
def test_threads_make_the_same_table(method: str, aberrations: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.kernels._BLOCK_ELEMENTS", {"compiled": 300})
    setup = Case(scan=(24, 22), step=(0.4, 0.4), aberrations=aberrations).setup(method)
    alone = setup.make_kernels(CPU)
    with ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            shared = setup.make_kernels(CPU, lambda: True, executor, 5)
            if isinstance(alone, RunTable):
                assert isinstance(shared, RunTable)
                np.testing.assert_array_equal(shared.bounds, alone.bounds)
                np.testing.assert_array_equal(shared.lookups, alone.lookups)
            else:
                assert isinstance(shared, KernelTable)
                np.testing.assert_array_equal(shared.weights, alone.weights)


@FORMS
def test_nobody_wants_them_any_more(method: str, aberrations: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.kernels._BLOCK_ELEMENTS", {"compiled": 300, "numpy": 300})
    setup = Case(scan=(24, 22), step=(0.4, 0.4), aberrations=aberrations).setup(method)
    left = 5

    def three_more() -> bool:
        nonlocal left
        left -= 1
        return left > 0

    with pytest.raises(Abandoned):
        setup.make_kernels(CPU, three_more)
    assert left >= -1, "it is asked once more at the end"


def test_run_tables_of_a_method_that_is_not_compiled() -> None:
    setup = Case(scan=(8, 9), rotation=20.0).setup()
    method = dataclasses.replace(setup.method, compiled=None)
    k = setup.geometry.bf_k(setup.probe.wavelength)
    rest = (setup.probe, k, setup.detector_rows, setup.passband, setup.scan_step, CPU)
    plain, compiled = make_runs(method, *rest), make_runs(setup.method, *rest)
    np.testing.assert_array_equal(plain.lookups, compiled.lookups)
    np.testing.assert_array_equal(plain.bounds, compiled.bounds)


def test_pixels_outside_have_no_weight() -> None:
    """A pixel where the aperture is 0 has none, nor has a frequency beyond the cutoff."""
    probe = Probe(2e5, 0.01, 0.002, Aberrations.from_user({"C10": 100.0}))
    compiled = CompiledWeights.of(probe, (np.array([0.0, 0.0]), np.array([0.1, 0.5])), threshold=OVERLAP_THRESHOLD)
    q = np.array([0.2, 0.8, 5.0])
    out = np.full((3, 2), np.nan, np.complex64)
    compiled.fill(0 * q, q, np.zeros(3, bool), out)
    np.testing.assert_array_equal(out != 0, [[True, False], [False, False], [False, False]])
