"""Time and memory of one call, where it computes: the wall clock on a CPU, CUDA events on a GPU."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # makes Linux set VmHWM back to the present size: man 5 proc, clear_refs

T = TypeVar("T")


class Memory(NamedTuple):
    """The most MiB in use: of the process, None where the system does not tell, and on the GPU, None without
    one."""

    host: float | None
    gpu: float | None


class Clock:
    """Of a CPU."""

    def measure(self, work: Callable[[], T]) -> tuple[T, float, Memory]:
        """What the work returns, its seconds and its memory."""
        reset_peak()
        began = time.perf_counter()
        result = work()
        return result, time.perf_counter() - began, Memory(peak_mib(), None)


class CudaClock(Clock):
    """Of a GPU: seconds between two events, the device idle before the first and waited for at the second.

    Its memory is what the device gave away in this process's calls, one at a time with those of other
    processes: PyTorch and ONNX Runtime keep what they have once taken.
    """

    def __init__(self, index: int, cuda: Any = None) -> None:
        """cuda: `torch.cuda`, or its like."""
        if cuda is None:
            import torch

            cuda = torch.cuda
        self._cuda, self._index, self._taken = cuda, index, 0
        cuda.set_device(index)

    def measure(self, work: Callable[[], T]) -> tuple[T, float, Memory]:
        self._cuda.synchronize()
        free, _ = self._cuda.mem_get_info(self._index)
        began, ended = (self._cuda.Event(enable_timing=True) for _ in range(2))
        reset_peak()
        began.record()
        result = work()
        self._cuda.synchronize()
        ended.record()
        ended.synchronize()
        self._taken += max(0, free - self._cuda.mem_get_info(self._index)[0])
        memory = Memory(peak_mib(), self._taken / (1 << 20))
        return result, began.elapsed_time(ended) / 1e3, memory


def clock_of(device: str) -> Clock:
    """Of `cpu` or `cuda:N`."""
    return Clock() if device == "cpu" else CudaClock(int(device.partition(":")[2] or 0))


def reset_peak(process: Path = PROCESS) -> None:
    """Starts counting memory anew, where the system can."""
    with suppress(OSError):
        (process / "clear_refs").write_text(RESET_PEAK)


def peak_mib(process: Path = PROCESS) -> float | None:
    """The most MiB of memory in use since the reset; None where the system does not tell."""
    try:
        line = re.search(r"^VmHWM:\s*(\d+) kB$", (process / "status").read_text(), re.M)
    except OSError:
        return None
    return int(line[1]) / 1024 if line else None
