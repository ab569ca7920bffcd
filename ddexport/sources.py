"""Which weights a bundle is made of: files, those that ship with the project, or random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ddexport.families._checkpoint import connect, copy_taken, load_part, random_part
from ddexport.families._weight_file import fingerprint
from ddexport.recipe import Recipe, RecipeError, Source, embedded_weights
from ddexport.runtime.bundle import TEACHER, Weights
from ddexport.runtime.bundle import Source as WeightFile
from ddexport.runtime.errors import DDError

ALWAYS = ("student", "tokenizer")


class MissingWeightsError(DDError):
    """Weights that were not given, and how to get them."""


@dataclass(frozen=True)
class WeightRequest:
    """Which weights a bundle is made of.

    Attributes:
        files: a file for each role; roles left out take the weights that ship with the project, if there are
            any.
        weights: which state dict to take of a file that holds several, as for `load_part`.
        random_seed: random weights with this seed in place of all files.
        teacher: whether the teacher is wanted. None: where its weights are given or ship with the project.
    """

    files: Mapping[str, Path]
    weights: str | None = None
    random_seed: int | None = None
    teacher: bool | None = None


def roles_of(recipe: Recipe, request: WeightRequest) -> tuple[str, ...]:
    """The parts that the bundle will hold. Raises `RecipeError` for a teacher that the recipe does not have.

    Random weights come with a teacher only where it is asked for: it doubles the bundle.
    """
    source = recipe.files.get(TEACHER)
    at_hand = source is not None and (TEACHER in request.files or bool(source.embedded))
    wanted = request.random_seed is None and at_hand if request.teacher is None else request.teacher
    if not wanted:
        return ALWAYS
    if source is None or recipe.teacher is None:
        raise RecipeError(
            f"recipe {recipe.name} has no sampling settings for its teacher",
            "state files.teacher and teacher: {cfg, top_k, top_p, temperature}",
        )
    return (*ALWAYS, TEACHER)


def sources_of(recipe: Recipe, request: WeightRequest) -> dict[str, Path]:
    """The file of each role, none for random weights.

    Raises:
        MissingWeightsError: names file, Hub repository and option of all that are missing.
        RecipeError: a teacher is wanted that the recipe does not have.
    """
    roles = roles_of(recipe, request)
    if request.random_seed is not None:
        return {}
    paths: dict[str, Path] = {}
    missing: list[Source] = []
    for role in roles:
        source = recipe.files[role]
        if role in request.files:
            paths[role] = request.files[role]
        elif source.embedded:
            paths[role] = embedded_weights(source)
        else:
            missing.append(source)
    if missing:
        raise MissingWeightsError(
            f"{recipe.name} needs " + " and ".join(f"{s.file}{_published_at(s)}" for s in missing),
            f"download and give {' '.join(f'{s.option} {s.file}' for s in missing)};"
            " or try the export without them: --random-weights 0",
        )
    return paths


def load_parts(
    recipe: Recipe, request: WeightRequest, sources: Mapping[str, Path] | None = None
) -> dict[str, nn.Module]:
    """Student, tokenizer and the teacher if it is wanted, connected, as torch modules.

    Raises:
        MissingWeightsError: a file is needed and was not given.
        CheckpointError: a file does not hold the recipe's model.
        RecipeError: a teacher is wanted that the recipe does not have.
    """
    roles = roles_of(recipe, request)
    if request.random_seed is not None:
        parts = {role: random_part(recipe, role, request.random_seed) for role in roles}
    else:
        sources = sources or sources_of(recipe, request)
        parts = {role: load_part(recipe, role, sources[role], request.weights) for role in roles}
    connect(parts["student"], parts["tokenizer"])
    return parts


def provenance(recipe: Recipe, request: WeightRequest, sources: Mapping[str, Path]) -> Weights:
    """What the manifest says of the weights: the hash of every file, or the seed."""
    if request.random_seed is not None:
        return Weights(kind="random", seed=request.random_seed)
    embedded = recipe.embedded and not request.files
    files = []
    for role, path in sources.items():
        sha256, size = fingerprint(path)
        copy = copy_taken(recipe, role, path, request.weights)
        files.append(
            WeightFile(role=role, file=path.absolute().name, sha256=sha256, bytes=size, weights=copy)
        )
    return Weights(kind="embedded" if embedded else "checkpoint", files=tuple(files))


def _published_at(source: Source) -> str:
    return f" (from {source.repo} on the Hugging Face Hub, {source.path})" if source.repo else ""
