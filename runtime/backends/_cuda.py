"""A thin layer over cuda-bindings: every call is checked, and everything it gives can be freed again."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ddexport.runtime.errors import BackendError
from numpy.typing import NDArray

MODULE = "cuda.bindings.runtime"
OUT_OF_MEMORY = "cudaErrorMemoryAllocation"


class CudaError(BackendError):
    """A call of the CUDA runtime that failed. `code` is CUDA's name for the error."""

    def __init__(self, message: str, hint: str, code: str) -> None:
        super().__init__(message, hint)
        self.code = code


class CudaDevice:
    """One GPU. Addresses are plain integers; sizes are bytes.

    Nothing is freed by itself: whoever allocates also frees. Raises CudaError, with the name of the call.
    """

    def __init__(self, index: int) -> None:
        self._cuda: Any = importlib.import_module(MODULE)
        self.index = index
        self.use()

    def use(self) -> None:
        """Makes this the device of the calling thread, which CUDA keeps for each thread."""
        self._call("cudaSetDevice", self.index)

    def allocate(self, size: int) -> int:
        """Memory of the device."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> int:
        """Page-locked memory of the host, from which copies run beside the computation."""
        return int(self._call("cudaMallocHost", size))

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def new_stream(self) -> int:
        """A queue of work that does not wait for the default stream."""
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def free_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        """Until all work of the stream is done; the errors of that work appear here."""
        self._call("cudaStreamSynchronize", stream)

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size, kind, stream)

    def download(self, host: int, device: int, size: int, stream: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size, kind, stream)

    def record(self, work: Callable[[], None], stream: int) -> Any:
        """What `work` puts on the stream, as a graph to `replay`; nothing is computed yet.

        Whatever fails, the stream is usable afterwards.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            self._abandon(stream)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def replay(self, graph: Any, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def free_memory(self) -> int:
        """How much memory of the device nobody uses."""
        free, _ = self._call("cudaMemGetInfo")
        return int(free)

    def _abandon(self, stream: int) -> None:
        error, graph = self._cuda.cudaStreamEndCapture(stream)  # fails as well: the capture was broken
        if not int(error) and graph is not None:
            self._cuda.cudaGraphDestroy(graph)
        self._cuda.cudaGetLastError()  # else the next call would report what is over

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, name)(*arguments)
        if int(error):
            self._cuda.cudaGetLastError()
            _, code = self._cuda.cudaGetErrorName(error)
            _, text = self._cuda.cudaGetErrorString(error)
            raise CudaError(f"{name} failed: {_text(text)} ({_text(code)})", _hint(_text(code)), _text(code))
        return values[0] if len(values) == 1 else tuple(values)


def host_view(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes at an address of the host as an array, which must not outlive them."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _hint(code: str) -> str:
    if code == OUT_OF_MEMORY:
        return "Free memory of the GPU, or build the engines for smaller batches."
    return "`ddexport doctor` says what this machine has."
