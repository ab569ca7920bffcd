"""The TensorRT packages, as far as the runtime uses them, on the device of `fake_cuda.py`: a plan names a
role, and ONNX Runtime computes that graph of the toy bundle.

What a real package leaves undefined is an error here: replaying a graph whose context has changed, recording
a context that was never run, tensors that reach beyond their memory.
"""

# ruff: noqa: N805 - a class within a method

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest

from ddexport.runtime import machine
from ddexport.runtime.bundle import Manifest
from ddexport.runtime.contract import TensorSpec
from ddexport.runtime.engines import SCHEMA, Engine, Profile, engine_folder
from ddexport.runtime.records import to_json
from tests.runtime import fake_cuda, toy

SCRATCH = 4096
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}


@lru_cache
def _session(role: str) -> Any:
    model = {"student": toy.student, "decoder": toy.decoder}[role]()
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def compute(role: str, feeds: dict[str, Any]) -> dict[str, Any]:
    """What the graph of a role gives."""
    inputs = {value.name: feeds[value.name] for value in _session(role).get_inputs()}
    names = [value.name for value in _session(role).get_outputs()]
    return dict(zip(names, _session(role).run(names, inputs), strict=True))


class FakeContext:
    """IExecutionContext."""

    def __init__(self, engine: FakeEngine, own_memory: bool) -> None:
        self.engine, self.own_memory = engine, own_memory
        self.scratch = self.profile = self.changes = self.prepared = 0
        self.batch: dict[str, int] = {}
        self.addresses: dict[str, int] = {}
        engine.contexts.append(self)

    def set_device_memory(self, address: int, size: int) -> None:
        assert not self.own_memory
        self.changes += 1
        self.scratch = address

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.changes += 1
        self.profile = profile
        return profile < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.changes += 1
        least, _, most = self.engine.profiles[self.profile]
        if shape[1:] != self.engine.tensors[name].shape[1:] or not least <= shape[0] <= most:
            self.engine.log(f"{name} {shape} is outside the profile")
            return False
        self.batch[name] = shape[0]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        module, cuda = self.engine.module, self.engine.module.cuda
        if module.refuse_to_run:
            self.engine.log("the fake refuses")
            return False
        if not self.own_memory:
            assert cuda.block(self.scratch, SCRATCH, "device") is not None, "no memory to work in"
        (batch,) = set(self.batch.values())
        module.executed.append((self.profile, batch))
        if cuda.recording is not None and (self.prepared != self.changes or module.refuse_to_record):
            cuda.recording_broken = True
            return False
        self.prepared = changes = self.changes

        def work() -> None:
            if self.changes != changes:
                raise fake_cuda.Fault("the context was changed after its graph was recorded")
            arrays = {name: self.view(name, batch) for name in self.engine.tensors}
            for name, value in compute(self.engine.role, arrays).items():
                arrays[name][:] = value

        cuda.push(stream, work)
        return True

    def view(self, name: str, batch: int) -> Any:
        spec = self.engine.tensors[name]
        shape, dtype = (batch, *spec.shape[1:]), np.dtype(spec.dtype)
        block = self.engine.module.cuda.block(
            self.addresses[name], int(np.prod(shape)) * dtype.itemsize, "device"
        )
        if block is None:
            raise fake_cuda.Fault(f"{name} reaches beyond its memory")
        return block.view(dtype).reshape(shape)


class FakeEngine:
    """ICudaEngine."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, module: FakeTensorRt, logger: Any, plan: dict[str, Any]) -> None:
        self.module, self.role, self.profiles = module, plan["role"], plan["profiles"]
        self.log = lambda message: logger.log(module.ILogger.ERROR, message)
        inputs, outputs = ([TensorSpec(n, d, tuple(s)) for n, d, s in side] for side in plan["tensors"])
        self.inputs = [spec.name for spec in inputs]
        self.tensors = {spec.name: spec for spec in [*inputs, *outputs]}
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(self.profiles)
        self.contexts: list[FakeContext] = []
        self.configs: list[Any] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.inputs else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return {"float32": "FLOAT", "int64": "INT64"}.get(self.tensors[name].dtype, "HALF")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, *self.get_tensor_shape(name)[1:]) for batch in self.profiles[profile]]

    def create_execution_context(self, how: Any) -> FakeContext | None:
        if self.module.no_contexts:
            self.log("out of memory, says the fake")
            return None
        return FakeContext(self, own_memory=how != "USER_MANAGED")

    def create_runtime_config(self) -> Any:
        assert self.module.is_rtx
        config = SimpleNamespace(cuda_graph_strategy="DISABLED", cache=None)
        config.create_runtime_cache = lambda: SimpleNamespace(
            deserialize=lambda blob: blob.startswith(b"compiled"), serialize=lambda: b"compiled here"
        )
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        self.configs.append(config)
        return config


class FakeTensorRt(ModuleType):
    """`tensorrt` or `tensorrt_rtx`."""

    def __init__(self, name: str, version: str, cuda: Any) -> None:
        super().__init__(name)
        self.__version__, self.cuda, self.is_rtx = version, cuda, name == "tensorrt_rtx"
        self.engines: list[FakeEngine] = []
        self.executed: list[tuple[int, int]] = []
        self.refuse_to_record = self.refuse_to_run = self.no_contexts = self.broken = False
        self.host_code_allowed: list[bool] = []

        class ILogger:
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        class Runtime:
            def __init__(runtime, logger: Any) -> None:
                runtime.logger, runtime.engine_host_code_allowed = logger, False
                if self.broken:
                    logger.log(ILogger.ERROR, "CUDA initialization failure with error: 35")
                    raise TypeError("factory function returned nullptr")

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
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE")


class FakeGpu(NamedTuple):
    """What a test has in place of a GPU of capability 8.9 and both TensorRT packages."""

    cuda: Any
    full: FakeTensorRt
    rtx: FakeTensorRt

    def package(self, backend: str) -> FakeTensorRt:
        return self.full if backend == "tensorrt" else self.rtx


def install(monkeypatch: pytest.MonkeyPatch, cache: Path) -> FakeGpu:
    """Puts the fakes in place. cache: of what TensorRT-RTX compiles."""
    cuda = fake_cuda.FakeCuda()
    fakes = FakeGpu(
        cuda,
        FakeTensorRt("tensorrt", VERSIONS["tensorrt"], cuda),
        FakeTensorRt("tensorrt_rtx", VERSIONS["tensorrt-rtx"], cuda),
    )
    for module in (cuda, fakes.full, fakes.rtx):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    use_gpu(monkeypatch)
    return fakes


def use_gpu(monkeypatch: pytest.MonkeyPatch, *capability: int, **changes: Any) -> None:
    """Makes the machine one with a GPU of that capability. changes: of what the driver says."""
    gpu = machine.Gpu(0, "Toy GPU", capability or (8, 9), 24 << 30)
    cuda = machine.Cuda(**{"gpus": (gpu,), "version": (13, 0), "fault": ""} | changes)
    monkeypatch.setattr(machine, "cuda", lambda: cuda)


def write_engines(
    root: Path,
    manifest: Manifest,
    backend: str = "tensorrt-rtx",
    precision: str = "fp32",
    profiles: Sequence[tuple[int, int, int]] = ((1, 4, 8),),
    **changes: Any,
) -> Path:
    """Puts engines for the fake packages into a bundle.

    changes: fields of their sidecars; of their plans `has_profiles`, and `has_tensor` for the last input.
    """
    targets = changes.get("targets", ("default",) if backend == "tensorrt-rtx" else ("sm89",))
    version = changes.get("version", VERSIONS[backend])
    folder = root / engine_folder(backend, version, targets)
    folder.mkdir(parents=True, exist_ok=True)
    has_profiles = changes.pop("has_profiles", profiles)
    has_tensor = changes.pop("has_tensor", None)
    for role in ("student", "decoder"):
        graph = manifest.graph(role, precision)
        tensors = [[list(spec) for spec in side] for side in manifest.tensors(graph)]
        if has_tensor:
            tensors[0][-1] = has_tensor
        plan = folder / f"{role}_{precision}.plan"
        plan.write_text(json.dumps({"role": role, "profiles": has_profiles, "tensors": tensors}))
        fields: dict[str, Any] = {
            "schema": SCHEMA, "role": role, "precision": precision, "file": plan.name,
            "sha256": hashlib.sha256(plan.read_bytes()).hexdigest(), "bytes": plan.stat().st_size,
            "source": graph.digest, "backend": backend, "version": version,
            "platform": machine.this_platform(),
            "targets": targets, "profiles": tuple(Profile(*sizes) for sizes in profiles),
            "layers": {"float32": 3}, "options": {}, "key": "0" * 64, "seconds": 1.0,
        }  # fmt: skip
        plan.with_suffix(".json").write_text(to_json(Engine(**fields | changes)))
    return folder
