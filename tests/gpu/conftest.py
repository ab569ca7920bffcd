"""Bundles with engines for the GPU of this machine, made once a session; without a GPU everything skips."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ddexport.runtime.fit import RTX_TARGETS
from ddexport.runtime.machine import Machine

HOW = "on a machine with an NVIDIA GPU, run: tests/gpu/run_all.sh"
PREPARED = "DDEXPORT_GPU_BUNDLES"
"""A folder of bundles with engines, to be used in place of new ones: `<folder>/<model>`."""
BACKEND = "DDEXPORT_GPU_BACKEND"
MODELS = ("digits-var", "digits-llamagen")
PRECISIONS = ("fp32", "fp16", "bf16")
PROFILE = (2, 4, 8)


@pytest.fixture(scope="session")
def gpu_machine() -> Machine:
    """This machine, if it has a GPU that can be used."""
    machine = Machine()
    if machine.cuda_problem:
        pytest.skip(f"{machine.cuda_problem}; {HOW}")
    return machine


@pytest.fixture(scope="session")
def engine_backend(gpu_machine: Machine) -> str:
    """The package to build with: TensorRT-RTX where it has engines for this GPU, else full TensorRT.

    The environment may name one, to try what NVIDIA does not promise.
    """
    if named := os.environ.get(BACKEND):
        return named
    rtx = gpu_machine.engine_packages["tensorrt-rtx"]
    if not rtx.problem and gpu_machine.gpus[0].capability in RTX_TARGETS:
        return "tensorrt-rtx"
    if problem := gpu_machine.engine_packages["tensorrt"].problem:
        pytest.skip(f"TensorRT-RTX has no engines for {gpu_machine.gpus[0].name}, and {problem}; {HOW}")
    return "tensorrt"


@pytest.fixture(scope="session")
def graph_bundle(gpu_machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
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


def ddexport(*arguments: object) -> str:
    """Runs the command; its stdout."""
    code = "import sys; from ddexport.cli import main; sys.argv[0] = 'ddexport'; sys.exit(main())"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}"
    return done.stdout
