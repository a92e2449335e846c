"""The script of docs/tutorial.md: single-sideband ptychography step by step, then the same data live.

    python docs/tutorial.py                      simulate SrTiO3, write the pictures to docs/images
    python docs/tutorial.py --data scan.h5       the same with a 4D-STEM file of one unit cell

The physics comes first, the drawing last. Needs matplotlib: pip install 'liveptycho[tutorial]'.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

import stream
from detectors.codec import encode
from detectors.messages import Encoding, SeriesId, SeriesStart
from detectors.simulator.sender import serve
from detectors.simulator.simulation import SimulatedScan
from detectors.simulator.source import FrameMaker
from stream.offline import FileFrames
from stream.spectra import spectrum_at

mpl.use("Agg")
import matplotlib.pyplot as plt

# One unit cell of SrTiO3 [001], so that the scan tiles.
SIMULATION = SimulatedScan(
    scan_shape=(48, 48), scan_step_angstrom=(3.905 / 48, 3.905 / 48), rotation_deg=-15.0,
    energy_kev=200.0, semiangle_mrad=20.0, electrons_per_frame=8000.0,
    detector_shape=(96, 96), detector_pixel_mrad=(1.06, 1.06),
)  # fmt: skip
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
        energy, alpha, rolloff = 1e3 * has["energy_kev"], 1e-3 * has["semiangle_mrad"], 1e-3 * has["rolloff_mrad"]
        axes = stream.AxesRelation(math.radians(has["rotation_deg"]), has["transpose"])
        aberrations = stream.Aberrations.from_user(has["aberrations"])
        probe = stream.Probe(energy, alpha, rolloff, aberrations, axes)
        mean_pattern = frames.mean(axis=(0, 1))
        rows, columns = np.nonzero(mean_pattern > mean_pattern.max() / 2)
        centre, good = (rows.mean(), columns.mean()), np.ones(start.detector_shape, bool)
        geometry = stream.DetectorGeometry(start.detector_shape, has["detector_pixel_mrad"], centre, 1e3 * alpha, good)
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


class PausingSource:
    """A scan, row by row, for ``serve``; after each of ``stops`` rows the beam rests until ``go`` is released."""

    encoding = Encoding.BSLZ4

    def __init__(self, start: SeriesStart, scan: Scan, stops: list[int]) -> None:
        self.announced, self.scan, self.stops, self.go = start, scan, stops, threading.Semaphore(0)
        self.frames_per_pass = math.prod(scan.shape)

    def start(self, series: SeriesId) -> SeriesStart:
        return replace(self.announced, series=series)

    def blocks(self) -> Iterator[tuple[int, list[bytes]]]:
        for row, frames in enumerate(self.scan.frames):
            time.sleep(0.01)
            yield row * len(frames), [encode(frame, self.encoding) for frame in frames]
            if row + 1 in self.stops:
                self.go.acquire(timeout=60)


async def live(start: SeriesStart, scan: Scan, recording: Path) -> tuple[stream.Result, list[stream.Snapshot]]:
    """Send the scan over ZeroMQ into a session; its result, and the images at 10, 25, 50 and 100 % of the rows."""
    stops = [math.ceil(share * scan.shape[0]) for share in (0.10, 0.25, 0.50, 1.00)]
    source, taken = PausingSource(start, scan, stops[:-1]), []
    bound: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    sending = serve(source, "tcp://127.0.0.1:*", frames_per_message=scan.shape[1], ready=bound.set_result)
    sender, centre = asyncio.create_task(sending), scan.geometry.bf_centre_px
    async with stream.open_session(await bound, bf_centre_px=centre, record=recording) as session:
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

    patterns = {"one frame": scan.frames[0, 0], "mean of all frames": scan.frames.mean(axis=(0, 1))}
    draw("patterns", {title: partial(counts, scan, pattern) for title, pattern in patterns.items()})

    low, high = (spectrum_at(scan.frames, *where) for where in (LOW, HIGH))
    draw("trotters", {scan_frequency(scan, w): partial(wave, scan, g, w) for w, g in ((LOW, low), (HIGH, high))})

    masks = stream.overlap_masks(scan.probe, scan.k, scan.q(*LOW))
    opposite = stream.overlap_masks(scan.probe, scan.k, scan.q(-LOW[0], -LOW[1]))
    between = np.angle(low[masks.double].sum() / low[opposite.double].sum())
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
        result, snapshots = asyncio.run(live(maker.start(1), scan, recording))
        offline = stream.reconstruct(recording, bf_centre_px=scan.geometry.bf_centre_px)
    came = {f"{snapshot.rows_acquired} of {scan.shape[0]} rows": snapshot.images["phase"] for snapshot in snapshots}
    draw("stream", {title: partial(image, scan, phase, result.phase) for title, phase in came.items()})

    for name, phase in {**phases, "streamed": result.phase}.items() if data is None else ():
        correlation = np.corrcoef(phase.ravel(), SIMULATION.expected_ssb_phase.ravel())[0, 1]
        print(f"correlation with the expected phase, {name}: {correlation:.4f}")
    for name, other in (("offline", offline.object), ("the book", both)):
        difference = np.abs(result.object - other).max() / np.abs(other - 1).max()
        print(f"streamed against {name}, relative difference: {difference:.1e}")


# The pictures. Each panel is a function of its axes; ``plate`` puts panels side by side.


def plate(output: Path, name: str, panels: dict[str, Callable[[Any], None]], columns: int = 5) -> None:
    """One figure, docs/images/tutorial_NAME.png."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = ((width := {1: 4.6, 2: 9.0}.get(columns, 10.8)), 0.5 + rows * (0.76 * width / columns + 0.6))
    drawn, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for one, (title, panel) in zip(axes.flat, panels.items(), strict=True):
        panel(axes=one)
        one.set_title(title, fontsize=10)
        one.set(ylabel=one.get_ylabel() if one.get_subplotspec().is_first_col() else "")
    drawn.savefig(output / f"tutorial_{name}.png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(drawn)


def scan_frequency(scan: Scan, where: tuple[int, int]) -> str:
    return f"λ|q| = {2 * np.hypot(*scan.q(*where)) / scan.probe.cutoff:.2f} α"


def detector(axes: Any, scan: Scan, picture: np.ndarray, limit: float, where: Any = (0, 0), **how: Any) -> Any:
    """A picture on the detector in mrad, up to ``limit``; the outlines of A(k), dashed A(k-q), dotted A(k+q)."""
    (top, bottom), (left, right) = (
        (1e3 * angle.min() - pixel / 2, 1e3 * angle.max() + pixel / 2)
        for angle, pixel in zip(scan.geometry.angles, scan.geometry.pixel_mrad, strict=True)
    )
    shown = axes.imshow(picture, extent=(left, right, bottom, top), interpolation="nearest", **how)
    axes.set(xlim=(-limit, limit), ylim=(limit, -limit), xlabel="column angle (mrad)", ylabel="row angle (mrad)")
    axes.locator_params(nbins=5)
    centre = np.array(scan.q(*where)[::-1]) * scan.probe.wavelength * 1e3
    for sign, style in ((0, "-"), (1, "--"), (-1, ":"))[: 3 if any(where) else 1]:
        axes.add_patch(plt.Circle(sign * centre, scan.geometry.semiangle_mrad, fill=False, ec="w", ls=style, lw=1.2))
    return shown


def counts(scan: Scan, pattern: np.ndarray, *, axes: Any) -> None:
    shown = detector(axes, scan, pattern, 30, cmap="magma")
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


def wave(scan: Scan, values: np.ndarray, where: tuple[int, int] = (0, 0), *, axes: Any) -> None:
    """A complex picture on the detector; the first one has the wheel that explains its colours."""
    detector(axes, scan, complex_colours(values, np.percentile(np.abs(values), 99.5)), 31, where)
    if axes.get_subplotspec().is_first_col():
        wheel = axes.inset_axes((0, 0, 0.26, 0.26), xlim=(-1.75, 1.75), ylim=(-1.75, 1.75))
        z = np.linspace(-1, 1, 101)[None, :] - 1j * np.linspace(-1, 1, 101)[:, None]
        wheel.imshow(np.dstack([complex_colours(z, 1.0), abs(z) <= 1]), extent=(-1, 1, -1, 1))
        for text, x, y in (("0", 1.3, 0), ("π/2", 0, 1.4), ("π", -1.35, 0), ("−π/2", 0, -1.4)):
            wheel.text(x, y, text, color="white", fontsize=7, ha="center", va="center")
        wheel.axis("off")


def region(scan: Scan, where: tuple[int, int], flags: np.ndarray | None = None, *, axes: Any) -> None:
    """One mask, or all regions of overlap in colours."""
    colours = dict(zip(("outside", "aperture", "double overlap with A(k−q)", "double overlap with A(k+q)",
                        "triple overlap"), ("0.1", "0.5", "#338ce6", "#f28c26", "#f2ebd9"), strict=True))  # fmt: skip
    rgb = mpl.colors.to_rgba_array(list(colours.values()))
    if flags is not None:
        detector(axes, scan, rgb[flags.astype(int)], 42)
        return
    masks, other = (stream.overlap_masks(scan.probe, scan.k, scan.q(s * where[0], s * where[1])) for s in (1, -1))
    which = np.select([masks.triple, other.double, masks.double, masks.aperture], [4, 3, 2, 1], 0)
    detector(axes, scan, rgb[which], 42, where)
    if not axes.figure.legends:
        patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in colours.items()]
        axes.figure.legend(handles=patches[1:], loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def image(scan: Scan, phase: np.ndarray, like: np.ndarray, tiles: int = 1, *, axes: Any) -> None:
    """A phase image, tiled, axes in Å, on the colour scale of ``like``; grey where no row has come yet."""
    rows, columns = (tiles * n * step for n, step in zip(scan.shape, scan.step, strict=True))
    palette, span = mpl.colormaps["magma"].with_extremes(bad="0.85"), {"vmin": like.min(), "vmax": like.max()}
    shown = axes.imshow(np.tile(phase, (tiles, tiles)), extent=(0, columns, rows, 0), cmap=palette, **span)
    axes.set(xlabel="column (Å)", ylabel="row (Å)")
    axes.locator_params(nbins=5)
    if (place := axes.get_subplotspec()).is_last_col():
        line = axes.figure.axes[place.rowspan.start * place.get_gridspec().ncols :]
        axes.figure.colorbar(shown, ax=line, label="phase (rad)", shrink=0.85)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images", help="folder for the pictures")
    parser.add_argument("--data", type=Path, help="a 4D-STEM file to use instead of the simulation")
    main(**vars(parser.parse_args()))
