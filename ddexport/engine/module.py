"""The TensorRT packages: which are here, which one to build with, and how to get one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddexport.runtime import machine
from ddexport.runtime.engines import BACKENDS, MODULES
from ddexport.runtime.errors import DDError
from ddexport.runtime.machine import Gpu

INSTALL: Mapping[str, str] = {
    "tensorrt": 'pip install "ddexport[tensorrt]"',
    "tensorrt-rtx": 'pip install "ddexport[tensorrt-rtx]"',
}
LIBRARIES: Mapping[str, str] = {
    "tensorrt": "its libraries are a package of their own: pip install tensorrt-cu13-libs (or -cu12-libs, as"
    " the CUDA version is), or put their folder on LD_LIBRARY_PATH",
    "tensorrt-rtx": "its libraries are a package of their own: pip install --force-reinstall tensorrt-rtx"
    " (tensorrt-rtx-cu13-libs is the part that is missing)",
}


class ModuleError(DDError):
    """A TensorRT package that is not installed, or not completely."""


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
    """Imports the package of a backend, or of the first that can build here.

    `auto` is full TensorRT where it is complete and there is a GPU, else TensorRT-RTX.
    Raises `ModuleError`, with the command that installs what is missing.
    """
    gpu = next(iter(machine.cuda().gpus), None)
    if backend != "auto":
        return _load(backend, gpu)
    reasons: list[str] = []
    for candidate in BACKENDS:
        if candidate == "tensorrt" and gpu is None:
            reasons.append("tensorrt builds on the GPU it builds for, and there is none here")
            continue
        try:
            return _load(candidate, gpu)
        except ModuleError as error:
            reasons.append(error.message)
    raise ModuleError(
        f"no TensorRT package can build here: {'; '.join(reasons)}",
        f"without a GPU, or for a GeForce or RTX card: {INSTALL['tensorrt-rtx']};"
        f" for a data-centre GPU: {INSTALL['tensorrt']}",
    )


def _load(backend: str, gpu: Gpu | None) -> TensorRT:
    name = MODULES[backend]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise ModuleError(f"the package {name} is not installed", INSTALL[backend]) from error
        raise ModuleError(
            f"the package {name} is not complete: {error}", f"install all of it: {INSTALL[backend]}"
        ) from error
    except (ImportError, OSError) as error:  # OSError: Windows looks for the libraries itself
        raise ModuleError(f"the package {name} lacks its libraries: {error}", LIBRARIES[backend]) from error
    version = getattr(module, "__version__", None)
    if not isinstance(version, str) or not hasattr(module, "Builder"):
        raise ModuleError(f"{name} is no TensorRT: it has no Builder", f"install it: {INSTALL[backend]}")
    return TensorRT(backend, module, version, gpu)
