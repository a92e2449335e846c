"""Which dataset of a file holds the frames, which layout that is, and the calibration of liveptycho's own layout."""

from __future__ import annotations

import math
import re
from os import PathLike
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from detectors.errors import DataFileError
from stream.files import emd
from stream.files.dataset import Dataset4D
from stream.files.hdf5 import (
    HDF5_ERRORS,
    array_datasets,
    attribute,
    explained,
    listing,
    number,
    numbers,
    open_file,
    pair,
    reason,
)
from stream.optics import ABERRATION_SYMBOLS, Aberrations

LAYOUT = "liveptycho-data"

#: Root attributes of the own layout, besides aberrations (C10_A, phi12_rad); one of them, or a pixel_mask, marks it.
_OWN_ATTRIBUTES = frozenset(
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


def open_dataset(path: str | PathLike[str], dataset: str | None = None) -> Dataset4D:
    """Open a 4D-STEM file, recognised by its content.

    ``path``: an HDF5 file in liveptycho's own layout (``data`` with the calibration as root attributes), an EMD or
    py4DSTEM file, or any other. ``dataset``: path of the frames inside the file, needed only where the file leaves a
    choice: 4-D (scan rows, scan columns, detector rows, detector columns) or 3-D (frames, detector rows, detector
    columns). Without it the one 4-D dataset is taken, or else the one 3-D dataset.
    The caller closes the result. Raises ``DataFileError``, also for a calibration that is not a finite number.
    """
    path = Path(path)
    file = open_file(path)
    try:
        with explained(path, "reading the file's structure"):
            data = _named(path, file, dataset) if dataset is not None else _only(path, file)
            if data.parent == file and _has_own_calibration(file):
                settings, mask, notes = _own_calibration(path, file, tuple(data.shape or ())[-2:])
                return Dataset4D(path, file, data, layout=LAYOUT, settings=settings, pixel_mask=mask, notes=notes)
            if (layout := emd.layout_of(data)) is not None:
                settings, notes = emd.calibration(path, data)
                return Dataset4D(path, file, data, layout=layout, settings=settings, notes=notes)
            return Dataset4D(path, file, data, layout="HDF5 dataset")
    except BaseException:
        file.close()
        raise


def _named(path: Path, file: Any, name: str) -> Any:
    candidates = f"it has {listing(array_datasets(file)) or 'none with three or four dimensions'}"
    try:
        item = file[name]
    except HDF5_ERRORS as error:
        missing = name.strip("/") not in file
        why = "has no dataset" if missing else f"cannot open ({reason(error)})"
        raise DataFileError(f"{path}: the file {why} {name!r}; {candidates}") from None
    if isinstance(item, h5py.Group) and isinstance(item.get("data"), h5py.Dataset):
        item = item["data"]
    if not isinstance(item, h5py.Dataset):
        raise DataFileError(f"{path}: {name!r} is a group, a dataset was expected; {candidates}")
    if item.shape is not None and item.ndim not in (3, 4):
        raise DataFileError(
            f"{path}: dataset {item.name} has {item.ndim} dimensions, 4 (scan rows, scan columns, detector rows, "
            f"detector columns) or 3 (frames, rows, columns) were expected; {candidates}"
        )
    return item


def _only(path: Path, file: Any) -> Any:
    found = array_datasets(file)
    choice = [d for d in found if d.ndim == 4] or [d for d in found if d.ndim == 3]
    if len(choice) > 1:
        # A layout that names its frames decides between several: the own one first, then EMD's data cube.
        own = [d for d in choice if d.name == "/data" and _has_own_calibration(file)]
        cubes = [d for d in choice if emd.layout_of(d) is not None]
        choice = own or (cubes if len(cubes) == 1 else choice)
    if len(choice) == 1:
        return choice[0]
    if not choice:
        raise DataFileError(
            f"{path}: a 4-D dataset (scan rows, scan columns, detector rows, detector columns) was expected, the file "
            "has none; check that it is the raw data and not a result"
        )
    raise DataFileError(
        f"{path}: one {choice[0].ndim}-D dataset was expected, there are {len(choice)}: {listing(choice)}; choose one "
        "with --dataset"
    )


def _has_own_calibration(file: Any) -> bool:
    return "pixel_mask" in file or any(name in _OWN_ATTRIBUTES for name in file.attrs)


def _own_calibration(
    path: Path, file: Any, detector_shape: tuple[int, ...]
) -> tuple[dict[str, Any], np.ndarray | None, tuple[str, ...]]:
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
        settings |= emd.detector_pixel(pixels[unit], unit, settings.get("energy_kev"))
        if len(pixels) == 2 and (energy := settings.get("energy_kev")):
            other = emd.detector_pixel(pixels["1/Å"], "1/Å", energy)["detector_pixel_mrad"]
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
    if (aberrations := _own_aberrations(path, file)) is not None:
        settings["aberrations"] = aberrations
    return settings, _pixel_mask(path, file, detector_shape), tuple(notes)


def _own_aberrations(path: Path, file: Any) -> dict[str, float] | None:
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
