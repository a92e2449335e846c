"""The power spectrum of an unfinished image. No Qt."""

from __future__ import annotations

import numpy as np
import scipy.fft


def power_spectrum(image: np.ndarray) -> np.ndarray | None:
    """abs(fft2)^2 of what has been acquired, frequency 0 in the middle.

    ``image``: float (rows, columns), NaN where empty. Returns float32 of the same shape [unit of ``image`` squared],
    normalised to the acquired pixels; None while fewer than four rows hold data.
    """
    finite = np.isfinite(image)
    rows = np.flatnonzero(finite.any(axis=1))
    if rows.size < 4:
        return None
    # A window over the acquired rows only: the edge of an unfinished scan would draw a bright streak.
    window = np.zeros(image.shape[0], dtype=np.float32)
    span = rows[-1] - rows[0] + 1
    window[rows[0] : rows[0] + span] = np.hanning(span + 2)[1:-1]
    with np.errstate(over="ignore", invalid="ignore"):  # absurd pixels make infinite power, which is drawn as a hole
        filled = np.where(finite, image - image[finite].mean(), 0).astype(np.float32)
        filled *= window[:, None] * np.hanning(image.shape[1] + 2)[1:-1].astype(np.float32)
        half = np.abs(scipy.fft.rfft2(filled)) ** 2 / float(finite.sum()) ** 2
    return np.fft.fftshift(_whole(half, image.shape[1]))


def _whole(half: np.ndarray, columns: int) -> np.ndarray:
    """The full plane from the half that a real transform gives: P(-q) = P(q)."""
    full = np.empty((half.shape[0], columns), dtype=np.float32)
    full[:, : half.shape[1]] = half
    mirrored = half[:, 1 : columns - half.shape[1] + 1][:, ::-1]
    full[0, half.shape[1] :] = mirrored[0]
    full[1:, half.shape[1] :] = mirrored[:0:-1]
    return full
