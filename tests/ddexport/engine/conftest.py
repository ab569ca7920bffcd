"""Toy bundles with the real contract in three precisions, made in a moment, and what stands in for a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddexport.engine.build import Built, build_engines
from ddexport.engine.module import ModuleError, TensorRT, load_tensorrt
from ddexport.engine.options import BuildOptions
from ddexport.runtime.bundle import (
    FILE_NAME,
    Graph,
    ImageSize,
    Manifest,
    Schedule,
    SequenceSize,
    Weights,
    contract,
    file_info,
)
from ddexport.runtime.engines import Profile
from ddexport.runtime.machine import Gpu

SEQUENCE = SequenceSize(length=6, width=16, codebook=16, split=2)
IMAGE = ImageSize(height=8, width=8, channels=3)
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

ToyBundle = Callable[..., Path]


@pytest.fixture
def toy_bundle(tmp_path: Path) -> ToyBundle:
    """Makes a bundle: `toy_bundle()`, or one that lies about its types, keeps its weights outside, ..."""

    def make(
        name: str = "toy",
        precisions: tuple[str, ...] = ("fp32", "fp16", "bf16"),
        really: dict[str, str] | None = None,
        external: bool = False,
        seed: int = 0,
    ) -> Path:
        """really: what a precision's graphs compute in, where that is not what the manifest says."""
        folder = tmp_path / name
        folder.mkdir()
        graphs = []
        for precision in precisions:
            for role, model in (("student", _student), ("decoder", _decoder)):
                path = folder / f"{role}{'' if precision == 'fp32' else f'_{precision}'}.onnx"
                made = model(TYPES[(really or {}).get(precision, precision)], seed)
                outside = {
                    "location": f"{path.name}.data",
                    "save_as_external_data": True,
                    "size_threshold": 0,
                }
                onnx.save_model(made, path, **(outside if external else {}))
                files = tuple(file_info(file, folder) for file in sorted(folder.glob(f"{path.name}*")))
                graphs.append(Graph(role=role, precision=precision, file=path.name, files=files))
        (folder / "labels.json").write_text(json.dumps({"names": ["zero", "one", "two"]}))
        carried: dict[str, Any] = {key: {} for key in ("licence", "published", "parity", "recipe", "tools")}
        manifest = Manifest(
            schema=2,
            name=name,
            title="toy",
            created="2026-01-01T00:00:00Z",
            sequence=SEQUENCE,
            image=IMAGE,
            classes=3,
            labels=file_info(folder / "labels.json", folder),
            schedules={1: Schedule(known=(0,))},
            graphs=tuple(graphs),
            weights=Weights(kind="random", seed=0),
            **carried,
        )
        (folder / FILE_NAME).write_text(manifest.to_json())
        return folder

    return make


def _student(dtype: int, seed: int) -> onnx.ModelProto:
    """Two products in the type of the precision and a head in float32, as the exporter's policy has it."""
    rng, C, V = np.random.default_rng(seed), SEQUENCE.width, SEQUENCE.codebook
    node = helper.make_node
    nodes = [
        node("Gather", ["classes", "label"], ["row"], axis=0),
        node("Add", ["latents", "row"], ["x"]),
        node("Cast", ["x"], ["x_half"], to=dtype),
        node("MatMul", ["x_half", "up"], ["up_half"]),
        node("MatMul", ["up_half", "down"], ["down_half"]),
        node("Cast", ["down_half"], ["y"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["known", "axes"], ["known3"]),
        node("Less", ["places", "known3"], ["is_data"]),
        node("Where", ["is_data", "latents", "y"], ["sequence"]),
        node("Slice", ["y", "start", "split", "axis"], ["front"]),
        node("MatMul", ["front", "head"], ["logits"]),
        node("ArgMax", ["logits"], ["tokens"], axis=-1, keepdims=0),
    ]
    constants = {
        "classes": rng.standard_normal((3, 1, C), np.float32),
        "head": rng.standard_normal((C, V), np.float32),
        "places": np.arange(SEQUENCE.length)[None, :, None],
        "axes": np.array([1, 2]),
        "start": np.array([0]),
        "split": np.array([SEQUENCE.split]),
        "axis": np.array([1]),
    }
    weights = {"up": rng.standard_normal((C, 4 * C)), "down": rng.standard_normal((4 * C, C))}
    return _model("student", nodes, constants, weights, dtype)


def _decoder(dtype: int, seed: int) -> onnx.ModelProto:
    rng, node = np.random.default_rng(seed + 1), helper.make_node
    nodes = [
        node("Cast", ["sequence"], ["s"], to=dtype),
        node("MatMul", ["s", "unfold"], ["pixels"]),
        node("Reshape", ["pixels", "shape"], ["picture"]),
        node("Conv", ["picture", "kernel"], ["smooth"], pads=[1, 1, 1, 1]),
        node("Cast", ["smooth"], ["smooth32"], to=TensorProto.FLOAT),
        node("Clip", ["smooth32", "zero", "one"], ["image"]),
    ]
    zero, one = np.array(0, np.float32), np.array(1, np.float32)
    constants = {"shape": np.array([-1, 3, 8, 8]), "zero": zero, "one": one}
    weights = {"unfold": rng.standard_normal((16, 32)), "kernel": rng.standard_normal((3, 3, 3, 3))}
    return _model(
        "decoder", nodes, {name: np.asarray(value) for name, value in constants.items()}, weights, dtype
    )


def _model(
    role: str, nodes: list[Any], constants: dict[str, Any], weights: dict[str, Any], dtype: int
) -> onnx.ModelProto:
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in side]
        for side in contract(role, SEQUENCE, IMAGE)
    )
    half = helper.tensor_dtype_to_np_dtype(dtype)
    values = constants | {name: value.astype(half) for name, value in weights.items()}
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, role, inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="session")
def rtx() -> TensorRT:
    """TensorRT-RTX, which builds without a GPU."""
    try:
        return load_tensorrt("tensorrt-rtx")
    except ModuleError as error:
        pytest.skip(f"{error.message}: {error.hint}")


@pytest.fixture
def without_gpu(rtx: TensorRT) -> TensorRT:
    """TensorRT-RTX as it is where there is no GPU, also on a machine that has one."""
    return TensorRT(rtx.backend, rtx.module, rtx.version, None)


@pytest.fixture
def a_gpu() -> Gpu:
    return Gpu(0, "NVIDIA Test 9000", (9, 0), 80 << 30)


@pytest.fixture
def quick() -> BuildOptions:
    """The options that build fastest."""
    return BuildOptions(profiles=(Profile(1, 2, 4),), optimization_level=0)


@pytest.fixture
def build(without_gpu: TensorRT, quick: BuildOptions) -> Any:
    """`build(bundle)`: fp16 engines with the quick options."""

    def run(folder: Path, **changed: Any) -> list[Built]:
        return build_engines(folder, without_gpu, **({"options": quick} | changed))

    return run
