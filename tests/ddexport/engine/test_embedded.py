"""Engines of the embedded models, really built from weights to plan: in CI one model in one precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddexport.engine.build import build_engines
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions
from ddexport.runtime.bundle import TEACHER, read_manifest
from ddexport.runtime.engines import Profile, read_engine

PRECISIONS = ("fp32", "fp16", "bf16")
PROFILES = (Profile(1, 1, 1), Profile(2, 4, 8))


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("model", "precisions"),
    [
        ("digits-var", ("fp16",)),
        pytest.param("digits-var", PRECISIONS, marks=pytest.mark.slow),
        pytest.param("digits-llamagen", PRECISIONS, marks=pytest.mark.slow),
    ],
)
def test_embedded_models_build(
    model: str,
    precisions: tuple[str, ...],
    tmp_path: Path,
    rtx: TensorRT,
    embedded_bundle: Callable[[str], Path],
) -> None:
    """The whole chain from weights to engine, with the types and profiles that were asked for."""
    folder = Path(shutil.copytree(embedded_bundle(model), tmp_path / model))
    built = build_engines(folder, rtx, BuildOptions(profiles=PROFILES, optimization_level=0), precisions)
    graphs = {
        (graph.role, graph.split, graph.precision): graph
        for graph in read_manifest(folder).graphs
        if graph.precision in precisions and graph.role != TEACHER
    }
    assert len({(role, split) for role, split, _ in graphs if role == "student"}) == 2, "one for the teacher"
    assert {(item.engine.role, item.engine.split, item.engine.precision) for item in built} == graphs.keys()
    for item in built:
        engine = read_engine(folder, item.plan.with_suffix(".json"))
        assert engine.source == graphs[engine.role, engine.split, engine.precision].digest
        assert engine.profiles == PROFILES and engine.targets == ("default",)
        counts = dict(engine.layers)
        kept = counts.pop("float32", 0)
        if engine.precision == "fp32":
            assert kept > 10 and not counts
        else:
            half = {"fp16": "float16", "bf16": "bfloat16"}[engine.precision]
            assert counts == {half: counts[half]} and counts[half] > 2 * kept > 0, "the heads stay float32"
