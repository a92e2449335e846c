"""Units as files spell them: lengths in Å, detector pixels in mrad or 1/Å."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np

from stream.optics import electron_wavelength

#: In Å and in mrad or 1/Å, spelled without brackets, spaces, underscores and dollars.
LENGTHS = {
    "A": 1.0,
    "Å": 1.0,
    "Ang": 1.0,
    "angstrom": 1.0,
    "Angstrom": 1.0,
    "angstroms": 1.0,
    "nm": 10.0,
    "pm": 0.01,
    "um": 1e4,
    "μm": 1e4,
    "mm": 1e7,
    "m": 1e10,
}
ANGLES = {
    "mrad": ("mrad", 1.0),
    "urad": ("mrad", 1e-3),
    "μrad": ("mrad", 1e-3),
    "rad": ("mrad", 1e3),
    **dict.fromkeys(("A^-1", "1/A", "Å^-1", "1/Å", "A-1", "Å-1", "A^{-1}", "Å^{-1}", "1/Ang"), ("1/Å", 1.0)),
    **dict.fromkeys(("nm^-1", "1/nm", "nm-1", "nm^{-1}"), ("1/Å", 0.1)),
    **dict.fromkeys(("m^-1", "1/m", "m-1", "m^{-1}"), ("1/Å", 1e-10)),
}
UNCALIBRATED = ("", "1", "pixels", "pixel", "pix", "px", "none", "None", "unknown", "<undefined>", "undefined")


def spelled(value: Any) -> str:
    """The unit in the spelling of the tables above; '' for what is no text."""
    text = decoded(value) if value is not None else ""
    # NFKC turns the Ångström sign into the letter Å and the micro sign into the letter μ, which look the same.
    return re.sub(r"[\[\]\s_$]", "", unicodedata.normalize("NFKC", text)) if isinstance(text, str) else ""


def decoded(value: Any) -> Any:
    """Text as str, whether it was stored as bytes, fixed-length bytes or text; anything else unchanged."""
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "SOU":
        value = value.ravel()[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def detector_pixel(size: list[float], kind: str, energy_kev: float | None) -> dict[str, list[float]]:
    """The setting for a detector pixel [row, column] whose ``kind`` is 'mrad' or '1/Å': in mrad whenever possible."""
    if kind == "mrad":
        return {"detector_pixel_mrad": size}
    if energy_kev is None:
        return {"detector_pixel_inv_angstrom": size}
    return {"detector_pixel_mrad": [k * electron_wavelength(energy_kev * 1e3) * 1e3 for k in size]}
