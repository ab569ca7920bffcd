"""Bundles with engines for the GPU of this machine, made once a session; without a GPU everything skips."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ddexport.runtime import machine
from ddexport.runtime.engines import MODULES, RTX_CAPABILITIES
from ddexport.runtime.machine import Gpu, import_fault

HOW = "on a machine with an NVIDIA GPU, run: tests/gpu/run_all.sh"
PREPARED = "DDEXPORT_GPU_BUNDLES"
"""A folder of bundles with engines, to be used in place of new ones: `<folder>/<model>`."""
BACKEND = "DDEXPORT_GPU_BACKEND"
PRECISIONS = ("fp32", "fp16", "bf16")
PROFILE = (2, 4, 8)


@pytest.fixture(scope="session")
def real_gpu() -> Gpu:
    """The GPU of this machine, if it can be used."""
    if fault := machine.gpu_fault(0):
        pytest.skip(f"{fault}; {HOW}")
    return machine.cuda().gpus[0]


@pytest.fixture(scope="session")
def engine_backend(real_gpu: Gpu) -> str:
    """The package to build with: TensorRT-RTX where it has engines for this GPU, else full TensorRT.

    The environment may name one, to try what NVIDIA does not promise.
    """
    if named := os.environ.get(BACKEND):
        return named
    if real_gpu.capability in RTX_CAPABILITIES and not import_fault(MODULES["tensorrt-rtx"], "tensorrt-rtx"):
        return "tensorrt-rtx"
    if fault := import_fault(MODULES["tensorrt"], "tensorrt"):
        pytest.skip(f"TensorRT-RTX has no engines for {real_gpu.name}, and {fault}; {HOW}")
    return "tensorrt"


@pytest.fixture(scope="session")
def graph_bundle(real_gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of a model, with graphs in every precision."""
    folder = tmp_path_factory.mktemp("gpu")

    def bundle(model: str) -> Path:
        if prepared := os.environ.get(PREPARED):
            return Path(prepared) / model
        target = folder / model
        if not target.exists():
            ddexport("onnx", "--model", model, "--precision", ",".join(PRECISIONS), "-o", target)
        return target

    return bundle


@pytest.fixture(scope="session")
def gpu_bundle(engine_backend: str, graph_bundle: Callable[[str], Path]) -> Callable[[str], Path]:
    """The same with engines in every precision, whose smallest batch is more than one."""
    made: dict[str, Path] = {}

    def bundle(model: str) -> Path:
        if PREPARED in os.environ:
            return graph_bundle(model)
        if model not in made:
            target = graph_bundle(model)
            precisions = ",".join(PRECISIONS)
            batch = ",".join(map(str, PROFILE))
            options = ("--backend", engine_backend, "--precision", precisions, "--batch", batch)
            ddexport("trt", target, *options)
            made[model] = target
        return made[model]

    return bundle


def ddexport(*arguments: object) -> None:
    """Runs the command."""
    code = "import sys; from ddexport.cli import main; sys.argv[0] = 'ddexport'; sys.exit(main())"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}"
