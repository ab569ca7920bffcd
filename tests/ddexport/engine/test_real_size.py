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

GIB = 1 << 30
HALVES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

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
                  "layers": dict(item.engine.layers)}))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("DDEXPORT_REAL_SIZE")
    return Path(named) if named else tmp_path_factory.mktemp("real-size")


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("model", "precision", "roles", "peak"),
    [
        ("var-d16", "fp16", ("student", "decoder"), 3 * GIB),
        ("var-d16", "fp32", ("student", "decoder"), 5 * GIB),
        ("var-d16", "bf16", ("student", "decoder"), 3 * GIB),  # which ONNX Runtime's CPU cannot run
        ("llamagen-l", "fp16", ("student", "decoder"), 3 * GIB),
        ("var-d24", "fp32", ("student",), 12 * GIB),  # weights past the 2 GiB of one protobuf message
    ],
)
def test_engines_of_real_size(
    rtx: TensorRT, place: Path, model: str, precision: str, roles: tuple[str, ...], peak: int
) -> None:
    """Protects the memory a build needs, and plans without a second copy of the weights. Each is built in a
    process of its own, which is how its peak memory is known; times depend on what else the machine does."""
    folder = place / f"{model}-{precision}"
    if not folder.exists():
        command = ["ddexport", "onnx", "--model", model, "--random-weights", "0", "-o", str(folder)]
        subprocess.run([*command, "--precision", precision], check=True)
    manifest = read_manifest(folder, verify=False)
    for role in roles:
        words = [sys.executable, "-c", CHILD, str(folder), role, precision]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        sys.stderr.write(f"\n{model} {role} {precision}: {result}\n")
        assert result["layers"][HALVES[precision]] == max(result["layers"].values())
        assert result["peak"] < peak
        if role == "student":
            weights = sum(info.bytes for info in manifest.graph(role, precision).files)
            assert result["bytes"] < 1.25 * weights
