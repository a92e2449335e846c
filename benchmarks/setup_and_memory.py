"""How long the kernels take to be made, how much memory a reconstruction takes, and whether it grows.

Baselines: the same kernels in double precision, one qx bin at a time in plain NumPy; the memory that ``MemoryPlan``
promises before anything is taken; the memory after the second of twenty passes.
"""

from __future__ import annotations

import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import h5py
import numpy as np

from benchmarks import data
from benchmarks.processes import MB, apart, held_bytes, peak_bytes
from detectors.messages import Encoding, FrameBlock
from stream.api import reconstruct
from stream.array import choose_device
from stream.engine import Engine, MemoryPlan, Setup

_PASSES = 20


def plain_kernels(what: Setup) -> np.ndarray:
    """The kernel table in double precision, one qx bin after the other."""
    probe, band = what.probe, what.passband
    k = [component[None, :] for component in what.geometry.bf_k(probe.wavelength)]
    q = [component[:, None] for component in probe.axes.to_detector(*band.frequencies(what.scan_step))]

    def aperture(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        angle = probe.wavelength * np.hypot(row, column)
        edge = (angle - probe.semiangle) / probe.rolloff
        amplitude = np.where(edge > 0, np.where(edge < 1, np.cos(np.pi / 2 * edge), 0), 1.0)
        chi = np.pi / probe.wavelength * angle**2 * -150.0
        return amplitude * np.exp(-1j * chi) if probe.aberrations.coefficients else amplitude

    out = np.empty((band.entries, k[0].shape[1]), complex if probe.aberrations.coefficients else float)
    centre = aperture(*k)
    for first, stop in zip(band.columns[:-1], band.columns[1:], strict=True):
        row, column = q[0][first:stop], q[1][first:stop]
        gamma = centre.conj() * aperture(k[0] - row, k[1] - column)
        gamma = gamma - centre * aperture(k[0] + row, k[1] + column).conj()
        size = np.abs(gamma)
        out[first:stop] = np.where(size > 1e-3, gamma.conj() / np.maximum(size, 1e-3), 0)
    return out


def _kernel_rows(quick: bool) -> list[tuple]:
    rows = []
    for side in (64, 128) if quick else (64, 256):
        for aberrated in (False, True):
            what = data.setup((side, side), 1250, aberrated=aberrated)
            device = choose_device("cpu")
            ours = data.median_seconds(lambda: what.make_kernels(device), 3)  # noqa: B023
            began = perf_counter()
            plain_kernels(what)
            plain = perf_counter() - began
            rows.append((f"{side}x{side}", "complex" if aberrated else "real", what.passband.entries,
                         ours, plain, plain / ours))  # fmt: skip
            print(f"  kernels {side}x{side}: {ours:.2f} s", flush=True)
    return rows


def _offline(pipe: Connection, path: str, scan: tuple[int, int], aberrated: bool) -> None:
    """Peak memory of an offline reconstruction beyond what the program takes by itself, and the plan's bound."""
    settings: dict[str, Any] = {
        "scan_shape": scan, "energy_kev": data.ENERGY_KEV, "semiangle_mrad": data.SEMIANGLE_MRAD,
        "scan_step_angstrom": data.STEP_ANGSTROM, "detector_pixel_mrad": data.SEMIANGLE_MRAD / data.bf_radius(1250),
        "bf_centre_px": (23.5, 23.5), "bf_radius_px": data.bf_radius(1250),
        "aberrations": data.ABERRATIONS if aberrated else {},
    }  # fmt: skip
    before = peak_bytes()
    began = perf_counter()
    result = reconstruct(path, dataset="frames", device="cpu", **settings)
    seconds = perf_counter() - began
    pipe.send((peak_bytes() - before, MemoryPlan.of(result.setup).total, seconds))


def _memory_rows(quick: bool) -> list[tuple]:
    scan = (64, 64) if quick else (256, 256)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.h5"
        with h5py.File(path, "w") as file:
            rng = np.random.default_rng(3)
            frames = file.create_dataset("frames", (*scan, 48, 48), "u1")
            for row in range(scan[0]):
                frames[row] = rng.poisson(2, (scan[1], 48, 48))
        for aberrated in (False, True):
            taken, bound, seconds = apart(_offline, str(path), scan, aberrated)
            rows.append((f"{scan[0]}x{scan[1]}", "complex" if aberrated else "real", taken / MB, bound / MB,
                         taken / bound, scan[0] * scan[1] / seconds))  # fmt: skip
            print(f"  memory: {taken / MB:.0f} of {bound / MB:.0f} MB", flush=True)
    return rows


def _endless(pipe: Connection, averaging: bool) -> None:
    """Memory after each of twenty passes of an endless series."""
    what = data.setup((64, 64), 300, passes=None)
    what = Setup(**{**what.__dict__, "averaging": averaging})
    engine = Engine(what, choose_device("cpu"))
    shape = what.geometry.shape
    size = shape[0] * shape[1]
    rng = np.random.default_rng(4)
    slab = rng.poisson(2, 64 * 64 * size).astype(np.uint8)
    sizes = np.full(1024, size)
    after = []
    for number in range(_PASSES):
        for first in range(0, 64 * 64, 1024):
            indices = number * 64 * 64 + np.arange(first, first + 1024)
            engine.add(FrameBlock(1, Encoding.RAW, indices, (first + np.arange(1024)) * size, sizes, slab))
            while engine.accumulate():
                pass
        engine.images(["phase"])
        after.append(held_bytes())
    engine.close()
    pipe.send(after)


def run(quick: bool) -> str:
    """The section of the report."""
    kernels = data.table(("scan", "kernels", "entries", "ours, s", "plain NumPy, s", "plain/ours"), _kernel_rows(quick))
    memory = data.table(("scan", "kernels", "taken, MB", "planned, MB", "taken/planned", "frames/s from file"),
                        _memory_rows(quick))  # fmt: skip
    rows = []
    for averaging in (False, True):
        after = apart(_endless, averaging)
        name = "averaging" if averaging else "newest wins"
        rows.append((name, after[1] / MB, after[-1] / MB, after[-1] / after[1]))
        print(f"  {_PASSES} passes: {after[1] / MB:.1f} -> {after[-1] / MB:.1f} MB", flush=True)
    flat = data.table(("endless 64x64 scan", "after pass 2, MB", f"after pass {_PASSES}, MB", "ratio"), rows)
    return (
        f"## Kernel set-up, about 1,250 BF pixels\n\n{kernels}\n\n"
        f"## Peak memory of an offline reconstruction, beyond the bare program\n\n{memory}\n\n"
        f"## Memory over passes\n\n{flat}"
    )


if __name__ == "__main__":
    print(run(quick=False))
