"""liveptycho's own layout of HDF5 data files: ``/data``, the calibration as attributes of the root, ``/pixel_mask``."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from detectors.errors import DataFileError
from stream.files.hdf5 import attribute, explained, number, numbers, pair
from stream.files.units import detector_pixel
from stream.optics import ABERRATION_SYMBOLS, Aberrations

LAYOUT = "liveptycho-data"

#: Root attributes of the own layout, besides aberrations (C10_A, phi12_rad); one of them, or a pixel_mask, marks it.
_ATTRIBUTES = frozenset(
    {
        "energy_eV",
        "semiangle_mrad",
        "scan_step_A",
        "det_pixel_mrad",
        "det_pixel_invA",
        "rotation_deg",
        "transpose",
        "rolloff_mrad",
        "bf_centre_px",
        "bf_radius_px",
    }
)


def has_calibration(file: Any) -> bool:
    """Whether an open h5py file is of this layout: it says something of what we know."""
    return "pixel_mask" in file or any(name in _ATTRIBUTES for name in file.attrs)


def calibration(
    path: Path, file: Any, detector_shape: tuple[int, ...]
) -> tuple[dict[str, Any], np.ndarray | None, tuple[str, ...]]:
    """(settings, pixel mask, notes). Raises ``DataFileError`` naming what is not a sensible number."""
    settings: dict[str, Any] = {}
    notes: list[str] = []
    there = set(file.attrs)

    def value(name: str) -> Any:
        return attribute(file, name, path)

    def named(name: str) -> str:
        return f"attribute {name!r}"

    if "energy_eV" in there:
        settings["energy_kev"] = number(value("energy_eV"), named("energy_eV"), path, positive=True) / 1e3
    for name, key in (("semiangle_mrad", "semiangle_mrad"), ("bf_radius_px", "bf_radius_px")):
        if name in there:
            settings[key] = number(value(name), named(name), path, positive=True)
    if "scan_step_A" in there:
        settings["scan_step_angstrom"] = pair(value("scan_step_A"), named("scan_step_A"), path, positive=True)
    pixels = {
        unit: pair(value(name), named(name), path, positive=True)
        for name, unit in (("det_pixel_mrad", "mrad"), ("det_pixel_invA", "1/Å"))
        if name in there
    }
    if pixels:
        unit = next(iter(pixels))
        settings |= detector_pixel(pixels[unit], unit, settings.get("energy_kev"))
        if len(pixels) == 2 and (energy := settings.get("energy_kev")):
            other = detector_pixel(pixels["1/Å"], "1/Å", energy)["detector_pixel_mrad"]
            if not np.allclose(other, pixels["mrad"], rtol=1e-2):
                notes.append(
                    f"det_pixel_invA means {other[0]:.4g} x {other[1]:.4g} mrad at {energy:g} keV, det_pixel_mrad says "
                    f"{pixels['mrad'][0]:.4g} x {pixels['mrad'][1]:.4g}: the latter is used"
                )
    if "rotation_deg" in there:
        settings["rotation_deg"] = number(value("rotation_deg"), named("rotation_deg"), path)
    if "transpose" in there:
        if (flag := number(value("transpose"), named("transpose"), path)) not in (0, 1):
            raise DataFileError(f"{path}: attribute 'transpose' must be 0 or 1, got {flag:g}; correct it in the file")
        settings["transpose"] = bool(flag)
    if "rolloff_mrad" in there:
        settings["rolloff_mrad"] = number(value("rolloff_mrad"), named("rolloff_mrad"), path)
        if settings["rolloff_mrad"] < 0:
            raise DataFileError(
                f"{path}: attribute 'rolloff_mrad' must not be negative, got {settings['rolloff_mrad']:g}; correct it"
            )
    if "bf_centre_px" in there:
        settings["bf_centre_px"] = numbers(value("bf_centre_px"), named("bf_centre_px"), path, sizes=(2,))
    if (aberrations := _aberrations(path, file)) is not None:
        settings["aberrations"] = aberrations
    return settings, _pixel_mask(path, file, detector_shape), tuple(notes)


def _aberrations(path: Path, file: Any) -> dict[str, float] | None:
    """C_nm in Å and phi_nm in degrees without the zero coefficients; None when the file names no coefficient."""
    given: dict[str, float] = {}
    for name in file.attrs:
        if not (match := re.fullmatch(r"C(\d)(\d)_A", name)):
            continue
        symbol = f"C{match[1]}{match[2]}"
        given[symbol] = number(attribute(file, name, path), f"attribute {name!r}", path)
        if symbol not in ABERRATION_SYMBOLS:
            raise DataFileError(
                f"{path}: attribute {name!r} is no aberration; known are {', '.join(ABERRATION_SYMBOLS)}, rename or "
                "remove it"
            )
        azimuth = f"phi{symbol[1:]}_rad"
        if not symbol.endswith("0") and azimuth in file.attrs:
            radians = number(attribute(file, azimuth, path), f"attribute {azimuth!r}", path)
            given[f"phi{symbol[1:]}"] = math.degrees(radians)
    return Aberrations.from_user(given).to_user() if given else None


def _pixel_mask(path: Path, file: Any, detector_shape: tuple[int, ...]) -> np.ndarray | None:
    """``pixel_mask`` as bool (detector rows, columns), True = good; None when the file has none."""
    mask = file.get("pixel_mask")
    if mask is None:
        return None
    if not isinstance(mask, h5py.Dataset) or mask.shape != detector_shape or mask.dtype.kind not in "buif":
        got = f"{'x'.join(map(str, mask.shape or ()))} {mask.dtype}" if isinstance(mask, h5py.Dataset) else "a group"
        raise DataFileError(
            f"{path}: pixel_mask must be {'x'.join(map(str, detector_shape))} numbers like a frame (1 = good), got "
            f"{got}; correct or remove it"
        )
    with explained(path, "reading pixel_mask"):
        values = mask[...]
    if not np.isin(values, (0, 1)).all():
        raise DataFileError(f"{path}: pixel_mask must hold 0 (bad) and 1 (good) only; correct or remove it")
    if not values.any():
        raise DataFileError(f"{path}: pixel_mask calls every pixel bad; correct it (1 = good) or remove it")
    return np.ascontiguousarray(values, dtype=bool)
