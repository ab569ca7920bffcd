"""One build: what is asked for reaches TensorRT, what it complains of is a failure, and Ctrl-C stops it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from ddexport.runtime.engines import Profile
from ddexport.runtime.errors import BundleError, VerificationError
from ddexport.runtime.machine import Gpu, Machine
from ddexport.runtime.manifest import read_manifest

from ddexport.engine import builder
from ddexport.engine.builder import BuildError, build_plan
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions, OptionError

_spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


@contextmanager
def unseen(name: str) -> Iterator[Callable[[int], None]]:
    yield lambda steps: None


def build(trt: TensorRT, folder: Path, options: BuildOptions, **changed: Any) -> Any:
    """Builds the student, float32 if not said otherwise, to `plan` beside the bundle."""
    precision = changed.pop("precision", "fp32")
    graph = changed.pop("graph", None) or read_manifest(folder).graph("student", precision)
    arguments = {
        "targets": ("default",),
        "destination": folder.parent / "plan",
        "stage": lambda name: nullcontext(),
        "progress": unseen,
    } | changed
    return build_plan(trt, folder, graph, options, **arguments)


@pytest.mark.tensorrt
def test_a_plan_is_written_with_its_hash(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Protects the sidecar: hash, size and layers are those of what was written."""
    folder = toy_bundle()
    steps: list[int] = []

    @contextmanager
    def seen(name: str) -> Iterator[Callable[[int], None]]:
        assert name == f"student fp16 with {rtx}"
        yield steps.append

    plan = build(rtx, folder, quick, precision="fp16", progress=seen)
    content = (folder.parent / "plan").read_bytes()
    assert plan.sha256 == hashlib.sha256(content).hexdigest() and plan.bytes == len(content)
    assert plan.layers == {"float16": 2, "float32": 1}
    assert len(steps) >= 2 and steps == sorted(steps) and steps[-1] > 10
    assert plan.seconds > 0


@pytest.mark.tensorrt
def test_several_profiles_and_targets_build(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Protects --batch given twice and a list of GPUs; every flag that needs no GPU goes with them."""
    options = replace(
        quick,
        profiles=(Profile(1, 1, 1), Profile(2, 4, 8)),
        workspace=1 << 30,
        tf32=True,
        weight_streaming=True,
        sparse_weights=True,
    )
    assert build(rtx, toy_bundle(), options, targets=("sm80", "sm89")).bytes > 0


@pytest.mark.tensorrt
def test_a_lie_in_the_manifest_is_refused(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Protects against an engine named fp16 of a graph that is secretly float32: nothing is written."""
    folder = toy_bundle(really={"fp16": "fp32"})
    with pytest.raises(VerificationError, match="fp16 was asked for") as caught:
        build(rtx, folder, quick, precision="fp16")
    assert caught.value.exit_code == 3
    assert not (folder.parent / "plan").exists()


@pytest.mark.tensorrt
def test_a_logged_error_is_a_failure(
    toy_bundle: Any, rtx: TensorRT, quick: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against settings that TensorRT rejects in its log only: it would build without them."""
    configure = builder._configure

    def misconfigure(trt: TensorRT, config: Any, *rest: Any) -> None:
        configure(trt, config, *rest)
        config.builder_optimization_level = -1

    monkeypatch.setattr(builder, "_configure", misconfigure)
    with pytest.raises(BuildError, match="setBuilderOptimizationLevel"):
        build(rtx, toy_bundle(), quick)


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("change", "hint"),
    [({"workspace": 1}, "--workspace"), ({"strip_plan": True}, "GPU with its driver")],
    ids=["workspace", "driver"],
)
def test_a_failed_build_says_what_to_do(
    toy_bundle: Any, without_gpu: TensorRT, quick: BuildOptions, change: dict[str, Any], hint: str
) -> None:
    """Protects the hint of a failure that only shows in the build (the checks are left out here)."""
    if without_gpu.gpu is None and "strip_plan" in change and _has_driver():
        pytest.skip("this machine has a driver, with which stripped plans build")
    with pytest.raises(BuildError) as caught:
        build(without_gpu, toy_bundle(), replace(quick, **change))
    assert hint in caught.value.hint and "_src" not in caught.value.message


def _has_driver() -> bool:
    return bool(Machine().gpus)


@pytest.mark.tensorrt
def test_turing_is_refused_before_the_build(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Protects against Myelin's message about node names."""
    with pytest.raises(OptionError, match="sm75"):
        build(rtx, toy_bundle(), quick, targets=("sm75",))


@pytest.mark.tensorrt
def test_what_tensorrt_cannot_read_is_a_build_error(
    toy_bundle: Any, rtx: TensorRT, quick: BuildOptions
) -> None:
    """Protects whoever has a graph with an operator that TensorRT lacks: one error, not a traceback."""
    folder = toy_bundle()
    graph = read_manifest(folder).graph("student", "fp32")
    model = onnx.load(folder / graph.file)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save_model(model, folder / graph.file)
    with pytest.raises(BuildError, match=r"cannot read student\.onnx: \w+"):
        build(rtx, folder, quick, graph=graph)
    (folder / graph.file).write_bytes(b"not a protobuf at all")
    with pytest.raises(BundleError, match=r"student\.onnx is no ONNX graph"):
        build(rtx, folder, quick, graph=graph)


@pytest.mark.tensorrt
def test_ctrl_c_stops_a_real_build(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Protects whoever waits for a long build: the monitor's answer ends it, and nothing is written."""
    folder = toy_bundle()

    @contextmanager
    def interrupted(name: str) -> Iterator[Callable[[int], None]]:
        sent: list[int] = []

        def report(steps: int) -> None:
            if not sent:
                sent.append(steps)
                os.kill(os.getpid(), signal.SIGINT)

        yield report
        pytest.fail("the build went on to its end")

    with pytest.raises(KeyboardInterrupt):
        build(rtx, folder, quick, progress=interrupted)
    assert not (folder.parent / "plan").exists()
    assert build(rtx, folder, quick).bytes > 0  # and the next one builds


@pytest.fixture(params=["10.16.1.11", "11.4.0.106"])
def full(request: pytest.FixtureRequest, a_gpu: Gpu) -> TensorRT:
    """Full TensorRT, by name only."""
    return TensorRT("tensorrt", fake.fake_tensorrt(request.param), request.param, a_gpu)


def test_full_tensorrt_gets_what_is_asked_for(toy_bundle: Any, full: TensorRT, tmp_path: Path) -> None:
    """Protects the one code path: only names that 10.16 and 11.4 have, strong typing on both."""
    timing = tmp_path / "timing"
    options = BuildOptions(
        profiles=(Profile(1, 4, 8), Profile(8, 8, 16)),
        workspace=1 << 30,
        optimization_level=5,
        version_compatible=True,
        hardware="ampere+",
        strip_plan=True,
        refittable=True,
        weight_streaming=True,
        sparse_weights=True,
        timing_cache=timing,
    )
    plan = build(full, toy_bundle(), options, targets=("sm90",), precision="bf16")
    assert plan.layers == {"bfloat16": 2, "float32": 1}
    (config,) = full.module.built
    assert config.flags == {
        "VERSION_COMPATIBLE",
        "STRIP_PLAN",
        "REFIT",
        "WEIGHT_STREAMING",
        "SPARSE_WEIGHTS",
    }
    assert config.limits == {"WORKSPACE": 1 << 30} and config.builder_optimization_level == 5
    assert config.hardware_compatibility_level == "AMPERE_PLUS"
    assert config.profiles[1]["tokens"] == ((8, 6, 16), (8, 6, 16), (16, 6, 16))
    assert config.profiles[0]["label"] == ((1,), (4,), (8,))
    strongly_typed = full.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert full.module.networks == [1 << strongly_typed]  # the bit is not the same in both releases
    assert timing.read_bytes() == b"+"


def test_tf32_is_off_unless_asked_for(toy_bundle: Any, full: TensorRT) -> None:
    """Protects the float32 parts of a half graph from 10 bits of mantissa, which are TensorRT's default."""
    folder = toy_bundle()
    build(full, folder, BuildOptions())
    build(full, folder, BuildOptions(tf32=True, hardware="same-compute-capability"))
    off, on = full.module.built
    assert "TF32" not in off.flags and "TF32" in on.flags
    assert on.hardware_compatibility_level == "SAME_COMPUTE_CAPABILITY"


def test_a_timing_cache_of_another_gpu_is_refused(toy_bundle: Any, full: TensorRT, tmp_path: Path) -> None:
    """Protects against kernel times that were measured elsewhere."""
    timing = tmp_path / "timing"
    timing.write_bytes(b"another GPU")
    with pytest.raises(BuildError, match="another GPU or version"):
        build(full, toy_bundle(), BuildOptions(timing_cache=timing))


def test_no_plan_and_no_reason_is_still_an_error(
    toy_bundle: Any, full: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against writing an empty engine."""
    monkeypatch.setattr(full.module.Builder, "build_serialized_network", lambda *_: None)
    with pytest.raises(BuildError, match="did not say why"):
        build(full, toy_bundle(), BuildOptions())
