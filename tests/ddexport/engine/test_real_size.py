"""Engines of the published geometries, with random weights: time, memory and size for docs/engines.md.

    DDEXPORT_REAL_SIZE=/some/folder pytest -m "slow and tensorrt" tests/ddexport/engine/test_real_size.py -s

Minutes and gigabytes. The bundles are kept in the named folder, and used again if they are there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddexport.engine.module import TensorRT
from ddexport.runtime.bundle import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.tensorrt]

GIB = 1 << 30
PROTOBUF_LIMIT = 2 << 30

CHILD = """
import json, resource, sys
from pathlib import Path
from ddexport.engine.build import build_engines
from ddexport.engine.module import load_tensorrt
from ddexport.engine.options import BuildOptions
folder, role, precision = sys.argv[1:]
(item,) = build_engines(
    Path(folder), load_tensorrt("tensorrt-rtx"), BuildOptions(), (precision,), (role,), force=True
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": item.engine.seconds, "peak": peak, "bytes": item.engine.bytes,
                  "layers": dict(item.engine.layers), "plan": str(item.plan)}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("DDEXPORT_REAL_SIZE")
    return Path(named) if named else tmp_path_factory.mktemp("real-size")


def bundle(place: Path, model: str, *precisions: str) -> Path:
    """The bundle of a model with random weights, exported in a process of its own if it is not there."""
    folder = place / model
    if folder.exists() and set(precisions) <= set(read_manifest(folder, verify=False).precisions):
        return folder
    command = ["ddexport", "onnx", "--model", model, "--random-weights", "0", "-o", str(folder), "--force"]
    subprocess.run([*command, "--precision", ",".join(precisions)], check=True)
    return folder


def build(folder: Path, role: str, precision: str) -> dict[str, Any]:
    """Builds one engine in a process of its own, which is how its peak memory is known."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), role, precision], stdout=subprocess.PIPE, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    sys.stderr.write(
        f"\n{folder.name} {role} {precision}: {result['seconds']:.1f} s,"
        f" {result['peak'] / GIB:.2f} GiB peak, {result['bytes'] / 2**20:.0f} MiB, {result['layers']}\n"
    )
    return result


def test_var_d16_in_half(rtx: TensorRT, place: Path) -> None:
    """Protects the memory a build needs, and plans without a second copy of the weights. Times are printed:
    they depend on what else the machine does."""
    folder = bundle(place, "var-d16", "fp16")
    student, decoder = (build(folder, role, "fp16") for role in ("student", "decoder"))
    assert student["peak"] < 3 * GIB and decoder["peak"] < 1.5 * GIB
    assert student["bytes"] < 1.1 * sum(
        info.bytes for info in read_manifest(folder, verify=False).graph("student", "fp16").files
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_var_d16_in_other_precisions(rtx: TensorRT, place: Path, precision: str) -> None:
    """Protects the other two precisions at real size: bfloat16 cannot even be run by ONNX Runtime's CPU."""
    folder = bundle(place, "var-d16", "fp32", "bf16")
    half = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    for role in ("student", "decoder"):
        layers = build(folder, role, precision)["layers"]
        assert layers[half] == max(layers.values())


def test_llamagen_l_in_half(rtx: TensorRT, place: Path) -> None:
    """Protects the other family at real size."""
    folder = bundle(place, "llamagen-l", "fp16")
    for role in ("student", "decoder"):
        layers = build(folder, role, "fp16")["layers"]
        assert layers["float16"] > layers["float32"]


def test_weights_past_the_limit_of_protobuf(rtx: TensorRT, place: Path) -> None:
    """Protects offsets and tensors in external data past 2 GiB: var-d24 in float32 parses and builds."""
    folder = bundle(place, "var-d24", "fp32")
    graph = read_manifest(folder, verify=False).graph("student", "fp32")
    assert sum(info.bytes for info in graph.files) > PROTOBUF_LIMIT
    result = build(folder, "student", "fp32")
    assert result["bytes"] > PROTOBUF_LIMIT
    Path(result["plan"]).unlink()
    Path(result["plan"]).with_suffix(".json").unlink()
