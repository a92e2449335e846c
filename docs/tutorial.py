"""The script of docs/tutorial.md: single-sideband ptychography step by step, then the same data live.

    python docs/tutorial.py                          simulate SrTiO3, write the pictures to docs/images
    python docs/tutorial.py --data scan.h5           the same with a 4D-STEM file that knows its calibration
    python docs/tutorial.py --output pictures        write the pictures somewhere else

The physics comes first, the drawing last. Needs matplotlib: pip install 'liveptycho[tutorial]'.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
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

#: One unit cell of SrTiO3 [001], so that the scan tiles; the detector is turned by -15 degrees against the scan.
SIMULATION = SimulatedScan(
    scan_shape=(48, 48),
    scan_step_angstrom=(3.905 / 48, 3.905 / 48),
    energy_kev=200.0,
    semiangle_mrad=20.0,
    rotation_deg=-15.0,
    detector_shape=(96, 96),
    detector_pixel_mrad=(1.06, 1.06),
    electrons_per_frame=8000.0,
)


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
        have = {"rolloff_mrad": 2.0, "rotation_deg": 0.0, "transpose": False, "aberrations": {}, **start.settings}
        blocks = [maker.block(number)[1] for number in range(maker.block_count)]
        frames = np.concatenate(blocks).reshape(*start.scan_shape, *start.detector_shape)
        probe = stream.Probe(
            energy_ev=1e3 * have["energy_kev"],
            semiangle=1e-3 * have["semiangle_mrad"],
            rolloff=1e-3 * have["rolloff_mrad"],
            aberrations=stream.Aberrations.from_user(have["aberrations"]),
            axes=stream.AxesRelation(math.radians(have["rotation_deg"]), have["transpose"]),
        )
        geometry = stream.DetectorGeometry(
            shape=start.detector_shape,
            pixel_mrad=have["detector_pixel_mrad"],
            bf_centre_px=disk_of(frames.mean(axis=(0, 1)))[0],
            semiangle_mrad=have["semiangle_mrad"],
            good=np.ones(start.detector_shape, bool),
        )
        return cls(frames, tuple(have["scan_step_angstrom"]), probe, geometry)

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


def disk_of(pattern: np.ndarray) -> tuple[tuple[float, float], float]:
    """Centre (row, column) and radius of the bright-field disk [pixels]."""
    disk = pattern > pattern.max() / 2
    row, column = (index.mean() for index in np.nonzero(disk))
    return (row, column), math.sqrt(disk.sum() / math.pi)


# 3, 4: the two kernels T(k;q)

Kernel = Callable[[stream.Probe, Any, Any], np.ndarray]


def one_sideband(probe: stream.Probe, k: Any, q: Any) -> np.ndarray:
    return 2.0 * stream.overlap_masks(probe, k, q).double


def both_sidebands(probe: stream.Probe, k: Any, q: Any) -> np.ndarray:
    gamma = stream.overlap_function(probe, k, q)
    size = np.abs(gamma)
    return np.where(size > 1e-3, gamma.conj() / np.maximum(size, 1e-3), 0)


def reconstruct(scan: Scan, kernel: Kernel) -> np.ndarray:
    """The complex object, by the book: one sum over the disk for each scan frequency."""
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


def strongest(scan: Scan, low: float, high: float) -> tuple[int, int]:
    """The bin that modulates the disk most, among those with low <= abs(q) lambda / alpha < high."""
    k, bright_field = scan.geometry.bf_k(scan.probe.wavelength), scan.geometry.bf_pixels
    best, most = (0, 0), 0.0
    for row, column in np.ndindex(*(n // 2 for n in scan.shape)):
        q = scan.q(row, column)
        if low <= 2 * np.hypot(*q) / scan.probe.cutoff < high:
            pattern = spectrum_at(scan.frames.reshape(*scan.shape, -1)[:, :, bright_field], row, column)
            masks = stream.overlap_masks(scan.probe, k, q)
            power = (np.abs(pattern[masks.double]) ** 2).mean()
            best, most = ((row, column), power) if power > most else (best, most)
    return best


# 6: the same, live


async def live(maker: FrameMaker, scan: Scan, recording: Path) -> tuple[stream.Result, list[stream.Snapshot]]:
    """Send the frames over ZeroMQ into a session; its result, and the images at 10, 25, 50 and 100 % of the rows."""
    endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    sender = asyncio.create_task(
        serve(EncodedSource(maker), "tcp://127.0.0.1:*", rate=1500.0, ready=endpoint.set_result)
    )
    targets, taken = [math.ceil(share * scan.shape[0]) for share in (0.10, 0.25, 0.50, 1.00)], []
    address = await endpoint
    async with stream.open_session(address, bf_centre_px=scan.geometry.bf_centre_px, record=recording) as session:
        async for snapshot in session:
            while targets and snapshot.rows_acquired >= targets[0]:
                taken.append(snapshot)
                targets.pop(0)
    await sender
    return session.result, taken


def main(output: Path, data: Path | None = None) -> None:
    output.mkdir(parents=True, exist_ok=True)
    maker = SIMULATION if data is None else FileFrames(stream.open_dataset(data))
    scan = Scan.read(maker)

    # 1. Patterns
    mean_pattern = scan.frames.mean(axis=(0, 1))
    centre, radius = disk_of(mean_pattern)
    expected = scan.geometry.bf_radius_px
    print(f"bright-field disk: centre ({centre[0]:.2f}, {centre[1]:.2f}), radius {radius:.2f} px; {expected:.2f} expected")
    draw_patterns(scan, scan.frames[0, 0], mean_pattern, output)

    # 2. Spectra
    low, high = strongest(scan, 0.5, 0.8), strongest(scan, 0.9, 1.1)
    pictures = {where: spectrum_at(scan.frames, *where) for where in (low, high)}
    draw_trotters(scan, pictures, output)

    # 3. Overlaps
    masks = stream.overlap_masks(scan.probe, scan.k, scan.q(*low))
    draw_overlaps(scan, (low, high), output)
    other = masks.aperture & masks.plus & ~masks.minus
    between = np.angle(pictures[low][masks.double].sum() / pictures[low][other].sum())
    print(f"phase between the trotters of q bin {low}: {abs(between):.3f} rad")

    # 4. Two ways to sum
    single = np.angle(reconstruct(scan, one_sideband))
    draw_single(scan, single, output)
    obj = reconstruct(scan, both_sidebands)
    gamma = stream.overlap_function(scan.probe, scan.k, scan.q(*low))
    compensated = pictures[low] * both_sidebands(scan.probe, scan.k, scan.q(*low))
    draw_compensation(scan, low, pictures[low], gamma, compensated, output)
    draw_phases(scan, single, np.angle(obj), output)

    # 5. Out of focus
    if data is None:
        defocused = Scan.read(replace(SIMULATION, aberrations={"C10": -100.0}))
        draw_defocus(defocused, low, output)

    # 6. Live
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording.h5"
        result, snapshots = asyncio.run(live(maker, scan, recording))
        offline = stream.reconstruct(recording, bf_centre_px=scan.geometry.bf_centre_px)
    draw_stream(scan, snapshots, output)

    if (truth := expected_phase(maker, data)) is not None:
        for name, phase in (("one sideband", single), ("both sidebands", np.angle(obj)), ("streamed", result.phase)):
            print(f"correlation with the expected phase, {name}: {np.corrcoef(phase.ravel(), truth.ravel())[0, 1]:.4f}")
    print(f"streamed against offline: {relative(result.object, offline.object):.1e} relative difference")
    print(f"streamed against the textbook: {relative(result.object, obj):.1e} relative difference")


def relative(one: np.ndarray, other: np.ndarray) -> float:
    """How far two objects are apart, against how far the other one is from plain vacuum."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - 1))


def expected_phase(maker: FrameMaker, data: Path | None) -> np.ndarray | None:
    if isinstance(maker, SimulatedScan):
        return maker.expected_ssb_phase
    with h5py.File(data) as file:
        return file["expected_ssb_phase"][()] if "expected_ssb_phase" in file else None


# The pictures


def complex_colours(values: np.ndarray, brightest: float | None = None) -> np.ndarray:
    """RGB of a complex picture: hue is the phase, brightness the amplitude, evenly to the eye (Oklab)."""
    size = np.clip(np.abs(values) / (brightest or np.percentile(np.abs(values), 99.5)), 0, 1)
    light, a, b = 0.75 * size, 0.126 * size * np.cos(np.angle(values)), 0.126 * size * np.sin(np.angle(values))
    cones = np.stack([light + 0.3963377774 * a + 0.2158037573 * b, light - 0.1055613458 * a - 0.0638541728 * b,
                      light - 0.0894841775 * a - 1.2914855480 * b]) ** 3  # fmt: skip
    matrix = [[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
              [-0.0041960863, -0.7034186147, 1.7076147010]]  # fmt: skip
    linear = np.clip(np.einsum("ij,j...->...i", matrix, cones), 0, 1)
    return np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def colour_wheel(axes: Any) -> None:
    """A legend for complex pictures, in the lower left corner of ``axes``."""
    wheel = axes.inset_axes((0.02, 0.02, 0.2, 0.2))
    line = np.linspace(-1, 1, 101)
    z = line[None, :] - 1j * line[:, None]
    colours = complex_colours(z, 1.0)
    wheel.imshow(np.dstack([colours, (np.abs(z) <= 1).astype(float)]), extent=(-1, 1, -1, 1))
    for text, x, y in (("0", 1.25, 0), ("π/2", 0, 1.32), ("π", -1.3, 0), ("−π/2", 0, -1.35)):
        wheel.text(x, y, text, color="white", fontsize=7, ha="center", va="center")
    wheel.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
    wheel.axis("off")


def show_detector(axes: Any, scan: Scan, picture: np.ndarray, limit: float, **how: Any) -> Any:
    """A picture on the detector, with angles in mrad on its axes, cut at ``limit``."""
    row, column = (1e3 * angle for angle in scan.geometry.angles)
    half = [pixel / 2 for pixel in scan.geometry.pixel_mrad]
    extent = (column.min() - half[1], column.max() + half[1], row.max() + half[0], row.min() - half[0])
    shown = axes.imshow(picture, extent=extent, interpolation="nearest", **how)
    axes.set(xlim=(-limit, limit), ylim=(limit, -limit), xlabel="column angle (mrad)", ylabel="row angle (mrad)")
    axes.locator_params(nbins=5)
    return shown


def draw_disks(axes: Any, scan: Scan, where: tuple[int, int], colour: str = "white") -> None:
    """The outlines of A(k), A(k-q) and A(k+q)."""
    q = np.array(scan.q(*where)) * scan.probe.wavelength * 1e3
    for sign, style in ((0, "-"), (1, "--"), (-1, ":")):
        axes.add_patch(plt.Circle(sign * q[::-1], scan.geometry.semiangle_mrad, fill=False, ec=colour, ls=style, lw=1.2))


def title_of(scan: Scan, where: tuple[int, int]) -> str:
    ratio = 2 * np.hypot(*scan.q(*where)) / scan.probe.cutoff
    return f"q bin {where}: |q| = {np.hypot(*scan.q(*where)):.2f} Å⁻¹, λ|q| = {ratio:.2f} α"


def show_phase(axes: Any, scan: Scan, phase: np.ndarray, tiles: int = 1, **how: Any) -> Any:
    """A phase image with its axes in Å, tiled."""
    rows, columns = (tiles * n * step for n, step in zip(scan.shape, scan.step, strict=True))
    palette = mpl.colormaps["magma"].with_extremes(bad="0.85")
    shown = axes.imshow(np.tile(phase, (tiles, tiles)), extent=(0, columns, rows, 0), cmap=palette, **how)
    axes.set(xlabel="column (Å)", ylabel="row (Å)")
    return shown


def figure(columns: int, height: float, **how: Any) -> tuple[Any, Any]:
    return plt.subplots(1, columns, figsize=(9.6, height), layout="constrained", **how)


def save(drawn: Any, output: Path, name: str) -> None:
    drawn.savefig(output / f"tutorial_{name}.png", dpi=130, metadata={"Software": None})
    plt.close(drawn)


def draw_patterns(scan: Scan, one: np.ndarray, mean: np.ndarray, output: Path) -> None:
    drawn, panels = figure(2, 4.2)
    for axes, picture, title in zip(panels, (one, mean), ("one frame", "mean of the scan"), strict=True):
        shown = show_detector(axes, scan, picture, 45, cmap="magma")
        axes.add_patch(plt.Circle((0, 0), scan.geometry.semiangle_mrad, fill=False, ec="white", lw=1))
        axes.set_title(title)
        drawn.colorbar(shown, ax=axes, label="counts per frame", shrink=0.85)
    save(drawn, output, "patterns")


def draw_trotters(scan: Scan, pictures: dict[tuple[int, int], np.ndarray], output: Path) -> None:
    drawn, panels = figure(2, 4.9)
    for axes, (where, picture) in zip(panels, pictures.items(), strict=True):
        show_detector(axes, scan, complex_colours(picture), 28)
        draw_disks(axes, scan, where)
        colour_wheel(axes)
        axes.set_title(title_of(scan, where), fontsize=10)
    save(drawn, output, "trotters")


def draw_overlaps(scan: Scan, wheres: tuple[tuple[int, int], ...], output: Path) -> None:
    drawn, panels = plt.subplots(2, 4, figsize=(9.6, 5.3), layout="constrained", sharex=True, sharey=True)
    colours = np.array([[0.13, 0.13, 0.16], [0.45, 0.47, 0.52], [0.20, 0.55, 0.90], [0.95, 0.55, 0.15], [0.95, 0.92, 0.85]])
    for line, where in zip(panels, wheres, strict=True):
        masks = stream.overlap_masks(scan.probe, scan.k, scan.q(*where))
        other = masks.aperture & masks.plus & ~masks.minus
        regions = np.select([masks.triple, masks.double, other, masks.aperture], [4, 2, 3, 1], 0)
        for axes, picture, title in zip(
            line[:3], (masks.aperture, masks.minus, masks.plus), ("A(k)", "A(k−q)", "A(k+q)"), strict=True
        ):
            show_detector(axes, scan, colours[picture.astype(int)], 42)
            axes.set_title(title, fontsize=10)
        show_detector(line[3], scan, colours[regions], 42)
        draw_disks(line[3], scan, where)
        line[3].set_title(f"λ|q| = {2 * np.hypot(*scan.q(*where)) / scan.probe.cutoff:.2f} α", fontsize=10)
    for axes in panels.flat:
        axes.label_outer()
    names = ("aperture only", "double overlap with +q", "double overlap with −q", "triple overlap")
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for colour, name in zip(colours[1:], names, strict=True)]
    drawn.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(drawn, output, "overlaps")


def draw_single(scan: Scan, phase: np.ndarray, output: Path) -> None:
    drawn, axes = plt.subplots(figsize=(4.4, 3.6), layout="constrained")
    drawn.colorbar(show_phase(axes, scan, phase), ax=axes, label="phase (rad)")
    save(drawn, output, "one_sideband")


def draw_compensation(
    scan: Scan, where: tuple[int, int], spectrum: np.ndarray, gamma: np.ndarray, product: np.ndarray, output: Path
) -> None:
    drawn, panels = figure(3, 3.7, sharey=True)
    titles = ("G(k,q)", "Γ(k,q)", "G(k,q) Γ*(k,q) / |Γ(k,q)|")
    brightest = np.percentile(np.abs(spectrum), 99.5)
    for axes, picture, title, top in zip(panels, (spectrum, gamma, product), titles, (brightest, 1, brightest), strict=True):
        show_detector(axes, scan, complex_colours(picture, top), 26)
        axes.set_title(title)
        axes.label_outer()
    colour_wheel(panels[0])
    save(drawn, output, "compensation")


def draw_phases(scan: Scan, single: np.ndarray, both: np.ndarray, output: Path) -> None:
    drawn, panels = figure(2, 4.3, sharey=True)
    low, high = min(single.min(), both.min()), max(single.max(), both.max())
    for axes, phase, title in zip(panels, (single, both), ("one sideband", "both sidebands"), strict=True):
        shown = show_phase(axes, scan, phase, tiles=2, vmin=low, vmax=high)
        axes.set_title(title)
        axes.label_outer()
    drawn.colorbar(shown, ax=panels, label="phase (rad)", shrink=0.9)
    save(drawn, output, "phases")


def draw_defocus(scan: Scan, where: tuple[int, int], output: Path) -> None:
    spectrum = spectrum_at(scan.frames, *where)
    product = spectrum * both_sidebands(scan.probe, scan.k, scan.q(*where))
    single, both = (np.angle(reconstruct(scan, kernel)) for kernel in (one_sideband, both_sidebands))
    drawn, panels = plt.subplots(2, 2, figsize=(8.2, 7.4), layout="constrained")
    for axes, picture, title in zip(panels[0], (spectrum, product), ("G(k,q)", "G Γ*/|Γ|"), strict=True):
        show_detector(axes, scan, complex_colours(picture), 26)
        axes.set_title(title)
    colour_wheel(panels[0, 0])
    for axes, phase, title in zip(panels[1], (single, both), ("one sideband", "both, compensated"), strict=True):
        shown = show_phase(axes, scan, phase, tiles=2, vmin=both.min(), vmax=both.max())
        axes.set_title(title)
        drawn.colorbar(shown, ax=axes, label="phase (rad)", shrink=0.85)
    save(drawn, output, "defocus")


def draw_stream(scan: Scan, snapshots: list[stream.Snapshot], output: Path) -> None:
    drawn, panels = figure(len(snapshots), 2.9, sharey=True)
    last = snapshots[-1].images["phase"]
    for axes, snapshot in zip(panels, snapshots, strict=True):
        shown = show_phase(axes, scan, snapshot.images["phase"], vmin=last.min(), vmax=last.max())
        share = snapshot.rows_acquired / scan.shape[0]
        axes.set_title(f"{snapshot.rows_acquired} of {scan.shape[0]} rows, {share:.0%}", fontsize=10)
        axes.label_outer()
    drawn.colorbar(shown, ax=panels, label="phase (rad)", shrink=0.9)
    save(drawn, output, "stream")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images", help="folder for the pictures")
    parser.add_argument("--data", type=Path, help="a 4D-STEM file to use instead of the simulation")
    arguments = parser.parse_args()
    main(arguments.output, arguments.data)
