"""DECTRIS files as the detector's file writer makes them, for tests of the reader and of what it hands on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from detectors.messages import FrameBlock

SCAN, DETECTOR = (6, 7), (16, 24)
COUNTS = np.random.default_rng(3).poisson(2.0, (SCAN[0] * SCAN[1], *DETECTOR)).astype("<u2")
BITSHUFFLE_LZ4 = hdf5plugin.Bitshuffle(cname="lz4")


def write_legacy(
    folder: Path,
    counts: np.ndarray = COUNTS,
    per_file: int = 20,
    filters: Any = BITSHUFFLE_LZ4,
    numbers: Sequence[int] | None = None,
    **config: Any,
) -> Path:
    """A master file and its data files. ``numbers``: image_nr_low of each file, from 1; None for none."""
    path = folder / "scan_master.h5"
    with h5py.File(path, "w") as master:
        master["entry/instrument/detector/description"] = np.bytes_("Dectris ARINA")
        master.create_group("entry/data")
        own = {"photon_energy": 200e3, "nimages": np.uint64(1), "ntrigger": np.uint64(len(counts)), **config}
        for key, value in own.items():
            master[f"entry/instrument/detector/detectorSpecific/{key}"] = value
        for number, first in enumerate(range(0, len(counts), per_file), 1):
            name = f"scan_data_{number:06d}.h5"
            frames = counts[first : first + per_file]
            with h5py.File(folder / name, "w") as file:
                data = file.create_dataset("entry/data/data", data=frames, chunks=(1, *counts.shape[1:]), **filters)
                low = first + 1 if numbers is None else numbers[number - 1]
                if low:
                    data.attrs["image_nr_low"], data.attrs["image_nr_high"] = low, low + len(frames) - 1
            master[f"entry/data/data_{number:06d}"] = h5py.ExternalLink(name, "/entry/data/data")
    return path


def payloads(block: FrameBlock) -> list[bytes]:
    return [block.slab[o : o + n].tobytes() for o, n in zip(block.offsets, block.sizes, strict=True)]
