"""Engines of a bundle: built once, kept, replaced when anything changed, never half there, and read again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ddexport.engine import build as build_module
from ddexport.engine.build import facts_of, key_of, select_graphs
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions
from ddexport.runtime import machine
from ddexport.runtime.bundle import TEACHER, read_manifest, sha256_of
from ddexport.runtime.engines import Profile, find_engines, fit, read_engine
from ddexport.runtime.errors import BundleError, OutputError, VerificationError
from ddexport.runtime.machine import Gpu
from ddexport.runtime.records import to_json


def files_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "engines").rglob("*") if path.is_file()}


@pytest.mark.tensorrt
def test_engines_and_sidecars_say_what_they_are(
    toy_bundle: Any, build: Any, rtx: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the runtime, which knows of an engine what its sidecar says; a second build keeps them. On a
    GPU they are for, no load says a word."""
    folder = toy_bundle()
    built = build(folder, precisions=("fp16", "bf16", "fp32"))
    manifest = read_manifest(folder)
    assert len(built) == 6 and all(item.origin == "built" for item in built)
    for item in built:
        engine = read_engine(folder, item.plan.with_suffix(".json"))
        assert engine == item.engine
        assert item.plan.parent.name == f"tensorrt-rtx-{rtx.version}-default"
        assert item.plan.name == engine.file == f"{engine.role}_{engine.precision}.plan"
        assert (sha256_of(item.plan), item.plan.stat().st_size) == (engine.sha256, engine.bytes)
        assert engine.source == manifest.graph(engine.role, engine.precision).digest
        assert engine.profiles == (Profile(1, 2, 4),) and engine.targets == ("default",)
        assert engine.platform == machine.this_platform() and engine.version == rtx.version
        half = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[engine.precision]
        assert engine.layers[half] >= 2 and engine.options["optimization_level"] == 0
    again = build(folder, precisions=("fp16", "bf16", "fp32"))
    assert [(item.origin, item.engine) for item in again] == [("kept", item.engine) for item in built]
    (forced,) = build(folder, roles=("student",), force=True)
    assert forced.origin == "built" and forced.engine.key == built[0].engine.key
    ada = Gpu(0, "NVIDIA Ada", (8, 9), 1)
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda((ada,), (12, 8), ""))
    assert [fit(folder, manifest, engines) for engines in find_engines(folder)[0]] == [("", "", True)] * 3


@pytest.mark.tensorrt
def test_what_changed_is_built_again(toy_bundle: Any, build: Any, quick: BuildOptions) -> None:
    """Protects the meaning of --batch and --compute-capability on a bundle that has engines already."""
    folder = toy_bundle()
    (first,) = build(folder, roles=("decoder",))
    wide = replace(quick, profiles=(Profile(1, 1, 1), Profile(2, 4, 16)))
    (again,) = build(folder, roles=("decoder",), options=wide)
    assert again.origin == "built" and again.plan == first.plan
    assert read_engine(folder, again.plan.with_suffix(".json")).max_batch == 16
    (named,) = build(folder, roles=("decoder",), options=replace(quick, targets=("sm80", "sm89")))
    assert named.engine.targets == ("sm80", "sm89") and named.plan.parent.name.endswith("-sm80_sm89")
    assert again.plan.exists() and named.plan.exists()


@pytest.mark.tensorrt
def test_a_damaged_engine_in_the_bundle_is_replaced(toy_bundle: Any, build: Any) -> None:
    """Protects against keeping what the runtime would refuse."""
    folder = toy_bundle()
    (item,) = build(folder, roles=("student",))
    sidecar = item.plan.with_suffix(".json")
    for path, content in (
        (item.plan, b"x" * item.engine.bytes),
        (sidecar, b"{"),
        (sidecar, to_json(msgspec.structs.replace(item.engine, key="0" * 64)).encode()),
    ):
        path.write_bytes(content)
        (again,) = build(folder, roles=("student",))
        assert again.origin == "built" and read_engine(folder, sidecar) == again.engine
        assert sha256_of(item.plan) == again.engine.sha256


@pytest.mark.tensorrt
def test_a_failure_leaves_nothing_or_the_old_engine(
    toy_bundle: Any, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects a working bundle from a build that fails, and users from other tools' silent float32."""
    liar = toy_bundle("liar", really={"fp16": "fp32"})
    with pytest.raises(VerificationError):
        build(liar)
    assert files_of(liar) <= {".lock"}
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
    blocked = toy_bundle("blocked")
    (blocked / "engines").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        build(blocked)


@pytest.mark.tensorrt
def test_a_weight_changed_behind_the_manifest_is_refused(toy_bundle: Any, build: Any) -> None:
    """Protects the key, which takes the hashes from the manifest: they are compared first."""
    folder = toy_bundle(external=True)
    data = folder / "student_fp16.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BundleError, match="SHA-256"):
        build(folder)


def test_fp16_is_the_default_and_must_be_there(toy_bundle: Any) -> None:
    """Protects against building something else than the user expects; the teacher is never built."""
    both = read_manifest(toy_bundle("both"))
    student = msgspec.structs.replace(both.graph("student", "fp16"), role=TEACHER)
    both = msgspec.structs.replace(both, graphs=(*both.graphs, student))
    assert [graph.file for graph in select_graphs(both)] == ["student_fp16.onnx", "decoder_fp16.onnx"]
    files = [graph.file for graph in select_graphs(both, ("bf16", "fp32"), ("decoder",))]
    assert files == ["decoder_bf16.onnx", "decoder.onnx"]
    plain = read_manifest(toy_bundle("plain", precisions=("fp32",)))
    with pytest.raises(BundleError, match="no graphs in fp16; it has fp32") as caught:
        select_graphs(plain)
    assert "ddexport onnx --model plain --precision fp32,fp16" in caught.value.hint


def test_every_part_of_the_key_matters(toy_bundle: Any, a_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects against an engine of another package, GPU, profile, option, precision or graph."""
    manifest = read_manifest(toy_bundle())
    graph = manifest.graph("student", "fp16")
    rtx = TensorRT("tensorrt-rtx", None, "1.7.1.116", None)
    full = replace(rtx, backend="tensorrt", gpu=a_gpu)
    change = msgspec.structs.replace

    def key(graph: Any = graph, trt: Any = rtx, **options: Any) -> str:
        return key_of(facts_of(graph, trt, BuildOptions(**options)), trt)

    keys = [
        key(),
        key(change(graph, files=(change(graph.files[0], sha256="0" * 64),))),
        key(change(graph, precision="bf16")),
        key(change(graph, split=1)),
        key(trt=replace(rtx, version="1.7.2.1")),
        key(trt=full),
        key(trt=replace(full, gpu=Gpu(0, "another of its capability", (9, 0), 1))),
        key(targets=("sm89",)),
        key(profiles=(Profile(1, 4, 16),)),
        key(workspace=1),
        key(tf32=True),
        key(optimization_level=1),
        key(version_compatible=True),
        key(hardware="ampere+"),
    ]
    assert len(set(keys)) == len(keys)
    # The same on another machine: TensorRT-RTX builds for no GPU in particular. Kernel times change how long.
    assert key(trt=replace(rtx, gpu=a_gpu)) == key() == key(timing_cache=Path("x"))
    before = key()
    monkeypatch.setattr(build_module, "REVISION", build_module.REVISION + 1)
    assert key() != before


PROGRAM = """
    import json, sys, time
    from pathlib import Path
    from ddexport.engine import build as build_module
    from ddexport.engine.module import load_tensorrt
    from ddexport.engine.options import BuildOptions
    from ddexport.runtime.engines import Profile
    plain, bundle = build_module.build_plan, Path(sys.argv[1])
    def slowly(*arguments):
        arguments[5].write(b"half a plan")
        arguments[5].seek(0)
        (bundle / "ready").touch()
        time.sleep(float(sys.argv[2]))
        return plain(*arguments)
    build_module.build_plan = slowly
    options = BuildOptions(profiles=(Profile(1, 2, 4),), optimization_level=0)
    (item,) = build_module.build_engines(bundle, load_tensorrt("tensorrt-rtx"), options, roles=("student",))
    print(item.origin)
"""


def start(bundle: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(bundle), str(seconds)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.tensorrt
def test_two_builders_at_once_and_one_that_is_killed(toy_bundle: Any, rtx: TensorRT) -> None:
    """Protects against half-written engines: one waits for the other, and clears up after a dead one."""
    folder = toy_bundle()
    killed = start(folder, 600)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "ready").exists():
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
    finally:
        killed.kill()
        killed.communicate()
    assert not list((folder / "engines").rglob("*.json")), "nothing that the runtime would load"
    processes = [start(folder, 1.5), start(folder, 1.5)]
    origins = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert sorted(origins) == ["built", "kept"]
    (sidecar,) = (folder / "engines").rglob("*.json")
    assert sha256_of(sidecar.with_suffix(".plan")) == read_engine(folder, sidecar).sha256
    assert files_of(folder) <= {".lock", "student_fp16.plan", "student_fp16.json"}
    assert json.loads(sidecar.read_text())["role"] == "student"
