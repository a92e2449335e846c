"""What the panels can show of a scan: one table of channels, each a small frozen object. No Qt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stream.snapshot import IMAGE_UNITS
from viewer.contrast import Contrast, RobustContrast, SymmetricContrast


@dataclass(frozen=True)
class Channel:
    """One scalar image of a snapshot."""

    name: str
    title: str
    contrast: Contrast
    colors: str
    """a colour map of viewer.theme.COLOR_MAPS"""

    @property
    def unit(self) -> str:
        """For colour bars and values; the unit 1 of a ratio is not written."""
        unit = IMAGE_UNITS[self.name]
        return "" if unit == "1" else unit

    def images(self, snapshot_images: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...] | None:
        """One float image (rows, columns), two (row and column component) of a vector; None if not there."""
        image = snapshot_images.get(self.name)
        return None if image is None else (image,)


@dataclass(frozen=True)
class VectorChannel(Channel):
    """Two components of one vector, shown as colour: direction as hue, magnitude as brightness."""

    @property
    def unit(self) -> str:
        return IMAGE_UNITS[f"{self.name}_row"]

    def images(self, snapshot_images: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...] | None:
        row, column = snapshot_images.get(f"{self.name}_row"), snapshot_images.get(f"{self.name}_column")
        return None if row is None or column is None or row.shape != column.shape else (row, column)


PHASE = Channel("phase", "Phase", RobustContrast(), "gray")

#: What the second panel offers, in the order of its keys 1, 2, ...
SECOND: tuple[Channel, ...] = (
    Channel("bright_field", "Bright field", RobustContrast(), "gray"),
    Channel("dark_field", "Dark field", RobustContrast(), "gray"),
    Channel("amplitude", "Amplitude", RobustContrast(), "gray"),
    Channel("com_row", "CoM row", SymmetricContrast(), "blue-red"),
    Channel("com_column", "CoM column", SymmetricContrast(), "blue-red"),
    VectorChannel("com", "CoM direction", RobustContrast(0, 99.5), "gray"),
)
