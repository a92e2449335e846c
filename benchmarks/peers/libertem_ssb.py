"""What the two LiberTEM scripts share: the masks and the UDF."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
from libertem.common.container import MaskContainer
from ptychography40.reconstruction.common import wavelength
from ptychography40.reconstruction.ssb.trotters import generate_masks
from ptychography40.reconstruction.ssb.udf import SSB_UDF

VERSIONS = {name: version(name) for name in ("libertem", "libertem-live", "ptychography40")}


class Masks:
    """The trotters' masks of one scan, made here and once, as the UDF's authors advise for live data."""

    def __init__(self, scan_shape: tuple[int, int], detector_shape: tuple[int, int], optics: dict[str, Any]) -> None:
        self._parameters = {
            "lamb": wavelength(optics["energy_kev"]),
            "dpix": optics["scan_step_angstrom"][0] * 1e-10,
            "semiconv": optics["semiangle_mrad"] * 1e-3,
            "semiconv_pix": optics["bf_radius_px"],
            "dtype": np.float32,
            "cy": optics["bf_centre_px"][0],
            "cx": optics["bf_centre_px"][1],
            "cutoff": 1,
            "method": "subpix",
        }
        masks = generate_masks(reconstruct_shape=scan_shape, mask_shape=detector_shape, **self._parameters)
        self._container = MaskContainer(
            mask_factories=lambda: masks,
            dtype=masks.dtype,
            use_sparse="scipy.sparse.csr",
            count=masks.shape[0],
            backend="numpy",
        )
        assert self._container.computed_masks is not None  # computed here, not in the run

    def udf(self) -> SSB_UDF:
        """A new UDF with these masks."""
        return SSB_UDF(**self._parameters, mask_container=self._container)
