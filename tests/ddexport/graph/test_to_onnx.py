"""Tracing: large weights beside the graph, the same bytes every time, and nothing left changed behind."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from ddexport.bundle import WeightRequest, load_parts
from ddexport.graph import to_onnx
from ddexport.graph.rewrites import rewrite
from ddexport.graph.spec import graph_specs
from ddexport.graph.to_onnx import OPSETS, ExportError, check_onnx, check_opset, onnx_from_module
from ddexport.runtime.bundle import read_manifest

FORBIDDEN = {"If", "Loop", "Scan", "NonZero", "Dropout", "Bernoulli", "Multinomial"} | {
    f"Random{law}{like}" for law in ("Normal", "Uniform") for like in ("", "Like")
}


def weights_of(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)  # with its external data
    return {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}


def test_opsets() -> None:
    for opset in OPSETS:
        check_opset(opset)
    for opset in (0, -1, OPSETS.start - 1, OPSETS.stop):
        with pytest.raises(ExportError, match=f"opset {opset} is not supported") as caught:
            check_opset(opset)
        assert caught.value.hint == "use 18 to 23"


def test_large_weights_lie_beside_the_graph(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One protobuf message holds 2 GiB; a graph with its data beside it is the same graph.

    The same trace also shows that logging is left as it was found.
    """
    spec = graph_specs(tiny.recipe)[0]
    student = load_parts(tiny.recipe, WeightRequest({}, random_seed=tiny.seed))["student"]
    student.tabulate()
    logging.getLogger("torch.onnx").setLevel(logging.DEBUG)
    monkeypatch.setattr(to_onnx, "EXTERNAL_DATA_FROM", 0)
    path = tmp_path / "student.onnx"
    try:
        files = onnx_from_module(student, spec, tiny.recipe, path, tiny.opset, {"role": "student"})
        assert logging.getLogger("torch.onnx").level == logging.DEBUG
    finally:
        logging.getLogger("torch.onnx").setLevel(logging.NOTSET)

    data = tmp_path / "student.onnx.data"
    assert files == [path, data]
    assert sorted(tmp_path.iterdir()) == [path, data]
    check_onnx(path)
    stored, whole = weights_of(path), weights_of(tiny.bundle / "student.onnx")
    assert stored.keys() == whole.keys()
    assert all(np.array_equal(stored[name], whole[name]) for name in whole)
    outside = [w for w in onnx.load(path, load_external_data=False).graph.initializer if w.external_data]
    assert {entry.value for w in outside for entry in w.external_data if entry.key == "location"} == {
        data.name
    }
    assert data.stat().st_size > 0.9 * sum(value.nbytes for value in whole.values())
    assert path.stat().st_size < (tiny.bundle / "student.onnx").stat().st_size

    feeds = {"latents": np.ones((3, 5, 4), np.float32), "label": np.arange(3), "known": np.array([0, 1, 0])}
    results = [
        ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(None, feeds)
        for p in (path, tiny.bundle / "student.onnx")
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_same_weights_give_the_same_bytes(tiny, tmp_path: Path) -> None:
    """A second trace, compared with the graph of the bundle: its hash says whether anything changed."""
    manifest = read_manifest(tiny.bundle)
    spec = graph_specs(tiny.recipe)[1]
    tokenizer = load_parts(tiny.recipe, WeightRequest({}, random_seed=tiny.seed))["tokenizer"]
    rewrite({"tokenizer": tokenizer})
    properties = {p.key: p.value for p in onnx.load(tiny.bundle / "decoder.onnx").metadata_props}
    path = tmp_path / "decoder.onnx"
    files = onnx_from_module(tokenizer, spec, tiny.recipe, path, tiny.opset, properties)
    assert files == [path]
    assert path.read_bytes() == (tiny.bundle / "decoder.onnx").read_bytes()
    assert manifest.graph("decoder").files[0].bytes == path.stat().st_size


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
