"""py4DSTEM's class SSB on an array in memory. Runs in the environment ``.peers/py4dstem``."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import py4DSTEM
from measuring import Job, answer, arguments
from py4DSTEM.process.phase.direct_ptychography import SSB


def prepared(data: np.ndarray, optics: dict[str, Any]) -> SSB:
    """The class after its preprocessing: rotation given, everything else as by default, no plots."""
    cube = py4DSTEM.DataCube(data=data)
    cube.calibration.set_R_pixel_size(optics["scan_step_angstrom"][0])
    cube.calibration.set_R_pixel_units("A")
    cube.calibration.set_Q_pixel_size(optics["detector_pixel_mrad"][0])
    cube.calibration.set_Q_pixel_units("mrad")
    ssb = SSB(
        energy=optics["energy_kev"] * 1e3,
        datacube=cube,
        semiangle_cutoff=optics["semiangle_mrad"],
        rolloff=optics["rolloff_mrad"],
        verbose=False,
        device="cpu",
    )
    return ssb.preprocess(
        plot_center_of_mass=False,
        plot_rotation=False,
        plot_overlap_trotters=False,
        force_com_rotation=optics["rotation_deg"],
        force_com_transpose=False,
    )


def main() -> None:
    asked = arguments()
    warnings.simplefilter("ignore")
    data = np.load(asked["data"], mmap_mode="r")
    prepared(np.ascontiguousarray(data[:16, :16]), asked["optics"]).reconstruct(progress_bar=False)
    with Job() as setup:
        ssb = prepared(data, asked["optics"])
    with Job() as run:
        ssb.reconstruct(progress_bar=False)
    np.save(asked["out"], ssb.object)
    peak = max(setup.peak_bytes, run.peak_bytes)
    answer(
        versions={"py4DSTEM": version("py4DSTEM"), "numpy": version("numpy")},
        setup_s=setup.seconds,
        run_s=run.seconds,
        whole_s=setup.seconds + run.seconds,
        cpu_s=setup.cpu_s + run.cpu_s,
        peak_bytes=peak,
        beyond_bytes=peak - data.nbytes,
    )


if __name__ == "__main__":
    main()
