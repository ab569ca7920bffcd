"""The TensorRT package to build with, and Polygraphy set to it: Polygraphy takes one package a process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ddexport.runtime import machine
from ddexport.runtime.engines import MODULES
from ddexport.runtime.errors import DDError
from ddexport.runtime.machine import Gpu

SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # read when Polygraphy is imported, and never again


class ModuleError(DDError):
    """A package that a build needs and cannot have: not installed, not complete, not in this process."""


@dataclass(frozen=True)
class TensorRT:
    """An imported package: `module` is `tensorrt` or `tensorrt_rtx`, `version` its full version.

    `gpu` is the GPU of this machine. Full TensorRT builds for it; TensorRT-RTX can do without.
    """

    backend: str
    module: Any
    version: str
    gpu: Gpu | None

    @property
    def is_rtx(self) -> bool:
        return self.backend == "tensorrt-rtx"

    def __str__(self) -> str:
        return f"{self.backend} {self.version}"


def load_tensorrt(backend: str = "auto") -> TensorRT:
    """Imports the package of a backend, and Polygraphy set to it.

    `auto` is full TensorRT where it is complete and there is a GPU, else TensorRT-RTX.
    Raises `ModuleError`, with the command that installs what is missing.
    """
    gpu = next(iter(machine.cuda().gpus), None)
    if backend == "auto":
        complete = gpu and not machine.import_fault("tensorrt", "tensorrt")
        backend = "tensorrt" if complete else "tensorrt-rtx"
    is_rtx = backend == "tensorrt-rtx"
    os.environ[SWITCH] = str(int(is_rtx))
    for name in (MODULES[backend], "polygraphy", "onnx", "filelock"):
        if fault := machine.import_fault(name, backend):
            hint = "TensorRT-RTX builds for GeForce and RTX cards, full TensorRT for data-centre GPUs"
            raise ModuleError(f"{backend} cannot build here: {fault}", hint)
    if is_rtx != import_module("polygraphy.config").USE_TENSORRT_RTX:
        raise ModuleError(
            f"this process already uses the other TensorRT package, so it cannot use {backend}",
            "Polygraphy supports one of them per process: use another process for the other",
        )
    module = import_module(MODULES[backend])
    if not hasattr(module, "Builder"):  # a folder of that name
        raise ModuleError(f"{MODULES[backend]} is not TensorRT: it has no Builder", f"see {module.__path__}")
    return TensorRT(backend, module, module.__version__, gpu)
