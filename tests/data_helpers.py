"""Small made-up scans, and ways to hand them to the engine: what the numerical tests are built from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from detectors.codec import encode
from detectors.messages import Encoding, FrameBlock
from stream.array import Device, choose_device
from stream.engine import Engine
from stream.geometry import DetectorGeometry
from stream.kernels import METHODS
from stream.optics import Aberrations, AxesRelation, Probe
from stream.scan import ScanPattern
from stream.setup import Setup
from tests import oracle

#: The data sets that come with the project's brief, where they are.
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
OWN_DATA = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True)
class Case:
    """A scan of random counts with its optics. Units as in the settings: kV, mrad, Å, degrees.

    The defaults are awkward on purpose: odd and even scan, oblong detector and pixels, two steps, a disk off centre,
    and steps so coarse that the Nyquist row and column lie inside the passband. No pixel lies exactly on an edge.
    """

    scan: tuple[int, int] = (7, 10)
    detector: tuple[int, int] = (12, 15)
    pixel: tuple[float, float] = (1.93, 2.29)
    centre: tuple[float, float] = (5.31, 7.17)
    semiangle: float = 9.7
    energy_kev: float = 200.0
    step: tuple[float, float] = (0.91, 1.07)
    rotation: float = 0.0
    transpose: bool = False
    rolloff: float = 2.0
    aberrations: Mapping[str, float] = field(default_factory=dict)
    masked: Sequence[tuple[int, int]] = ()
    dtype: str = "<u2"
    dose: float = 6.0
    seed: int = 1

    @property
    def good(self) -> np.ndarray:
        """The pixel mask, True = good."""
        mask = np.ones(self.detector, bool)
        for pixel in self.masked:
            mask[pixel] = False
        return mask

    @property
    def positions(self) -> int:
        return self.scan[0] * self.scan[1]

    def counts(self, seed: int = 0) -> np.ndarray:
        """Counts (scan rows, scan columns, detector rows, detector columns); another ``seed``, another noise.

        Uneven over detector and scan, so that no axis can be mistaken for another; masked pixels hold nonsense.
        """
        rng = np.random.default_rng([self.seed, seed])
        y, x, v, u = np.meshgrid(*(np.linspace(0, 1, n) for n in (*self.scan, *self.detector)), indexing="ij")
        expected = self.dose * (1 + 0.5 * np.cos(5 * y + 3 * x) + 0.3 * v - 0.2 * u + 0.4 * np.sin(9 * v * x))
        counts = rng.poisson(expected).astype(self.dtype)
        for row, column in self.masked:
            counts[:, :, row, column] = 200
        return counts

    @cached_property
    def probe(self) -> Probe:
        return Probe(
            self.energy_kev * 1e3,
            self.semiangle * 1e-3,
            self.rolloff * 1e-3,
            Aberrations.from_user(self.aberrations),
            AxesRelation(np.deg2rad(self.rotation), self.transpose),
        )

    def setup(self, method: str = "ssb", **changes: Any) -> Setup:
        """The engine's set-up; ``changes``: its other fields, such as ``passes``, ``averaging``, ``scan``."""
        geometry = DetectorGeometry(self.detector, self.pixel, self.centre, self.semiangle, self.good)
        values: dict[str, Any] = {"scan": ScanPattern(self.scan), **changes}
        return Setup(
            geometry=geometry,
            probe=self.probe,
            scan_step=self.step,
            dtype=np.dtype(self.dtype),
            method=METHODS[method],
            **values,
        )

    def true_object(self, counts: np.ndarray, method: str = "ssb") -> np.ndarray:
        """The oracle's answer for complete counts, complex128 scan shape."""
        return oracle.reconstruct(
            counts,
            method=method,
            energy_ev=self.energy_kev * 1e3,
            semiangle=self.semiangle * 1e-3,
            step=self.step,
            pixel=(self.pixel[0] * 1e-3, self.pixel[1] * 1e-3),
            centre=self.centre,
            theta=np.deg2rad(self.rotation),
            transpose=self.transpose,
            rolloff=self.rolloff * 1e-3,
            coefficients=oracle.coefficients(self.aberrations),
            mask=self.good,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The same as keys of ``stream.config.Settings``."""
        return {
            "scan_shape": self.scan,
            "energy_kev": self.energy_kev,
            "semiangle_mrad": self.semiangle,
            "scan_step_angstrom": self.step,
            "detector_pixel_mrad": self.pixel,
            "bf_centre_px": self.centre,
            "rotation_deg": self.rotation,
            "transpose": self.transpose,
            "rolloff_mrad": self.rolloff,
            "aberrations": dict(self.aberrations),
        }


def payload_block(
    payloads: Sequence[bytes], indices: Iterable[int], encoding: Encoding, time_ns: int = 0
) -> FrameBlock:
    """Payloads as they would lie in a receiver's slab."""
    sizes = np.array([len(payload) for payload in payloads], np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) if len(sizes) else sizes
    slab = np.frombuffer(b"".join(payloads), np.uint8)
    return FrameBlock("series", encoding, np.array(list(indices), np.int64), offsets, sizes, slab, time_ns)


def block(
    counts: np.ndarray,
    indices: Iterable[int],
    encoding: Encoding = Encoding.RAW,
    damaged: Iterable[int] = (),
) -> FrameBlock:
    """The frames ``indices`` of a series whose passes all consist of ``counts`` (scan and detector axes).

    ``damaged``: places in ``indices`` whose payload is cut short.
    """
    indices = [int(index) for index in indices]
    frames = counts.reshape(-1, *counts.shape[2:])
    payloads = [encode(frames[index % len(frames)], encoding) for index in indices]
    for place in damaged:
        payloads[place] = payloads[place][: len(payloads[place]) // 2]
    return payload_block(payloads, indices, encoding)


@contextmanager
def running(setup: Setup, *, threads: int = 2, device: Device | None = None) -> Iterator[Engine]:
    """An engine on the CPU (or ``device``) whose threads end with the ``with`` block."""
    engine = Engine(setup, device or choose_device("cpu"), threads=threads)
    try:
        yield engine
    finally:
        engine.close()


def accumulate_all(engine: Engine) -> None:
    while engine.accumulate():
        pass


def feed(
    engine: Engine, counts: np.ndarray, indices: Iterable[int] | None = None, *, size: int = 37, **options: Any
) -> None:
    """Hand over frames of ``counts`` (by default all, in order) in blocks of ``size``, and accumulate after each."""
    indices = list(range(counts.shape[0] * counts.shape[1]) if indices is None else indices)
    for start in range(0, len(indices), size):
        engine.add(block(counts, indices[start : start + size], **options))
        accumulate_all(engine)


def pass_indices(case: Case, number: int) -> np.ndarray:
    """The frame indices of one pass of a plain raster."""
    return np.arange(case.positions) + number * case.positions


def filled(counts: np.ndarray, held: np.ndarray) -> np.ndarray:
    """What the image of incomplete data is defined by: float64 counts in the shape of ``counts``.

    ``held`` bool scan shape. A missing position holds its row's mean pattern, a missing row the mean of the others.
    """
    out = counts.astype(np.float64)
    rows = np.flatnonzero(held.any(axis=1))
    for row in rows:
        out[row, ~held[row]] = out[row, held[row]].mean(axis=0)
    out[~held.any(axis=1)] = out[rows].mean(axis=(0, 1))
    return out


def assert_object(engine: Engine, case: Case, counts: np.ndarray, method: str = "ssb", limit: float = 3e-6) -> None:
    """The engine's object is the oracle's for ``counts`` (complete, float or integer), to the relative error ``limit``.

    The engine's numbers are complex64 around 1: where the image is very faint, that rounding is allowed for too.
    """
    answer, expected = engine.object(), case.true_object(counts, method)
    contrast = float(np.linalg.norm(expected - expected.mean())) / expected.size**0.5
    assert oracle.relative_error(answer, expected) < limit + float(np.finfo(np.float32).eps) / max(contrast, 1e-12)
