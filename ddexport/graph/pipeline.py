"""One graph from noise to 8-bit images: the student once for each step, then the decoder.

It is for people who do not use the runtime: examples/draw.py. Its weights are those of the other graphs, in
the files beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddexport.recipe import Recipe, RecipeError
from ddexport.runtime.bundle import FULL, Manifest, PipelineGraph, decoder_role, file_info
from ddexport.runtime.errors import ScheduleError
from ddexport.runtime.schedule import Schedule


def write_pipeline(
    folder: Path, manifest: Manifest, steps: int, precision: str, decoder: str = FULL
) -> PipelineGraph:
    """Writes `pipeline_STEPS.onnx`, in other precisions than float32 and with another decoder with a suffix,
    from graphs of a bundle.

    Inputs: noise float32 (batch, L, Cv), label int64 (batch,). Outputs: image uint8 (batch, H, W, C), tokens
    int64 (batch, S), as the runtime's sampler makes them. steps, decoder: as `check_pipelines` lets pass.
    """
    schedule = manifest.schedule(steps)
    student = manifest.graph("student", precision, schedule.split)
    last = manifest.graph(decoder_role(decoder), precision)
    models = [onnx.load(folder / graph.file, load_external_data=False) for graph in (student, last)]
    body = _Body(schedule, manifest)
    nodes = [*body.steps(models[0].graph), *body.images(models[1].graph)]
    size, image = manifest.sequence, manifest.image
    codes = schedule.split or size.split
    graph = helper.make_graph(
        nodes,
        f"{manifest.name} in {steps} steps",
        [
            helper.make_tensor_value_info("noise", TensorProto.FLOAT, ["batch", size.length, size.width]),
            helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info(
                "image", TensorProto.UINT8, ["batch", image.height, image.width, image.channels]
            ),
            helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", codes]),
        ],
        [*body.weights.values()],
        value_info=body.types,
    )
    model = helper.make_model(graph, opset_imports=models[0].opset_import, ir_version=models[0].ir_version)
    properties = {entry.key: entry.value for entry in models[0].metadata_props} | {"role": "pipeline"}
    helper.set_model_props(model, properties)
    suffix = Path(last.file).stem.removeprefix("decoder")
    path = folder / f"pipeline_{steps}{suffix}.onnx"
    path.write_bytes(model.SerializeToString())
    files = dict.fromkeys([file_info(path, folder), *student.files[1:], *last.files[1:]])
    return PipelineGraph(
        steps=steps, precision=precision, file=path.name, files=tuple(files), decoder=decoder
    )


def check_pipelines(recipe: Recipe, roles: Sequence[str], pipelines: Sequence[tuple[int, str]]) -> None:
    """Raises ScheduleError for numbers of steps that the recipe does not have, or that a teacher takes, and
    RecipeError for a decoder that is not among the roles of the bundle."""
    if recipe.condition is not None and pipelines:
        how = "draw with the runtime, or with the graphs one by one (docs/text-to-image.md)"
        raise ScheduleError(f"{recipe.name} draws from texts: it has no graph from noise to images", how)
    possible = [int(steps) for steps, schedule in recipe.schedules.items() if schedule.teacher is None]
    for steps, decoder in pipelines:
        if decoder != FULL and decoder_role(decoder) not in roles:
            how = "`ddexport distill decoder` makes them: --small-decoder FILE"
            raise RecipeError(f"there are no weights of a decoder {decoder} of {recipe.name}", how)
        if steps not in possible:
            raise ScheduleError(
                f"{recipe.name} has no pipeline of {steps} steps",
                f"The student alone has schedules of: {', '.join(map(str, sorted(possible)))}.",
            )


class _Body:
    """The nodes of a pipeline; the weights that they read, by name, and the types of their values."""

    def __init__(self, schedule: Schedule, manifest: Manifest) -> None:
        self.schedule, self.split = schedule, schedule.split or manifest.sequence.split
        self.weights: dict[str, Any] = {}
        self.types: list[Any] = []
        self.last = ""  # the prefix of the values of the last step

    def steps(self, student: Any) -> Iterator[Any]:
        """The student's passes. One after the first keeps what is known, and the tokens that were chosen for
        it, and has the original noise in the rest."""
        for number, known in enumerate(self.schedule.known, 1):
            before, prefix = self.last, f"step{number}/"
            yield helper.make_node("Shape", ["label"], [f"{prefix}batch"])
            yield helper.make_node("Expand", [self._constant(known), f"{prefix}batch"], [f"{prefix}known"])
            latents = "noise"
            if before:
                latents = f"{prefix}latents"
                yield from self._joined(f"{before}sequence", "noise", known, latents)
            tokens = f"{prefix}{'chosen' if before else 'tokens'}"
            inputs = {"latents": latents, "label": "label", "known": f"{prefix}known", "tokens": tokens}
            yield from self._copied(student, "student/", prefix, inputs)
            if before:
                kept = min(known, self.split)
                yield from self._joined(f"{before}tokens", tokens, kept, f"{prefix}tokens")
            self.last = prefix

    def images(self, decoder: Any) -> Iterator[Any]:
        """The decoder, and its floats as bytes, ties to even, channels last."""
        yield from self._copied(decoder, "decoder/", "decoder/", {"sequence": f"{self.last}sequence"})
        zero, one, scale = (self._constant(np.float32(value)) for value in (0, 1, 255))
        yield helper.make_node("Clip", ["decoder/image", zero, one], ["clipped"])
        yield helper.make_node("Mul", ["clipped", scale], ["scaled"])
        yield helper.make_node("Round", ["scaled"], ["rounded"])
        yield helper.make_node("Cast", ["rounded"], ["bytes"], to=TensorProto.UINT8)
        yield helper.make_node("Transpose", ["bytes"], ["image"], perm=[0, 2, 3, 1])
        yield helper.make_node("Identity", [f"{self.last}tokens"], ["tokens"])

    def _copied(self, graph: Any, part: str, prefix: str, inputs: Mapping[str, str]) -> Iterator[Any]:
        """The nodes of a graph with its weights under the name of its part, once, other values prefixed."""
        stored = {tensor.name: f"{part}{tensor.name}" for tensor in graph.initializer}
        for tensor in graph.initializer:
            if stored[tensor.name] not in self.weights:
                copy = self.weights[stored[tensor.name]] = TensorProto()
                copy.CopyFrom(tensor)
                copy.name = stored[tensor.name]
        names = {"": "", **stored, **inputs}
        for info in (*graph.value_info, *graph.output):  # by its type a value is rounded in emulation
            typed = onnx.ValueInfoProto()
            typed.CopyFrom(info)
            typed.name = names.get(info.name, f"{prefix}{info.name}")
            self.types.append(typed)
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{prefix}{node.name}"
            copy.input[:] = [names.get(name, f"{prefix}{name}") for name in node.input]
            copy.output[:] = [names.get(name, f"{prefix}{name}") for name in node.output]
            yield copy

    def _joined(self, first: str, second: str, count: int, output: str) -> Iterator[Any]:
        """The first `count` positions of one value and the rest of another: [B, L, ...] each."""
        start, end, last, axis = (self._constant([n]) for n in (0, count, np.iinfo(np.int64).max, 1))
        yield helper.make_node("Slice", [first, start, end, axis], [f"{output}/kept"])
        yield helper.make_node("Slice", [second, end, last, axis], [f"{output}/rest"])
        yield helper.make_node("Concat", [f"{output}/kept", f"{output}/rest"], [output], axis=1)

    def _constant(self, value: Any) -> str:
        array = np.asarray(value, None if isinstance(value, np.generic) else np.int64)
        name = f"constant/{array.dtype}/{'_'.join(map(str, array.shape))}/{array.ravel()[0]}"
        self.weights[name] = numpy_helper.from_array(array, name)
        return name
