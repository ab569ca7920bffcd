"""Measuring two sets of images as they are drawn: sums that can be stopped, taken up and trusted."""

from __future__ import annotations

import numpy as np
import pytest

from ddexport.validate import fid_state, paired
from ddexport.validate.drawing import Order
from ddexport.validate.features._base import Extractor, Readings
from ddexport.validate.fid_state import State
from ddexport.validate.metrics.frechet import gaussian_fit
from ddexport.validate.paired import BUNDLE, REFERENCE, PairedRun, PairTally, Sizes
from tests.validate.toys import draw_of

SCHEDULES = {1: (0,), 2: (0, 1)}


class Corners(Extractor):
    """Four values as features, and as probabilities of four classes."""

    name, width, classes, identity = "corners", 4, 4, "corners:0"

    @classmethod
    def load(cls, weights):
        return cls()

    def _read(self, images):
        features = images[:, ::2, 0, ::2].reshape(len(images), 4).astype(np.float32)
        odds = features + 1
        return Readings(features / 50, odds / odds.sum(1, keepdims=True))


def make(toy, images=60, rows=1000, groups=5, seed=3, **fault):
    """A run of a toy bundle with a fault against a toy reference without."""
    order = Order(images, seed, classes=4, length=6, width=3)
    sides = {BUNDLE: draw_of(toy(**fault), SCHEDULES), REFERENCE: draw_of(toy(), SCHEDULES)}
    return PairedRun(order, SCHEDULES, Corners(), sides, Sizes(4, 4, groups, rows))


def measured(run, batch=8, state=None, sink=None):
    run.run(batch, state, lambda count: None, sink)
    return run


def arrays(run):
    return {name: np.array(array) for name, array in run._arrays()}


def assert_identical(a, b):
    """The same numbers to the last bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture
def always(monkeypatch):
    """Saves after every batch."""
    monkeypatch.setattr(fid_state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(fid_state, "SHARE_OF_TIME", 0)


class TestFigures:
    def test_moments_are_those_of_all_images_at_once(self, toy):
        """The stream forgets the images, and loses nothing that counts."""
        kept = {}
        run = measured(
            make(toy), sink=lambda side, steps, at, images: kept.update({(side, steps, at): images})
        )
        for side, steps in run.sets:
            parts = [images for (a, b, _), images in kept.items() if (a, b) == (side, steps)]
            whole = gaussian_fit(Corners()(np.concatenate(parts)).features)
            total = run.sets[side, steps].moments.total()
            assert total.count == 60
            np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-12)
            np.testing.assert_allclose(total.covariance, whole.covariance, rtol=1e-10, atol=1e-12)

    def test_equal_sides_are_at_no_distance(self, toy):
        run = measured(make(toy))
        for pair in run.pairs.values():
            assert pair.mean_squared() == 0.0
            assert (int(pair.identical), int(pair.largest), int(pair.worst)) == (60, 0, -1)

    def test_pairs_are_compared_image_by_image(self):
        """By hand: one image of three is off by 40 in one value, another by 2, which is not visible."""
        pair = PairTally(groups=2)
        first = np.full((3, 3, 3, 3), 100, dtype=np.uint8)
        second = first.copy()
        second[1, 0, 0, 0], second[2, 2, 0, 0] = 140, 102
        pair.update([first, second], [Corners()(first), Corners()(second)], np.array([7, 8, 9]))
        assert pair.changed_share() == pytest.approx(1 / 3)
        assert pair.mean_squared() == pytest.approx(((40 / 50) ** 2 + (2 / 50) ** 2) / 3, rel=1e-5)
        assert (int(pair.largest), int(pair.worst), int(pair.identical)) == (40, 8, 1)
        assert pair.changed_share(np.array([1, 0])) == 1.0  # image 8 is alone in its group

    def test_memory_does_not_grow_with_the_images(self, toy):
        """All that is kept has the same size after 60 images and after 600."""
        small, large = (arrays(measured(make(toy, images=n, rows=50))) for n in (60, 600))
        assert {name: array.shape for name, array in small.items()} == {
            name: array.shape for name, array in large.items()
        }


class TestResuming:
    @pytest.mark.parametrize("stop", [1, 3, 7])
    def test_a_stopped_run_goes_on_to_the_same_numbers(self, toy, tmp_path, monkeypatch, stop):
        """Ctrl-C at any batch: what was counted is saved, and not one bit of the end differs."""
        whole = arrays(measured(make(toy, embedding_error=0.3)))
        run = make(toy, embedding_error=0.3)
        calls, fine = [], run.sides[BUNDLE]

        def draw(order, indices):
            calls.append(1)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return fine(order, indices)

        run.sides[BUNDLE] = draw
        with pytest.raises(KeyboardInterrupt):
            measured(run, state=State(tmp_path, {"run": 1}))
        again = make(toy, embedding_error=0.3)
        assert again.resume(State(tmp_path, {"run": 1})) == 8 * stop
        drawn = []
        measured(again, sink=lambda side, steps, at, images: drawn.append(at.start))
        assert min(drawn) == 8 * stop  # nothing is drawn twice
        assert_identical(arrays(again), whole)

    def test_a_batch_that_was_half_counted_is_drawn_again(self, toy, tmp_path, monkeypatch, always):
        """Stopped between two sums: the last whole state counts."""
        whole = arrays(measured(make(toy, embedding_error=0.3)))
        run = make(toy, embedding_error=0.3)
        updates, fine = [], PairTally.update

        def update(self, *args):
            updates.append(1)
            if len(updates) == 6:
                raise KeyboardInterrupt
            fine(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(paired.PairTally, "update", update)
            with pytest.raises(KeyboardInterrupt):
                measured(run, state=State(tmp_path, {"run": 1}))
        again = make(toy, embedding_error=0.3)
        assert again.resume(State(tmp_path, {"run": 1})) == 16
        assert_identical(arrays(measured(again)), whole)

    def test_arrays_of_other_sizes_are_no_state(self, toy, tmp_path):
        """Same key, other shapes: written by another version of the program."""
        run = measured(make(toy, groups=4))
        State(tmp_path, {"run": 1}).save(60, run._arrays())
        with pytest.raises(fid_state.StateError, match="cannot be read"):
            make(toy, groups=5).resume(State(tmp_path, {"run": 1}))
