"""Tracing: the same bytes every time, nothing left changed behind, and nothing said about the machine."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddexport.export import WeightRequest, load_parts
from ddexport.graph.spec import graph_specs
from ddexport.graph.to_onnx import (
    OPSETS,
    ExportError,
    check_onnx,
    check_opset,
    onnx_from_module,
    strip_trace,
)
from ddexport.graph.wrappers import graph_part
from ddexport.runtime.bundle import read_manifest

FORBIDDEN = {"If", "Loop", "Scan", "NonZero", "Dropout", "Bernoulli", "Multinomial"} | {
    f"Random{law}{like}" for law in ("Normal", "Uniform") for like in ("", "Like")
}


def test_opsets() -> None:
    for opset in (*OPSETS, None):
        check_opset(opset)
    for opset in (0, -1, OPSETS.start - 1, OPSETS.stop):
        with pytest.raises(ExportError, match=f"opset {opset} is not supported") as caught:
            check_opset(opset)
        assert caught.value.hint == "use 18 to 23"


def test_the_same_weights_give_the_same_bytes(tiny, tmp_path: Path) -> None:
    """A second trace, compared with the graph of the bundle: its hash says whether anything changed. Logging
    is left as it was found."""
    spec = graph_specs(tiny.recipe)[1]
    tokenizer = load_parts(tiny.recipe, WeightRequest({}, random_seed=tiny.seed))["tokenizer"]
    properties = {p.key: p.value for p in onnx.load(tiny.bundle / "decoder.onnx").metadata_props}
    path, logger = tmp_path / "decoder.onnx", logging.getLogger("torch.onnx")
    logger.setLevel(logging.DEBUG)
    try:
        part = graph_part(tokenizer, "fp32")
        assert onnx_from_module(part, spec, tiny.recipe, path, tiny.opset, properties) == [path]
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(logging.NOTSET)
    assert path.read_bytes() == (tiny.bundle / "decoder.onnx").read_bytes()
    assert read_manifest(tiny.bundle).graph("decoder").files[0].bytes == path.stat().st_size


def test_no_random_numbers_and_no_control_flow(golden_bundle: Path) -> None:
    """Graphs are functions of their inputs, and every engine can compile them."""
    for role in ("student", "decoder"):
        model = onnx.load(golden_bundle / f"{role}.onnx")
        operators = {(node.domain, node.op_type) for node in model.graph.node}
        assert {domain for domain, _ in operators} == {""}
        assert not FORBIDDEN & {operator for _, operator in operators}
        assert len(model.functions) == 0


def test_a_graph_that_breaks_the_rules_is_not_let_out(golden_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(golden_bundle / "student.onnx")
    del model.graph.node[3]
    onnx.save(model, tmp_path / "student.onnx")
    with pytest.raises(onnx.checker.ValidationError):
        check_onnx(tmp_path / "student.onnx")


SECRET = "/home/someone/secret/model.py"


def traced_model() -> onnx.ModelProto:
    """y = c * x if x[0] > 0 else -x, with a tracer's notes on everything that can carry one."""

    def noted(*arguments: object, **attributes: object) -> onnx.NodeProto:
        node = helper.make_node(*arguments, **attributes)
        node.doc_string = f'File "{SECRET}", line 7'
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=SECRET)
        return node

    def value(name: str) -> onnx.ValueInfoProto:
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2])
        info.metadata_props.add(key="pkg.torch.export.graph_signature", value=SECRET)
        return info

    def branch(name: str, node: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([node], name, [], [value(node.output[0])])

    yes, no = (
        branch("yes", noted("Mul", ["x", "c"], ["scaled"])),
        branch("no", noted("Neg", ["x"], ["turned"])),
    )
    nodes = [
        noted("ReduceMax", ["x"], ["top"], keepdims=0),
        noted("Greater", ["top", "zero"], ["positive"]),
        noted("If", ["positive"], ["y"], name="choice", then_branch=yes, else_branch=no),
    ]
    c = numpy_helper.from_array(np.array([3.0, 5.0], np.float32), "c")
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    graph = helper.make_graph(nodes, "main", [value("x")], [value("y")], [c, zero], doc_string=SECRET)
    graph.metadata_props.add(key="where", value=SECRET)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_nothing_of_a_trace_is_left_and_the_numbers_stay() -> None:
    """Sub-graphs included; a second run changes nothing."""
    before, model = traced_model(), ir.from_proto(traced_model())
    assert SECRET.encode() in before.SerializeToString()
    strip_trace(model)
    after = ir.to_proto(model)
    assert SECRET.encode() not in after.SerializeToString()
    onnx.checker.check_model(after, full_check=True)
    for x in (np.array([[1, 2]], np.float32), np.array([[-1, -2], [-3, -4]], np.float32)):
        one, other = (
            ort.InferenceSession(m.SerializeToString()).run(None, {"x": x}) for m in (before, after)
        )
        np.testing.assert_array_equal(one, other)
    strip_trace(model)
    assert ir.to_proto(model).SerializeToString() == after.SerializeToString()
