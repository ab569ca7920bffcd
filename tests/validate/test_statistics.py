"""Streaming statistics: equal to those of all rows at once, however the rows come, and across a stop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddexport.validate.bootstrap import bootstrap, figure
from ddexport.validate.statistics import GroupedMoments, Moments, Reservoir, TooFewSamples


def rows(count, width=4, seed=0):
    return np.random.default_rng(seed).standard_normal((count, width)) @ np.diag(np.arange(1, width + 1))


def filled(features):
    result = Moments(features.shape[1])
    result.update(features)
    return result


@settings(max_examples=30)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 2))
def test_batches_of_any_sizes_give_the_moments_of_all_rows(sizes):
    features = rows(sum(sizes)) + 1000
    moments = Moments(4)
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        moments.update(features[end - size : end].astype(np.float64))
    assert moments.count == sum(sizes)
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)


def test_a_large_mean_does_not_swallow_the_spread():
    """Sums of squares would lose all digits here."""
    features = rows(1000) + 1e8
    moments = Moments(4)
    for part in np.split(features, 10):
        moments.update(part)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-6)


def test_merging_is_joining_and_times_is_repeating():
    a, b = rows(30), rows(50, seed=1) + 2
    merged = filled(a)
    merged.merge(filled(b), times=3)
    together = np.concatenate([a, b, b, b])
    np.testing.assert_allclose(merged.covariance, np.cov(together, rowvar=False))
    np.testing.assert_allclose(merged.mean, together.mean(0))
    merged.merge(Moments(4))
    merged.merge(filled(b), times=0)
    assert merged.count == len(together)


def test_what_would_spoil_the_sums_is_refused():
    moments = filled(rows(10))
    for wrong in (np.full((2, 4), np.nan), np.full((1, 4), np.inf), np.zeros((2, 3)), np.zeros(4)):
        with pytest.raises(ValueError):
            moments.update(wrong)
    with pytest.raises(ValueError, match="width"):
        moments.merge(Moments(3))
    assert moments.count == 10
    with pytest.raises(TooFewSamples):
        _ = filled(rows(1)).covariance


def test_groups_together_are_the_whole_and_hold_indices_by_their_modulus():
    features, order = rows(97), np.random.default_rng(2).permutation(97)
    groups = GroupedMoments(4, 10)
    for part in np.array_split(order, 7):
        groups.update(features[part], part)
    assert groups.count == 97 and [group.count for group in groups.groups] == [10] * 7 + [9] * 3
    np.testing.assert_allclose(groups.total().covariance, np.cov(features, rowvar=False))
    np.testing.assert_allclose(groups.groups[3].mean, features[3::10].mean(0))


def test_a_bootstrap_set_is_made_of_whole_groups():
    features = rows(60)
    groups = GroupedMoments(4, 6)
    groups.update(features, np.arange(60))
    times = groups.multiplicities(np.random.default_rng(0))
    repeated = np.concatenate([np.repeat(features[g::6], n, axis=0) for g, n in enumerate(times)])
    assert times.sum() == 6 and times.max() > 1
    sample = groups.resample(np.random.default_rng(0))
    assert sample.count == 60
    np.testing.assert_allclose(sample.covariance, np.cov(repeated, rowvar=False))


def test_empty_groups_are_never_drawn():
    groups = GroupedMoments(4, 20)
    groups.update(rows(5), np.arange(5))
    drawn = [groups.multiplicities(np.random.default_rng(seed)) for seed in range(20)]
    assert all(times[5:].sum() == 0 and times.sum() == 5 for times in drawn)


@pytest.mark.parametrize("kind", [Moments, GroupedMoments, Reservoir])
def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(kind, tmp_path):
    features = rows(80)
    straight, stopped = kind(4), kind(4)
    for start in range(0, 80, 10):
        part = np.arange(start, start + 10)
        arguments = (part,) if kind is not Moments else ()
        straight.update(features[part], *arguments)
        stopped.update(features[part], *arguments)
        np.savez(tmp_path / "state.npz", **stopped.to_arrays())
        with np.load(tmp_path / "state.npz") as arrays:
            stopped = kind.from_arrays(arrays)
    for name, array in straight.to_arrays().items():
        assert np.array_equal(array, stopped.to_arrays()[name]), name


@pytest.mark.parametrize(
    ("kind", "arrays"),
    [
        (Moments, {"count": np.array(2), "mean": np.zeros(3), "scatter": np.zeros((3, 2))}),
        (GroupedMoments, {"count": np.zeros(2), "mean": np.zeros((3, 2)), "scatter": np.zeros((3, 2, 2))}),
        (Reservoir, {"rows": 5, "count": 2, "indices": np.zeros(2), "features": np.zeros((3, 4))}),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(kind, arrays):
    with pytest.raises(ValueError):
        kind.from_arrays(arrays)
    with pytest.raises(KeyError):
        kind.from_arrays({})


@settings(max_examples=30)
@given(st.permutations(list(range(60))), st.integers(1, 20))
def test_the_sample_depends_on_the_set_of_images_alone(order, batch):
    features = rows(60).astype(np.float32)
    straight, mixed = Reservoir(4, 17), Reservoir(4, 17)
    straight.update(features, np.arange(60))
    for start in range(0, 60, batch):
        part = order[start : start + batch]
        mixed.update(features[part], part)
    assert mixed.count == 60 and len(mixed.indices) == 17
    assert np.array_equal(mixed.indices, straight.indices)
    assert np.array_equal(mixed.features, features[straight.indices])


def test_the_sample_is_spread_evenly():
    sample = Reservoir(1, 2000)
    for start in range(0, 20_000, 1000):
        sample.update(np.zeros((1000, 1)), np.arange(start, start + 1000))
    counts = np.histogram(sample.indices, bins=10, range=(0, 20_000))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 28  # chi-square of 9 degrees of freedom, p = 0.001
    gaps = np.diff(sample.indices)
    assert gaps.mean() == pytest.approx(10, rel=0.05) and gaps.std() == pytest.approx(10, rel=0.15)


def test_small_sets_are_kept_whole_and_no_image_twice():
    sample = Reservoir(4, 100)
    sample.update(rows(30), np.arange(30))
    assert np.array_equal(sample.indices, np.arange(30))
    with pytest.raises(ValueError, match="twice"):
        sample.update(rows(2), [30, 7])
    with pytest.raises(ValueError):
        sample.update(rows(2, 5), [40, 41])


def test_a_figure_is_centred_on_its_value_and_tells_the_shift():
    found = figure(1.0, 5.0 + np.linspace(-1, 1, 201), level=0.9)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(1.9))
    assert found.bias == pytest.approx(4.0) and found.to_dict()["value"] == 1.0


@pytest.mark.parametrize("values", [[1.0], [1.0, np.nan], [[1.0, 2.0]]])
def test_an_interval_of_nothing_is_a_defect(values):
    with pytest.raises(ValueError):
        figure(1.0, values)


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    values = rows(500)[:, 0]
    found = bootstrap(values.mean(), lambda index: values[index].mean(), 500, resamples=500)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(500), rel=0.15)
