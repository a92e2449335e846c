"""What other programs write beside a DECTRIS master file about the scan: the detector itself knows nothing of it.

    <name>_master.h5        the detector's
    <name>.h5               NOVENA, DECTRIS' own STEM program: attributes of the group "STEM Metadata"
    <name>_em_metadata.h5   NCEM's acquisition program: datasets below /electron_microscope, with units

Nothing here is fatal: a side file that cannot be read, or makes no sense, is a note.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from detectors.errors import DataFileError
from stream.files.hdf5 import HDF5_ERRORS, open_file, reason
from stream.files.units import ANGLES, LENGTHS, decoded, detector_pixel, spelled

_VOLTS = {"V": 1e-3, "kV": 1.0, "eV": 1e-3, "keV": 1.0}
_QUANTITY = re.compile(r"\s*([-+0-9.eE]+)\s*(\S+)\s*")
_MOST_POSITIONS = 65536
"""along an axis"""


@dataclass
class ScanNotes:
    """What a side file tells: ``scan_shape`` (rows, columns), ``settings`` by key, ``notes`` for the user."""

    scan_shape: tuple[int, int] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def beside(master: Path) -> ScanNotes:
    """What the files beside ``master`` tell of the scan."""
    found = ScanNotes()
    name = re.sub(r"(_master|_data_\d+)$", "", master.stem)
    for path, read in (
        (master.with_name(f"{name}.h5"), _novena),
        (master.with_name(f"{name}_em_metadata.h5"), _ncem),
    ):
        if path == master or not path.is_file():
            continue
        try:
            with open_file(path) as file:
                read(path, file, found)
        except DataFileError as error:
            found.notes.append(f"not used: {error}")
        except HDF5_ERRORS as error:
            found.notes.append(f"{path.name} beside the master file is not used: {reason(error)}")
    return found


def _novena(path: Path, file: Any, found: ScanNotes) -> None:
    group = file.get("STEM Metadata")
    if not isinstance(group, h5py.Group):
        return
    columns, rows, prescan, volts, step, turn, camera_m = (
        _number(group.attrs.get(name))
        for name in (
            "NumPixelsX",
            "NumPixelsY",
            "NumPixelsPrescan",
            "High Tension",
            "Pixel Size",
            "Rotation",
            "Camera Length",
        )
    )
    found.scan_shape = _shape(rows, columns)
    if volts is not None and 1e3 <= volts <= 5e6:
        found.settings["energy_kev"] = volts / 1e3
    if step:
        # The unit is stated nowhere; RosettaSciIO and py4DSTEM take it for nm.
        if _number(group.attrs.get("IsPixelSizeCalibrated")):
            found.settings["scan_step_angstrom"] = [step * 10.0] * 2
            found.notes.append(f"scan_step_angstrom is 'Pixel Size' = {step:g} of {path.name}, taken to be in nm")
        else:
            found.notes.append(
                f"'Pixel Size' = {step:g} in {path.name} says of itself that it is not calibrated, and is not used; if "
                f"it is in nm, set scan_step_angstrom = {step * 10:.4g}"
            )
    if turn:
        found.notes.append(f"'Rotation' = {turn:g} in {path.name} is not used, since its unit and sense are not known")
    if camera_m:
        found.notes.append(
            f"'Camera Length' = {camera_m:g} in {path.name} is nominal and not used for the detector's pixel"
        )
    if prescan:
        found.notes.append(
            f"{path.name} speaks of {prescan:g} prescan positions: if they made frames, the image starts late"
        )


def _ncem(path: Path, file: Any, found: ScanNotes) -> None:
    top = file.get("electron_microscope")
    if not isinstance(top, h5py.Group):
        return
    scan = "scan_controller/regular_scan"
    shape = _shape(_number(_value(top, f"{scan}/n_pixels_y")), _number(_value(top, f"{scan}/n_pixels_x")))
    found.scan_shape = found.scan_shape or shape
    energy = _quantity(top, "electron_source/accelerating_voltage", _VOLTS)
    if energy is not None and 1 <= energy <= 5e3:
        found.settings["energy_kev"] = energy
    steps = [_quantity(top, f"{scan}/pixel_size_{axis}", LENGTHS) for axis in "yx"]
    if None not in steps:
        found.settings["scan_step_angstrom"] = steps
    elif f"{scan}/pixel_size_x" in top:
        found.notes.append(f"the pixel size in {path.name} has no unit that is known, and is not used")
    angles = {unit: factor for unit, (kind, factor) in ANGLES.items() if kind == "mrad"}
    if (angle := _quantity(top, "illumination_system/semi_convergence_angle", angles)) is not None:
        found.settings["semiangle_mrad"] = angle
    pixel = [_quantity(top, f"imaging_system/reciprocal_pixel_size_{axis}", angles) for axis in "yx"]
    if pixel[0] is not None and pixel[1] is not None:
        found.settings |= detector_pixel([pixel[0], pixel[1]], "mrad", None)


def _shape(rows: float | None, columns: float | None) -> tuple[int, int] | None:
    if rows is None or columns is None or not (1 <= rows <= _MOST_POSITIONS and 1 <= columns <= _MOST_POSITIONS):
        return None
    return (int(rows), int(columns)) if rows % 1 == columns % 1 == 0 else None


def _value(group: Any, path: str) -> Any:
    item = group.get(path)
    return item[()] if isinstance(item, h5py.Dataset) and item.size == 1 else None


def _quantity(group: Any, path: str, units: dict[str, float]) -> float | None:
    """A positive number with its unit (an attribute ``units``, or behind the number in a text), times its factor."""
    value = decoded(_value(group, path))
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        value, unit = match[1], spelled(match[2])
    elif value is None:
        return None
    else:
        unit = spelled(group[path].attrs.get("units"))
    number = _number(value)
    return number * units[unit] if number is not None and number > 0 and unit in units else None


def _number(value: Any) -> float | None:
    """A finite number, also as an array of one or as text; None for anything else."""
    try:
        number = float(np.asarray(decoded(value)).reshape(-1)[0])
    except (TypeError, ValueError, IndexError):
        return None
    return number if np.isfinite(number) else None
