"""EMD files: EMD 1.0 as emdfile and py4DSTEM >= 0.14 write it, and what py4DSTEM <= 0.13 wrote before.

An EMD group carries the attribute ``emd_group_type``. The frames are a 4-D dataset in such a group; calibrations are
small datasets (or attributes) in metadata groups of the group itself or of one above it:

    EMD 1.0           <root>/metadatabundle/calibration, <group>/metadatabundle/...
    py4DSTEM 0.13     <root>/calibration or .../_metadata/...
    py4DSTEM <= 0.12  <top>/metadata/calibration, <top>/metadata/microscope
    any               dimN vectors beside the data, with ``units``: used where no calibration says more

What is deliberately not used, only told as a note:

* ``QR_rotation``. py4DSTEM 0.14.18 contradicts itself: BraggVectors, the strain map and get_Rvector_from_Qvector turn
  diffraction vectors by +QR_rotation into the scan frame (after the flip), which would make it our theta, while
  compare_QR_rotation, the tool to find it by eye, draws the diffraction vector at +QR_rotation from the scan's. Bragg
  vectors do not fix the 180 degrees either, which here turn the sign of the phase. And nothing in py4DSTEM ever writes
  what its DPC or ptychography classes found (force_com_rotation) into it.
* The disk's centre and radius (qx0_mean, qy0_mean, probe_semiangle): py4DSTEM's crop and bin leave them unchanged.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stream.files.hdf5 import number, pair
from stream.files.units import ANGLES, LENGTHS, UNCALIBRATED, decoded, detector_pixel, spelled

_BUNDLES = ("metadatabundle", "_metadata", "metadata")

#: Names that py4DSTEM <= 0.8 gave to what is called otherwise since.
_OLD_NAMES = {
    "R_pix_size": "R_pixel_size",
    "R_units": "R_pixel_units",
    "K_pix_size": "Q_pixel_size",
    "K_units": "Q_pixel_units",
}
_ENERGY_NAME = re.compile(
    r"(?:(?:accelerating|acceleration|beam)_?(?:voltage|energy)|voltage|high_tension|energy(?=_k?ev$))(?:_(k?e?v))?",
    re.IGNORECASE,
)
#: Without a unit in its name an energy is in eV from here on, else in keV: no electron microscope scans below 5 kV or
#: above 5 MV.
_LEAST_EV = 5e3


def layout_of(dataset: Any) -> str | None:
    """The name of the EMD layout that ``dataset`` (h5py) belongs to, or None: its group carries an emd_group_type."""
    group = dataset.parent
    if "emd_group_type" not in group.attrs:
        return None
    file = dataset.file
    top = file[dataset.name.split("/")[1]]
    writer = decoded(group.attrs.get("python_class", group.attrs.get("py4dstem_class", "")))
    if "version_major" in file.attrs:
        return f"EMD {_version(file)} (py4DSTEM)" if writer == "DataCube" else f"EMD {_version(file)}"
    if "version_major" in top.attrs:
        return f"EMD (py4DSTEM {_version(top)})"
    return "EMD"


def calibration(path: Path, dataset: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(settings, notes) of an EMD data cube.

    Settings are ``energy_kev``, ``semiangle_mrad``, ``scan_step_angstrom`` and ``detector_pixel_mrad`` (or
    ``detector_pixel_inv_angstrom`` when no energy is known), as far as the file knows them. Raises ``DataFileError``
    naming a calibration that is not a positive finite number.
    """
    found = _metadata(dataset)
    settings: dict[str, Any] = {}
    notes: list[str] = []
    if (energy := _energy(path, found, notes)) is not None:
        settings["energy_kev"] = energy
    if (angle := found.get("convergence_semiangle_mrad")) is not None:
        settings["semiangle_mrad"] = number(angle, "convergence_semiangle_mrad", path, positive=True)
    for space, first_axis in (("R", 0), ("Q", 2)):
        size, unit = found.get(f"{space}_pixel_size"), spelled(found.get(f"{space}_pixel_units"))
        if size is None or unit in UNCALIBRATED:
            size, unit = _steps(dataset, first_axis)
        if size is None or unit in UNCALIBRATED:
            continue
        if unit not in (LENGTHS if space == "R" else ANGLES):
            notes.append(f"the {space} pixel size {size} has the unknown unit {unit!r} and is not used")
            continue
        steps = pair(size, f"{space}_pixel_size", path, positive=True)
        if space == "R":
            settings["scan_step_angstrom"] = [step * LENGTHS[unit] for step in steps]
        else:
            kind, factor = ANGLES[unit]
            settings |= detector_pixel([step * factor for step in steps], kind, energy)
    notes.extend(_unused(path, found))
    return settings, tuple(notes)


def _unused(path: Path, found: dict[str, Any]) -> list[str]:
    notes = []
    # py4DSTEM applies QR_rotation [rad]; the copy in degrees is all there is in 0.13, and before it a unit is stored.
    rotation = found.get("QR_rotation_degrees")
    if (turn := found.get("QR_rotation")) is not None:
        in_degrees = str(found.get("QR_rotation_units", "rad")).startswith("deg")
        rotation = number(turn, "QR_rotation", path) * (1.0 if in_degrees else math.degrees(1.0))
    flip = bool(found.get("QR_flip") or False)
    if rotation is not None or flip:
        degrees = number(rotation if rotation is not None else 0.0, "QR_rotation_degrees", path)
        notes.append(
            f"QR_rotation {degrees:.4g} degrees, QR_flip {flip} is not used, since py4DSTEM's functions disagree about "
            "its sign and leave 180 degrees open; if it is what DPC or ptychography found (force_com_rotation), set "
            f"rotation_deg = {degrees:.4g} and transpose = {str(flip).lower()}"
        )
    disk = [found.get(name) for name in ("qx0_mean", "qy0_mean", "probe_semiangle")]
    if any(value is not None for value in disk):
        row, column, radius = ("?" if value is None else f"{number(value, 'disk', path):.4g}" for value in disk)
        notes.append(
            f"py4DSTEM's disk centre ({row}, {column}) px and radius {radius} px are not used, since cropping and "
            "binning leave them unchanged"
        )
    return notes


def _energy(path: Path, found: dict[str, Any], notes: list[str]) -> float | None:
    for name, value in found.items():
        if not (match := _ENERGY_NAME.fullmatch(name)) or np.all(np.equal(value, 0)):
            continue  # 0 stands where nothing was entered
        given = number(value, name, path, positive=True)
        unit = (match[1] or "").lower()
        in_ev = not unit.startswith("k") if unit else given >= _LEAST_EV
        energy = given / 1e3 if in_ev else given
        notes.append(f"the energy, {energy:g} keV, comes from the metadata entry {name!r} = {given:g}")
        return energy
    return None


def _metadata(dataset: Any) -> dict[str, Any]:
    """Every small entry of the metadata groups around ``dataset``; calibration groups win, then the nearest one."""
    groups: list[Any] = []
    group = dataset.parent
    while True:
        for name, item in _groups(group):
            if name in _BUNDLES:
                groups.append(item)
                item.visititems(lambda _, child: groups.append(child) if isinstance(child, h5py.Group) else None)
            elif decoded(item.attrs.get("py4dstem_class", "")) == "Calibration":
                groups.append(item)
        if group.name == "/":
            break
        group = group.parent
    found: dict[str, Any] = {}
    for item in sorted(groups, key=lambda g: not g.name.lower().endswith("calibration")):
        for name, value in _entries(item):
            found.setdefault(_OLD_NAMES.get(name, name), value)
    return found


def _groups(group: Any) -> list[tuple[str, Any]]:
    return [(name, item) for name in group if isinstance(item := group.get(name), h5py.Group)]


def _entries(group: Any) -> list[tuple[str, Any]]:
    """(name, value) of the numbers and texts in one metadata group; what is absent, None or long is left out."""
    raw = list(group.attrs.items())
    raw += [
        (name, item[()])
        for name in group
        if isinstance(item := group.get(name), h5py.Dataset)
        and item.shape is not None
        and item.size <= 2
        and decoded(item.attrs.get("type", "")) != "None"
    ]
    entries = []
    for name, value in raw:
        value = decoded(value)
        if isinstance(value, str):
            # py4DSTEM writes None as "_None", and up to 0.8 a text where nothing had been entered.
            if value != "_None" and name.endswith("units"):
                entries.append((name, value))
        elif not isinstance(value, h5py.Empty):
            entries.append((name, value))
    return entries


def _steps(dataset: Any, first_axis: int) -> tuple[list[float] | None, str]:
    """Step [row, column] and unit of two axes from their dim vectors, which count from 0 (or from 1 in older files)."""
    origin = 0 if "dim0" in dataset.parent else 1
    steps, units = [], set()
    for axis in (first_axis, first_axis + 1):
        dim = dataset.parent.get(f"dim{axis + origin}")
        if dataset.ndim != 4 or not isinstance(dim, h5py.Dataset) or dim.ndim != 1 or dim.size < 2:
            return None, ""
        if dim.dtype.kind not in "uif":
            return None, ""
        start, after = dim[:2]
        steps.append(abs(float(after) - float(start)))
        units.add(spelled(dim.attrs.get("units")))
    return (steps, units.pop()) if len(units) == 1 else (None, "")


def _version(item: Any) -> str:
    return ".".join(str(decoded(item.attrs.get(f"version_{part}", 0))) for part in ("major", "minor"))
