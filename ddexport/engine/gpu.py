"""The GPU of this machine, if there is one, asked through cuda-bindings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device. `driver` is the highest CUDA version the driver supports, as `13.0`."""

    name: str
    capability: str
    memory: int
    driver: str


def find_gpu() -> Gpu | None:
    """The first CUDA device, or None without one, without a driver, or without cuda-bindings."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError:
        return None
    error, count = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess or not count:
        return None
    error, properties = cuda.cudaGetDeviceProperties(0)
    if error != cuda.cudaError_t.cudaSuccess:
        return None
    _, version = cuda.cudaDriverGetVersion()
    return Gpu(
        name=_text(properties.name),
        capability=f"sm{properties.major}{properties.minor}",
        memory=int(properties.totalGlobalMem),
        driver=f"{version // 1000}.{version % 1000 // 10}",
    )


def _text(name: Any) -> str:
    return (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).rstrip("\0")
