"""What this machine has: packages, GPUs, driver, features of the CPU. Torch-free, and cheap until asked."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddexport.runtime.engines import this_platform

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL = {
    "tensorrt": "pip install tensorrt cuda-bindings",
    "tensorrt-rtx": "pip install tensorrt-rtx cuda-bindings",
    "cuda-bindings": "pip install cuda-bindings",
    "onnxruntime": "pip install onnxruntime",
    "openvino": "pip install openvino",
}
GPU_RUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "avx512_fp16": "FP16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "amx_fp16": "AMX-FP16",
    "asimddp": "DOTPROD",
    "i8mm": "I8MM",
    "bf16": "BF16",
}
"""What /proc/cpuinfo calls what matters to inference, and what people call it."""


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


@dataclass(frozen=True)
class Package:
    """A Python package: its version, and what is wrong with it (also that it is missing), if anything."""

    name: str
    version: str | None
    problem: str | None
    missing: bool = False


@dataclass(frozen=True)
class Cpu:
    """name: as the system gives it. cores: those this process may use. features: see `CPU_FEATURES`; None
    where the system does not tell."""

    name: str
    cores: int
    features: tuple[str, ...] | None


@dataclass(frozen=True)
class Cuda:
    """What the CUDA driver says. problem: why it cannot be used. cuda: the newest CUDA it supports."""

    gpus: tuple[Gpu, ...]
    cuda: tuple[int, int] | None
    problem: str | None


class Machine:
    """Facts about the machine, each looked up when it is first asked for.

    `Machine(gpus=..., ...)` takes the named facts as given: to judge a bundle for another machine.
    """

    def __init__(self, **known: Any) -> None:
        unknown = [name for name in known if not isinstance(getattr(type(self), name, None), cached_property)]
        if unknown:
            raise TypeError(f"a machine has no {', '.join(unknown)}")
        self.__dict__.update(known)  # where cached_property keeps what it has looked up
        self._packages: dict[str, Package] = {}

    @cached_property
    def platform(self) -> str:
        return this_platform()

    @cached_property
    def cpu(self) -> Cpu:
        return read_cpu()

    @cached_property
    def _cuda(self) -> Cuda:
        return ask_cuda()

    @cached_property
    def gpus(self) -> tuple[Gpu, ...]:
        return self._cuda.gpus

    @cached_property
    def cuda(self) -> tuple[int, int] | None:
        """The newest CUDA version that the driver supports; None without a driver."""
        return self._cuda.cuda

    @cached_property
    def cuda_problem(self) -> str | None:
        """Why no GPU can be used; None if one can."""
        return self._cuda.problem

    @cached_property
    def driver(self) -> str | None:
        """The version of NVIDIA's driver, as in 580.95.05."""
        return driver_version()

    @cached_property
    def onnxruntime(self) -> Package:
        return package("onnxruntime", "onnxruntime")

    @cached_property
    def providers(self) -> tuple[str, ...]:
        """The execution providers of the installed ONNX Runtime; importing it takes a while."""
        if self.onnxruntime.problem:
            return ()
        return tuple(importlib.import_module("onnxruntime").get_available_providers())

    @cached_property
    def openvino(self) -> Package:
        found = package("openvino", "openvino")
        # Its own text goes on with the build and the branch.
        return replace(found, version=found.version and found.version.partition("-")[0])

    @cached_property
    def openvino_capabilities(self) -> tuple[str, ...]:
        """What OpenVINO says it can do on this CPU, as in `FP32`, `BF16`, `INT8`."""
        if self.openvino.problem:
            return ()
        try:
            core = importlib.import_module("openvino").Core()
            return tuple(map(str, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
        except RuntimeError:  # an OpenVINO without its part for CPUs
            return ()

    @cached_property
    def distributions(self) -> dict[str, str]:
        """Versions of the installed distributions, by their names in lower case with hyphens."""
        return installed()

    @cached_property
    def engine_packages(self) -> dict[str, Package]:
        """The packages that run engines, tried to see whether they work."""
        return {name: engine_package(name) for name in MODULES}

    @cached_property
    def bindings(self) -> Package:
        """cuda-bindings, with which engines are run."""
        return package("cuda-bindings", "cuda.bindings.runtime")

    def package_cuda(self, backend: str) -> int | None:
        """The major CUDA version that a package for engines was made for, by the names of its parts."""
        pattern = re.compile(rf"{re.escape(backend)}-cu(\d+)(-|$)")
        found = [int(match[1]) for name in self.distributions if (match := pattern.match(name))]
        return max(found, default=None)

    def cuda_troubles(self, backend: str) -> list[str]:
        """What does not go together: the package for engines, cuda-bindings, the driver."""
        made_for, troubles = self.package_cuda(backend), []
        if made_for is None:
            return []
        bindings = re.match(r"\d+", self.bindings.version or "")
        if bindings and int(bindings[0]) != made_for:
            troubles.append(
                f"{backend} is made for CUDA {made_for}, and cuda-bindings for CUDA {bindings[0]}:"
                f" pip install 'cuda-bindings=={made_for}.*'"
            )
        if self.cuda and self.cuda[0] < made_for:
            troubles.append(
                f"{backend} is made for CUDA {made_for}, and the driver supports CUDA"
                f" {self.cuda[0]}.{self.cuda[1]}: install a newer driver"
            )
        return troubles

    @property
    def both_onnxruntimes(self) -> str | None:
        """What is wrong if the two distributions that share one module name are both installed."""
        if not {"onnxruntime", "onnxruntime-gpu"} <= set(self.distributions):
            return None
        return (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            + GPU_RUNTIME
        )


def package(name: str, module: str) -> Package:
    """The package `name`, after its module has been imported."""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not (module == error.name or module.startswith(f"{error.name}.")):
            return Package(name, installed().get(name), f"{name} is broken: {_line(error)}; {_again(name)}")
        return Package(name, None, f"{name} is not installed: {INSTALL[name]}", missing=True)
    except Exception as error:  # ImportError of a library, and whatever else a broken package raises
        return Package(name, installed().get(name), f"{name} is broken: {_line(error)}; {_again(name)}")
    version = getattr(imported, "__version__", None) or installed().get(name)
    return Package(name, version, None)


def engine_package(name: str) -> Package:
    """A package that runs engines. The two register types of the same names, so that one process should not
    import both: where both are there, each is tried in a process of its own."""
    module = MODULES[name]
    if module in sys.modules or not all(map(_is_there, MODULES.values())):
        return package(name, module)
    words = [sys.executable, "-c", f"import {module}; print({module}.__version__)"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return Package(name, None, f"{name} is broken: {_line(error)}; {_again(name)}")
    if done.returncode == 0:
        return Package(name, done.stdout.strip(), None)
    said = done.stderr.strip().splitlines() or [f"its import ends with {done.returncode}"]
    return Package(name, installed().get(name), f"{name} is broken: {said[-1][:200]}; {_again(name)}")


def _is_there(module: str) -> bool:
    try:
        return module in sys.modules or find_spec(module) is not None
    except ImportError:  # of a finder that somebody has installed
        return False


def installed() -> dict[str, str]:
    """Versions of the installed distributions, by their names in lower case with hyphens."""
    found: dict[str, str] = {}
    for each in metadata.distributions():
        name = each.metadata["Name"] if each.metadata else None
        if name:  # a half-removed one has none
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), each.version)
    return found


def ask_cuda() -> Cuda:
    """Asks the driver through cuda-bindings, or nvidia-smi where these are missing."""
    bindings = package("cuda-bindings", "cuda.bindings.runtime")
    if bindings.problem:
        return Cuda(ask_nvidia_smi(), None, bindings.problem)
    runtime: Any = importlib.import_module("cuda.bindings.runtime")
    _, version = runtime.cudaDriverGetVersion()
    cuda = (version // 1000, version % 1000 // 10) if version else None
    error, count = runtime.cudaGetDeviceCount()
    if int(error):
        _, name = runtime.cudaGetErrorName(error)
        _, text = runtime.cudaGetErrorString(error)
        what = "no NVIDIA driver is loaded" if cuda is None else _text(text)
        return Cuda((), cuda, f"no GPU can be used: {what} (cudaGetDeviceCount: {_text(name)})")
    gpus = []
    for index in range(count):
        error, properties = runtime.cudaGetDeviceProperties(index)
        if not int(error):
            capability = (properties.major, properties.minor)
            gpus.append(Gpu(index, _text(properties.name), capability, properties.totalGlobalMem))
    return Cuda(tuple(gpus), cuda, None if gpus else "the driver knows no GPU")


def ask_nvidia_smi() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none where it is missing."""
    query = ["nvidia-smi", "--query-gpu=index,name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in done.stdout.splitlines():
        match = re.fullmatch(r"\s*(\d+),\s*(.+),\s*(\d+)\.(\d+),\s*(\d+)\s*", line)
        if match:
            index, name, major, minor, memory = match.groups()
            gpus.append(Gpu(int(index), name, (int(major), int(minor)), int(memory) << 20))
    return tuple(gpus)


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's kernel driver, where the system tells."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", path.read_text())
    except OSError:
        return None
    return match[1] if match else None


def read_cpu(path: Path = Path("/proc/cpuinfo")) -> Cpu:
    """Name, usable cores and features of the CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name, features = platform.processor() or platform.machine(), None
    try:
        text = path.read_text()
    except OSError:
        return Cpu(name, cores, features)
    if found := re.search(r"^model name\s*:\s*(.+)$", text, re.M):
        name = found[1].strip()
    if found := re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M):
        flags = set(found[1].split())
        features = tuple(dict.fromkeys(shown for flag, shown in CPU_FEATURES.items() if flag in flags))
    return Cpu(name, cores, features)


def _again(name: str) -> str:
    return f"reinstall it: {INSTALL[name].replace('pip install', 'pip install --force-reinstall')}"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _text(value: Any) -> str:
    return value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) else str(value)
