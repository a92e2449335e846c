"""The script of docs/tutorial.md: single-sideband ptychography step by step, then the same data live.

    python docs/tutorial.py                          simulate SrTiO3, write the pictures to docs/images
    python docs/tutorial.py --data scan.h5           the same with a 4D-STEM file of one unit cell
    python docs/tutorial.py --output pictures        write the pictures somewhere else

The physics comes first, the drawing last. Needs matplotlib: pip install 'liveptycho[tutorial]'.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import matplotlib as mpl
import numpy as np

import stream
from detectors.sender import serve
from detectors.simulation import SimulatedScan
from detectors.source import EncodedSource, FrameMaker
from stream.offline import FileFrames
from stream.spectra import spectrum_at

mpl.use("Agg")
import matplotlib.pyplot as plt

SIMULATION = SimulatedScan(
    scan_shape=(48, 48),
    scan_step_angstrom=(3.905 / 48, 3.905 / 48),  # one unit cell of SrTiO3 [001], so that the scan tiles
    energy_kev=200.0,
    semiangle_mrad=20.0,
    rotation_deg=-15.0,
    detector_shape=(96, 96),
    detector_pixel_mrad=(1.06, 1.06),
    electrons_per_frame=8000.0,
)
LOW, HIGH = (2, 0), (2, 2)  # bins of the scan's Fourier transform: the reflections 200 and 220


@dataclass(frozen=True)
class Scan:
    """A complete scan in memory: counts (scan rows, scan columns, detector rows, detector columns), calibrated."""

    frames: np.ndarray
    step: tuple[float, float]
    probe: stream.Probe
    geometry: stream.DetectorGeometry

    @classmethod
    def read(cls, maker: FrameMaker) -> Scan:
        start = maker.start(1)
        blocks = [maker.block(number)[1] for number in range(maker.block_count)]
        frames = np.concatenate(blocks).reshape(*start.scan_shape, *start.detector_shape)
        has = {"rolloff_mrad": 2.0, "rotation_deg": 0.0, "transpose": False, "aberrations": {}, **start.settings}
        energy, alpha, rolloff = 1e3 * has["energy_kev"], has["semiangle_mrad"], 1e-3 * has["rolloff_mrad"]
        axes = stream.AxesRelation(math.radians(has["rotation_deg"]), has["transpose"])
        aberrations = stream.Aberrations.from_user(has["aberrations"])
        probe = stream.Probe(energy, 1e-3 * alpha, rolloff, aberrations, axes)
        mean_pattern = frames.mean(axis=(0, 1))
        rows, columns = np.nonzero(mean_pattern > mean_pattern.max() / 2)
        centre, good = (rows.mean(), columns.mean()), np.ones(start.detector_shape, bool)
        geometry = stream.DetectorGeometry(start.detector_shape, has["detector_pixel_mrad"], centre, alpha, good)
        return cls(frames, tuple(has["scan_step_angstrom"]), probe, geometry)

    @property
    def shape(self) -> tuple[int, int]:
        return self.frames.shape[:2]

    @property
    def k(self) -> tuple[np.ndarray, np.ndarray]:
        """The coordinates of every detector pixel [1/Å]."""
        return tuple(angle / self.probe.wavelength for angle in self.geometry.angles)

    def q(self, row: int, column: int) -> tuple[float, float]:
        """The scan frequency of a bin [1/Å], turned into the frame of the detector."""
        q_row, q_column = (np.fft.fftfreq(n, d) for n, d in zip(self.shape, self.step, strict=True))
        return self.probe.axes.to_detector(q_row[row], q_column[column])


def one_sideband(probe: stream.Probe, k: Any, q: Any) -> np.ndarray:
    return 2.0 * stream.overlap_masks(probe, k, q).double


def both_sidebands(probe: stream.Probe, k: Any, q: Any) -> np.ndarray:
    gamma = stream.overlap_function(probe, k, q)
    size = np.abs(gamma)
    return np.where(size > 1e-3, gamma.conj() / np.maximum(size, 1e-3), 0)


def reconstruct(scan: Scan, kernel: Callable[..., np.ndarray]) -> np.ndarray:
    """The complex object, by the book."""
    bright_field = scan.frames.reshape(*scan.shape, -1)[:, :, scan.geometry.bf_pixels]
    spectra = np.fft.fft2(bright_field, axes=(0, 1))
    k = scan.geometry.bf_k(scan.probe.wavelength)
    psi = np.zeros(scan.shape, complex)
    for row, column in np.ndindex(scan.shape):
        q = scan.q(row, column)
        if 0 < np.hypot(*q) < scan.probe.cutoff:
            psi[row, column] = (kernel(scan.probe, k, q) * spectra[row, column]).sum()
    psi[0, 0] = scan.frames.sum()
    return np.fft.ifft2(psi) / scan.frames.sum(axis=(2, 3)).mean()


class PausingSource(EncodedSource):
    """Frames of a scan that rests after each of the rows ``stops`` until ``go`` is released, for as long as 20 s."""

    def __init__(self, maker: FrameMaker, columns: int, stops: list[int]) -> None:
        super().__init__(maker)
        self.ends, self.go = [columns * row for row in stops], threading.Semaphore(0)

    def blocks(self) -> Iterator[tuple[int, Sequence[Any]]]:
        for first, payloads in super().blocks():
            yield first, payloads
            for _ in [end for end in self.ends if first < end <= first + len(payloads)]:
                self.go.acquire(timeout=20)


async def live(maker: FrameMaker, scan: Scan, recording: Path) -> tuple[stream.Result, list[stream.Snapshot]]:
    """Send the frames over ZeroMQ into a session; its result, and the images at 10, 25, 50 and 100 % of the rows."""
    rows, columns = scan.shape
    stops = [math.ceil(share * rows) for share in (0.10, 0.25, 0.50, 1.00)]
    source = PausingSource(maker, columns, stops)
    endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    sender = asyncio.create_task(serve(source, "tcp://127.0.0.1:*", rate=2000, ready=endpoint.set_result))
    address, taken = await endpoint, []
    async with stream.open_session(address, bf_centre_px=scan.geometry.bf_centre_px, record=recording) as session:
        async for snapshot in session:
            while len(taken) < len(stops) and snapshot.rows_acquired >= stops[len(taken)]:
                taken.append(snapshot)
                source.go.release()
    await sender
    return session.result, taken


def main(output: Path, data: Path | None = None) -> None:
    output.mkdir(parents=True, exist_ok=True)
    draw = partial(plate, output)
    maker = SIMULATION if data is None else FileFrames(stream.open_dataset(data))
    scan = Scan.read(maker)

    mean_pattern = scan.frames.mean(axis=(0, 1))
    one_frame = scan.frames[0, 0]
    draw("patterns", {"one frame": partial(counts, scan, one_frame), "mean": partial(counts, scan, mean_pattern)})

    low, high = (spectrum_at(scan.frames, *where) for where in (LOW, HIGH))
    draw("trotters", {scan_frequency(scan, w): partial(wave, scan, g, w) for w, g in ((LOW, low), (HIGH, high))})

    masks = stream.overlap_masks(scan.probe, scan.k, scan.q(*LOW))
    other = stream.overlap_masks(scan.probe, scan.k, scan.q(-LOW[0], -LOW[1]))
    between = np.angle(low[masks.double].sum() / low[other.double].sum())
    print(f"phase between the trotters of q bin {LOW}: {abs(between):.3f} rad")
    overlaps = {"A(k)": masks.aperture, "A(k−q)": masks.minus, "A(k+q)": masks.plus}
    panels = {title: partial(region, scan, LOW, mask) for title, mask in overlaps.items()}
    draw("overlaps", panels | {scan_frequency(scan, where): partial(region, scan, where) for where in (LOW, HIGH)})

    single = np.angle(reconstruct(scan, one_sideband))
    draw("one_sideband", {"one sideband": partial(image, scan, single, single)})

    gamma = stream.overlap_function(scan.probe, scan.k, scan.q(*LOW))
    compensated = low * both_sidebands(scan.probe, scan.k, scan.q(*LOW))
    waves = {"G(k,q)": low, "Γ(k,q)": gamma, "G(k,q) Γ*(k,q) / |Γ(k,q)|": compensated}
    draw("compensation", {title: partial(wave, scan, values) for title, values in waves.items()})
    both = reconstruct(scan, both_sidebands)
    phases = {"one sideband": single, "both sidebands": np.angle(both)}
    draw("phases", {title: partial(image, scan, phase, np.angle(both), 2) for title, phase in phases.items()})

    if data is None:
        defocused = Scan.read(replace(SIMULATION, aberrations={"C10": -100.0}))
        fringes = spectrum_at(defocused.frames, *LOW)
        flat = fringes * both_sidebands(defocused.probe, defocused.k, defocused.q(*LOW))
        panels = {"G(k,q)": partial(wave, defocused, fringes), "G Γ* / |Γ|": partial(wave, defocused, flat)}
        blurred, sharp = (np.angle(reconstruct(defocused, kernel)) for kernel in (one_sideband, both_sidebands))
        panels["one sideband"] = partial(image, defocused, blurred, sharp, 2)
        panels["both sidebands, compensated"] = partial(image, defocused, sharp, sharp, 2)
        draw("defocus", panels, columns=2)

    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording.h5"
        result, snapshots = asyncio.run(live(maker, scan, recording))
        offline = stream.reconstruct(recording, bf_centre_px=scan.geometry.bf_centre_px)
    came = {f"{snapshot.rows_acquired} of {scan.shape[0]} rows": snapshot.images["phase"] for snapshot in snapshots}
    draw("stream", {title: partial(image, scan, phase, result.phase) for title, phase in came.items()})

    if (truth := expected_phase(data)) is not None:
        for name, phase in {**phases, "streamed": result.phase}.items():
            print(f"correlation with the expected phase, {name}: {np.corrcoef(phase.ravel(), truth.ravel())[0, 1]:.4f}")
    print(f"streamed against offline, relative difference: {relative(result.object, offline.object):.1e}")
    print(f"streamed against the book, relative difference: {relative(result.object, both):.1e}")


def relative(one: np.ndarray, other: np.ndarray) -> float:
    """How far two objects are apart, measured by how far the other one is from vacuum."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - 1))


def expected_phase(data: Path | None) -> np.ndarray | None:
    """What a perfect SSB reconstruction gives: known of a simulation, and of a file that says so."""
    if data is None:
        return SIMULATION.expected_ssb_phase
    with h5py.File(data) as file:
        return file["expected_ssb_phase"][()] if "expected_ssb_phase" in file else None


# The pictures. Each panel is a function of its axes; ``plate`` puts panels side by side.

_REGIONS = {  # colours of the overlap picture, darkest first
    "outside": (0.10, 0.10, 0.13), "aperture": (0.45, 0.47, 0.52), "double overlap with A(k−q)": (0.20, 0.55, 0.90),
    "double overlap with A(k+q)": (0.95, 0.55, 0.15), "triple overlap": (0.95, 0.92, 0.85),
}  # fmt: skip


def plate(output: Path, name: str, panels: dict[str, Callable[[Any], None]], columns: int = 5) -> None:
    """One figure, docs/images/tutorial_NAME.png."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = {1: 4.6, 2: 9.0}.get(columns, 10.8)
    size = (width, rows * (0.78 * width / columns + (1.0 if columns > 1 else 0.2)))
    drawn, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for one, (title, panel) in zip(axes.flat, panels.items(), strict=True):
        panel(axes=one)
        one.set_title(title, fontsize=10)
    drawn.savefig(output / f"tutorial_{name}.png", dpi=130, metadata={"Software": None})
    plt.close(drawn)


def scan_frequency(scan: Scan, where: tuple[int, int]) -> str:
    return f"λ|q| = {2 * np.hypot(*scan.q(*where)) / scan.probe.cutoff:.2f} α"


def detector(axes: Any, scan: Scan, picture: np.ndarray, limit: float, **how: Any) -> Any:
    """A picture on the detector, angles in mrad on its axes, cut at ``limit``."""
    row, column = (1e3 * angle for angle in scan.geometry.angles)
    half = [pixel / 2 for pixel in scan.geometry.pixel_mrad]
    extent = (column.min() - half[1], column.max() + half[1], row.max() + half[0], row.min() - half[0])
    shown = axes.imshow(picture, extent=extent, interpolation="nearest", **how)
    axes.set(xlim=(-limit, limit), ylim=(limit, -limit), xlabel="column angle (mrad)", ylabel="row angle (mrad)")
    axes.locator_params(nbins=5)
    return shown


def disks(axes: Any, scan: Scan, where: tuple[int, int] | None) -> None:
    """The outlines of A(k) and, dashed, A(k-q) and, dotted, A(k+q)."""
    q = np.array(scan.q(*where)) * scan.probe.wavelength * 1e3 if where else np.zeros(2)
    for sign, style in ((0, "-"), (1, "--"), (-1, ":"))[: 3 if where else 1]:
        axes.add_patch(plt.Circle(sign * q[::-1], scan.geometry.semiangle_mrad, fill=False, ec="w", ls=style, lw=1.2))


def counts(scan: Scan, pattern: np.ndarray, *, axes: Any) -> None:
    shown = detector(axes, scan, pattern, 30, cmap="magma")
    disks(axes, scan, None)
    axes.figure.colorbar(shown, ax=axes, label="counts per frame", shrink=0.85)


def complex_colours(values: np.ndarray, brightest: float) -> np.ndarray:
    """RGB of a complex picture: hue is the phase, brightness the amplitude, both evenly to the eye (Oklab)."""
    size = np.clip(np.abs(values) / brightest, 0, 1)
    oklab = np.stack([0.75 * size, 0.126 * size * np.cos(np.angle(values)), 0.126 * size * np.sin(np.angle(values))])
    to_lms = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    to_rgb = [[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
              [-0.0041960863, -0.7034186147, 1.7076147010]]  # fmt: skip
    linear = np.clip(np.moveaxis(np.tensordot(to_rgb, np.tensordot(to_lms, oklab, 1) ** 3, 1), 0, -1), 0, 1)
    return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def wave(scan: Scan, values: np.ndarray, where: tuple[int, int] | None = None, *, axes: Any) -> None:
    """A complex picture on the detector, with the wheel that explains its colours."""
    detector(axes, scan, complex_colours(values, np.percentile(np.abs(values), 99.5)), 28)
    disks(axes, scan, where)
    wheel = axes.inset_axes((0.0, 0.0, 0.27, 0.27))
    line = np.linspace(-1, 1, 101)
    z = line[None, :] - 1j * line[:, None]
    wheel.imshow(np.dstack([complex_colours(z, 1.0), abs(z) <= 1]), extent=(-1, 1, -1, 1))
    for text, x, y in (("0", 1.3, 0), ("π/2", 0, 1.35), ("π", -1.35, 0), ("−π/2", 0, -1.4)):
        wheel.text(x, y, text, color="white", fontsize=7, ha="center", va="center")
    wheel.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7))
    wheel.axis("off")


def region(scan: Scan, where: tuple[int, int], flags: np.ndarray | None = None, *, axes: Any) -> None:
    """One mask, or all regions of overlap in colours."""
    masks = stream.overlap_masks(scan.probe, scan.k, scan.q(*where))
    other = masks.aperture & masks.plus & ~masks.minus
    which = np.select([masks.triple, other, masks.double, masks.aperture], [4, 3, 2, 1], 0) if flags is None else flags
    detector(axes, scan, np.array(list(_REGIONS.values()))[which.astype(int)], 42)
    disks(axes, scan, where if flags is None else None)
    if flags is None and not axes.figure.legends:
        patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in _REGIONS.items()]
        axes.figure.legend(handles=patches[1:], loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def image(scan: Scan, phase: np.ndarray, like: np.ndarray, tiles: int = 1, *, axes: Any) -> None:
    """A phase image, tiled, axes in Å, on the colour scale of ``like``; grey where no row has come yet."""
    rows, columns = (tiles * n * step for n, step in zip(scan.shape, scan.step, strict=True))
    palette, span = mpl.colormaps["magma"].with_extremes(bad="0.85"), {"vmin": like.min(), "vmax": like.max()}
    shown = axes.imshow(np.tile(phase, (tiles, tiles)), extent=(0, columns, rows, 0), cmap=palette, **span)
    axes.set(xlabel="column (Å)", ylabel="row (Å)")
    axes.figure.colorbar(shown, ax=axes, label="phase (rad)", shrink=0.85)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images", help="folder for the pictures")
    parser.add_argument("--data", type=Path, help="a 4D-STEM file to use instead of the simulation")
    arguments = parser.parse_args()
    main(arguments.output, arguments.data)
