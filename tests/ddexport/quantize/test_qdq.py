"""Quantised graphs, number by number: scales, zero points, what is and what is not rounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from ddexport.quantize.qdq import quantised_model

RANGE = (-1.5, 4.0)
CPU = Path("/proc/cpuinfo")


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    """Columns and channels of very different size, as per-channel scales are for."""
    rng = np.random.default_rng(3)
    matrix = rng.standard_normal((6, 5)) * np.array([1e-3, 1, 10, 0.1, 5])
    kernel = rng.standard_normal((5, 6, 3, 3)) * np.array([1e-3, 1, 10, 0.1, 5])[:, None, None, None]
    return {"matrix": matrix.astype(np.float32), "kernel": kernel.astype(np.float32)}


def saved(path: Path, weights: dict[str, np.ndarray], convolution: bool) -> Path:
    """y = product(x), and z = another product that is to stay as it is."""
    operator, weight, after = ("Conv", "kernel", ", 4, 4") if convolution else ("MatMul", "matrix", "")
    graph = onnx.parser.parse_graph(f"""
        g (float[batch, 6{after}] x) => (float[batch, 5{after.replace("4", "2")}] y, float z) {{
            [inner] y = {operator} (x, {weight})
            [outer] z = {operator} (x, other)
        }}""")
    graph.output[1].type.CopyFrom(graph.output[0].type)
    for name in (weight, "other"):
        graph.initializer.append(numpy_helper.from_array(weights[weight], name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.producer_name = "pytorch"
    helper.set_model_props(model, {"model": "toy", "precision": "fp32"})
    onnx.checker.check_model(model)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def quantised(path: Path) -> onnx.ModelProto:
    return ir.to_proto(quantised_model(path, ["inner"], {"x": RANGE}))


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in session.run(["y", "z"], {"x": x})]


def rounded(x: np.ndarray) -> np.ndarray:
    """What uint8 over RANGE leaves of x: zero is a number of its own."""
    scale = (RANGE[1] - RANGE[0]) / 255
    zero = np.rint(-RANGE[0] / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize("convolution", [False, True])
def test_weights_have_a_scale_each_channel(
    weights: dict[str, np.ndarray], convolution: bool, tmp_path: Path
) -> None:
    model = quantised(saved(tmp_path / "g.onnx", weights, convolution))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight, axis = (weights["kernel"], 0) if convolution else (weights["matrix"], 1)
    (name,) = [n for n, a in arrays.items() if a.dtype == np.int8 and a.size > 5]
    rest = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(rest, keepdims=True) / 127
    assert np.abs(arrays[name].astype(np.float64) * scale - weight).max() <= scale.max() / 2 * 1.001
    assert (np.abs(arrays[name]).max(rest) == 127).all()
    np.testing.assert_array_equal(arrays["other"], weight)


@pytest.mark.skipif(
    not (CPU.is_file() and "vnni" in CPU.read_text()), reason="without VNNI sums of products saturate"
)
def test_products_are_those_of_rounded_numbers(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Activations are rounded by the range that was measured, weights by their own, the output by nothing."""
    model = quantised(saved(tmp_path / "g.onnx", weights, convolution=False))
    x = np.random.default_rng(4).uniform(*RANGE, (3, 6)).astype(np.float32)
    y, _ = run(model, x)
    w = weights["matrix"]
    scale = np.abs(w).max(0) / 127
    np.testing.assert_allclose(y, rounded(x) @ (np.rint(w / scale) * scale), rtol=1e-4, atol=1e-4)


def test_what_lies_past_the_range_is_clipped(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    """So that a range that was measured too small shows. What was not named is as it was."""
    model = quantised(saved(tmp_path / "g.onnx", weights, convolution=False))
    (far, z), (edge, _) = (run(model, np.full((1, 6), x, np.float32)) for x in (9.0, RANGE[1]))
    np.testing.assert_array_equal(far, edge)
    np.testing.assert_allclose(z[0], 9 * weights["matrix"].sum(0), rtol=1e-4, atol=1e-4)
    (low, _), (least, _) = (run(model, np.full((1, 6), x, np.float32)) for x in (-9.0, RANGE[0]))
    np.testing.assert_array_equal(low, least)
    assert not np.array_equal(low, run(model, np.full((1, 6), 0.8 * RANGE[0], np.float32))[0])
