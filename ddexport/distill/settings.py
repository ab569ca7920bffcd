"""The `distill:` section of a recipe: every number of a training run, read strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from ddexport.families import family
from ddexport.recipe import Recipe, RecipeError
from ddexport.runtime.records import Natural, Positive, Record, convert

HINT = "Correct it; recipes/digits-var.yaml is an example."

Weight = Annotated[float, Meta(ge=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]


class Augmentation(Record, frozen=True):
    """A random turn of up to `degrees`, shift of up to `shift` pixels, scaling by 1 +- `scale`, an image."""

    degrees: Weight
    shift: Weight
    scale: Share


class Loop(Record, frozen=True):
    """One optimisation: AdamW, warm-up, cosine to zero, gradients clipped at norm 1.

    `ema` is the decay of the averaged weights, which are the result; 0 takes the last weights.
    """

    iterations: Positive
    batch: Positive
    rate: Weight
    warmup: Natural = 100
    decay: Weight = 0.01
    beta2: Decay = 0.95
    ema: Decay = 0.0


class TokenizerSettings(Loop, frozen=True):
    """Encoder, codebook and decoder together.

    The first `continuous` iterations do without the quantiser: codes that start among latents which say
    nothing yet would pull these together. `absolute` weighs |error| against squared error, `commitment` the
    pull of the encoder towards its codes, `prefix` is the share of images that are decoded from a random
    number of leading scales (where there are several); codes that nothing chose for `reseed` iterations
    restart from residuals, until half of the run. `foreground` is what pixels that differ from the corner of
    the image weigh more than others: thin strokes are few.
    """

    continuous: Natural = 200
    absolute: Weight = 0.5
    commitment: Weight = 0.25
    prefix: Share = 0.5
    reseed: Positive = 50
    foreground: Weight = 0.0


class TeacherSettings(Loop, frozen=True):
    """`copies` augmented copies of the data are tokenised; the share `drop_label` of labels becomes null."""

    copies: Positive = 15
    drop_label: Share = 0.1


class PairSettings(Record, frozen=True):
    """`count` noise -> token pairs; guidance, which each family counts for itself
    (`ddexport/distill/trainers/`), and top-k (0: all) act on the probabilities before the map. `batch` of
    them are made at once.
    """

    count: Positive
    guidance: Weight
    top_k: Natural = 0
    steps: Positive = 32
    batch: Positive = 1000


class StudentSettings(Loop, frozen=True):
    """`timesteps`: the numbers of known AR steps to train from; `regression` weighs the embeddings' loss."""

    timesteps: Annotated[tuple[Natural, ...], Meta(min_length=1)] = (0,)
    regression: Weight = 1.0


class SmallDecoderSettings(Loop, frozen=True):
    """The newest `chunks` chunks of `chunk` sequences are trained on; every `refresh` iterations another one
    is drawn and decoded. `random` is the share of sequences of random codes, `teacher` that of the teacher's,
    if there is one, with that `guidance`; the student draws the others. `finish` is a second loop, in which
    errors are squared and the worst images weigh most.
    """

    chunk: Positive = 1000
    chunks: Positive = 16
    refresh: Positive = 500
    random: Share = 0.08
    teacher: Share = 0.12
    guidance: Weight = 1.0
    finish: Loop | None = None


class TextEncoderSize(Record, frozen=True):
    """A T5 encoder that is trained with the teacher: layers, heads, and the inner width of its networks. So
    many `images` of a batch share a sentence, which is then read once.
    """

    layers: Positive
    heads: Positive
    hidden: Positive
    images: Positive = 4


class DistillSettings(Record, frozen=True):
    """All stages of one run."""

    data: str
    augment: Augmentation
    tokenizer: TokenizerSettings
    decoder: Loop
    teacher: TeacherSettings
    pairs: PairSettings
    student: StudentSettings
    text_encoder: TextEncoderSize | None = None


class PromptSettings(Record, frozen=True):
    """A student of a published text model: what it is trained for (docs/text-to-image.md), its pairs, of
    which so many `images` in a row have a prompt, and its training.
    """

    schedules: dict[str, Any]
    split: Positive
    vector: Literal["last", "mean"]
    pairs: PairSettings
    student: StudentSettings
    images: Positive = 4


def prompt_settings(recipe: Recipe) -> PromptSettings:
    """Those of a recipe whose student is trained from prompts. Raises RecipeError for none, or a wrong
    key."""
    if not recipe.condition or "data" in recipe.distill or not recipe.distill:
        hint = "llamagen-t2i-xl is one; docs/text-to-image.md says what a recipe needs"
        raise RecipeError(f"{recipe.name} has no student that is trained from prompts", hint)
    settings = convert(PromptSettings, recipe.distill, f"{recipe.name}: distill", RecipeError, HINT)
    where = f"{recipe.name}: distill"
    _check_shares(settings.images, settings.pairs, settings.student, where=where)
    _check_timesteps(recipe, settings.student, where)
    return settings


def _check_shares(images: int, pairs: PairSettings, *loops: Loop, where: str) -> None:
    """Raises RecipeError unless as many images share a text in every batch."""
    if any(size % images for size in (pairs.count, pairs.batch, *(loop.batch for loop in loops))):
        hint = f"make them multiples of {images}"
        raise RecipeError(
            f"{where}: {images} images share a text, but batches or pairs.count do not fit", hint
        )


def _check_timesteps(recipe: Recipe, student: StudentSettings, where: str) -> None:
    """Raises RecipeError unless the model has so many AR steps."""
    steps = len(family(recipe.family).geometry(recipe).starts) - 1
    if max(student.timesteps) >= steps:
        raise RecipeError(
            f"{where}: student.timesteps: {list(student.timesteps)} are not numbers of AR steps",
            f"each from 0 to {steps - 1}",
        )


def distill_settings(recipe: Recipe) -> DistillSettings:
    """The settings of `recipe`. Raises RecipeError for none, or a wrong key."""
    where = f"{recipe.name}: distill"
    if not recipe.distill:
        hint = "give a recipe with such a section; recipes/digits-var.yaml is an example"
        raise RecipeError(f"the recipe {recipe.name} has no section `distill`: it cannot be trained", hint)
    if recipe.condition and "data" not in recipe.distill:
        hint = f"give them: ddexport distill {recipe.name} --prompts FILE"
        raise RecipeError(f"the student of {recipe.name} is trained from prompts", hint)
    settings = convert(DistillSettings, recipe.distill, where, RecipeError, HINT)
    if (settings.text_encoder is None) != (recipe.condition is None):
        raise RecipeError(f"{where}: text_encoder must be there if the model draws from texts", HINT)
    if size := settings.text_encoder:
        _check_shares(size.images, settings.pairs, settings.teacher, settings.student, where=where)
    _check_timesteps(recipe, settings.student, where)
    return settings


def decoder_settings(recipe: Recipe, name: str) -> SmallDecoderSettings:
    """The settings of a decoder of `recipe`. Raises RecipeError for none, or a wrong key."""
    size = recipe.decoders.get(name)
    if size is None or not size.distill:
        raise RecipeError(
            f"the recipe {recipe.name} does not say how its decoder {name} is trained",
            f"state decoders.{name}.distill; recipes/digits-var.yaml is an example",
        )
    where = f"{recipe.name}: decoders.{name}.distill"
    settings = convert(SmallDecoderSettings, size.distill, where, RecipeError, HINT)
    if settings.random + settings.teacher > 1:
        raise RecipeError(f"{where}: random and teacher are more than 1 together", HINT)
    if all(schedule.teacher for schedule in recipe.schedules.values()):
        raise RecipeError(f"{where}: the recipe has no schedule of the student alone", "state one")
    return settings


def quick_decoder(settings: SmallDecoderSettings) -> SmallDecoderSettings:
    """A few iterations, as `quick`."""
    short: dict[str, Any] = {"iterations": 3, "batch": 8, "warmup": 1}
    finish = replace(settings.finish, **short) if settings.finish else None
    return replace(settings, **short, chunk=8, chunks=2, refresh=2, finish=finish)


def quick_prompts(settings: PromptSettings) -> PromptSettings:
    """A few iterations, as `quick`."""
    pairs = replace(settings.pairs, count=2 * settings.images, steps=4)
    student = replace(settings.student, iterations=3, batch=settings.images, warmup=1)
    return replace(settings, pairs=pairs, student=student)


def quick(settings: DistillSettings) -> DistillSettings:
    """A few iterations of everything: proves that the stages fit together, trains nothing of use."""
    short: dict[str, Any] = {"iterations": 3, "batch": 8, "warmup": 1}
    return replace(
        settings,
        tokenizer=replace(settings.tokenizer, **short, continuous=1),
        decoder=replace(settings.decoder, **short),
        teacher=replace(settings.teacher, **short, copies=1),
        pairs=replace(settings.pairs, count=64, steps=4),
        student=replace(settings.student, **short),
    )
