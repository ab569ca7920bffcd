"""Which products compute in int8 and which stay float, as data, told from the structure of a graph.

A graph is quantised where nearly all of its operations are, and where many layers share the error. It stays
float where there is little to win and each error shows: at both ends, and where the decoder's stream itself
would be rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

IMAGES = 16
"""How many images ranges are taken from unless told otherwise: with fewer, the worst logit loses; with more,
nothing is gained and the mean error grows (docs/export.md)."""

QUANTISED = ("MatMul", "Gemm", "Conv")
"""Operators that compute in int8 when their second input is a weight. Products of two activations, those of
attention, stay float. So do transposed convolutions: what they read is the decoder's stream itself, and its
rounding costs seven decibels for six percent of the time (docs/export.md)."""

PRODUCTS = (*QUANTISED, "ConvTranspose")
"""What counts as a product where ends are looked for."""

NONLINEAR = frozenset(
    {"Elu", "Erf", "Exp", "Gelu", "GroupNormalization", "HardSwish", "InstanceNormalization",
     "LayerNormalization", "Log", "Pow", "RMSNormalization", "Reciprocal", "ReduceL2", "ReduceMean", "Relu",
     "Sigmoid", "SimplifiedLayerNormalization", "Softmax", "Sqrt", "Swish", "Tanh"}
)  # fmt: skip
"""Operators that end the linear way in: norms, and the steps that they are made of, and activations."""


def quantised_products(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that compute in int8, in the graph's order.

    A product with a constant weight does, unless
    1. it is a way in: no product, or nothing but linear operators, lies before it (the embedding of tokens;
       the decoder's first convolutions, on the latent itself; what depends on the label alone);
    2. it is a way out: no product lies behind it (the heads, the last convolution);
    3. it is a convolution of one pixel: together 1.4 % of a decoder's operations, and shortcuts among them
       carry the stream itself;
    4. its operator is not in `QUANTISED`.
    """
    inner = _behind_something(graph) & _before_a_product(graph)
    return [
        node
        for node in graph
        if node in inner and node.op_type in QUANTISED and has_weight(node) and not _is_pointwise(node)
    ]


def has_weight(node: ir.Node) -> bool:
    """Whether the second input of a product is constant."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return weight is not None and weight.is_initializer() and weight.const_value is not None


def _is_product(node: ir.Node) -> bool:
    return node.op_type in PRODUCTS and has_weight(node)


def _is_pointwise(node: ir.Node) -> bool:
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return node.op_type == "Conv" and all(size == 1 for size in weight.shape[2:])


def _behind_something(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that both a product and something that is not linear lie before."""
    product: set[ir.Node] = set()
    bent: set[ir.Node] = set()
    for node in graph:
        predecessors = node.predecessors()
        if any(predecessor in product or _is_product(predecessor) for predecessor in predecessors):
            product.add(node)
        if any(predecessor in bent or predecessor.op_type in NONLINEAR for predecessor in predecessors):
            bent.add(node)
    return product & bent


def _before_a_product(graph: ir.Graph) -> set[ir.Node]:
    preceding: set[ir.Node] = set()
    for node in reversed(graph):
        if any(successor in preceding or _is_product(successor) for successor in node.successors()):
            preceding.add(node)
    return preceding
