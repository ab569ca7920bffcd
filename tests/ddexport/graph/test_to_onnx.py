"""Tracing: the same bytes every time, nothing left changed behind, and nothing said about the machine."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import onnx.parser
import pytest

from ddexport.export import WeightRequest, load_parts
from ddexport.graph.spec import graph_specs
from ddexport.graph.to_onnx import (
    check_onnx,
    onnx_from_module,
)
from ddexport.graph.wrappers import graph_part
from ddexport.runtime.bundle import read_manifest

FORBIDDEN = {"If", "Loop", "Scan", "NonZero", "Dropout", "Bernoulli", "Multinomial"} | {
    f"Random{law}{like}" for law in ("Normal", "Uniform") for like in ("", "Like")
}


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
