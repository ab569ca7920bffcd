"""Which products are quantised: told from structure, whatever a graph's values are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from ddexport.export import Exported
from ddexport.quantize.policy import quantised_products

MATRIX, KERNEL, PIXEL = (4, 4), (4, 4, 3, 3), (4, 4, 1, 1)


def chosen(nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]]) -> list[str]:
    """The names of the quantised products of a graph from `x` to the outputs of its last node."""
    rank = 4 if any(len(shape) == 4 for shape in weights.values()) else 2
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4] * rank)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(s, np.float32), name) for name, s in weights.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    return [str(node.name) for node in quantised_products(model.graph)]


def node(operator: str, inputs: str, output: str) -> onnx.NodeProto:
    """A node that is called as its output."""
    return helper.make_node(operator, inputs.split(), [output], output)


class TestRules:
    def test_both_ends_stay_float(self) -> None:
        nodes = [node("MatMul", "x a", "first"), node("Gelu", "first", "g"),
                 node("MatMul", "g b", "inner"), node("MatMul", "inner c", "last")]  # fmt: skip
        assert chosen(nodes, dict.fromkeys("abc", MATRIX)) == ["inner"]

    def test_two_heads_are_both_ends(self) -> None:
        nodes = [node("MatMul", "x a", "first"), node("Sigmoid", "first", "s"),
                 node("MatMul", "s b", "inner"),
                 node("MatMul", "inner c", "head1"), node("MatMul", "inner d", "head2"),
                 node("Add", "head1 head2", "sum")]  # fmt: skip
        assert chosen(nodes, dict.fromkeys("abcd", MATRIX)) == ["inner"]

    def test_the_linear_way_in_stays_float(self) -> None:
        """The decoder's first convolutions follow one another on the latent itself, without a norm."""
        nodes = [node("Conv", "x a", "post_quant"), node("Conv", "post_quant b", "conv_in"),
                 node("ReduceMean", "conv_in", "mean"), node("Sub", "conv_in mean", "centred"),
                 node("Conv", "centred c", "inner"), node("Conv", "inner d", "out")]  # fmt: skip
        assert chosen(nodes, dict.fromkeys("abcd", KERNEL)) == ["inner"]

    def test_what_depends_on_the_input_alone_stays_float(self) -> None:
        """Modulation from the label, where it is not tabulated: no product lies before it."""
        nodes = [node("Sigmoid", "x", "s"), node("MatMul", "s a", "modulation"),
                 node("MatMul", "x b", "first"),
                 node("Add", "modulation first", "sum"), node("MatMul", "sum c", "inner"),
                 node("MatMul", "inner d", "last")]  # fmt: skip
        assert chosen(nodes, dict.fromkeys("abcd", MATRIX)) == ["inner"]

    def test_products_of_two_activations_stay_float(self) -> None:
        nodes = [node("MatMul", "x a", "first"), node("Softmax", "first", "s"),
                 node("MatMul", "s s", "scores"),
                 node("MatMul", "scores b", "inner"), node("MatMul", "inner c", "last")]  # fmt: skip
        assert chosen(nodes, dict.fromkeys("abc", MATRIX)) == ["inner"]

    def test_convolutions_of_a_pixel_and_transposed_ones_stay_float(self) -> None:
        weights = {"a": KERNEL, "b": PIXEL, "c": KERNEL, "d": KERNEL, "e": KERNEL}
        nodes = [node("Conv", "x a", "first"), node("Relu", "first", "r"), node("Conv", "r b", "shortcut"),
                 node("ConvTranspose", "shortcut c", "up"), node("Conv", "up d", "inner"),
                 node("Conv", "inner e", "last")]  # fmt: skip
        assert chosen(nodes, weights) == ["inner"]


def shapes(path: Path) -> list[tuple[int, ...]]:
    found = []
    for each in quantised_products(ir.load(path).graph):
        weight = each.inputs[1]
        assert weight is not None and weight.shape is not None
        found.append(tuple(int(size) for size in weight.shape))
    return found


class TestFamilies:
    def test_the_students_quantise_all_of_their_blocks(
        self, golden_bundle: Path, llamagen_half: Exported
    ) -> None:
        """Fused queries, keys and values; the projection; both layers of the MLP; neither ends nor heads."""
        width = 128
        block = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        found = shapes(golden_bundle / "student.onnx")
        assert found == block * (len(found) // 4) and len(found) >= 8
        found = shapes(llamagen_half.path / "student.onnx")
        assert [shape[0] for shape in found[:3]] == [32] * 3 and found[3] == (found[2][1] // 2, 32)
        assert len(found) == 4

    def test_the_decoders_quantise_all_large_convolutions(
        self, golden_bundle: Path, llamagen_half: Exported
    ) -> None:
        for bundle in (golden_bundle, llamagen_half.path):
            found = shapes(bundle / "decoder.onnx")
            assert all(shape[2:] == (3, 3) and shape[0] > 3 and shape[1] >= 32 for shape in found)
            model = onnx.load(bundle / "decoder.onnx")
            size = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
            square = [size[n.input[1]] for n in model.graph.node if n.op_type == "Conv"]
            inner = [shape for shape in square if shape[2:] == (3, 3) and shape[0] > 3 and shape[1] >= 32]
            assert len(inner) - 1 <= len(found) <= len(inner)  # LlamaGen's conv_in is as wide as the others

    def test_names_do_not_matter(self, golden_bundle: Path, tmp_path: Path) -> None:
        """Another exporter, or another version, calls nodes and values differently."""
        model = onnx.load(golden_bundle / "decoder.onnx")
        renamed = onnx.compose.add_prefix(model, "zz_", rename_inputs=False, rename_outputs=False)
        onnx.save(renamed, tmp_path / "decoder.onnx")
        before = [str(n.name) for n in quantised_products(ir.load(golden_bundle / "decoder.onnx").graph)]
        after = [str(n.name) for n in quantised_products(ir.load(tmp_path / "decoder.onnx").graph)]
        assert after == [f"zz_{name}" for name in before]
