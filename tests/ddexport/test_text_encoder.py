"""The T5 encoder against transformers' own outputs, as a module and as a graph."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddexport.families._weight_file import CheckpointError
from ddexport.graph.spec import GraphSpec
from ddexport.graph.to_onnx import check_onnx, onnx_from_module
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.errors import DDError
from ddexport.text_encoder import text_encoder

FOLDER = Path(__file__).parents[1] / "golden" / "llamagen-t2i-small"
INPUTS = ("input_ids", "attention_mask")
CASES = pytest.mark.parametrize("case", ["t5_", "t5_long_"])
SPEC = GraphSpec(
    "text_encoder",
    "text_encoder",
    tuple(TensorSpec(name, "int64", ("batch", "tokens")) for name in INPUTS),
    (TensorSpec("hidden", "float32", ("batch", "tokens", 48)),),
    tolerance=1e-5,
)

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def expected() -> Arrays:
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the golden encoder to change."""
    return Path(shutil.copytree(FOLDER / "t5-encoder", tmp_path / "t5"))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Arrays], np.ndarray]:
    """The exported encoder in ONNX Runtime."""
    path = tmp_path_factory.mktemp("encoder") / "text_encoder.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddexport.graph.to_onnx.sample_inputs", lambda *_, **__: texts(2, 7))
        onnx_from_module(text_encoder(FOLDER / "t5-encoder"), SPEC, None, path)  # type: ignore[arg-type]
    check_onnx(path)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(str(path))
    return lambda feeds: session.run(None, feeds)[0]


def texts(batch: int, tokens: int) -> Arrays:
    """Random ids; the first text is as long as the batch, the others are shorter."""
    rng = np.random.default_rng(tokens)
    counts = np.linspace(tokens, 1, batch).round()[:, None]
    return {
        "input_ids": rng.integers(0, 96, (batch, tokens)),
        "attention_mask": (np.arange(tokens) < counts).astype(np.int64),
    }


def hidden(encoder: torch.nn.Module, feeds: Arrays) -> np.ndarray:
    return encoder(*(torch.from_numpy(feeds[name]) for name in INPUTS)).numpy()


@CASES
def test_the_golden_hidden_states(case: str, expected: Arrays, graph: Any) -> None:
    feeds = {name: expected[case + name] for name in INPUTS}
    wanted, valid = expected[f"{case}last_hidden_state"], feeds["attention_mask"].astype(bool)
    for got in (hidden(text_encoder(FOLDER / "t5-encoder"), feeds), graph(feeds)):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[valid], wanted[valid], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 3), (3, 12), (2, 120), (5, 7), (1, 200)])
def test_the_graph_is_the_module_at_every_size(batch: int, tokens: int, graph: Any) -> None:
    feeds = texts(batch, tokens)
    wanted = hidden(text_encoder(FOLDER / "t5-encoder"), feeds)
    got = graph(feeds)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=SPEC.tolerance * np.abs(wanted).max())
    for row in range(batch):  # padding and other texts do not matter
        count = feeds["attention_mask"][row].sum()
        alone = graph({name: value[row : row + 1, :count] for name, value in feeds.items()})
        np.testing.assert_allclose(alone[0], got[row, :count], rtol=0, atol=2e-5)


def test_buckets_are_transformers_own_at_every_distance() -> None:
    attention = text_encoder(FOLDER / "t5-encoder").stack.block[0].layer[0].SelfAttention
    distances = torch.arange(-400, 401)
    wanted = type(attention)._relative_position_bucket(distances)
    assert torch.equal(attention._relative_position_bucket(distances), wanted)


class TestWeights:
    def test_those_of_a_decoder_are_left_out(self, directory: Path, expected: Arrays) -> None:
        """A whole T5, in shards, beside an index of other files, as flan-t5-xl is published."""
        state = load_file(directory / "model.safetensors")
        first = "encoder.block.0.layer.0.SelfAttention.q.weight"
        half = {name: value for name, value in state.items() if name < first}
        rest = {name: value for name, value in state.items() if name >= first}
        rest |= {
            "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2),
            "lm_head.weight": torch.ones(2),
        }
        places = {}
        for number, shard in enumerate((half, rest), 1):
            name = f"model-0000{number}-of-00002.safetensors"
            save_file(shard, directory / name)
            places |= dict.fromkeys(shard, name)
        (directory / "model.safetensors").unlink()
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (directory / "pytorch_model.bin.index.json").write_text("{}")
        feeds = {name: expected[f"t5_{name}"] for name in INPUTS}
        wanted = hidden(text_encoder(FOLDER / "t5-encoder"), feeds)
        for path in (directory, index):
            np.testing.assert_array_equal(hidden(text_encoder(path), feeds), wanted)

    def test_bfloat16_is_read_as_float32(self, directory: Path) -> None:
        path = directory / "model.safetensors"
        save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
        assert {value.dtype for value in text_encoder(path).state_dict().values()} == {torch.float32}

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda s: s.pop("encoder.block.1.layer.1.DenseReluDense.wo.weight"), "lacks block.1"),
            (lambda s: s.pop("shared.weight"), "lacks embed_tokens"),
            (lambda s: s.update({"encoder.block.2.layer_norm.weight": torch.ones(2)}), "besides block.2"),
            (lambda s: s.update({"shared.weight": torch.ones(97, 48)}), "other shapes embed_tokens"),
            (lambda s: s["shared.weight"].fill_(float("nan")), "not finite"),
        ],
    )
    def test_those_of_another_model_are_refused(self, change: Any, text: str, directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        state["shared.weight"] = state.pop("encoder.embed_tokens.weight", state.get("shared.weight"))
        change(state)
        save_file(state, directory / "model.safetensors")
        with pytest.raises(CheckpointError, match=text):
            text_encoder(directory)

    @pytest.mark.parametrize(
        ("config", "text"),
        [
            ("[]", "does not describe"),
            ("{}", "model_type"),
            ('{"model_type": "umt5"}', "umt5"),
            ('{"model_type": "t5", "d_model": "x"}', "does not describe"),
            ("{", "JSON"),
        ],
    )
    def test_a_config_of_something_else_is_refused(self, config: str, text: str, directory: Path) -> None:
        (directory / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=text):
            text_encoder(directory)


def test_its_tokenizer_lies_beside_it(directory: Path) -> None:
    encoder = text_encoder(directory)
    assert encoder.tokenizer_file(48) == directory / "tokenizer.json"
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        encoder.tokenizer_file(48)
    with pytest.raises(CheckpointError, match="width 48"):
        encoder.tokenizer_file(2048)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DDError) as caught:
        text_encoder(FOLDER / "t5-encoder")
    assert 'pip install "ddexport[text-encoder]"' in caught.value.hint
