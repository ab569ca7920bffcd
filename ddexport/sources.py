"""Which weights a bundle is made of: files, those that ship with the project, fetched or random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ddexport.families._checkpoint import connect, copy_taken, load_part, random_part
from ddexport.families._weight_file import CheckpointError, config_of, fingerprint
from ddexport.hub.files import HubFile, LocalFile, fetch, licence_remark
from ddexport.recipe import FILE_OPTIONS, Recipe, RecipeError, Source, embedded_weights, with_student
from ddexport.runtime.bundle import ENCODER, TEACHER, Weights
from ddexport.runtime.bundle import Source as WeightFile
from ddexport.runtime.errors import DDError


class MissingWeightsError(DDError):
    """Weights that were not given, and how to get them."""


@dataclass(frozen=True)
class WeightRequest:
    """Which weights a bundle is made of.

    Attributes:
        files: a file for each role; roles left out take the weights that ship with the project, if there are
            any, else those at the recipe's place on the Hugging Face Hub.
        weights: which state dict to take of a file that holds several, as for `load_part`.
        random_seed: random weights with this seed in place of all files.
        teacher: whether the teacher is wanted. None: where its weights are given or ship with the project, or
            where there is no student.
        text_encoder: whether that is wanted. None: where it is given or the recipe places it on the Hub.
        revision: of the student's repository, in place of the recipe's.
        cache: the directory of fetched files, None for huggingface_hub's.
    """

    files: Mapping[str, Path]
    weights: str | None = None
    random_seed: int | None = None
    teacher: bool | None = None
    text_encoder: bool | None = None
    revision: str | None = None
    cache: Path | None = None


def recipe_for(recipe: Recipe, request: WeightRequest) -> Recipe:
    """The recipe, with what a checkpoint of a student says of its training where the recipe does not say it.
    Raises `RecipeError`, `CheckpointError`."""
    path = request.files.get("student")
    if path is not None:
        return with_student(recipe, config_of(path), str(path))
    if not recipe.schedules and "student" in recipe.files and request.random_seed is None:
        hint = "state them in the recipe (docs/text-to-image.md), or give its file with --checkpoint"
        raise RecipeError(f"recipe {recipe.name} has a student and no schedules", hint)
    return recipe


def roles_of(recipe: Recipe, request: WeightRequest) -> tuple[str, ...]:
    """The parts that the bundle will hold. Raises `RecipeError` for one that the recipe does not have.

    Random weights come with a teacher only where it is asked for: it doubles the bundle.
    """
    parts: tuple[str, ...] = ("student", "tokenizer") if recipe.schedules else ("tokenizer",)
    parts += tuple(role for role in recipe.roles if _is_decoder_at_hand(recipe, request, role))
    if _is_encoder_wanted(recipe, request):
        parts += (ENCODER,)
    source = recipe.files.get(TEACHER)
    if unknown := [role for role in request.files if role not in recipe.roles]:
        hint = "it draws classes" if unknown[0] == ENCODER else "state its size under decoders"
        raise RecipeError(f"recipe {recipe.name} has no {unknown[0]}", hint)
    at_hand = source is not None and (TEACHER in request.files or bool(source.embedded))
    wanted = request.random_seed is None and at_hand if request.teacher is None else request.teacher
    if not recipe.schedules:
        if request.teacher is False:
            hint = "give a student with --checkpoint, or leave out --teacher none"
            raise RecipeError(f"no student of {recipe.name} is known, and nothing else draws", hint)
        wanted = True
    if not wanted:
        return parts
    if source is None or recipe.teacher is None:
        raise RecipeError(
            f"recipe {recipe.name} has no sampling settings for its teacher",
            "state files.teacher and teacher: {cfg, top_k, top_p, temperature}",
        )
    return (*parts, TEACHER)


def _is_decoder_at_hand(recipe: Recipe, request: WeightRequest, role: str) -> bool:
    """Whether there are weights of a further decoder. That of one tokenizer is of no use to another one."""
    if not role.startswith("decoder") or request.random_seed is not None or role in request.files:
        return role.startswith("decoder")
    source = recipe.files.get(role)
    return source is not None and "tokenizer" not in request.files and bool(source.embedded or source.repo)


def _is_encoder_wanted(recipe: Recipe, request: WeightRequest) -> bool:
    """Whether the bundle gets a text encoder. Raises `RecipeError` if it is wanted and nowhere."""
    source = recipe.files.get(ENCODER, Source())
    at_hand = ENCODER in request.files or bool(source.repo or source.embedded)
    at_hand &= recipe.condition is not None and request.random_seed is None
    if request.text_encoder and not at_hand:
        how = "give its directory: --text-encoder DIR; there is no random one"
        raise RecipeError(f"there is no text encoder of {recipe.name} to take", how)
    return at_hand and request.text_encoder is not False


def sources_of(recipe: Recipe, request: WeightRequest) -> dict[str, LocalFile]:
    """The file of each role, none for random weights; what was not given is fetched.

    Raises:
        MissingWeightsError: names file and option of all that were not given and are nowhere on the Hub.
        HubError: a file cannot be fetched.
        RecipeError: a teacher is wanted that the recipe does not have.
    """
    roles = roles_of(recipe, request)
    if request.random_seed is not None:
        return {}
    sources: dict[str, LocalFile] = {}
    published: dict[str, HubFile] = {}
    missing: dict[str, str] = {}  # by option
    beside: list[HubFile] = []
    for role in roles:
        source = recipe.files.get(role, Source())
        if role in request.files:
            sources[role] = _local(request.files[role])
            if not sources[role].path.exists():  # known before anything is fetched
                raise CheckpointError(f"there is no file {request.files[role]}", "check the path")
        elif source.embedded:
            sources[role] = _local(embedded_weights(source))
        elif source.repo:
            of_student = source.repo == recipe.files.get("student", Source()).repo
            revision = (of_student and request.revision) or source.revision or None
            published[role] = HubFile(source.repo, source.path or source.file, revision)
            beside += [HubFile(source.repo, name, revision) for name in source.beside]
        else:
            missing[source.option or FILE_OPTIONS[role]] = source.file
    if missing:
        raise MissingWeightsError(
            f"{recipe.name} needs {' and '.join(missing.values())}",
            f"give {' '.join(f'{option} {file}' for option, file in missing.items())};"
            " or try the export without them: --random-weights 0",
        )
    if published:
        files = fetch([*published.values(), *beside], request.cache, licence_remark(recipe.licence))
        sources |= dict(zip(published, files, strict=False))  # `beside` lies beside
        if ENCODER in published:
            sources[ENCODER] = sources[ENCODER]._replace(path=sources[ENCODER].path.parent)
    return sources


def _local(path: Path) -> LocalFile:
    return LocalFile(path, path.absolute().name)


def load_parts(
    recipe: Recipe, request: WeightRequest, sources: Mapping[str, LocalFile] | None = None
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
        parts = {role: _loaded(recipe, role, sources[role].path, request.weights) for role in roles}
    for part in parts.values():
        connect(part, parts["tokenizer"])
    return parts


def _loaded(recipe: Recipe, role: str, path: Path, weights: str | None) -> nn.Module:
    if role == ENCODER:
        from ddexport.text_encoder import text_encoder

        return text_encoder(path)
    return load_part(recipe, role, path, weights)


def provenance(recipe: Recipe, request: WeightRequest, sources: Mapping[str, LocalFile]) -> Weights:
    """What the manifest says of the weights: the hash of every file and where it is from, or the seed."""
    if request.random_seed is not None:
        return Weights(kind="random", seed=request.random_seed)
    embedded = recipe.embedded and not request.files
    files = []
    for role, (path, name, repository, commit) in sources.items():
        sha256, size = fingerprint(path)
        copy = None if role == ENCODER else copy_taken(recipe, role, path, request.weights)
        origin: dict[str, Any] = {"file": name, "repository": repository, "commit": commit}
        files.append(WeightFile(role=role, sha256=sha256, bytes=size, weights=copy, **origin))
    return Weights(kind="embedded" if embedded else "checkpoint", files=tuple(files))
