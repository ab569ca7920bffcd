"""Recipes: everything about a model that is data, one YAML file each.

A recipe is read strictly. An unknown key, a missing one or two numbers that contradict each other is an
error that names the key, so that a typing mistake never becomes a silently different model.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from ddexport.runtime.errors import DDError
from ddexport.runtime.schedules import Schedule, Span

SCHEMA = 1
ROLES = ("student", "tokenizer", "teacher")
IMAGES = "images"
FID = "fid"  # the entry of `parity` that is no precision
TYPES: dict[str, Any] = {"int": int, "float": (int, float), "str": str}


class RecipeError(DDError):
    """A recipe that does not exist, has a wrong key, or contradicts itself."""


@dataclass(frozen=True)
class Image:
    """The images a model draws: `size` is the side in pixels."""

    size: int
    channels: int = 3


@dataclass(frozen=True)
class Sequence:
    """The student's token sequence: `length` L positions of `width` Cv numbers, `codebook` V entries.

    Positions before `split` are codebook entries, from it on regressed embeddings.
    """

    length: int
    width: int
    codebook: int
    split: int


@dataclass(frozen=True)
class Sampling:
    """How the teacher draws unless a request says otherwise: guidance, and which tokens can be drawn."""

    cfg: float
    top_k: int
    top_p: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Source:
    """Where the weights of one part come from: a published file, or one that ships with the project.

    `option` is the command-line option that takes the file; `repo`, `path` its place on the Hugging Face Hub.
    """

    option: str = ""
    file: str = ""
    repo: str = ""
    path: str = ""
    embedded: str = ""


@dataclass(frozen=True)
class Limits:
    """What `validate parity` allows in one precision (docs/parity.md). provisional: guessed, not measured."""

    token_margin: float
    embedding_error: float
    image_psnr: float
    image_max: int
    logits_rms: float | None = None
    tokens_differing: float | None = None
    histogram_bias: float | None = None
    pixel_psnr: float | None = None
    images_left_out: float | None = None
    drawn_left_out: float | None = None
    provisional: bool = False


@dataclass(frozen=True)
class FidLimits:
    """What `validate fid` allows in one precision (docs/image-quality.md).

    `difference`: of the two Frechet distances to the reference set. `distance`: paired feature distance over
    that of unrelated images. `changed`: share of images that differ visibly. None: shown, but not held.
    """

    difference: float
    distance: float | None = None
    changed: float | None = None
    provisional: bool = False


@dataclass(frozen=True)
class FidGate:
    """How `validate fid` measures a model unless told otherwise: `parity.fid` of a recipe.

    `reference` is `data`, the model's own data set, or empty where the user has to name one. The limits hold
    for so many `images`, one set for each precision.
    """

    features: str
    images: int
    limits: dict[str, FidLimits]
    reference: str = ""


@dataclass(frozen=True)
class Recipe:
    """One model. `model`, `tokenizer` and `distill` belong to the family and the trainer, who check them.

    `parameters` counts the learned numbers of each part, for lists that must not import torch.
    """

    schema: int
    name: str
    title: str
    family: str
    image: Image
    sequence: Sequence
    classes: int
    labels: str
    schedules: dict[str, Schedule]
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    files: dict[str, Source]
    parity: dict[str, Any]  # a precision -> Limits, `fid` -> FidGate, `images` -> how many are compared
    teacher: Sampling | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    licence: dict[str, str] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        """Whether the weights ship with the project."""
        return bool(self.files["student"].embedded)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data; `recipe_from_dict` reads it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


def recipe_names() -> list[str]:
    """The recipes that ship with the project, sorted."""
    folder = resources.files("ddexport.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe called `name`, or the one in the YAML file at that path. Raises `RecipeError`."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(
                f"no recipe file at {name}", "give a path to a YAML file, or a name of `ddexport models`"
            )
        return _parse(path.read_bytes(), name)
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"there is no model called {name}", f"{guess}models: {', '.join(names)}")
    return _parse((resources.files("ddexport.recipes") / f"{name}.yaml").read_bytes(), f"{name}.yaml")


def class_names(recipe: Recipe) -> dict[str, Any]:
    """The label list of the recipe as stored: {"names": [...], "aliases": {...}}. Raises `RecipeError`."""
    entry = resources.files("ddexport.recipes") / "labels" / f"{recipe.labels}.json"
    if not entry.is_file():
        raise RecipeError(
            f"recipe {recipe.name}: there is no label list {recipe.labels}", "see recipes/labels/"
        )
    data: dict[str, Any] = json.loads(entry.read_text(encoding="utf-8"))
    if len(data["names"]) != recipe.classes:
        raise RecipeError(
            f"recipe {recipe.name}: the label list {recipe.labels} has {len(data['names'])} names,"
            f" the model {recipe.classes} classes",
            "name another list under `labels`",
        )
    return data


def embedded_weights(source: Source) -> Path:
    """The file of weights that ships with the project. Raises `RecipeError` if it is not there."""
    path = Path(str(resources.files("ddexport.recipes") / "weights" / source.embedded))
    if not path.is_file():
        raise RecipeError(
            f"the embedded weights {source.embedded} are missing",
            f"train them: ddexport distill {source.embedded.rsplit('-', 1)[0]} --install",
        )
    return path


def recipe_from_dict(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Builds and checks a recipe from plain data. Raises `RecipeError` that names the key at fault."""
    if data.get("schema", SCHEMA) != SCHEMA:
        raise RecipeError(f"{where}: recipe schema {data['schema']} is not {SCHEMA}", "upgrade ddexport")
    fields = _checked(Recipe, data, where)
    _check_types(Recipe, fields, where)
    fields["image"] = _build(Image, fields["image"], f"{where}: image")
    fields["sequence"] = _build(Sequence, fields["sequence"], f"{where}: sequence")
    fields["schedules"] = {
        str(steps): _schedule(value, f"{where}: schedules.{steps}")
        for steps, value in fields["schedules"].items()
    }
    fields["files"] = {
        role: _build(Source, value, f"{where}: files.{role}") for role, value in fields["files"].items()
    }
    fields["parity"] = {
        key: _fid_gate(value, f"{where}: parity.fid")
        if key == FID
        else value
        if key == IMAGES
        else _build(Limits, value, f"{where}: parity.{key}")
        for key, value in fields["parity"].items()
    }
    if fields.get("teacher") is not None:
        fields["teacher"] = _build(Sampling, fields["teacher"], f"{where}: teacher")
    recipe = Recipe(**fields)
    _check_consistency(recipe, where)
    return recipe


def _parse(text: bytes, where: str) -> Recipe:
    try:
        import yaml
    except ImportError as error:
        raise RecipeError("reading recipes needs PyYAML", 'pip install "ddexport[export]"') from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not YAML: {str(error).splitlines()[0]}", "correct the file") from error
    except Exception as error:  # a value that is not what its tag or form says, or nested thousands deep
        raise RecipeError(f"{where} holds no value of YAML: {error}", "correct the file") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is not a recipe: it holds no keys", "start from one in recipes/")
    return recipe_from_dict(data, where)


def _checked(cls: type, data: Any, where: str) -> dict[str, Any]:
    """`data` as keyword arguments of the dataclass `cls`: no unknown key, none missing."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected keys and values, found {data!r}", "see a recipe in recipes/")
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise RecipeError(f"{where}: unknown key {key}", f"{guess}keys: {', '.join(known)}")
    for name, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise RecipeError(f"{where}: the key {name} is missing", "see a recipe in recipes/")
    return dict(data)


def _build(cls: type, data: Any, where: str) -> Any:
    values = _checked(cls, data, where)
    _check_types(cls, values, where)
    return cls(**values)


def _check_types(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Numbers, texts and sections must be such; nested dataclasses check themselves when they are built."""
    for f in dataclasses.fields(cls):
        kind = str(f.type)
        wanted = Mapping if kind.startswith("dict") else TYPES.get(kind)
        value = values.get(f.name)
        if f.name in values and wanted and (not isinstance(value, wanted) or isinstance(value, bool)):
            what = "keys and values" if wanted is Mapping else kind
            raise RecipeError(f"{where}: {f.name}: {value!r} is not of type {what}", "correct the value")


def _fid_gate(data: Any, where: str) -> FidGate:
    values = _checked(FidGate, data, where)
    _check_types(FidGate, values, where)
    limits = {
        precision: _build(FidLimits, value, f"{where}.limits.{precision}")
        for precision, value in values["limits"].items()
    }
    for precision, limit in limits.items():
        for key, value in vars(limit).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key != "provisional" and value is not None and not (number and value >= 0):
                raise RecipeError(
                    f"{where}.limits.{precision}: {key}: {value!r} is no limit", "give a number from 0 on"
                )
    if values["images"] < 1:
        raise RecipeError(
            f"{where}: images: {values['images']!r} is no size", "give a whole number from 1 on"
        )
    return FidGate(**{**values, "limits": limits})


def _schedule(data: Any, where: str) -> Schedule:
    values = _checked(Schedule, data, where)
    known, split, span = values["known"], values.get("split"), values.get("teacher")
    if not isinstance(known, list) or any(type(k) is not int for k in known):
        raise RecipeError(f"{where}.known: {known!r} is not a list of positions", "correct the value")
    if split is not None and type(split) is not int:
        raise RecipeError(f"{where}.split: {split!r} is not a position", "correct the value")
    if span is not None:
        span = _build(Span, span, f"{where}.teacher")
    return Schedule(tuple(known), split, span)


def _check_sizes(recipe: Recipe, where: str) -> None:
    """Sizes are whole numbers from 1 on, those of the family's sections too, or lists of such."""
    sections = {
        "image": vars(recipe.image),
        "sequence": vars(recipe.sequence),
        "model": recipe.model,
        "tokenizer": recipe.tokenizer,
    }
    sizes = {f"{section}.{key}": v for section, values in sections.items() for key, v in values.items()}
    for key, value in {"classes": recipe.classes, **sizes}.items():
        numbers = value if isinstance(value, list) and value else [value]
        if any(type(n) is not int or n < 1 for n in numbers):
            raise RecipeError(f"{where}: {key}: {value!r} is no size", "give a whole number from 1 on")


def _check_schedule(steps: str, schedule: Schedule, recipe: Recipe, where: str) -> None:
    """All but what only the family knows: where the teacher's AR steps start, and so how many there are."""
    known, span, length = schedule.known, schedule.teacher, recipe.sequence.length
    if schedule.split is not None and not 1 <= schedule.split <= length:
        raise RecipeError(
            f"{where}: schedule {steps} has split {schedule.split}", f"a position from 1 to {length}"
        )
    if span is None:
        rising = all(before < after for before, after in pairwise(known))
        if str(len(known)) != steps or known[:1] != (0,) or not rising or known[-1] >= length:
            raise RecipeError(
                f"{where}: schedule {steps} has known {list(known)}",
                f"one number a step, the first 0, rising, each below {length}",
            )
        return
    if not 0 <= span.start < span.end <= length:
        raise RecipeError(
            f"{where}: schedule {steps} has a teacher from {span.start} to {span.end}",
            f"two rising positions within the {length}",
        )
    wanted = ([0] if span.start else []) + ([span.end] if span.end < length else [])
    if list(known) != wanted or not steps.isdecimal():
        raise RecipeError(
            f"{where}: schedule {steps} has known {list(known)} around the teacher's"
            f" positions {span.start} to {span.end}",
            f"known: {wanted}, a student step before the teacher's first position and one after its last",
        )
    if recipe.teacher is None or "teacher" not in recipe.files:
        raise RecipeError(
            f"{where}: schedule {steps} involves a teacher",
            "say where its weights come from, files.teacher, and how it draws,"
            " teacher: {cfg, top_k, top_p, temperature}",
        )


def _check_sampling(sampling: Sampling, where: str) -> None:
    rules = (
        ("cfg", sampling.cfg >= 0, "at least 0"),
        ("top_k", sampling.top_k >= 1, "at least 1"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("temperature", sampling.temperature > 0, "above 0"),
    )
    for key, holds, rule in rules:
        if not holds:
            raise RecipeError(f"{where}: teacher.{key} is {getattr(sampling, key)}", f"it is {rule}")


def _check_consistency(recipe: Recipe, where: str) -> None:
    _check_sizes(recipe, where)
    length, split = recipe.sequence.length, recipe.sequence.split
    if split > length:
        raise RecipeError(
            f"{where}: split {split} is not within the {length} positions", "correct sequence.split"
        )
    if not recipe.schedules:
        raise RecipeError(f"{where}: there are no schedules", 'give at least "1": {known: [0]}')
    for steps, schedule in recipe.schedules.items():
        _check_schedule(steps, schedule, recipe, where)
    if recipe.teacher is not None:
        _check_sampling(recipe.teacher, where)
    for role in ROLES[:2]:
        if role not in recipe.files:
            raise RecipeError(f"{where}: files.{role} is missing", "name where its weights come from")
    for role, source in recipe.files.items():
        if role not in ROLES:
            raise RecipeError(f"{where}: files has an unknown part {role}", f"parts: {', '.join(ROLES)}")
        if not source.embedded and not (source.option and source.file):
            raise RecipeError(
                f"{where}: files.{role} does not say where its weights come from",
                "give option and file (and repo and path of a published one), or embedded",
            )
