"""Toy bundles with the real contract in three precisions, made in a moment, and what stands in for a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddexport.engine.build import Built, build_engines
from ddexport.engine.module import ModuleError, TensorRT, load_tensorrt
from ddexport.engine.options import BuildOptions
from ddexport.runtime.bundle import FILE_NAME, Graph, ImageSize, Manifest, SequenceSize, Weights, file_info
from ddexport.runtime.engines import Profile
from ddexport.runtime.machine import Gpu
from ddexport.runtime.schedule import Schedule

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
    ) -> Path:
        """really: what a precision's graphs compute in, where that is not what the manifest says."""
        folder = tmp_path / name
        folder.mkdir()
        graphs = []
        for precision in precisions:
            for role in ("student", "decoder"):
                path = folder / f"{role}{'' if precision == 'fp32' else f'_{precision}'}.onnx"
                made = _model(role, TYPES[(really or {}).get(precision, precision)])
                beside = {"location": f"{path.name}.data", "size_threshold": 0}
                onnx.save_model(made, path, save_as_external_data=external, **(beside if external else {}))
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


STUDENT = """
    student (float[batch, 6, 16] latents, int64[batch] label, int64[batch] known)
        => (float[batch, 6, 16] sequence, int64[batch, 2] tokens, float[batch, 2, 16] logits)
        <int64[1, 6, 1] places = {0, 1, 2, 3, 4, 5}, int64[2] axes = {1, 2}, int64[1] start = {0},
         int64[1] split = {2}, int64[1] axis = {1}> {
        row = Gather <axis = 0> (classes, label)
        x = Add (latents, row)
        x_half = Cast <to = HALF> (x)
        up_half = MatMul (x_half, up)
        down_half = MatMul (up_half, down)
        y = Cast <to = 1> (down_half)
        known3 = Unsqueeze (known, axes)
        is_data = Less (places, known3)
        sequence = Where (is_data, latents, y)
        front = Slice (y, start, split, axis)
        logits = MatMul (front, head)
        tokens = ArgMax <axis = -1, keepdims = 0> (logits)
    }"""
DECODER = """
    decoder (float[batch, 6, 16] sequence) => (float[batch, 3, 8, 8] image)
        <int64[4] shape = {-1, 3, 8, 8}, float zero = {0}, float one = {1}> {
        s = Cast <to = HALF> (sequence)
        pixels = MatMul (s, unfold)
        picture = Reshape (pixels, shape)
        smooth = Conv <pads = [1, 1, 1, 1]> (picture, kernel)
        smooth32 = Cast <to = 1> (smooth)
        image = Clip (smooth32, zero, one)
    }"""


WEIGHTS: dict[str, list[tuple[str, tuple[int, ...], str]]] = {
    "student": [("classes", (3, 1, 16), "float"), ("head", (16, 16), "float"),
                ("up", (16, 64), "half"), ("down", (64, 16), "half")],
    "decoder": [("unfold", (16, 32), "half"), ("kernel", (3, 3, 3, 3), "half")],
}  # fmt: skip


def _model(role: str, dtype: int) -> onnx.ModelProto:
    """Two products in the type of the precision and, in the student, a head in float32, as the exporter's
    policy has it."""
    rng, half = np.random.default_rng(0), helper.tensor_dtype_to_np_dtype(dtype)
    text = {"student": STUDENT, "decoder": DECODER}[role]
    graph = onnx.parser.parse_graph(text.replace("HALF", str(dtype)))
    for name, shape, kind in WEIGHTS[role]:
        values = rng.standard_normal(shape).astype(half if kind == "half" else np.float32)
        graph.initializer.append(numpy_helper.from_array(values, name))
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
