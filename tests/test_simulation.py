"""The simulated patterns, judged by an independent brute-force SSB: orientation, sign, aberrations, counts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from detectors.codec import decode
from detectors.errors import ConfigurationError, ProtocolError
from detectors.messages import Encoding
from detectors.simulator.misbehaviour import Misbehaviour, MisbehaviourCounts
from detectors.simulator.simulation import SimulatedScan
from detectors.simulator.source import EncodedSource
from detectors.simulator.specimen import SPECIMENS, specimen_named
from stream.optics import AxesRelation

#: Two cells of SrTiO3 a side, a disk off the centre of a detector that is not square and has oblong pixels.
SMALL = SimulatedScan(
    scan_shape=(24, 20),
    scan_step_angstrom=(7.81 / 24, 7.81 / 20),
    detector_shape=(40, 36),
    detector_pixel_mrad=(1.3, 1.4),
    bf_centre_px=(18.3, 19.2),
    electrons_per_frame=None,
)
ABERRATIONS = {"C10": -100.0, "C12": 20.0, "phi12": 30.0, "C30": 1e5}


def cube(scan: SimulatedScan) -> np.ndarray:
    """All counts, float64 (scan rows, scan columns, detector rows, detector columns)."""
    return np.stack([frames for _, frames in scan.frames()]).astype(np.float64)


def brute_force_ssb(scan: SimulatedScan, data: np.ndarray) -> np.ndarray:
    """The phase by REFERENCE sections 1-4, restated without a line of the program: float64, shape of the scan."""
    wavelength = 0.0250793374  # 200 kV
    (Ny, Nx, H, W), cut = data.shape, 1e-3 * scan.semiangle_mrad
    theta = np.deg2rad(scan.rotation_deg)
    c = scan.aberrations
    phi12 = np.deg2rad(c.get("phi12", 0.0)) - theta
    if scan.transpose:
        phi12 = np.pi / 2 - phi12

    def probe(ky: Any, kx: Any) -> Any:
        alpha, phi, r = wavelength * np.hypot(ky, kx), np.arctan2(kx, ky), 1e-3 * scan.rolloff_mrad
        edge = np.where(alpha <= cut, 0.5 * (1 + np.cos(np.pi * (alpha - cut + r) / r)), 0.0)
        chi = alpha**2 / 2 * (c.get("C10", 0.0) + c.get("C12", 0.0) * np.cos(2 * (phi - phi12)))
        chi = 2 * np.pi / wavelength * (chi + alpha**4 / 4 * c.get("C30", 0.0))
        return np.where(alpha <= cut - r, 1.0, edge) * np.exp(-1j * chi)

    dy, dx = (1e-3 * pixel / wavelength for pixel in scan.detector_pixel_mrad)
    k_rows, k_columns = (np.arange(H) - scan.centre_px[0]) * dy, (np.arange(W) - scan.centre_px[1]) * dx
    ky, kx = np.meshgrid(k_rows, k_columns, indexing="ij")
    disk = wavelength * np.hypot(ky, kx) <= cut
    ky, kx = ky[disk], kx[disk]
    G = np.fft.fft2(data[:, :, disk], axes=(0, 1))
    A = probe(ky, kx)
    psi = np.zeros((Ny, Nx), complex)
    q_rows, q_columns = np.fft.fftfreq(Ny, scan.scan_step_angstrom[0]), np.fft.fftfreq(Nx, scan.scan_step_angstrom[1])
    for i, j in itertools.product(range(Ny), range(Nx)):
        cos, sin = np.cos(-theta), np.sin(-theta)
        q0, q1 = q_rows[i] * cos - q_columns[j] * sin, q_columns[j] * cos + q_rows[i] * sin
        if scan.transpose:
            q0, q1 = q1, q0
        gamma = A.conj() * probe(ky - q0, kx - q1) - A * probe(ky + q0, kx + q1).conj()
        m = np.abs(gamma) > 1e-3
        psi[i, j] = (G[i, j][m] * gamma[m].conj() / np.abs(gamma[m])).sum()
    mean = data.sum((2, 3)).mean()
    psi[0, 0] = Ny * Nx * mean
    return np.angle(np.fft.ifft2(psi) / mean)


def agreement(measured: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Pearson r and slope of ``measured`` against ``expected``."""
    x, y = measured - measured.mean(), expected - expected.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())), float((x * y).sum() / (y * y).sum())


@pytest.mark.parametrize("specimen", ["lattice", "particle"])
@pytest.mark.parametrize("aberrations", [{}, ABERRATIONS], ids=["in focus", "aberrated"])
@pytest.mark.parametrize("rotation_deg", [0.0, -15.0, 71.0])
@pytest.mark.parametrize("transpose", [False, True])
def test_ssb_recovers_the_expected_phase(
    specimen: str, aberrations: dict[str, float], rotation_deg: float, transpose: bool
) -> None:
    scan = replace(SMALL, specimen=specimen, aberrations=aberrations, rotation_deg=rotation_deg, transpose=transpose)
    r, slope = agreement(brute_force_ssb(scan, cube(scan)), scan.expected_ssb_phase)
    assert r > 0.997
    assert 0.95 < slope < 1.02


def test_wrong_rotation_or_transpose_shows() -> None:
    scan = replace(SMALL, rotation_deg=-15.0, specimen="particle", aberrations=ABERRATIONS)
    data = cube(scan)
    _, right = agreement(brute_force_ssb(scan, data), scan.expected_ssb_phase)
    for wrong in (replace(scan, rotation_deg=15.0), replace(scan, transpose=True)):
        _, slope = agreement(brute_force_ssb(wrong, data), scan.expected_ssb_phase)
        assert slope < 0.9 * right


def test_a_disk_over_the_detectors_edge_is_cut_and_not_wrapped() -> None:
    whole = replace(SMALL, detector_shape=(64, 64), bf_centre_px=(31.3, 32.2))
    cut = replace(SMALL, detector_shape=(40, 36), bf_centre_px=(8.3, 29.2))
    indices = np.arange(5)
    np.testing.assert_allclose(
        cut.patterns(indices), whole.patterns(indices)[:, 23:63, 3:39], atol=2e-3 * float(whole.patterns(indices).max())
    )


def test_counts_are_poisson_distributed_around_the_pattern() -> None:
    scan = replace(SMALL, specimen="particle")
    share = scan.patterns(np.arange(scan.frames_per_pass)).reshape(24, 20, 40, 36)
    for electrons in (400.0, 5000.0):  # placed one by one, and drawn pixel by pixel
        counts = cube(replace(scan, electrons_per_frame=electrons))
        expected = electrons * share
        assert abs(counts.sum() / expected.sum() - 1) < 5 / np.sqrt(expected.sum())
        assert abs(((counts - expected) ** 2).sum() / expected.sum() - 1) < 0.03
        disk = share.mean((0, 1)) > 0.3 * share.mean((0, 1)).max()
        np.testing.assert_allclose(counts.mean((0, 1))[disk], expected.mean((0, 1))[disk], rtol=0.5)


def test_a_pattern_holds_the_whole_beam() -> None:
    share = replace(SMALL, detector_shape=(64, 64), bf_centre_px=None).patterns(np.arange(10)).sum((1, 2))
    assert np.all(share <= 1 + 1e-5)
    assert np.all(share > 0.99)


def test_counts_saturate_and_bad_pixels_stand_out() -> None:
    scan = replace(SMALL, electrons_per_frame=1e6, dtype="uint8", hot_pixels=((0, 1),), dead_pixels=((18, 19),))
    first, frames = scan.block(3)
    assert first == 3 * 20
    assert frames.dtype == np.uint8
    assert frames.max() == 255
    assert np.all(frames[:, 0, 1] == 255)
    assert np.all(frames[:, 18, 19] == 0)
    assert np.count_nonzero(frames == 255) > 1000


@pytest.mark.parametrize(("dtype", "quarter"), [("uint8", 255 / 4), ("uint16", 65535 / 4)])
def test_noise_free_counts_use_the_range(dtype: str, quarter: float) -> None:
    counts = cube(replace(SMALL, dtype=dtype))
    assert counts.mean((0, 1)).max() == pytest.approx(quarter, rel=0.2)
    np.testing.assert_array_equal(counts, cube(replace(SMALL, dtype=dtype, seed=0)))


def test_a_seed_makes_everything_the_same_again() -> None:
    scan = replace(SMALL, electrons_per_frame=300.0, specimen="particle")
    rows = {number: scan.block(number)[1] for number in (5, 0)}
    np.testing.assert_array_equal(replace(scan).block(0)[1], rows[0])
    np.testing.assert_array_equal(replace(scan).block(5)[1], rows[5])
    assert not np.array_equal(replace(scan, seed=1).block(0)[1], rows[0])
    assert not np.array_equal(replace(scan, seed=1).truth_phase, scan.truth_phase)


@pytest.mark.parametrize("name", SPECIMENS)
def test_specimens_are_weak_and_drawn_alike_on_any_grid(name: str) -> None:
    phase = specimen_named(name).build((31.24, 23.43), 4)
    drawn = phase.on_grid((80, 60), (31.24 / 80, 23.43 / 60))
    assert 0.15 < drawn.max() < 0.5
    assert drawn.min() > -1e-6
    axes = AxesRelation(0.4, transpose=True)
    turned = phase.on_grid((30, 40), (0.3, 0.21), (-40.0, 7.0), axes)
    rows, columns = np.meshgrid(-40.0 + 0.3 * np.arange(30), 7.0 + 0.21 * np.arange(40), indexing="ij")
    np.testing.assert_allclose(turned, phase.at(*axes.to_scan(rows, columns)), atol=1e-4)


def test_what_cannot_be_simulated_is_refused_in_a_sentence() -> None:
    for wrong, expected in (
        ({"specimen": "cheese"}, "lattice"),
        ({"dtype": "float32"}, "uint16"),
        ({"electrons_per_frame": 0.0}, "electrons_per_frame"),
        ({"scan_shape": (0, 4)}, "scan_shape"),
        ({"rolloff_mrad": 30.0}, "rolloff_mrad"),
        ({"hot_pixels": ((99, 0),)}, "not on a detector"),
        ({"aberrations": {"C10": -5000.0}}, "smaller defocus"),
    ):
        with pytest.raises(ConfigurationError, match=expected):
            replace(SMALL, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4])
def test_an_encoded_source_packs_in_order_and_remembers(encoding: Encoding) -> None:
    scan = replace(SMALL, electrons_per_frame=300.0)
    source = EncodedSource(scan, encoding)
    first_pass, second_pass = (list(source.blocks()) for _ in range(2))
    assert source.cached_frames == source.frames_per_pass == 480
    assert [first for first, _ in first_pass] == list(range(0, 480, 20))
    assert all(a is b for (_, a), (_, b) in zip(first_pass, second_pass, strict=True))
    unpacked = [decode(p, encoding, (40, 36), np.dtype("<u2")) for _, payloads in first_pass for p in payloads]
    np.testing.assert_array_equal(unpacked, cube(scan).reshape(480, 40, 36))


def test_a_full_cache_costs_time_and_not_memory() -> None:
    source = EncodedSource(SMALL, Encoding.RAW, cache_bytes=100 * 40 * 36 * 2)
    made: list[int] = []
    source.prepare(made.append)
    assert made[-1] == 480
    assert source.cached_frames == 100
    assert sum(len(payloads) for _, payloads in source.blocks()) == 480


def test_the_start_message_tells_the_settings() -> None:
    start = replace(SMALL, rotation_deg=-15, aberrations={"C10": -100}).start("s")
    assert (start.series, start.detector_shape, start.scan_shape, start.frames) == ("s", (40, 36), (24, 20), 480)
    assert start.dtype == np.dtype("<u2")
    assert start.settings["rotation_deg"] == -15.0
    assert start.settings["aberrations"] == {"C10": -100.0}
    assert start.settings["scan_step_angstrom"] == [7.81 / 24, 7.81 / 20]


def test_misbehaviour_does_what_it_counts() -> None:
    payload = np.arange(64, dtype="<u2").tobytes()
    frames = [(index, payload) for index in range(20000)]
    counts = MisbehaviourCounts()
    wrong = Misbehaviour(drop=0.02, duplicate=0.03, reorder=0.05, corrupt=0.01, seed=7)
    out = list(wrong.apply(frames, counts))
    indices = [index for index, _ in out]
    assert counts.frames == 20000
    assert counts.sent == len(out) == 20000 - counts.dropped + counts.duplicated
    assert len(set(indices)) == 20000 - counts.dropped
    assert sum(len(p) < len(payload) for _, p in out) == counts.corrupted
    for count, share in (
        (counts.dropped, 0.02),
        (counts.duplicated, 0.03),
        (counts.reordered, 0.05),
        (counts.corrupted, 0.01),
    ):
        assert count == pytest.approx(20000 * share, rel=0.25)
    newest = np.maximum.accumulate(indices)
    late = newest - indices
    assert np.count_nonzero(late) == counts.reordered
    assert 0 < late.max() <= wrong.reorder_window + 1
    assert out == list(replace(wrong).apply(frames))


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4])
def test_corrupted_payloads_cannot_be_unpacked(encoding: Encoding) -> None:
    source = EncodedSource(replace(SMALL, electrons_per_frame=300.0), encoding)
    frames = ((first + i, p) for first, payloads in source.blocks() for i, p in enumerate(payloads))
    for _, payload in Misbehaviour(corrupt=1.0).apply(frames):
        with pytest.raises(ProtocolError):
            decode(payload, encoding, (40, 36), np.dtype("<u2"))


def test_a_stopped_detector_takes_what_it_held_back_with_it() -> None:
    counts = MisbehaviourCounts()
    source = iter([(index, b"x") for index in range(100)])
    wrong = Misbehaviour(reorder=0.5, stop_after=60)
    assert len(list(wrong.apply(source, counts))) == counts.sent < 60
    assert counts.frames == 60
    assert next(source)[0] == 60
    assert not wrong.ends(counts)
    everything = list(replace(wrong, end_when_stopped=True).apply([(index, b"x") for index in range(100)]))
    assert sorted(index for index, _ in everything) == list(range(60))


@pytest.mark.parametrize("wrong", [{"drop": -0.1}, {"drop": 0.6, "corrupt": 0.6}, {"stop_after": -1}])
def test_impossible_misbehaviour_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Misbehaviour(**wrong)
