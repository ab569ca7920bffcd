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
from ddexport.runtime.errors import BundleError, VerificationError

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


def test_a_plan_is_written_with_its_hash(
    toy_bundle: Any, rtx: TensorRT, quick: BuildOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """Protects the sidecar; and, by TensorRT's own configuration, every option: --batch given twice would be
    one profile of batch 1, and TF32 is on by default."""
    folder = toy_bundle()
    with caplog.at_level("INFO"):
        plan, content = build(rtx, folder, quick, "fp16")
        assert plan.sha256 == hashlib.sha256(content).hexdigest() and plan.bytes == len(content) > 0
        assert plan.layers == {"float16": 2, "float32": 1}
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


def test_the_network_is_strongly_typed(
    toy_bundle: Any, rtx: TensorRT, quick: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects TensorRT 10, which would choose the types itself; TensorRT-RTX never does."""
    import polygraphy.backend.trt as polygraphy

    asked = []
    original = polygraphy.NetworkFromOnnxPath
    spy = lambda path, **options: asked.append(options) or original(path, **options)  # noqa: E731
    monkeypatch.setattr(polygraphy, "NetworkFromOnnxPath", spy)
    build(rtx, toy_bundle(), quick)
    assert asked == [{"strongly_typed": True}]


def test_what_cannot_be_built_is_refused(toy_bundle: Any, rtx: TensorRT, quick: BuildOptions) -> None:
    """Protects against an engine named fp16 that is float32, against Myelin's message about node names, and
    against settings that TensorRT rejects in its log only: it would build without them."""
    with pytest.raises(VerificationError, match="fp16 was asked for") as caught:
        build(rtx, toy_bundle("liar", really={"fp16": "fp32"}), quick, "fp16")
    assert caught.value.exit_code == 3 and BuildError.exit_code == 1
    folder = toy_bundle()
    manifest, path = read_manifest(folder), folder / "decoder_bf16.onnx"
    model = onnx.load(path)
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv")
    convolution.op_type = "ConvTranspose"
    onnx.save_model(model, path)
    cases: tuple[tuple[dict[str, Any], str, str, str], ...] = (
        ({"workspace": 1}, "fp32", "workspace", "--workspace"),
        ({"targets": ("sm75",)}, "fp32", "Turing", "leave sm75 out"),
        ({"targets": ("sm75",)}, "bf16", "sm75", "leave sm75 out"),
        ({"profiles": ()}, "fp32", "", ""),  # Polygraphy would make an engine of batch 1 without a word
        ({"optimization_level": -1}, "fp32", "setBuilderOptimizationLevel", "--debug"),
    )
    for options, precision, message, hint in cases:
        with pytest.raises(BuildError, match=f"TensorRT cannot build student.*{message}") as refused:
            build(rtx, folder, replace(quick, **options), precision, manifest=manifest)
        assert hint in refused.value.hint and "_src" not in refused.value.message
    with pytest.raises(BuildError, match="deconv") as refused:
        build(rtx, folder, quick, "bf16", "decoder", manifest)
    assert "no transposed convolution in bfloat16" in refused.value.hint
    assert build(rtx, folder, quick, manifest=manifest)[0].bytes > 0, "an error is of one build alone"


def test_what_tensorrt_cannot_read_is_a_build_error(
    toy_bundle: Any, rtx: TensorRT, quick: BuildOptions
) -> None:
    """Protects whoever has a graph with an operator that TensorRT lacks: its name, not a traceback."""
    folder = toy_bundle()
    path = folder / "student.onnx"
    model, size = onnx.load(path), path.stat().st_size
    model.graph.node[0].op_type = "NoSuch"  # as long as Gather
    onnx.save_model(model, path)
    assert path.stat().st_size == size
    with pytest.raises(BuildError, match=r"cannot build student\.onnx: In node 0 .* operator: NoSuch"):
        build(rtx, folder, quick)
    path.write_bytes(b"\xff" * size)
    with pytest.raises(BundleError, match=r"student\.onnx is no ONNX graph"):
        build(rtx, folder, quick)


def test_ctrl_c_stops_a_real_build(
    toy_bundle: Any,
    rtx: TensorRT,
    quick: BuildOptions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Protects whoever waits for a long build: the monitor's answer ends it, and the next one builds."""
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
        assert "stopping: " in caplog.text and "Finished engine building" not in caplog.text
        assert build(rtx, folder, quick)[0].bytes > 0 and "Finished engine building" in caplog.text
