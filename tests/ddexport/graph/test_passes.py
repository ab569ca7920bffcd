"""Passes keep a graph's contract and numbers, say whether they changed anything, and are done at once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddexport.graph.passes import strip_trace

SECRET = "/home/someone/secret/model.py"


def traced_model() -> onnx.ModelProto:
    """y = c * x if x[0] > 0 else -x, with a tracer's notes on everything that can carry one."""

    def noted(node: onnx.NodeProto) -> onnx.NodeProto:
        node.doc_string = f'File "{SECRET}", line 7'
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=SECRET)
        return node

    def value(name: str, shape: list[object]) -> onnx.ValueInfoProto:
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        info.metadata_props.add(key="pkg.torch.export.graph_signature", value=SECRET)
        return info

    def branch(name: str, node: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([noted(node)], name, [], [value(node.output[0], ["batch", 2])])

    node = helper.make_node
    c = numpy_helper.from_array(np.array([3.0, 5.0], np.float32), "c")
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    graph = helper.make_graph(
        [
            noted(node("ReduceMax", ["x"], ["top"], keepdims=0)),
            noted(node("Greater", ["top", "zero"], ["positive"])),
            noted(
                node(
                    "If",
                    ["positive"],
                    ["y"],
                    name="choice",
                    then_branch=branch("yes", node("Mul", ["x", "c"], ["scaled"])),
                    else_branch=branch("no", node("Neg", ["x"], ["turned"])),
                )
            ),
        ],
        "main",
        [value("x", ["batch", 2])],
        [value("y", ["batch", 2])],
        [c, zero],
    )
    graph.doc_string = SECRET
    graph.value_info.append(value("top", []))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def before() -> onnx.ModelProto:
    return traced_model()


@pytest.fixture
def after(before: onnx.ModelProto) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(before)
    assert strip_trace(model)
    return ir.serde.serialize_model(model)


def test_nothing_of_the_machine_remains(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    assert SECRET.encode() in before.SerializeToString()
    assert SECRET.encode() not in after.SerializeToString()
    assert b"stack_trace" not in after.SerializeToString()


def test_the_contract_stays(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Inputs, outputs, initialisers, operators and attributes, in the same order."""

    def contract(model: onnx.ModelProto) -> list[object]:
        graph = model.graph
        shapes = [(v.name, v.type.SerializeToString()) for v in (*graph.input, *graph.output)]
        weights = [(i.name, numpy_helper.to_array(i).tolist()) for i in graph.initializer]
        nodes = [
            (n.op_type, n.name, list(n.input), list(n.output), [a.name for a in n.attribute])
            for n in graph.node
        ]
        return [shapes, weights, nodes, [(o.domain, o.version) for o in model.opset_import]]

    onnx.checker.check_model(after, full_check=True)
    assert contract(after) == contract(before)


def test_the_numbers_stay(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    for x in (np.array([[1, 2]], np.float32), np.array([[-1, -2], [-3, -4]], np.float32)):
        results = [
            ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
                None, {"x": x}
            )[0]
            for m in (before, after)
        ]
        np.testing.assert_array_equal(*results)


def test_a_second_run_changes_nothing(after: onnx.ModelProto) -> None:
    model = ir.serde.deserialize_model(after)
    assert not strip_trace(model)
    assert ir.serde.serialize_model(model).SerializeToString() == after.SerializeToString()
