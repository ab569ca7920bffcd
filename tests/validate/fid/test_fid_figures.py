"""What `validate fid` measures: figures, paired intervals, rows with limits, and when there is no verdict."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from ddexport.runtime.bundle import read_manifest
from ddexport.validate.bootstrap import interval
from ddexport.validate.features._base import Extractor, Readings
from ddexport.validate.fid import Options
from ddexport.validate.fid.figures import CHANGED, DIFFERENCE, DISTANCE, Limits, measure
from ddexport.validate.fid.plan import plan_of, why_no_verdict
from ddexport.validate.fid.references import Reference
from ddexport.validate.metrics.frechet import frechet, gaussian
from ddexport.validate.metrics.inception_score import inception_score
from ddexport.validate.metrics.precision_recall import precision_recall

LIMITS = Limits(difference=0.01, distance=1e-4, changed=0.01)
NAMES = ("FID", "Inception Score", "precision", "recall")


def readings(count=400, shift=0.0, seed=1, sign=1):
    """Of two models that draw from the same noise: the features of one are moved by a share of another's."""
    noise = np.random.default_rng(seed).standard_normal((2, count, 6))
    features = (sign * noise[0] + shift * (1 + noise[1]) + 2.5).astype(np.float32)
    odds = np.exp(features[:, :3])
    return Readings(features, odds / odds.sum(1, keepdims=True))


@pytest.fixture(scope="module")
def compared():
    features = np.random.default_rng(0).normal(2.5, 1.0, size=(500, 6)).astype(np.float32)
    return Reference("data", gaussian(features), features)


def rows_of(bundle, reference, compared, limits=LIMITS, resamples=60, apart=None, **more):
    sides = [bundle] if reference is None else [bundle, reference]
    if reference is not None and apart is None:
        apart = np.where((bundle.features != reference.features).any(1), 9, 0).astype(np.uint8)
    labels = np.zeros(len(bundle.features), np.int64)
    rows = measure("1 step", sides, labels, apart, compared, limits, resamples, **more)
    return {row.name: row for row in rows}


def failed(*args, **more):
    return {name for name, row in rows_of(*args, **more).items() if not row.passed}


class TestFigures:
    def test_each_is_there_with_its_interval(self, compared):
        rows = rows_of(readings(shift=0.3), readings(), compared)
        for name in NAMES:
            titles = ("bundle", "PyTorch") if name == "FID" else ("bundle", "PyTorch", "difference")
            for row in (rows[f"{name}, {title}"] for title in titles):
                assert row.low <= row.value <= row.high and not row.gated and row.scope == "1 step"
            if name != "FID":
                bundle, reference, difference = (rows[f"{name}, {title}"].value for title in titles)
                assert difference == pytest.approx(bundle - reference)

    def test_values_are_those_of_the_metrics(self, compared):
        bundle, reference = readings(shift=0.3), readings()
        rows = rows_of(bundle, reference, compared)
        for title, side in (("bundle", bundle), ("PyTorch", reference)):
            assert rows[f"FID, {title}"].value == pytest.approx(
                frechet(side.features, compared.features), rel=1e-9
            )
            score = inception_score(side.probabilities)
            assert rows[f"Inception Score, {title}"].value == pytest.approx(score, rel=1e-12)
            shares = precision_recall(side.features, compared.features[:400])
            assert (rows[f"precision, {title}"].value, rows[f"recall, {title}"].value) == shares
        between = frechet(bundle.features, reference.features)
        assert rows["Frechet distance, set to set"].value == pytest.approx(between, rel=1e-9)

    def test_pairs_by_hand(self, compared):
        """One image of three is off by 40 in some value, another by 2, which is not visible."""
        first = Readings(np.array([[0, 0], [1, 3], [2, 0]], np.float32), None)
        second = Readings(np.array([[0, 0], [1, 0], [2, 1]], np.float32), None)
        rows = rows_of(first, second, None, apart=np.array([0, 40, 2], np.uint8))
        variance = 2 * (1 + 1 / 3)
        assert rows[DISTANCE].value == pytest.approx((0 + 9 + 1) / 3 / variance)
        assert rows[CHANGED].value == pytest.approx(1 / 3)
        assert rows[CHANGED].counts == {"changed": 1, "identical": 1, "images": 3}
        largest = rows["largest 8-bit difference"]
        assert (largest.value, largest.where, largest.gated) == (40.0, "image 1", False)

    def test_the_paired_interval_is_the_narrow_one(self, compared):
        """What both sides share does not widen the interval of their difference."""
        rows = rows_of(readings(shift=0.01), readings(), compared)
        for name in NAMES:
            row = rows[f"{name}, bundle"]
            if name == "FID":
                assert rows[DIFFERENCE].value < (row.high - row.low) / 8
            else:
                difference = rows[f"{name}, difference"]
                assert difference.high - difference.low < (row.high - row.low) / 2

    def test_without_a_bootstrap_the_same_values_alone(self, compared):
        sides = readings(shift=0.3), readings()
        alone, rows = rows_of(*sides, compared, resamples=0), rows_of(*sides, compared)
        assert alone.keys() == rows.keys()
        for name in rows.keys() - {DIFFERENCE}:
            assert (alone[name].value, alone[name].low) == (pytest.approx(rows[name].value, abs=1e-12), None)
        apart = alone["FID, bundle"].value - alone["FID, PyTorch"].value
        assert alone[DIFFERENCE].value == pytest.approx(abs(apart))

    def test_statistics_without_images_give_no_neighbours(self, compared):
        """A published mean and covariance: FID, and nothing made up for the rest."""
        rows = rows_of(readings(), None, dataclasses.replace(compared, features=None))
        assert set(rows) == {"FID, bundle", "Inception Score, bundle"}
        rows = rows_of(readings(), None, compared)
        assert set(rows) == {f"{name}, bundle" for name in NAMES}
        assert not any(row.gated for row in rows.values())

    def test_without_a_reference_set_the_sides_are_compared_alone(self):
        rows = rows_of(readings(shift=0.5), readings(), None)
        assert not any("FID" in name or "precision" in name for name in rows)
        assert not rows[DISTANCE].passed

    def test_neighbours_are_sought_in_a_sample_spread_over_all(self, compared, monkeypatch):
        """A folder is in the order of its names: its first images are of its first classes."""
        monkeypatch.setattr("ddexport.validate.fid.figures.SAMPLE", 100)
        half = np.concatenate([compared.features[:250], compared.features[250:] + 100])
        rows = rows_of(readings(), None, dataclasses.replace(compared, features=half))
        assert rows["recall, bundle"].value == pytest.approx(0.5, abs=0.1)

    def test_the_published_figure_stands_beside_the_measured_one(self, compared):
        rows = rows_of(readings(), readings(), compared, published=9.94)
        row = rows["FID, published"]
        assert (row.value, row.gated) == (9.94, False)
        assert f"{rows['FID, bundle'].value - 9.94:+.2f}" in row.note


class TestGate:
    def test_equal_images_pass(self, compared):
        rows = rows_of(readings(), readings(), compared)
        assert all(row.passed for row in rows.values())
        assert rows[DIFFERENCE].value == rows[DISTANCE].value == rows[CHANGED].value == 0
        assert {row.rule for row in rows.values() if row.gated} == {DIFFERENCE, DISTANCE, CHANGED}

    def test_worse_images_fail(self, compared):
        assert failed(readings(shift=0.5), readings(), compared) == {DIFFERENCE, DISTANCE, CHANGED}

    def test_other_images_of_the_same_quality_fail(self, compared):
        """A gate on the difference of distances alone cannot see these: noise read with another sign."""
        loose = dataclasses.replace(LIMITS, difference=0.2)
        sides = readings(4000, sign=-1), readings(4000)
        assert failed(*sides, compared, loose) == {DISTANCE, CHANGED}
        rows = rows_of(*sides, compared, loose)
        assert rows[DISTANCE].value > 0.5  # unrelated

    def test_a_limit_that_is_left_out_is_not_held(self, compared):
        assert failed(readings(shift=0.5), readings(), compared, Limits(difference=1e9)) == set()

    def test_the_far_end_of_the_interval_is_held(self, compared):
        """An estimate below the limit is no pass where its interval reaches past it."""
        sides = readings(shift=0.05), readings()
        value = rows_of(*sides, compared, resamples=0)[DIFFERENCE].value
        row = rows_of(*sides, compared, dataclasses.replace(LIMITS, difference=1.01 * value))[DIFFERENCE]
        assert row.value > row.limit > value and not row.passed
        low, high = (float(part) for part in row.note.split("[")[1].rstrip("]").split(","))
        assert row.value == pytest.approx(max(abs(low), abs(high)), rel=0.01)
        assert row.note.startswith("far end of +") or row.note.startswith("far end of -")


class TestIntervals:
    def test_the_interval_is_centred_on_its_value_and_tells_the_shift(self):
        low, high, bias = interval(1.0, 5.0 + np.linspace(-1, 1, 201))
        assert (low, high, bias) == (pytest.approx(0.05), pytest.approx(1.95), pytest.approx(4.0))
        for values in ([1.0], [1.0, np.nan], [[1.0, 2.0]]):
            with pytest.raises(ValueError):
                interval(1.0, values)

    def test_the_bootstrap_of_a_share_is_its_standard_error(self, compared):
        rows = rows_of(readings(shift=0.5), None, compared, resamples=500)
        for row in (rows["precision, bundle"], rows["recall, bundle"]):
            error = (row.value * (1 - row.value) / 400) ** 0.5
            assert row.high - row.low == pytest.approx(2 * 1.96 * error, rel=0.15)

    def test_the_interval_of_a_distance_covers_the_spread_of_repeated_draws(self, compared):
        """95 % intervals of 40 sets against the mean over these: some must miss it, most must not."""
        rows = [rows_of(readings(shift=0.3, seed=s), None, compared)["FID, bundle"] for s in range(40)]
        truth = np.mean([row.value for row in rows])
        assert 0.8 <= np.mean([row.low <= truth <= row.high for row in rows]) <= 1

    def test_the_bias_is_that_of_a_small_set(self):
        """Sets of the reference's own distribution: the true distance is 0, and all is bias."""
        real = Reference("real", gaussian(np.random.default_rng(9).normal(2.5, 1, (100_000, 6))))
        rows = [rows_of(readings(200, seed=s), None, real)["FID, bundle"] for s in range(10)]
        biases = [float(row.note.removeprefix("bias ")) for row in rows]
        assert np.mean(biases) == pytest.approx(np.mean([row.value for row in rows]), rel=0.4)

    def test_the_interval_of_a_score_is_its_spread(self, compared):
        rows = [rows_of(readings(seed=s), None, None)["Inception Score, bundle"] for s in range(30)]
        spread = np.std([row.value for row in rows])
        assert np.mean([row.high - row.low for row in rows]) == pytest.approx(2 * 1.96 * spread, rel=0.4)


PUBLISHED = {"1": 9.94, "2": "7.82", "6": 5.03}


@pytest.fixture
def planned(embedded_bundle, monkeypatch):
    """planned(features=..., **options): the plan of a model that is measured as its paper does."""

    def plan(features="inception", random_weights=False, published=PUBLISHED, **options):
        class Toy(Extractor):
            name, width, classes, identity = features, 6, None, "toy:0"

            @classmethod
            def load(cls, weights):
                return cls()

            def _read(self, images):
                raise AssertionError

        toy = Toy()
        toy.random_weights = random_weights
        monkeypatch.setattr("ddexport.validate.fid.plan.load_extractor", lambda *_: toy)
        gate = {
            "features": "inception", "images": 50_000,
            "limits": {"fp32": {"difference": 0.01, "distance": 1e-4, "changed": 0.01, "provisional": True}},
        }  # fmt: skip
        manifest = read_manifest(embedded_bundle("digits-var"))
        parity = {**manifest.parity, "fid": gate}
        manifest = structs.replace(manifest, parity=parity, published={"fid": published})
        asked = Options(bundle=Path(), features=features, reference="statistic.pth", **options)
        return plan_of(manifest, "fp32", asked), asked

    return plan


def test_what_is_left_open_is_filled_in_from_the_bundle(planned):
    plan, _ = planned()
    assert (plan.order.images, plan.resamples, sorted(plan.schedules)) == (50_000, 200, [1, 2])
    assert (plan.limits.difference, plan.limits.changed, plan.limits.provisional) == (0.01, 0.01, True)
    assert planned(images=70, bootstrap=3)[0].resamples == 3


def test_the_published_protocol_has_the_published_figures(planned):
    """Of the schedules that are drawn and have one; a text is none."""
    assert planned()[0].published == {1: 9.94}
    assert planned(published={})[0].published == {}


def test_another_protocol_has_none(planned):
    for other in (
        {"images": 49_999},
        {"per_class": 12_500},
        {"features": "digits"},
        {"random_weights": True},
    ):
        assert planned(**other)[0].published == {}


def test_what_cannot_be_told_is_no_pass(planned):
    plan, asked = planned()
    assert why_no_verdict(asked, plan) == ""
    for changes, open_limit in (
        ({"features": "digits"}, True),
        ({"random_weights": True}, True),
        ({"reference_model": False}, True),
        ({"bootstrap": 39}, False),
        ({"allow_few": True}, False),
    ):
        plan, asked = planned(**changes)
        assert why_no_verdict(asked, plan) and (plan.limits.difference is None) is open_limit, changes
