"""Engines on a real GPU: right at every batch size, recorded or not, and for long.

`run_all.sh` runs `validate parity` as well. The limits are for the precision itself; they were set before an
engine had run anywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddexport import runtime
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.doctor import diagnose
from ddexport.runtime.machine import version_of
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.pipeline import Pipeline

pytestmark = pytest.mark.gpu

MODELS = ("digits-var", "digits-llamagen")
PRECISIONS = ("fp32", "fp16", "bf16")
BATCHES = (1, 2, 3, 4, 7, 8, 19)
"""Below the smallest, the profile's ends, odd ones, and more than the largest."""
LOGITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Root mean square of the error, over that of the logits."""
IMAGE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1.5e-1}
"""Largest difference of a pixel in [0, 1], for the same sequence."""
MIB = 1 << 20

Bundles = Callable[[str], Path]


def feeds(pipe: Pipeline, batch: int, seed: int = 0) -> dict[str, Any]:
    """Noise, with data in the first positions of every other image, as in a second step."""
    sequence = pipe.manifest.sequence
    rng = np.random.default_rng(seed)
    known = max(schedule.known[-1] for schedule in pipe.manifest.schedules.values())
    return {
        "latents": gaussian_noise(seed, range(batch), sequence.length, sequence.width),
        "label": rng.integers(0, pipe.manifest.classes, batch),
        "known": np.where(np.arange(batch) % 2, known, 0).astype(np.int64),
    }


def run(pipe: Pipeline, role: str, given: dict[str, Any]) -> dict[str, Any]:
    """All outputs of a graph."""
    backend = pipe.backend
    return dict(backend.run(pipe.manifest.graph(role, backend.configuration.graphs), given))


def assert_close(have: dict[str, Any], want: dict[str, Any], precision: str) -> None:
    """Logits near; the same token wherever the choice is clear; regressed embeddings near."""
    error = np.sqrt(np.mean((have["logits"] - want["logits"]) ** 2))
    scale = np.sqrt(np.mean(want["logits"] ** 2))
    assert error <= LOGITS[precision] * scale, f"logits differ by {error / scale:.2e}"
    best = np.sort(want["logits"], axis=-1)
    clear = best[..., -1] - best[..., -2] > 20 * LOGITS[precision] * scale
    same = have["logits"].argmax(-1) == want["logits"].argmax(-1)
    assert same[clear].all()
    assert same.mean() > (0.999 if precision == "fp32" else 0.9)


@pytest.mark.parametrize("model", MODELS)
def test_the_engine_gives_what_the_graph_gives(gpu_bundle: Bundles, model: str) -> None:
    """As ONNX Runtime on the CPU in float32, in every batch size; the first run of a size is plain,
    later ones replay its recording."""
    path = gpu_bundle(model)
    assert set(read_manifest(path).precisions) == set(PRECISIONS)
    for precision in PRECISIONS:
        with (
            runtime.load(path, "tensorrt", precision=precision) as engines,
            runtime.load(path, "onnxruntime", precision="fp32", device="cpu") as cpu,
        ):
            for batch in BATCHES:
                given = feeds(cpu, batch, seed=batch)
                want = run(cpu, "student", given)
                picture = {"sequence": want["sequence"]}
                image = run(cpu, "decoder", picture)["image"]
                for _ in range(3):
                    assert_close(run(engines, "student", given), want, precision)
                    assert abs(run(engines, "decoder", picture)["image"] - image).max() <= IMAGE[precision]


def test_memory_does_not_grow_and_is_given_back(gpu_bundle: Bundles) -> None:
    """100,000 images need no more than a thousand, in every batch size that a request can have, on the device
    and on the host."""
    with runtime.load(gpu_bundle("digits-var"), "tensorrt", precision="fp16") as pipe:

        def draw(count: int) -> None:
            for _ in pipe.stream(range(10), num_images=count // 10, batch_size=61, output="numpy"):
                pass

        draw(1_000)
        device, host = free_memory(), resident()
        draw(100_000)
        assert device - free_memory() < 16 * MIB
        assert resident() - host < 64 * MIB

    def once() -> None:
        with runtime.load(gpu_bundle("digits-var"), "tensorrt", precision="fp16") as pipe:
            pipe([0, 1, 2], output="numpy")

    for _ in range(3):
        once()  # what the packages keep for themselves
    before = free_memory()
    for _ in range(20):
        once()
    assert before - free_memory() < 16 * MIB


def test_auto_and_doctor_agree(gpu_bundle: Bundles) -> None:
    """The half-precision engines, since they were built for this machine, without a word on them."""
    bundle = diagnose(gpu_bundle("digits-var"))["bundle"]
    (first, *_) = bundle["configurations"]
    if not first["name"].startswith("tensorrt"):
        pytest.skip("auto leaves alone what NVIDIA does not promise")
    assert first["runs"] and not first["reason"] and not bundle["damaged"]
    assert bundle["auto"] == first["name"] and first["name"].startswith("tensorrt, cuda:0, fp16")
    with runtime.load(gpu_bundle("digits-var")) as pipe:
        assert (pipe.backend.name, pipe.precision) == ("tensorrt", "fp16")


@pytest.mark.parametrize("model", MODELS)
def test_onnxruntime_on_the_gpu(graph_bundle: Bundles, model: str) -> None:
    """The CUDA provider, with arrays bound to the device."""
    path = graph_bundle(model)
    if not version_of("onnxruntime-gpu"):
        pytest.skip("onnxruntime-gpu is not installed; tests/gpu/run_all.sh installs it")
    for precision in ("fp32", "fp16"):
        with (
            runtime.load(path, "onnxruntime", precision=precision, device="cuda") as gpu,
            runtime.load(path, "onnxruntime", precision="fp32", device="cpu") as cpu,
        ):
            for batch in (1, 3, 8, 3):
                given = feeds(cpu, batch, seed=batch)
                want = run(cpu, "student", given)
                assert_close(run(gpu, "student", given), want, precision)
                picture = {"sequence": want["sequence"]}
                image = run(cpu, "decoder", picture)["image"]
                assert abs(run(gpu, "decoder", picture)["image"] - image).max() <= IMAGE[precision]


def free_memory() -> int:
    cuda: Any = importlib.import_module("cuda.bindings.runtime")
    error, free, _ = cuda.cudaMemGetInfo()
    assert not int(error)
    return int(free)


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
