"""What the panels can show of a scan: one table of channels, each a small frozen object. No Qt."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from stream.snapshot import IMAGE_CHANNELS, IMAGE_UNITS
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

    @property
    def image_names(self) -> tuple[str, ...]:
        """The images of a snapshot that it is drawn from."""
        return (self.name,)

    def is_left_out(self, left_out: Collection[str]) -> bool:
        """Whether a session that leaves out these channels of ``IMAGE_CHANNELS`` does not make it."""
        return any(image in IMAGE_CHANNELS.get(name, ()) for name in left_out for image in self.image_names)

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

    @property
    def image_names(self) -> tuple[str, ...]:
        return f"{self.name}_row", f"{self.name}_column"

    def images(self, snapshot_images: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...] | None:
        row, column = map(snapshot_images.get, self.image_names)
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


def first_channel(left_out: Collection[str]) -> Channel:
    """What the large panel shows: the phase; without it, the first image over the scan that there is."""
    return next((channel for channel in (PHASE, *SECOND) if not channel.is_left_out(left_out)), PHASE)


def second_channel(left_out: Collection[str], wanted: Channel) -> Channel:
    """``wanted`` for the second panel, or what takes its place: the next best that the large panel does not show."""
    first = first_channel(left_out)
    others = [channel for channel in (wanted, *SECOND) if channel is not first]
    return next((channel for channel in others if not channel.is_left_out(left_out)), others[0])
