"""The TensorRT packages, as far as the runtime uses them, on a fake device: a plan names an ONNX file, and
ONNX Runtime computes it on the CPU.

What a real package leaves undefined is an error here: replaying a graph whose context has changed, recording
a context that was never run, tensors that reach beyond their memory.
"""

# ruff: noqa: N805 - a class within a method

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from ddexport.runtime.engines import Profile

SCRATCH = 4096


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
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        fits = len(shape) == len(least) and all(
            map(lambda low, size, high: low <= size <= high, least, shape, most)
        )
        if not fits:
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
                raise self.engine.module.cuda.Fault("the context was changed after its graph was recorded")
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
        ranges = self.plan["profiles"][profile]
        shape = self.tensors[name].shape
        return [
            tuple(size if isinstance(size, int) else ranges[size][corner] for size in shape)
            for corner in range(3)
        ]

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
                raise self.module.cuda.Fault(f"{name} reaches beyond its memory")
            feeds[name] = block.view(dtype).reshape(shapes[name])
        names = [name for name in self.names if name not in self.inputs]
        for name, value in zip(names, self.session.run(names, feeds), strict=True):
            data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
            block = self.module.cuda.block(addresses[name], len(data), "device")
            if block is None:
                raise self.module.cuda.Fault(f"{name} reaches beyond its memory")
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

    def __init__(self, name: str, version: str, cuda: Any) -> None:
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


def plan_of(model: Path, profiles: Sequence[Profile]) -> bytes:
    """What the fake packages take for a plan."""
    ranges = [
        {name: profile.range_of(name) for name in ("batch", *(other.name for other in profile.others))}
        for profile in profiles
    ]
    return json.dumps({"model": str(model), "profiles": ranges}).encode()
