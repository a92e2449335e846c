"""The bright-field disk, found in the mean of the first frames: centre, radius, and the pixels that cannot be trusted.

The way of a pattern:

1. Hot pixels: far above the upper quarter of their 5x5 neighbourhood. How far is far follows from the noise, and the
   noise is measured in the pattern itself, so a detector that gives many counts per electron is not misjudged.
2. First guess: the threshold that best parts the pattern into two levels (the Poisson likelihood of Li & Tam, Pattern
   Recognition Letters 19 (1998) 771, "minimum cross entropy"), the connected region with most counts, a circle through
   its border (Kåsa's algebraic fit, then robust geometric least squares).
3. Least squares with a robust loss of a soft-edged disk over a ring around that circle, twice: a wide ring, then a
   narrow one in which disk and background may vary around the circle, as they do behind a crystal.
4. Dead pixels: far too dark inside the disk. They are left out of the second fit.

What the radius means. The aperture A(k) is an *amplitude*, so the radius is where the amplitude is one half, that is
where the intensity has fallen to one quarter. It is exact for the one-pixel amplitude ramp of abTEM and quantem. An
aperture with py4DSTEM's ``rolloff`` ends half a rolloff further out. An edge blurred as an intensity (a sharp aperture
seen by a detector's point spread) has its true radius at half the height instead: ``half_height_radius_px`` is close.

Pixels are taken as square: on other detectors the disk is an ellipse, which is fitted by a circle of about mean radius.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize

from detectors.errors import ConfigurationError

_WINDOW = 5  # side of the neighbourhood for hot and dead pixels; wider than a hot column, smaller than a disk
_UPPER_QUARTER = 18  # rank among the window's 25 pixels: a pixel at a disk's edge still has this many neighbours in it
_HOT_RATIO, _HOT_SIGMA, _HOT_ELECTRONS = 3.0, 6.0, 9.0
_HOT_FLOOR = 0.02  # of the disk's level: less is no harm, and noise-free patterns have ripples
_DEAD_RATIO, _DEAD_SIGMA = 0.3, 8.0
_CHI2_30 = 0.474  # 30th percentile of a variance estimated from 4 values, in units of the variance (chi2 of 3, over 3)
_UNEVENNESS = 0.05  # of the disk's level: what the fit forgives the specimen
_HARMONICS = 4  # of the disk's and background's variation around the circle
_HARMONIC_SIGMA = 0.3  # prior: a variation of 30 % of the disk's level
_EDGE_PX, _EDGE_LOG_SIGMA = 1.5, 0.7  # prior of the edge's width, which few electrons cannot tell
_MINIMUM_RADIUS = 2.0
_MINIMUM_ARC = 0.2  # of the circle's circumference on good pixels; less does not tell where its centre is
_MINIMUM_SIGNIFICANCE = 6.0
_MINIMUM_CONTRAST = 1.5
_MOST_VALUES = 150_000  # pixels times unknowns in one fit; a larger ring is thinned out
_RING_ELECTRONS = 3000  # that the inner half of the narrow ring should have to tell the edge
#: The amplitude raised cosine falls to sqrt(1/2) this fraction of its width before it falls to 1/2.
_HALF_HEIGHT = 0.5 - math.acos(math.sqrt(2.0) - 1.0) / math.pi


@dataclass(frozen=True)
class BrightFieldDisk:
    """Where the bright-field disk lies on the detector.

    ``centre_px`` (row, column), sub-pixel, pixel centres at whole numbers; ``radius_px`` where the aperture's amplitude
    is one half (see the module); ``edge_px`` width over which the amplitude falls from 1 to 0, with a floor near one
    pixel; ``bad_pixels`` bool, the pattern's shape: hot and dead pixels found besides the mask that was given;
    ``uncertainty_px`` rough standard deviations of (a component of the centre, the radius), 0 for what was given;
    ``contrast`` mean inside over mean outside (inf over an empty background).
    """

    centre_px: tuple[float, float]
    radius_px: float
    edge_px: float
    bad_pixels: np.ndarray
    uncertainty_px: tuple[float, float]
    contrast: float

    @property
    def half_height_radius_px(self) -> float:
        """The radius at which the *intensity* is one half [px]."""
        return self.radius_px - _HALF_HEIGHT * self.edge_px


def find_bf_disk(
    mean_pattern: np.ndarray,
    *,
    good: np.ndarray | None = None,
    frames: int | None = None,
    centre_px: tuple[float, float] | None = None,
    radius_px: float | None = None,
) -> BrightFieldDisk:
    """Find the bright-field disk in a mean diffraction pattern.

    ``mean_pattern`` (rows, columns), any real dtype, counts: the mean of ``frames`` frames (None: unknown, the noise is
    then judged from the pattern alone). ``good`` bool of the same shape, False = masked pixel. ``centre_px`` (row,
    column) and ``radius_px`` [px], where given, are kept, and only the rest is fitted; with both given, only the bad
    pixels are looked for. Non-finite pixels count as bad.

    Raises ``ConfigurationError`` when no disk with a visible edge is there, or an argument does not fit the pattern.
    Method and definition of the radius: see the module.
    """
    pattern = np.array(mean_pattern, dtype=np.float64)
    usable = _checked_mask(pattern, good, centre_px, radius_px)
    masked = ~usable
    usable &= np.isfinite(pattern)
    pattern[~usable] = 0.0
    given = _Circle(centre_px, radius_px) if centre_px is not None and radius_px is not None else None
    if given is None and usable.sum() < 0.25 * pattern.size:
        raise _no_disk(f"only {usable.sum()} of {pattern.size} pixels hold usable numbers")
    if given is None and not (pattern > 0).any():
        raise _no_disk("the mean pattern is empty: no good pixel has counted anything")

    electrons = _electrons_per_unit(pattern, usable, frames)
    usable &= ~_hot_pixels(pattern, usable, electrons)
    circle = given or _first_guess(pattern, usable, electrons, centre_px, radius_px)
    for wide in (True, False):
        if given is None:
            circle = _fit_edge(pattern, usable, electrons, circle, wide, centre_px is None, radius_px is None)
            _check(pattern, usable, circle)
        usable &= ~_dead_pixels(pattern, usable, electrons, circle)
    return BrightFieldDisk(
        centre_px=circle.centre,
        radius_px=circle.radius,
        edge_px=circle.edge,
        bad_pixels=~usable & ~masked,
        uncertainty_px=(circle.centre_sigma, circle.radius_sigma),
        contrast=_contrast(pattern, usable, circle),
    )


class Survey:
    """Collects the first frames of an acquisition until the bright-field disk can be found in their mean.

    Pixels that read the dtype's largest value in most frames (how DECTRIS detectors mark masked pixels) are bad, and
    zero in :attr:`mean_pattern`. Counters that saturate below that, such as 12 bits kept in uint16, are not known here.
    """

    def __init__(self, shape: tuple[int, int], dtype: npt.DTypeLike, good: np.ndarray | None = None) -> None:
        """``shape`` (rows, columns) and ``dtype`` of the detector's frames; ``good`` bool ``shape``, False = masked."""
        self.frames = 0
        self._good = good
        self._largest = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else None
        self._sum = np.zeros(shape)
        self._full = np.zeros(shape, dtype=np.int64)

    def add(self, frames: np.ndarray) -> None:
        """Add ``frames`` (n, rows, columns), the survey's dtype, counts.

        Raises ``ConfigurationError`` when their shape is not the detector's.
        """
        if frames.ndim != 3 or frames.shape[1:] != self._sum.shape:
            rows, columns = self._sum.shape
            raise ConfigurationError(f"expected frames of shape (n, {rows}, {columns}), got {frames.shape}")
        self._sum += frames.sum(axis=0, dtype=np.float64)
        if self._largest is not None:
            self._full += np.count_nonzero(frames == self._largest, axis=0)
        self.frames += len(frames)

    @property
    def stuck(self) -> np.ndarray:
        """Pixels at the dtype's largest value in more than half of the frames, bool (rows, columns)."""
        return 2 * self._full > self.frames

    @property
    def mean_pattern(self) -> np.ndarray:
        """Mean counts per frame, float64 (rows, columns); 0 where :attr:`stuck`, and before the first frame."""
        return np.where(self.stuck, 0.0, self._sum / max(self.frames, 1))

    def find(self, *, centre_px: tuple[float, float] | None = None, radius_px: float | None = None) -> BrightFieldDisk:
        """:func:`find_bf_disk` of the frames so far; ``bad_pixels`` contains the :attr:`stuck` ones that were good."""
        # As NaN the stuck pixels go the way of all numbers that are none: unused, and reported as bad.
        pattern = np.where(self.stuck, np.nan, self.mean_pattern)
        return find_bf_disk(pattern, good=self._good, frames=self.frames, centre_px=centre_px, radius_px=radius_px)


@dataclass(frozen=True)
class _Circle:
    """A fitted or guessed disk [px], its level above the background and the background [counts per frame]."""

    centre: tuple[float, float]
    radius: float
    edge: float = _EDGE_PX
    level: float = 0.0
    background: float = 0.0
    level_sigma: float = math.inf
    centre_sigma: float = 0.0
    radius_sigma: float = 0.0

    def distances(self, shape: tuple[int, ...]) -> np.ndarray:
        """Distance of each pixel of ``shape`` from the centre [px], float64."""
        rows, columns = (np.arange(n) - c for n, c in zip(shape, self.centre, strict=True))
        return np.hypot(rows[:, None], columns[None, :])


def _no_disk(seen: str) -> ConfigurationError:
    return ConfigurationError(
        f"no bright-field disk was found in the mean diffraction pattern: {seen}. Give bf_centre_px (row, column) and "
        "bf_radius_px, or more frames with the beam on the detector"
    )


def _checked_mask(
    pattern: np.ndarray, good: np.ndarray | None, centre: tuple[float, float] | None, radius: float | None
) -> np.ndarray:
    if pattern.ndim != 2 or min(pattern.shape) < 8:
        raise ConfigurationError(f"expected a mean pattern (rows, columns) of 8x8 or more, got shape {pattern.shape}")
    if good is not None and good.shape != pattern.shape:
        raise ConfigurationError(f"the pixel mask has shape {good.shape}, the mean pattern {pattern.shape}")
    if centre is not None and not np.isfinite(centre).all():
        raise ConfigurationError(f"bf_centre_px must be two finite numbers (row, column), got {centre!r}")
    if radius is not None and not (math.isfinite(radius) and radius > 0):
        raise ConfigurationError(f"bf_radius_px must be a positive number, got {radius!r}")
    return np.ones(pattern.shape, dtype=bool) if good is None else good.astype(bool)


def _electrons_per_unit(pattern: np.ndarray, usable: np.ndarray, frames: int | None) -> float:
    """How many detected electrons one unit of ``pattern`` stands for, so that pattern * this is Poisson distributed.

    The inverse of the usual variance-to-mean ratio in blocks of 2x2 pixels; "usual" is a low percentile, which edges
    and hot pixels hardly move. Not more than ``frames``: a count cannot be less than an electron.
    """
    rows, columns = (n - n % 2 for n in pattern.shape)
    blocks = pattern[:rows, :columns].reshape(rows // 2, 2, columns // 2, 2)
    whole = usable[:rows, :columns].reshape(blocks.shape).all(axis=(1, 3))
    mean, variance = blocks.mean(axis=(1, 3)), blocks.var(axis=(1, 3), ddof=1)
    counted = whole & (mean > 0)
    if counted.any():  # the brighter ones, without which a detector's readout noise would count
        counted &= mean > 0.2 * np.percentile(mean[counted], 75)
    ratio = float(np.percentile(variance[counted] / mean[counted], 30)) / _CHI2_30 if counted.any() else 0.0
    bound = math.inf if frames is None else float(max(frames, 1))
    electrons = min(1.0 / ratio if ratio > 0 else math.inf, bound)
    # Without any noise no number is large enough.
    return electrons if math.isfinite(electrons) else 1e12 / (float(pattern.max()) or 1.0)


def _filled(pattern: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """``pattern`` with each unusable pixel replaced by the nearest usable one."""
    if usable.all() or not usable.any():
        return pattern
    nearest = ndimage.distance_transform_edt(~usable, return_distances=False, return_indices=True)
    return pattern[tuple(nearest)]


def _neighbourhoods(pattern: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The windows around the pixels ``where`` (n, 2), float64 (n, 25); mirrored at the borders' pixels."""
    reach = np.arange(_WINDOW) - _WINDOW // 2
    rows, columns = (
        (pattern.shape[axis] - 1) - np.abs(pattern.shape[axis] - 1 - np.abs(where[:, axis, None] + offset.ravel()))
        for axis, offset in enumerate(np.meshgrid(reach, reach, indexing="ij"))
    )
    return pattern[rows, columns]


def _hot_pixels(pattern: np.ndarray, usable: np.ndarray, electrons: float) -> np.ndarray:
    """Pixels far above the upper quarter of their neighbourhood, bool of the pattern's shape."""
    counts = electrons * np.maximum(_filled(pattern, usable), 0.0)
    darkest = ndimage.minimum_filter(counts, size=_WINDOW, mode="nearest")  # quick: rules out nearly all pixels
    # The counts' own mean level, that is the disk's where there is one; hot pixels are no part of `darkest`.
    least = _HOT_ELECTRONS + _HOT_FLOOR * float((darkest**2).sum() / max(darkest.sum(), 1e-300))
    suspects = np.argwhere(usable & (counts > _HOT_RATIO * darkest + least))
    around = np.partition(_neighbourhoods(counts, suspects), _UPPER_QUARTER, axis=1)[:, _UPPER_QUARTER]
    limit = _HOT_RATIO * around + _HOT_SIGMA * np.sqrt(around) + least
    return _marked(pattern.shape, suspects[counts[tuple(suspects.T)] > limit])


def _dead_pixels(pattern: np.ndarray, usable: np.ndarray, electrons: float, circle: _Circle) -> np.ndarray:
    """Pixels inside the disk's edge that are far darker than their neighbours, bool of the pattern's shape."""
    inside = usable & (circle.distances(pattern.shape) < circle.radius - circle.edge - 0.5)
    if inside.sum() < 9:
        return np.zeros_like(inside)
    counts = electrons * np.maximum(_filled(pattern, inside), 0.0)
    # Behind a broad dead stripe the neighbours are dead too; a quarter of the disk's median is expected anywhere.
    least = 0.25 * float(np.median(counts[inside]))
    brightest = np.maximum(ndimage.maximum_filter(counts, size=_WINDOW, mode="nearest"), least)
    suspects = np.argwhere(inside & (counts < _DEAD_RATIO * brightest) & (4 * brightest > _DEAD_SIGMA**2))
    expected = np.maximum(np.median(_neighbourhoods(counts, suspects), axis=1), least)
    counted = counts[tuple(suspects.T)]
    surprise = 2.0 * (np.sqrt(expected) - np.sqrt(counted))  # in standard deviations, at any Poisson mean
    return _marked(pattern.shape, suspects[(counted < _DEAD_RATIO * expected) & (surprise > _DEAD_SIGMA)])


def _marked(shape: tuple[int, ...], where: np.ndarray) -> np.ndarray:
    """Bool of ``shape``, True at the pixels ``where`` (n, 2)."""
    marks = np.zeros(shape, dtype=bool)
    marks[tuple(where.T)] = True
    return marks


def _first_guess(
    pattern: np.ndarray,
    usable: np.ndarray,
    electrons: float,
    centre: tuple[float, float] | None,
    radius: float | None,
) -> _Circle:
    """The circle around the brightest connected region, with the given centre or radius kept."""
    smooth = _smoothed(_filled(np.maximum(pattern, 0.0), usable), electrons)
    region = _bright_region(smooth, usable)
    border = region & ~ndimage.binary_erosion(region, border_value=1)  # the detector's own border is no edge
    points = np.argwhere(border).astype(np.float64)
    if len(points) < 6:
        raise _no_disk("no edge of a disk is visible; it may be larger than the detector")
    area_radius = math.sqrt(region.sum() / math.pi)
    # Kåsa: 2 r0 r + 2 c0 c + (R^2 - r0^2 - c0^2) = r^2 + c^2 is linear in what is sought.
    middle = points.mean(axis=0)
    shifted = points - middle
    solution = np.linalg.lstsq(np.column_stack([2 * shifted, np.ones(len(points))]), (shifted**2).sum(axis=1))[0]
    start = [*(centre or middle + solution[:2]), radius or math.sqrt(max(solution[2] + (solution[:2] ** 2).sum(), 1.0))]
    free = np.array([centre is None, centre is None, radius is None])

    def residuals(values: np.ndarray) -> np.ndarray:
        full = np.array(start)
        full[free] = values
        return np.hypot(points[:, 0] - full[0], points[:, 1] - full[1]) - full[2]

    scale = max(0.5, 0.05 * area_radius)
    best = np.array(start)
    best[free] = optimize.least_squares(residuals, best[free], loss="soft_l1", f_scale=scale).x
    if best[2] > 2 * max(pattern.shape):
        raise _no_disk("the edge of the brightest region is straight; the disk may be larger than the detector")
    # The border's pixels lie half a pixel inside the region.
    return _Circle((float(best[0]), float(best[1])), float(best[2]) + (0.5 if radius is None else 0.0))


def _smoothed(pattern: np.ndarray, electrons: float) -> np.ndarray:
    """``pattern`` under a Gaussian just wide enough to see some tens of the disk's electrons at each point."""
    sigma = 0.7
    while True:
        smooth = ndimage.gaussian_filter(pattern, sigma, mode="nearest", truncate=2.5)
        level = float((smooth**2).sum() / max(smooth.sum(), 1e-300))
        if 4 * math.pi * sigma**2 * level * electrons > 40 or sigma > min(pattern.shape) / 16:
            return smooth
        sigma *= 1.5


def _bright_region(smooth: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """The connected region of most counts above the threshold that parts ``smooth`` best, bool, holes filled."""
    values = np.sort(smooth[usable])[::-1]
    sums, counts = np.cumsum(values), np.arange(1, len(values) + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        inner, outer = sums[:-1], np.maximum(sums[-1] - sums[:-1], 0.0)
        gain = inner * np.log(inner / counts[:-1])
        gain += np.where(outer > 0, outer * np.log(outer / (len(values) - counts[:-1])), 0.0)
    best = int(np.nanargmax(gain))
    labels, found = ndimage.label(smooth > 0.5 * (values[best] + values[best + 1]))
    if not found:
        raise _no_disk("every pixel has the same counts")
    largest = 1 + int(np.argmax(ndimage.sum_labels(smooth, labels, np.arange(1, found + 1))))
    return ndimage.binary_fill_holes(labels == largest)


def _fit_edge(
    pattern: np.ndarray,
    usable: np.ndarray,
    electrons: float,
    guess: _Circle,
    wide: bool,
    free_centre: bool,
    free_radius: bool,
) -> _Circle:
    """Least squares of a soft-edged disk on a background, over a ring of pixels around ``guess``.

    Unknowns: centre (2), radius, log of the edge's width, then the linear ones: level and background, each with
    ``_HARMONICS`` sines and cosines around the circle when the ring is narrow.
    """
    widest = max(0.4 * guess.radius, 3.0)
    needed = _RING_ELECTRONS / max(2 * math.pi * guess.radius * guess.level * electrons, 1e-9)
    reach = widest if wide else min(max(2.0 * guess.edge, 4.0, needed), max(widest, 4.0))
    harmonics = 0 if wide or needed > widest else _HARMONICS
    distance = guess.distances(pattern.shape).ravel()
    ring = np.flatnonzero(usable.ravel() & (np.abs(distance - guess.radius) < reach))
    ring = ring[:: 1 + len(ring) * (6 + 4 * harmonics) // _MOST_VALUES]
    counts, inside = pattern.ravel()[ring], distance[ring] < guess.radius
    if inside.sum() < 6 or (~inside).sum() < 6:
        raise _no_disk("no edge of a disk is visible on good pixels; the disk may be larger than the detector")
    background = max(float(counts[~inside].mean()), 0.0)
    level = float(counts[inside].mean()) - background
    if level <= 0:
        raise _no_disk("the brightest region has no brighter inside than outside")

    rows, columns = (i - c for i, c in zip(np.unravel_index(ring, pattern.shape), guess.centre, strict=True))
    angle = np.arctan2(rows, columns)
    orders = np.arange(1, 1 + harmonics)[:, None] * angle
    basis = np.vstack([np.ones(len(ring)), np.cos(orders), np.sin(orders)])
    expected = background / level + _edge((distance[ring] - guess.radius) / guess.edge)[0]
    weight = 1.0 / np.sqrt((expected + 0.03) / (level * electrons) + _UNEVENNESS**2)

    nonlinear = np.array([free_centre, free_centre, free_radius, True])
    prior_sigma = np.full(4 + 2 * len(basis), math.inf)
    prior_mean = np.zeros_like(prior_sigma)
    prior_sigma[3], prior_mean[3] = _EDGE_LOG_SIGMA, math.log(_EDGE_PX)
    prior_sigma[5 : 4 + len(basis)] = prior_sigma[5 + len(basis) :] = _HARMONIC_SIGMA
    start = np.concatenate([[0, 0, guess.radius, math.log(guess.edge)], np.zeros(2 * len(basis))])
    start[4], start[4 + len(basis)] = 1.0, background / level
    free = np.concatenate([nonlinear, np.ones(2 * len(basis), dtype=bool)])
    lower, upper = np.full_like(start, -math.inf), np.full_like(start, math.inf)
    lower[2:4], upper[2:4] = (0.0, math.log(0.8)), (math.inf, math.log(max(guess.radius, 1.6)))

    def model(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weighted residuals and their Jacobian over all unknowns, prior rows last."""
        x = start.copy()
        x[free] = values
        r, c = rows - x[0], columns - x[1]
        radius = np.maximum(np.hypot(r, c), 1e-9)
        width = math.exp(x[3])
        edge, slope = _edge((radius - x[2]) / width)
        disk, floor = x[4 : 4 + len(basis)] @ basis, x[4 + len(basis) :] @ basis
        pull = disk * slope / width
        moved = [-pull * r / radius, -pull * c / radius, -pull, -pull * (radius - x[2])]
        jacobian = np.vstack([*moved, edge * basis, basis])
        residual = np.concatenate([weight * (disk * edge + floor - counts / level), (x - prior_mean) / prior_sigma])
        return residual, np.vstack([(weight * jacobian).T, np.diag(1.0 / prior_sigma)])[:, free]

    fit = optimize.least_squares(
        lambda x: model(x)[0],
        start[free],
        jac=lambda x: model(x)[1],
        bounds=(lower[free], upper[free]),
        loss="soft_l1",
        x_scale="jac",
        max_nfev=60,
    )
    x, sigma = start.copy(), np.zeros_like(start)
    x[free] = fit.x
    residual, jacobian = model(fit.x)
    spread = max(1.0, 1.4826 * float(np.median(np.abs(residual[: len(ring)]))))
    sigma[free] = spread * np.sqrt(np.maximum(np.diag(np.linalg.pinv(jacobian.T @ jacobian)), 0.0))
    return _Circle(
        centre=(guess.centre[0] + float(x[0]), guess.centre[1] + float(x[1])),
        radius=float(x[2]),
        edge=math.exp(x[3]),
        level=level * float(x[4]),
        background=level * float(x[4 + len(basis)]),
        # With the harmonics a level is not well determined on part of a circle, and needs not be.
        level_sigma=level * float(sigma[4]) if wide else guess.level_sigma,
        centre_sigma=float(np.hypot(sigma[0], sigma[1])) / math.sqrt(2),
        radius_sigma=float(sigma[2]),
    )


def _edge(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intensity of a disk whose amplitude falls as a raised cosine, and its derivative, at ``depth`` edge widths.

    1 at depth -1/2 and below, 1/4 at 0, 0 at 1/2 and above; both float64 of the shape of ``depth``.
    """
    phase = math.pi * np.clip(depth + 0.5, 0.0, 1.0)
    amplitude = 0.5 * (1.0 + np.cos(phase))
    return amplitude**2, -math.pi * amplitude * np.sin(phase)


def _check(pattern: np.ndarray, usable: np.ndarray, circle: _Circle) -> None:
    """Raise ``ConfigurationError`` when the fit shows that there was no disk."""
    rows, columns = pattern.shape
    where = (
        f"the best circle has its centre at ({circle.centre[0]:.1f}, {circle.centre[1]:.1f}) and radius "
        f"{circle.radius:.1f} px on {rows}x{columns} pixels"
    )
    angles = np.arange(0.0, 2 * math.pi, math.pi / 360)
    row = np.rint(circle.centre[0] + circle.radius * np.sin(angles)).astype(int)
    column = np.rint(circle.centre[1] + circle.radius * np.cos(angles)).astype(int)
    on = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    arc = usable[row[on], column[on]].sum() / len(angles)
    distance = circle.distances(pattern.shape)
    core = pattern[usable & (distance < 0.8 * circle.radius)]
    if circle.radius < _MINIMUM_RADIUS:
        raise _no_disk(f"{where}, less than {_MINIMUM_RADIUS} px, which is a spot and no disk")
    if arc < _MINIMUM_ARC:
        raise _no_disk(f"{where}, and only {arc:.0%} of its edge is on good pixels")
    if circle.level < _MINIMUM_SIGNIFICANCE * circle.level_sigma:
        raise _no_disk(f"{where}, but its inside is not brighter than the noise")
    if circle.level < (_MINIMUM_CONTRAST - 1.0) * circle.background:
        raise _no_disk(f"{where}, but its inside is hardly brighter than its outside")
    if circle.edge > 0.9 * circle.radius or circle.radius_sigma > 0.15 * circle.radius:
        raise _no_disk(f"{where}, but it has no clear edge")
    if len(core) and core.mean() < circle.background + 0.4 * circle.level:
        raise _no_disk(f"{where}, but it is dark in the middle")


def _contrast(pattern: np.ndarray, usable: np.ndarray, circle: _Circle) -> float:
    """Mean inside over mean outside, the edge left out; inf over nothing, nan where no pixel is inside or outside."""
    distance = circle.distances(pattern.shape)
    inside = pattern[usable & (distance < circle.radius - circle.edge / 2)]
    outside = pattern[usable & (distance > circle.radius + circle.edge / 2)]
    if not len(inside) or not len(outside):
        return math.nan
    return float(inside.mean() / outside.mean()) if outside.mean() > 0 else math.inf
