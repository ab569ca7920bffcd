"""A student of a published text model, from prompts alone: pairs that its teacher makes, then the student.

No image is needed: tokenizer and teacher are there, and the text encoder reads the prompts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from msgspec import structs, to_builtins
from safetensors.torch import save

from ddexport.distill.conditions import Texts
from ddexport.distill.loop import Run
from ddexport.distill.machine import keep_freed_memory, private_compile_cache
from ddexport.distill.pairs import make_pairs, read_pairs
from ddexport.distill.settings import PromptSettings
from ddexport.distill.student import train_student
from ddexport.distill.train import StageReport, key_of, new_part, run_stage
from ddexport.families._checkpoint import save_part
from ddexport.recipe import Recipe, with_student
from ddexport.runtime.bundle import ENCODER, sha256_of
from ddexport.runtime.console import stage as announce
from ddexport.runtime.files import atomic_write, make_directory
from ddexport.runtime.text import Features, PromptTokenizer, left_padded, read_features, read_prompts
from ddexport.sources import WeightRequest, load_parts, provenance, sources_of
from ddexport.text_encoder import TextEncoder

VERSION = 1  # raise it when the code here changes what it computes
BATCH = 16  # prompts that the text encoder reads at once


def distil_from_prompts(
    recipe: Recipe,
    prompts: Path,
    request: WeightRequest,
    settings: PromptSettings,
    run: Run,
) -> list[StageReport]:
    """Trains a student in the run's folder, going on where an earlier run stopped.

    Args:
        recipe: of tokenizer, teacher and text encoder. The student's schedules, split and vector, if it has
            none, are those of the settings.
        prompts: a text file with a prompt a line, or an npz of features (docs/text-to-image.md).
        request: which weights the three have.

    Raises:
        TextError: the file holds no prompts or features.
        MissingWeightsError, CheckpointError: as `ddexport.sources.load_parts`.
        OutputError: the folder cannot be made.
    """
    student = with_student(recipe, structs.asdict(settings), f"{recipe.name}: distill")
    of_features, text = prompts.suffix.lower() == ".npz", recipe.condition
    assert text is not None
    # Read before weights are, which may take hours to fetch, and once, for it may be a pipe.
    known = Texts([read_features(prompts, text.tokens, text.width)], settings.images) if of_features else None
    lines = [] if of_features else read_prompts(prompts)
    request = replace(request, text_encoder=not of_features)
    sources = sources_of(recipe, request)
    make_directory(run.folder)
    keep_freed_memory()
    values = {
        "version": VERSION,
        "seed": run.seed,
        "settings": [to_builtins(settings.pairs), settings.images],
        "prompts": sha256_of(prompts) if of_features else lines,
        "weights": to_builtins(provenance(recipe, request, sources)),
        "model": recipe.to_dict()["model"],
    }
    of_pairs = key_of(values)
    of_student = key_of({"before": of_pairs, "settings": to_builtins(settings)})

    @cache
    def parts() -> dict[str, Any]:
        return {role: part.to(run.device) for role, part in load_parts(recipe, request, sources).items()}

    @cache
    def condition() -> Texts:
        if known is not None:
            return known
        return Texts(encoded(parts().pop(ENCODER), lines, text.tokens, text.width), settings.images)

    def pair() -> None:
        condition()  # the text encoder is read first, and given back
        pairs = make_pairs(parts()["teacher"], parts()["tokenizer"], condition(), settings.pairs, run)
        with atomic_write(pairs_file) as stream:
            stream.write(save(pairs))

    def train() -> None:
        module, pairs = new_part(student, "student", run.seed), read_pairs(pairs_file)
        codebook, teacher = parts()["tokenizer"].codebook.cpu(), parts()["teacher"].cpu()
        train_student(module, teacher, codebook, condition(), pairs, settings.student, run, of_student)
        save_part(module.cpu(), student, "student", student_file)

    pairs_file, student_file = run.folder / "pairs.safetensors", run.folder / "student.safetensors"
    with private_compile_cache():
        return [
            run_stage("pairs", run, of_pairs, pairs_file, pair),
            run_stage("student", run, of_student, student_file, train),
        ]


@torch.inference_mode()
def encoded(encoder: TextEncoder, prompts: list[str], tokens: int, width: int) -> Iterator[Features]:
    """The features of prompts, as a bundle makes them, some at a time. Raises CheckpointError for an encoder
    of another width, or without its tokenizer."""
    device = next(encoder.parameters()).device
    tokenizer = PromptTokenizer(encoder.tokenizer_file(width), tokens)
    with announce("encoding the prompts"):
        for start in range(0, len(prompts), BATCH):
            ids, mask = tokenizer(prompts[start : start + BATCH])
            hidden = encoder(*(torch.from_numpy(array).to(device) for array in (ids, mask)))
            yield left_padded(hidden.cpu().numpy(), mask, tokens)
