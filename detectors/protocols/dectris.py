"""What DECTRIS detectors say in the same words everywhere: Stream V1, Stream V2, the REST interface and their files.

Source: DECTRIS SIMPLON API reference 1.8.0; NeXus NXdetector for the bits of the pixel mask.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from detectors.messages import SeriesStart

#: Pixel types by the name that the detector gives them, all little-endian.
DTYPES = {name: np.dtype(f"<{code}") for name, code in {"uint8": "u1", "uint16": "u2", "uint32": "u4"}.items()}

#: What the stream's format is called over REST, for each protocol.
FORMATS = {"dectris-v1": "legacy", "dectris-v2": "cbor"}

#: Bits of the pixel mask that make a pixel unusable: gap, dead, under-responding, over-responding, noisy.
_UNUSABLE = 0b11111

#: Energies beyond are no electrons in a microscope [eV].
_ENERGIES_EV = (1e3, 5e6)

#: Keys of the detector's configuration that are kept for the record, under a name of ours.
_KEPT = {
    "description": "detector",
    "detector_description": "detector",
    "detector_number": "detector_number",
    "detector_serial_number": "detector_number",
    "eiger_fw_version": "firmware",
    "software_version": "software_version",
    "trigger_mode": "trigger_mode",
    "count_time": "count_time_s",
    "frame_time": "frame_time_s",
    "threshold_energy": "threshold_energy_ev",
    "flatfield_correction_applied": "flatfield_applied",
    "flatfield_enabled": "flatfield_applied",
    "user_data": "user_data",
}

#: What our own simulator knows beyond a detector's words: a JSON object with this one key, whose value is a map of
#: settings and "scan_shape", in the user's own text (V1: header appendix, V2: user_data).
_OURS = "liveptycho"


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a detector configuration (of whatever source, any key missing or None) tells.

    ``energy_kev`` from ``incident_energy`` or ``photon_energy`` [eV], where it can be that of electrons;
    ``frames_per_trigger`` where several triggers bring several frames each; the rest is provenance.
    """
    out: dict[str, Any] = {}
    for key, name in _KEPT.items():
        if config.get(key) is not None:
            out.setdefault(name, config[key])
    for key in ("incident_energy", "photon_energy"):
        energy_ev = config.get(key)
        if _is_number(energy_ev) and _ENERGIES_EV[0] <= energy_ev <= _ENERGIES_EV[1]:
            out["energy_kev"] = float(energy_ev) / 1e3
            break
    images, triggers = config.get("nimages"), config.get("ntrigger")
    if type(images) is int and type(triggers) is int and images > 1 and triggers > 1:
        out["frames_per_trigger"] = images
    return out


def user_data_for(start: SeriesStart) -> dict[str, Any]:
    """The user's text of our own simulator, as a JSON object: what :func:`told_by` reads back."""
    scan_shape = None if start.scan_shape is None else list(start.scan_shape)
    return {_OURS: {**start.settings, "scan_shape": scan_shape}}


def told_by(config: Mapping[str, Any], user_data: Any) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Settings and scan shape (rows, columns; None where unknown) that a configuration and the user's own text tell.

    ``user_data``: any JSON value, or a text that may be JSON; None where there is none. Of our own simulator it is
    unpacked (:func:`user_data_for`), of others it is kept for the record as ``user_data``.
    """
    settings = settings_of(config)
    if user_data is None:
        return settings, None
    known = json_object(user_data) if isinstance(user_data, str) else user_data
    ours = known.get(_OURS) if isinstance(known, dict) and len(known) == 1 else None
    if not isinstance(ours, dict):
        return {**settings, "user_data": known or user_data}, None
    settings.pop("user_data", None)
    settings.update((key, value) for key, value in ours.items() if key != "scan_shape")
    shape = ours.get("scan_shape")
    if isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 1 <= n <= 65536 for n in shape):
        return settings, (shape[0], shape[1])
    return settings, None


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """A JSON object, or None for any other bytes."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text that anybody can print
    except (ValueError, RecursionError):  # not Unicode, not JSON, absurdly long numbers; nested without end
        return None
    return value if isinstance(value, dict) else None


def good_pixels(mask: np.ndarray) -> np.ndarray:
    """A detector's pixel mask, integers (rows, columns) with a bit for each fault, as bool: True = good."""
    return (mask & _UNUSABLE) == 0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
