"""Evidence: what is kept of a parity run is what happened in it, and a file of it is not trusted."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from ddexport.validate.metrics.tokens import margins
from ddexport.validate.page.evidence import (
    MAX_SIDE,
    Evidence,
    EvidenceError,
    Histogram,
    closeness,
    evidence_from_dict,
    png,
    samples_of,
    worst_cases,
)
from tests.validate.toys import compare


@pytest.fixture
def evidence(toy, four_images) -> Evidence:
    comparison = compare(toy(pixel_error=0.25, logit_error=5.0), toy(), four_images)
    picture = np.zeros((4, 4, 3), np.uint8)
    return Evidence(
        manifest="0" * 64,
        precision="fp32",
        backend="toy",
        images=4,
        seed=0,
        worst=worst_cases(comparison),
        samples={1: samples_of([picture], [2]), 2: samples_of([picture + 9], [3])},
        **closeness(comparison, 1e-3),
    )


def through_json(evidence: Evidence) -> dict:
    return json.loads(json.dumps(evidence.to_dict(), allow_nan=False))


def test_a_histogram_counts_every_value_once():
    """Zeros, values off the axis and values that are not numbers included."""
    histogram = Histogram.of(np.array([0.0, 0.0, 1e-30, 1e-3, 5.0, 1e30, np.nan, np.inf]))
    assert histogram.zeros == 2 and histogram.total == 8
    assert histogram.counts[0] == 1 and histogram.counts[-1] == 3
    assert histogram.largest == np.inf


def test_a_histogram_puts_a_value_into_its_decade():
    histogram = Histogram.of(np.full(7, 3e-4))
    number = histogram.counts.index(7)
    width = (histogram.high - histogram.low) / len(histogram.counts)
    low = histogram.low + number * width
    assert 10**low <= 3e-4 <= 10 ** (low + width)


def test_merged_histograms_are_those_of_all_values():
    a, b = np.array([0.0, 1e-5, 2.0]), np.array([3e-2, 40.0])
    assert Histogram.of(a).merged(Histogram.of(b)) == Histogram.of(np.concatenate([a, b]))


def test_equal_sides_have_no_mismatch_and_no_error(toy, four_images):
    found = closeness(compare(toy(), toy(), four_images), 1e-3)
    assert found["mismatches"] == () and found["mismatched"] == 0
    assert found["errors"].largest == 0.0 and found["errors"].zeros == found["errors"].total > 0
    assert found["compared"] == found["margins"].total > 0


def test_mismatches_are_named_with_what_the_reference_lost(toy, four_images):
    comparison = compare(toy(logit_error=5.0), toy(), four_images)
    found = closeness(comparison, 1e-3)
    assert found["mismatched"] == len(found["mismatches"]) > 0
    pairs = {pair.scope: pair for pair in comparison.students if not pair.itself}
    assert found["mismatched"] == sum(int(pair.differing().sum()) for pair in pairs.values())
    for one in found["mismatches"]:
        pair = pairs[one.scope]
        logits = pair.expected.logits[pair.places.index(one.place), one.position]
        assert one.expected == logits.argmax() and one.got == 0  # the logit that was raised
        assert one.lost == pytest.approx(logits.max() - logits[0]) and 0 < one.lost <= 5
        assert one.margin == pytest.approx(float(margins(logits)))
        assert not one.excused
    assert found["errors"].largest == pytest.approx(5.0, abs=1e-5)


def test_an_excused_mismatch_is_marked_as_one(toy, four_images):
    found = closeness(compare(toy(logit_error=5.0), toy(), four_images), 10.0)
    assert found["mismatches"] and all(one.excused for one in found["mismatches"])


def test_worst_cases_show_both_sides_and_an_amplified_difference(toy, four_images):
    found = worst_cases(compare(toy(pixel_error=0.25), toy(), four_images))
    assert len(found) == 4
    for one in found:
        assert one.size == pytest.approx(0.25, abs=1 / 255)  # or of 8-bit images
        pixels = {
            side: np.asarray(Image.open(io.BytesIO(getattr(one, side))), dtype=float)
            for side in ("reference", "bundle", "difference")
        }
        shown = np.clip((pixels["bundle"] - pixels["reference"]) * one.factor, 0, 255)
        saturated = pixels["bundle"] >= 254  # clipped when it was made 8-bit, the difference is not
        assert np.abs(shown - pixels["difference"])[~saturated].max() <= one.factor + 1


def test_what_is_written_is_read_again(evidence):
    assert evidence_from_dict(through_json(evidence)) == evidence


def test_infinite_errors_survive_json(toy, four_images):
    broken = toy()
    broken.logit_weight[:] = np.nan
    found = closeness(compare(broken, toy(), four_images), 1e-3)
    assert found["errors"].largest == np.inf


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data.pop("margins"), "margins"),
        (lambda data: data.update(schema=2), "schema"),
        (lambda data: data.update(images=-1), "images"),
        (lambda data: data.update(compared="many"), "compared"),
        (lambda data: data["margins"].update(low=5, high=5), "axis"),
        (lambda data: data["margins"].update(counts=[]), "counts"),
        (lambda data: data["margins"].update(low="nan"), "low"),
        (lambda data: data["worst"][0].update(bundle="not base64!"), "bundle"),
        (lambda data: data["worst"][0].update(bundle=base64.b64encode(b"<svg/>").decode()), "picture"),
        (lambda data: data["samples"].update({"1": [{"label": 0}]}), "picture"),
        (lambda data: data.update(samples=[]), "samples"),
        (lambda data: data.update(mismatches=[{}]), "scope"),
    ],
)
def test_a_file_that_lies_is_refused(evidence, spoil, said):
    data = through_json(evidence)
    spoil(data)
    with pytest.raises(EvidenceError, match=said):
        evidence_from_dict(data)


@pytest.mark.parametrize("data", [None, [], "text", 7])
def test_what_is_no_evidence_at_all_is_refused(data):
    with pytest.raises(EvidenceError):
        evidence_from_dict(data)


def test_pictures_are_encoded_again_and_lose_what_they_carried(evidence):
    """A picture may hide text or a second file behind its pixels; the page gets the pixels alone."""
    data = through_json(evidence)
    hidden = png(np.zeros((2, 2, 3), np.uint8)) + b"<script>alert(1)</script>"
    data["samples"]["1"][0]["picture"] = base64.b64encode(hidden).decode()
    kept = evidence_from_dict(data).samples[1][0].picture
    assert b"script" not in kept and Image.open(io.BytesIO(kept)).size == (2, 2)


def test_a_huge_picture_is_refused(evidence):
    data = through_json(evidence)
    huge = io.BytesIO()
    Image.new("1", (MAX_SIDE + 1, 1)).save(huge, "PNG")
    data["samples"]["1"][0]["picture"] = base64.b64encode(huge.getvalue()).decode()
    with pytest.raises(EvidenceError, match=f"{MAX_SIDE + 1} x 1"):
        evidence_from_dict(data)
