"""The stages of a distillation in order: each writes its result atomically and is skipped when nothing
changed.

| stage | reads | writes into the run's folder |
|---|---|---|
| tokenizer | images | tokenizer.safetensors |
| decoder | images, tokenizer | the recipe's tokenizer file |
| teacher | images, tokenizer | the recipe's teacher file |
| pairs | teacher, tokenizer | pairs.safetensors |
| student | pairs, teacher, tokenizer | the recipe's student file |

A result is float16 under the published key names, and every later stage starts from the stored file, so that
what is trained on, measured and shipped are the same numbers. `stages.json` records the key of each finished
stage: a hash of the settings, the seed, the geometry, the data and the key of the stage that it follows. The
decoder moves no code, so nothing but the images depends on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from msgspec import structs
from safetensors.torch import save
from torch import Tensor, nn

from ddexport.distill.conditions import Captions, Classes, Condition, word_tokenizer
from ddexport.distill.data import DataSet, load_data
from ddexport.distill.loop import Run, finish
from ddexport.distill.machine import keep_freed_memory, private_compile_cache
from ddexport.distill.pairs import make_pairs, read_pairs
from ddexport.distill.settings import DistillSettings, TextEncoderSize
from ddexport.distill.student import train_student
from ddexport.distill.teacher import token_copies, train_teacher
from ddexport.distill.tokenizer import train_decoder, train_tokenizer
from ddexport.distill.trainers import trainer
from ddexport.families import family
from ddexport.families._checkpoint import load_part, save_part
from ddexport.runtime.bundle import ENCODER
from ddexport.runtime.console import stage as announce
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write, make_directory
from ddexport.runtime.records import Record, convert, read_json, to_json
from ddexport.staging import staged_directory
from ddexport.text_encoder import new_text_encoder, save_text_encoder, text_encoder

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

STAGES = ("tokenizer", "decoder", "teacher", "pairs", "student")
FOLLOWS = {"decoder": "tokenizer", "teacher": "tokenizer", "pairs": "teacher", "student": "pairs"}
ROLES = {"decoder": "tokenizer", "teacher": "teacher", "student": "student"}  # stages whose results ship
STAGES_FILE = "stages.json"
VERSION = 1  # raise it when a stage's code changes what it computes


class Finished(Record, frozen=True):
    """A finished stage: what it depends on, and how long it took."""

    key: str
    seconds: float


NEVER = Finished("", 0.0)


@dataclasses.dataclass(frozen=True)
class StageReport:
    """What became of one stage: "trained", "unchanged" or "left out"; its time and file."""

    stage: str
    outcome: str
    seconds: float
    file: str
    bytes: int


def run_stage(stage: str, run: Run, key: str, path: Path, work: Callable[[], None]) -> StageReport:
    """Does the work of a stage, which writes `path`, unless it is there for this key already."""
    finished = _finished(run)
    if _is_finished(stage, run, key, path):
        return StageReport(stage, "unchanged", finished[stage].seconds, path.name, path.stat().st_size)
    start = time.monotonic()
    with announce(stage):
        work()
    seconds = round(time.monotonic() - start, 1)
    finished[stage] = Finished(key, seconds)
    with atomic_write(run.folder / STAGES_FILE) as stream:
        stream.write(to_json(finished).encode())
    finish(stage, run)
    return StageReport(stage, "trained", seconds, path.name, path.stat().st_size)


def key_of(values: Mapping[str, Any]) -> str:
    """Names what a result depends on."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_finished(stage: str, run: Run, key: str, path: Path) -> bool:
    return _finished(run).get(stage, NEVER).key == key and path.is_file()


def _finished(run: Run) -> dict[str, Finished]:
    path = run.folder / STAGES_FILE
    if not path.is_file():
        return {}
    return convert(dict[str, Finished], read_json(path, DDError), str(path), DDError)


class Training:
    """One run of one recipe in one folder."""

    def __init__(
        self, recipe: Recipe, settings: DistillSettings, run: Run, student_seed: int | None = None
    ) -> None:
        self.recipe, self.settings, self.run = recipe, settings, run
        self._student_run = run if student_seed is None else dataclasses.replace(run, seed=student_seed)
        self._data: DataSet | None = None
        self._keys: dict[str, str] = {}

    @property
    def data(self) -> DataSet:
        """The data set, read when a stage first needs it."""
        if self._data is None:
            self._data = load_data(self.settings.data)
        return self._data

    def path(self, stage: str) -> Path:
        """Where `stage` writes its result."""
        if stage in ROLES:
            return self.run.folder / self.recipe.files[ROLES[stage]].embedded
        return self.run.folder / f"{stage}.safetensors"

    def key(self, stage: str) -> str:
        """Names everything the result of `stage` depends on."""
        if stage not in self._keys:
            values: dict[str, Any] = {
                "version": VERSION,
                "stage": stage,
                "seed": self._run_of(stage).seed,
                "settings": structs.asdict(getattr(self.settings, stage)),
                "before": self.key(FOLLOWS[stage]) if stage in FOLLOWS else self._origin(),
            }
            if stage == "teacher" and self.settings.text_encoder:
                values |= self._origin_of_text(self.settings.text_encoder)
            self._keys[stage] = key_of(values)
        return self._keys[stage]

    def run_stages(self, stages: tuple[str, ...] = STAGES) -> list[StageReport]:
        """Run the given stages in order. Raises DDError when one needs a result that is not there."""
        return [self._stage(stage, stage in stages) for stage in STAGES]

    def _stage(self, stage: str, wanted: bool) -> StageReport:
        path = self.path(stage)
        if not _is_finished(stage, self.run, self.key(stage), path):
            if not wanted:
                return StageReport(stage, "left out", 0.0, path.name, 0)
            self._need_stages_before(stage)
        elif stage == "teacher" and self.recipe.condition:
            self._need_encoder()
        return run_stage(stage, self.run, self.key(stage), path, getattr(self, f"_{stage}"))

    def _need_encoder(self) -> None:
        """Raises DDError unless the teacher's text encoder is there. It is not trained again by itself: pairs
        and student that are there already are of no use to another one."""
        folder = self.run.folder / self.recipe.files[ENCODER].embedded
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / name).is_file():
                raise DDError(
                    f"there is no {folder / name}, which the stage teacher wrote",
                    f"put it back; or delete {self.run.folder / STAGES_FILE}, and all stages run again",
                )

    def _tokenizer(self) -> None:
        tokenizer = self._new("tokenizer")
        settings, augment = self.settings.tokenizer, self.settings.augment
        family_trainer, key = trainer(self.recipe.family), self.key("tokenizer")
        train_tokenizer(tokenizer, family_trainer, self.data.train, settings, augment, self.run, key)
        self._save(tokenizer, "tokenizer", "tokenizer")

    def _decoder(self) -> None:
        tokenizer = self._load("tokenizer", "tokenizer")
        loop, settings = self.settings.decoder, self.settings.tokenizer
        train_decoder(
            tokenizer, self.data.train, loop, settings, self.settings.augment, self.run, self.key("decoder")
        )
        self._save(tokenizer, "tokenizer", "decoder")

    def _teacher(self) -> None:
        tokenizer, teacher = self._load("tokenizer", "tokenizer"), self._new("teacher")
        settings, augment = self.settings.teacher, self.settings.augment
        tokens, labels = token_copies(tokenizer, self.data.train, settings.copies, augment, self.run)
        seed_torch(self.run.seed, ENCODER)
        condition, key = condition_of(self.recipe, self.settings, self.data), self.key("teacher")
        train_teacher(teacher, tokenizer, condition, tokens, labels, settings, self.run, key)
        if isinstance(condition, Captions):
            path = self.run.folder / self.recipe.files[ENCODER].embedded
            save_text_encoder(condition.encoder, condition.tokenizer, path)
        self._save(teacher, "teacher", "teacher")

    def _pairs(self) -> None:
        tokenizer, teacher = self._load("tokenizer", "tokenizer"), self._load("teacher", "teacher")
        pairs = make_pairs(teacher, tokenizer, self._condition(), self.settings.pairs, self.run)
        with atomic_write(self.path("pairs")) as stream:
            stream.write(save(pairs))

    def _run_of(self, stage: str) -> Run:
        return self._student_run if stage == "student" else self.run

    def _student(self) -> None:
        tokenizer, teacher = self._load("tokenizer", "tokenizer"), self._load("teacher", "teacher")
        student, pairs = self._new("student"), read_pairs(self.path("pairs"))
        codebook: Tensor = tokenizer.codebook
        settings, run, key = self.settings.student, self._run_of("student"), self.key("student")
        train_student(student, teacher, codebook, self._condition(), pairs, settings, run, key)
        self._save(student, "student", "student")

    def _condition(self) -> Condition:
        return condition_of(self.recipe, self.settings, self.data, self.run.folder)

    def _origin_of_text(self, size: TextEncoderSize) -> dict[str, Any]:
        """What a teacher depends on besides, of which a sample of sentences stands for the grammar."""
        generator = torch.Generator().manual_seed(0)
        sample = self.data.captions(self.data.train.random_labels(1000, generator), generator)
        condition = self.recipe.to_dict()["condition"] | {"examples": None}
        return {
            "condition": condition,
            "text_encoder": structs.asdict(size),
            "words": self.data.words,
            "sentences": sample,
        }

    def _origin(self) -> dict[str, Any]:
        """What the first stage depends on."""
        recipe = self.recipe
        return {
            "data": self.data.fingerprint(),
            "augment": structs.asdict(self.settings.augment),
            "geometry": [
                recipe.family,
                structs.asdict(recipe.image),
                structs.asdict(recipe.sequence) | {"split": None},  # sampling's choice, not training's
                recipe.classes,
                recipe.model,
                recipe.tokenizer,
            ],
        }

    def _new(self, role: str) -> Any:
        return new_part(self.recipe, role, self.run.seed)

    def _load(self, role: str, stage: str) -> Any:
        return load_part(self.recipe, role, self.path(stage)).requires_grad_(True)

    def _save(self, module: nn.Module, role: str, stage: str) -> None:
        save_part(module, self.recipe, role, self.path(stage))

    def _need_stages_before(self, stage: str) -> None:
        needed: list[str] = []
        while stage in FOLLOWS:
            needed.insert(0, stage := FOLLOWS[stage])
        for before in needed:
            if not _is_finished(before, self.run, self.key(before), self.path(before)):
                raise DDError(
                    f"the stage {stage} needs the result of {before}, which {self.run.folder} does not hold"
                    " for these settings and this seed",
                    f"run that stage too: --stages {before},{stage}; or leave --stages out",
                )


def new_part(recipe: Recipe, role: str, seed: int) -> Any:
    """The untrained module of a role."""
    seed_torch(seed, role)
    return family(recipe.family).build(recipe, role)


def condition_of(
    recipe: Recipe, settings: DistillSettings, data: DataSet, folder: Path | None = None
) -> Condition:
    """What the model draws from, with the text encoder of a run's `folder`, or an untrained one."""
    text, size = recipe.condition, settings.text_encoder
    if text is None or size is None:
        return Classes(recipe.classes)
    tokenizer = word_tokenizer(data.words)
    if folder is None:
        words = tokenizer.get_vocab_size()
        encoder = new_text_encoder(text.width, words, size.layers, size.heads, size.hidden)
    else:
        encoder = text_encoder(folder / recipe.files[ENCODER].embedded)
    return Captions(data, tokenizer, encoder, text.tokens, size.images)


def seed_torch(seed: int, role: str) -> None:
    """Start torch's own random numbers, which modules are made of."""
    torch.manual_seed(int(hashlib.sha256(f"{seed}/{role}".encode()).hexdigest()[:12], 16))


def train(
    recipe: Recipe,
    settings: DistillSettings,
    run: Run,
    stages: tuple[str, ...] = STAGES,
    student_seed: int | None = None,
) -> list[StageReport]:
    """Train `recipe` in the run's folder, going on where an earlier run stopped.

    `student_seed` is the student's seed where it is not that of the other stages, to see what it alone
    changes.

    Raises OutputError when the folder cannot be made, DDError for data or earlier stages that are missing.
    """
    make_directory(run.folder)
    keep_freed_memory()
    with private_compile_cache():
        return Training(recipe, settings, run, student_seed).run_stages(stages)


def shipped(recipe: Recipe) -> dict[str, str]:
    """The files and directories of a run that ship, by role."""
    roles = [*ROLES.values(), *([ENCODER] if recipe.condition else [])]
    return {role: recipe.files[role].embedded for role in roles}


def install(recipe: Recipe, folder: Path, files: Mapping[str, str], target: Path) -> list[Path]:
    """Copies trained files from `folder` to `target`, each atomically, under the names of the recipe.

    files: by role. Raises DDError when one is missing, or the recipe has no name for it.
    """
    for role, name in files.items():
        if not (folder / name).exists():
            raise DDError(f"{folder} does not hold {name}", "run all stages before --install")
        if role not in recipe.files or not recipe.files[role].embedded:
            raise DDError(f"recipe {recipe.name} has no name for {name}", f"state files.{role}.embedded")
    paths = []
    for role, name in files.items():
        paths.append(target / recipe.files[role].embedded)
        if (folder / name).is_dir():
            with staged_directory(paths[-1], replace=True, marker="config.json") as directory:
                shutil.copytree(folder / name, directory, dirs_exist_ok=True)
            continue
        with atomic_write(paths[-1]) as stream, (folder / name).open("rb") as source:
            shutil.copyfileobj(source, stream)
    return paths
