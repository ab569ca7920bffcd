"""What `validate fid` measures, and when its rows say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from ddexport.runtime.bundle import read_manifest
from ddexport.validate.features._base import Extractor
from ddexport.validate.fid import Options
from ddexport.validate.fid.plan import plan_of, why_no_verdict

PUBLISHED = {"1": 9.94, "2": "7.82", "6": 5.03}


@pytest.fixture
def planned(golden_bundle, monkeypatch):
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
        manifest = read_manifest(golden_bundle)
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


@pytest.mark.parametrize(
    "other", [{"images": 49_999}, {"per_class": 12_500}, {"features": "digits"}, {"random_weights": True}]
)
def test_another_protocol_has_none(planned, other):
    assert planned(**other)[0].published == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": "digits"}, "the limits are not for the features digits"),
        ({"random_weights": True}, "with random feature weights the figures mean nothing"),
        ({"bootstrap": 39}, "no interval of the FID difference"),
        ({"allow_few": True}, "--allow-few"),
        ({"reference_model": False}, "measured without PyTorch"),
    ],
)
def test_what_cannot_be_told_is_no_pass(planned, changes, reason):
    plan, asked = planned(**changes)
    assert reason in why_no_verdict(asked, plan)
    assert (plan.limits.difference is None) == (
        changes.keys() <= {"features", "random_weights", "reference_model"}
    )


def test_a_whole_comparison_has_a_verdict(planned):
    plan, asked = planned()
    assert why_no_verdict(asked, plan) == ""
