"""Numbers to colours: float images to RGBA pixels. NumPy only; what is not there (NaN) becomes transparent."""

from __future__ import annotations

import numpy as np

from viewer.contrast import Limits, Scale


def lookup(colors: np.ndarray) -> np.ndarray:
    """A look-up table for :func:`colored` from 256 RGB colours.

    ``colors``: uint8, shape (256, 3). Returns uint32, shape (257,), RGBA in memory order; entry 256 is transparent.
    """
    table = np.zeros((257, 4), dtype=np.uint8)
    table[:256, :3] = colors
    table[:256, 3] = 255
    return table.view(np.uint32).ravel()


def colored(image: np.ndarray, limits: Limits, scale: Scale, table: np.ndarray) -> np.ndarray:
    """``image`` (rows, columns) float between ``limits`` [its unit], through ``table`` of :func:`lookup`.

    Returns uint8, shape (rows, columns, 4), RGBA; NaN and infinities are transparent.
    """
    low, high = scale.forward(np.asarray(limits, dtype=np.float64))
    values = scale.forward(image.astype(np.float32, copy=False))
    with np.errstate(invalid="ignore", over="ignore"):
        values = (values - np.float32(low)) * np.float32(255 / (high - low))
    np.clip(values, 0, 255, out=values)
    # One table look-up paints and leaves holes: 256 is the transparent entry.
    np.copyto(values, 256, where=~np.isfinite(image))
    return table.take(values.astype(np.uint16)).view(np.uint8).reshape(*image.shape, 4)


def magnitude(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Length of a vector field's vectors, same shape and unit as its components; NaN where either is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.hypot(row, column)


def color_wheel(row: np.ndarray, column: np.ndarray, reach: float) -> np.ndarray:
    """A vector field: direction as hue, magnitude (0..``reach``) as brightness.

    ``row``, ``column``: float (rows, columns), same unit as ``reach``. Returns uint8 (rows, columns, 4), RGBA;
    transparent where either component is not finite.
    """
    finite = np.isfinite(row) & np.isfinite(column)
    row, column = np.where(finite, row, 0), np.where(finite, column, 0)
    brightness = np.clip(np.hypot(row, column) / reach, 0, 1)
    angle = np.arctan2(row, column)
    pixels = np.empty((*row.shape, 4), dtype=np.uint8)
    for channel, turn in enumerate((0.0, 2 * np.pi / 3, 4 * np.pi / 3)):
        # Three cosines, a third of a turn apart: smoother to the eye than the corners of HSV.
        pixels[..., channel] = 255 * brightness * (0.5 + 0.5 * np.cos(angle - turn))
    pixels[..., 3] = np.where(finite, 255, 0)
    return pixels
