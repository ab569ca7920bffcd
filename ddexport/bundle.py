"""The only writer of bundles: weights in, a verified directory out (docs/bundle.md)."""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
from torch import nn

from ddexport.families import family
from ddexport.families._base import Teacher as TeacherModule
from ddexport.graph.external import SharedWeights
from ddexport.graph.prove import prove
from ddexport.graph.rewrites import LEFT_OUT, REWRITES, check_rewrites, other_forms, rewrite
from ddexport.graph.spec import GraphSpec, graph_specs, image_size
from ddexport.graph.to_onnx import check_onnx, check_opset, default_opset, onnx_from_module
from ddexport.graph.verify import Agreement
from ddexport.graph.wrappers import graph_module
from ddexport.model_card import model_card
from ddexport.precision.cast import PrecisionError, check_patterns, in_precision
from ddexport.precision.policy import FLOAT32, HALVES, INT8, PRECISIONS
from ddexport.precision.table import ACCURACY_FILE
from ddexport.quantize.graphs import check_int8, with_int8
from ddexport.quantize.policy import IMAGES
from ddexport.recipe import Recipe, class_names, manifest_recipe
from ddexport.runtime.bundle import (
    FILE_NAME,
    SCHEMA,
    TEACHER,
    Graph,
    Manifest,
    Teacher,
    Weights,
    file_info,
    read_manifest,
)
from ddexport.runtime.records import to_json
from ddexport.sources import WeightRequest, load_parts, provenance, roles_of, sources_of
from ddexport.staging import staged_directory

Stage = Callable[[str], AbstractContextManager[None]]
CODEBOOK = "codebook.npy"


@dataclass(frozen=True)
class Exported:
    """A finished bundle: where it is, its manifest, and how well its graphs agree with the modules."""

    path: Path
    manifest: Manifest
    agreement: tuple[Agreement, ...]


def export_bundle(
    recipe: Recipe,
    target: Path,
    request: WeightRequest,
    precisions: Sequence[str] = (FLOAT32,),
    keep_fp32: Sequence[str] = (),
    opset: int | None = None,
    force: bool = False,
    stage: Stage = lambda name: nullcontext(),
    without: Sequence[str] = (),
    calibration: int = IMAGES,
) -> Exported:
    """Writes the bundle of `recipe` to the directory `target`, whole and verified, or not at all.

    Args:
        recipe: the model.
        target: the directory to make.
        request: where its weights come from.
        precisions: of "fp32", "fp16", "bf16" and "int8", each once; the bundle has them in this order.
        keep_fp32: patterns of module paths that stay float32 in the half graphs.
        opset: of the graphs; by default 20, and 22 in bf16.
        force: replace an existing bundle.
        stage: a context manager that shows what is going on.
        without: rewrites of the graphs to leave out (`graph.rewrites.REWRITES`); the manifest says which.
        calibration: how many images the ranges of the int8 graphs are taken from.

    Raises:
        PrecisionError: a precision is unknown, a pattern matches nothing, or a weight does not fit.
        MissingWeightsError: a file is needed and was not given.
        CheckpointError: a file does not hold the recipe's model.
        ExportError: the opset is not supported, or has not the operators of a precision.
        RecipeError: the label list is not the recipe's.
        RewriteError: there is no rewrite of a name in `without`.
        OutputError: `target` exists and `force` is false, or is no bundle, or cannot be written.
        VerificationError: a graph differs from its module; nothing is written.
    """
    check_precisions(precisions, recipe)
    check_rewrites(without)
    if opset is not None:
        check_opset(opset, precisions)
    precisions = sorted(precisions, key=PRECISIONS.index)
    sources = sources_of(recipe, request)
    roles = roles_of(recipe, request)
    if INT8 in precisions:
        check_int8(roles, calibration, keep_float=FLOAT32 in precisions)
    labels = class_names(recipe)
    with staged_directory(target, force, _expected_bytes(recipe, roles), marker=FILE_NAME) as folder:
        with stage("loading weights"):
            parts = load_parts(recipe, request, sources)
            forms = {precision: other_forms(parts, precision, without) for precision in _traced(precisions)}
            rewrite(parts, without)
            check_patterns(parts.values(), keep_fp32)
            weights = provenance(recipe, request, sources)
        teacher = _teacher(parts, recipe, folder) if TEACHER in parts else None
        specs = graph_specs(recipe, teacher)
        graphs: list[Graph] = []
        for precision, role in itertools.product(_traced(precisions), roles):
            part = in_precision({**parts, **forms[precision]}[role], precision, keep_fp32, role)
            some = [spec for spec in specs if spec.part == role]
            shared = _shared_weights(some, precision, folder)
            for spec in some:
                module = graph_module(spec, part, parts["tokenizer"])
                version = opset or default_opset(precision)
                graphs.append(
                    _write_graph(
                        module, spec, precision, recipe, folder, version, weights, stage, shared, keep_fp32
                    )
                )
            del part, module  # one cast copy at a time beside the float32 parts
        if INT8 in precisions:
            graphs = with_int8(graphs, folder, recipe, calibration, FLOAT32 in precisions, stage)
        (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
        manifest = Manifest(
            schema=SCHEMA,
            name=recipe.name,
            title=recipe.title,
            created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            sequence=recipe.sequence,
            image=image_size(recipe),
            classes=recipe.classes,
            labels=file_info(folder / "labels.json", folder),
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
            tools={**_tools(), **_left_out(without)},
        )
        proven, agreement = prove(folder, manifest, parts, specs, recipe, stage)
        accuracy = {file: measured.to_dict() for file, measured in proven.items()}
        (folder / ACCURACY_FILE).parent.mkdir()
        (folder / ACCURACY_FILE).write_text(to_json(accuracy), encoding="utf-8")
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        (folder / "README.md").write_text(model_card(recipe, manifest, accuracy), encoding="utf-8")
        read_manifest(folder, verify=False)  # as the runtime will
    return Exported(target, manifest, agreement)


def check_precisions(precisions: Sequence[str], recipe: Recipe) -> None:
    """Raises `PrecisionError` unless the names are known, each is there once, and half ones have limits."""
    known = ", ".join(PRECISIONS)
    for precision in precisions:
        if precision not in PRECISIONS:
            raise PrecisionError(f"there is no precision {precision!r}", f"there is: {known}")
        if list(precisions).count(precision) > 1:
            raise PrecisionError(f"the precision {precision} is named twice", "name each once")
        if precision != FLOAT32 and recipe.parity.limits(precision) is None:
            page = INT8 if precision == INT8 else "precision"
            raise PrecisionError(
                f"recipe {recipe.name} states no parity limits for {precision}",
                f"state them under parity.{precision}; docs/{page}.md shows how they are found",
            )
    if not precisions:
        raise PrecisionError("no precision is named", f"there is: {known}")


def _traced(precisions: Sequence[str]) -> list[str]:
    """The precisions whose graphs are traced: int8 is made from float32, whether that stays or not."""
    needed = {FLOAT32 if precision == INT8 else precision for precision in precisions}
    return sorted(needed, key=PRECISIONS.index)


def _write_graph(
    part: nn.Module,
    spec: GraphSpec,
    precision: str,
    recipe: Recipe,
    folder: Path,
    opset: int,
    weights: Weights,
    stage: Stage,
    shared: SharedWeights | None,
    keep_fp32: Sequence[str],
) -> Graph:
    path = folder / f"{spec.stem}{_suffix(precision)}.onnx"
    properties = {
        "model": recipe.name,
        "role": spec.role,
        "precision": precision,
        "schema": str(SCHEMA),
        "source": f"random weights, seed {weights.seed}"
        if weights.kind == "random"
        else next(f"sha256:{file.sha256}" for file in weights.files if file.role == spec.part),
    }
    with stage(f"exporting {path.name}"):
        files = onnx_from_module(part, spec, recipe, path, opset, properties, shared)
        gc.collect()  # the tracer's program is full of cycles that hold gigabytes
    with stage(f"checking {path.name}"):
        check_onnx(path)
        infos = tuple(file_info(file, folder) for file in files)
    kept = tuple(keep_fp32) if precision in HALVES else ()
    return Graph(
        role=spec.role, precision=precision, file=path.name, files=infos, split=spec.split, keep_fp32=kept
    )


def _suffix(precision: str) -> str:
    return "" if precision == FLOAT32 else f"_{precision}"


def _shared_weights(specs: Sequence[GraphSpec], precision: str, folder: Path) -> SharedWeights | None:
    """The file for the weights of several graphs of one part."""
    if len(specs) < 2:
        return None
    return SharedWeights(folder / f"{specs[0].role}{_suffix(precision)}.onnx.data")


def _teacher(parts: Mapping[str, nn.Module], recipe: Recipe, folder: Path) -> Teacher:
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


def _expected_bytes(recipe: Recipe, roles: Sequence[str]) -> int:
    """About how large the bundle will be: the weights, float32; per-class tables replace matrices of their
    size."""
    import torch

    with torch.device("meta"):
        parts = [family(recipe.family).build(recipe, role) for role in roles]
    return sum(4 * value.numel() for part in parts for value in part.state_dict().values())


def _left_out(without: Sequence[str]) -> dict[str, str]:
    """What the manifest says of rewrites that were left out: nothing if there are none."""
    names = [name for name in REWRITES if name in without]
    return {LEFT_OUT: ", ".join(names)} if names else {}


def _tools() -> dict[str, str]:
    packages = ("ddexport", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    versions: dict[str, str] = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):  # onnxruntime-gpu brings onnxruntime under another name
            versions[name] = metadata.version(name)
    return {**versions, "python": platform.python_version()}
