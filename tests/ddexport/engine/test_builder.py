"""One build: what is asked for reaches TensorRT, what it complains of is a failure, and Ctrl-C stops it."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from ddexport.engine import builder
from ddexport.engine.builder import BuildError, build_plan
from ddexport.engine.module import TensorRT
from ddexport.engine.options import BuildOptions
from ddexport.runtime.bundle import Manifest, read_manifest
from ddexport.runtime.engines import Profile
from ddexport.runtime.errors import BundleError

pytestmark = pytest.mark.tensorrt


def build(
    trt: TensorRT,
    folder: Path,
    options: BuildOptions,
    precision: str = "fp32",
    role: str = "student",
    manifest: Manifest | None = None,
) -> tuple[Any, bytes]:
    manifest, stream = manifest or read_manifest(folder, verify=False), io.BytesIO()
    graph = manifest.graph(role, precision)
    options = replace(options, targets=options.targets or ("default",))
    plan = build_plan(trt, folder, manifest, graph, options, stream, lambda name: nullcontext())
    return plan, stream.getvalue()


def test_a_plan_is_what_was_asked_for(
    toy_bundle: Any,
    rtx: TensorRT,
    quick: BuildOptions,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By TensorRT's own configuration: --batch given twice would be one profile of batch 1, TF32 is on by
    default, and TensorRT 10 chooses the types itself unless it is told not to."""
    import polygraphy.backend.trt as polygraphy

    asked = []
    original = polygraphy.NetworkFromOnnxPath
    spy = lambda path, **options: asked.append(options) or original(path, **options)  # noqa: E731
    monkeypatch.setattr(polygraphy, "NetworkFromOnnxPath", spy)
    folder = toy_bundle()
    with caplog.at_level("INFO"):
        plan, content = build(rtx, folder, quick, "fp16")
        assert plan.sha256 == hashlib.sha256(content).hexdigest() and plan.bytes == len(content) > 0
        assert plan.layers == {"float16": 2, "float32": 1}
        assert asked == [{"strongly_typed": True}]
        assert "[STRONGLY_TYPED]" in caplog.text and "Verbosity.LAYER_NAMES_ONLY" in caplog.text
        assert "latents [min=(1, 6, 16), opt=(2, 6, 16), max=(4, 6, 16)]" in caplog.text
        assert "label [min=(1,), opt=(2,), max=(4,)]" in caplog.text and "Profile 1" not in caplog.text
        caplog.clear()
        profiles = (Profile(1, 1, 1), Profile(2, 4, 8))
        options = replace(quick, profiles=profiles, workspace=1 << 30, tf32=True, targets=("sm80", "sm120"))
        assert build(rtx, folder, options)[0].bytes > 0
    assert "[TF32, STRONGLY_TYPED]" in caplog.text and "[WORKSPACE: 1024.00 MiB" in caplog.text
    assert "known [min=(2,), opt=(4,), max=(8,)]" in caplog.text
    assert "Setting 2 target compute capabilities: [(8, 0), (12, 0)]" in caplog.text


def test_what_cannot_be_built_is_refused(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Settings that TensorRT rejects in its log only: it would build without them. The hint names the option
    to change."""
    folder = toy_bundle()
    manifest, path = read_manifest(folder), folder / "decoder_bf16.onnx"
    model = onnx.load(path)
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv")
    convolution.op_type = "ConvTranspose"  # which TensorRT-RTX 1.7 has not in bfloat16
    onnx.save_model(model, path)
    cases: tuple[tuple[dict[str, Any], str, str, str], ...] = (
        ({"workspace": 1}, "fp32", "student", "--workspace"),
        ({"targets": ("sm75",)}, "fp32", "student", "sm75"),
        ({"targets": ("sm75",)}, "bf16", "student", "sm75"),
        ({"profiles": ()}, "fp32", "student", ""),  # Polygraphy would make an engine of batch 1
        ({"optimization_level": -1}, "fp32", "student", "--debug"),
        ({}, "bf16", "decoder", "fp16"),
    )
    for options, precision, role, hint in cases:
        with pytest.raises(BuildError) as refused:
            build(rtx, folder, replace(quick, **options), precision, role, manifest)
        assert hint in refused.value.hint and "_src" not in refused.value.message
    assert build(rtx, folder, quick, manifest=manifest)[0].bytes > 0, "an error is of one build alone"


def test_what_tensorrt_cannot_read_is_a_build_error(
    toy_bundle: Any, rtx: TensorRT, quick: BuildOptions
) -> None:
    """An operator that TensorRT lacks is named; what is no graph at all is the bundle's fault."""
    folder = toy_bundle()
    path = folder / "student.onnx"
    model, size = onnx.load(path), path.stat().st_size
    model.graph.node[0].op_type = "NoSuch"  # as long as Gather: the manifest has the size
    onnx.save_model(model, path)
    with pytest.raises(BuildError, match="NoSuch"):
        build(rtx, folder, quick)
    path.write_bytes(b"\xff" * size)
    with pytest.raises(BundleError):
        build(rtx, folder, quick)


def test_ctrl_c_stops_a_real_build(
    toy_bundle: Any,
    rtx: TensorRT,
    quick: BuildOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The monitor's answer ends a build, and the next one builds."""
    folder, wait, sent = toy_bundle(), builder.wait, []

    def interrupted(work: Any, seconds: float) -> None:
        if not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        wait(work, seconds)

    monkeypatch.setattr(builder, "wait", interrupted)
    with caplog.at_level("INFO"):
        with pytest.raises(KeyboardInterrupt):
            build(rtx, folder, quick)
        assert "Finished engine building" not in caplog.text
        assert build(rtx, folder, quick)[0].bytes > 0 and "Finished engine building" in caplog.text
