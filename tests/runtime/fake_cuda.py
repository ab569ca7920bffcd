"""`cuda.bindings.runtime` made of plain memory, as far as the runtime uses it.

Work is queued and done when somebody waits, as on a real device, so that reading too early gives garbage.
What a real device leaves undefined is an error here: copies outside of an allocation, freeing twice, waiting
while recording.
"""

# ruff: noqa: N815, N818 - the names are those of the package

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

POISON = 0xAB
Work = Callable[[], object]


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class Fault(Exception):
    """An error of queued work, which shows when somebody waits."""


class FakeCuda(ModuleType):
    """`cuda.bindings.runtime`: every function returns a tuple that begins with an error."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=("device", "host"),
        cudaMemcpyDeviceToHost=("host", "device"),
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory: dict[int, tuple[str, np.ndarray]] = {}
        self.streams: dict[int, list[Work]] = {}
        self.recording: list[Work] | None = None
        self.recording_broken = False
        self.graphs: dict[int, list[Work]] = {}
        self.calls: Counter[str] = Counter()
        self.downloaded: list[int] = []
        self.fails: dict[str, tuple[int, Error]] = {}
        self._next = 1
        self.cudaMalloc = partial(self._allocate, "cudaMalloc", "device")
        self.cudaMallocHost = partial(self._allocate, "cudaMallocHost", "host")
        self.cudaFree = partial(self._free, "cudaFree", "device")
        self.cudaFreeHost = partial(self._free, "cudaFreeHost", "host")
        self.cudaGraphDestroy = partial(self._forget, "cudaGraphDestroy")
        self.cudaGraphExecDestroy = partial(self._forget, "cudaGraphExecDestroy")

    def fail(self, name: str, error: Error, after: int = 0) -> None:
        """Makes the call `name` fail, once `after` calls have succeeded, from then on."""
        self.fails[name] = (self.calls[name] + after, error)

    @property
    def left_behind(self) -> list[str]:
        kinds = [kind for kind, _ in self.memory.values()]
        return kinds + ["stream"] * len(self.streams) + ["graph"] * len(self.graphs)

    def allocated(self, kind: str) -> int:
        return sum(len(block) for what, block in self.memory.values() if what == kind)

    def push(self, stream: int, work: Work) -> None:
        """Queues work, or records it."""
        assert stream in self.streams, "work on a stream that does not exist"
        (self.streams[stream] if self.recording is None else self.recording).append(work)

    def block(self, address: int, size: int, kind: str) -> np.ndarray | None:
        """The memory at an address, if an allocation of the kind holds all of it."""
        for start, (what, block) in self.memory.items():
            if what == kind and start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        return None

    def _answer(self, name: str, *values: Any) -> Any:
        self.calls[name] += 1
        if name in self.fails and self.calls[name] > self.fails[name][0]:
            return (self.fails[name][1], *(None for _ in values))
        return (Error.cudaSuccess, *values)

    def _made(self, name: str, where: dict[int, Any], content: Any, key: int = 0) -> Any:
        self._next += 1
        answer = self._answer(name, key or self._next)
        if not answer[0]:
            where[answer[1]] = content
        return answer

    def _allocate(self, name: str, kind: str, size: int) -> Any:
        block = np.full(size, POISON, np.uint8)
        return self._made(name, self.memory, (kind, block), block.ctypes.data)

    def _free(self, name: str, kind: str, address: int) -> Any:
        assert self.memory.pop(address)[0] == kind
        return self._answer(name)

    def cudaGetErrorName(self, error: Error) -> Any:
        return Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: Error) -> Any:
        return Error.cudaSuccess, f"the fake says {error.value}".encode()

    def cudaGetLastError(self) -> Any:
        return (Error.cudaSuccess,)

    def cudaSetDevice(self, index: int) -> Any:
        return self._answer("cudaSetDevice") if index == 0 else (Error.cudaErrorInvalidDevice,)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return self._made("cudaStreamCreateWithFlags", self.streams, [])

    def cudaStreamDestroy(self, stream: int) -> Any:
        del self.streams[stream]
        return self._answer("cudaStreamDestroy")

    def cudaStreamSynchronize(self, stream: int) -> Any:
        if self.recording is not None:
            self.recording_broken = True
            return (Error.cudaErrorStreamCaptureUnsupported,)
        queue, self.streams[stream][:] = list(self.streams[stream]), []
        try:
            for work in queue:
                work()
        except Fault:
            return (Error.cudaErrorIllegalAddress,)
        return self._answer("cudaStreamSynchronize")

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kinds: Any, stream: int) -> Any:
        target, origin = self.block(to, size, kinds[0]), self.block(source, size, kinds[1])
        answer = self._answer("cudaMemcpyAsync")
        if target is None or origin is None:
            return (Error.cudaErrorInvalidValue,)
        if not answer[0]:
            self.push(stream, lambda: np.copyto(target, origin))
            self.downloaded += [size] if kinds[0] == "host" else []
        return answer

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        answer = self._answer("cudaStreamBeginCapture")
        if not answer[0]:
            self.recording, self.recording_broken = [], False
        return answer

    def cudaStreamEndCapture(self, stream: int) -> Any:
        work, self.recording = self.recording, None
        if self.recording_broken:
            return Error.cudaErrorStreamCaptureUnsupported, None
        return self._made("cudaStreamEndCapture", self.graphs, work)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        return self._made("cudaGraphInstantiate", self.graphs, self.graphs[graph])

    def _forget(self, name: str, graph: int) -> Any:
        del self.graphs[graph]
        return self._answer(name)

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        answer = self._answer("cudaGraphLaunch")
        if not answer[0]:
            self.streams[stream] += self.graphs[graph]
        return answer
