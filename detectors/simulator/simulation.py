"""The simulated microscope: the diffraction patterns of a scan over a thin specimen, and what SSB should make of them.

The specimen is a full multiplicative phase object, so strong scattering shows up as it does in a microscope:

    psi(k; r) = FFT_u[ p(u) exp(i phi(r + u)) ],    p(u) = IFFT_k[ A(k) ],    I = |psi|^2

evaluated in the frame of the detector on a box of side lambda / pixel angle, so that FFT bins *are* detector pixels.
The specimen is drawn once, turned into that frame (REFERENCE section 2: k = T R(-theta) q); a beam position between
two of its grid points is reached by a phase ramp on A(k), which is exact. The disk's sub-pixel centre is in the k grid.
No interpolation anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.fft

from detectors.errors import ConfigurationError
from detectors.messages import SeriesId, SeriesStart
from detectors.simulator.specimen import ProjectedPhase, specimen_named
from stream.optics import Aberrations, AxesRelation, Probe, aberration_phase

DTYPES: dict[str, np.dtype] = {"uint8": np.dtype("<u1"), "uint16": np.dtype("<u2")}

#: Patterns computed together: enough to amortise the calls, few enough to stay in the processor's cache.
_BATCH = 16
#: Overlaps weaker than this carry no weight (REFERENCE section 4a).
_OVERLAP_THRESHOLD = 1e-3


@dataclass(frozen=True)
class SimulatedScan:
    """Settings of a simulated scan; the patterns are made on demand and are the same for the same settings.

    ``scan_shape`` (rows, columns) and ``scan_step_angstrom`` (row, column) decide the field, on which the specimen
    repeats. ``aberrations``: ``C10`` ... in Å, ``phi12`` ... in degrees, in the scan's frame. ``bf_centre_px`` (row,
    column), sub-pixel, is where k = 0 falls; None is the middle of the detector. ``rolloff_mrad``: width of the
    aperture's soft edge. ``electrons_per_frame`` is the mean number of electrons in the beam during one frame, counted
    with Poisson noise; None gives noise-free counts, scaled so that a pixel of the disk without specimen has a quarter
    of what ``dtype`` can hold. Counts saturate at that limit. ``hot_pixels`` always read the limit, ``dead_pixels`` 0.

    Raises ``ConfigurationError`` for what cannot be simulated.
    """

    scan_shape: tuple[int, int] = (64, 64)
    scan_step_angstrom: tuple[float, float] = (3.905 / 16, 3.905 / 16)
    energy_kev: float = 200.0
    semiangle_mrad: float = 20.0
    rolloff_mrad: float = 2.0
    aberrations: Mapping[str, float] = field(default_factory=dict)
    rotation_deg: float = 0.0
    transpose: bool = False
    detector_shape: tuple[int, int] = (96, 96)
    detector_pixel_mrad: tuple[float, float] = (1.0, 1.0)
    bf_centre_px: tuple[float, float] | None = None
    electrons_per_frame: float | None = 1000.0
    dtype: str = "uint16"
    specimen: str = "lattice"
    seed: int = 0
    hot_pixels: tuple[tuple[int, int], ...] = ()
    dead_pixels: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        specimen_named(self.specimen)
        for name, values in (("scan_shape", self.scan_shape), ("detector_shape", self.detector_shape)):
            if len(values) != 2 or min(values) < 1:
                raise ConfigurationError(f"{name} must be two numbers of at least 1 (rows, columns), got {values!r}")
        for name, number in (
            ("scan_step_angstrom", min(self.scan_step_angstrom)),
            ("detector_pixel_mrad", min(self.detector_pixel_mrad)),
            ("energy_kev", self.energy_kev),
            ("semiangle_mrad", self.semiangle_mrad),
            ("electrons_per_frame", 1.0 if self.electrons_per_frame is None else self.electrons_per_frame),
        ):
            if not (math.isfinite(number) and number > 0):
                raise ConfigurationError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.rolloff_mrad <= self.semiangle_mrad:
            raise ConfigurationError(f"rolloff_mrad must lie between 0 and semiangle_mrad, got {self.rolloff_mrad!r}")
        if self.seed < 0:
            raise ConfigurationError(f"seed must not be negative, got {self.seed!r}")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for pixel in (*self.hot_pixels, *self.dead_pixels):
            if not all(0 <= pixel[a] < self.detector_shape[a] for a in (0, 1)):
                raise ConfigurationError(f"pixel {pixel!r} is not on a detector of {self.detector_shape!r} pixels")
        self._check_probe_fits()

    @property
    def centre_px(self) -> tuple[float, float]:
        """(row, column) of k = 0 in pixels, counted from the centre of the first pixel."""
        if self.bf_centre_px is not None:
            return self.bf_centre_px
        return (self.detector_shape[0] - 1) / 2, (self.detector_shape[1] - 1) / 2

    @property
    def axes(self) -> AxesRelation:
        """How the scan's axes lie on the detector."""
        return AxesRelation(math.radians(self.rotation_deg), self.transpose)

    @cached_property
    def probe(self) -> Probe:
        """The electron probe."""
        return Probe(
            1e3 * self.energy_kev,
            1e-3 * self.semiangle_mrad,
            1e-3 * self.rolloff_mrad,
            Aberrations.from_user(self.aberrations),
            self.axes,
        )

    @cached_property
    def phase(self) -> ProjectedPhase:
        """The specimen's phase, in the scan's frame, on the scanned field."""
        size = [self.scan_shape[a] * self.scan_step_angstrom[a] for a in (0, 1)]
        return specimen_named(self.specimen).build((size[0], size[1]), self.seed)

    @property
    def truth_phase(self) -> np.ndarray:
        """The specimen's phase [rad] at the scan positions: float64 (scan rows, scan columns)."""
        return self.phase.on_grid(self.scan_shape, self.scan_step_angstrom)

    @cached_property
    def expected_ssb_phase(self) -> np.ndarray:
        """What two-sideband SSB with these optics gives, to first order and without noise: float64, as the truth [rad].

        The truth filtered by :func:`ssb_transfer`: without its mean, and with the contrast that SSB leaves to each
        frequency. Compare a reconstruction's phase with this one rather than with ``truth_phase``.
        """
        transfer = ssb_transfer(self.probe, self.scan_shape, self.scan_step_angstrom)
        return np.fft.irfft2(np.fft.rfft2(self.truth_phase) * transfer, s=self.scan_shape)

    # --- what a sender needs, see detectors.simulator.source.FrameMaker

    @property
    def frames_per_pass(self) -> int:
        """Frames in one pass of the scan."""
        return self.scan_shape[0] * self.scan_shape[1]

    @property
    def block_count(self) -> int:
        """One block is one scan row."""
        return self.scan_shape[0]

    def start(self, series: SeriesId) -> SeriesStart:
        """The start of a series of one pass, with every setting that a reconstruction needs."""
        settings = {
            "energy_kev": float(self.energy_kev),
            "semiangle_mrad": float(self.semiangle_mrad),
            "rolloff_mrad": float(self.rolloff_mrad),
            "scan_step_angstrom": [float(step) for step in self.scan_step_angstrom],
            "detector_pixel_mrad": [float(pixel) for pixel in self.detector_pixel_mrad],
            "rotation_deg": float(self.rotation_deg),
            "transpose": bool(self.transpose),
            "aberrations": {key: float(value) for key, value in self.aberrations.items()},
        }
        return SeriesStart(
            series, self.detector_shape, DTYPES[self.dtype], self.scan_shape, self.frames_per_pass, settings
        )

    def block(self, number: int) -> tuple[int, np.ndarray]:
        """Scan row ``number``: its first frame's index and the counts, ``dtype`` (scan columns, rows, columns)."""
        first, count = number * self.scan_shape[1], self.scan_shape[1]
        rng = np.random.default_rng([self.seed, 3, number])
        out = np.empty((count, *self.detector_shape), dtype=DTYPES[self.dtype])
        limit = np.iinfo(out.dtype).max
        for at in range(0, count, _BATCH):
            stop = min(at + _BATCH, count)
            expected = self.patterns(np.arange(first + at, first + stop))
            if self.electrons_per_frame is None:
                counts = np.rint(expected * np.float32(limit / 4 / self._optics.brightest))
            else:
                counts = _poisson(rng, expected, self.electrons_per_frame)
            np.minimum(counts, limit, out=out[at:stop], casting="unsafe")
        for pixels, value in ((self.hot_pixels, limit), (self.dead_pixels, 0)):
            for row, column in pixels:
                out[:, row, column] = value
        return first, out

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """One pass, scan row after scan row: see :meth:`block`."""
        return (self.block(number) for number in range(self.block_count))

    def patterns(self, indices: np.ndarray) -> np.ndarray:
        """The share of the beam that each pixel receives: float32 (frames, detector rows, detector columns).

        ``indices``: frame numbers (frames,), which run along the scan's rows. A pattern sums to at most 1; what is
        missing has been scattered past the detector.
        """
        return self._optics.intensity(*np.divmod(np.asarray(indices), self.scan_shape[1]))

    @cached_property
    def _optics(self) -> _Optics:
        return _Optics(self)

    def _check_probe_fits(self) -> None:
        """A probe wider than its box would wrap around: the detector's pixels are then too coarse for such optics."""
        line, wavelength = np.linspace(-1, 1, 41) * self.probe.semiangle, self.probe.wavelength
        rows, columns = np.meshgrid(line, line, indexing="ij")
        chi = aberration_phase(rows, columns, self.probe.aberrations.table(self.axes), wavelength)
        chi[np.hypot(rows, columns) > line[-1] * 1.001] = np.nan
        for a in (0, 1):
            # A ray at angle alpha lands lambda / 2 pi |grad chi| off the axis.
            radius = wavelength / (2 * np.pi) * float(np.nanmax(np.abs(np.diff(chi, axis=a)))) / (line[1] - line[0])
            box = wavelength / (1e-3 * self.detector_pixel_mrad[a])
            if radius > 0.45 * box:
                raise ConfigurationError(
                    f"the aberrations spread the probe {2 * radius:.0f} Å wide, but pixels of "
                    f"{self.detector_pixel_mrad[a]:g} mrad resolve only {box:.0f} Å; "
                    "use a smaller defocus or a smaller detector_pixel_mrad"
                )


class _Optics:
    """Everything that is the same for all patterns of a scan."""

    def __init__(self, scan: SimulatedScan) -> None:
        probe, phase = scan.probe, scan.phase
        self.detector_shape = scan.detector_shape
        pixel = [1e-3 * scan.detector_pixel_mrad[a] / probe.wavelength for a in (0, 1)]
        band = probe.cutoff + phase.bandwidth
        # Large enough for the detector's farthest pixel on either side of k = 0, and for scattering within the
        # specimen's bandwidth not to wrap around into the disk.
        self.size = [
            scipy.fft.next_fast_len(
                math.ceil(
                    max(
                        scan.detector_shape[a],
                        2 * abs(scan.centre_px[a]) + 1,
                        2 * abs(scan.detector_shape[a] - 1 - scan.centre_px[a]) + 1,
                        band / pixel[a],
                    )
                )
            )
            for a in (0, 1)
        ]
        # FFT bin m is detector pixel m; bins beyond the detector stand for the pixels that would follow on the nearer
        # side, so a disk that reaches over the edge is complete.
        middle = [round(scan.centre_px[a]) for a in (0, 1)]
        bins = [(np.arange(n) - m + n // 2) % n - n // 2 + m for n, m in zip(self.size, middle, strict=True)]
        k_row, k_column = ((bins[a] - scan.centre_px[a]) * pixel[a] for a in (0, 1))
        aperture = probe(k_row[:, None], k_column[None, :])
        power = np.abs(aperture) ** 2
        self.brightest = float(power.max() / power.sum())
        # Only the bins of the disk are ever touched before the first transform.
        self.rows, self.columns = np.flatnonzero(power.any(axis=1)), np.flatnonzero(power.any(axis=0))
        self.aperture = (aperture / math.sqrt(power.sum()))[np.ix_(self.rows, self.columns)].astype(np.complex64)
        self.turns = (bins[0][self.rows] / self.size[0], bins[1][self.columns] / self.size[1])

        self.pitch = tuple(1 / (n * dk) for n, dk in zip(self.size, pixel, strict=True))
        extent = [(n - 1) * step for n, step in zip(scan.scan_shape, scan.scan_step_angstrom, strict=True)]
        corners = scan.axes.to_detector(*np.meshgrid([0.0, extent[0]], [0.0, extent[1]], indexing="ij"))
        self.origin = tuple(float(corners[a].min()) - (self.size[a] // 2 + 1) * self.pitch[a] for a in (0, 1))
        shape = [math.ceil(float(np.ptp(corners[a])) / self.pitch[a]) + self.size[a] + 3 for a in (0, 1)]
        drawn = phase.on_grid(
            (shape[0], shape[1]), (self.pitch[0], self.pitch[1]), (self.origin[0], self.origin[1]), scan.axes
        )
        self.boxes = np.lib.stride_tricks.sliding_window_view(
            np.exp(1j * drawn).astype(np.complex64), (self.size[0], self.size[1])
        )
        self.axes, self.step = scan.axes, scan.scan_step_angstrom

    def intensity(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """|psi|^2 at scan positions (rows, columns): float32 (positions, detector rows, detector columns)."""
        places = self.axes.to_detector(rows * self.step[0], columns * self.step[1])
        corners, ramps = [], []
        for a in (0, 1):
            place = (places[a] - self.origin[a]) / self.pitch[a]
            whole = np.floor(place)
            corners.append(whole.astype(np.int64) - self.size[a] // 2)
            shift = self.size[a] // 2 + (place - whole)
            ramps.append(np.exp(-2j * np.pi * shift[:, None] * self.turns[a]).astype(np.complex64))
        wave = np.zeros((len(rows), len(self.rows), self.size[1]), dtype=np.complex64)
        wave[:, :, self.columns] = self.aperture * ramps[0][:, :, None] * ramps[1][:, None, :]
        wave = scipy.fft.ifft(wave, axis=2, overwrite_x=True)
        probe = np.zeros((len(rows), *self.size), dtype=np.complex64)
        probe[:, self.rows] = wave
        probe = scipy.fft.ifft(probe, axis=1, overwrite_x=True)
        probe *= self.boxes[corners[0], corners[1]]
        # The detector's rows are cut out between the two transforms: half of the second one is saved.
        wave = scipy.fft.fft(probe, axis=1, overwrite_x=True)[:, : self.detector_shape[0]]
        wave = scipy.fft.fft(wave, axis=2)[:, :, : self.detector_shape[1]]
        return wave.real**2 + wave.imag**2


def _poisson(rng: np.random.Generator, share: np.ndarray, electrons: float) -> np.ndarray:
    """Counts of a beam of ``electrons`` a frame, Poisson-distributed: an integer array of the shape of ``share``."""
    if electrons * share[0].sum() > share[0].size:
        return rng.poisson(share * np.float32(electrons))
    # With few electrons it is cheaper to place each of them: their number is Poisson-distributed, and sorted uniform
    # numbers (partial sums of exponential ones) find their pixels in the cumulated pattern in order of memory.
    cumulated = np.cumsum(share, dtype=np.float64)
    gaps = np.cumsum(rng.standard_exponential(rng.poisson(electrons * cumulated[-1]) + 1))
    pixels = np.searchsorted(cumulated, gaps[:-1] * (cumulated[-1] / gaps[-1]), side="right")
    return np.bincount(pixels, minlength=share.size)[: share.size].reshape(share.shape)


def ssb_transfer(
    probe: Probe, scan_shape: tuple[int, int], scan_step: tuple[float, float], samples: int = 48
) -> np.ndarray:
    """The linear contrast transfer of two-sideband SSB, T(q) = sum_k |Gamma(k, q)| / sum_k |A(k)|^2.

    ``scan_step`` (row, column) [Å]; ``samples``: points of k across the disk. Returns float64 (scan rows,
    scan columns // 2 + 1), the frequencies of ``numpy.fft.rfft2``; 0 at q = 0. Source: REFERENCE section 4f, from
    Gamma = A*(k) A(k-q) - A(k) A*(k+q) of the weak phase object.
    """
    radius = probe.semiangle / probe.wavelength
    line = (np.arange(samples) + 0.5) / samples * 2 * radius - radius
    k_row, k_column = (grid.ravel() for grid in np.meshgrid(line, line, indexing="ij"))
    inside = np.hypot(k_row, k_column) < radius
    k_row, k_column = k_row[inside], k_column[inside]
    amplitude = probe(k_row, k_column)

    q_row, q_column = probe.axes.to_detector(
        *np.meshgrid(
            np.fft.fftfreq(scan_shape[0], scan_step[0]), np.fft.rfftfreq(scan_shape[1], scan_step[1]), indexing="ij"
        )
    )
    transfer = np.zeros(q_row.shape)
    passed = np.argwhere((np.hypot(q_row, q_column) < probe.cutoff) & (np.hypot(q_row, q_column) > 0))
    for some in np.array_split(passed, max(1, len(passed) // 128)):
        rows, columns = (q[some[:, 0], some[:, 1]][:, None] for q in (q_row, q_column))
        overlap = np.abs(
            amplitude.conj() * probe(k_row - rows, k_column - columns)
            - amplitude * probe(k_row + rows, k_column + columns).conj()
        )
        transfer[some[:, 0], some[:, 1]] = np.where(overlap > _OVERLAP_THRESHOLD, overlap, 0.0).sum(axis=1)
    return transfer / (np.abs(amplitude) ** 2).sum()
