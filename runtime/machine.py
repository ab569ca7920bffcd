"""What this machine has: packages, GPUs, driver, CPU. Torch-free; each is looked up once, when asked for."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Gpu:
    """A CUDA device. capability: as in (8, 9). memory: bytes in all."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def target(self) -> str:
        return f"sm{self.capability[0]}{self.capability[1]}"


class Cuda(NamedTuple):
    """What the CUDA driver says. version: the newest CUDA it supports. fault: why no GPU can be used."""

    gpus: tuple[Gpu, ...]
    version: tuple[int, int] | None
    fault: str


class Cpu(NamedTuple):
    """name: as the system gives it. cores: those that this process may use. flags: what it can do, in Linux's
    words; none where the system does not tell."""

    name: str
    cores: int
    flags: frozenset[str] = frozenset()


@lru_cache
def cuda() -> Cuda:
    """Asks the driver through cuda-bindings."""
    if fault := import_fault("cuda.bindings.runtime", "gpu"):
        return Cuda((), None, fault)
    runtime: Any = import_module("cuda.bindings.runtime")
    _, number = runtime.cudaDriverGetVersion()
    version = (number // 1000, number % 1000 // 10) if number else None
    error, count = runtime.cudaGetDeviceCount()
    if int(error):
        _, text = runtime.cudaGetErrorString(error)
        return Cuda((), version, f"no GPU can be used: {_text(text) if version else 'no NVIDIA driver'}")
    gpus = []
    for index in range(count):
        error, gpu = runtime.cudaGetDeviceProperties(index)
        if not int(error):
            gpus.append(Gpu(index, _text(gpu.name), (gpu.major, gpu.minor), gpu.totalGlobalMem))
    return Cuda(tuple(gpus), version, "" if gpus else "the driver knows no GPU")


def gpu_fault(index: int) -> str:
    """Why the GPU of this number cannot be used; "" if it can."""
    driver = cuda()
    if index < len(driver.gpus):
        return ""
    return driver.fault or f"there is no GPU {index}, but {len(driver.gpus)} in all"


@lru_cache
def cpu() -> Cpu:
    """Name, usable cores and flags of the CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    match = re.search(r"^model name\s*:\s*(.+)$", told, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", told, re.M)
    name = match[1].strip() if match else platform.processor() or platform.machine()
    return Cpu(name, cores, frozenset(flags[1].split() if flags else ()))


def this_platform() -> str:
    """Operating system and processor, as in `linux-x86_64`."""
    return f"{sys.platform}-{platform.machine().lower()}"


def import_fault(module: str, extra: str) -> str:
    """Why a module cannot be imported, and the line that installs it; "" if it can.

    extra: of this package, the one that brings the module.
    """
    install = f'pip install "ddexport[{extra}]"'
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return f"{module.partition('.')[0]} is not installed: {install}"
        return f"{module} is broken ({error}): {install} --force-reinstall"
    except Exception as error:  # ImportError of a library, and whatever else a broken package raises
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return f"{module} is broken ({said}): {install} --force-reinstall"
    return ""


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(value: Any) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else str(value)
