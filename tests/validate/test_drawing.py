"""Labels and noise by image number, and the images both sides draw from them."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import VerificationError
from runtime.noise import gaussian_noise
from validate.drawing import Order, draw

LENGTH, WIDTH = 6, 3
SCHEDULES = {1: (0,), 2: (0, 1), 3: (0, 1, 4)}


def order(images=40, seed=5, per_class=None):
    return Order(images, seed, classes=4, length=LENGTH, width=WIDTH, per_class=per_class)


def test_an_image_has_its_label_and_noise_whatever_the_batch():
    """A run that was stopped, and a run in other batches, draw the same images."""
    one = order()
    assert np.array_equal(one.labels(range(40))[17:23], one.labels(range(17, 23)))
    assert np.array_equal(one.noise(range(40))[17:23], one.noise(range(17, 23)))
    assert np.array_equal(one.noise(range(3)), gaussian_noise(5, range(3), LENGTH, WIDTH))


def test_labels_are_uniform_over_the_classes():
    """Chi-square with 3 degrees of freedom: 16.3 is passed once in a thousand seeds."""
    counts = np.bincount(order(40_000).labels(range(40_000)), minlength=4)
    assert len(counts) == 4
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 16.3


def test_another_seed_has_other_labels():
    assert not np.array_equal(order(seed=5).labels(range(40)), order(seed=6).labels(range(40)))


def test_labels_know_nothing_of_the_noise():
    """Both come from the seed: images of a class must not share a trait of their noise."""
    labels = order().labels(range(20_000))
    first = gaussian_noise(5, range(20_000), LENGTH, WIDTH)[:, 0, 0]
    means = np.array([first[labels == label].mean() for label in range(4)])
    assert np.abs(means).max() < 5 / np.sqrt(5_000)


def test_so_many_of_each_class():
    labels = order(12, per_class=3).labels(range(12))
    assert np.bincount(labels).tolist() == [3, 3, 3, 3]
    assert np.array_equal(order(12, per_class=3).labels(range(5, 9)), labels[5:9])


def test_batches_cover_every_image_once():
    batches = order(10).batches(4, start=3)
    assert [index for batch in batches for index in batch] == list(range(3, 10))
    assert max(len(batch) for batch in batches) == 4


def test_drawing_is_few_step_sampling(toy):
    """Against the sampler written out: each step keeps the first positions, the rest is noise again."""
    model, one = toy(), order()
    drawn = draw(model, one, range(8, 14), SCHEDULES, "it")
    labels, noise = one.labels(range(8, 14)), one.noise(range(8, 14))
    for steps, known in SCHEDULES.items():
        tokens = noise
        for count in known:
            tokens = np.concatenate([tokens[:, :count], noise[:, count:]], axis=1)
            tokens = model.student(tokens, labels, np.full(6, count)).sequence
        expected = np.rint(model.decode(tokens).transpose(0, 2, 3, 1) * 255)
        assert drawn[steps].dtype == np.uint8
        assert np.array_equal(drawn[steps], expected)


def test_steps_that_schedules_share_are_run_once(toy):
    """Two schedules would cost three passes of the student otherwise; here three cost three and not six."""
    model = toy()
    draw(model, order(), range(4), SCHEDULES, "it")
    assert len(model.batches) == 3


def test_an_image_that_is_not_finite_is_a_failed_verification(toy):
    """Never a figure made of NaN."""
    model = toy()
    fine = model.decode

    def decode(sequence):
        images = fine(sequence)
        images[2, 0, 0, 0] = np.nan
        return images

    model.decode = decode
    with pytest.raises(VerificationError, match=r"image 10 of the bundle is not finite in 1 step$"):
        draw(model, order(), range(8, 14), {1: (0,)}, "the bundle")
