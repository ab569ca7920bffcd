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


def test_external_data_is_not_read(tmp_path):
    product = node("MatMul", ["x", "w"], ["y"])
    sizes = {"x": ["batch", 128]}, {"y": ["batch", 256]}, {"w": zeros(128, 256)}
    path = write(tmp_path / "g.onnx", [product], *sizes)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="data", size_threshold=0)
    (tmp_path / "data").unlink()
    assert flops(path, batch=3) == 2 * 3 * 128 * 256


def test_sizes_that_the_exporter_noted_are_used_where_inference_ends(tmp_path):
    """A shape that the graph computes from data cannot be inferred; the note says 2*batch."""
    nodes = [node("Reshape", ["x", "to"], ["r"]), node("MatMul", ["r", "w"], ["y"])]
    noted = [helper.make_tensor_value_info("r", FLOAT, ["2*batch", 4])]
    path = write(
        tmp_path / "g.onnx", nodes, {"x": ["batch", 8]}, {"y": None}, {"w": zeros(4, 5)}, noted=noted
    )
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("to", TensorProto.INT64, [2]))
    onnx.save(model, path)
    assert flops(path, batch=3) == 2 * 6 * 4 * 5


def test_what_cannot_be_counted_says_so(tmp_path):
    path = write(
        tmp_path / "g.onnx", [node("MatMul", ["x", "w"], ["y"])], {"x": ["batch", 3]}, {"y": None},
        {"w": zeros(3, 7)},
    )  # fmt: skip
    with pytest.raises(CountError):
        flops(path)
    path.write_bytes(b"no graph")
    with pytest.raises(CountError):
        flops(path, batch=1)


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
