"""What the benchmarks share: optics, counts, set-ups, and messages ready to be sent."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from detectors.messages import SeriesStart
from stream.engine import Setup
from stream.geometry import DetectorGeometry
from stream.kernels import METHODS, overlap_function
from stream.optics import Aberrations, Probe
from stream.scan import ScanPattern

ENERGY_KEV = 200.0
SEMIANGLE_MRAD = 20.0
ROLLOFF_MRAD = 2.0
#: The simulated detector's step; 2 alpha / lambda then covers 47 % of the half plane of scan frequencies.
STEP_ANGSTROM = 3.905 / 16
DETECTOR_SHAPE = (192, 192)
#: Radius of the bright-field disk with 1,250 pixels.
BF_RADIUS_PX = 20.0
#: Underfocus and astigmatism, so that the kernels are complex.
ABERRATIONS = {"C10": -150.0, "C12": 30.0, "phi12": 20.0}


def bf_radius(pixels: int) -> float:
    """Radius [px] of a disk with about so many pixels."""
    return float(np.sqrt(pixels / np.pi))


def setup(scan_shape: tuple[int, int], bf_pixels: int, *, aberrated: bool = False, dtype: str = "u1",
          passes: int | None = 1) -> Setup:  # fmt: skip
    """A reconstruction with about ``bf_pixels`` bright-field pixels, in focus or ``aberrated``."""
    radius = bf_radius(bf_pixels)
    side = 2 * int(radius) + 8
    pixel = SEMIANGLE_MRAD / radius
    shape = (side, side)
    geometry = DetectorGeometry(shape, (pixel, pixel), (side / 2, side / 2), SEMIANGLE_MRAD, np.ones(shape, bool))
    aberrations = Aberrations.from_user(ABERRATIONS if aberrated else {})
    probe = Probe(ENERGY_KEV * 1e3, SEMIANGLE_MRAD * 1e-3, ROLLOFF_MRAD * 1e-3, aberrations)
    scan = ScanPattern(scan_shape)
    step = (STEP_ANGSTROM, STEP_ANGSTROM)
    return Setup(geometry, probe, scan, step, np.dtype(dtype), METHODS["ssb"], passes)


def bf_counts(scan_shape: tuple[int, int], pixels: int, dtype: np.dtype, mean: float = 4.0) -> np.ndarray:
    """Poisson counts of a scan's bright-field pixels, with a pattern in them: (rows, columns, ``pixels``)."""
    rng = np.random.default_rng(1)
    y, x = np.meshgrid(*(np.arange(n) for n in scan_shape), indexing="ij")
    modulation = mean * (1 + 0.3 * np.cos(2 * np.pi * y / 16) * np.cos(2 * np.pi * x / 16))
    out = np.empty((*scan_shape, pixels), dtype)
    for row in range(scan_shape[0]):
        out[row] = rng.poisson(modulation[row][:, None], (scan_shape[1], pixels))
    return out


def frames(
    count: int, dtype: str, mean: float = 0.2, radius: float = 40.0, shape: tuple[int, int] = DETECTOR_SHAPE
) -> np.ndarray:
    """Electron counts, Poisson ``mean`` a pixel in a disk of ``radius`` px: (count, *shape)."""
    rng = np.random.default_rng(2)
    row, column = np.indices(shape) - (np.array(shape) / 2)[:, None, None]
    lit = np.hypot(row, column) < radius
    out = np.zeros((count, *shape), dtype)
    out[:, lit] = rng.poisson(mean, (count, int(lit.sum())))
    return out


def scan_settings(scan_shape: tuple[int, int], detector_shape: tuple[int, int]) -> dict[str, Any]:
    """Every setting of a scan of :func:`save_scan`, under the keys of ``stream.config.Settings``."""
    return {
        "scan_shape": scan_shape,
        "energy_kev": ENERGY_KEV,
        "semiangle_mrad": SEMIANGLE_MRAD,
        "rolloff_mrad": ROLLOFF_MRAD,
        "scan_step_angstrom": (STEP_ANGSTROM, STEP_ANGSTROM),
        "detector_pixel_mrad": (SEMIANGLE_MRAD / BF_RADIUS_PX,) * 2,
        "bf_centre_px": tuple(n / 2 for n in detector_shape),
        "bf_radius_px": BF_RADIUS_PX,
        "rotation_deg": 0.0,
    }


def save_scan(path: Path, scan_shape: tuple[int, int], detector_shape: tuple[int, int]) -> None:
    """A scan over a weak phase object, in focus, as a ``.npy`` file of u1 (*``scan_shape``, *``detector_shape``).

    A crystal with ``16 x 16`` positions a unit cell, and an irregular part of low contrast: 48 frequencies in the
    passband in all. Counts are Poisson, 1,000 electrons a pattern in a disk of ``BF_RADIUS_PX``, and 100 beside it.
    """
    rng = np.random.default_rng(5)
    pixel = SEMIANGLE_MRAD / BF_RADIUS_PX
    centre = tuple(n / 2 for n in detector_shape)
    geometry = DetectorGeometry(
        detector_shape, (pixel, pixel), centre, SEMIANGLE_MRAD, np.ones(detector_shape, bool)
    )  # fmt: skip
    probe = Probe(ENERGY_KEV * 1e3, SEMIANGLE_MRAD * 1e-3, ROLLOFF_MRAD * 1e-3, Aberrations({}))
    k = geometry.bf_k(probe.wavelength)
    lattice = [(1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2), (2, 1), (1, 2)]
    turns = np.array([*(np.array(lattice) / 16), *rng.uniform(-0.3, 0.3, (40, 2))])
    # On the grid of the scan's own frequencies: the object repeats with the scan.
    turns = np.round(turns * scan_shape) / scan_shape
    amplitudes = np.array([0.06] * len(lattice) + [0.015] * 40) * np.exp(2j * np.pi * rng.random(len(turns)))
    gamma = overlap_function(probe, k, tuple((turns / STEP_ANGSTROM).T[:, :, None]))
    pattern = np.abs(probe(*k)) ** 2
    electrons = 1000 / pattern.sum()
    out = np.lib.format.open_memmap(path, "w+", np.uint8, (*scan_shape, *detector_shape))
    rows, columns = scan_shape
    for row in range(rows):
        phase = np.exp(2j * np.pi * (turns[:, 0] * row + turns[:, 1] * np.arange(columns)[:, None]))
        intensity = pattern - 2 * ((phase * amplitudes).imag @ gamma)
        frames = np.zeros((columns, detector_shape[0] * detector_shape[1]), np.uint8)
        frames[:, geometry.bf_pixels] = rng.poisson(electrons * np.maximum(intensity, 0))
        anywhere = rng.integers(0, frames.shape[1], (columns, 100))
        np.add.at(frames, (np.arange(columns)[:, None], anywhere), 1)
        out[row] = frames.reshape(columns, *detector_shape)
    out.flush()


def start(
    scan_shape: tuple[int, int], dtype: str, passes: int | None = 1, shape: tuple[int, int] = DETECTOR_SHAPE
) -> SeriesStart:
    """The start message of a series of ``frames``, with every setting that the reconstruction needs."""
    pixel = SEMIANGLE_MRAD / BF_RADIUS_PX
    settings: dict[str, Any] = {
        "energy_kev": ENERGY_KEV,
        "semiangle_mrad": SEMIANGLE_MRAD,
        "rolloff_mrad": ROLLOFF_MRAD,
        "scan_step_angstrom": STEP_ANGSTROM,
        "detector_pixel_mrad": pixel,
        "bf_centre_px": [n / 2 for n in shape],
        "bf_radius_px": BF_RADIUS_PX,
    }
    count = None if passes is None else passes * scan_shape[0] * scan_shape[1]
    return SeriesStart(1, shape, np.dtype(dtype).newbyteorder("<"), scan_shape, count, settings)


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``work`` over ``repeats`` runs, in seconds."""
    times = []
    for _ in range(repeats):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return statistics.median(times)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers with three significant digits and thousands separated."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        if value == 0 or not np.isfinite(value):
            return "–" if np.isnan(value) else str(value)
        digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
        return f"{value:.1e}" if abs(value) < 1e-3 else f"{round(value, digits):,.{min(digits, 4)}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
