"""The sets of images that `validate quality` measures, all drawn by the PyTorch reference with the stored
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddexport.distill.data import DataSet
from ddexport.distill.pairs import mapped_tokens
from ddexport.distill.settings import PairSettings, distill_settings
from ddexport.distill.teacher import at_random, generate
from ddexport.distill.tokenizer import images_of_sequences, tokens_of_images
from ddexport.families._base import compose
from ddexport.families._checkpoint import connect, load_part
from ddexport.recipe import Recipe, embedded_weights
from ddexport.runtime.errors import DDError
from ddexport.runtime.noise import gaussian_noise

CHUNK = 500

Module: TypeAlias = Any  # torch is not analysed; every module here is a torch.nn.Module


@dataclass(frozen=True)
class Models:
    """The trained parts of one recipe, in eval mode, and how its pairs were drawn."""

    recipe: Recipe
    tokenizer: Module
    teacher: Module
    student: Module
    pairs: PairSettings


@dataclass(frozen=True)
class ImageRow:
    """Images (N, 3, H, W) in [0, 1] and the classes asked for (N,); `paired`: drawn from the map's noise, in
    order.
    """

    name: str
    images: Tensor
    labels: Tensor
    paired: bool = False


def load_models(recipe: Recipe, folder: Path | None) -> Models:
    """The recipe's parts from `folder`, or the embedded ones. Raises DDError for a missing or bad file."""
    parts = {}
    for role in ("tokenizer", "teacher", "student"):
        if role not in recipe.files or not recipe.files[role].embedded:
            raise DDError(
                f"the recipe {recipe.name} has no embedded {role}",
                "only trained recipes can be measured: digits-var, digits-llamagen",
            )
        source = recipe.files[role]
        path = folder / source.embedded if folder else embedded_weights(source)
        parts[role] = load_part(recipe, role, path)
    connect(parts["student"], parts["tokenizer"])
    return Models(recipe, **parts, pairs=distill_settings(recipe).pairs)


def balanced_labels(count: int, classes: int) -> Tensor:
    """0, 1, ..., classes - 1, 0, 1, ...: (count,) int64."""
    return torch.arange(count) % classes


def real_rows(models: Models, data: DataSet) -> list[ImageRow]:
    """The held-out digits, and what the tokenizer makes of them."""
    images, labels = data.held_out.images(), data.held_out.labels
    tokens = tokens_of_images(models.tokenizer, images)
    decoded = images_of_sequences(models.tokenizer, models.tokenizer.embed(tokens))
    return [ImageRow("real held-out", (images + 1) / 2, labels), ImageRow("reconstruction", decoded, labels)]


def drawn_rows(models: Models, seed: int, count: int) -> list[ImageRow]:
    """Teacher, mapped pairs, student and baseline for one seed; labels are balanced.

    The student and the map start from the same noise, the runtime's for this seed. Beside the recipe's split,
    the student is drawn with every position discrete.
    """
    labels = balanced_labels(count, models.recipe.classes)
    sequence = models.recipe.sequence
    noise = torch.from_numpy(gaussian_noise(seed, range(count), sequence.length, sequence.width))
    generator = torch.Generator().manual_seed(seed)
    choose = at_random(generator)
    teacher = by_chunks(
        lambda rows: generate(
            models.teacher,
            models.tokenizer,
            labels[rows],
            choose,
            models.pairs.guidance,
            models.pairs.top_k,
        ),
        count,
    )
    mapped = by_chunks(
        lambda rows: mapped_tokens(models.teacher, models.tokenizer, noise[rows], labels[rows], models.pairs),
        count,
    )
    rows = [
        ImageRow("teacher", _decode_tokens(models, teacher), labels),
        ImageRow("mapped pairs", _decode_tokens(models, mapped), labels, paired=True),
    ]
    splits = [(sequence.split, "")]
    if sequence.split < sequence.length:
        splits.append((sequence.length, ", all discrete"))
    for split, suffix in splits:
        for steps, name in (("2", "two steps"), ("1", "one step")):
            drawn = student_sequences(models, noise, labels, models.recipe.schedules[steps].known, split)
            rows.append(
                ImageRow(name + suffix, images_of_sequences(models.tokenizer, drawn), labels, paired=True)
            )
    baseline = _decode_tokens(models, independent_marginals(teacher, labels, generator))
    return [*rows, ImageRow("set prediction", baseline, labels)]


def student_sequences(
    models: Models, noise: Tensor, labels: Tensor, known: tuple[int, ...], split: int
) -> Tensor:
    """Few-step sampling with a split of choice: noise (N, L, Cv), labels (N,) -> sequences (N, L, Cv)."""
    parts = []
    position = torch.arange(noise.shape[1])[None, :, None]
    for start in range(0, len(labels), CHUNK):
        e, label = noise[start : start + CHUNK], labels[start : start + CHUNK]
        tokens = e
        for count in known:
            held = torch.full_like(label, count)
            inputs = torch.where(position < count, tokens, e)
            with torch.no_grad():
                logits, embeddings = models.student.heads(inputs, label, held)
            codebook = models.student.codebook
            tokens, *_ = compose(inputs, logits[:, :split], embeddings[:, split:], codebook, held)
        parts.append(tokens)
    return torch.cat(parts)


def independent_marginals(tokens: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Set prediction, the baseline: every position drawn from its own marginal given the class.

    Each position's tokens (N, L) are shuffled among the samples of a class. The marginals then are the
    teacher's own to the last count, and no dependence between positions is left.
    """
    mixed = tokens.clone()
    for c in labels.unique():
        members = (labels == c).nonzero()[:, 0]
        for position in range(tokens.shape[1]):
            order = torch.randperm(len(members), generator=generator)
            mixed[members, position] = tokens[members[order], position]
    return mixed


def shuffled_in_class(labels: Tensor) -> Tensor:
    """For each sample the index of another one of its class: (N,) int64, no fixed points in classes of 2 or
    more.
    """
    index = torch.arange(len(labels))
    for c in labels.unique():
        members = (labels == c).nonzero()[:, 0]
        index[members] = members.roll(1)
    return index


def as_pixels(images: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Images (N, 3, H, W) in [0, 1] -> grey values (N, H*W) float64 in [-1, 1]."""
    return np.asarray((images.mean(1).flatten(1) * 2 - 1).numpy(), dtype=np.float64)


def _decode_tokens(models: Models, tokens: Tensor) -> Tensor:
    return images_of_sequences(models.tokenizer, models.tokenizer.embed(tokens))


def by_chunks(work: Callable[[slice], Tensor], count: int) -> Tensor:
    """`work` on rows 0 to `count` in slices of `CHUNK`, its results one after the other."""
    return torch.cat([work(slice(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)])
