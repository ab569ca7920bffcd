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

from torch import nn

from ddexport.families import family
from ddexport.families._checkpoint import connect, load_part, random_part
from ddexport.graph.prove import prove
from ddexport.graph.spec import GraphSpec, graph_specs, image_size, sequence_size
from ddexport.graph.to_onnx import check_onnx, check_opset, default_opset, onnx_from_module
from ddexport.graph.verify import Agreement
from ddexport.model_card import model_card
from ddexport.precision.cast import PrecisionError, check_patterns, in_precision
from ddexport.precision.policy import FLOAT32, PRECISIONS
from ddexport.recipe import Recipe, Source, class_names, embedded_weights
from ddexport.staging import staged_directory
from runtime.errors import DDError
from runtime.manifest import (
    FILE_NAME,
    SCHEMA,
    Graph,
    Manifest,
    Schedule,
    Weights,
    file_info,
    read_manifest,
    sha256_of,
)
from runtime.manifest import Source as WeightFile

Stage = Callable[[str], AbstractContextManager[None]]
EXPORTED = ("student", "tokenizer")


class MissingWeightsError(DDError):
    """Weights that were not given, and how to get them."""


@dataclass(frozen=True)
class WeightRequest:
    """Which weights a bundle is made of.

    Attributes:
        files: a file for each role; roles left out take the weights that ship with the project, if there are
            any.
        weights: which copy a file's training state holds: "ema" or "model".
        random_seed: random weights with this seed in place of all files.
    """

    files: Mapping[str, Path]
    weights: str = "ema"
    random_seed: int | None = None


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
) -> Exported:
    """Writes the bundle of `recipe` to the directory `target`, whole and verified, or not at all.

    Args:
        recipe: the model.
        target: the directory to make.
        request: where its weights come from.
        precisions: of "fp32", "fp16" and "bf16", each once; the bundle has them in this order.
        keep_fp32: patterns of module paths that stay float32 in the half graphs.
        opset: of the graphs; by default 20, and 22 in bf16.
        force: replace an existing bundle.
        stage: a context manager that shows what is going on.

    Raises:
        PrecisionError: a precision is unknown, a pattern matches nothing, or a weight does not fit.
        MissingWeightsError: a file is needed and was not given.
        CheckpointError: a file does not hold the recipe's model.
        ExportError: the opset is not supported, or has not the operators of a precision.
        RecipeError: the label list is not the recipe's.
        OutputError: `target` exists and `force` is false, or is no bundle, or cannot be written.
        VerificationError: a graph differs from its module; nothing is written.
    """
    check_precisions(precisions, recipe)
    if opset is not None:
        check_opset(opset, precisions)
    precisions = sorted(precisions, key=PRECISIONS.index)
    sources = _sources(recipe, request)
    specs = graph_specs(recipe)
    labels = class_names(recipe)
    with staged_directory(target, force, _expected_bytes(recipe), marker=FILE_NAME) as folder:
        with stage("loading weights"):
            parts = load_parts(recipe, request, sources)
            parts["student"].tabulate()  # type: ignore[operator]
            check_patterns(parts.values(), keep_fp32)
            weights = _weights(recipe, request, sources)
        graphs = []
        for precision, spec in itertools.product(precisions, specs):
            part = in_precision(parts[spec.part], precision, keep_fp32, spec.part)
            version = opset or default_opset(precision)
            graphs.append(_write_graph(part, spec, precision, recipe, folder, version, weights, stage))
            del part  # one cast copy at a time beside the float32 parts
        graphs, agreement = prove(folder, graphs, parts, specs, recipe, keep_fp32, stage)
        (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
        manifest = Manifest(
            name=recipe.name,
            title=recipe.title,
            created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            sequence=sequence_size(recipe),
            image=image_size(recipe),
            classes=recipe.classes,
            labels=file_info(folder / "labels.json", folder),
            schedules={int(steps): Schedule(schedule.known) for steps, schedule in recipe.schedules.items()},
            graphs=tuple(graphs),
            weights=weights,
            parity=recipe.to_dict()["parity"],
            published=recipe.published,
            licence=recipe.licence,
            recipe=recipe.to_dict(),
            tools=_tools(),
        )
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        (folder / "README.md").write_text(model_card(recipe, manifest), encoding="utf-8")
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
        if precision != FLOAT32 and precision not in recipe.parity:
            raise PrecisionError(
                f"recipe {recipe.name} states no parity limits for {precision}",
                f"state them under parity.{precision}; docs/precision.md shows how they are found",
            )
    if not precisions:
        raise PrecisionError("no precision is named", f"there is: {known}")


def load_parts(
    recipe: Recipe, request: WeightRequest, sources: Mapping[str, Path] | None = None
) -> dict[str, nn.Module]:
    """Student and tokenizer of a bundle, connected, as torch modules. Raises as `export_bundle` does."""
    if request.random_seed is not None:
        parts = {role: random_part(recipe, role, request.random_seed) for role in EXPORTED}
    else:
        sources = sources or _sources(recipe, request)
        parts = {role: load_part(recipe, role, sources[role], request.weights) for role in EXPORTED}
    connect(parts["student"], parts["tokenizer"])
    return parts


def _sources(recipe: Recipe, request: WeightRequest) -> dict[str, Path]:
    """The file of each role. Raises `MissingWeightsError` that names file, Hub repository and option of all
    missing."""
    if request.random_seed is not None:
        return {}
    found: dict[str, Path] = {}
    missing: list[Source] = []
    for role in EXPORTED:
        source = recipe.files[role]
        if role in request.files:
            found[role] = request.files[role]
        elif source.embedded:
            found[role] = embedded_weights(source)
        else:
            missing.append(source)
    if missing:
        raise MissingWeightsError(
            f"{recipe.name} needs " + " and ".join(f"{s.file}{_published_at(s)}" for s in missing),
            f"download and give {' '.join(f'{s.option} {s.file}' for s in missing)};"
            " or try the pipeline without them: --random-weights 0",
        )
    return found


def _published_at(source: Source) -> str:
    return f" (from {source.repo} on the Hugging Face Hub, {source.path})" if source.repo else ""


def _weights(recipe: Recipe, request: WeightRequest, sources: Mapping[str, Path]) -> Weights:
    if request.random_seed is not None:
        return Weights("random", request.random_seed, ())
    embedded = recipe.embedded and not request.files
    layouts = {role: family(recipe.family).layout(recipe, role) for role in sources}
    files = tuple(
        WeightFile(
            role,
            path.name,
            sha256_of(path),
            path.stat().st_size,
            request.weights if layouts[role].containers else None,
        )
        for role, path in sources.items()
    )
    return Weights("embedded" if embedded else "checkpoint", None, files)


def _write_graph(
    part: nn.Module,
    spec: GraphSpec,
    precision: str,
    recipe: Recipe,
    folder: Path,
    opset: int,
    weights: Weights,
    stage: Stage,
) -> Graph:
    path = folder / f"{spec.role}{'' if precision == FLOAT32 else f'_{precision}'}.onnx"
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
        files = onnx_from_module(part, spec, recipe, path, opset, properties)
        gc.collect()  # the tracer's program is full of cycles that hold gigabytes
    with stage(f"checking {path.name}"):
        check_onnx(path)
        infos = tuple(file_info(file, folder) for file in files)
    return Graph(spec.role, precision, path.name, infos, spec.inputs, spec.outputs)


def _expected_bytes(recipe: Recipe) -> int:
    """About how large the bundle will be: the weights, float32; per-class tables replace matrices of their
    size."""
    import torch

    with torch.device("meta"):
        parts = [family(recipe.family).build(recipe, role) for role in EXPORTED]
    return sum(4 * value.numel() for part in parts for value in part.state_dict().values())


def _tools() -> dict[str, str]:
    packages = ("ddexport", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    versions: dict[str, str] = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):  # onnxruntime-gpu brings onnxruntime under another name
            versions[name] = metadata.version(name)
    return {**versions, "python": platform.python_version()}
