"""Engines of a bundle: built once, kept, replaced when anything changed, never half there, and read again."""

from __future__ import annotations

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

ONE_ENGINE = {".lock", "student_fp16.plan", "student_fp16.json"}


def files_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "engines").rglob("*") if path.is_file()}


@pytest.mark.tensorrt
def test_engines_and_sidecars_say_what_they_are(
    toy_bundle: Any, build: Any, rtx: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime knows of an engine what its sidecar says. A second build keeps all of them, and on a GPU
    that they are for, the runtime has no remark."""
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
def test_what_changed_or_is_damaged_is_built_again(toy_bundle: Any, build: Any, quick: BuildOptions) -> None:
    """Other batch sizes replace an engine, other GPUs get a folder of their own, and what is damaged is not
    kept."""
    folder = toy_bundle()
    (first,) = build(folder, roles=("student",))
    wide = replace(quick, profiles=(Profile(1, 1, 1), Profile(2, 4, 16)))
    (again,) = build(folder, roles=("student",), options=wide)
    assert again.origin == "built" and again.plan == first.plan
    sidecar = again.plan.with_suffix(".json")
    assert read_engine(folder, sidecar).max_batch == 16
    (named,) = build(folder, roles=("student",), options=replace(quick, targets=("sm80", "sm89")))
    assert named.engine.targets == ("sm80", "sm89") and named.plan.parent.name.endswith("-sm80_sm89")
    assert again.plan.exists() and named.plan.exists()
    for path, content in (
        (again.plan, b"x" * again.engine.bytes),
        (sidecar, b"{"),
        (sidecar, to_json(msgspec.structs.replace(again.engine, key="0" * 64)).encode()),
    ):
        path.write_bytes(content)
        (again,) = build(folder, roles=("student",), options=wide)
        assert again.origin == "built" and read_engine(folder, sidecar) == again.engine
        assert sha256_of(again.plan) == again.engine.sha256


@pytest.mark.tensorrt
def test_a_failure_leaves_nothing_or_the_old_engine(
    toy_bundle: Any, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that computes in another type than it says, a full disk, and weights that are not those of the
    manifest, whose hashes go into the key."""
    liar = toy_bundle("liar", really={"fp16": "fp32"})
    with pytest.raises(VerificationError):
        build(liar)
    assert files_of(liar) <= {".lock"}
    changed = toy_bundle("changed", external=True)
    data = changed / "student_fp16.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BundleError):
        build(changed)
    folder = toy_bundle()
    (first,) = build(folder, roles=("student",))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "build_plan", fail)
    with pytest.raises(OutputError):
        build(folder, roles=("student",), force=True)
    assert sha256_of(first.plan) == first.engine.sha256
    assert read_engine(folder, first.plan.with_suffix(".json")) == first.engine
    assert files_of(folder) <= ONE_ENGINE


def test_fp16_is_the_default_and_must_be_there(toy_bundle: Any) -> None:
    """The teacher is never built."""
    both = read_manifest(toy_bundle("both"))
    student = msgspec.structs.replace(both.graph("student", "fp16"), role=TEACHER)
    both = msgspec.structs.replace(both, graphs=(*both.graphs, student))
    assert [graph.file for graph in select_graphs(both)] == ["student_fp16.onnx", "decoder_fp16.onnx"]
    files = [graph.file for graph in select_graphs(both, ("bf16", "fp32"), ("decoder",))]
    assert files == ["decoder_bf16.onnx", "decoder.onnx"]
    with pytest.raises(BundleError) as caught:
        select_graphs(read_manifest(toy_bundle("plain", precisions=("fp32",))))
    assert "--precision fp32,fp16" in caught.value.hint


def test_every_part_of_the_key_matters(toy_bundle: Any, a_gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of another package, GPU, profile, option, precision or graph has another key."""
    graph = read_manifest(toy_bundle()).graph("student", "fp16")
    rtx = TensorRT("tensorrt-rtx", None, "1.7.1.116", None)
    full = replace(rtx, backend="tensorrt", gpu=a_gpu)
    change = msgspec.structs.replace

    def key(graph: Any = graph, trt: Any = rtx, **options: Any) -> str:
        return key_of(facts_of(graph, trt, BuildOptions(**options)), trt)

    keys = [
        key(),
        key(change(graph, files=(change(graph.files[0], sha256="0" * 64),))),
        *(key(change(graph, **{name: value})) for name, value in (("precision", "bf16"), ("split", 1))),
        key(trt=replace(rtx, version="1.7.2.1")),
        *(key(trt=replace(full, gpu=gpu)) for gpu in (a_gpu, Gpu(0, "another of its capability", (9, 0), 1))),
        *(key(**{name: 1}) for name in ("workspace", "tf32", "optimization_level", "version_compatible")),
        *(key(targets=("sm89",)), key(profiles=(Profile(1, 4, 16),)), key(hardware="ampere+")),
    ]
    assert len(set(keys)) == len(keys) == 14
    # The same on another machine: TensorRT-RTX builds for no GPU in particular. Kernel times change how long.
    assert key(trt=replace(rtx, gpu=a_gpu)) == key() == key(timing_cache=Path("x"))
    before = key()
    monkeypatch.setattr(build_module, "REVISION", build_module.REVISION + 1)
    assert key() != before


PROGRAM = """
    import sys, time
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
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@pytest.mark.tensorrt
def test_two_builders_at_once_and_one_that_is_killed(toy_bundle: Any, rtx: TensorRT) -> None:
    """No half-written engine is left: one builder waits for the other, and clears up after a dead one."""
    folder = toy_bundle()
    killed = start(folder, 600)
    deadline = time.monotonic() + 60
    while not (folder / "ready").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert not list((folder / "engines").rglob("*.json")), "nothing that the runtime would load"
    processes = [start(folder, 1.5), start(folder, 1.5)]
    assert sorted(process.communicate(timeout=120)[0].strip() for process in processes) == ["built", "kept"]
    (sidecar,) = (folder / "engines").rglob("*.json")
    assert sha256_of(sidecar.with_suffix(".plan")) == read_engine(folder, sidecar).sha256
    assert files_of(folder) <= ONE_ENGINE
