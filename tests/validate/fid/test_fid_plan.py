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
