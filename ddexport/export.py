"""Writes bundles: from weights to a verified directory (docs/bundle.md)."""

from __future__ import annotations

import datetime
import gc
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
from msgspec import structs
from torch import nn

from ddexport.card import ACCURACY_FILE, model_card
from ddexport.families import family
from ddexport.families._base import Teacher as TeacherModule
from ddexport.families._weight_file import CheckpointError
from ddexport.graph.external import SharedWeights
from ddexport.graph.pipeline import check_pipelines, write_pipeline
from ddexport.graph.spec import GraphSpec, graph_specs, image_size
from ddexport.graph.to_onnx import check_onnx, check_opset, default_opset, onnx_from_module
from ddexport.graph.verify import compare_decoders, verify, verify_pipeline
from ddexport.graph.wrappers import graph_module, graph_part
from ddexport.precision.cast import PrecisionError, check_patterns
from ddexport.precision.policy import FLOAT32, HALVES, INT8, PRECISIONS
from ddexport.quantize.graphs import check_int8, int8_graphs
from ddexport.quantize.policy import IMAGES
from ddexport.recipe import Recipe, class_names, manifest_recipe
from ddexport.runtime import __version__
from ddexport.runtime.bundle import (
    ENCODER,
    FILE_NAME,
    SCHEMA,
    TEACHER,
    TEXT_ROLES,
    FileInfo,
    Graph,
    Manifest,
    Teacher,
    Text,
    Weights,
    decoder_role,
    file_info,
    read_manifest,
)
from ddexport.runtime.machine import version_of
from ddexport.runtime.records import to_json
from ddexport.runtime.text import PromptTokenizer
from ddexport.sources import WeightRequest, load_parts, provenance, recipe_for, roles_of, sources_of
from ddexport.staging import staged_directory
from ddexport.text_encoder import TextEncoder

Stage = Callable[[str], AbstractContextManager[None]]
Parts = Mapping[str, nn.Module]
CODEBOOK, LABELS, TOKENIZER = "codebook.npy", "labels.json", "tokenizer.json"


@dataclass(frozen=True)
class Exported:
    """A finished bundle: where it is, and its manifest."""

    path: Path
    manifest: Manifest


def export_bundle(
    recipe: Recipe,
    target: Path,
    request: WeightRequest,
    precisions: Sequence[str] = (FLOAT32,),
    keep_fp32: Sequence[str] = (),
    opset: int | None = None,
    force: bool = False,
    stage: Stage = lambda name: nullcontext(),
    calibration: int = IMAGES,
    pipelines: Sequence[tuple[int, str]] = (),
) -> Exported:
    """Writes the bundle of `recipe` to the directory `target`, or nothing if it cannot be verified.

    Args:
        precisions: of "fp32", "fp16", "bf16" and "int8", each once; the bundle has them in this order.
        keep_fp32: patterns of module paths that stay float32 in fp16 and bf16 graphs.
        opset: of the graphs; by default 20, and 22 in bf16.
        stage: called with the name of each stage; a context manager that shows progress.
        calibration: number of images from which the value ranges of int8 graphs are measured.
        pipelines: numbers of steps with decoders, for each of which one graph from noise to images is added.

    Raises:
        PrecisionError: a precision is unknown, a pattern matches nothing, or a weight exceeds fp16.
        MissingWeightsError: a file is needed and was not given.
        CheckpointError: a file does not hold the recipe's model.
        ExportError: the opset is not supported, or lacks the operators of a precision.
        RecipeError: the label list does not fit the recipe.
        ScheduleError: a pipeline has steps that the recipe does not have, or that involve the teacher.
        OutputError: `target` exists and `force` is false, or is no bundle, or cannot be written.
        VerificationError: a graph differs from its module; nothing is written.
    """
    check_precisions(precisions, recipe)
    check_opset(opset, precisions)
    recipe = recipe_for(recipe, request)
    roles, labels = roles_of(recipe, request), class_names(recipe)
    check_pipelines(recipe, roles, pipelines)
    sources = sources_of(recipe, request)
    if INT8 in precisions:
        check_int8(roles, calibration, keep_float=FLOAT32 in precisions)
    with staged_directory(target, force, _expected_bytes(recipe, roles), marker=FILE_NAME) as folder:
        with stage("loading weights"):
            parts = load_parts(recipe, request, sources)
            check_patterns(parts.values(), keep_fp32)
            weights = provenance(recipe, request, sources)
        (folder / LABELS).write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
        teacher = _teacher(parts, recipe, folder) if TEACHER in parts else None
        text = _text(parts, recipe, request, folder) if recipe.condition else None
        decoders = {name: role for name in recipe.decoders if (role := decoder_role(name)) in parts}
        specs = graph_specs(recipe, teacher, decoders.values(), text)
        tracer = _Tracer(recipe, folder, weights, tuple(keep_fp32), opset, stage, bool(pipelines))
        graphs = [
            graph
            for name in dict.fromkeys([*_traced(precisions), *([FLOAT32] if text else [])])
            for graph in tracer.trace(parts, [s for s in specs if _is_wanted(s.role, name, precisions)], name)
        ]
        if INT8 in precisions:
            graphs += int8_graphs(folder, graphs, recipe, calibration, stage, bool(pipelines))
            graphs = _wanted(graphs, precisions, folder)
        manifest = _manifest(recipe, weights, teacher, text, graphs, file_info(folder / LABELS, folder))
        accuracy = verify(folder, manifest, parts, specs, recipe, stage)
        for name in decoders:
            with stage(f"comparing the decoder {name} with the full one"):
                cost = compare_decoders(folder, manifest, name, recipe)
            manifest = structs.replace(manifest, decoders={**manifest.decoders, name: cost})
        for (steps, decoder), precision in product(pipelines, precisions):
            with stage(f"writing and comparing the pipeline of {steps} steps in {precision}"):
                pipeline = write_pipeline(folder, manifest, steps, precision, decoder)
                verify_pipeline(folder, manifest, pipeline)
            manifest = structs.replace(manifest, pipelines=(*manifest.pipelines, pipeline))
        (folder / ACCURACY_FILE).parent.mkdir()
        (folder / ACCURACY_FILE).write_text(to_json(accuracy), encoding="utf-8")
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        card = model_card(recipe, manifest, msgspec.to_builtins(accuracy))
        (folder / "README.md").write_text(card, encoding="utf-8")
        read_manifest(folder, verify=False)  # as the runtime will
    return Exported(target, manifest)


def check_precisions(precisions: Sequence[str], recipe: Recipe) -> None:
    """Raises `PrecisionError` unless all are known, none is repeated, and all but fp32 have limits."""
    known = ", ".join(PRECISIONS)
    for precision in precisions:
        if precision not in PRECISIONS:
            raise PrecisionError(f"there is no precision {precision!r}", f"there is: {known}")
        if list(precisions).count(precision) > 1:
            raise PrecisionError(f"the precision {precision} is named twice", "name each precision once")
        if precision != FLOAT32 and recipe.parity.limits(precision) is None:
            raise PrecisionError(
                f"recipe {recipe.name} states no parity limits for {precision}",
                f"state them under parity.{precision}; docs/export.md explains how to find them",
            )
    if not precisions:
        raise PrecisionError("no precision is named", f"there is: {known}")


def tool_versions() -> dict[str, str]:
    """The version of each package that shapes a bundle, by its name."""
    # onnxruntime-gpu brings onnxruntime under another name.
    found = {name: version_of(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")}
    installed = {name: version for name, version in found.items() if version}
    return {"ddexport": __version__, **installed, "python": platform.python_version()}


@dataclass(frozen=True)
class _Tracer:
    """Writes the traced graphs of one bundle. weights: what the manifest says of them; opset: None for the
    default of each precision; shared: the weights lie beside every graph, for others to read them too."""

    recipe: Recipe
    folder: Path
    weights: Weights
    keep_fp32: tuple[str, ...]
    opset: int | None
    stage: Stage
    shared: bool

    def trace(self, parts: Parts, specs: Sequence[GraphSpec], precision: str) -> Iterator[Graph]:
        """The graphs of one precision. Several graphs of one part share a file of weights."""
        for role in dict.fromkeys(spec.part for spec in specs):
            part = graph_part(parts[role], precision, self.keep_fp32, role, self.recipe.group_norm)
            same = [spec for spec in specs if spec.part == role]
            data = self.folder / f"{same[0].role}{_suffix(precision)}.onnx.data"
            shared = SharedWeights(data) if len(same) > 1 or (self.shared and role != TEACHER) else None
            written = [
                self._write(graph_module(spec, part, parts["tokenizer"]), spec, precision, shared)
                for spec in same
            ]
            # Described when the weights that they share are complete.
            yield from (self._graph(*one, precision) for one in zip(same, written, strict=True))
            del part  # one cast copy at a time beside the float32 parts
            gc.collect()

    def _write(
        self, module: nn.Module, spec: GraphSpec, precision: str, shared: SharedWeights | None
    ) -> list[Path]:
        path = self.folder / f"{spec.stem}{_suffix(precision)}.onnx"
        hashes = {file.role: f"sha256:{file.sha256}" for file in self.weights.files}
        properties = {
            "model": self.recipe.name,
            "role": spec.role,
            "precision": precision,
            "schema": str(SCHEMA),
            "source": hashes.get(spec.part, f"random weights, seed {self.weights.seed}"),
        }
        opset = self.opset or default_opset(precision)
        with self.stage(f"exporting {path.name}"):
            files = onnx_from_module(module, spec, self.recipe, path, opset, properties, shared)
            gc.collect()  # the tracer's program is full of cycles that hold gigabytes
        return files

    def _graph(self, spec: GraphSpec, files: Sequence[Path], precision: str) -> Graph:
        path = files[0]
        with self.stage(f"checking {path.name}"):
            check_onnx(path)
            infos = tuple(file_info(file, self.folder) for file in files)
        kept = self.keep_fp32 if precision in HALVES else ()
        return Graph(
            role=spec.role, precision=precision, file=path.name, files=infos, split=spec.split, keep_fp32=kept
        )


def _traced(precisions: Sequence[str]) -> list[str]:
    """The precisions whose graphs are traced: int8 is made from float32, whether that stays or not."""
    needed = {FLOAT32 if precision == INT8 else precision for precision in precisions}
    return sorted(needed, key=PRECISIONS.index)


def _suffix(precision: str) -> str:
    return "" if precision == FLOAT32 else f"_{precision}"


def _is_wanted(role: str, precision: str, precisions: Sequence[str]) -> bool:
    """Whether a graph is traced in a precision. What runs once a text is float32, in every bundle."""
    return precision == FLOAT32 if role in TEXT_ROLES else precision in _traced(precisions)


def _wanted(graphs: Sequence[Graph], precisions: Sequence[str], folder: Path) -> list[Graph]:
    """The graphs of the precisions that were asked for; the files of the others are removed."""
    wanted = [graph for graph in graphs if graph.precision in precisions or graph.role in TEXT_ROLES]
    kept = {info.file for graph in wanted for info in graph.files}
    for info in (info for graph in graphs for info in graph.files if info.file not in kept):
        (folder / info.file).unlink(missing_ok=True)  # shared weights are in several lists
    return wanted


def _teacher(parts: Parts, recipe: Recipe, folder: Path) -> Teacher:
    """What the manifest says of the teacher. Writes the codebook, with which the runtime reads the student's
    sequence and embeds the teacher's tokens."""
    module, sampling = parts[TEACHER], recipe.teacher
    assert isinstance(module, TeacherModule) and sampling is not None  # `roles_of` has seen to it
    codebook = parts["tokenizer"].codebook.detach().numpy()  # type: ignore[operator,union-attr]
    np.save(folder / CODEBOOK, np.ascontiguousarray(codebook, dtype=np.float32))
    geometry = module.geometry
    return Teacher(
        starts=tuple(geometry.starts),
        layers=geometry.depth,
        heads=geometry.heads,
        head_width=geometry.head_width,
        guidance=module.guidance,
        codebook=file_info(folder / CODEBOOK, folder),
        **msgspec.structs.asdict(sampling),
    )


def _text(parts: Parts, recipe: Recipe, request: WeightRequest, folder: Path) -> Text:
    """What the manifest says of the texts. Copies the encoder's tokenizer."""
    assert recipe.condition is not None
    size = family(recipe.family).geometry(recipe)
    tokenizer = None
    if isinstance(encoder := parts.get(ENCODER), TextEncoder):
        shutil.copyfile(encoder.tokenizer_file(recipe.condition.width), folder / TOKENIZER)
        words = PromptTokenizer(folder / TOKENIZER, recipe.condition.tokens).size
        if words > encoder.words:
            fault = f"the tokenizer has {words} tokens, and the text encoder beside it knows {encoder.words}"
            raise CheckpointError(fault, "give the tokenizer.json of this encoder")
        tokenizer = file_info(folder / TOKENIZER, folder)
    return Text(
        tokens=recipe.condition.tokens,
        width=recipe.condition.width,
        layers=size.depth,
        heads=size.heads,
        head_width=size.head_width,
        tokenizer=tokenizer,
    )


def _manifest(
    recipe: Recipe,
    weights: Weights,
    teacher: Teacher | None,
    text: Text | None,
    graphs: Sequence[Graph],
    labels: FileInfo,
) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        name=recipe.name,
        title=recipe.title,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        sequence=recipe.sequence,
        image=image_size(recipe),
        classes=recipe.classes,
        labels=labels,
        text=text,
        schedules={
            int(steps): schedule
            for steps, schedule in recipe.schedules.items()
            if teacher is not None or schedule.teacher is None
        },
        teacher=teacher,
        graphs=tuple(graphs),
        weights=weights,
        licence=recipe.licence,
        published=recipe.published,
        parity=recipe.to_dict()["parity"],
        recipe=manifest_recipe(recipe),
        tools=tool_versions(),
    )


def _expected_bytes(recipe: Recipe, roles: Sequence[str]) -> int:
    """About how large the bundle will be: the weights, float32; per-class tables replace matrices of their
    size."""
    import torch

    with torch.device("meta"):
        parts = [family(recipe.family).build(recipe, role) for role in roles if role != ENCODER]
    return sum(4 * value.numel() for part in parts for value in part.state_dict().values())
