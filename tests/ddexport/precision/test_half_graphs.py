"""Half graphs as exported: names, order, types node by node, what the manifest says, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from msgspec import structs

from ddexport.card import read_accuracy
from ddexport.export import Exported, WeightRequest, export_bundle, load_parts
from ddexport.families._checkpoint import save_part
from ddexport.graph.to_onnx import ExportError
from ddexport.graph.verify import PRODUCTS
from ddexport.precision.cast import PrecisionError
from ddexport.recipe import Parity, Recipe
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import VerificationError

HALVES = ("fp16", "bf16")
TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

# What may compute in half: the products, and what lies between two of them.
HALF_OPERATORS = {
    *("MatMul", "Gemm", "Conv", "ConvTranspose", "Add", "Mul", "Softmax", "Gelu", "Sigmoid", "Cast"),
    *("Reshape", "Transpose", "Split", "Concat", "Slice", "Squeeze", "Unsqueeze"),
}


def graph_of(exported: Exported, role: str, precision: str) -> ir.Graph:
    return ir.load(exported.path / exported.manifest.graph(role, precision).file).graph


class TestFiles:
    def test_names_and_order(self, half_export: Exported) -> None:
        """float32 first: it is the runtime's default."""
        files = [(g.role, g.precision, g.file) for g in half_export.manifest.graphs]
        assert files == [
            (role, precision, f"{role}{suffix}.onnx")
            for precision, suffix in (("fp32", ""), ("fp16", "_fp16"), ("bf16", "_bf16"))
            for role in ("student", "decoder")
        ]
        assert half_export.manifest.precisions == ("fp32", "fp16", "bf16")
        read_manifest(half_export.path, verify=True)

    def test_the_graphs_say_their_precision(self, half_export: Exported) -> None:
        for graph in half_export.manifest.graphs:
            model = ir.load(half_export.path / graph.file)
            assert model.metadata_props["precision"] == graph.precision
            assert model.opset_imports[""] == (22 if graph.precision == "bf16" else 20)

    def test_the_model_card_names_them(self, half_export: Exported) -> None:
        card = (half_export.path / "README.md").read_text()
        assert "student_fp16.onnx" in card
        assert "decoder_bf16.onnx" in card


class TestTypes:
    @pytest.mark.parametrize("role", ["student", "decoder"])
    @pytest.mark.parametrize("precision", ["fp32", *HALVES])
    def test_inputs_and_outputs_are_the_contract(
        self, half_export: Exported, role: str, precision: str
    ) -> None:
        graph, manifest = graph_of(half_export, role, precision), half_export.manifest
        inputs, outputs = manifest.tensors(manifest.graph(role, precision))
        for values, specs in ((graph.inputs, inputs), (graph.outputs, outputs)):
            assert [(v.name, str(v.dtype).lower()) for v in values] == [
                (s.name, {"float32": "float", "int64": "int64"}[s.dtype]) for s in specs
            ]

    @pytest.mark.parametrize("role", ["student", "decoder"])
    def test_float32_graphs_have_no_casts(self, half_export: Exported, role: str) -> None:
        """The islands in the blocks are nothing there."""
        assert not [node for node in graph_of(half_export, role, "fp32") if node.op_type == "Cast"]

    @pytest.mark.parametrize("role", ["student", "decoder"])
    @pytest.mark.parametrize("precision", HALVES)
    def test_the_islands_are_float32(self, half_export: Exported, role: str, precision: str) -> None:
        """Norms, divisions, roots, resizes, heads: whatever is not on the list of half operators."""
        graph, half = graph_of(half_export, role, precision), TYPES[precision]
        for node in graph:
            types = {v.dtype for v in (*node.inputs, *node.outputs) if v is not None}
            if half in types:
                assert node.op_type in HALF_OPERATORS, node.op_type
                assert node.op_type == "Cast" or TYPES["fp32"] not in types, node
        makers = {value.name: node for node in graph for value in node.outputs}
        for output in graph.outputs:  # the last operators before an output: heads, clamp
            assert all(value.dtype != half for value in makers[output.name].inputs if value is not None)

    @pytest.mark.parametrize("precision", HALVES)
    def test_the_residual_stream_is_float32(self, half_export: Exported, precision: str) -> None:
        """A half addition adds a bias or a mask: one side of it is a constant. (LlamaGen's has no bias.)"""
        for role in ("student", "decoder"):
            for node in graph_of(half_export, role, precision):
                if node.op_type == "Add" and node.outputs[0].dtype == TYPES[precision]:
                    assert any(value.is_initializer() for value in node.inputs)

    @pytest.mark.parametrize("precision", HALVES)
    def test_the_products_are_half(self, half_export: Exported, precision: str) -> None:
        """All of the blocks', and all convolutions but the quantizer's and the last."""
        student = graph_of(half_export, "student", precision)
        half = [n for n in student if n.op_type == "MatMul" and n.outputs[0].dtype == TYPES[precision]]
        assert len(half) == 6  # one block: qkv, scores, values, projection, two of the MLP
        decoder = graph_of(half_export, "decoder", precision)
        full = [n for n in decoder if n.op_type == "Conv" and n.outputs[0].dtype == TYPES["fp32"]]
        scales = len(half_export.manifest.recipe["model"].get("scales", ()))
        assert len(full) == 1 + scales  # conv_out, and a phi for each scale


class TestAccuracy:
    def test_errors_at_every_batch_size(self, half_export: Exported) -> None:
        """Of every output, and by the engine that rounds where a half engine would."""
        for graph in half_export.manifest.graphs:
            accuracy = read_accuracy(half_export.path)[graph.file]
            rows = [(e["batch"], e["output"]) for e in accuracy["errors"]]
            outputs = ("sequence", "logits") if graph.role == "student" else ("image",)
            assert rows == [(batch, name) for batch in (1, 2, 3, 8) for name in outputs]
            unit = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-1}[graph.precision]
            assert all(0 < e["rms"] < unit for e in accuracy["errors"])
            assert ("half rounding emulated" in accuracy["engine"]) == (graph.precision != "fp32")

    def test_weights_by_type_are_those_of_the_graph(self, half_export: Exported) -> None:
        for graph in half_export.manifest.graphs:
            wanted: dict[str, int] = {}
            for node in graph_of(half_export, graph.role, graph.precision):
                if node.op_type in PRODUCTS:
                    kind = next(k for k, dtype in TYPES.items() if dtype == node.outputs[0].dtype)
                    stored = [v.const_value for v in node.inputs[:2] if v is not None]
                    wanted[kind] = wanted.get(kind, 0) + sum(v.size for v in stored if v is not None)
            weights = read_accuracy(half_export.path)[graph.file]["weights"]
            assert weights == wanted
            assert (
                weights.get(graph.precision, 0) > 0.5 * sum(weights.values())
            ) or graph.precision == "fp32"


class TestOptions:
    def test_fp16_alone_and_kept_patterns(self, tiny_llamagen_recipe: Recipe, tmp_path: Path) -> None:
        patterns = ("blocks.0.mlp", "decoder.mid.*")
        request = WeightRequest({}, random_seed=5)
        made = export_bundle(
            tiny_llamagen_recipe, tmp_path / "b", request, precisions=("fp16",), keep_fp32=patterns
        )
        assert made.manifest.precisions == ("fp16",)
        names = {path.name for path in made.path.iterdir()}
        assert names == {"bundle.json", "labels.json", "README.md", "parity", "student_fp16.onnx",
                         "decoder_fp16.onnx"}  # fmt: skip
        assert [g.keep_fp32 for g in read_manifest(made.path).graphs] == [patterns] * 2
        half = [n for n in graph_of(made, "student", "fp16")
                if n.op_type == "MatMul" and n.outputs[0].dtype == TYPES["fp16"]]  # fmt: skip
        assert len(half) == 4  # without the MLP's two

    @pytest.mark.parametrize(
        ("precisions", "message"),
        [(("fp8",), "no precision 'fp8'"), (("fp16", "fp16"), "named twice"), ((), "no precision is named")],
    )
    def test_names_that_are_wrong(
        self, tiny_recipe: Recipe, tmp_path: Path, precisions: tuple[str, ...], message: str
    ) -> None:
        with pytest.raises(PrecisionError, match=message):
            export_bundle(
                tiny_recipe, tmp_path / "b", WeightRequest({}, random_seed=0), precisions=precisions
            )

    def test_a_recipe_without_limits(self, tiny_recipe: Recipe, tmp_path: Path) -> None:
        recipe = structs.replace(tiny_recipe, parity=Parity(fp32=tiny_recipe.parity.fp32))
        with pytest.raises(PrecisionError, match="states no parity limits for bf16"):
            export_bundle(recipe, tmp_path / "b", WeightRequest({}, random_seed=0), precisions=("bf16",))

    def test_bf16_needs_a_newer_opset(self, tiny_recipe: Recipe, tmp_path: Path) -> None:
        """Conv takes bfloat16 from opset 22 on; an invalid graph is not written."""
        with pytest.raises(ExportError, match="opset 20 has no convolution in bf16"):
            export_bundle(
                tiny_recipe, tmp_path / "b", WeightRequest({}, random_seed=0), precisions=("bf16",), opset=20
            )

    def test_an_unknown_pattern_leaves_nothing(self, tiny_recipe: Recipe, tmp_path: Path) -> None:
        request = WeightRequest({}, random_seed=0)
        with pytest.raises(PrecisionError, match=r"blocks\.7"):
            export_bundle(
                tiny_recipe, tmp_path / "b", request, precisions=("fp16",), keep_fp32=("blocks.7.*",)
            )
        assert list(tmp_path.iterdir()) == []


class TestNothingBadGetsOut:
    def test_limits_that_are_passed(
        self,
        tiny_llamagen_recipe: Recipe,
        llamagen_half: Exported,
        replayed_trace: Callable[..., None],
        tmp_path: Path,
    ) -> None:
        """The recipe's limits hold at the export already."""
        replayed_trace(lambda path: None, llamagen_half.path)
        parity = tiny_llamagen_recipe.parity
        tight = structs.replace(parity.fp16, embedding_error=1e-9)
        recipe = structs.replace(tiny_llamagen_recipe, parity=structs.replace(parity, fp16=tight))
        with pytest.raises(VerificationError, match=r"student_fp16\.onnx is too far from float32") as caught:
            export_bundle(recipe, tmp_path / "b", WeightRequest({}, random_seed=5), precisions=("fp16",))
        assert "docs/debugging.md" in caught.value.hint
        assert list(tmp_path.iterdir()) == []

    def test_tokens_that_are_not_the_largest_logits(
        self,
        tiny_llamagen_recipe: Recipe,
        llamagen_half: Exported,
        replayed_trace: Callable[..., None],
        wrong_tokens: Callable[[Path], None],
        tmp_path: Path,
    ) -> None:
        """They may differ from float32's, but not from those of the graph's own logits."""
        replayed_trace(wrong_tokens, llamagen_half.path)
        request = WeightRequest({}, random_seed=5)
        with pytest.raises(VerificationError, match=r"student_fp16\.onnx: tokens are not the largest logits"):
            export_bundle(tiny_llamagen_recipe, tmp_path / "b", request, precisions=("fp16",))
        assert list(tmp_path.iterdir()) == []

    def test_a_weight_that_overflows(self, tiny_llamagen_recipe: Recipe, tmp_path: Path) -> None:
        import torch

        recipe, request = tiny_llamagen_recipe, WeightRequest({}, random_seed=5)
        parts = load_parts(recipe, request)
        with torch.no_grad():
            parts["student"].blocks[0].mlp.output.weight[0, 0] = 1e5
        files = {role: tmp_path / f"{role}.safetensors" for role in ("student", "tokenizer")}
        for role, path in files.items():
            save_part(parts[role], recipe, role, path, torch.float32)
        with pytest.raises(PrecisionError, match=r"student: blocks\.0\.mlp\.output\.weight holds 100000"):
            export_bundle(recipe, tmp_path / "b", WeightRequest(files), precisions=("fp16",))
        assert not (tmp_path / "b").exists()


class TestCommand:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--precision", "fp8"], "'fp8' is not one of fp32, fp16, bf16"),
            (["--precision", "fp16,fp16"], "fp16 is named twice"),
            (["--precision", ""], "'' is not one of"),
            (["--keep-fp32", "blocks.0"], "needs fp16 or bf16 in --precision"),
        ],
    )
    def test_usage_errors(self, options: list[str], words: str) -> None:
        from ddexport.commands.onnx import command

        result = CliRunner().invoke(command, ["--model", "digits-var", *options])
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())

    def test_the_table(self, half_export: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was measured of each graph, for people and as JSON; `inspect` shows it again."""
        from ddexport.commands import inspect, onnx

        monkeypatch.setattr("ddexport.export.export_bundle", lambda *_, **__: half_export)
        arguments = ["--model", "digits-var", "--precision", "fp32,fp16,bf16", "-o", str(tmp_path / "out")]
        text = CliRunner().invoke(onnx.command, arguments).stdout
        shown = CliRunner().invoke(inspect.command, [str(half_export.path)]).stdout
        for output in (text, shown):
            assert output.count("graph  ") == 1 and output.count("student_fp16.onnx  ") == 2 + (
                output == text
            )
            assert "differ" in output and " dB, " in output
        data = json.loads(CliRunner().invoke(onnx.command, [*arguments, "--json"]).stdout)
        assert data["accuracy"] == read_accuracy(half_export.path)
        assert list(data["accuracy"]) != [] and {g["file"] for g in data["graphs"]} == set(data["accuracy"])
