"""Tracing: the same bytes every time, nothing left changed behind, and nothing said about the machine."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

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
        with pytest.raises(ExportError):
            check_opset(opset)
    with pytest.raises(ExportError):
        check_opset(20, ["fp32", "bf16"])  # Conv takes bfloat16 from opset 22 on
    check_opset(22, ["fp32", "bf16"])


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


def test_no_random_numbers_and_no_control_flow(half_bundle: Path, tmp_path: Path) -> None:
    """Graphs are functions of their inputs, and every engine can compile them. One that breaks the rules is
    refused."""
    for path in half_bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        operators = {(node.domain, node.op_type) for node in model.graph.node}
        assert {domain for domain, _ in operators} == {""}
        assert not FORBIDDEN & {operator for _, operator in operators}
        assert len(model.functions) == 0
    del model.graph.node[3]
    (tmp_path / path.name).write_bytes(model.SerializeToString())
    with pytest.raises(onnx.checker.ValidationError):
        check_onnx(tmp_path / path.name)


SECRET = "/home/someone/secret/model.py"


def traced_model() -> onnx.ModelProto:
    """y = c * x if x[0] > 0 else -x, with a tracer's notes on everything that can carry one."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        main (float[batch, 2] x) => (float[batch, 2] y) <float[2] c = {3, 5}, float zero = {0}> {
            top = ReduceMax <keepdims = 0> (x)
            positive = Greater (top, zero)
            y = If (positive) <
                then_branch = yes () => (float[batch, 2] scaled) { scaled = Mul (x, c) },
                else_branch = no () => (float[batch, 2] turned) { turned = Neg (x) }
            >
        }""")
    graphs = [model.graph, *(attribute.g for attribute in model.graph.node[2].attribute)]
    model.graph.doc_string = SECRET
    model.graph.metadata_props.add(key="where", value=SECRET)
    for graph in graphs:
        for owner in (*graph.input, *graph.output, *graph.node):
            owner.doc_string = f'File "{SECRET}", line 7'
            owner.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=SECRET)
    return model


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
