"""Electron optics: wavelength, aperture, aberrations, and the relation of scan and detector axes.

A leaf module: the reconstruction takes the probe from here, and so does the simulated detector. Functions of arrays
take NumPy or CuPy arrays and give back the same kind.

Conventions, as in py4DSTEM and abTEM: array axes are (row, column) everywhere; ``x`` of the literature is the row.
Angles turn from the row axis towards the column axis. ``C10 = -defocus``. Lengths are Å, angles rad, energies eV;
only configuration and messages carry other units, and say so in their names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from detectors.errors import ConfigurationError
from stream.array import namespace

# CODATA values as REFERENCE implementations (py4DSTEM 0.14) round them, so that wavelengths agree to the last digit.
PLANCK_J_S = 6.62607e-34
ELECTRON_MASS_KG = 9.109383e-31
ELEMENTARY_CHARGE_C = 1.602177e-19
SPEED_OF_LIGHT_M_PER_S = 299792458.0

#: Every coefficient C_nm up to fifth order: n + m odd, m <= n + 1 (Krivanek's notation).
ABERRATION_SYMBOLS: tuple[str, ...] = tuple(f"C{n}{m}" for n in range(1, 6) for m in range(n + 2) if (n + m) % 2 == 1)


def electron_wavelength(energy_ev: float) -> float:
    """Relativistic de Broglie wavelength.

    Parameters: ``energy_ev`` kinetic energy [eV], > 0. Returns the wavelength [Å]; 200 keV gives 0.0250793374 Å.
    Raises ``ConfigurationError`` when the energy is not a positive finite number.
    Source: lambda = h / sqrt(2 m e E (1 + e E / (2 m c^2))), e.g. Kirkland, Advanced Computing in Electron Microscopy.
    """
    if not (math.isfinite(energy_ev) and energy_ev > 0):
        raise ConfigurationError(f"the electron energy must be a positive number of eV, got {energy_ev!r}")
    ee = ELEMENTARY_CHARGE_C * energy_ev
    non_relativistic = PLANCK_J_S / math.sqrt(2 * ELECTRON_MASS_KG * ee)
    return 1e10 * non_relativistic / math.sqrt(1 + ee / (2 * ELECTRON_MASS_KG * SPEED_OF_LIGHT_M_PER_S**2))


#: No lens has larger coefficients [Å], C50 of several metres included; beyond, phases lose all precision.
_LARGEST = 1e12


@dataclass(frozen=True)
class Aberrations:
    """Aberration coefficients of the probe-forming lens, in the frame of the *scan* axes.

    ``coefficients`` maps a symbol such as ``C12`` to (magnitude [Å], azimuth phi_nm [rad]). Coefficients with m = 0
    (C10, C30, C50) have azimuth 0. ``C10`` is minus the defocus: an underfocused lens has a negative C10.
    """

    coefficients: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_user(cls, values: Mapping[str, float]) -> Aberrations:
        """Build from configuration keys: ``C10``, ``C12``, ``phi12`` ... with lengths in Å and azimuths in degrees.

        Raises ``ConfigurationError`` for an unknown symbol, a non-finite value, or an azimuth of a round aberration.
        """
        magnitudes: dict[str, float] = {}
        azimuths: dict[str, float] = {}
        for key, value in values.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not abs(number) <= _LARGEST:
                raise ConfigurationError(f"aberration {key} must be a number of at most {_LARGEST:g}, got {value!r}")
            match = re.fullmatch(r"(C|phi)(\d)(\d)", key)
            symbol = f"C{match[2]}{match[3]}" if match else key
            if symbol not in ABERRATION_SYMBOLS:
                raise ConfigurationError(
                    f"unknown aberration {key!r}; known are {', '.join(ABERRATION_SYMBOLS)} [Å] and their azimuths "
                    "phi12, phi21, ... [degrees]"
                )
            if key.startswith("phi"):
                if symbol.endswith("0"):
                    raise ConfigurationError(f"{symbol} is round and has no azimuth; remove {key}")
                azimuths[symbol] = math.radians(number)
            else:
                magnitudes[symbol] = number
        if orphans := [f"phi{s[1:]}" for s in azimuths if s not in magnitudes]:
            raise ConfigurationError(f"{', '.join(orphans)} given without the coefficient it belongs to")
        return cls({s: (c, azimuths.get(s, 0.0)) for s, c in sorted(magnitudes.items()) if c != 0.0})

    def to_user(self) -> dict[str, float]:
        """The inverse of :meth:`from_user`: Å and degrees, ready for a configuration file."""
        out: dict[str, float] = {}
        for symbol, (magnitude, azimuth) in self.coefficients.items():
            out[symbol] = magnitude
            if not symbol.endswith("0"):
                out[f"phi{symbol[1:]}"] = math.degrees(azimuth)
        return out

    def table(self, axes: AxesRelation) -> np.ndarray:
        """The coefficients in the *detector* frame as rows (n, m, C_nm [Å], phi_nm [rad]), float64, shape (count, 4).

        The azimuth turns with the axes: phi -> phi - theta, and with transposed axes -> pi/2 - (phi - theta).
        """
        rows = []
        for symbol, (magnitude, azimuth) in self.coefficients.items():
            turned = azimuth - axes.rotation_rad
            rows.append((int(symbol[1]), int(symbol[2]), magnitude, math.pi / 2 - turned if axes.transpose else turned))
        return np.array(rows, dtype=np.float64).reshape(-1, 4)


@dataclass(frozen=True)
class AxesRelation:
    """How the scan axes lie on the detector: Q_detector = T R(-theta) Q_scan.

    ``rotation_rad`` is theta, py4DSTEM's ``force_com_rotation``; ``transpose`` swaps the two components afterwards.
    """

    rotation_rad: float = 0.0
    transpose: bool = False

    def flipped(self, rows: bool = False, columns: bool = False) -> AxesRelation:
        """The relation for frames whose rows (columns) come in reverse order, in the coordinates of the frames as sent.

        A flip is a quarter turn and a transposition: diag(-1, 1) = T R(-90°) and diag(1, -1) = T R(90°). Behind a
        transposition, T R(p) T = R(-p).
        """
        rotation, transpose = self.rotation_rad, self.transpose
        for flip, quarter in ((rows, math.pi / 2), (columns, -math.pi / 2)):
            if flip:
                rotation, transpose = rotation + (-quarter if transpose else quarter), not transpose
        return AxesRelation(rotation, transpose)

    def to_detector(self, q_row: Any, q_column: Any) -> tuple[Any, Any]:
        """Turn scan-frame components into detector-frame components (any array type, same shape and unit)."""
        cos, sin = math.cos(-self.rotation_rad), math.sin(-self.rotation_rad)
        row, column = q_row * cos - q_column * sin, q_row * sin + q_column * cos
        return (column, row) if self.transpose else (row, column)

    def to_scan(self, k_row: Any, k_column: Any) -> tuple[Any, Any]:
        """The inverse: detector-frame components in the scan frame, e.g. for the centre of mass."""
        if self.transpose:
            k_row, k_column = k_column, k_row
        cos, sin = math.cos(self.rotation_rad), math.sin(self.rotation_rad)
        return k_row * cos - k_column * sin, k_row * sin + k_column * cos


#: Orientation of the frames as sent -> (rows in reverse order, columns in reverse order), before ``AxesRelation``.
ORIENTATIONS: dict[str, tuple[bool, bool]] = {
    "as-sent": (False, False),
    "flip-rows": (True, False),
    "flip-columns": (False, True),
    "rotate-180": (True, True),
    # ARINA detectors mirrored their images along the columns until firmware release 2024.1.
    "arina-before-2024.1": (False, True),
}


def aberration_phase(angle_row: Any, angle_column: Any, table: np.ndarray, wavelength: float) -> Any:
    """chi = (2 pi / lambda) sum_nm C_nm alpha^(n+1) / (n+1) cos(m (phi - phi_nm)), in rad, float64.

    ``angle_row``, ``angle_column``: components of the scattering angle [rad], any common shape, in the frame of
    ``table`` (see :meth:`Aberrations.table`); ``wavelength`` [Å]. Source: Krivanek et al., Ultramicroscopy 78 (1999) 1.
    """
    # alpha^(n+1) cos(m (phi - phi_nm)) = (alpha^2)^((n+1-m)/2) Re[(w exp(-i phi_nm))^m] with w = alpha exp(i phi):
    # a polynomial (n + m is odd), so that neither roots nor arc tangents are taken of millions of points.
    alpha_squared = angle_row * angle_row + angle_column * angle_column
    chi = 0.0 * alpha_squared
    for n, m, magnitude, azimuth in table:
        term = 2 * math.pi / wavelength * magnitude / (n + 1)
        for _ in range(int(n + 1 - m) // 2):
            term = term * alpha_squared
        if m:
            cos, sin = math.cos(azimuth), math.sin(azimuth)
            along, across = angle_row * cos + angle_column * sin, angle_column * cos - angle_row * sin
            real, imag = along, across
            for _ in range(int(m) - 1):
                real, imag = real * along - imag * across, real * across + imag * along
            term = term * real
        chi += term
    return chi


def aperture_amplitude(alpha: Any, semiangle: float, rolloff: float) -> Any:
    """Amplitude of the probe-forming aperture at scattering angle ``alpha`` [rad]: float32 in 0..1, shape of ``alpha``.

    1 inside ``semiangle - rolloff``, a raised cosine down to 0 at ``semiangle``; a hard edge (alpha < semiangle) when
    ``rolloff`` is 0. All angles in rad. Source: py4DSTEM's ComplexProbe, restated.
    """
    xp = namespace(alpha)
    if rolloff == 0:
        return (alpha < semiangle).astype(np.float32)
    depth = xp.clip((alpha - (semiangle - rolloff)) / rolloff, 0.0, 1.0).astype(np.float32)
    return np.float32(0.5) + np.float32(0.5) * xp.cos(np.float32(np.pi) * depth)


@dataclass(frozen=True)
class Probe:
    """The electron probe in the Fourier domain: A(k) = aperture * exp(-i chi).

    ``energy_ev`` [eV], ``semiangle`` and ``rolloff`` [rad], ``aberrations`` in the scan frame, ``axes`` the relation
    of scan and detector. All methods take and return detector-frame quantities.
    """

    energy_ev: float
    semiangle: float
    rolloff: float = 2e-3
    aberrations: Aberrations = Aberrations()
    axes: AxesRelation = AxesRelation()

    @property
    def wavelength(self) -> float:
        """Wavelength [Å]."""
        return electron_wavelength(self.energy_ev)

    @property
    def cutoff(self) -> float:
        """2 alpha / lambda [1/Å]: no scan frequency at or beyond it reaches the bright field twice."""
        return 2 * self.semiangle / self.wavelength

    def aperture(self, k_row: Any, k_column: Any) -> Any:
        """The aperture's amplitude alone at detector-frame k [1/Å]: float32, shape of ``k_row`` and ``k_column``."""
        xp = namespace(k_row)
        alpha = self.wavelength * xp.sqrt(k_row * k_row + k_column * k_column)
        return aperture_amplitude(alpha, self.semiangle, self.rolloff)

    def __call__(self, k_row: Any, k_column: Any) -> Any:
        """A(k) for detector-frame k [1/Å] of any common shape.

        float32 where there are no aberrations (A is real then, and everything made from it half the work), else
        complex64. Angles and chi are float64, reduced to one turn before sine and cosine are taken in single
        precision, which is an order of magnitude faster and accurate to 1e-7.
        """
        amplitude = self.aperture(k_row, k_column)
        if not self.aberrations.coefficients:
            return amplitude
        xp = namespace(amplitude)
        wavelength = self.wavelength
        chi = aberration_phase(wavelength * k_row, wavelength * k_column, self.aberrations.table(self.axes), wavelength)
        phase = (chi - 2 * np.pi * xp.rint(chi / (2 * np.pi))).astype(np.float32)
        out = xp.empty(amplitude.shape, dtype=np.complex64)
        out.real = amplitude * xp.cos(phase)
        out.imag = -amplitude * xp.sin(phase)
        return out
