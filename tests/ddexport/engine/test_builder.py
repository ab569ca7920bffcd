"""One build: what is asked for reaches TensorRT, what it complains of is a failure, and Ctrl-C stops it."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from ddexport.engine import builder
from ddexport.engine.builder import BuildError, build_plan
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions, OptionError
from ddexport.runtime import machine
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.engines import Profile
from ddexport.runtime.errors import BundleError, VerificationError
from ddexport.runtime.machine import Gpu

_spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


@contextmanager
def unseen(name: str) -> Iterator[Callable[[int], None]]:
    yield lambda steps: None


def build(
    trt: TensorRT,
    folder: Path,
    options: BuildOptions,
    precision: str = "fp32",
    targets: tuple[str, ...] = ("default",),
    progress: Any = unseen,
) -> tuple[Any, bytes]:
    """Builds the student."""
    manifest, stream = read_manifest(folder, verify=False), io.BytesIO()
    graph = manifest.graph("student", precision)
    plan = build_plan(
        trt, folder, manifest, graph, options, targets, stream, lambda name: nullcontext(), progress
    )
    return plan, stream.getvalue()


@pytest.mark.tensorrt
def test_a_plan_is_written_with_its_hash(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Protects the sidecar; --batch given twice, a list of GPUs, every flag that needs no GPU."""
    folder = toy_bundle()
    steps: list[int] = []

    @contextmanager
    def seen(name: str) -> Iterator[Callable[[int], None]]:
        assert name == f"student fp16 with {rtx}"
        yield steps.append

    plan, content = build(rtx, folder, quick, "fp16", progress=seen)
    assert plan.sha256 == hashlib.sha256(content).hexdigest() and plan.bytes == len(content) > 0
    assert plan.layers == {"float16": 2, "float32": 1} and plan.seconds > 0
    assert len(steps) >= 2 and steps == sorted(steps) and steps[-1] > 10
    options = replace(
        quick, profiles=(Profile(1, 1, 1), Profile(2, 4, 8)), workspace=1 << 30, tf32=True,
        weight_streaming=True, sparse_weights=True,
    )  # fmt: skip
    assert build(rtx, folder, options, targets=("sm80", "sm89"))[0].bytes > 0


@pytest.mark.tensorrt
def test_what_cannot_be_built_is_refused(
    toy_bundle: Any, rtx: TensorRT, quick: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against an engine named fp16 that is float32, against Myelin's message about node names, and
    against settings that TensorRT rejects in its log only: it would build without them."""
    liar = toy_bundle("liar", really={"fp16": "fp32"})
    with pytest.raises(VerificationError, match="fp16 was asked for") as caught:
        build(rtx, liar, quick, "fp16")
    assert caught.value.exit_code == 3 and BuildError.exit_code == 1
    folder = toy_bundle()
    with pytest.raises(OptionError, match="sm75"):
        build(rtx, folder, quick, targets=("sm75",))
    with pytest.raises(BuildError, match="TensorRT could not build") as refused:
        build(rtx, folder, replace(quick, workspace=1))
    assert "--workspace" in refused.value.hint and "_src" not in refused.value.message
    if not machine.cuda().gpus:  # a driver builds stripped plans
        with pytest.raises(BuildError) as refused:
            build(rtx, folder, replace(quick, strip_plan=True))
        assert "GPU with its driver" in refused.value.hint
    configure = builder._configure

    def misconfigure(trt: TensorRT, config: Any, *rest: Any) -> None:
        configure(trt, config, *rest)
        config.builder_optimization_level = -1

    monkeypatch.setattr(builder, "_configure", misconfigure)
    with pytest.raises(BuildError, match="setBuilderOptimizationLevel"):
        build(rtx, folder, quick)


@pytest.mark.tensorrt
def test_what_tensorrt_cannot_read_is_a_build_error(
    toy_bundle: Any, rtx: TensorRT, quick: BuildOptions
) -> None:
    """Protects whoever has a graph with an operator that TensorRT lacks: one error, not a traceback."""
    folder = toy_bundle()
    path = folder / "student.onnx"
    model, size = onnx.load(path), path.stat().st_size
    model.graph.node[0].op_type = "NoSuch"  # as long as Gather
    onnx.save_model(model, path)
    assert path.stat().st_size == size
    with pytest.raises(BuildError, match=r"cannot read student\.onnx: \w+"):
        build(rtx, folder, quick)
    path.write_bytes(b"\xff" * size)
    with pytest.raises(BundleError, match=r"student\.onnx is no ONNX graph"):
        build(rtx, folder, quick)


@pytest.mark.tensorrt
def test_ctrl_c_stops_a_real_build(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Protects whoever waits for a long build: the monitor's answer ends it."""
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
    assert build(rtx, folder, quick)[0].bytes > 0  # and the next one builds


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
    plan, _ = build(full, toy_bundle(), options, "bf16", ("sm90",))
    assert plan.layers == {"bfloat16": 2, "float32": 1}
    (config,) = full.module.built
    # TF32 is TensorRT's default, and would take 13 bits from the float32 parts of a half graph.
    assert config.flags == {
        "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT", "WEIGHT_STREAMING", "SPARSE_WEIGHTS",
    }  # fmt: skip
    assert config.limits == {"WORKSPACE": 1 << 30} and config.builder_optimization_level == 5
    assert config.hardware_compatibility_level == "AMPERE_PLUS"
    assert config.profiles[1]["latents"] == ((8, 6, 16), (8, 6, 16), (16, 6, 16))
    assert config.profiles[0]["label"] == ((1,), (4,), (8,))
    strongly_typed = full.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert full.module.networks == [1 << strongly_typed]  # the bit is not the same in both releases
    assert timing.read_bytes() == b"+"


def test_full_tensorrt_may_refuse(
    toy_bundle: Any, full: TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects against kernel times that were measured elsewhere, and against writing an empty engine."""
    folder, timing = toy_bundle(), tmp_path / "timing"
    build(full, folder, BuildOptions(tf32=True, hardware="same-compute-capability"))
    assert "TF32" in full.module.built[0].flags
    assert full.module.built[0].hardware_compatibility_level == "SAME_COMPUTE_CAPABILITY"
    timing.write_bytes(b"another GPU")
    with pytest.raises(BuildError, match="another GPU or version"):
        build(full, folder, BuildOptions(timing_cache=timing))
    monkeypatch.setattr(full.module.Builder, "build_serialized_network", lambda *_: None)
    with pytest.raises(BuildError, match="did not say why"):
        build(full, folder, BuildOptions())
