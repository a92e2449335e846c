"""Detector pixels as angles: the bright-field disk, and the K pixels inside it that the reconstruction uses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from detectors.errors import ConfigurationError


@dataclass(frozen=True)
class DetectorGeometry:
    """Where the beam hits the detector.

    ``shape`` (rows, columns); ``pixel_mrad`` (row, column) angle of a pixel [mrad]; ``bf_centre_px`` (row, column) of
    the disk's centre, sub-pixel; ``semiangle_mrad`` of the disk; ``good`` bool ``shape``, False = masked pixel.
    """

    shape: tuple[int, int]
    pixel_mrad: tuple[float, float]
    bf_centre_px: tuple[float, float]
    semiangle_mrad: float
    good: np.ndarray

    def __post_init__(self) -> None:
        if self.good.shape != self.shape:
            raise ConfigurationError(f"the pixel mask has shape {self.good.shape}, the detector {self.shape}")

    @cached_property
    def angles(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) components of each pixel's scattering angle [rad]: float64, broadcast to ``shape``."""
        row, column = (
            (np.arange(n) - centre) * pixel * 1e-3
            for n, centre, pixel in zip(self.shape, self.bf_centre_px, self.pixel_mrad, strict=True)
        )
        return tuple(np.broadcast_arrays(row[:, None], column[None, :]))  # type: ignore[return-value]

    @cached_property
    def bf_pixels(self) -> np.ndarray:
        """Flat indices of the good pixels inside the disk, int64 (K,), in ascending order.

        Raises ``ConfigurationError`` when there is none.
        """
        row, column = self.angles
        inside = (np.hypot(row, column) < self.semiangle_mrad * 1e-3) & self.good
        if not inside.any():
            raise ConfigurationError(
                f"no good detector pixel lies inside the bright-field disk: centre {self.bf_centre_px} px, semi-angle "
                f"{self.semiangle_mrad} mrad, pixel {self.pixel_mrad} mrad, detector {self.shape[0]}x{self.shape[1]}"
            )
        return np.flatnonzero(inside)

    def bf_k(self, wavelength: float) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) components of k of the K bright-field pixels [1/Å], float64 (K,); ``wavelength`` [Å]."""
        row, column = self.angles
        return row.ravel()[self.bf_pixels] / wavelength, column.ravel()[self.bf_pixels] / wavelength

    @property
    def bf_radius_px(self) -> float:
        """The disk's radius in pixels (mean of rows and columns where the pixels are not square)."""
        return float(np.mean([self.semiangle_mrad / pixel for pixel in self.pixel_mrad]))
