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

import pytest

from ddexport.engine.module import TensorRT
from ddexport.runtime.bundle import read_manifest

GIB = 1 << 30
HALVES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


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
        ("var-d16", "bf16", ("student", "decoder"), 3 * GIB),  # which ONNX Runtime's CPU cannot run
        ("llamagen-l", "fp16", ("student", "decoder"), 3 * GIB),
        ("var-d24", "fp32", ("student",), 12 * GIB),  # weights past the 2 GiB of one protobuf message
    ],
)
def test_engines_of_real_size(
    rtx: TensorRT, place: Path, model: str, precision: str, roles: tuple[str, ...], peak: int
) -> None:
    """The memory that a build needs, and plans without a second copy of the weights. Each is built in a
    process of its own, whose peak memory is measured; times depend on what else the machine does."""
    folder = place / f"{model}-{precision}"
    if not folder.exists():
        command = ["ddexport", "onnx", "--model", model, "--random-weights", "0", "-o", str(folder)]
        subprocess.run([*command, "--precision", precision], check=True)
    manifest = read_manifest(folder, verify=False)
    for role in roles:
        words = ["trt", str(folder), "--backend", "tensorrt-rtx", "--role", role, "--precision", precision]
        process = subprocess.Popen(["ddexport", *words, "--force", "--json"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        engine = json.loads(process.stdout.read())["engines"][0]["engine"]
        used = os.wait4(process.pid, 0)[2].ru_maxrss * 1024
        sys.stderr.write(f"\n{model} {role} {precision}: {used / GIB:.1f} GiB, {engine}\n")
        assert engine["layers"][HALVES[precision]] == max(engine["layers"].values())
        assert used < peak
        if role == "student":
            weights = sum(info.bytes for info in manifest.graph(role, precision).files)
            assert engine["bytes"] < 1.25 * weights
