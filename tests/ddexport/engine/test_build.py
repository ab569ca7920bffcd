"""Engines of a bundle: built once, found again, replaced when anything changed, and never half there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ddexport.runtime.engines import Profile, graph_digest, read_engine, this_platform
from ddexport.runtime.errors import BundleError, OutputError, VerificationError
from ddexport.runtime.machine import Gpu
from ddexport.runtime.manifest import read_manifest, sha256_of

from ddexport.engine import build as build_module
from ddexport.engine.build import key_parts, select_graphs
from ddexport.engine.cache import PLAN, EngineCache, cache_key
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions

NAMES = {"student_fp16", "decoder_fp16"}


def files_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "engines").rglob("*") if path.is_file()}


@pytest.mark.tensorrt
def test_engines_and_sidecars_say_what_they_are(toy_bundle: Any, build: Any, rtx: TensorRT) -> None:
    """Protects the runtime, which knows of an engine what its sidecar says."""
    folder = toy_bundle()
    built = build(folder, precisions=("fp16", "bf16", "fp32"))
    manifest = read_manifest(folder)
    assert len(built) == 6 and all(item.origin == "built" for item in built)
    for item in built:
        engine = read_engine(folder, item.plan.with_suffix(".json"))
        graph = manifest.graph(engine.role, engine.precision)
        assert engine == item.engine
        assert item.plan.parent.name == f"tensorrt-rtx-{rtx.version}-default"
        assert item.plan.name == engine.file == f"{engine.role}_{engine.precision}.plan"
        assert (sha256_of(item.plan), item.plan.stat().st_size) == (engine.sha256, engine.bytes)
        assert engine.source == graph_digest(graph)
        assert (engine.inputs, engine.outputs) == (graph.inputs, graph.outputs)
        assert engine.profiles == (Profile(1, 2, 4),) and engine.targets == ("default",)
        assert engine.platform == this_platform() and engine.version == rtx.version
        half = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[engine.precision]
        assert engine.layers[half] >= 2
        assert engine.options["optimization_level"] == 0 and engine.made_with == {}
    assert read_manifest(folder)  # engines do not make a bundle invalid


@pytest.mark.tensorrt
def test_a_second_build_keeps_what_is_there(toy_bundle: Any, build: Any) -> None:
    """Protects the time of whoever runs the command again."""
    folder = toy_bundle()
    first = build(folder)
    times = [item.plan.stat().st_mtime_ns for item in first]
    again = build(folder)
    assert [item.origin for item in again] == ["kept", "kept"]
    assert [item.plan.stat().st_mtime_ns for item in again] == times
    assert [item.engine for item in again] == [item.engine for item in first]


@pytest.mark.tensorrt
def test_another_bundle_with_the_same_graphs_is_served_from_the_cache(toy_bundle: Any, build: Any) -> None:
    """Protects the hit: by content, not by name; the copy is whole."""
    first = build(toy_bundle("one"))
    second = build(toy_bundle("two"))
    assert [item.origin for item in second] == ["cache", "cache"]
    assert [item.engine for item in second] == [item.engine for item in first]
    assert all(sha256_of(item.plan) == item.engine.sha256 for item in second)


@pytest.mark.tensorrt
def test_a_changed_weight_in_the_external_data_is_a_miss(toy_bundle: Any, build: Any) -> None:
    """Protects against the engine of the last training run: the graph file is the same to the byte."""
    one, two = toy_bundle("one", external=True), toy_bundle("two", external=True, seed=7)
    assert (one / "student_fp16.onnx").read_bytes() == (two / "student_fp16.onnx").read_bytes()
    assert (one / "student_fp16.onnx.data").read_bytes() != (two / "student_fp16.onnx.data").read_bytes()
    assert {item.origin for item in build(one)} == {"built"}
    assert {item.origin for item in build(two)} == {"built"}


@pytest.mark.tensorrt
def test_a_weight_changed_behind_the_manifest_is_refused(toy_bundle: Any, build: Any) -> None:
    """Protects the key, which takes the hashes from the manifest: they are compared first."""
    folder = toy_bundle(external=True)
    data = folder / "student_fp16.onnx.data"
    content = bytearray(data.read_bytes())
    content[10] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        build(folder)


@pytest.mark.tensorrt
def test_a_corrupt_cache_entry_is_built_again(
    toy_bundle: Any, build: Any, cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    """Protects against spreading a damaged engine from bundle to bundle."""
    first = build(toy_bundle("one"), roles=("student",))
    plan = cache.directory / first[0].engine.key / PLAN
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    second = build(toy_bundle("two"), roles=("student",))
    assert second[0].origin == "built" and "is damaged" in caplog.text
    assert sha256_of(plan) == second[0].engine.sha256  # and the cache has the new one


@pytest.mark.tensorrt
@pytest.mark.parametrize("damage", ["plan", "plan gone", "sidecar", "sidecar of another"])
def test_a_damaged_engine_in_the_bundle_is_replaced(toy_bundle: Any, build: Any, damage: str) -> None:
    """Protects against keeping what the runtime would refuse."""
    folder = toy_bundle()
    (item,) = build(folder, roles=("student",))
    sidecar = item.plan.with_suffix(".json")
    if damage == "plan":
        item.plan.write_bytes(b"x" * item.engine.bytes)
    elif damage == "plan gone":
        item.plan.unlink()
    elif damage == "sidecar":
        sidecar.write_text("{")
    else:
        sidecar.write_text(replace(item.engine, key="0" * 64).to_json())
    (again,) = build(folder, roles=("student",))
    assert again.origin == "cache" and again.engine == item.engine
    assert sha256_of(item.plan) == item.engine.sha256 and read_engine(folder, sidecar) == item.engine


@pytest.mark.tensorrt
def test_force_builds_and_no_cache_does_not_look(toy_bundle: Any, build: Any, cache: EngineCache) -> None:
    """Protects the two ways around what was built before."""
    folder = toy_bundle()
    first = build(folder, roles=("student",))
    forced = build(folder, roles=("student",), force=True)
    assert forced[0].origin == "built" and forced[0].engine.key == first[0].engine.key
    shutil.rmtree(folder / "engines")
    alone = build(folder, roles=("student",), cache=None)
    assert alone[0].origin == "built"
    shutil.rmtree(cache.directory)
    build(toy_bundle("other"), roles=("student",), cache=None)
    assert not cache.directory.exists()


@pytest.mark.tensorrt
def test_other_options_replace_the_engine(toy_bundle: Any, build: Any, quick: BuildOptions) -> None:
    """Protects the meaning of --batch on a bundle that has engines already."""
    folder = toy_bundle()
    build(folder, roles=("decoder",))
    wide = replace(quick, profiles=(Profile(1, 1, 1), Profile(2, 4, 16)))
    (again,) = build(folder, roles=("decoder",), options=wide)
    assert again.origin == "built" and again.engine.profiles == wide.profiles
    assert read_engine(folder, again.plan.with_suffix(".json")).largest_batch == 16
    assert len(list((folder / "engines").rglob("*.plan"))) == 1


@pytest.mark.tensorrt
def test_engines_for_named_gpus_lie_apart(toy_bundle: Any, build: Any, quick: BuildOptions) -> None:
    """Protects engines of several targets in one bundle from each other."""
    folder = toy_bundle()
    (any_gpu,) = build(folder, roles=("decoder",))
    (named,) = build(folder, roles=("decoder",), options=replace(quick, targets=("sm80", "sm89")))
    assert named.engine.targets == ("sm80", "sm89") and named.plan.parent.name.endswith("-sm80_sm89")
    assert any_gpu.plan.exists() and named.plan.exists()


@pytest.mark.tensorrt
def test_a_lie_about_the_precision_leaves_nothing(toy_bundle: Any, build: Any, cache: EngineCache) -> None:
    """Protects users of other tools' silent float32: exit code 3, no plan, no sidecar, no cache entry."""
    folder = toy_bundle(really={"fp16": "fp32"})
    with pytest.raises(VerificationError):
        build(folder)
    assert files_of(folder) <= {".lock"}
    assert cache.entries() == ([], []) and cache.leftovers() == []


@pytest.mark.tensorrt
def test_a_failure_leaves_the_old_engine(
    toy_bundle: Any, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a working bundle from a build that fails."""
    folder = toy_bundle()
    (first,) = build(folder, roles=("student",))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "build_plan", fail)
    with pytest.raises(OutputError, match="No space left"):
        build(folder, roles=("student",), force=True)
    assert sha256_of(first.plan) == first.engine.sha256
    assert read_engine(folder, first.plan.with_suffix(".json")) == first.engine
    assert files_of(folder) <= {".lock", "student_fp16.plan", "student_fp16.json"}


@pytest.mark.tensorrt
def test_a_bundle_that_cannot_be_written_is_an_error(toy_bundle: Any, build: Any) -> None:
    """Protects the message where the engines' folder cannot be made."""
    folder = toy_bundle()
    (folder / "engines").write_text("a file")
    with pytest.raises(OutputError, match="cannot write engines"):
        build(folder)


def test_fp16_is_the_default_and_must_be_there(toy_bundle: Any) -> None:
    """Protects against building something else than the user expects, and says how to export it."""
    both = read_manifest(toy_bundle("both"))
    assert {f"{graph.role}_{graph.precision}" for graph in select_graphs(both)} == NAMES
    assert [graph.precision for graph in select_graphs(both, ("bf16", "fp32"), ("decoder",))] == [
        "bf16",
        "fp32",
    ]
    plain = read_manifest(toy_bundle("plain", precisions=("fp32",)))
    with pytest.raises(BundleError, match="no graphs in fp16; it has fp32") as caught:
        select_graphs(plain)
    assert "ddexport onnx --model plain --precision fp32,fp16" in caught.value.hint
    with pytest.raises(BundleError, match="has no teacher"):
        select_graphs(both, ("fp16",), ("teacher",))
    taught = replace(both, graphs=(*both.graphs, replace(both.graph("student", "fp16"), role="teacher")))
    with pytest.raises(BundleError, match="has no teacher in bf16"):
        select_graphs(taught, ("fp16", "bf16"), ("teacher",))
    assert len(select_graphs(taught, ("fp16", "bf16"))) == 5


def test_every_part_of_the_key_matters(toy_bundle: Any, a_gpu: Gpu) -> None:
    """Protects against an engine of another package, GPU, profile, option, precision or graph."""
    manifest = read_manifest(toy_bundle())
    graph = manifest.graph("student", "fp16")
    rtx = TensorRT("tensorrt-rtx", None, "1.7.1.116", None)
    options = BuildOptions()

    def key(graph: Any = graph, trt: Any = rtx, options: Any = options, targets: Any = ("default",)) -> str:
        return cache_key(key_parts(graph, trt, options, targets))

    info = graph.files[0]
    full = replace(rtx, backend="tensorrt", gpu=a_gpu)
    others = [
        key(replace(graph, files=(replace(info, sha256="0" * 64),))),
        key(replace(graph, precision="bf16")),
        key(replace(graph, inputs=graph.inputs[:1])),
        key(trt=replace(rtx, version="1.7.2.1")),
        key(trt=full),
        key(trt=replace(full, gpu=replace(a_gpu, name="another of the same capability"))),
        key(targets=("sm89",)),
        key(options=BuildOptions(profiles=(Profile(1, 4, 16),))),
        key(options=BuildOptions(workspace=1)),
        key(options=BuildOptions(version_compatible=True)),
        key(options=BuildOptions(hardware="ampere+")),
    ]
    assert len({key(), *others}) == 1 + len(others)
    # The same build on another machine with the same package: TensorRT-RTX builds for no GPU in particular.
    assert key(trt=replace(rtx, gpu=a_gpu)) == key()
    # Kernel times change how long it takes, not what is asked for.
    assert key(options=BuildOptions(timing_cache=Path("x"))) == key()


def test_the_version_of_this_builder_is_in_the_key(toy_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against engines of an older builder after an upgrade."""
    graph = read_manifest(toy_bundle()).graph("student", "fp16")
    rtx = TensorRT("tensorrt-rtx", None, "1.7.1.116", None)
    before = key_parts(graph, rtx, BuildOptions(), ("default",))
    monkeypatch.setattr(build_module, "REVISION", build_module.REVISION + 1)
    assert key_parts(graph, rtx, BuildOptions(), ("default",)) != before
    json.dumps(before)  # JSON data, so that the key is the same everywhere
