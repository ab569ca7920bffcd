"""How much arithmetic an ONNX graph asks for: the floating-point operations of its matrix products and
convolutions, two for each multiply and add, and the bytes of its weights.

What is element by element (normalisation, activations, softmax) is left out, as is usual: it is bound by
memory. Weights are not read: external data need not even be there. In a quantised graph the products stand
between QuantizeLinear and DequantizeLinear nodes, where they are counted like any other.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddexport.runtime.errors import DDError

SMALL = 4096  # elements; the shapes that shape inference reads from constants are smaller than that
Shapes = Mapping[str, tuple[int, ...]]


class CountError(DDError):
    """A graph whose shapes do not follow from the sizes of its inputs, or an attribute that is not known."""


@dataclass(frozen=True)
class Count:
    """flops: of one run. by_operator: the same by the operator's name. weight_bytes: of all stored arrays."""

    flops: int
    by_operator: Mapping[str, int]
    weight_bytes: int


def count(path: Path, sizes: Mapping[str, int]) -> Count:
    """Counts one run of a graph.

    Args:
        path: an ONNX file.
        sizes: of the dynamic dimensions of its inputs, such as {"batch": 1}.

    Raises:
        CountError: the file is no graph, a size is missing, or the shape of a product cannot be inferred.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exceptions share no base with OSError
        raise CountError(f"{path} cannot be read as an ONNX graph: {error}") from error
    weights = sum(_bytes(tensor) for tensor in model.graph.initializer)
    shapes = infer_shapes(model, sizes)
    by_operator: dict[str, int] = {}
    for node in model.graph.node:
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx", "com.microsoft") else None
        if rule is not None:
            by_operator[node.op_type] = by_operator.get(node.op_type, 0) + rule(node, shapes)
    return Count(sum(by_operator.values()), by_operator, weights)


def infer_shapes(model: Any, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every value that can be told, with the dynamic dimensions of the inputs set to `sizes`.

    Where inference ends, at shapes that a graph computes, what the exporter has noted is taken: sizes that
    may be products of the dynamic ones, as in `2*batch`. The model is changed: large weights lose their data.
    """
    from onnx import shape_inference

    graph = model.graph
    noted = {value.name: _dimensions(value, sizes) for value in (*graph.value_info, *graph.output)}
    for value in graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                if dimension.dim_param not in sizes:
                    raise CountError(f"input {value.name} needs the size of {dimension.dim_param}")
                dimension.dim_value = sizes[dimension.dim_param]
    for tensor in graph.initializer:
        if math.prod(tensor.dims) > SMALL:
            _drop_data(tensor)
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        shape = _dimensions(value, sizes) or noted.get(value.name)
        if shape is not None:
            shapes[value.name] = shape
    return {**{name: shape for name, shape in noted.items() if shape is not None}, **shapes}


def _drop_data(tensor: Any) -> None:
    from onnx import TensorProto

    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL


def _dimensions(value: Any, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of a value; None if it, or one dimension of it, is not known."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    shape = []
    for dimension in value.type.tensor_type.shape.dim:
        size = dimension.dim_value if dimension.HasField("dim_value") else _size(dimension.dim_param, sizes)
        if size is None:
            return None
        shape.append(size)
    return tuple(shape)


def _size(text: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a symbolic size such as `batch`, `2*batch` or `capacity + new`."""
    try:
        return _evaluated(ast.parse(text, mode="eval").body, sizes)
    except (SyntaxError, KeyError, TypeError, ZeroDivisionError):
        return None


def _evaluated(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp):
        left, right = _evaluated(node.left, sizes), _evaluated(node.right, sizes)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv):
            return left // right
    raise TypeError(ast.dump(node))


def _shape(name: str, shapes: Shapes, node: Any) -> tuple[int, ...]:
    if name not in shapes:
        raise CountError(f"the shape of {name}, of {node.op_type} {node.name}, cannot be inferred")
    return shapes[name]


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    attributes = [attribute for attribute in node.attribute if attribute.name == name]
    return helper.get_attribute_value(attributes[0]) if attributes else default


def _matmul(node: Any, shapes: Shapes) -> int:
    """[..., M, K] x [..., K, N], the batches broadcast; a vector on either side is one row or column."""
    right = 3 if node.op_type == "QLinearMatMul" else 1
    first, second = (_shape(node.input[i], shapes, node) for i in (0, right))
    rows = first[-2] if len(first) > 1 else 1
    columns = second[-1] if len(second) > 1 else 1
    return 2 * math.prod(_broadcast(first[:-2], second[:-2])) * rows * first[-1] * columns


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> list[int]:
    pairs = itertools.zip_longest(reversed(first), reversed(second), fillvalue=1)
    return [b if a == 1 else a for a, b in pairs]


def _gemm(node: Any, shapes: Shapes) -> int:
    first, second = (_shape(name, shapes, node) for name in node.input[:2])
    rows, inner = reversed(first) if _attribute(node, "transA", 0) else first
    columns = second[0] if _attribute(node, "transB", 0) else second[1]
    return 2 * rows * inner * columns


def _convolution(node: Any, shapes: Shapes) -> int:
    """Each output value sums over the kernel and the channels of its group: the weight's shape but one."""
    weight = 3 if node.op_type == "QLinearConv" else 1
    kernel = _shape(node.input[weight], shapes, node)
    return 2 * math.prod(_shape(node.output[0], shapes, node)) * math.prod(kernel[1:])


def _transposed_convolution(node: Any, shapes: Shapes) -> int:
    """Each input value is spread over the kernel and the output channels of its group."""
    kernel = _shape(node.input[1], shapes, node)
    return 2 * math.prod(_shape(node.input[0], shapes, node)) * math.prod(kernel[1:])


def _einsum(node: Any, shapes: Shapes) -> int:
    """The product of all different indices, as for one nested loop; ellipses are not counted."""
    equation = _attribute(node, "equation", b"").decode().replace(" ", "")
    if "." in equation:
        raise CountError(f"Einsum {node.name} has an ellipsis: {equation}")
    sizes: dict[str, int] = {}
    for term, name in zip(equation.partition("->")[0].split(","), node.input, strict=True):
        sizes.update(zip(term, _shape(name, shapes, node), strict=True))
    return 2 * math.prod(sizes.values()) if len(node.input) > 1 else 0


def _attention(node: Any, shapes: Shapes) -> int:
    """Attention of opset 23: scores and their product with the values; masks save nothing.

    Query [B, H, n, D], or [B, n, H * D] with the number of heads as an attribute; likewise keys and values,
    before which a past may come.
    """
    if node.domain not in ("", "ai.onnx"):
        raise CountError(f"{node.domain}.Attention {node.name} is not known")
    query, key, value = (_shape(name, shapes, node) for name in node.input[:3])
    past = _shape(node.input[4], shapes, node)[2] if len(node.input) > 4 and node.input[4] else 0
    if len(query) == 3:
        heads, own = _attribute(node, "q_num_heads", 0), _attribute(node, "kv_num_heads", 0)
        query = (query[0], heads, query[1], query[2] // heads)
        key = (key[0], own, key[1], key[2] // own)
        value = (value[0], own, value[1], value[2] // own)
    B, H, n, D = query
    return 2 * B * H * n * (key[2] + past) * (D + value[3])


RULES = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Einsum": _einsum,
    "Attention": _attention,
}
"""What is counted, by operator."""


def _bytes(tensor: Any) -> int:
    from onnx import TensorProto, helper

    elements = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (elements + 1) // 2
    return int(elements * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
