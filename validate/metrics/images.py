"""The pictures: signal to noise of the worst image, and the largest difference once they are 8-bit."""

from __future__ import annotations

import math

import numpy as np

from validate.metrics._base import Comparison, FloatArray, ImagePair, Limits, Measurement


def compare(comparison: Comparison, limits: Limits) -> list[Measurement]:
    """PSNR and largest 8-bit difference of each pair of image batches."""
    found: list[Measurement] = []
    for pair in comparison.images:
        found += measure(pair, limits)
    return found


def psnr(expected: FloatArray, got: FloatArray) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1] of one shape; infinite when equal."""
    error = float(np.mean((got.astype(np.float64) - expected) ** 2))
    if error == 0.0:
        return math.inf
    return -10.0 * math.log10(error) if error > 0.0 else math.nan


def largest_8bit(expected: FloatArray, got: FloatArray) -> float:
    """The largest difference of the values 0..255 written to a file; NaN if an image is not finite."""
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        return math.nan
    return float(np.abs(_to_8bit(got) - _to_8bit(expected)).max(initial=0.0))


def measure(pair: ImagePair, limits: Limits) -> list[Measurement]:
    """The worst image by PSNR, and the worst by largest difference, among the comparable ones."""
    chosen = np.flatnonzero(pair.comparable)
    left_out = len(pair.comparable) - len(chosen)
    counts = {"compared": len(chosen), "left_out": left_out}
    note = f"{left_out} of {len(pair.comparable)} left out: a token differs" if left_out else ""
    names = ("image PSNR, dB", "image, largest 8-bit difference")
    if not len(chosen):
        return [Measurement("images", pair.scope, name, math.nan, note=note, counts=counts) for name in names]
    ratios = [psnr(pair.expected[i], pair.got[i]) for i in chosen]
    differences = [largest_8bit(pair.expected[i], pair.got[i]) for i in chosen]
    # argmin and argmax both take the first NaN, so an image that is not finite is always the worst one.
    low, high = int(np.argmin(ratios)), int(np.argmax(differences))
    return [
        Measurement(
            "images",
            pair.scope,
            names[0],
            ratios[low],
            limit=float(limits.image_psnr),
            direction="at least",
            where=pair.places[chosen[low]] if ratios[low] != math.inf else "",
            note=note,
            counts=counts,
        ),
        Measurement(
            "images",
            pair.scope,
            names[1],
            differences[high],
            limit=float(limits.image_max),
            where=pair.places[chosen[high]] if differences[high] else "",
            note=note,
            counts=counts,
        ),
    ]


def _to_8bit(image: FloatArray) -> FloatArray:
    return np.asarray(np.rint(np.clip(image, 0.0, 1.0) * np.float32(255.0)), dtype=np.float32)
