"""A GPU made of plain memory: `cuda.bindings.runtime`, and the TensorRT packages, as far as the runtime uses
them, computing with ONNX Runtime on the CPU.

Work is queued and done when somebody waits, as on a real device, so that reading too early gives garbage.
What a real device leaves undefined is an error here: copies outside of an allocation, replaying a graph whose
context has changed, recording a context that was never run, freeing twice.
"""

# ruff: noqa: N805, N815, N818 - the names are those of the packages

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

POISON = 0xAB
SCRATCH = 4096
Work = Callable[[], None]


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class Fault(Exception):
    """An error of queued work, which shows when somebody waits."""


class FakeCuda(ModuleType):
    """`cuda.bindings.runtime`: every function returns a tuple that begins with an error."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    __version__ = "13.5.0"

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.memory: dict[int, tuple[str, np.ndarray]] = {}
        self.streams: dict[int, list[Work]] = {}
        self.recording: list[Work] | None = None
        self.recording_broken = False
        self.graphs: dict[int, list[Work]] = {}
        self.calls: Counter[str] = Counter()
        self.fails: dict[str, tuple[int, Error]] = {}
        self.driver = 13000
        self.devices = [SimpleNamespace(name=b"Toy GPU\0\0", major=8, minor=9, totalGlobalMem=24 << 30)]
        self._next = 1

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

    def _allocate(self, name: str, kind: str, size: int) -> Any:
        block = np.full(size, POISON, np.uint8)
        answer = self._answer(name, block.ctypes.data)
        if not answer[0]:
            self.memory[answer[1]] = (kind, block)
        return answer

    def _free(self, name: str, kind: str, address: int) -> Any:
        assert self.memory.pop(address)[0] == kind
        return self._answer(name)

    def cudaGetErrorName(self, error: Error) -> Any:
        return Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: Error) -> Any:
        return Error.cudaSuccess, f"the fake says {error.value}".encode()

    def cudaGetLastError(self) -> Any:
        return (Error.cudaSuccess,)

    def cudaDriverGetVersion(self) -> Any:
        return Error.cudaSuccess, self.driver

    def cudaGetDeviceCount(self) -> Any:
        return self._answer("cudaGetDeviceCount", len(self.devices))

    def cudaGetDeviceProperties(self, index: int) -> Any:
        return Error.cudaSuccess, self.devices[index]

    def cudaSetDevice(self, index: int) -> Any:
        return self._answer("cudaSetDevice")

    def cudaMemGetInfo(self) -> Any:
        return self._answer("cudaMemGetInfo", 1 << 30, 2 << 30)

    def cudaMalloc(self, size: int) -> Any:
        return self._allocate("cudaMalloc", "device", size)

    def cudaMallocHost(self, size: int) -> Any:
        return self._allocate("cudaMallocHost", "host", size)

    def cudaFree(self, address: int) -> Any:
        return self._free("cudaFree", "device", address)

    def cudaFreeHost(self, address: int) -> Any:
        return self._free("cudaFreeHost", "host", address)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        self._next += 1
        answer = self._answer("cudaStreamCreateWithFlags", self._next)
        if not answer[0]:
            self.streams[self._next] = []
        return answer

    def cudaStreamDestroy(self, stream: int) -> Any:
        del self.streams[stream]
        return self._answer("cudaStreamDestroy")

    def cudaStreamSynchronize(self, stream: int) -> Any:
        assert self.recording is None, "waiting while recording"
        work, self.streams[stream][:] = list(self.streams[stream]), []
        try:
            for each in work:
                each()
        except Fault:
            return (Error.cudaErrorIllegalAddress,)
        return self._answer("cudaStreamSynchronize")

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> Any:
        kinds = ("device", "host") if kind == 1 else ("host", "device")
        target, origin = self.block(to, size, kinds[0]), self.block(source, size, kinds[1])
        answer = self._answer("cudaMemcpyAsync")
        if target is None or origin is None:
            return (Error.cudaErrorInvalidValue,)
        if not answer[0]:
            self.push(stream, lambda: np.copyto(target, origin))
        return answer

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:
        answer = self._answer("cudaStreamBeginCapture")
        if not answer[0]:
            self.recording, self.recording_broken = [], False
        return answer

    def cudaStreamEndCapture(self, stream: int) -> Any:
        work, self.recording = self.recording, None
        answer = self._answer("cudaStreamEndCapture", 0)
        if self.recording_broken or answer[0]:
            return Error.cudaErrorStreamCaptureInvalidated, None
        self._next += 1
        self.graphs[self._next] = work or []
        return Error.cudaSuccess, self._next

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        self._next += 1
        answer = self._answer("cudaGraphInstantiate", self._next)
        if not answer[0]:
            self.graphs[self._next] = self.graphs[graph]
        return answer

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return self._answer("cudaGraphDestroy")

    def cudaGraphExecDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return self._answer("cudaGraphExecDestroy")

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:
        answer = self._answer("cudaGraphLaunch")
        if not answer[0]:
            self.streams[stream] += self.graphs[graph]
        return answer


class FakeContext:
    """IExecutionContext."""

    def __init__(self, engine: FakeEngine, own_memory: bool) -> None:
        self.engine, self.own_memory = engine, own_memory
        self.scratch = 0
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.changes = self.prepared = 0
        engine.contexts.append(self)

    def set_device_memory(self, address: int, size: int) -> None:
        assert not self.own_memory
        self.changes += 1
        self.scratch = address

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.changes += 1
        self.profile = profile
        return profile < len(self.engine.plan["profiles"])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.changes += 1
        least, _, most = self.engine.plan["profiles"][self.profile]
        if not least <= shape[0] <= most:
            self.engine.logger.log(self.engine.module.ILogger.ERROR, f"{name} {shape} is outside the profile")
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        module, cuda = self.engine.module, self.engine.module.cuda
        if module.refuse_to_run:
            self.engine.logger.log(module.ILogger.ERROR, "the fake refuses")
            return False
        if not self.own_memory:
            assert cuda.block(self.scratch, SCRATCH, "device") is not None, "no memory to work in"
        module.executed.append((self.profile, self.shapes[self.engine.names[0]][0]))
        if cuda.recording is not None:
            module.recorded += 1
            if self.prepared != self.changes or module.refuse_to_record:
                cuda.recording_broken = True
                return False
        self.prepared = changes = self.changes

        def work() -> None:
            if self.changes != changes:
                raise Fault("the context was changed after its graph was recorded")
            self.engine.compute(self.shapes, self.addresses)

        cuda.push(stream, work)
        return True


class FakeEngine:
    """ICudaEngine: the plan names an ONNX file."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, module: FakeTensorRt, logger: Any, plan: dict[str, Any]) -> None:
        self.module, self.logger, self.plan = module, logger, plan
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            plan["model"], options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.tensors = self.inputs | {value.name: value for value in self.session.get_outputs()}
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(plan["profiles"])
        self.contexts: list[FakeContext] = []
        self.configs: list[Any] = []
        if module.is_rtx:
            self.create_runtime_config = self._create_runtime_config

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.module.TensorIOMode.INPUT if name in self.inputs else self.module.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        types = {"tensor(float)": self.module.DataType.FLOAT, "tensor(int64)": self.module.DataType.INT64}
        return types[self.tensors[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        rest = self.get_tensor_shape(name)[1:]
        return [(size, *rest) for size in self.plan["profiles"][profile]]

    def create_execution_context(self, how: Any) -> FakeContext | None:
        if self.module.no_contexts:
            self.logger.log(self.module.ILogger.ERROR, "out of memory, says the fake")
            return None
        return FakeContext(
            self, own_memory=how != self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        )

    def _create_runtime_config(self) -> Any:
        config = SimpleNamespace(cuda_graph_strategy="DISABLED", cache=None)
        config.create_runtime_cache = FakeCache
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        self.configs.append(config)
        return config

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feeds = {}
        for name in self.inputs:
            dtype = np.dtype(np.float32 if self.get_tensor_dtype(name) == "FLOAT" else np.int64)
            size = int(np.prod(shapes[name])) * dtype.itemsize
            block = self.module.cuda.block(addresses[name], size, "device")
            if block is None:
                raise Fault(f"{name} reaches beyond its memory")
            feeds[name] = block.view(dtype).reshape(shapes[name])
        names = [name for name in self.names if name not in self.inputs]
        for name, value in zip(names, self.session.run(names, feeds), strict=True):
            data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
            block = self.module.cuda.block(addresses[name], len(data), "device")
            if block is None:
                raise Fault(f"{name} reaches beyond its memory")
            block[:] = data


class FakeCache:
    """IRuntimeCache: knows its own blobs."""

    def __init__(self) -> None:
        self.content = b"compiled here"

    def deserialize(self, blob: bytes) -> bool:
        return blob.startswith(b"compiled")

    def serialize(self) -> bytes:
        return self.content


class FakeTensorRt(ModuleType):
    """`tensorrt` or `tensorrt_rtx`."""

    def __init__(self, name: str, version: str, cuda: FakeCuda) -> None:
        super().__init__(name)
        self.__version__, self.cuda, self.is_rtx = version, cuda, name == "tensorrt_rtx"
        self.engines: list[FakeEngine] = []
        self.executed: list[tuple[int, int]] = []
        self.recorded = 0
        self.refuse_to_record = self.refuse_to_run = self.no_contexts = False
        self.host_code_allowed: list[bool] = []

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

            def __init__(self) -> None:
                pass

        class Runtime:
            def __init__(runtime, logger: Any) -> None:
                runtime.logger = logger
                runtime.engine_host_code_allowed = False

            def deserialize_cuda_engine(runtime, content: bytes) -> FakeEngine | None:
                self.host_code_allowed.append(runtime.engine_host_code_allowed)
                try:
                    plan = json.loads(content)
                except ValueError:
                    runtime.logger.log(ILogger.ERROR, "magicTag\n is wrong")
                    return None
                self.engines.append(FakeEngine(self, runtime.logger, plan))
                return self.engines[-1]

        self.ILogger, self.Runtime = ILogger, Runtime
        self.TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
        self.DataType = SimpleNamespace(FLOAT="FLOAT", INT64="INT64", HALF="HALF")
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
        if self.is_rtx:
            self.CudaGraphStrategy = SimpleNamespace(DISABLED="DISABLED", WHOLE_GRAPH_CAPTURE="WHOLE")


def plan_of(model: Path, profiles: tuple[tuple[int, int, int], ...]) -> bytes:
    """What the fake packages take for a plan."""
    return json.dumps({"model": str(model), "profiles": profiles}).encode()
