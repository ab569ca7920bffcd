"""A bundle that travels without its weights is whole again on the other machine, and draws what it drew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from ddexport import runtime
from ddexport.runtime.check import check, read_golden
from ddexport.runtime.errors import BundleError
from tests.gpu.prepared import fill, prepare


def test_prepared_and_filled(embedded_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    source, target = embedded_bundle("digits-var"), tmp_path / "prepared"
    prepare(source, target)
    sizes = [sum(path.stat().st_size for path in root.glob("student.onnx*")) for root in (source, target)]
    assert sizes[1] < sizes[0] / 10
    with pytest.raises(BundleError):
        runtime.load(target, "onnxruntime", device="cpu")
    fill(target)
    with runtime.load(target, "onnxruntime", precision="fp32", device="cpu") as pipe:
        for row in check(pipe, read_golden(target)):
            assert not row.faults and row.left_out == 0
    nodes = onnx.load(target / "decoder_groupnorm_fp16.onnx", load_external_data=False).graph.node
    assert "InstanceNormalization" in {node.op_type for node in nodes}
    assert "decoder_groupnorm_fp16.onnx" in json.loads((target / "weights.json").read_text())["flops"]
