"""The harness on a toy model: what is fed to whom, and which fault shows in which comparison."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from runtime.errors import VerificationError
from validate.batches import Batch
from validate.harness import Request, compare, measure
from validate.metrics._base import Limits, Measurement
from validate.parity import Watched


def failures(bundle, reference, request: Request, limits: Limits) -> list[Measurement]:
    return [one for one in measure(compare(bundle, reference, request), limits) if not one.passed]


def test_equal_models_pass_every_check(toy, four_images, limits):
    comparison = compare(toy(), toy(), four_images)
    found = measure(comparison, limits)
    assert [one for one in found if not one.passed] == []
    assert {one.metric for one in found} == {"tokens", "embeddings", "images"}
    assert {one.scope for one in found} == set(comparison.scopes())
    assert sum(one.gated for one in found) > 30


def test_both_sides_are_fed_what_the_reference_kept(toy, four_images, limits):
    """A bundle that draws another first token must not make the second step look wrong."""
    bundle, reference = toy(flip_first_token=True), toy()
    comparison = compare(bundle, reference, four_images)
    kept = np.concatenate(reference.inputs[4:8])  # the reference's second step, image by image
    assert np.array_equal(bundle.inputs[1], kept)
    assert not np.array_equal(bundle.inputs[2], kept)  # then its own tokens, end to end
    failed = [one for one in measure(comparison, limits) if not one.passed]
    assert {one.scope for one in failed} == {"step 1 (known 0)"}
    assert [one.name for one in failed] == ["tokens that differ", "logits, largest error"]


def test_the_original_noise_is_put_back_behind_the_kept_positions(toy, four_images):
    reference = toy()
    compare(toy(), reference, four_images)
    first, second, third = (np.concatenate(reference.inputs[i : i + 4]) for i in (0, 4, 8))
    assert np.array_equal(first, four_images.noise)
    assert np.array_equal(second[:, 1:], four_images.noise[:, 1:])
    assert np.array_equal(third[:, 4:], four_images.noise[:, 4:])
    assert not np.isclose(third[:, :4], four_images.noise[:, :4]).all(axis=(0, 2)).any()


def test_end_to_end_counts_what_the_flip_costs(toy, four_images, limits):
    found = measure(compare(toy(flip_first_token=True), toy(), four_images), limits)
    ends = [one for one in found if "end to end" in one.scope]
    assert [one.value for one in ends if one.metric == "tokens"] == [4.0, 4.0, 4.0]
    assert all(one.counts["left_out"] == 4 and not one.gated for one in ends if one.metric == "images")


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ({"logit_error": 2e-3}, {"logits, largest error"}),
        ({"embedding_error": 1e-3}, {"embeddings, relative error"}),
        ({"pixel_error": 0.02}, {"image PSNR, dB", "image, largest 8-bit difference"}),
        ({"split": 1}, {"kept and codebook entries, relative error"}),
        ({"split": 3}, {"embeddings, relative error"}),
    ],
)
def test_each_fault_shows_in_its_own_row(toy, four_images, limits, fault, names):
    """On the same input, so that a fault of the student leaves the decoder's rows alone."""
    failed = failures(toy(**fault), toy(), four_images, limits)
    apart = [one for one in failed if "end to end" not in one.scope]
    assert {one.name for one in apart} == names
    assert all(("decoder" in one.scope) == (one.metric == "images") for one in apart)


def test_rounding_within_the_limits_passes(toy, four_images, limits):
    bundle = toy(logit_error=1e-4, embedding_error=1e-6, pixel_error=1e-5)
    assert failures(bundle, toy(), four_images, limits) == []


@pytest.mark.parametrize(
    ("fault", "also"), [({"shared_between_rows": 0.5}, set()), ({"grows_with_row": 0.01}, {"identical rows"})]
)
def test_a_row_that_depends_on_its_batch_fails_against_itself(toy, four_images, limits, fault, also):
    """It is held against itself, whatever the reference says; the first row alone hides such a fault."""
    comparison = compare(toy(**fault), toy(**fault), four_images)
    alone = {pair.scope for pair in comparison.students if pair.itself}
    failed = {one.scope for one in measure(comparison, limits) if not one.passed}
    assert failed & alone == {"steps mixed in a batch", "permuted batch", "batch sizes 1, 2, 3, 5"} | also


def test_the_reference_runs_image_by_image(toy, four_images):
    reference = toy()
    compare(toy(), reference, four_images)
    assert set(reference.batches) == {1}


def test_the_named_batch_sizes_are_run(toy, four_images):
    bundle = toy()
    compare(bundle, toy(), four_images)
    # Four rows a step in three steps; then whole, repeated and permuted; then the small sizes.
    assert bundle.batches == [4, 4, 4, 5, 5, 5, 1, 2, 3]


def test_the_announced_work_is_what_is_run(toy, four_images):
    """So that the progress bar ends at its end."""
    rows: list[int] = []
    sides = [Watched(toy(), rows.append) for _ in range(2)]
    compare(*sides, four_images)
    assert sum(rows) == four_images.work


def test_runs_never_exceed_the_batch(toy, four_images, limits):
    bundle, reference = toy(), toy()
    request = dataclasses.replace(four_images, batch=2)
    assert failures(bundle, reference, request, limits) == []
    assert (max(bundle.batches), max(reference.batches)) == (2, 1)


def test_a_batch_mixes_the_steps(toy, four_images):
    bundle = toy()
    known: list[list[int]] = []
    run = bundle.student
    bundle.student = lambda tokens, label, k: (known.append(k.tolist()), run(tokens, label, k))[1]
    compare(bundle, toy(), four_images)
    assert [0, 1, 4, 0, 1] in known


def test_outputs_of_another_shape_end_the_run(toy, four_images):
    """As when the manifest's recipe states another split than the graphs were made with."""
    bundle = toy()
    run = bundle.student
    bundle.student = lambda *feeds: dataclasses.replace(run(*feeds), logits=run(*feeds).logits[:, :1])
    with pytest.raises(VerificationError, match=r"logits has shape \(4, 1, 5\), the reference's \(4, 2, 5\)"):
        compare(bundle, toy(), four_images)


def test_rows_of_a_batch_keep_their_names():
    batch = Batch(np.zeros((3, 1, 1), np.float32), np.arange(3), np.zeros(3, np.int64), ("a", "b", "c"))
    chosen = batch.rows(np.array([2, 0, 2]))
    assert (chosen.places, chosen.labels.tolist(), len(chosen)) == (("c", "a", "c"), [2, 0, 2], 3)
