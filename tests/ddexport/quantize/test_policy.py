"""Which products are quantised: told from structure, whatever a graph's values are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from ddexport.quantize.policy import quantised_products
from ddexport.runtime.bundle import read_manifest

# Weights are a, b, c, d and, of one pixel, `pixel`.
RULES = {
    "both ends stay float": """
        first = MatMul (x, a) g = Gelu (first) [inner] i = MatMul (g, b) last = MatMul (i, c)""",
    "two heads are both ends": """
        first = MatMul (x, a) s = Sigmoid (first) [inner] i = MatMul (s, b)
        head1 = MatMul (i, c) head2 = MatMul (i, d) last = Add (head1, head2)""",
    # The decoder's first convolutions follow one another on the latent itself, without a norm.
    "the linear way in stays float": """
        post_quant = Conv (x, a) conv_in = Conv (post_quant, b) mean = ReduceMean (conv_in)
        centred = Sub (conv_in, mean) [inner] i = Conv (centred, c) last = Conv (i, d)""",
    # Modulation from the label, where it is not tabulated: no product lies before it.
    "what depends on the input alone stays float": """
        s = Sigmoid (x) modulation = MatMul (s, a) first = MatMul (x, b) sum = Add (modulation, first)
        [inner] i = MatMul (sum, c) last = MatMul (i, d)""",
    "products of two activations stay float": """
        first = MatMul (x, a) s = Softmax (first) scores = MatMul (s, s)
        [inner] i = MatMul (scores, b) last = MatMul (i, c)""",
    "convolutions of a pixel and transposed ones stay float": """
        first = Conv (x, a) r = Relu (first) shortcut = Conv (r, pixel) up = ConvTranspose (shortcut, b)
        [inner] i = Conv (up, c) last = Conv (i, d)""",
}


@pytest.mark.parametrize("nodes", RULES.values(), ids=RULES)
def test_rules(nodes: str) -> None:
    """The only quantised product is the inner one."""
    rank, shape = ("[4, 4, 4, 4]", (4, 4, 3, 3)) if "Conv" in nodes else ("[4, 4]", (4, 4))
    graph = onnx.parser.parse_graph(f"g (float{rank} x) => (float last) {{ {nodes} }}")
    graph.output[0].type.tensor_type.ClearField("shape")
    for name in ("a", "b", "c", "d", "pixel"):
        values = np.ones((4, 4, 1, 1) if name == "pixel" else shape, np.float32)
        graph.initializer.append(numpy_helper.from_array(values, name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    assert [node.name for node in quantised_products(ir.from_proto(model).graph)] == ["inner"]


def shapes(path: Path) -> list[tuple[int, ...]]:
    weights = [node.inputs[1] for node in quantised_products(ir.load(path).graph)]
    return [
        tuple(weight.shape.numpy()) for weight in weights if weight is not None and weight.shape is not None
    ]


def test_students_quantise_all_of_their_blocks(half_bundle: Path) -> None:
    """Fused queries, keys and values; the projection; the layers of the MLP; neither ends nor heads."""
    manifest = read_manifest(half_bundle)
    width, depth = manifest.recipe["model"]["width"], manifest.recipe["model"]["depth"]
    found = shapes(half_bundle / "student.onnx")
    count = 5 if manifest.recipe["family"] == "llamagen_dd" else 4  # LlamaGen's MLP has a gate
    assert len(found) == count * depth
    for qkv, projection, *up, down in (found[i : i + count] for i in range(0, len(found), count)):
        assert (qkv, projection) == ((width, 3 * width), (width, width))
        assert set(up) == {(width, down[0])} and down[1] == width


def test_decoders_quantise_all_large_convolutions(half_bundle: Path) -> None:
    path = half_bundle / "decoder.onnx"
    found, model = shapes(path), onnx.load(path)
    assert all(shape[2:] == (3, 3) and shape[0] > 3 and shape[1] >= 32 for shape in found)
    size = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    square = [size[n.input[1]] for n in model.graph.node if n.op_type == "Conv"]
    inner = [shape for shape in square if shape[2:] == (3, 3) and shape[0] > 3 and shape[1] >= 32]
    assert len(inner) - 1 <= len(found) <= len(inner)  # LlamaGen's conv_in is as wide as the others
