"""Operations are counted as a pencil counts them: two for each multiply and add of a product."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddexport.validate.bench.flops import CountError, count_flops

FLOAT = TensorProto.FLOAT


def write(path, nodes, inputs, outputs, weights=None, opset=20, noted=()):
    """A graph of float inputs and outputs, given by name and shape, and weights by name."""
    info = [
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "g", *info, stored, value_info=list(noted))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def flops(path, **sizes):
    return count_flops.__wrapped__(path, **sizes)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, **attributes)


CASES = {
    "a product": (node("MatMul", ["x", "w"], ["y"]), ["batch", 5, 3], {"w": zeros(3, 7)}, 2 * 2 * 5 * 3 * 7),
    "a broadcast product": (
        node("MatMul", ["w", "x"], ["y"]),
        ["batch", 4, 3, 6],
        {"w": zeros(4, 5, 3)},
        2 * (2 * 4) * 5 * 3 * 6,
    ),
    "a vector": (node("MatMul", ["x", "w"], ["y"]), ["batch", 5, 3], {"w": zeros(3)}, 2 * 2 * 5 * 3),
    "a convolution": (
        node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1]),
        ["batch", 6, 8, 8],
        {"w": zeros(10, 6, 3, 3)},
        2 * (2 * 10 * 8 * 8) * (6 * 9),
    ),
    "a grouped convolution with strides": (
        node("Conv", ["x", "w"], ["y"], group=3, strides=[2, 2], pads=[1, 1, 1, 1]),
        ["batch", 6, 8, 8],
        {"w": zeros(12, 2, 3, 3)},
        2 * (2 * 12 * 4 * 4) * (2 * 9),
    ),
    "a transposed convolution": (
        node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
        ["batch", 6, 4, 4],
        {"w": zeros(6, 5, 2, 2)},
        2 * (2 * 6 * 4 * 4) * (5 * 4),
    ),
    "what is element by element": (node("Add", ["x", "w"], ["y"]), ["batch", 5], {"w": zeros(5)}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_each_operator_by_hand(case, tmp_path):
    made, shape, weights, wanted = CASES[case]
    path = write(tmp_path / "g.onnx", [made], {"x": shape}, {"y": None}, weights)
    assert flops(path, batch=2) == wanted


@pytest.mark.parametrize(("transposed_a", "transposed_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_either_way_round(transposed_a, transposed_b, tmp_path):
    shape = ["batch", 3] if not transposed_a else [3, "batch"]
    weight = zeros(3, 7) if not transposed_b else zeros(7, 3)
    gemm = node("Gemm", ["x", "w"], ["y"], transA=transposed_a, transB=transposed_b)
    path = write(tmp_path / "g.onnx", [gemm], {"x": shape}, {"y": None}, {"w": weight})
    assert flops(path, batch=4) == 2 * 4 * 3 * 7


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


def test_weights_are_not_read(tmp_path):
    """A graph counts without its external data, and large weights of its own do not matter either."""
    path = write(
        tmp_path / "g.onnx",
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": ["batch", 128]},
        {"y": ["batch", 256]},
        {"w": zeros(128, 256)},
    )
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=0)
    (tmp_path / "data").unlink()
    assert flops(path, batch=3) == 2 * 3 * 128 * 256


def test_sizes_that_the_exporter_noted_are_used_where_inference_ends(tmp_path):
    """A shape that the graph computes from data cannot be inferred; the note says 2*batch."""
    nodes = [node("Reshape", ["x", "to"], ["r"]), node("MatMul", ["r", "w"], ["y"])]
    noted = helper.make_tensor_value_info("r", FLOAT, ["2*batch", 4])
    to = helper.make_tensor_value_info("to", TensorProto.INT64, [2])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["batch", 8]), to],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(zeros(4, 5), "w")],
        value_info=[noted],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    assert flops(path, batch=3) == 2 * 6 * 4 * 5


def test_what_cannot_be_counted_says_so(tmp_path):
    path = write(
        tmp_path / "g.onnx", [node("MatMul", ["x", "w"], ["y"])], {"x": ["batch", 3]}, {"y": None},
        {"w": zeros(3, 7)},
    )  # fmt: skip
    with pytest.raises(CountError, match="size of batch"):
        flops(path)
    path.write_bytes(b"no graph")
    with pytest.raises(CountError, match="cannot be read"):
        flops(path, batch=1)


def by_hand(B, L, C, V, Cv, S, depth):
    """VAR's student: embedding, per block qkv, two products of attention, projection, MLP; both heads."""
    N = L + 1
    block = 2 * N * C * 3 * C + 2 * 2 * N * N * C + 2 * N * C * C + 2 * 2 * N * C * 4 * C
    return B * (2 * L * Cv * C + depth * block + 2 * S * C * V + 2 * (L - S) * C * Cv)


@pytest.mark.parametrize("batch", [1, 9])
def test_an_exported_student_by_its_geometry(bundle, manifest, batch):
    """A real graph, its shapes inferred, at any batch size."""
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
    with pytest.raises(CountError, match="size of capacity"):
        flops(bundle / "teacher.onnx", batch=1, new=4)
