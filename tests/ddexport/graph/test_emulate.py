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

from ddexport.export import WeightRequest, load_parts
from ddexport.graph.emulate import HALF_TYPES, EmulatedGraph, emulate_half, session_of
from ddexport.graph.spec import GraphSpec, graph_specs, sample_inputs
from ddexport.precision.cast import in_precision
from ddexport.recipe import Recipe, recipe_of
from ddexport.runtime.bundle import read_manifest

COMPUTE = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Add", "Mul", "Softmax", "Gelu", "Sigmoid"}


def graph_path(bundle: Path, role: str, precision: str) -> Path:
    return bundle / read_manifest(bundle).graph(role, precision).file


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("role", ["student", "decoder"])
def test_every_operator_is_rounded_once(half_bundle: Path, role: str, precision: str, tmp_path: Path) -> None:
    """Nothing computes in half: half values come out of casts and weights, and go into casts. What computed
    in half is rounded. The engine's optimiser, which removes pairs of casts that lose nothing, keeps these; a
    second run changes nothing, nor does the first one of a float32 graph."""
    path = graph_path(half_bundle, role, precision)
    half = {n.name for n in ir.load(path).graph if n.outputs[0].dtype in HALF_TYPES}
    model = ir.load(path)
    ends = [(v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]
    emulate_half(model)
    assert [(v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)] == ends
    for node in (node for node in model.graph if node.op_type != "Cast"):
        values = (*node.inputs, *node.outputs)
        assert not {value.dtype for value in values if value is not None} & set(HALF_TYPES), node
        if node.name in half and node.op_type in COMPUTE:
            assert {user.op_type for user, _ in node.outputs[0].uses()} == {"Cast"}, node
    for same in (model, ir.load(graph_path(half_bundle, role, "fp32"))):
        before = ir.to_proto(same).SerializeToString()
        emulate_half(same)
        assert ir.to_proto(same).SerializeToString() == before

    proto, options = ir.to_proto(model), ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    folder = str(path.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]

    def roundings(graph: onnx.GraphProto) -> list[str]:
        """What is rounded, one name for each cast."""
        casts = (node for node in graph.node if node.op_type == "Cast")
        return [node.input[0] for node in casts for a in node.attribute if a.name == "to" and a.i == kind]

    # A rounding of the same value twice, once for each of two readers, may be done once, and what was rounded
    # already need not be rounded again.
    again = {name for node in proto.graph.node if node.op_type == "Cast" for name in node.output}
    left = roundings(onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph)
    assert len(left) >= len(set(roundings(proto.graph)) - again) > 10


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_error_is_that_of_torch_in_half(half_bundle: Path, precision: str) -> None:
    """And of the size of the type's rounding. ONNX Runtime by itself hides most of it in fp16, and does not
    run bf16: that is why there is an oracle."""
    recipe = recipe_of(read_manifest(half_bundle))
    parts = load_parts(recipe, WeightRequest({}))
    for spec in graph_specs(recipe):
        check_error(half_bundle, recipe, parts[spec.part], spec, precision)


def check_error(bundle: Path, recipe: Recipe, part: torch.nn.Module, spec: GraphSpec, precision: str) -> None:
    feeds = sample_inputs(spec, recipe, 3, seed=2)
    tensors = tuple(torch.from_numpy(value) for value in feeds.values())
    name = "logits" if spec.role == "student" else "image"

    def run(module: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            out = module(*tensors)
        return (out[-1] if isinstance(out, tuple) else out).numpy()

    # The weights' own rounding is in all three: what is measured is the rounding between operators.
    half = in_precision(part, precision)
    rounded = copy.deepcopy(part)
    rounded.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    wanted, path = run(rounded), graph_path(bundle, spec.role, precision)
    error = relative(EmulatedGraph(path, threads=1).run(feeds)[name], wanted)
    assert 0.5 < error / relative(run(half), wanted) < 2
    unit = {"fp16": 2**-11, "bf16": 2**-8}[precision]
    assert 0.05 * unit < error < 10 * unit
    if precision == "bf16":
        with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
            session_of(ir.load(path), path.parent)
    else:
        plain = session_of(ir.load(path), path.parent)
        assert relative(plain.run([name], feeds)[0], wanted) < 0.6 * error
