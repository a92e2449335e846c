"""Kernels, passband and optics against the formulas, written out plainly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.errors import ConfigurationError
from stream.array import Device, choose_device, namespace
from stream.geometry import DetectorGeometry
from stream.kernels import (
    METHODS,
    OverlapMasks,
    make_kernels,
    method_named,
    overlap_function,
    overlap_masks,
    table_bytes,
)
from stream.optics import (
    ABERRATION_SYMBOLS,
    Aberrations,
    AxesRelation,
    Probe,
    aberration_phase,
    aperture_amplitude,
    electron_wavelength,
)
from stream.passband import Passband
from tests import oracle
from tests.data_helpers import Case

ALL_ORDERS = {
    name: (3.0 + i) * 10 ** int(name[1]) * (-1) ** i
    for i, name in enumerate(symbol for symbol in ABERRATION_SYMBOLS if int(symbol[1]) <= 5)
} | {f"phi{name[1:]}": 23.0 * i - 150 for i, name in enumerate(ABERRATION_SYMBOLS) if not name.endswith("0")}


# optics


@pytest.mark.parametrize("energy_ev", [1e3, 6e4, 8e4, 2e5, 3e5, 1e6])
def test_wavelength(energy_ev: float) -> None:
    assert electron_wavelength(energy_ev) == pytest.approx(oracle.wavelength(energy_ev), rel=1e-14)


def test_wavelength_at_200_kv() -> None:
    assert electron_wavelength(2e5) == pytest.approx(0.0250793374, abs=5e-11)


@pytest.mark.parametrize("energy_ev", [0.0, -1.0, float("nan"), float("inf")])
def test_wavelength_of_no_energy(energy_ev: float) -> None:
    with pytest.raises(ConfigurationError, match="energy"):
        electron_wavelength(energy_ev)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("symbol", [*ABERRATION_SYMBOLS, "all"])
def test_aberration_phase(symbol: str, transpose: bool) -> None:
    """Every coefficient alone and all together, as a polynomial and with arc tangents."""
    user = ALL_ORDERS if symbol == "all" else {k: v for k, v in ALL_ORDERS.items() if k[-2:] == symbol[1:]}
    theta, wavelength = 0.77, electron_wavelength(1e5)
    rng = np.random.default_rng(0)
    k_row, k_column = rng.normal(size=(2, 50)) * 0.6
    k_row[0] = k_column[0] = 0
    aberrations = Aberrations.from_user(user)
    table = aberrations.table(AxesRelation(theta, transpose))
    chi = aberration_phase(wavelength * k_row, wavelength * k_column, table, wavelength)
    expected = oracle.chi(k_row, k_column, oracle.coefficients(user), theta, transpose, wavelength)
    np.testing.assert_allclose(chi, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


def test_aberrations_of_the_user_and_back() -> None:
    user = {key: value for key, value in ALL_ORDERS.items() if not key.startswith("phi")}
    assert len(user) == len(ABERRATION_SYMBOLS) == 14
    again = Aberrations.from_user(ALL_ORDERS).to_user()
    assert again == pytest.approx(ALL_ORDERS)


def test_zero_coefficients_are_left_out() -> None:
    assert not Aberrations.from_user({"C10": 0.0, "C12": 0, "phi12": 30.0}).coefficients


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ({"C11": 1.0}, "unknown aberration 'C11'"),
        ({"c10": 1.0}, "unknown aberration 'c10'"),
        ({"C60": 1.0}, "unknown"),
        ({"C100": 1.0}, "unknown"),
        ({"defocus": 1.0}, "unknown"),
        ({"phi10": 1.0, "C10": 2.0}, "round"),
        ({"phi12": 1.0}, "phi12 given without"),
        ({"C10": float("nan")}, "at most"),
        ({"C10": float("inf")}, "at most"),
        ({"C10": "much"}, "at most"),
        ({"C10": None}, "at most"),
    ],
)
def test_aberrations_that_are_none(user: dict, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Aberrations.from_user(user)


@pytest.mark.parametrize("rolloff", [0.0, 0.4e-3, 2e-3, 9.7e-3])
def test_aperture(rolloff: float) -> None:
    alpha = np.linspace(0, 0.0113, 1001)
    ours = aperture_amplitude(alpha, 9.7e-3, rolloff)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, oracle.aperture(alpha, 9.7e-3, rolloff), atol=2e-7)


def test_axes_there_and_back() -> None:
    rng = np.random.default_rng(0)
    row, column = rng.normal(size=(2, 9))
    for transpose in (False, True):
        axes = AxesRelation(0.6, transpose)
        np.testing.assert_allclose(axes.to_scan(*axes.to_detector(row, column)), (row, column))
    # by 90 degrees and transposed: what moves along the scan's rows moves against ...
    np.testing.assert_allclose(AxesRelation(np.pi / 2).to_detector(1.0, 0.0), (0.0, -1.0), atol=1e-15)
    np.testing.assert_allclose(AxesRelation(np.pi / 2, True).to_detector(1.0, 0.0), (-1.0, 0.0), atol=1e-15)


def test_probe_is_real_without_aberrations() -> None:
    probe = Probe(2e5, 0.0097)
    k = np.linspace(-0.5, 0.5, 31)
    assert probe(k, 0 * k).dtype == np.float32
    aberrated = dataclasses.replace(probe, aberrations=Aberrations.from_user({"C10": 50.0}))
    assert aberrated(k, 0 * k).dtype == np.complex64
    chi = oracle.chi(k, 0 * k, {"C10": (50.0, 0.0)}, 0.0, False, probe.wavelength)
    expected = oracle.aperture(probe.wavelength * np.abs(k), 0.0097, 2e-3) * np.exp(-1j * chi)
    np.testing.assert_allclose(aberrated(k, 0 * k), expected, atol=1e-6)


def test_probe_with_a_phase_of_many_turns() -> None:
    """Chi is reduced in double precision: thousands of turns cost no accuracy."""
    probe = Probe(2e5, 0.03, 0.0, Aberrations.from_user({"C10": 1e5, "C30": 1e8}))
    k = np.random.default_rng(0).uniform(-0.8, 0.8, (2, 200))
    chi = oracle.chi(*k, {"C10": (1e5, 0.0), "C30": (1e8, 0.0)}, 0.0, False, probe.wavelength)
    assert np.abs(chi).max() > 1e4
    np.testing.assert_allclose(probe(*k), np.exp(-1j * chi), atol=1e-6)


# geometry


def test_bright_field_pixels() -> None:
    case = Case(masked=((5, 7), (6, 4)))
    geometry = case.setup().geometry
    row, column = np.indices(case.detector)
    angle = np.hypot((row - case.centre[0]) * case.pixel[0], (column - case.centre[1]) * case.pixel[1])
    np.testing.assert_array_equal(geometry.bf_pixels, np.flatnonzero((angle < case.semiangle) & case.good))
    k_row, k_column = geometry.bf_k(case.probe.wavelength)
    assert np.hypot(k_row, k_column).max() * case.probe.wavelength < case.semiangle * 1e-3
    assert geometry.bf_radius_px == pytest.approx(np.mean([case.semiangle / pixel for pixel in case.pixel]))


@pytest.mark.parametrize("case", [Case(centre=(-30.0, 4.0)), Case(semiangle=0.1)])
def test_no_bright_field_pixel(case: Case) -> None:
    with pytest.raises(ConfigurationError, match="no good detector pixel lies inside the bright-field disk"):
        _ = case.setup().geometry.bf_pixels


def test_mask_of_another_detector() -> None:
    with pytest.raises(ConfigurationError, match="mask"):
        DetectorGeometry((3, 4), (1.0, 1.0), (1.0, 1.0), 2.0, np.ones((4, 3), bool))


# passband

scan_shapes = st.tuples(st.integers(1, 11), st.integers(1, 11))


@settings(max_examples=80, derandomize=True, deadline=None)
@given(shape=scan_shapes, cutoff=st.floats(0.05, 2.0), antisymmetric=st.booleans())
def test_passband_covers_every_frequency_once(shape: tuple[int, int], cutoff: float, antisymmetric: bool) -> None:
    step = (0.9, 1.3)
    band = Passband.select(shape, step, cutoff, antisymmetric)
    qy, qx = np.meshgrid(np.fft.fftfreq(shape[0], step[0]), np.fft.fftfreq(shape[1], step[1]), indexing="ij")
    inside = np.hypot(qy, qx) < cutoff
    inside[0, 0] = False
    source, to, signed, to_mirror = band.spectrum_indices()
    written = np.concatenate([to, to_mirror])
    assert 0 not in written
    assert np.isin(np.flatnonzero(inside), written).all()
    # what is computed besides, so that groups of columns are equally long, lies beyond the cutoff, where kernels are 0
    assert {len(range(*band.columns[[group.start, group.stop]])) % len(group) for group in band.groups} <= {0}
    assert [ix for group in band.groups for ix in group] == list(range(band.column_count))
    np.testing.assert_array_equal(np.flatnonzero(~band.mirrored), source)
    assert band.entries == len(band.row) == band.columns[-1]
    # each entry's kernel is evaluated at the frequency whose place its value takes
    row, column = band.frequencies(step)
    np.testing.assert_allclose(row[source], qy.ravel()[to])
    np.testing.assert_allclose(column[source], qx.ravel()[to])
    explicit = signed > 0
    np.testing.assert_allclose(row[signed[explicit] - 1], qy.ravel()[to_mirror[explicit]])
    np.testing.assert_allclose(column[signed[explicit] - 1], qx.ravel()[to_mirror[explicit]])
    if antisymmetric:
        assert band.entries <= 1.07 * (np.count_nonzero(inside) // 2 + sum(shape))


# kernels


def test_methods_by_name() -> None:
    assert {"ssb", "ssb-single"} <= set(METHODS)
    assert method_named("ssb") is METHODS["ssb"]
    with pytest.raises(ConfigurationError, match=r"unknown method 'wdd'; known are ssb, ssb-single"):
        method_named("wdd")


def vectors(seed: int, count: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.random.default_rng(seed).uniform(-size, size, (2, count))
    return row, column


@pytest.mark.parametrize("aberrations", [{}, {"C10": 80.0, "C21": 2000.0, "phi21": 40.0}])
@pytest.mark.parametrize("name", METHODS)
def test_symmetry_of_the_kernels(name: str, aberrations: dict[str, float]) -> None:
    method = METHODS[name]
    probe = Case(aberrations=aberrations, rotation=30.0).probe
    k = tuple(part[None] for part in vectors(0, 60, 0.39))
    q = tuple(part[:, None] for part in vectors(1, 40, 0.7))
    there = method.weights(probe, k, q)
    back = method.weights(probe, k, (-q[0], -q[1]))
    if method.antisymmetric:
        np.testing.assert_allclose(back, -there.conj(), atol=1e-6)
    else:
        assert np.abs(back + there.conj()).max() > 0.5
    assert np.iscomplexobj(there) == bool(aberrations and method.uses_aberrations)


@pytest.mark.parametrize("rolloff", [0.0, 2.0])
def test_overlap_function(rolloff: float) -> None:
    case = Case(rolloff=rolloff, aberrations={"C12": 60.0, "phi12": 10.0}, rotation=50.0, transpose=True)
    k = tuple(part[None] for part in vectors(0, 60, 0.39))
    q = tuple(part[:, None] for part in vectors(1, 40, 0.7))
    wavelength = case.probe.wavelength

    def probe(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        chi = oracle.chi(row, column, oracle.coefficients(case.aberrations), np.deg2rad(50.0), True, wavelength)
        return oracle.aperture(wavelength * np.hypot(row, column), 9.7e-3, rolloff * 1e-3) * np.exp(-1j * chi)

    expected = probe(*k).conj() * probe(k[0] - q[0], k[1] - q[1]) - probe(*k) * probe(k[0] + q[0], k[1] + q[1]).conj()
    gamma = overlap_function(case.probe, k, q)
    assert gamma.shape == (40, 60)
    np.testing.assert_allclose(gamma, expected, atol=2e-6)
    # two-sideband weights: the overlap function's phase, conjugated, with no weight where there is no overlap
    weights = METHODS["ssb"].weights(case.probe, k, q)
    strong = np.abs(expected) > 1.01e-3
    np.testing.assert_allclose(weights[strong], expected[strong].conj() / np.abs(expected[strong]), atol=2e-3)
    assert not weights[np.abs(expected) < 0.99e-3].any()


def test_overlap_masks() -> None:
    """Disks at 0, +q and -q: where two meet, where all three do."""
    probe = Case().probe
    radius = probe.semiangle / probe.wavelength
    k = (np.linspace(-1.2, 1.2, 49)[:, None] * radius, np.linspace(-1.2, 1.2, 51)[None, :] * radius)
    masks = overlap_masks(probe, k, (0.43 * radius, 0.21 * radius))
    assert isinstance(masks, OverlapMasks)

    def disk(row: float, column: float) -> np.ndarray:
        return np.hypot(k[0] - row * radius, k[1] - column * radius) < radius

    np.testing.assert_array_equal(masks.aperture, disk(0, 0))
    np.testing.assert_array_equal(masks.minus, disk(0.43, 0.21))
    np.testing.assert_array_equal(masks.plus, disk(-0.43, -0.21))
    np.testing.assert_array_equal(masks.double, disk(0, 0) & disk(0.43, 0.21) & ~disk(-0.43, -0.21))
    np.testing.assert_array_equal(masks.triple, disk(0, 0) & disk(0.43, 0.21) & disk(-0.43, -0.21))
    assert masks.double.any()
    assert masks.triple.any()
    weights = METHODS["ssb-single"].weights(probe, k, (0.43 * radius, 0.21 * radius))
    np.testing.assert_array_equal(weights, 2 * masks.double)


@pytest.mark.parametrize("aberrations", [{}, {"C10": 80.0}])
@pytest.mark.parametrize("name", METHODS)
def test_kernel_table(name: str, aberrations: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table holds the weights at each entry's frequency, conjugated where mirrored, for any block size."""
    case = Case(scan=(6, 8), rotation=30.0, aberrations=aberrations)
    setup = case.setup(name)
    k = setup.geometry.bf_k(case.probe.wavelength)
    band, axes = setup.passband, case.probe.axes
    assert band.mirrored.any()
    method = dataclasses.replace(METHODS[name], compiled=None)
    table = make_kernels(method, case.probe, k, band, case.step, choose_device("cpu"))
    row, column = axes.to_detector(*band.frequencies(case.step))
    expected = METHODS[name].weights(case.probe, (k[0][None], k[1][None]), (row[:, None], column[:, None]))
    expected[band.mirrored] = expected[band.mirrored].conj()
    np.testing.assert_array_equal(table.weights, expected)
    assert table.is_real == (not aberrations or name == "ssb-single")
    assert table.nbytes == table_bytes(band, len(k[0]), table.is_real)
    assert table.pixels == len(k[0])
    monkeypatch.setattr("stream.kernels._BLOCK_ELEMENTS", {"numpy": 1, "compiled": 1})
    small = make_kernels(method, case.probe, k, band, case.step, choose_device("cpu"))
    np.testing.assert_allclose(small.weights, expected, atol=1e-6)
    compiled = make_kernels(METHODS[name], case.probe, k, band, case.step, choose_device("cpu"))
    np.testing.assert_allclose(compiled.weights, expected, atol=1e-5)
    assert compiled.weights.dtype == expected.dtype


# devices


def test_devices_by_name() -> None:
    cpu = choose_device("cpu")
    assert isinstance(cpu, Device)
    assert not cpu.is_gpu
    assert cpu.free_bytes() > 1 << 20
    assert isinstance(choose_device("auto"), Device)
    assert namespace(np.zeros(1)) is np
    with pytest.raises(ConfigurationError, match="auto, cpu, gpu"):
        choose_device("tpu")
