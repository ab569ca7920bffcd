"""A stand-in for full TensorRT, which needs a GPU: it has the names of 10.16 or of 11.4, and no others.

The names were read from the bindings of both releases. A build that uses a name which a release lacks fails
here with AttributeError, as it would there.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Names
from typing import Any

import onnx

from ddexport.engine.network import layers_of_model

COMMON_FLAGS = ("TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT", "WEIGHT_STREAMING", "SPARSE_WEIGHTS")
FLAGS = {
    "10.16.1.11": (*COMMON_FLAGS, "FP16", "BF16", "INT8", "OBEY_PRECISION_CONSTRAINTS"),
    "11.4.0.106": COMMON_FLAGS,
}
CREATION = {"10.16.1.11": {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, "11.4.0.106": {"STRONGLY_TYPED": 0}}
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
LEVELS = ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")


class Config:
    """Settable is what both releases let one set; there is no set_compute_capability."""

    __slots__ = ("builder_optimization_level", "cache", "flags", "hardware_compatibility_level", "limits",
                 "profiles", "progress_monitor")  # fmt: skip

    def __init__(self) -> None:
        self.flags, self.limits, self.profiles, self.cache = {"TF32"}, {}, [], None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.limits[pool] = size

    def add_optimization_profile(self, shapes: Any) -> int:
        self.profiles.append(shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> Any:
        return Names(content=content, serialize=lambda: content + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return cache.content != b"another GPU"

    def get_timing_cache(self) -> Any:
        return self.cache


class Profile(dict):
    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self[name] = (low, best, high)


class Plan(bytes):
    nbytes = property(len)


def fake_tensorrt(version: str) -> Any:
    """A module as `import tensorrt` gives it; `built` collects the configs of its builds."""
    module = Names(__version__=version, built=[], networks=[])

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            _fill(self.network, Path(path))
            return True

    class Builder:
        create_builder_config, create_optimization_profile = Config, Profile

        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            module.networks.append(flags)
            return Names()

        def build_serialized_network(self, network: Any, config: Config) -> Plan | None:
            config.progress_monitor.phase_start("build", None, 10)
            if not all(config.progress_monitor.step_complete("build", step) for step in range(10)):
                return None
            config.progress_monitor.phase_finish("build")
            module.built.append(config)
            return Plan(b"plan of " + version.encode())

    levels = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
    module.ILogger = type("ILogger", (), levels)
    module.IProgressMonitor = type("IProgressMonitor", (), {})
    module.OnnxParser, module.Builder = OnnxParser, Builder
    module.BuilderFlag = Names(**{flag: flag for flag in FLAGS[version]})
    module.NetworkDefinitionCreationFlag = Names(**CREATION[version])
    module.MemoryPoolType = Names(WORKSPACE="WORKSPACE")
    module.HardwareCompatibilityLevel = Names(**{level: level for level in LEVELS})
    return module


def _fill(network: Any, path: Path) -> None:
    """What a parser would find: the layers and tensors of the graph."""
    model = onnx.load(path, load_external_data=False)
    graph, layers = model.graph, []
    for (kind, name), count in layers_of_model(model).items():
        tensor = Names(dtype=Names(name=DTYPES[name]))
        get = lambda index, tensor=tensor: tensor  # noqa: E731
        kind_name = "MATRIX_MULTIPLY" if kind == "product" else "CONVOLUTION"
        layers += [Names(type=Names(name=kind_name), get_input=get, get_output=get)] * count
    inputs, outputs = ([_tensor(value) for value in side] for side in (graph.input, graph.output))
    network.num_layers, network.get_layer = len(layers), layers.__getitem__
    network.num_inputs, network.get_input = len(inputs), inputs.__getitem__
    network.num_outputs, network.get_output = len(outputs), outputs.__getitem__


def _tensor(value: Any) -> Any:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
    return Names(name=value.name, dtype=Names(name={1: "FLOAT", 7: "INT64"}[kind.elem_type]), shape=shape)
