"""The oracle rounds: it shows the error of torch in half, where ONNX Runtime's CPU provider hides it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from ddexport.export import Exported, WeightRequest, load_parts
from ddexport.graph.emulate import HALF_TYPES, EmulatedGraph, emulate_half
from ddexport.graph.spec import graph_specs, sample_inputs
from ddexport.precision.cast import in_precision
from ddexport.recipe import recipe_of

HALVES = ("fp16", "bf16")
ONNX_TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


def graph_path(exported: Exported, role: str, precision: str) -> Path:
    return exported.path / exported.manifest.graph(role, precision).file


def casts_to(model: onnx.ModelProto, kind: int) -> int:
    casts = (node for node in model.graph.node if node.op_type == "Cast")
    return sum(a.i == kind for node in casts for a in node.attribute if a.name == "to")


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("role", ["student", "decoder"])
class TestThePass:
    def test_nothing_computes_in_half_any_more(
        self, half_export: Exported, role: str, precision: str
    ) -> None:
        """Half values come out of casts and weights, and go into casts."""
        model = ir.load(graph_path(half_export, role, precision))
        before = [(v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
        emulate_half(model)
        for node in model.graph:
            inputs = {value.dtype for value in node.inputs if value is not None}
            if node.op_type != "Cast":
                assert not inputs & set(HALF_TYPES), node
                assert not {value.dtype for value in node.outputs} & set(HALF_TYPES), node
        assert [(v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)] == before

    def test_a_second_run_changes_nothing(self, half_export: Exported, role: str, precision: str) -> None:
        """Nor does the first one of a float32 graph."""
        for model in (ir.load(graph_path(half_export, role, name)) for name in (precision, "fp32")):
            if model.metadata_props["precision"] != "fp32":
                emulate_half(model)
            before = ir.to_proto(model).SerializeToString()
            emulate_half(model)
            assert ir.to_proto(model).SerializeToString() == before

    def test_the_engine_drops_no_rounding(
        self, half_export: Exported, role: str, precision: str, tmp_path: Path
    ) -> None:
        """Its optimiser removes pairs of casts that lose nothing; these lose something, and must stay."""
        model = ir.load(graph_path(half_export, role, precision))
        emulate_half(model)
        proto = ir.to_proto(model)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kind = ONNX_TYPES[precision]
        # A rounding of the same value twice, once for each of two readers, may be done once.
        sources = {n.input[0] for n in proto.graph.node if n.op_type == "Cast"
                   for a in n.attribute if a.name == "to" and a.i == kind}  # fmt: skip
        assert casts_to(onnx.load(tmp_path / "optimised.onnx"), kind) >= len(sources) > 10


@pytest.mark.parametrize("role", ["student", "decoder"])
class TestAgainstTorch:
    def errors(self, exported: Exported, role: str, precision: str) -> dict[str, float]:
        """Relative error of torch in half, of the emulated graph, and of the provider as it is."""
        recipe = recipe_of(exported.manifest)
        parts = load_parts(recipe, WeightRequest({}, random_seed=exported.manifest.weights.seed))
        spec = next(spec for spec in graph_specs(recipe) if spec.role == role)
        feeds = sample_inputs(spec, recipe, 3, seed=2)
        tensors = tuple(torch.from_numpy(value) for value in feeds.values())
        name = "logits" if role == "student" else "image"

        def run(module: torch.nn.Module) -> np.ndarray:
            with torch.no_grad():
                out = module(*tensors)
            return (out[-1] if isinstance(out, tuple) else out).numpy()

        # The weights' own rounding is in all three: what is measured is the rounding between operators.
        half = in_precision(parts[spec.part], precision)
        rounded = copy.deepcopy(parts[spec.part])
        rounded.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
        wanted = run(rounded)
        path = graph_path(exported, role, precision)
        found = {
            "torch": relative(run(half), wanted),
            "emulated": relative(EmulatedGraph(path, threads=1).run(feeds)[name], wanted),
        }
        if precision == "fp16":
            plain = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            outputs = dict(zip([o.name for o in plain.get_outputs()], plain.run(None, feeds), strict=True))
            found["plain"] = relative(outputs[name], wanted)
        return found

    @pytest.mark.parametrize("precision", HALVES)
    def test_the_error_is_that_of_torch_in_half(
        self, half_export: Exported, role: str, precision: str
    ) -> None:
        found = self.errors(half_export, role, precision)
        assert 0.5 < found["emulated"] / found["torch"] < 2
        unit = {"fp16": 2**-11, "bf16": 2**-8}[precision]
        assert 0.05 * unit < found["emulated"] < 10 * unit

    def test_the_provider_as_it_is_hides_it(self, half_export: Exported, role: str) -> None:
        """Why there is an oracle: without it the error of fp16 looks far smaller than it is."""
        found = self.errors(half_export, role, "fp16")
        assert found["plain"] < 0.6 * found["emulated"]


def test_bf16_runs_where_the_provider_refuses(half_export: Exported) -> None:
    path = graph_path(half_export, "decoder", "bf16")
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    recipe = recipe_of(half_export.manifest)
    spec = next(spec for spec in graph_specs(recipe) if spec.role == "decoder")
    image = EmulatedGraph(path, threads=1).run(sample_inputs(spec, recipe, 2, seed=0))["image"]
    assert image.dtype == np.float32
    assert np.isfinite(image).all()


def test_weights_in_a_file_beside_the_graph(half_export: Exported, tmp_path: Path) -> None:
    """Large graphs keep them there; the engine reads them from the graph's own folder."""
    path = graph_path(half_export, "student", "fp16")
    ir.save(ir.load(path), tmp_path / "student.onnx", external_data="student.onnx.data")
    assert (tmp_path / "student.onnx.data").stat().st_size > 1000
    recipe = recipe_of(half_export.manifest)
    feeds = sample_inputs(graph_specs(recipe)[0], recipe, 2, seed=0)
    inside, beside = (EmulatedGraph(p, threads=1).run(feeds) for p in (path, tmp_path / "student.onnx"))
    assert all(np.array_equal(inside[name], beside[name]) for name in inside)
