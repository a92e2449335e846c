"""Numbers and lengths as text. No Qt."""

from __future__ import annotations

from viewer.geometry import ANGSTROM

NOTHING = "–"


def value_text(value: float, unit: str = "") -> str:
    """Four significant digits and the unit: ``-0.1234 rad``; not a number is ``not acquired``."""
    if value != value:
        return "not acquired"
    digits = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}" if abs(value) >= 1e7 else f"{value:,.0f}"
    return f"{digits.replace('-', '−')} {unit}".rstrip()


def length_text(length: float, unit: str) -> str:
    """A length of a scale bar: Å up to 9, then nm and µm; other units as they are."""
    if unit == ANGSTROM:
        for factor, larger in ((1e4, "µm"), (10.0, "nm")):
            if length >= factor * (1 - 1e-9):
                return f"{length / factor:g} {larger}"
    return f"{length:g} {unit}"


def rate_text(value: float | None, unit: str) -> str:
    """A rate with three digits, thousands apart: ``7,500 frames/s``."""
    if value is None:
        return f"{NOTHING} {unit}"
    return f"{value:,.0f} {unit}" if 100 <= value < 1e9 else f"{value:.3g} {unit}"
