"""Engines of both embedded models in three precisions: what CI really builds, from weights to plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ddexport.engine.build import Built, build_engines
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions
from ddexport.runtime.bundle import read_manifest, sha256_of
from ddexport.runtime.engines import Profile, SizeRange, read_engine

MODELS = ("digits-var", "digits-llamagen")
PRECISIONS = ("fp32", "fp16", "bf16")
PROFILES = (Profile(1, 1, 1), Profile(2, 4, 8))
TEACHER = ("digits-llamagen", "fp16")
"""The one engine of a teacher that is built here: another one would show nothing more."""
LLAMAGEN_SIZES = (SizeRange("new", 1, 1, 16), SizeRange("capacity", 8, 16, 16))


@pytest.fixture(scope="module", params=MODELS)
def built(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    rtx: TensorRT,
    embedded_bundle: Callable[[str], Path],
) -> tuple[Path, list[Built]]:
    """A copy of the bundle of an embedded model with all its engines."""
    folder = tmp_path_factory.mktemp("embedded") / request.param
    shutil.copytree(embedded_bundle(request.param), folder)
    options = BuildOptions(profiles=PROFILES, optimization_level=0)
    roles = tuple(
        dict.fromkeys(graph.role for graph in read_manifest(folder).graphs if graph.role != "teacher")
    )
    built = build_engines(folder, rtx, options, PRECISIONS, roles)
    if (folder.name, "fp16") == TEACHER:
        built += build_engines(folder, rtx, options, ("fp16",), ("teacher",))
    return folder, built


@pytest.mark.tensorrt
def test_both_embedded_models_build_in_three_precisions(
    built: tuple[Path, list[Built]], rtx: TensorRT
) -> None:
    """Protects the way from weights to engine, with the types, tensors and profiles that were asked for."""
    folder, engines = built
    manifest = read_manifest(folder)
    graphs = {
        (graph.key, graph.precision): graph
        for graph in manifest.graphs
        if graph.precision in PRECISIONS
        and (graph.role != "teacher" or (folder.name, graph.precision) == TEACHER)
    }
    students = {key for key, _ in graphs if key.startswith("student")}
    assert len(students) == 2, "one of another split, for steps with a teacher"
    assert {(item.engine.role, item.engine.precision) for item in engines} == graphs.keys()
    for item in engines:
        engine = read_engine(folder, item.plan.with_suffix(".json"))
        graph = graphs[engine.role, engine.precision]
        others = LLAMAGEN_SIZES if engine.role == "teacher" else ()
        assert engine.profiles == tuple(replace(profile, others=others) for profile in PROFILES)
        assert engine.targets == ("default",)
        assert (engine.inputs, engine.outputs) == (graph.inputs, graph.outputs)
        assert sha256_of(item.plan) == engine.sha256
        half = {"fp16": "float16", "bf16": "bfloat16"}.get(engine.precision)
        counts = dict(engine.layers)
        kept = counts.pop("float32", 0)
        if half is None:
            assert kept > 20 and not counts
        else:
            assert set(counts) == {half}
            assert counts[half] > 2 * kept > 0, "the heads, at least, stay float32"
    assert all(
        {spec.name: spec.dtype for spec in engine.inputs}
        == {"tokens": "float32", "label": "int64", "known": "int64"}
        for engine in (item.engine for item in engines)
        if engine.role.startswith("student")
    )
