"""Recipes: everything about a model that is data, one YAML file each.

A recipe is read strictly. An unknown key, a missing one or two numbers that contradict each other is an
error that names the key, so that a typing mistake never becomes a silently different model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import structs

from ddexport.hub.files import SCHEME, HubFile, fetch, parse
from ddexport.runtime.bundle import ENCODER, SequenceSize, decoder_role
from ddexport.runtime.errors import DDError, did_you_mean
from ddexport.runtime.records import Natural, Positive, Record, convert
from ddexport.runtime.schedule import Schedule, schedule_fault

if TYPE_CHECKING:
    from ddexport.runtime.bundle import Manifest

SCHEMA = 1
FILE_OPTIONS = {
    "student": "--checkpoint",
    "tokenizer": "--vae",
    "teacher": "--teacher",
    "decoder_small": "--small-decoder",
    "text_encoder": "--text-encoder",
}
ROLES = tuple(FILE_OPTIONS)[:3]
ENCODER_FILES = ("config.json", "tokenizer.json", "model.safetensors")
FILE_NAME = "recipe.yaml"  # of a model of a user's own, in its directory or repository
WHAT_IS_A_MODEL = "a recipe file (YAML), or a directory or hf://USER/NAME with a recipe.yaml and weights"
MAX_BYTES = 1 << 20
HINT = "Correct it; the recipes in recipes/ are examples."

Limit = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Size: TypeAlias = Positive | Annotated[list[Positive], msgspec.Meta(min_length=1)]


class RecipeError(DDError):
    """A recipe that does not exist, has a wrong key, or contradicts itself."""


class Image(Record, frozen=True):
    """The images a model generates: `size` is the side in pixels."""

    size: Positive
    channels: Positive = 3


class TextCondition(Record, frozen=True):
    """Images of a text: `tokens` rows of features of that `width` at most, left-padded.

    vector: the row of the embedded text that the student's embeddings are conditioned on, the last one or the
    mean of all; None where no student is known. examples: prompts in lower case that checks draw, in place of
    trial prompts about anything.
    """

    kind: Literal["text"]
    tokens: Positive
    width: Positive
    vector: Literal["last", "mean"] | None = None
    examples: tuple[str, ...] = ()


class Sampling(Record, frozen=True):
    """How the teacher chooses tokens unless a request says otherwise: guidance, and which are possible."""

    cfg: Limit
    top_k: Positive
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)]
    temperature: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1.0


class Source(Record, frozen=True):
    """Where the weights of one part come from: a published file, or one that ships with the project.

    `option` is the command-line option that takes the file; `repo`, `path` and `revision` its place on the
    Hugging Face Hub. A `file` that lies in the model's directory is taken from there. beside: further files
    of the repository, where the part is the directory that they lie in.
    """

    option: str = ""
    file: str = ""
    repo: str = ""
    path: str = ""
    revision: str = ""
    embedded: str = ""
    beside: tuple[str, ...] = ()


class Limits(Record, frozen=True):
    """What `validate parity` allows in one precision; docs/validation.md says what each holds.

    token_margin: a difference of one logit. logits_rms: of all. tokens_differing: share of the tokens
    decided. histogram_bias: total variation of the mean probabilities of the tokens. embedding_error: rms
    error / rms. image_psnr: dB, of the decoder's images in [0, 1]; pixel_psnr: of the 8-bit images that users
    get. image_max: largest difference of an 8-bit value. images_left_out: share of the images whose tokens
    differ. decoder_psnr: dB, of a further decoder's images, if not image_psnr. provisional: guessed, not
    measured. None: shown, without a limit; `validate parity` wants all.
    """

    token_margin: Limit
    embedding_error: Limit
    image_psnr: Limit
    image_max: Natural
    logits_rms: Limit | None = None
    tokens_differing: Limit | None = None
    histogram_bias: Limit | None = None
    pixel_psnr: Limit | None = None
    images_left_out: Limit | None = None
    drawn_left_out: Limit | None = None
    decoder_psnr: Limit | None = None
    provisional: bool = False


class FidLimits(Record, frozen=True):
    """What `validate fid` allows in one precision (docs/validation.md).

    `difference`: of the two Frechet distances to the reference set. `distance`: paired feature distance over
    that of unrelated images. `changed`: share of images that differ visibly. None: shown, but not held.
    """

    difference: Limit
    distance: Limit | None = None
    changed: Limit | None = None
    provisional: bool = False


class DecoderLimits(Record, frozen=True):
    """What `validate fid --decoder NAME` allows.

    increase: of the FID, as a share, by the upper end of its 95 % interval. read: the difference of the
    shares of images that are read as the class asked for.
    """

    increase: Limit
    read: Limit | None = None


class FidGate(Record, frozen=True):
    """How `validate fid` measures a model unless told otherwise.

    `reference` is `data`, the model's own data set, or empty where the user has to name one. The limits hold
    for so many `images`. decoders: of those that are distilled, in every precision.
    """

    features: str
    images: Positive
    limits: dict[Literal["fp32", "fp16", "bf16", "int8"], FidLimits]
    reference: str = ""
    decoders: DecoderLimits | None = None


class Parity(Record, frozen=True):
    """The limits of each precision, how many `images` are compared, and the gate of image quality."""

    images: Positive | None = None
    fp32: Limits | None = None
    fp16: Limits | None = None
    bf16: Limits | None = None
    int8: Limits | None = None
    fid: FidGate | None = None

    def limits(self, precision: str) -> Limits | None:
        """Those of a precision, None where none are stated."""
        return {"fp32": self.fp32, "fp16": self.fp16, "bf16": self.bf16, "int8": self.int8}.get(precision)


class DecoderSize(Record, frozen=True):
    """A decoder with fewer operations than the tokenizer's, distilled from it (docs/small-decoders.md).

    widths: the channels at each side, from the latent's to half the image's, which doubles between two.
    blocks: how many residual blocks there are at each. distill: the numbers of its training, which the
    trainer checks. fid: by number of steps, the change of the FID that `validate fid` measured, as a share,
    and its 95 % interval.
    """

    widths: tuple[Positive, ...]
    blocks: tuple[Natural, ...]
    distill: dict[str, Any] = {}
    fid: dict[str, tuple[float, float, float]] = {}


class Recipe(Record, frozen=True):
    """One model. `model`, `tokenizer` and `distill` belong to the family and the trainer, who check them.

    labels: the names of the classes, or the list in recipes/labels/ that has them. condition: a text, in
    place of classes; then a student may be unknown, which has no schedules. group_norm: how the decoder's
    graph states them, as ReduceMean by channel, which is faster on CPUs, or as InstanceNormalization between
    Reshapes, which is on GPUs. parameters: counts the learned numbers of each part, for lists that must not
    import torch.
    """

    schema: int
    name: str
    title: str
    family: str
    image: Image
    sequence: SequenceSize
    model: dict[str, Size]
    tokenizer: dict[str, Size]
    files: dict[str, Source]
    parity: Parity
    classes: Natural = 0
    labels: str | list[str] = ""
    condition: TextCondition | None = None
    schedules: dict[str, Schedule] = {}
    teacher: Sampling | None = None
    decoders: dict[Annotated[str, msgspec.Meta(pattern="^small$")], DecoderSize] = {}
    group_norm: Literal["reduce", "instance"] = "reduce"
    parameters: dict[str, Positive] = {}
    licence: dict[str, str] = {}
    published: dict[str, Any] = {}
    distill: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """Raises ValueError where the recipe contradicts itself."""
        length = self.sequence.length
        if self.sequence.split > length:
            raise ValueError(f"sequence.split is {self.sequence.split}, past the length {length}")
        self._check_condition()
        # Where the AR steps of a teacher start is for the family to say.
        starts = () if self.teacher is None or "teacher" not in self.files else None
        for steps, schedule in self.schedules.items():
            if not re.fullmatch("[1-9][0-9]{0,8}", steps):
                raise ValueError(f"schedules.{steps} is not a number of steps")
            if fault := schedule_fault(int(steps), schedule, length, starts):
                raise ValueError(f"schedules.{steps}{fault}")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):  # it becomes a directory under build/
            raise ValueError(f"name must be letters, digits, '.', '-' and '_', but is {self.name!r}")
        if isinstance(self.labels, str) and self.classes and not re.fullmatch(r"[\w-]+", self.labels):
            raise ValueError(f"labels must be a list of names, or name one, but is {self.labels!r}")
        needed = ("teacher", "tokenizer") if self.condition else ROLES[:2]
        for role in (*needed, *self.files):
            source = self.files.get(role)
            if role not in self.roles:
                raise ValueError(f"files.{role} is not one of {', '.join(self.roles)}")
            if source is None or not (source.embedded or source.file):
                raise ValueError(f"files.{role} must say where its weights are: file, or embedded")
            if Path(source.embedded).name != source.embedded:
                raise ValueError(f"files.{role}.embedded must be the name of a file, not {source.embedded!r}")

    def _check_condition(self) -> None:
        """Raises ValueError unless it is classes, or a text with what is known of its student."""
        if (self.classes or self.labels) if self.condition else not (self.classes and self.labels):
            raise ValueError("it must have either classes and labels, or condition: {kind: text, ...}")
        if not (self.schedules or self.condition):
            raise ValueError('schedules is empty: give at least "1": {known: [0]}')
        if self.condition and self.decoders:
            raise ValueError("decoders must be empty where there is a text: they are distilled with classes")
        if self.condition and self.schedules and not self.condition.vector:
            raise ValueError("condition.vector must be last or mean where there are schedules of a student")

    @property
    def roles(self) -> tuple[str, ...]:
        """The parts that the model can have."""
        return (*ROLES, *map(decoder_role, self.decoders), *(["text_encoder"] if self.condition else []))

    @property
    def embedded(self) -> bool:
        """Whether the weights ship with the project."""
        return bool(self.files.get("student", Source()).embedded)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data without defaults; `recipe_from_dict` reads it back."""
        data: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return data


def with_student(recipe: Recipe, settings: Any, where: str) -> Recipe:
    """The recipe of a text model with what its student was trained for: where the recipe has no schedules,
    the checkpoint's `config` says {schedules, split, vector}. Raises `RecipeError` where neither does.
    """
    if recipe.schedules or recipe.condition is None:
        return recipe
    keys = ("schedules", "split", "vector")
    given = settings if isinstance(settings, Mapping) else {}
    if not (isinstance(given.get("schedules"), Mapping) and given["schedules"] and given.keys() >= set(keys)):
        hint = f"state {', '.join(keys)} in the recipe (docs/text-to-image.md), or as `config` in the file"
        raise RecipeError(f"neither {recipe.name} nor {where} says what the student was trained for", hint)
    data = recipe.to_dict()
    data["schedules"] = given["schedules"]
    data["sequence"] = {**data["sequence"], "split": given["split"]}
    data["condition"] = {**data["condition"], "vector": given["vector"]}
    return recipe_from_dict(data, f"the config in {where}")


def student_config(recipe: Recipe) -> dict[str, Any]:
    """What `with_student` reads of a checkpoint."""
    data, condition = recipe.to_dict(), recipe.condition
    vector = condition.vector if condition else None
    return {"schedules": data["schedules"], "split": recipe.sequence.split, "vector": vector}


def recipe_names() -> list[str]:
    """The recipes that ship with the project, sorted."""
    folder = resources.files("ddexport.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str, cache: Path | None = None, revision: str | None = None) -> Recipe:
    """The recipe called `name`, in any case; that YAML file, the recipe.yaml in that directory, or the one at
    hf://USER/NAME[@REVISION], which is fetched into `cache`. Raises `RecipeError`, HubError.
    """
    if name.startswith(SCHEME):
        return _fetched(name, cache, revision)
    if path := _recipe_file(name):
        if not path.is_file():
            hint = "give a path to a recipe file, or a name of `ddexport models`"
            raise RecipeError(f"no recipe file at {path}", hint)
        return _parse(path.read_bytes(), str(path))
    names = recipe_names()
    if name.lower() not in names:
        hint = f"{did_you_mean(name, names)}There is: {', '.join(names)}; or give {WHAT_IS_A_MODEL}."
        raise RecipeError(f"there is no model called {name}", hint)
    name = f"{name.lower()}.yaml"
    return _parse((resources.files("ddexport.recipes") / name).read_bytes(), name)


def _recipe_file(name: str) -> Path | None:
    """The path of a recipe that does not ship: a YAML file, or in a directory."""
    if name.lower().endswith((".yaml", ".yml")):
        return Path(name)
    is_directory = name.lower() not in recipe_names() and Path(name).is_dir()
    return Path(name) / FILE_NAME if is_directory else None


def weights_beside(recipe: Recipe, name: str) -> dict[str, Path]:
    """Of a model that is a directory: the files in it that the recipe names, by role."""
    if _recipe_file(name) != Path(name) / FILE_NAME:
        return {}
    paths = {role: Path(name) / source.file for role, source in recipe.files.items() if source.file}
    return {role: path for role, path in paths.items() if path.exists()}


def _fetched(address: str, cache: Path | None, revision: str | None) -> Recipe:
    """Its weights lie in the same commit, where it does not place them elsewhere."""
    place = parse(address)
    if place.revision and revision:
        raise RecipeError(f"{address} names a revision, and so does --revision", "give one of them")
    [file] = fetch([HubFile(place.repository, FILE_NAME, place.revision or revision)], cache)
    recipe = _parse(file.path.read_bytes(), address)
    here = {
        role: structs.replace(source, repo=place.repository, revision=file.commit)
        for role, source in recipe.files.items()
        if not (source.embedded or source.repo)
    }
    if (encoder := here.get(ENCODER)) and not encoder.path:  # a directory, whose files are named one by one
        [first, *others] = (f"{encoder.file}/{name}" for name in ENCODER_FILES)
        here[ENCODER] = structs.replace(encoder, path=first, beside=tuple(others))
    return structs.replace(recipe, files=recipe.files | here)


def class_names(recipe: Recipe) -> dict[str, Any]:
    """The label list of the recipe as stored: {"names": [...], "aliases": {...}}; empty for a text model.
    Raises `RecipeError`."""
    data: dict[str, Any] = {"names": recipe.labels, "aliases": {}}
    if recipe.condition is not None:
        return {"names": [], "aliases": {}}
    if isinstance(recipe.labels, str):
        entry = resources.files("ddexport.recipes") / "labels" / f"{recipe.labels}.json"
        if not entry.is_file():
            raise RecipeError(
                f"recipe {recipe.name}: there is no label list {recipe.labels}", "see recipes/labels/"
            )
        data = json.loads(entry.read_text(encoding="utf-8"))
    if len(data["names"]) != recipe.classes:
        labels = "`labels`" if isinstance(recipe.labels, list) else f"the label list {recipe.labels}"
        raise RecipeError(
            f"recipe {recipe.name}: {labels} has {len(data['names'])} names for {recipe.classes} classes",
            "give one name for each class, or another list of recipes/labels/",
        )
    return data


def embedded_weights(source: Source) -> Path:
    """The file of weights that ships with the project, or the directory of a text encoder. Raises
    `RecipeError` if it is not there.
    """
    path = Path(str(resources.files("ddexport.recipes") / "weights" / source.embedded))
    if not path.exists():
        stem = path.stem
        name = re.sub("-(text-encoder|decoder-.+|[^-]+)$", "", stem)
        command = f"decoder --model {name}" if "-decoder-" in stem else name
        raise RecipeError(
            f"the embedded weights {source.embedded} are missing",
            f"train them: ddexport distill {command} --install",
        )
    return path


def recipe_from_dict(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Builds and checks a recipe from plain data. Raises `RecipeError` that names the key at fault."""
    if data.get("schema", SCHEMA) != SCHEMA:
        raise RecipeError(f"{where}: recipe schema {data['schema']} is not {SCHEMA}", "upgrade ddexport")
    schedules, sequence = data.get("schedules"), data.get("sequence")
    if isinstance(schedules, Mapping):  # YAML reads `1:` as a number
        data = {**data, "schedules": {str(steps): value for steps, value in schedules.items()}}
    if not schedules and data.get("condition") and isinstance(sequence, Mapping):
        # Of a teacher every position is a token.
        data = {**data, "sequence": {"split": sequence.get("length"), **sequence}}
    return convert(Recipe, data, where, RecipeError, HINT)


def manifest_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a manifest holds it: without parity, licence and published, which stand beside it."""
    beside = ("parity", "licence", "published")
    return {key: value for key, value in recipe.to_dict().items() if key not in beside}


def whole_recipe(manifest: Manifest) -> dict[str, Any]:
    """The plain data of the recipe in a manifest with what stands beside it."""
    beside = {"licence": manifest.licence, "published": manifest.published}
    return {**manifest.recipe, "parity": manifest.parity, **{k: v for k, v in beside.items() if v}}


def recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that a bundle was exported from. Raises `RecipeError`."""
    return recipe_from_dict(whole_recipe(manifest), f"the recipe in bundle {manifest.name}")


def _parse(text: bytes, where: str) -> Recipe:
    try:
        import yaml
    except ImportError as error:
        hint = 'pip install pyyaml; an export needs all of pip install "ddexport[export]"'
        raise RecipeError("reading recipes needs PyYAML", hint) from error
    try:
        if len(text) > MAX_BYTES or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it is larger than 1 MiB, or has aliases, which can make it so")
        data = yaml.safe_load(text)
    except Exception as error:  # also a value that is not what its tag says, or nested thousands deep
        raise RecipeError(f"{where} is not YAML: {str(error).partition(chr(10))[0]}", HINT) from error
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is not a recipe: it holds no keys", "start from one in recipes/")
    return recipe_from_dict(data, where)
