"""The `distill:` section of a recipe: every number of a training run, read strictly."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from ddexport.families import family
from ddexport.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class Augmentation:
    """A random turn of up to `degrees`, shift of up to `shift` pixels, scaling by 1 +- `scale`, an image."""

    degrees: float
    shift: float
    scale: float


@dataclass(frozen=True)
class Loop:
    """One optimisation: AdamW, warm-up, cosine to zero, gradients clipped at norm 1.

    `ema` is the decay of the averaged weights, which are the result; 0 takes the last weights.
    """

    iterations: int
    batch: int
    rate: float
    warmup: int = 100
    decay: float = 0.01
    beta2: float = 0.95
    ema: float = 0.0


@dataclass(frozen=True)
class TokenizerSettings(Loop):
    """Encoder, codebook and decoder together.

    The first `continuous` iterations do without the quantiser: codes that start among latents which say
    nothing yet would pull these together. `absolute` weighs |error| against squared error, `commitment` the
    pull of the encoder towards its codes, `prefix` is the share of images that are decoded from a random
    number of leading scales (where there are several); codes that nothing chose for `reseed` iterations
    restart from residuals, until half of the run.
    """

    continuous: int = 200
    absolute: float = 0.5
    commitment: float = 0.25
    prefix: float = 0.5
    reseed: int = 50


@dataclass(frozen=True)
class TeacherSettings(Loop):
    """`copies` augmented copies of the data are tokenised; the share `drop_label` of labels becomes null."""

    copies: int = 15
    drop_label: float = 0.1


@dataclass(frozen=True)
class PairSettings:
    """`count` noise -> token pairs; guidance, which each family counts in its own way
    (`ddexport/distill/trainers/`), and top-k (0: all) act on the probabilities before the map.
    """

    count: int
    guidance: float
    top_k: int = 0
    steps: int = 32


@dataclass(frozen=True)
class StudentSettings(Loop):
    """`timesteps`: the numbers of known AR steps to train from; `regression` weighs the embeddings' loss."""

    timesteps: tuple[int, ...] = (0,)
    regression: float = 1.0


@dataclass(frozen=True)
class DistillSettings:
    """All stages of one run."""

    data: str
    augment: Augmentation
    tokenizer: TokenizerSettings
    decoder: Loop
    teacher: TeacherSettings
    pairs: PairSettings
    student: StudentSettings


_PARTS = {
    "augment": Augmentation,
    "tokenizer": TokenizerSettings,
    "decoder": Loop,
    "teacher": TeacherSettings,
    "pairs": PairSettings,
    "student": StudentSettings,
}


def distill_settings(recipe: Recipe) -> DistillSettings:
    """The settings of `recipe`. Raises RecipeError for none, or a wrong key."""
    where = f"{recipe.name}: distill"
    if not recipe.distill:
        raise RecipeError(
            f"the recipe {recipe.name} has no distill section, so it cannot be trained here",
            "see recipes/digits-var.yaml",
        )
    values = _fields(DistillSettings, recipe.distill, where)
    for part, cls in _PARTS.items():
        values[part] = _build(cls, values[part], f"{where}.{part}")
    settings = DistillSettings(**values)
    steps = len(family(recipe.family).geometry(recipe).starts) - 1
    if not settings.student.timesteps or any(not 0 <= t < steps for t in settings.student.timesteps):
        raise RecipeError(
            f"{where}.student.timesteps: {list(settings.student.timesteps)} are not numbers of AR steps",
            f"each from 0 to {steps - 1}",
        )
    return settings


def quick(settings: DistillSettings) -> DistillSettings:
    """A few iterations of everything: proves that the stages fit together, trains nothing of use."""
    short: dict[str, Any] = {"iterations": 3, "batch": 8, "warmup": 1}
    return dataclasses.replace(
        settings,
        tokenizer=dataclasses.replace(settings.tokenizer, **short, continuous=1),
        decoder=dataclasses.replace(settings.decoder, **short),
        teacher=dataclasses.replace(settings.teacher, **short, copies=1),
        pairs=dataclasses.replace(settings.pairs, count=64, steps=4),
        student=dataclasses.replace(settings.student, **short),
    )


def _build(cls: type, data: Any, where: str) -> Any:
    values = _fields(cls, data, where)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value = values[field.name]
        if str(field.type).startswith("tuple"):
            if not isinstance(value, list) or any(type(v) is not int for v in value):
                raise RecipeError(
                    f"{where}.{field.name}: {value!r} is not a list of whole numbers", "correct it"
                )
            values[field.name] = tuple(value)
        elif type(value) not in ((int,) if field.type == "int" else (int, float)) or value < 0:
            raise RecipeError(
                f"{where}.{field.name}: {value!r} is not a {field.type} of 0 or more", "correct it"
            )
    return cls(**values)


def _fields(cls: type, data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected keys and values, found {data!r}", "see recipes/digits-var.yaml")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise RecipeError(f"{where}: unknown key {key}", f"{guess}keys: {', '.join(known)}")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in data:
            raise RecipeError(f"{where}: the key {name} is missing", "see recipes/digits-var.yaml")
    return dict(data)
