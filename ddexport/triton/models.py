"""Models and ensembles: the small graphs of glue.txt, and configurations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

import onnx

from ddexport.runtime.bundle import Manifest
from ddexport.runtime.engines import Engine
from ddexport.runtime.schedule import Schedule

TYPES = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.INT64: "INT64", onnx.TensorProto.UINT8: "UINT8"}


def glue_graphs(manifest: Manifest, schedules: Iterable[Schedule], like: Any) -> dict[str, Any]:
    """The graphs that schedules need, by name, with opset and IR version of another onnx.ModelProto, `like`.

    first_step: label (B,) -> known 0 (B,). next_step_K: the sequence before, noise (B, L, Cv) -> latents
    (B, L, Cv), known K (B,). tokens_K: codes before and now (B, S) -> codes (B, S), the first K from before.
    to_image: floats (B, C, H, W) -> uint8 (B, H, W, C), as the runtime's `to_uint8`.
    """
    header, graphs = f'<ir_version: {like.ir_version}, opset_import: ["": {opset(like)}]>', {}
    for known in sorted({known for schedule in schedules for known in schedule.known}):
        for text in _texts("glue.txt"):
            filled = text.substitute(_numbers(manifest), known=known)
            name = filled.split()[0]
            if known or not name.endswith("_0"):
                graphs[name] = onnx.parser.parse_model(f"{header} {filled}")
                onnx.checker.check_model(graphs[name])
    return graphs


def model_config(name: str, graph: Any, max_batch: int, engine: Engine | None = None) -> str:
    """A config.pbtxt with the inputs and outputs of an onnx.ModelProto. engine: what runs in its place.

    Requests that wait are drawn together, none waits for others, and the server makes the first runs.
    """
    how = 'backend: "onnxruntime"\ninstance_group { count: 1 }'  # without it a CPU loads every model twice
    if engine:  # Triton takes the profile that a batch fits
        profiles = ", ".join(f'"{number}"' for number in range(len(engine.profiles)))
        how = f'platform: "tensorrt_plan"\ninstance_group {{ count: 1 kind: KIND_GPU profile: [{profiles}] }}'
    lines = [f'name: "{name}"', how, f"max_batch_size: {max_batch}", "dynamic_batching { }"]
    zeros = []
    for side, infos in (("input", graph.graph.input), ("output", graph.graph.output)):
        for info in infos:
            dims = [int(dim.dim_value) for dim in info.type.tensor_type.shape.dim][1:]
            kind = f"data_type: TYPE_{TYPES[info.type.tensor_type.elem_type]} dims: {dims or [1]}"
            own = "" if dims else " reshape { shape: [ ] }"  # Triton has no shape (B,)
            lines.append(f'{side} {{ name: "{info.name}" {kind}{own} }}')
            if side == "input":
                zeros.append(f'  inputs {{ key: "{info.name}" value {{ {kind} zero_data: true }} }}')
    for size in sorted({1, max_batch}):
        lines += [f'model_warmup {{ name: "batch of {size}" batch_size: {size}', *zeros, "}"]
    return "\n".join([*lines, ""])


def ensemble_config(name: str, schedule: Schedule, manifest: Manifest, max_batch: int) -> str:
    """The config.pbtxt that draws as the runtime's sampler does, from noise and label to image and tokens."""
    first, later, last = _texts("ensemble.pbtxt")
    values = _numbers(manifest) | {"name": name, "max_batch": max_batch, "step": len(schedule.known)}
    steps = [
        later.substitute(step=number, before=number - 1, known=known)
        for number, known in enumerate(schedule.known[1:], 2)
    ]
    text = "\n".join([first.substitute(values), *steps, last.substitute(values)])
    return text.replace(f'"codes_{len(schedule.known)}"', '"tokens"')  # those of the last step


def opset(graph: Any) -> int:
    """The version of ONNX's own operators in an onnx.ModelProto."""
    return next(int(entry.version) for entry in graph.opset_import if not entry.domain)


def _texts(file: str) -> list[Template]:
    content = Path(__file__).with_name(file).read_text(encoding="utf-8")
    return [Template(text) for text in content.split("\n\n")]


def _numbers(manifest: Manifest) -> dict[str, int | str]:
    size, image = manifest.sequence, manifest.image
    shape = {"height": image.height, "columns": image.width, "channels": image.channels}
    return {"length": size.length, "width": size.width, "split": size.split, **shape}
