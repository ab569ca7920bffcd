"""A thin layer over cuda-bindings: every call is checked, and everything it gives can be freed again."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.errors import BackendError

MODULE = "cuda.bindings.runtime"


class CudaDevice:
    """One GPU. Addresses are plain integers; sizes are bytes.

    Whoever allocates also frees. Raises BackendError, with the name of the call and CUDA's name of the error.
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

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copies `rows` rows of `width` bytes within the device, and waits until that is done.

        A pitch is the distance in bytes from the start of one row to that of the next.
        """
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2D", target, target_pitch, source, source_pitch, width, rows, kind)
        self._call("cudaDeviceSynchronize")

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, name)(*arguments)
        if int(error):
            self._cuda.cudaGetLastError()
            code, text = (
                value.decode(errors="replace") if isinstance(value, bytes) else str(value)
                for value in (self._cuda.cudaGetErrorName(error)[1], self._cuda.cudaGetErrorString(error)[1])
            )
            hint = "`ddexport doctor` says what this machine has."
            if code == "cudaErrorMemoryAllocation":
                hint = "Free memory of the GPU, or build the engines for smaller batches."
            raise BackendError(f"{name} failed: {text} ({code})", hint)
        return values[0] if values else None


class CudaStream(CudaDevice):
    """A GPU with a queue of work on it, `stream`, that does not wait for the default stream."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.stream = int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def close(self) -> None:
        self._call("cudaStreamDestroy", self.stream)

    def wait(self) -> None:
        """Until all work is done; the errors of that work appear here."""
        self._call("cudaStreamSynchronize", self.stream)

    def upload(self, device: int, host: int, size: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size, kind, self.stream)

    def download(self, host: int, device: int, size: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size, kind, self.stream)

    def record(self, work: Callable[[], None]) -> Any:
        """What `work` puts on the stream, as a graph to `replay`; nothing is computed yet.

        Whatever fails, the stream is usable afterwards.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            error, graph = self._cuda.cudaStreamEndCapture(self.stream)  # fails too: the capture was broken
            if not int(error) and graph is not None:
                self._cuda.cudaGraphDestroy(graph)
            self._cuda.cudaGetLastError()  # else the next call would report what is over
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def replay(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def free_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)


def host_view(address: int, size: int) -> NDArray[np.uint8]:
    """The bytes at an address of the host as an array, which must not outlive them."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
