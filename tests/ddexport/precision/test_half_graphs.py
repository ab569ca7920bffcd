"""Half graphs as exported: names, order, types node by node, what was measured, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from msgspec import structs

from ddexport.card import read_accuracy
from ddexport.commands import inspect, onnx
from ddexport.export import Exported, WeightRequest, export_bundle
from ddexport.graph.to_onnx import ExportError
from ddexport.precision.cast import PrecisionError
from ddexport.recipe import Parity, Recipe
from ddexport.runtime.bundle import read_manifest

TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
halves = pytest.mark.parametrize("precision", ["fp16", "bf16"])

# What may compute in half: the products, and what lies between two of them.
HALF_OPERATORS = {
    *("MatMul", "Gemm", "Conv", "ConvTranspose", "Add", "Mul", "Softmax", "Gelu", "Sigmoid", "Cast"),
    *("Reshape", "Transpose", "Split", "Concat", "Slice", "Squeeze", "Unsqueeze"),
}


def graph_of(bundle: Path, role: str, precision: str) -> ir.Graph:
    return ir.load(bundle / read_manifest(bundle).graph(role, precision).file).graph


def test_files(half_bundle: Path) -> None:
    """float32 first: it is the runtime's default. Every graph says what it is, and has the tensors of the
    contract, whatever computes inside; float32 graphs have no casts."""
    manifest = read_manifest(half_bundle, verify=True)
    assert manifest.precisions == ("fp32", "fp16", "bf16", "int8")
    for graph in manifest.graphs:
        if graph.precision == "int8" or graph.role == "teacher":
            continue
        split = f"_split{graph.split}" if graph.split else ""
        suffix = "" if graph.precision == "fp32" else f"_{graph.precision}"
        assert graph.file == f"{graph.role}{split}{suffix}.onnx"
        model = ir.load(half_bundle / graph.file)
        assert model.metadata_props["precision"] == graph.precision
        assert model.opset_imports[""] == (22 if graph.precision == "bf16" else 20)
        inputs, outputs = manifest.tensors(graph)
        for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
            assert [(v.name, str(v.dtype).lower()) for v in values] == [
                (s.name, {"float32": "float", "int64": "int64"}[s.dtype]) for s in specs
            ]
        if graph.precision == "fp32":
            assert "Cast" not in {node.op_type for node in model.graph}


@halves
def test_the_islands_are_float32(half_bundle: Path, precision: str) -> None:
    """Norms, divisions, roots, resizes, heads: whatever is not on the list of half operators. The residual
    stream too: a half addition adds a bias or a mask, so that one side of it is a constant. (LlamaGen has
    no bias.)"""
    half = TYPES[precision]
    for graph in (graph_of(half_bundle, role, precision) for role in ("student", "decoder")):
        for node in graph:
            types = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None}
            if half in types:
                assert node.op_type in HALF_OPERATORS, node.op_type
                assert node.op_type == "Cast" or TYPES["fp32"] not in types, node
            if node.op_type == "Add" and node.outputs[0].dtype == half:
                assert any(value.is_initializer() for value in node.inputs)
        makers = {value.name: node for node in graph for value in node.outputs}
        for output in graph.outputs:  # the last operators before an output: heads, clamp
            assert all(value.dtype != half for value in makers[output.name].inputs if value is not None)


@halves
def test_the_products_are_half(half_bundle: Path, precision: str) -> None:
    """All of the blocks', and all convolutions but the quantizer's and the last."""
    recipe = read_manifest(half_bundle).recipe
    model, student = recipe["model"], graph_of(half_bundle, "student", precision)
    half = [n for n in student if n.op_type == "MatMul" and n.outputs[0].dtype == TYPES[precision]]
    products = 6 + (recipe["family"] == "llamagen_dd")  # qkv, scores, values, projection, the MLP's
    assert len(half) == products * model["depth"]
    decoder = graph_of(half_bundle, "decoder", precision)
    full = [n for n in decoder if n.op_type == "Conv" and n.outputs[0].dtype == TYPES["fp32"]]
    assert len(full) == 1 + len(model.get("scales", ()))  # conv_out, and a phi for each scale


def test_errors_at_every_batch_size(half_bundle: Path) -> None:
    """Of every output, by the engine that rounds as a half engine would."""
    manifest, measured = read_manifest(half_bundle), read_accuracy(half_bundle)
    for graph in (g for g in manifest.graphs if g.precision in TYPES and g.role != "teacher"):
        accuracy = measured[graph.file]
        outputs = ("sequence", "logits") if graph.role == "student" else ("image",)
        rows = [(e["batch"], e["output"]) for e in accuracy["errors"]]
        assert rows == [(batch, name) for batch in (1, 3) for name in outputs]
        unit = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-1}[graph.precision]
        assert all(0 < e["rms"] < unit for e in accuracy["errors"])
        assert ("emulated" in accuracy["engine"]) == (graph.precision != "fp32")
        assert accuracy["weights"][graph.precision] > 0.5 * sum(accuracy["weights"].values())


def test_kept_patterns_reach_the_trace(
    tiny_llamagen_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(module: torch.nn.Module, *_: object) -> None:
        raise LookupError(module)

    monkeypatch.setattr("ddexport.export.onnx_from_module", trace)
    request, keep = WeightRequest({}, random_seed=5), ("blocks.0.mlp",)
    with pytest.raises(LookupError) as caught:
        export_bundle(tiny_llamagen_recipe, tmp_path / "b", request, precisions=("fp16",), keep_fp32=keep)
    block = caught.value.args[0].blocks[0]
    types = {p.dtype for p in block.mlp.parameters()}, {p.dtype for p in block.attention.parameters()}
    assert types == ({torch.float32}, {torch.float16})


@pytest.mark.slow
def test_fp16_alone_and_kept_patterns(tiny_llamagen_recipe: Recipe, tmp_path: Path) -> None:
    patterns, request = ("blocks.0.mlp", "decoder.mid.*"), WeightRequest({}, random_seed=5)
    made = export_bundle(
        tiny_llamagen_recipe, tmp_path / "b", request, precisions=("fp16",), keep_fp32=patterns
    )
    assert made.manifest.precisions == ("fp16",)
    assert {path.name for path in made.path.glob("*.onnx")} == {"student_fp16.onnx", "decoder_fp16.onnx"}
    assert [g.keep_fp32 for g in read_manifest(made.path).graphs] == [patterns] * 2
    products = [n for n in graph_of(made.path, "student", "fp16") if n.op_type == "MatMul"]
    assert sum(n.outputs[0].dtype == TYPES["fp16"] for n in products) == 4  # without the MLP's two


def test_what_is_refused_leaves_nothing(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Precisions that there are not, that the recipe states no limits for, or that the opset lacks; and a
    pattern without a module."""
    bare = structs.replace(tiny_recipe, parity=Parity(fp32=tiny_recipe.parity.fp32))
    for recipe, error, options in (
        (tiny_recipe, PrecisionError, {"precisions": ("fp8",)}),
        (tiny_recipe, PrecisionError, {"precisions": ("fp16", "fp16")}),
        (tiny_recipe, PrecisionError, {"precisions": ()}),
        (tiny_recipe, PrecisionError, {"precisions": ("fp16",), "keep_fp32": ("blocks.7.*",)}),
        (tiny_recipe, ExportError, {"precisions": ("bf16",), "opset": 20}),
        (bare, PrecisionError, {"precisions": ("bf16",)}),
        (bare, PrecisionError, {"precisions": ("int8",)}),
    ):
        with pytest.raises(error):
            export_bundle(recipe, tmp_path / "b", WeightRequest({}, random_seed=0), **options)
    assert list(tmp_path.iterdir()) == []


def test_the_table(half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured of each graph, for people and as JSON; `inspect` and the model card show it again."""
    made, measured = Exported(half_bundle, read_manifest(half_bundle)), read_accuracy(half_bundle)
    monkeypatch.setattr("ddexport.export.export_bundle", lambda *_, **__: made)
    arguments = ["--model", "digits-var", "--precision", "fp32,fp16,bf16", "-o", str(tmp_path / "out")]
    text = CliRunner().invoke(onnx.command, arguments).stdout
    shown = CliRunner().invoke(inspect.command, [str(half_bundle)]).stdout
    for output in (text, shown, (half_bundle / "README.md").read_text()):
        assert all(file in output for file in measured)
    assert " dB" in text and " dB" in shown
    data = json.loads(CliRunner().invoke(onnx.command, [*arguments, "--json"]).stdout)
    assert data["accuracy"] == measured
    assert {g["file"] for g in data["graphs"]} == set(measured) != set()
