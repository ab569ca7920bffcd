"""From the features of the images to the rows of a report: figures, their intervals, and what has a limit.

Both sides are resampled in step: one bootstrap draw of the images serves both, so that in the interval of a
difference all cancels that the sides share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.validate.bootstrap import interval
from ddexport.validate.features._base import Readings
from ddexport.validate.metrics.frechet import BLOCK, FrechetTo, Gaussian, GroupedMoments, gaussian
from ddexport.validate.metrics.inception_score import GROUPS as SCORE_GROUPS
from ddexport.validate.metrics.inception_score import SPLITS, resampled_scores
from ddexport.validate.metrics.precision_recall import NEIGHBOURS, coverage
from ddexport.validate.report import Measurement

if TYPE_CHECKING:
    from ddexport.validate.fid.references import Reference

Float64Array: TypeAlias = npt.NDArray[np.float64]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]

METRIC, FID = "fid", "FID"
DIFFERENCE, DISTANCE, CHANGED = "FID, difference", "feature distance, paired", "images that differ"
INCREASE, READ = "FID, increase", "share read as the class"
VISIBLE = 2  # an 8-bit difference that rounding at a tie cannot make: `image_max` of the float32 limits
WIDE = 512  # features: the moments of a group of images take memory, their resampled distances time
GROUPS, GROUPS_WIDE = 100, 20
SAMPLE = 10_000  # images a set whose neighbours are sought
SEED = 0  # of the bootstrap
APART = (
    "other seeds and labels explain about 0.1; other Inception weights or resizing, random weights or another"
    " precision explain more"
)


@dataclass(frozen=True)
class Limits:
    """What is allowed in one precision: the manifest's `parity.fid.limits`, or with a further decoder
    `parity.fid.decoders`; None: shown, but not held."""

    difference: float | None = None
    distance: float | None = None
    changed: float | None = None
    provisional: bool = False
    increase: float | None = None
    read: float | None = None


def measure(
    scope: str,
    sides: Sequence[Readings],
    labels: npt.NDArray[np.int64],
    apart: npt.NDArray[np.uint8] | None,
    compared: Reference | None,
    limits: Limits,
    resamples: int,
    published: float | None = None,
) -> list[Measurement]:
    """All rows of one schedule.

    sides: of the bundle, and of PyTorch if it was run. labels (N,): what was asked for. apart (N,): the
    largest 8-bit difference of each image. resamples: below 2 there are no intervals.
    published: FID, shown beside the measured one.
    """
    rows: list[Measurement] = []
    if compared is None:
        fits = [gaussian(side.features) for side in sides]
    else:
        fits, rows = _fid(scope, sides, compared.frechet, limits, resamples)
        if published is not None:
            note = f"measured minus published: {rows[0].value - published:+.2f}; {APART}"
            rows.append(Measurement(METRIC, scope, "FID, published", published, note=note))
    rows += _scores(scope, sides, resamples)
    rows += _read(scope, sides, labels, limits, resamples)
    if compared is not None and compared.features is not None:
        rows += _neighbours(scope, sides, compared.features, resamples)
    if apart is not None:
        rows += _between(scope, sides, fits, apart, limits)
    return rows


def _fid(
    scope: str, sides: Sequence[Readings], to_reference: FrechetTo, limits: Limits, resamples: int
) -> tuple[list[Gaussian], list[Measurement]]:
    """The fits to both sets, and the rows of their distances to the reference set."""
    count, width = sides[0].features.shape
    groups = GROUPS if width <= WIDE else GROUPS_WIDE
    filled = min(groups, count)
    rng = np.random.default_rng(SEED)
    drawn = [rng.choice(filled, filled) for _ in range(resamples)]
    fits, values, resampled = [], [], []
    for side in sides:  # one after the other: the moments of wide features are large
        moments = GroupedMoments.of(side.features, groups)
        fit = moments.weighted(np.ones(groups))
        value, rough = to_reference.distance(fit), to_reference.rough_distance(fit)
        sets = (moments.weighted(np.bincount(chosen, minlength=groups)) for chosen in drawn)
        # Only the spread of the rough distance is used: it is moved to the exact one.
        resampled.append([to_reference.rough_distance(other) - rough + value for other in sets])
        fits.append(fit)
        values.append(value)
    rows = _figure(scope, FID, values, np.array(resampled))
    if len(sides) > 1:
        rows[-1:] = [_held(rows[-1], limits), *_increase(rows[-1], values[1], limits)]
    return fits, rows


def _increase(row: Measurement, full: float, limits: Limits) -> list[Measurement]:
    """With a further decoder: the upper end of the interval of the FID's difference, as a share of the FID
    with the full decoder."""
    if limits.increase is None or row.low is None or row.high is None:
        return []
    note = f"upper end of {row.value / full:+.3g} [{row.low / full:+.3g}, {row.high / full:+.3g}]"
    return [
        Measurement(METRIC, row.scope, INCREASE, row.high / full, limits.increase, note=note, rule=INCREASE)
    ]


def _read(
    scope: str, sides: Sequence[Readings], labels: npt.NDArray[np.int64], limits: Limits, resamples: int
) -> list[Measurement]:
    """The share of the images that a classifier reads as the class that was asked for."""
    if limits.read is None or any(side.probabilities is None for side in sides):
        return []
    right = [np.asarray(side.probabilities).argmax(1) == labels for side in sides]
    rng = np.random.default_rng(SEED)
    drawn = [rng.integers(len(labels), size=len(labels)) for _ in range(resamples)]
    resampled = np.array([[side[chosen].mean() for chosen in drawn] for side in right])
    rows = _figure(scope, READ, [float(side.mean()) for side in right], resampled)
    held, note = abs(rows[-1].value), f"{rows[-1].value:+.4f} [{rows[-1].low:+.4f}, {rows[-1].high:+.4f}]"
    rows[-1] = Measurement(METRIC, scope, f"{READ}, difference", held, limits.read, note=note, rule=READ)
    return rows


def _held(row: Measurement, limits: Limits) -> Measurement:
    """What is held is how far the interval reaches from zero: fewer images widen it, and never the limit."""
    ends = [end for end in (row.value, row.low, row.high) if end is not None]
    text, note = f"{row.value:+.4g}", ""
    if row.low is not None and row.high is not None:
        text, note = f"{text} [{row.low:+.3g}, {row.high:+.3g}]", "far end of "
    return Measurement(
        METRIC, row.scope, DIFFERENCE, float(np.abs(ends).max()),  # NaN where one is
        limits.difference, note=note + text, rule=DIFFERENCE,
    )  # fmt: skip


def _scores(scope: str, sides: Sequence[Readings], resamples: int) -> list[Measurement]:
    """Inception Score; groups are drawn anew inside each split, the same ones on both sides."""
    found = [side.probabilities for side in sides if side.probabilities is not None]
    if not found:
        return []
    splits = SPLITS if len(found[0]) >= SPLITS else 1
    rng = np.random.default_rng(SEED)
    filled = np.arange(min(SCORE_GROUPS, len(found[0])))
    times = np.ones((1 + resamples, SCORE_GROUPS))
    for row in times[1:]:
        chosen = [rng.choice(filled[split::splits], len(filled[split::splits])) for split in range(splits)]
        row[:] = np.bincount(np.concatenate(chosen), minlength=SCORE_GROUPS)
    scores = np.array([resampled_scores(p, times, splits) for p in found])
    return _figure(scope, "Inception Score", list(scores[:, 0]), scores[:, 1:])


def _neighbours(scope: str, sides: Sequence[Readings], real: FloatArray, resamples: int) -> list[Measurement]:
    """Precision and recall of equal numbers of images; [] where there are too few for neighbours."""
    samples = [_spread_out(side.features) for side in sides]
    real = _spread_out(real)
    count = min(len(real), len(samples[0]))
    if count <= NEIGHBOURS:
        return []
    rows = []
    hits = zip(*(coverage(sample[:count], real[:count]) for sample in samples), strict=True)
    for name, sets in zip(("precision", "recall"), hits, strict=True):
        rng = np.random.default_rng(SEED)
        drawn = [rng.integers(count, size=count) for _ in range(resamples)]
        resampled = np.array([[hit[chosen].mean() for chosen in drawn] for hit in sets])
        rows += _figure(scope, name, [float(hit.mean()) for hit in sets], resampled)
    return rows


def _spread_out(features: FloatArray) -> FloatArray:
    """At most SAMPLE rows, evenly from all: a folder is in the order of its names."""
    rows = np.linspace(0, len(features) - 1, min(len(features), SAMPLE)).astype(np.int64)
    return np.asarray(features[rows])


def _figure(scope: str, name: str, values: list[float], resampled: Float64Array) -> list[Measurement]:
    """Rows of a figure of one or two sides, and of their difference; values resampled (sides, R)."""
    titles = ["bundle", "PyTorch", "difference"][: len(values) + (len(values) > 1)]
    if len(values) > 1:
        values = [*values, values[0] - values[1]]
        resampled = np.concatenate([resampled, resampled[:1] - resampled[1:2]])
    rows = []
    for title, value, spread in zip(titles, values, resampled, strict=True):
        low, high, bias = interval(value, spread) if len(spread) > 1 else (None, None, None)
        note = f"bias {bias:+.2g}" if name == FID and bias is not None else ""
        rows.append(
            Measurement(METRIC, scope, f"{name}, {title}", float(value), note=note, low=low, high=high)
        )
    return rows


def _between(
    scope: str, sides: Sequence[Readings], fits: list[Gaussian], apart: npt.NDArray[np.uint8], limits: Limits
) -> list[Measurement]:
    """The two sets, image by image and as sets."""
    images, changed, identical = len(apart), int((apart > VISIBLE).sum()), int((apart == 0).sum())
    worst = int(apart.argmax())
    # Mean squared distance of a pair over that of two independent images, which is twice the variance.
    squared = _mean_squared(*(side.features for side in sides))
    spread = 2 * float(np.trace(fits[1].covariance))
    relative = 0.0 if squared == 0.0 else squared / spread if spread else float("inf")
    between = FrechetTo(fits[1]).distance(fits[0])
    return [
        Measurement(
            METRIC, scope, DISTANCE, relative, limits.distance,
            note="1 for unrelated images", rule=DISTANCE,
        ),
        Measurement(
            METRIC, scope, CHANGED, changed / images, limits.changed,
            note=f"{changed:,} of {images:,} by more than {VISIBLE} of 255",
            counts={"changed": changed, "identical": identical, "images": images}, rule=CHANGED,
        ),
        Measurement(
            METRIC, scope, "largest 8-bit difference", float(apart[worst]),
            where=f"image {worst}" if apart[worst] else "",
        ),
        Measurement(METRIC, scope, "Frechet distance, set to set", between),
    ]  # fmt: skip


def _mean_squared(first: FloatArray, second: FloatArray) -> float:
    """Of the distance of row i (N, D) to row i (N, D), in double precision."""
    total = 0.0
    for start in range(0, len(first), BLOCK):
        rows = slice(start, start + BLOCK)
        total += float(((first[rows].astype(np.float64) - second[rows]) ** 2).sum())
    return total / len(first)
