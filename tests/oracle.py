"""Float64 brute force from the formulas: the answers that the program is held to. Independent of its code on purpose.

Everything is written out as in docs/mathematics.md with plain NumPy loops over the scan frequencies: slow and obvious.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def wavelength(energy_ev: float) -> float:
    h, m, e, c = 6.62607e-34, 9.109383e-31, 1.602177e-19, 299792458.0
    return 1e10 * h / np.sqrt(2 * m * e * energy_ev) / np.sqrt(1 + e * energy_ev / (2 * m * c * c))


def aperture(alpha: np.ndarray, semiangle: float, rolloff: float) -> np.ndarray:
    if rolloff == 0:
        return np.where(alpha < semiangle, 1.0, 0.0)
    edge = 0.5 * (1 + np.cos(np.pi * (alpha - semiangle + rolloff) / rolloff))
    return np.where(alpha <= semiangle - rolloff, 1.0, np.where(alpha <= semiangle, edge, 0.0))


def chi(
    ky: np.ndarray,
    kx: np.ndarray,
    coefficients: dict[str, tuple[float, float]],
    theta: float,
    transpose: bool,
    lam: float,
) -> np.ndarray:
    alpha, phi = lam * np.hypot(ky, kx), np.arctan2(kx, ky)
    total = np.zeros(np.shape(alpha))
    for name, (magnitude, azimuth) in coefficients.items():
        n, m = int(name[1]), int(name[2])
        turned = azimuth - theta
        if transpose:
            turned = np.pi / 2 - turned
        total = total + magnitude * alpha ** (n + 1) / (n + 1) * np.cos(m * (phi - turned))
    return 2 * np.pi / lam * total


def reconstruct(
    data: np.ndarray,
    *,
    method: str = "ssb",
    energy_ev: float,
    semiangle: float,
    step: tuple[float, float],
    pixel: tuple[float, float],
    centre: tuple[float, float],
    theta: float = 0.0,
    transpose: bool = False,
    rolloff: float = 2e-3,
    coefficients: dict[str, tuple[float, float]] | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """The complex object of a complete scan, complex128 (scan rows, scan columns). Angles in rad, lengths in Å.

    ``data`` (scan rows, scan columns, detector rows, detector columns); ``mask`` True = good pixel. Missing data must
    have been filled by the caller.
    """
    data = np.asarray(data, dtype=np.float64)
    ny, nx, height, width = data.shape
    lam = wavelength(energy_ev)
    good = np.ones((height, width), bool) if mask is None else mask
    ky = ((np.arange(height) - centre[0]) * pixel[0] / lam)[:, None] * np.ones((1, width))
    kx = ((np.arange(width) - centre[1]) * pixel[1] / lam)[None, :] * np.ones((height, 1))
    inside = good & (lam * np.hypot(ky, kx) <= semiangle)
    ky, kx = ky[inside], kx[inside]
    G = np.fft.fft2(data[:, :, inside], axes=(0, 1))
    c, s = np.cos(-theta), np.sin(-theta)

    def A(y: np.ndarray, x: np.ndarray) -> Any:
        soft = aperture(lam * np.hypot(y, x), semiangle, rolloff)
        return soft * np.exp(-1j * chi(y, x, coefficients or {}, theta, transpose, lam))

    def hard(y: np.ndarray, x: np.ndarray) -> np.ndarray:
        return lam * np.hypot(y, x) < semiangle

    psi = np.zeros((ny, nx), complex)
    for i, q_row in enumerate(np.fft.fftfreq(ny, step[0])):
        for j, q_column in enumerate(np.fft.fftfreq(nx, step[1])):
            qy, qx = q_row * c - q_column * s, q_row * s + q_column * c
            if transpose:
                qy, qx = qx, qy
            if lam * np.hypot(qy, qx) >= 2 * semiangle:
                continue
            if method == "ssb":
                gamma = A(ky, kx).conj() * A(ky - qy, kx - qx) - A(ky, kx) * A(ky + qy, kx + qx).conj()
                passes = np.abs(gamma) > 1e-3
                psi[i, j] = np.sum(G[i, j][passes] * gamma[passes].conj() / np.abs(gamma[passes]))
            else:
                passes = hard(ky, kx) & hard(ky - qy, kx - qx) & ~hard(ky + qy, kx + qx)
                psi[i, j] = 2 * np.sum(G[i, j][passes])
    mean_intensity = data[:, :, good].sum(axis=2).mean()
    psi[0, 0] = ny * nx * mean_intensity
    return np.fft.ifft2(psi) / mean_intensity


def from_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of :func:`reconstruct` from the root attributes of a file in shared/data."""
    coefficients = {}
    for key, value in attributes.items():
        if key.startswith("C") and key.endswith("_A") and value:
            symbol = key[:3]
            coefficients[symbol] = (float(value), float(attributes.get(f"phi{symbol[1:]}_rad", 0.0)))
    return {
        "energy_ev": float(attributes["energy_eV"]),
        "semiangle": float(attributes["semiangle_mrad"]) * 1e-3,
        "step": tuple(attributes["scan_step_A"]),
        "pixel": tuple(np.asarray(attributes["det_pixel_mrad"]) * 1e-3),
        "centre": tuple(attributes["bf_centre_px"]),
        "theta": np.deg2rad(attributes["rotation_deg"]),
        "transpose": bool(attributes["transpose"]),
        "coefficients": coefficients,
    }


def relative_error(answer: np.ndarray, reference: np.ndarray) -> float:
    """Norm of the difference of the mean-free objects over the norm of the mean-free reference."""
    answer, reference = answer - answer.mean(), reference - reference.mean()
    return float(np.linalg.norm(answer - reference) / np.linalg.norm(reference))


def coefficients(user: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Å and degrees by ``C12``, ``phi12``, ... as (magnitude, azimuth [rad]) by symbol."""
    return {
        key: (value, float(np.deg2rad(user.get(f"phi{key[1:]}", 0.0)))) for key, value in user.items() if key[0] == "C"
    }
