"""From what a run counted to its figures, their intervals, and the measurements that are held to limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ddexport.validate.bootstrap import bootstrap, figure
from ddexport.validate.fid_report import CHANGED, DIFFERENCE, DISTANCE, FID, Estimate, Figure, scope_of
from ddexport.validate.metrics._base import IntArray, Measurement
from ddexport.validate.metrics.frechet import FrechetTo, frechet_distance, require_samples
from ddexport.validate.metrics.inception_score import SPLITS, ScoreSums
from ddexport.validate.metrics.kernel_distance import kernel_distance
from ddexport.validate.metrics.precision_recall import NEIGHBOURS, coverage
from ddexport.validate.paired import BUNDLE, REFERENCE, VISIBLE, PairedRun, PairTally, SetTally
from ddexport.validate.statistics import Float64Array, FloatArray, GaussianFit, GroupedMoments, TooFewSamples

if TYPE_CHECKING:
    from ddexport.validate.references import Reference

METRIC = "fid"
PROTOCOL_IMAGES, PROTOCOL_FEATURES = 50_000, "inception"  # what published figures are measured with
APART = (
    "other seeds and labels explain about 0.1; more may come of other Inception weights or resizing,"
    " random weights, another precision"
)
KID, SCORE, PRECISION, RECALL = "KID", "Inception Score", "precision", "recall"

Trio: TypeAlias = tuple[Estimate, Estimate | None, Estimate | None]  # bundle, reference, difference


@dataclass(frozen=True)
class Gate:
    """The limits of one precision; None: shown, but not held."""

    difference: float | None = None
    distance: float | None = None
    changed: float | None = None
    provisional: bool = False


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: `resamples` 0 leaves them out."""

    resamples: int
    seed: int = 0
    allow_few: bool = False


def figures_of(run: PairedRun, compared: Reference | None, how: Resampling) -> list[Figure]:
    """Every figure that the features and the reference set allow, schedule by schedule."""
    figures: list[Figure] = []
    to_reference = FrechetTo(compared.moments, allow_few=how.allow_few) if compared else None
    for steps in run.schedules:
        sets = [run.sets[side, steps] for side in (BUNDLE, REFERENCE) if (side, steps) in run.sets]
        trios: dict[str, Trio] = {}
        if to_reference is not None:
            trios[FID] = _frechet(sets, to_reference, how)
        if compared is not None and compared.features is not None:
            features = np.asarray(compared.features)
            trios |= _neighbours(sets, features, how) | _kernel(sets, features, how)
        scores = [tally.scores for tally in sets if tally.scores is not None]
        if scores:
            trios[SCORE] = _scores(scores, how)
        order = [name for name in (FID, KID, SCORE, PRECISION, RECALL) if name in trios]
        figures += [Figure(steps, name, *trios[name]) for name in order]
    return figures


def measurements_of(run: PairedRun, figures: list[Figure], gate: Gate, how: Resampling) -> list[Measurement]:
    """The difference and the distance of the two sets, held to the limits. Empty for a bundle alone."""
    measurements: list[Measurement] = []
    for steps, pair in run.pairs.items():
        fids = [figure for figure in figures if figure.steps == steps and figure.name == FID]
        measurements += [
            _difference(figure.steps, figure.difference, gate) for figure in fids if figure.difference
        ]
        measurements += _between(steps, pair, run, gate, how)
    return measurements


def published_of(
    run: PairedRun, compared: Reference | None, figures: list[Figure], published: Mapping[str, Any]
) -> list[Measurement]:
    """The published FID of every schedule that has one, for information; [] where the protocol is another.

    published: by the number of steps, as the manifest has it.
    """
    extractor, order = run.extractor, run.order
    features = extractor.name == PROTOCOL_FEATURES and not extractor.random_weights
    statistics = compared is not None and compared.features is None
    if not (features and statistics and order.images == PROTOCOL_IMAGES and order.per_class is None):
        return []
    return [
        Measurement(
            METRIC, scope_of(figure.steps), "FID, published", value,
            note=f"measured less published: {figure.bundle.value - value:+.2f}; {APART}",
        )
        for figure in figures
        if figure.name == FID and isinstance(value := published.get(str(figure.steps)), (int, float))
    ]  # fmt: skip


def _difference(steps: int, difference: Estimate, gate: Gate) -> Measurement:
    """What is held is how far the interval reaches from zero: fewer images widen it, and never the limit."""
    ends = [end for end in (difference.value, difference.low, difference.high) if end is not None]
    note = f"{'far end of ' if difference.low is not None else ''}{difference.text(sign=True)}"
    largest = float(np.abs(ends).max())  # NaN where one is
    return Measurement(
        METRIC, scope_of(steps), DIFFERENCE, largest, gate.difference, note=note, rule=DIFFERENCE
    )


def _between(steps: int, pair: PairTally, run: PairedRun, gate: Gate, how: Resampling) -> list[Measurement]:
    scope = scope_of(steps)
    bundle, reference = (run.sets[side, steps].moments.total() for side in (BUNDLE, REFERENCE))
    images = int(pair.count.sum())
    changed, identical = int(pair.changed.sum()), int(pair.identical)
    apart = f"image {int(pair.worst)}" if pair.largest else ""
    return [
        Measurement(
            METRIC, scope, DISTANCE, _relative(pair, reference), gate.distance,
            note="1 for unrelated images", rule=DISTANCE,
        ),
        Measurement(
            METRIC, scope, CHANGED, changed / images, gate.changed,
            note=f"{changed:,} of {images:,} by more than {VISIBLE} of 255",
            counts={"changed": changed, "identical": identical, "images": images}, rule=CHANGED,
        ),
        Measurement(METRIC, scope, "largest 8-bit difference", float(pair.largest), where=apart),
        Measurement(
            METRIC, scope, "Frechet distance, set to set",
            frechet_distance(bundle, reference, allow_few=how.allow_few),
        ),
    ]  # fmt: skip


def _relative(pair: PairTally, reference: GaussianFit) -> float:
    """Mean squared distance of a pair over that of two independent images, which is twice the variance."""
    squared, spread = pair.mean_squared(), 2 * float(np.trace(reference.covariance))
    return 0.0 if squared == 0.0 else squared / spread if spread else float("inf")


def _frechet(sets: list[SetTally], to_reference: FrechetTo, how: Resampling) -> Trio:
    groups = [tally.moments for tally in sets]
    totals = [group.total() for group in groups]
    for total in totals:
        require_samples(total, how.allow_few)
    values = [to_reference.distance(total) for total in totals]
    rough = [to_reference.rough_distance(total) for total in totals]

    def drawn(side: int) -> Callable[[IntArray], float]:
        # Only the spread of the rough distance is used: it is shifted to the exact one.
        return lambda times: (
            to_reference.rough_distance(groups[side].weighted(times)) - rough[side] + values[side]
        )

    return _resampled(values, [drawn(side) for side in range(len(sets))], groups[0], how)


def _resampled(
    values: list[float], drawn: list[Callable[[IntArray], float]], groups: GroupedMoments, how: Resampling
) -> Trio:
    """Values of one or two sides, resampled in step: one draw of groups for both and for their difference."""
    filled = sum(group.count > 0 for group in groups.groups)
    if how.resamples < 2 or filled < 2:
        return _alone(values)
    rng = np.random.default_rng(how.seed)
    draws = [groups.multiplicities(rng) for _ in range(how.resamples)]
    return _spread(values, np.array([[of(times) for of in drawn] for times in draws]))


def _scores(sums: list[ScoreSums], how: Resampling) -> Trio:
    """Groups are drawn anew inside each split, the same ones on both sides."""
    splits = SPLITS if sums[0].count >= SPLITS else 1
    values = [side.score(splits).mean for side in sums]
    if how.resamples < 2:
        return _alone(values)
    rng = np.random.default_rng(how.seed)
    member = np.arange(len(sums[0].counts)) % splits
    filled = [np.flatnonzero((member == split) & (sums[0].counts > 0)) for split in range(splits)]
    rows = []
    for _ in range(how.resamples):
        chosen = np.concatenate([rng.choice(groups, len(groups)) for groups in filled])
        times = np.bincount(chosen, minlength=len(member))
        rows.append([_weighted(side, times).score(splits).mean for side in sums])
    return _spread(values, np.array(rows))


def _weighted(sums: ScoreSums, times: IntArray) -> ScoreSums:
    arrays = sums.to_arrays()
    return ScoreSums.from_arrays({name: (array.T * times).T for name, array in arrays.items()})


def _kernel(sets: list[SetTally], features: FloatArray, how: Resampling) -> dict[str, Trio]:
    """The kernel distance, both sides against the same subsets; {} where there are too few images."""
    try:
        distances = [kernel_distance(tally.sample.features, features) for tally in sets]
    except TooFewSamples:
        return {}
    if len(distances) > 1:
        apart = distances[0].subset_values - distances[1].subset_values
        distances.append(
            replace(distances[0], value=distances[0].value - distances[1].value, subset_values=apart)
        )
    if how.resamples < 2:
        return {KID: _alone([distance.value for distance in distances[: len(sets)]])}
    estimates = [Estimate.of(distance.figure(how.seed, how.resamples)) for distance in distances]
    return {KID: _trio(estimates[: len(sets)], estimates[-1] if len(sets) > 1 else None)}


def _neighbours(sets: list[SetTally], features: FloatArray, how: Resampling) -> dict[str, Trio]:
    """Precision and recall of equal numbers of images; {} where there are too few for neighbours."""
    count = min(len(features), len(sets[0].sample.indices))
    if count <= NEIGHBOURS:
        return {}
    results = [coverage(tally.sample.features[:count], features[:count]) for tally in sets]
    return {
        PRECISION: _shares([result.inside.astype(np.float64) for result in results], how),
        RECALL: _shares([result.covered.astype(np.float64) for result in results], how),
    }


def _shares(hits: list[Float64Array], how: Resampling) -> Trio:
    if how.resamples < 2:
        return _alone([float(side.mean()) for side in hits])
    apart = [hits[0] - hits[1]] if len(hits) > 1 else []
    estimates = [_share(side, how) for side in (*hits, *apart)]
    return _trio(estimates[: len(hits)], estimates[-1] if apart else None)


def _share(hits: Float64Array, how: Resampling) -> Estimate:
    value = float(hits.mean())
    return Estimate.of(
        bootstrap(value, lambda rows: float(hits[rows].mean()), len(hits), how.seed, how.resamples)
    )


def _spread(values: list[float], rows: Float64Array) -> Trio:
    """values of one or two sides, and what each draw (R, sides) made of them."""
    estimates = [Estimate.of(figure(value, rows[:, side])) for side, value in enumerate(values)]
    apart = figure(values[0] - values[1], rows[:, 0] - rows[:, 1]) if len(values) > 1 else None
    return _trio(estimates, Estimate.of(apart) if apart else None)


def _alone(values: list[float]) -> Trio:
    """Without intervals."""
    apart = Estimate(values[0] - values[1]) if len(values) > 1 else None
    return _trio([Estimate(value) for value in values], apart)


def _trio(values: list[Estimate], difference: Estimate | None) -> Trio:
    return values[0], values[1] if len(values) > 1 else None, difference
