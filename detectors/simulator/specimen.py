"""Specimens for the simulated detector: thin, weak phase objects made of Gaussian atomic columns.

Everything is a list of Gaussian bumps on a field that repeats in both directions, so the phase is known analytically
at every point and the scan is exactly periodic, as the Fourier transforms of the reconstruction assume. To that end a
lattice is stretched until a whole number of cells fits the field.

Lengths are Å, phases rad; positions are (row, column) in the frame of the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from detectors.errors import ConfigurationError
from stream.optics import AxesRelation

#: A Gaussian is cut off at this many standard deviations, where it has fallen to 4e-6 of its peak.
_REACH = 5.0
#: SrTiO3 [001] (Pm-3m) and gold, seen along [001].
STO_LATTICE_ANGSTROM = 3.905
GOLD_LATTICE_ANGSTROM = 4.078
#: Widths of a column: projected potential, thermal motion and source size together.
_COLUMN_SIGMA = 0.42
_ATOM_SIGMA = 0.50


@dataclass(frozen=True)
class ProjectedPhase:
    """The phase shift that a specimen gives the electron wave, on a periodic field.

    ``field`` (rows, columns) [Å]; ``positions`` float64 (count, 2) [Å]; ``sigmas`` [Å] and ``peaks`` [rad], float64
    (count,): standard deviation and height of each Gaussian column.
    """

    field: tuple[float, float]
    positions: np.ndarray
    sigmas: np.ndarray
    peaks: np.ndarray

    @property
    def bandwidth(self) -> float:
        """The frequency [1/Å] at which the narrowest column's Fourier transform has fallen to 1 % of its origin."""
        return math.sqrt(math.log(100) / 2) / (math.pi * float(self.sigmas.min()))

    def at(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The phase [rad] at any points ``rows``, ``columns`` [Å] of one common shape: float64 of that shape.

        Nearest periodic images only, so exact when the field is at least ten standard deviations wide. A direct sum:
        for a few points; :meth:`on_grid` is for images.
        """
        rows, columns = np.broadcast_arrays(np.asarray(rows, dtype=np.float64), np.asarray(columns, dtype=np.float64))
        total = np.zeros(rows.shape)
        for (row, column), sigma, peak in zip(self.positions, self.sigmas, self.peaks, strict=True):
            dr = np.remainder(rows - row + self.field[0] / 2, self.field[0]) - self.field[0] / 2
            dc = np.remainder(columns - column + self.field[1] / 2, self.field[1]) - self.field[1] / 2
            total += peak * np.exp(-(dr**2 + dc**2) / (2 * sigma**2))
        return total

    def on_grid(
        self,
        shape: tuple[int, int],
        pitch: tuple[float, float],
        origin: tuple[float, float] = (0.0, 0.0),
        axes: AxesRelation | None = None,
    ) -> np.ndarray:
        """The phase [rad] at the points ``origin + (i, j) * pitch`` [Å]: float64 of ``shape``.

        With ``axes`` the points are given in the frame of the *detector*: the specimen comes out turned as the
        detector sees it, sampled without any interpolation.
        """
        axes = axes or AxesRelation()
        reach = _REACH * float(self.sigmas.max())
        corners = np.array([(origin[a] - reach, origin[a] + (shape[a] - 1) * pitch[a] + reach) for a in (0, 1)])
        image, which = self._images(corners, axes)
        sigmas, peaks = self.sigmas[which], self.peaks[which]
        half = [math.ceil(reach / pitch[a]) for a in (0, 1)]
        profiles, firsts = [], []
        for a in (0, 1):
            place = (image[:, a] - origin[a]) / pitch[a]
            first = np.rint(place).astype(np.int64) - half[a]
            distance = (first[:, None] + np.arange(2 * half[a] + 1) - place[:, None]) * pitch[a]
            profiles.append(np.exp(-(distance**2) / (2 * sigmas[:, None] ** 2)))
            firsts.append(first + 2 * half[a])  # index into the padded array, never negative
        padded = np.zeros((shape[0] + 4 * half[0] + 2, shape[1] + 4 * half[1] + 2))
        height, width = 2 * half[0] + 1, 2 * half[1] + 1
        for r, c, row, column in zip(*firsts, profiles[0] * peaks[:, None], profiles[1], strict=True):
            padded[r : r + height, c : c + width] += row[:, None] * column
        return padded[2 * half[0] : 2 * half[0] + shape[0], 2 * half[1] : 2 * half[1] + shape[1]]

    def _images(self, corners: np.ndarray, axes: AxesRelation) -> tuple[np.ndarray, np.ndarray]:
        """Every periodic image inside ``corners`` (detector frame): positions (count, 2) and which column each is."""
        rows, columns = np.meshgrid(*corners, indexing="ij")
        seen = axes.to_scan(rows, columns)
        repeats = [
            np.arange(math.floor(seen[a].min() / self.field[a]) - 1, math.ceil(seen[a].max() / self.field[a]) + 1)
            * self.field[a]
            for a in (0, 1)
        ]
        shift_rows, shift_columns = (grid.ravel() for grid in np.meshgrid(*repeats, indexing="ij"))
        rows, columns = axes.to_detector(self.positions[:, :1] + shift_rows, self.positions[:, 1:] + shift_columns)
        (top, bottom), (left, right) = corners
        inside = (rows >= top) & (rows <= bottom) & (columns >= left) & (columns <= right)
        return np.stack([rows[inside], columns[inside]], axis=1), np.nonzero(inside)[0]


@dataclass(frozen=True)
class Specimen:
    """A kind of specimen. ``build(field, seed)`` lays it out on a ``field`` (rows, columns) [Å]."""

    name: str
    summary: str
    build: Callable[[tuple[float, float], int], ProjectedPhase]


class _Columns:
    """Gathers columns while a specimen is laid out."""

    def __init__(self, field: tuple[float, float]) -> None:
        self.field = field
        self.pieces: list[np.ndarray] = []

    def add(self, positions: np.ndarray, sigma: float, peaks: np.ndarray | float) -> None:
        wrapped = np.remainder(positions, self.field)
        rest = np.broadcast_to(sigma, len(positions)), np.broadcast_to(peaks, len(positions))
        self.pieces.append(np.column_stack([wrapped, *rest]))

    def build(self) -> ProjectedPhase:
        table = np.concatenate(self.pieces)
        return ProjectedPhase(self.field, table[:, :2].copy(), table[:, 2].copy(), table[:, 3].copy())


def lattice(field: tuple[float, float], seed: int = 0, antiphase: bool = False) -> ProjectedPhase:
    """SrTiO3 [001] with defects: missing strontium and oxygen columns and one column of a heavier element.

    ``antiphase`` shifts the middle half of the field by half a cell along the rows: two antiphase boundaries. A field
    of fewer than two cells a side stays perfect.
    """
    rng = np.random.default_rng([seed, 1])
    cells = [max(1, round(length / STO_LATTICE_ANGSTROM)) for length in field]
    cell = np.array([field[0] / cells[0], field[1] / cells[1]])
    corner = np.stack(np.meshgrid(*map(np.arange, cells), indexing="ij"), axis=-1).reshape(-1, 2)
    shifted = np.zeros_like(corner, dtype=np.float64)
    if antiphase:
        shifted[:, 0] = np.where(np.abs(corner[:, 1] / cells[1] - 0.5) < 0.25, 0.5, 0.0)
    origins = corner + shifted
    columns = _Columns(field)
    imperfect = min(cells) >= 2
    for site, sigma, peak, missing in (
        ((0.25, 0.25), _COLUMN_SIGMA, 0.30, 0.03),  # strontium
        ((0.75, 0.75), _COLUMN_SIGMA, 0.22, 0.0),  # titanium and oxygen
        ((0.75, 0.25), _COLUMN_SIGMA, 0.08, 0.03),  # oxygen
        ((0.25, 0.75), _COLUMN_SIGMA, 0.08, 0.03),
    ):
        peaks = np.full(len(origins), peak)
        if imperfect and missing:
            peaks[rng.choice(len(origins), max(1, round(missing * len(origins))), replace=False)] = 0.0
        elif imperfect:
            peaks[rng.integers(len(origins))] *= 1.7
        columns.add((origins + site)[peaks > 0] * cell, sigma, peaks[peaks > 0])
    return columns.build()


def particle(field: tuple[float, float], seed: int = 0) -> ProjectedPhase:
    """A round gold particle on an amorphous carbon film, with single heavy atoms beside it: nothing in it repeats."""
    rng = np.random.default_rng([seed, 2])
    size = np.array(field)
    columns = _Columns(field)
    # One carbon atom in each box of a coarse grid, anywhere in its box: disordered without clumps.
    boxes = np.maximum(1, np.rint(size / 1.9)).astype(int)
    corner = np.stack(np.meshgrid(*map(np.arange, boxes), indexing="ij"), axis=-1).reshape(-1, 2)
    columns.add((corner + rng.random(corner.shape)) * size / boxes, _ATOM_SIGMA, rng.uniform(0.01, 0.05, len(corner)))

    centre, radius = size * (0.45, 0.55), min(0.28 * min(field), 30.0)
    spacing = GOLD_LATTICE_ANGSTROM / 2
    count = math.ceil(radius / spacing)
    sites = np.stack(np.meshgrid(*[np.arange(-count, count + 1) * spacing] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    sites = sites[np.hypot(*sites.T) < radius]
    thickness = np.sqrt(1 - (np.hypot(*sites.T) / radius) ** 2)
    turned = np.stack(AxesRelation(math.radians(25)).to_scan(*sites.T), axis=1)
    columns.add(centre + turned, _COLUMN_SIGMA, 0.06 + 0.22 * thickness)

    away = rng.uniform(1.15, 1.65, 8) * radius
    angle = rng.uniform(0, 2 * np.pi, 8)
    columns.add(centre + np.stack([away * np.cos(angle), away * np.sin(angle)], axis=1), _COLUMN_SIGMA, 0.2)
    return columns.build()


SPECIMENS = {
    specimen.name: specimen
    for specimen in (
        Specimen("lattice", "SrTiO3 [001] with vacancies and a substituted column", lattice),
        Specimen("boundary", "the same with two antiphase boundaries", lambda f, s: lattice(f, s, antiphase=True)),
        Specimen("particle", "a gold particle and single atoms on amorphous carbon", particle),
    )
}


def specimen_named(name: str) -> Specimen:
    """Look a specimen up. Raises ``ConfigurationError`` naming the known ones."""
    try:
        return SPECIMENS[name]
    except KeyError:
        raise ConfigurationError(f"unknown specimen {name!r}; known are {', '.join(SPECIMENS)}") from None
