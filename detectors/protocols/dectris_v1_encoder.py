"""The sending half of DECTRIS Stream V1 (see ``detectors.protocols.dectris_v1``): one multipart message for the header,
one for each image, one for the end, as a detector sends them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from itertools import count, repeat
from typing import Any

import numpy as np

from detectors.errors import ConfigurationError
from detectors.messages import Encoding, OutgoingMessage, SeriesId, SeriesStart
from detectors.protocols.dectris import DTYPES, user_data_for

#: Bit of the pixel mask: a dead pixel.
_DEAD = 2

#: What a detector also says in its configuration, and nobody here needs: some receivers insist on all of it.
_USUAL_CONFIG: Mapping[str, Any] = {
    **dict.fromkeys(
        [f"{axis}_{what}" for axis in ("chi", "kappa", "omega", "phi", "two_theta") for what in ("start", "increment")],
        0.0,
    ),
    **dict.fromkeys(
        ["beam_center_x", "beam_center_y", "detector_distance", "detector_readout_time", "wavelength"], 0.0
    ),
    **dict.fromkeys(
        ["countrate_correction_applied", "flatfield_correction_applied", "virtual_pixel_correction_applied"], False
    ),
    **dict.fromkeys(["element", "roi_mode", "sensor_material", "eiger_fw_version"], ""),
    "auto_summation": True,
    "countrate_correction_count_cutoff": 0,
    "data_collection_date": "1970-01-01T00:00:00.000+00:00",
    "detector_translation": [0.0, 0.0, 0.0],
    "sensor_thickness": 0.00045,
    "software_version": "1.8.0",
    "x_pixel_size": 7.5e-05,
    "y_pixel_size": 7.5e-05,
}


class Encoder:
    """See ``detectors.messages.StreamEncoder``.

    Series of this protocol are integers: a text is sent as its CRC-32. Its receivers take the type's largest value for
    a masked pixel, whatever ``maximum_is_masked`` says. ``hash`` is sent as zeros; nobody can check a real one either.
    """

    def __init__(self) -> None:
        self._start: SeriesStart | None = None

    def start(self, start: SeriesStart) -> list[OutgoingMessage]:
        if start.dtype not in DTYPES.values():
            raise ConfigurationError(f"dectris-v1 sends {', '.join(DTYPES)}, not {start.dtype.name}")
        if len(start.channels) > 1:
            raise ConfigurationError(
                f"dectris-v1 sends one channel, not {len(start.channels)}: choose one, or use dectris-v2"
            )
        self._start = start
        arrays = start.pixel_mask is not None or start.flatfield is not None
        header = {
            "header_detail": "all" if arrays else "basic",
            "htype": "dheader-1.0",
            "series": _number(start.series),
        }
        parts = [_json(header), _json(_config(start))]
        if arrays:
            mask = None if start.pixel_mask is None else np.where(start.pixel_mask, 0, _DEAD).astype("<u4")
            flatfield = None if start.flatfield is None else start.flatfield.astype("<f4")
            for name, array in (("dflatfield", flatfield), ("dpixelmask", mask), ("dcountrate_table", None)):
                shape, kind = ([], "undefined") if array is None else (list(array.shape[::-1]), array.dtype.name)
                parts.append(_json({"htype": f"{name}-1.0", "shape": shape, "type": kind}))
                parts.append(b"" if array is None else array.tobytes())
        return [[*parts, _json(user_data_for(start))]]

    def frames(
        self,
        series: SeriesId,
        first: int,
        payloads: Sequence[bytes | memoryview],
        encoding: Encoding,
        *,
        others: Sequence[tuple[Encoding, Sequence[bytes | memoryview]]] = (),
        exposed_ns: Sequence[int] | None = None,
    ) -> list[OutgoingMessage]:
        start = self._start
        if start is None:
            raise ConfigurationError("dectris-v1 needs the start of a series before its frames")
        if others:
            raise ConfigurationError("dectris-v1 sends one channel; use dectris-v2 for several")
        rows, columns = start.detector_shape
        number, name = _number(series), _encoding_name(encoding, start.dtype)
        image = b'{"frame":%%d,"hash":"%032d","htype":"dimage-1.0","series":%d}' % (0, number)
        layout = b'{"encoding":"%s","htype":"dimage_d-1.0","shape":[%d,%d],"size":%%d,"type":"%s"}' % (
            name.encode(), columns, rows, start.dtype.name.encode()
        )  # fmt: skip
        times = b'{"htype":"dconfig-1.0","real_time":%d,"start_time":%d,"stop_time":%d}'
        seconds = start.settings.get("count_time_s")
        real = round(1e9 * seconds) if isinstance(seconds, int | float) and 1e-9 <= seconds <= 1e9 else 1
        return [
            [
                image % frame,
                layout % memoryview(payload).nbytes,
                payload,
                # Zeros where nobody knows, as simulators send them.
                times % ((0, 0, 0) if exposed is None else (real, exposed, exposed + real)),
            ]
            for frame, payload, exposed in zip(
                count(first), payloads, repeat(None) if exposed_ns is None else exposed_ns
            )
        ]

    def end(self, series: SeriesId) -> list[OutgoingMessage]:
        return [[_json({"htype": "dseries_end-1.0", "series": _number(series)})]]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _number(series: SeriesId) -> int:
    return series if isinstance(series, int) else zlib.crc32(series.encode())


def _encoding_name(encoding: Encoding, dtype: np.dtype) -> str:
    names = {
        Encoding.BSLZ4: f"bs{8 * dtype.itemsize}-lz4<",
        Encoding.LZ4: "lz4<",
        Encoding.RAW: "<",
        Encoding.RAW_BIG_ENDIAN: ">",
    }
    try:
        return names[encoding]
    except KeyError:
        raise ConfigurationError(
            f"dectris-v1 cannot say {encoding.name}; pack the frames as bslz4, lz4 or raw"
        ) from None


def _config(start: SeriesStart) -> dict[str, Any]:
    """The detector's configuration, with keys sorted as a detector does."""
    settings = start.settings
    rows, columns = start.detector_shape
    bits = 8 * start.dtype.itemsize
    config: dict[str, Any] = {
        **_USUAL_CONFIG,
        "bit_depth_image": bits,
        "bit_depth_readout": bits,
        "description": settings.get("detector", "liveptycho simulated detector"),
        "detector_number": settings.get("detector_number", "0"),
        "pixel_mask_applied": start.pixel_mask is not None,
        "trigger_mode": settings.get("trigger_mode", "exts"),
        "x_pixels_in_detector": columns,
        "y_pixels_in_detector": rows,
    }
    for name, keys in {
        "count_time_s": ("count_time", "frame_count_time"),
        "frame_time_s": ("frame_time", "frame_period"),
    }.items():
        config |= dict.fromkeys(keys, settings.get(name, 0.0))
    if isinstance(energy_kev := settings.get("energy_kev"), int | float):
        config["photon_energy"] = 1e3 * energy_kev
    if start.frames is not None:  # an endless series has no numbers
        images = settings.get("frames_per_trigger", 1)
        images = images if isinstance(images, int) and images > 0 and start.frames % images == 0 else 1
        config |= {"nimages": images, "ntrigger": start.frames // images}
    return dict(sorted(config.items()))
