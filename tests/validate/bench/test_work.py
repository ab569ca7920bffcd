"""Operations are counted as by hand, and the baselines draw the same images as what is timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from msgspec import structs
from onnx import TensorProto, helper, numpy_helper

from ddexport.families._checkpoint import connect, random_part
from ddexport.graph.flops import CountError, count_flops
from ddexport.recipe import load_recipe
from ddexport.runtime.backends import CPU, Configuration
from ddexport.runtime.errors import DDError
from ddexport.runtime.noise import gaussian_noise
from ddexport.validate.bench.naive import naive_step
from ddexport.validate.bench.torch_engine import TorchEngine

FLOAT = TensorProto.FLOAT


def write(path, nodes, inputs, outputs, weights):
    """A graph of float inputs and outputs, given by name and shape, and weights by name."""
    info = [
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", *info, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def flops(path, **sizes):
    return count_flops.__wrapped__(path, **sizes)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, **attributes)


def test_each_operator_by_hand(tmp_path):
    half = {"strides": [2, 2]}
    cases = (
        (node("MatMul", ["x", "w"], ["y"]), ["batch", 5, 3], zeros(3, 7), 2 * 2 * 5 * 3 * 7),
        (node("MatMul", ["w", "x"], ["y"]), ["batch", 4, 3, 6], zeros(4, 5, 3), 2 * (2 * 4) * 5 * 3 * 6),
        (node("MatMul", ["x", "w"], ["y"]), ["batch", 5, 3], zeros(3), 2 * 2 * 5 * 3),
        (node("Conv", ["x", "w"], ["y"], group=3, pads=[1, 1, 1, 1], **half), ["batch", 6, 8, 8],
         zeros(12, 2, 3, 3), 2 * (2 * 12 * 4 * 4) * (2 * 9)),
        (node("ConvTranspose", ["x", "w"], ["y"], **half), ["batch", 6, 4, 4], zeros(6, 5, 2, 2),
         2 * (2 * 6 * 4 * 4) * (5 * 4)),
        (node("Gemm", ["x", "w"], ["y"]), ["batch", 3], zeros(3, 7), 2 * 2 * 3 * 7),
        (node("Gemm", ["x", "w"], ["y"], transA=1, transB=1), [3, "batch"], zeros(7, 3), 2 * 2 * 3 * 7),
        (node("Add", ["x", "w"], ["y"]), ["batch", 5], zeros(5), 0),
    )  # fmt: skip
    for made, shape, weight, wanted in cases:
        path = write(tmp_path / "g.onnx", [made], {"x": shape}, {"y": None}, {"w": weight})
        assert flops(path, batch=2) == wanted, made


def test_quantised_products_count_as_products(tmp_path):
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        node("DequantizeLinear", ["wq", "scale", "zero"], ["wd"]),
        node("MatMul", ["xd", "wd"], ["y"]),
    ]
    weights = {"wq": np.zeros((3, 7), np.int8), "scale": np.float32(1), "zero": np.int8(0)}
    path = write(tmp_path / "g.onnx", nodes, {"x": ["batch", 5, 3]}, {"y": ["batch", 5, 7]}, weights)
    assert flops(path, batch=2) == 2 * 2 * 5 * 3 * 7


def by_hand(B, L, C, V, Cv, S, depth):
    """VAR's student: embedding, per block qkv, two products of attention, projection, MLP; both heads."""
    N = L + 1
    block = 2 * N * C * 3 * C + 2 * 2 * N * N * C + 2 * N * C * C + 2 * 2 * N * C * 4 * C
    return B * (2 * L * Cv * C + depth * block + 2 * S * C * V + 2 * (L - S) * C * Cv)


def test_an_exported_student_by_its_geometry(bundle, manifest, batch=9):
    """A real graph, its shapes inferred."""
    from ddexport.recipe import recipe_of

    sequence, model = manifest.sequence, recipe_of(manifest).model
    sizes = (sequence.codebook, sequence.width, sequence.split, model["depth"])
    wanted = by_hand(batch, sequence.length, model["width"], *sizes)
    assert flops(bundle / "student.onnx", batch=batch) == wanted


def test_an_exported_teacher_needs_what_the_exporter_noted(bundle):
    """Sizes such as 2*batch and capacity + new: more of each is more work, and a name that is missing is
    told."""
    sizes = {"batch": 1, "new": 4, "capacity": 21}
    one = flops(bundle / "teacher.onnx", **sizes)
    assert flops(bundle / "teacher.onnx", **sizes | {"batch": 3}) == 3 * one
    assert flops(bundle / "teacher.onnx", **sizes | {"capacity": 42}) > one
    with pytest.raises(CountError):
        flops(bundle / "teacher.onnx", batch=1, new=4)


GOLDEN = Path(__file__).parents[2] / "golden"


@torch.no_grad()
@pytest.mark.parametrize("name", ["var-dd-small", "llamagen-dd-small"])
def test_it_agrees_with_the_modules(name, known=5):
    """Found by the family's name; a student with tables, as it is timed against, gives the same too."""
    recipe = load_recipe(str(GOLDEN / name / "recipe.yaml"))
    student, size = random_part(recipe, "student", 3), recipe.sequence
    connect(student, random_part(recipe, "tokenizer", 3))
    tokens = torch.randn(2, size.length, size.width, generator=torch.Generator().manual_seed(0))
    tokens[:, :known] = student.codebook[:known]
    label, count = torch.tensor([1, 7]), torch.full((2,), known)
    sequence, logits, _ = naive_step(recipe, student)(tokens, label, known)
    for _ in range(2):
        wanted, _, chosen = student(tokens, label, count)
        torch.testing.assert_close(sequence, wanted, rtol=0, atol=2e-5)
        torch.testing.assert_close(logits[:, : size.split], chosen, rtol=0, atol=2e-5)
        student.tabulate()
    with pytest.raises(DDError):
        naive_step(structs.replace(recipe, family="other"), student)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["student", "decoder"])
def test_pytorch_in_int8_draws_nearly_the_same(bundle, manifest, role):
    """torchao's quantization, compiled: another result than in float32, and close to it."""
    pytest.importorskip("torchao")
    drawn = {}
    for precision in ("fp32", "int8"):
        chosen = Configuration("torch-compile", "cpu", precision, "fp32", CPU)
        engine = TorchEngine(bundle, manifest, chosen, 1, {}, None)
        latents = gaussian_noise(0, range(2), manifest.sequence.length, manifest.sequence.width)
        known = np.zeros(2, np.int64)
        feeds = {"latents": latents, "label": np.array([3, 7]), "known": known}
        graph = manifest.graph(role, "fp32")
        if role == "student":
            drawn[precision] = engine.run(graph, feeds, ("sequence", "logits"))["logits"]
        else:
            drawn[precision] = engine.run(graph, {"sequence": latents}, ("image",))["image"]
    error, scale = np.square(drawn["int8"] - drawn["fp32"]).mean(), np.square(drawn["fp32"]).mean()
    assert 1e-8 < error / scale < 1e-2
