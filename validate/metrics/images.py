"""The pictures: signal to noise of the worst image, and the largest difference once they are 8-bit."""

from __future__ import annotations

import math

import numpy as np

from ddexport.recipe import Limits
from ddexport.validate.metrics._base import Comparison, DrawnPair, FloatArray, ImagePair
from ddexport.validate.report import Measurement


def compare(comparison: Comparison, limits: Limits) -> list[Measurement]:
    """PSNR and largest 8-bit difference of each pair of image batches, and the share that was left out."""
    rows: list[Measurement] = []
    for pair in comparison.images:
        rows += measure(pair, limits)
    for drawn in comparison.drawn:
        rows += [*measure(drawn.images(), limits), left_out(drawn, limits)]
    return rows


def left_out(pair: DrawnPair, limits: Limits) -> Measurement:
    """The share of the images that no row compares, because a token differs.

    A teacher's tokens are draws, one behind the other: the least difference of a logit leaves many images
    out.
    """
    rule = "drawn_left_out" if pair.by_teacher else "images_left_out"
    count, images = int((~pair.comparable).sum()), len(pair.comparable)
    counts, note = {"images": images, "left_out": count}, f"{count} of {images}"
    name, limit = "share of images left out", getattr(limits, rule)
    return Measurement("images", pair.scope, name, count / images, limit, note=note, counts=counts, rule=rule)


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
    rule = "pixel_psnr" if pair.pixels else "image_psnr"
    if pair.further and limits.decoder_psnr is not None:
        rule = "decoder_psnr"
    names = ("8-bit image PSNR, dB" if pair.pixels else "image PSNR, dB", "image, largest 8-bit difference")
    if not len(chosen):
        return [Measurement("images", pair.scope, name, math.nan, note=note, counts=counts) for name in names]
    ratios = [psnr(pair.expected[i], pair.got[i]) for i in chosen]
    differences = [largest_8bit(pair.expected[i], pair.got[i]) for i in chosen]
    # argmin and argmax both take the first NaN, so an image that is not finite is always the worst one.
    low, high = int(np.argmin(ratios)), int(np.argmax(differences))
    at_low = pair.places[chosen[low]] if ratios[low] != math.inf else ""
    at_high = pair.places[chosen[high]] if differences[high] else ""
    ratio = Measurement(
        "images", pair.scope, names[0], ratios[low], getattr(limits, rule), "at least", at_low, note, counts,
        rule,
    )  # fmt: skip
    difference = Measurement(
        "images", pair.scope, names[1], differences[high], limits.image_max, "at most", at_high, note, counts,
        "image_max",
    )  # fmt: skip
    return [ratio, difference]


def _to_8bit(image: FloatArray) -> FloatArray:
    return np.asarray(np.rint(np.clip(image, 0.0, 1.0) * np.float32(255.0)), dtype=np.float32)
