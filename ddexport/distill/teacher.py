"""Stage 3: the teacher, trained on the tokens of augmented copies of the data, and how it is sampled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddexport.distill.augment import random_affine
from ddexport.distill.data import ImageSet
from ddexport.distill.loop import Run, fit
from ddexport.distill.machine import bfloat16, compiled
from ddexport.distill.settings import Augmentation, TeacherSettings
from ddexport.distill.tokenizer import tokens_of_images
from ddexport.distill.trainers import Choose, Tokenizer, trainer
from ddexport.families._base import Teacher


def token_copies(
    tokenizer: Tokenizer, images: ImageSet, copies: int, augment: Augmentation, run: Run
) -> tuple[Tensor, Tensor]:
    """Tokens (copies * N, L) int16 and labels (copies * N,) of augmented copies; the first copy is the data
    itself.
    """
    tokens = []
    for copy in range(copies):
        batch = images.images()
        if copy:
            generator = run.generator("teacher-augment", copy)
            batch = random_affine(batch, generator, augment.degrees, augment.shift, augment.scale)
        tokens.append(tokens_of_images(tokenizer, batch).to(torch.int16))
    return torch.cat(tokens), images.labels.repeat(copies)


def train_teacher(
    teacher: Teacher,
    tokenizer: Tokenizer,
    tokens: Tensor,
    labels: Tensor,
    settings: TeacherSettings,
    run: Run,
    key: str,
) -> None:
    """Train `teacher` in place: cross entropy of every token given the AR steps before it and the label."""
    family_trainer = trainer(teacher.family)
    family_trainer.initialise_teacher(teacher, run.generator("teacher-init"))
    null = teacher.geometry.classes

    def cross_entropy(batch: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            inputs = family_trainer.teacher_inputs(tokenizer, batch)
        with bfloat16():
            logits = teacher(inputs, label)
        return F.cross_entropy(logits.float().flatten(0, 1), batch.flatten())

    cross_entropy_compiled = compiled(cross_entropy, run.compile)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(tokens), (settings.batch,), generator=generator)
        dropped = torch.rand(settings.batch, generator=generator) < settings.drop_label
        label = labels[index].masked_fill(dropped, null)
        return cross_entropy_compiled(tokens[index].long(), label), {}

    fit("teacher", run, settings, teacher, loss, key)


@torch.no_grad()
def generate(
    teacher: Teacher,
    tokenizer: Tokenizer,
    labels: Tensor,
    choose: Choose,
    guidance: float,
    top_k: int = 0,
) -> Tensor:
    """Sample AR step by AR step, with cached keys and values: labels (B,) -> tokens (B, L) int64.

    `choose(log_p, positions)` picks the tokens (B, n) of one AR step from its log probabilities (B, n, V)
    float64; `positions` is the step's slice of the sequence. Guidance is meant as the family has it.
    """

    def choose_from(logits: Tensor, positions: slice) -> Tensor:
        return choose(log_probabilities(logits, top_k), positions)

    return trainer(teacher.family).generate(teacher, tokenizer, labels, choose_from, guidance)


def log_probabilities(logits: Tensor, top_k: int = 0) -> Tensor:
    """logits (..., V) -> log probabilities float64; with top_k > 0, -inf outside the k largest."""
    logits = logits.double()
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return logits.log_softmax(-1)


def at_random(generator: torch.Generator) -> Choose:
    """Ordinary sampling, to compare the map with."""

    def choose(log_p: Tensor, positions: slice) -> Tensor:
        flat = log_p.exp().flatten(0, 1).cpu()  # where the generator is
        return torch.multinomial(flat, 1, generator=generator).view(log_p.shape[:-1]).to(log_p.device)

    return choose
