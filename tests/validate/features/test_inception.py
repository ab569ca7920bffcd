"""The FID Inception network: its published names and shapes, recorded outputs of two other implementations,
and files that are not what they are said to be.

tests/golden/inception/record.py says how the numbers were made.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from ddexport.validate.features._base import FeatureError, load_extractor
from ddexport.validate.features._inception_network import FidInception, prepare_half_pixel, prepare_tf1
from ddexport.validate.features._inception_weights import WRAPPED, load_weights, random_state

GOLDEN = Path(__file__).parents[2] / "golden" / "inception"


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
def extractors():
    return {name: load_extractor(name, f"random:{RECORD.SEED}") for name in ("inception", "inception_tf")}


@pytest.fixture(scope="module")
def state():
    return random_state(0)


def test_every_key_and_shape_is_the_published_one():
    ours = {name: list(value.shape) for name, value in FidInception().state_dict().items()}
    lines = (GOLDEN / "keys.txt").read_text().splitlines()
    assert sorted(f"{name} {shape}" for name, shape in ours.items()) == lines


@pytest.mark.parametrize("size", RECORD.SIZES)
def test_features_are_those_of_pytorch_fid(extractors, outputs, size):
    features = extractors["inception"](RECORD.images(size)).features
    np.testing.assert_allclose(features, outputs[f"pytorch_fid_{size}"], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("size", RECORD.SIZES)
def test_features_and_probabilities_are_those_of_torch_fidelity(extractors, outputs, size):
    features, probabilities = extractors["inception_tf"](RECORD.images(size))
    np.testing.assert_allclose(features, outputs[f"torch_fidelity_{size}"], atol=2e-5, rtol=2e-5)
    logits = torch.from_numpy(outputs[f"torch_fidelity_logits_{size}"])
    np.testing.assert_allclose(probabilities, logits.softmax(1).numpy(), atol=1e-5)


def test_the_recorded_numbers_would_show_a_wrong_pooling_or_preparation(outputs):
    """The two implementations differ in the preparation alone; that is far above the tolerance used here."""
    for size in RECORD.SIZES:
        apart = np.abs(outputs[f"pytorch_fid_{size}"] - outputs[f"torch_fidelity_{size}"]).max()
        assert apart > 1e-3


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


def test_images_of_299_are_only_scaled():
    image = torch.from_numpy(RECORD.images(299)).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(prepare_half_pixel(image), image / 127.5 - 1)
    torch.testing.assert_close(prepare_tf1(image), (image - 128) / 128)


def test_the_two_rules_of_resizing_on_a_ramp():
    """Twice as large: by half integers the ramp keeps its middle, by TensorFlow 1 it moves to the right."""
    ramp = torch.arange(150.0).expand(1, 3, 150, 150)
    half = (prepare_half_pixel(ramp) + 1) * 127.5
    old = prepare_tf1(ramp) * 128 + 128
    position = torch.arange(299.0)
    scale = 150 / 299
    inner = slice(2, -2)
    torch.testing.assert_close(
        half[0, 0, 5, inner], ((position + 0.5) * scale - 0.5)[inner], atol=1e-3, rtol=0
    )
    torch.testing.assert_close(old[0, 0, 5, inner], (position * scale)[inner], atol=1e-3, rtol=0)


def test_features_do_not_depend_on_the_batch(extractors):
    images = np.concatenate([RECORD.images(64), RECORD.images(64)[:, ::-1]])
    both = extractors["inception"](images).features
    alone = extractors["inception"](images[1:]).features
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-2


def test_random_weights_are_those_of_the_seed_and_the_identity_says_so(extractors):
    first, other = load_extractor("inception", "random:0"), load_extractor("inception", "random:1")
    again = load_extractor("inception", "random:0")
    assert first.identity == again.identity != other.identity
    assert len({first.identity, extractors["inception"].identity, extractors["inception_tf"].identity}) == 3
    with pytest.raises(FeatureError, match="seed"):
        load_extractor("inception", "random:x")


def test_a_missing_file_says_where_it_comes_from(tmp_path):
    for weights in (None, tmp_path / "none.pth"):
        with pytest.raises(FeatureError) as caught:
            load_extractor("inception", weights)
        assert "pytorch-fid" in caught.value.hint and "torch-fidelity" in caught.value.hint
        assert "pt_inception-2015-12-05-6726825d.pth" in caught.value.hint


def test_the_published_file_is_read_and_another_is_warned_of(state, tmp_path, caplog):
    torch.save(state, tmp_path / "weights.pth")
    with caplog.at_level(logging.WARNING):
        extractor = load_extractor("inception", tmp_path / "weights.pth")
    assert "not the published file" in caplog.text
    assert extractor.identity == load_extractor("inception", "random:0").identity  # the same numbers
    without_counters = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(without_counters, tmp_path / "older.pth")
    assert load_extractor("inception", tmp_path / "older.pth").identity == extractor.identity


def test_the_wrappers_names_are_read_too_and_have_no_classifier(state, tmp_path):
    """A state dict saved from pytorch-fid's own module numbers its blocks and leaves the classifier out."""
    numbered = {
        name: f"{block}.{index}" for block, names in WRAPPED.items() for index, name in enumerate(names)
    }
    wrapped = {
        f"{numbered[key.split('.')[0]]}.{key.split('.', 1)[1]}": value
        for key, value in state.items()
        if not key.startswith("fc.")
    }
    torch.save(wrapped, tmp_path / "wrapped.pth")
    extractor = load_extractor("inception", tmp_path / "wrapped.pth")
    readings = extractor(RECORD.images(32))
    assert extractor.classes is None and readings.probabilities is None
    expected = load_extractor("inception", "random:0")(RECORD.images(32)).features
    np.testing.assert_array_equal(readings.features, expected)


def renamed(state):
    return {("Mixed_8a" + key[8:] if key.startswith("Mixed_7a") else key): v for key, v in state.items()}


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "Mixed_5b.branch1x1.conv.weight"}, "missing"),
        (renamed, "unknown"),
        (lambda s: {**s, "fc.weight": torch.zeros(1000, 2048)}, r"\(1000, 2048\)"),
        (lambda s: {**s, "fc.bias": torch.full((1008,), torch.nan)}, "finite"),
        (lambda s: {**s, "fc.bias": torch.zeros(1008, dtype=torch.int64)}, "finite"),
        (lambda s: {**s, "AuxLogits.fc.weight": torch.zeros(1)}, "AuxLogits"),
        (lambda s: list(s.values()), "state dict"),
        (lambda s: {"fc.weight": "text"}, "state dict"),
    ],
)
def test_a_file_of_another_network_is_refused(state, tmp_path, lie, says):
    torch.save(lie(state), tmp_path / "lie.pth")
    with pytest.raises(FeatureError, match=says):
        load_weights(tmp_path / "lie.pth")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_file_that_would_run_code_or_is_damaged_is_refused(tmp_path):
    torch.save({"fc.weight": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint at all")
    (tmp_path / "noise.onnx").write_bytes(b"no graph at all")
    for name in ("evil.pth", "noise.pth", "noise.onnx"):
        with pytest.raises(FeatureError):
            load_weights(tmp_path / name)
    assert not (tmp_path / "made").exists()


def small_graph(path, width=2048, classes=1008, side=299, batch="N"):
    """A graph with the interface of the network: pooled pixels repeated to the widths."""
    from onnx import TensorProto, helper, save

    nodes = [helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0)]
    constants = [helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])]
    outputs = []
    for name, size in (("pool", width), ("logits", classes)):
        if size:
            constants.append(helper.make_tensor(f"{name}_row", TensorProto.FLOAT, [1, size], [1.0] * size))
            nodes.append(helper.make_node("MatMul", ["column", f"{name}_row"], [name]))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, size]))
    nodes.insert(1, helper.make_node("Unsqueeze", ["mean", "last"], ["column"]))
    constants.append(helper.make_tensor("last", TensorProto.INT64, [1], [1]))
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, side, side])
    graph = helper.make_graph(nodes, "inception", [image], outputs, constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.parametrize("classes", [1008, 0])
def test_an_onnx_file_of_the_network_is_run(tmp_path, classes):
    small_graph(tmp_path / "inception.onnx", classes=classes)
    extractor = load_extractor("inception", tmp_path / "inception.onnx")
    images = RECORD.images(64)
    readings = extractor(images)
    prepared = prepare_half_pixel(torch.from_numpy(images).permute(0, 3, 1, 2).float())
    np.testing.assert_allclose(readings.features, float(prepared.mean()), atol=1e-5)
    assert extractor.classes == (classes or None)
    if classes:
        np.testing.assert_allclose(readings.probabilities, 1 / 1008, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"width": 1024}, {"side": 224}, {"batch": 1}], ids=["width", "image size", "fixed batch"]
)
def test_an_onnx_file_of_another_network_is_refused(tmp_path, wrong):
    small_graph(tmp_path / "other.onnx", **wrong)
    with pytest.raises(FeatureError) as caught:
        load_weights(tmp_path / "other.onnx")
    assert "2048" in caught.value.hint
