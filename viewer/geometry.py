"""Where the pixels of an image lie in its plane, in Å, mrad or 1/Å; pixels where the calibration is unknown. No Qt.

Axes are (row, column); ``y`` of a panel is the row and points down, ``x`` is the column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from stream.optics import electron_wavelength
from stream.snapshot import Snapshot

PIXELS = "px"
ANGSTROM = "Å"
MRAD = "mrad"
PER_ANGSTROM = "Å⁻¹"


@dataclass(frozen=True)
class Plane:
    """The plane of an image of ``shape`` (rows, columns)."""

    shape: tuple[int, int]
    step: tuple[float, float]
    """(row, column) pixel pitch [unit]"""
    origin: tuple[float, float]
    """(row, column) of the centre of pixel (0, 0) [unit]"""
    unit: str

    @property
    def rect(self) -> tuple[float, float, float, float]:
        """(x, y, width, height) [unit] of the whole image, pixels counted to their outer edge."""
        (rows, columns), (dy, dx), (y, x) = self.shape, self.step, self.origin
        return x - dx / 2, y - dy / 2, columns * dx, rows * dy

    def pixel(self, x: float, y: float) -> tuple[int, int] | None:
        """(row, column) of the pixel under the point, None outside of the image."""
        row = math.floor((y - self.origin[0]) / self.step[0] + 0.5)
        column = math.floor((x - self.origin[1]) / self.step[1] + 0.5)
        return (row, column) if 0 <= row < self.shape[0] and 0 <= column < self.shape[1] else None

    def point(self, row: float, column: float) -> tuple[float, float]:
        """(x, y) [unit] of the centre of pixel (row, column)."""
        return self.origin[1] + column * self.step[1], self.origin[0] + row * self.step[0]


def scan_plane(snapshot: Snapshot, shape: tuple[int, int]) -> Plane:
    """The specimen plane [Å], the first scan position at the origin."""
    step = snapshot.scan_step_angstrom
    return Plane(shape, step or (1.0, 1.0), (0.0, 0.0), ANGSTROM if step else PIXELS)


def pattern_plane(snapshot: Snapshot, shape: tuple[int, int]) -> Plane:
    """The detector plane [mrad], the middle of the bright-field disk at the origin."""
    step = snapshot.detector_pixel_mrad
    centre = snapshot.bf_centre_px or ((shape[0] - 1) / 2, (shape[1] - 1) / 2)
    dy, dx = step or (1.0, 1.0)
    return Plane(shape, (dy, dx), (-centre[0] * dy, -centre[1] * dx), MRAD if step else PIXELS)


def spectrum_plane(snapshot: Snapshot, shape: tuple[int, int]) -> Plane:
    """The plane of scan frequencies [1/Å] after an fftshift, frequency 0 at the origin."""
    step = snapshot.scan_step_angstrom or (1.0, 1.0)
    dy, dx = (1 / (n * s) for n, s in zip(shape, step, strict=True))
    unit = PER_ANGSTROM if snapshot.scan_step_angstrom else "1/px"
    return Plane(shape, (dy, dx), (-(shape[0] // 2) * dy, -(shape[1] // 2) * dx), unit)


def bf_circle(snapshot: Snapshot) -> tuple[float, float] | None:
    """(row, column) radius of the bright-field disk in the unit of :func:`pattern_plane`; None if not known."""
    if snapshot.bf_radius_px is None or snapshot.bf_centre_px is None:
        return None
    dy, dx = snapshot.detector_pixel_mrad or (1.0, 1.0)
    return snapshot.bf_radius_px * dy, snapshot.bf_radius_px * dx


def cutoff(snapshot: Snapshot) -> float | None:
    """2 alpha / lambda [1/Å], beyond which no scan frequency is transferred; None without beam or scan step."""
    if snapshot.energy_kev is None or snapshot.semiangle_mrad is None or snapshot.scan_step_angstrom is None:
        return None
    return 2 * snapshot.semiangle_mrad * 1e-3 / electron_wavelength(snapshot.energy_kev * 1e3)
