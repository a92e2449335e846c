"""Contrast limits as frozen policies, and the scales (linear, square root, logarithm) that lie between them. No Qt.

A policy answers one question: between which two values is this image drawn? It looks at finite pixels only, because
what has not been scanned yet is NaN and must not pull the contrast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Limits = tuple[float, float]

#: Percentiles of more pixels than this cost milliseconds and gain nothing: a strided sample is taken instead.
SAMPLE = 40_000


class Contrast(Protocol):
    """Chooses the limits of an image."""

    def limits(self, image: np.ndarray) -> Limits | None:
        """(low, high) with low < high in the unit of ``image`` (2-D, float, NaN where empty); None if all is empty."""
        ...


@dataclass(frozen=True)
class RobustContrast:
    """From the ``low`` to the ``high`` percentile of the acquired pixels: a few hot ones do not darken the rest."""

    low: float = 0.5
    high: float = 99.5

    def limits(self, image: np.ndarray) -> Limits | None:
        values = acquired(image)
        if not values.size:
            return None
        low, high = np.percentile(values, (self.low, self.high))
        return widened(float(low), float(high))


@dataclass(frozen=True)
class SymmetricContrast:
    """Zero in the middle, out to the ``high`` percentile of the magnitude: for signed quantities such as the CoM."""

    high: float = 99.5

    def limits(self, image: np.ndarray) -> Limits | None:
        values = acquired(image)
        if not values.size:
            return None
        reach = float(np.percentile(np.abs(values), self.high))
        return widened(-reach, reach)


@dataclass(frozen=True)
class PeakContrast:
    """From the ``low`` percentile to the largest pixel: for spectra, where a peak is a few pixels that matter."""

    low: float = 40.0

    def limits(self, image: np.ndarray) -> Limits | None:
        values = acquired(image)
        if not values.size:
            return None
        high = float(np.max(image, where=np.isfinite(image), initial=-np.inf))
        return widened(float(np.percentile(values, self.low)), high)


@dataclass(frozen=True)
class LockedContrast:
    """The same limits for every image: what the user froze, or dragged on the colour bar."""

    fixed: Limits

    def limits(self, image: np.ndarray) -> Limits | None:
        return self.fixed


def acquired(image: np.ndarray) -> np.ndarray:
    """The finite pixels of ``image`` (any shape, float), 1-D, at most about SAMPLE of them."""
    flat = image.ravel()
    # An odd stride is coprime to the power-of-two row lengths of scans, so that it visits every column of a lattice.
    flat = flat[:: max(1, flat.size // SAMPLE) | 1]
    return flat[np.isfinite(flat)]


def widened(low: float, high: float) -> Limits:
    """(low, high), opened a little where they coincide: a flat image is drawn in mid-gray, not divided by zero."""
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    margin = 0.5 * (abs(low) * 1e-3 or 1e-3)
    return low - margin, high + margin


class Scale(Protocol):
    """Maps values to an evenly coloured axis."""

    @property
    def name(self) -> str: ...

    def forward(self, values: np.ndarray) -> np.ndarray:
        """Same shape, float; monotonic. Must accept every float, NaN stays NaN."""
        ...

    def clip(self, limits: Limits) -> Limits:
        """The limits with what the scale cannot show taken away."""
        ...

    def ticks(self, limits: Limits, count: int) -> list[float]:
        """Round values within ``limits``, about ``count`` of them."""
        ...


@dataclass(frozen=True)
class LinearScale:
    """Colour proportional to the value."""

    name: str = "linear"

    def forward(self, values: np.ndarray) -> np.ndarray:
        return values

    def clip(self, limits: Limits) -> Limits:
        return limits

    def ticks(self, limits: Limits, count: int) -> list[float]:
        low, high = limits
        step = round_up_125((high - low) / max(count, 1))
        first = math.ceil(low / step - 1e-9)
        return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class SqrtScale(LinearScale):
    """Colour proportional to the square root: counting noise looks equally strong everywhere."""

    name: str = "sqrt"

    def forward(self, values: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(values, 0))

    def clip(self, limits: Limits) -> Limits:
        return widened(max(limits[0], 0.0), max(limits[1], 0.0))


@dataclass(frozen=True)
class LogScale:
    """Colour proportional to the logarithm: the dark field shows beside the disk."""

    name: str = "log"
    decades: float = 5.0
    """the most that is shown: zeros and near-zeros would otherwise take the whole range"""

    def forward(self, values: np.ndarray) -> np.ndarray:
        return np.log10(np.maximum(values, 1e-30))

    def clip(self, limits: Limits) -> Limits:
        high = limits[1] if limits[1] > 0 else 1.0
        return max(limits[0], high * 10**-self.decades), high * (1.0 if high > limits[0] else 1.001)

    def ticks(self, limits: Limits, count: int) -> list[float]:
        low, high = (math.log10(max(v, 1e-30)) for v in limits)
        if high - low < 1:
            return LinearScale().ticks(limits, count)
        every = max(1, math.ceil((high - low) / max(count, 1)))
        return [10.0**k for k in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1) if k % every == 0]


SCALES: tuple[Scale, ...] = (LogScale(), SqrtScale(), LinearScale())


def round_down_125(value: float) -> float:
    """The largest of ... 0.1, 0.2, 0.5, 1, 2, 5, 10 ... that is not above ``value`` (> 0)."""
    decade = 10.0 ** math.floor(math.log10(value))
    return next((m * decade for m in (5, 2, 1) if m * decade <= value * (1 + 1e-9)), decade)


def round_up_125(value: float) -> float:
    """The smallest of ... 0.1, 0.2, 0.5, 1, 2, 5, 10 ... that is not below ``value`` (> 0)."""
    decade = 10.0 ** math.floor(math.log10(value))
    return next((m * decade for m in (1, 2, 5) if m * decade >= value * (1 - 1e-9)), 10 * decade)
