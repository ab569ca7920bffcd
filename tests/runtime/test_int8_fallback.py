"""Bundles in int8 with a teacher: what has no int8 graph runs in float32, and nothing else does."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from ddexport.runtime.manifest import FILE_NAME, read_manifest

from ddexport import runtime


@pytest.fixture
def int8_bundle(shared_teacher_bundle: Path, tmp_path: Path) -> Path:
    """The toy bundle with its students and its decoder a second time, as int8."""
    target = tmp_path / "bundle"
    shutil.copytree(shared_teacher_bundle, target)
    manifest = read_manifest(target)
    more = [dataclasses.replace(g, precision="int8") for g in manifest.graphs if g.role != "teacher"]
    changed = dataclasses.replace(manifest, graphs=(*manifest.graphs, *more))
    (target / FILE_NAME).write_text(changed.to_json(), encoding="utf-8")
    return target


def test_the_teacher_alone_is_float32(int8_bundle: Path) -> None:
    with runtime.load(int8_bundle, "onnxruntime", 1, "int8", steps=3) as pipe:
        precisions = {key: graph.precision for key, graph in pipe.backend.graphs.items()}
        assert pipe.precision == pipe.backend.precision == "int8"
        assert precisions.pop("teacher") == "fp32"
        assert set(precisions) >= {"student", "decoder"} and set(precisions.values()) == {"int8"}
        got = pipe([0, 1], 3, seed=4, output="sequence").images
    with runtime.load(int8_bundle, "onnxruntime", 1, "fp32", steps=3) as pipe:
        np.testing.assert_array_equal(got, pipe([0, 1], 3, seed=4, output="sequence").images)


def test_float32_never_falls_back(int8_bundle: Path) -> None:
    with runtime.load(int8_bundle, "onnxruntime", 1, "fp32") as pipe:
        assert {graph.precision for graph in pipe.backend.graphs.values()} == {"fp32"}
