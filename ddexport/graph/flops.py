"""Floating-point operations of an ONNX graph: two for each multiply and add of its matrix products and
convolutions, from the shapes that ONNX infers.

What is element by element (normalisation, activations, softmax) is left out: it is bound by memory. In a
quantized graph the products stand between QuantizeLinear and DequantizeLinear and count like any other.
Why not a library: those that count run the graph or read all its weights; here external data is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ddexport.runtime.errors import DDError

SMALL = 4096  # elements; the shapes that shape inference reads from constants are smaller than that
Shape: TypeAlias = tuple[int, ...]


class CountError(DDError):
    """A graph that cannot be read, or whose shapes do not follow from the sizes of its inputs."""


@cache
def count_flops(path: Path, **sizes: int) -> int:
    """Operations of one run of a graph. sizes: of its dynamic dimensions, batch=1. Raises CountError."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exceptions share no base with OSError
        raise CountError(f"{path} cannot be read as an ONNX graph: {error}") from error
    shapes = infer_shapes(model, sizes)
    try:
        return sum(
            OPERATIONS[node.op_type](node, shapes) for node in model.graph.node if node.op_type in OPERATIONS
        )
    except KeyError as error:
        raise CountError(f"{path}: the shape of {error} cannot be inferred") from error


def infer_shapes(model: Any, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """The shape of every value that can be told. The model is changed: large weights lose their data."""
    from onnx import TensorProto, shape_inference

    graph = model.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            size = _size(dimension.dim_param, sizes) if dimension.dim_param else None
            if size is not None:
                dimension.dim_value = size
            elif dimension.dim_param and value in graph.input:
                raise CountError(f"input {value.name} needs the size of {dimension.dim_param}")
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > SMALL:
            for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
                tensor.ClearField(field)
            tensor.data_location = TensorProto.EXTERNAL
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dimension.HasField("dim_value") for dimension in kind.shape.dim):
            shapes[value.name] = tuple(dimension.dim_value for dimension in kind.shape.dim)
    return shapes


def _size(text: str, sizes: Mapping[str, int]) -> int | None:
    """What the exporter notes as a size: `batch`, `2*batch`, `capacity + new`; None where it is unknown."""
    try:
        terms = [[factor.strip() for factor in term.split("*")] for term in text.split("+")]
        return sum(math.prod(int(f) if f.isdecimal() else sizes[f] for f in factors) for factors in terms)
    except KeyError:
        return None


def _product(node: Any, shapes: Mapping[str, Shape]) -> int:
    """[..., M, K] x [..., K, N], the batches broadcast: each output value sums K products."""
    right = 3 if node.op_type == "QLinearMatMul" else 1
    first, second = (shapes[node.input[i]] for i in (0, right))
    batch = np.broadcast_shapes(first[:-2], second[:-2])
    return 2 * math.prod((*batch, *first[-2:-1], first[-1], *(second[-1:] if len(second) > 1 else ())))


def _gemm(node: Any, shapes: Mapping[str, Shape]) -> int:
    """Each output value sums K products; the first factor holds all of M x K, whichever way round."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 2 * math.prod(shapes[node.input[0]]) * shapes[node.input[1]][0 if transposed else 1]


def _convolution(node: Any, shapes: Mapping[str, Shape]) -> int:
    """Each output value sums over the kernel and the channels of its group; a transposed convolution spreads
    each input value over them: the weight's shape but one."""
    kernel = shapes[node.input[3 if node.op_type == "QLinearConv" else 1]]
    spread = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
    return 2 * math.prod(shapes[spread]) * math.prod(kernel[1:])


OPERATIONS = {
    **dict.fromkeys(("MatMul", "MatMulInteger", "QLinearMatMul"), _product),
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv", "ConvTranspose"), _convolution),
    "Gemm": _gemm,
}
