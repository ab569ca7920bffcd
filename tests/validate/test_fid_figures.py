"""Figures, paired intervals and the verdict: what the gate lets pass, and what it must not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ddexport.validate.drawing import Order
from ddexport.validate.features._base import Extractor, Readings
from ddexport.validate.fid_figures import (
    FID,
    KID,
    PRECISION,
    RECALL,
    SCORE,
    Gate,
    Resampling,
    figures_of,
    measurements_of,
    published_of,
)
from ddexport.validate.fid_report import (
    Compared,
    Estimate,
    FidReport,
    Figure,
    Settings,
    scope_of,
    table,
    verdict_line,
)
from ddexport.validate.metrics._base import Measurement
from ddexport.validate.metrics.frechet import frechet_distance, gaussian_fit
from ddexport.validate.paired import BUNDLE, REFERENCE, PairedRun, Sizes
from ddexport.validate.references import Reference
from ddexport.validate.statistics import TooFewSamples
from tests.validate.toys import draw_of

HOW = Resampling(60)
GATE = Gate(difference=0.01, distance=1e-4, changed=0.01)


class Colours(Extractor):
    """Two colours of each row as features; three classes."""

    name, width, classes, identity = "colours", 6, 3, "colours:0"

    @classmethod
    def load(cls, weights):
        return cls()

    def _read(self, images):
        features = images[:, :, 0, 1:].reshape(len(images), 6).astype(np.float32) / 50
        odds = np.exp(features[:, :3])
        return Readings(features, odds / odds.sum(1, keepdims=True))


class Mirrored:
    """A model that reads the noise with the other sign: other images, of the very same distribution."""

    def __init__(self, model):
        self.model = model

    def student(self, tokens, label, known):
        return self.model.student(-tokens, label, known)

    def decode(self, sequence):
        return self.model.decode(sequence)


def measured(toy, bundle, images=400, sides=2):
    order = Order(images, seed=1, classes=4, length=6, width=3)
    models = {BUNDLE: draw_of(bundle, {1: (0,)}), REFERENCE: draw_of(toy(), {1: (0,)})}
    run = PairedRun(order, {1: (0,)}, Colours(), dict(list(models.items())[:sides]), Sizes(6, 3, 20, 1000))
    run.run(100, None, lambda count: None)
    return run


@pytest.fixture
def compared():
    features = np.random.default_rng(0).normal(2.5, 1.0, size=(500, 6)).astype(np.float32)
    return Reference("data", gaussian_fit(features), features, 500, "colours:0")


def by_name(figures):
    return {figure.name: figure for figure in figures}


def failed(run, compared, gate=GATE):
    rows = measurements_of(run, figures_of(run, compared, HOW), gate, HOW)
    return {row.name for row in rows if not row.passed}


class TestFigures:
    def test_each_is_there_with_its_interval(self, toy, compared):
        run = measured(toy, toy(embedding_error=0.1))
        figures = by_name(figures_of(run, compared, HOW))
        assert set(figures) == {FID, KID, SCORE, PRECISION, RECALL}
        for figure in figures.values():
            for one in (figure.bundle, figure.reference, figure.difference):
                assert one.low <= one.value <= one.high
            assert figure.difference.value == pytest.approx(figure.bundle.value - figure.reference.value)

    def test_fid_is_the_distance_to_the_reference_set(self, toy, compared):
        run = measured(toy, toy(embedding_error=0.1))
        figure = by_name(figures_of(run, compared, HOW))[FID]
        for side, one in ((BUNDLE, figure.bundle), (REFERENCE, figure.reference)):
            total = run.sets[side, 1].moments.total()
            assert one.value == pytest.approx(frechet_distance(total, compared.moments), rel=1e-9)

    @pytest.mark.parametrize("name", [FID, KID, SCORE, PRECISION, RECALL])
    def test_the_paired_interval_is_the_narrow_one(self, toy, compared, name):
        """What both sides share does not widen the interval of their difference."""
        figure = by_name(figures_of(measured(toy, toy(embedding_error=0.02)), compared, HOW))[name]
        width = figure.bundle.high - figure.bundle.low
        assert figure.difference.high - figure.difference.low < width / 2

    def test_without_a_bootstrap_the_same_values_alone(self, toy, compared):
        run = measured(toy, toy(embedding_error=0.1))
        alone = by_name(figures_of(run, compared, Resampling(0)))
        for name, figure in by_name(figures_of(run, compared, HOW)).items():
            assert alone[name].bundle == Estimate(figure.bundle.value)
            assert alone[name].difference.low is None
            assert alone[name].difference.value == pytest.approx(figure.difference.value, abs=1e-12)

    def test_statistics_without_images_give_no_neighbours(self, toy, compared):
        """A published mean and covariance: FID, and nothing made up for the rest."""
        run = measured(toy, toy())
        figures = figures_of(run, dataclasses.replace(compared, features=None), HOW)
        assert set(by_name(figures)) == {FID, SCORE}

    def test_without_a_reference_set_the_sides_are_compared_alone(self, toy):
        run = measured(toy, toy(embedding_error=0.5))
        assert set(by_name(figures_of(run, None, HOW))) == {SCORE}
        assert "feature distance, paired" in failed(run, None)

    def test_a_bundle_alone(self, toy, compared):
        run = measured(toy, toy(), sides=1)
        figures = figures_of(run, compared, HOW)
        assert {figure.name for figure in figures} == {FID, KID, SCORE, PRECISION, RECALL}
        assert all(figure.reference is None and figure.difference is None for figure in figures)
        assert measurements_of(run, figures, GATE, HOW) == []

    def test_fewer_images_than_features_are_refused(self, toy, compared):
        """A covariance without full rank gives a distance that means nothing."""
        run = measured(toy, toy(), images=6)
        with pytest.raises(TooFewSamples):
            figures_of(run, compared, HOW)
        few = Resampling(10, allow_few=True)
        assert by_name(figures_of(run, compared, few))[FID].bundle.value > 0


class TestGate:
    def test_equal_images_pass(self, toy, compared):
        assert failed(measured(toy, toy()), compared) == set()

    def test_worse_images_fail(self, toy, compared):
        bad = measured(toy, toy(embedding_error=0.5))
        assert failed(bad, compared) >= {"FID, difference", "images that differ"}

    def test_other_images_of_the_same_quality_fail_in_float32(self, toy, compared):
        """A gate on the difference of distances alone cannot see these: noise read with another sign."""
        run = measured(toy, Mirrored(toy()), images=4000)
        loose = dataclasses.replace(GATE, difference=0.2)
        assert failed(run, compared, loose) == {"feature distance, paired", "images that differ"}
        rows = {row.name: row for row in measurements_of(run, figures_of(run, compared, HOW), loose, HOW)}
        assert rows["feature distance, paired"].value > 0.5  # nearly unrelated
        assert rows["FID, difference"].value < 0.2

    def test_a_limit_that_is_left_out_is_not_held(self, toy, compared):
        run = measured(toy, toy(embedding_error=0.5))
        assert failed(run, compared, Gate(difference=1e9)) == set()

    @pytest.mark.parametrize("apart", [Estimate(0.01, -0.05, 0.03), Estimate(-0.05, -0.04, 0.03)])
    def test_the_far_end_of_the_interval_is_held(self, toy, compared, apart):
        """An estimate below the limit is no pass where its interval reaches past it."""
        figures = [Figure(1, FID, Estimate(1.0), Estimate(1.0), apart)]
        row, *_ = measurements_of(measured(toy, toy()), figures, Gate(difference=0.049), HOW)
        assert (row.value, row.limit, row.passed) == (0.05, 0.049, False)
        assert apart.text(sign=True) in row.note

    def test_fewer_images_do_not_widen_the_limit(self, toy, compared):
        run = measured(toy, toy(), images=40)
        row, *_ = measurements_of(run, figures_of(run, compared, HOW), GATE, HOW)
        assert row.limit == GATE.difference

    def test_a_figure_that_is_no_number_does_not_pass(self):
        assert not Measurement("fid", "1 step", "FID, difference", float("nan"), 0.01).passed


class TestPublished:
    """The row that says how far a run is from the paper's figure, measured as the paper's was."""

    @pytest.fixture
    def run(self, toy):
        run = measured(toy, toy())
        run.extractor.name = "inception"
        run.order = dataclasses.replace(run.order, images=50_000)
        return run

    @pytest.fixture
    def bare(self, compared):
        return dataclasses.replace(compared, features=None)

    def test_the_published_figure_stands_beside_the_measured_one(self, run, bare):
        figures = figures_of(run, bare, HOW)
        (row,) = published_of(run, bare, figures, {"1": 9.94, "2": 7.82})
        assert (row.value, row.gated, row.scope) == (9.94, False, "1 step")
        assert f"measured less published: {figures[0].bundle.value - 9.94:+.2f}" in row.note

    @pytest.mark.parametrize(
        "other",
        [
            lambda run, bare: setattr(run, "order", dataclasses.replace(run.order, images=49_999)),
            lambda run, bare: setattr(run, "order", dataclasses.replace(run.order, per_class=12_500)),
            lambda run, bare: setattr(run.extractor, "name", "inception_tf"),
            lambda run, bare: setattr(run.extractor, "random_weights", True),
            lambda run, bare: object.__setattr__(bare, "features", np.zeros((500, 6), np.float32)),
        ],
    )
    def test_another_protocol_has_no_such_row(self, run, bare, other):
        other(run, bare)
        assert published_of(run, bare, figures_of(run, bare, HOW), {"1": 9.94}) == []

    @pytest.mark.parametrize("published", [{}, {"2": 7.82}, {"1": "9.94"}])
    def test_nor_has_a_schedule_without_a_published_figure(self, run, bare, published):
        assert published_of(run, bare, figures_of(run, bare, HOW), published) == []


class TestReport:
    def report(self, run, compared, how=HOW, gate=GATE, **changes):
        figures = figures_of(run, compared, how)
        settings = Settings(
            bundle="b", manifest="m", name="toy", weights="w", precision="fp32", backend="numpy", images=400,
            seed=1, labels="uniform", batch=100, steps=(1,), features="colours", features_identity="c:0",
            features_width=6, compared=compared and Compared("data", 500, None), paired=len(run.sides) > 1,
            bootstrap=how.resamples,
        )  # fmt: skip
        settings = dataclasses.replace(settings, **changes)
        rows = measurements_of(run, figures, gate, how)
        return FidReport(settings, dataclasses.asdict(gate), tuple(figures), tuple(rows))

    def test_the_table_shows_every_row_and_the_verdict(self, toy, compared):
        report = self.report(measured(toy, toy(embedding_error=0.5)), compared)
        text = table(report)
        for name in (FID, KID, SCORE, PRECISION, RECALL, "images that differ", scope_of(1), "FAIL"):
            assert name in text
        assert not report.passed
        assert "3 of 3 measurements past their limits" in verdict_line(report)
        assert max(len(line) for line in text.splitlines()) < 160

    def test_a_bundle_alone_claims_nothing(self, toy, compared):
        report = self.report(measured(toy, toy(), sides=1), compared)
        assert report.passed is None
        assert table(report).endswith("no verdict: measured alone, without PyTorch beside it")
        assert "PyTorch" not in table(report).split("no verdict")[0]

    def test_equal_images_hold(self, toy, compared):
        report = self.report(measured(toy, toy()), compared)
        assert (report.passed, report.no_verdict) == (True, "")
        assert verdict_line(report) == "image quality holds: 3 of 3 measurements within their limits"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"compared": None}, "no FID compares the two sides"),
            ({"gate": Gate(distance=1e-4)}, "the limits are not for the features colours"),
            ({"how": Resampling(39)}, "no interval of the FID difference"),
            ({"allow_few": True}, "--allow-few"),
            ({"random_features": True}, "random feature weights"),
        ],
    )
    def test_what_cannot_be_told_is_no_pass(self, toy, compared, changes, reason):
        """Equal sides, so that every row keeps to its limit."""
        report = self.report(measured(toy, toy()), **{"compared": compared} | changes)
        assert report.passed is None
        assert verdict_line(report) == f"no verdict: {report.no_verdict}" and reason in report.no_verdict
        data = report.to_dict()
        assert (data["passed"], data["no_verdict"]) == (None, report.no_verdict)

    def test_rows_past_their_limits_are_no_verdict_either(self, toy, compared):
        report = self.report(measured(toy, toy(embedding_error=0.5)), compared, random_features=True)
        assert report.failures
        assert (report.passed, "random" in report.no_verdict) == (None, True)

    def test_rows_of_other_scopes_are_in_the_table_and_count(self, toy, compared):
        report = self.report(measured(toy, toy()), compared)
        row = Measurement("contents", "manifest", "limits", 1.0, 0.0)
        bad = dataclasses.replace(report, measurements=(*report.measurements, row))
        assert bad.passed is False
        assert "images that differ" in table(bad) and "limits" in table(bad) and "FAIL" in table(bad)
