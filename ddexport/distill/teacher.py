"""Stage 3: the teacher, trained on the tokens of augmented copies of the data, and how it is sampled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.distill.conditions import Condition
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
    tokens, labels = [], []
    for copy in range(copies):
        generator = run.generator("teacher-augment", copy)
        batch, of_copy = images.copy(generator, augment if copy else None)
        tokens.append(tokens_of_images(tokenizer, batch).to(torch.int16))
        labels.append(of_copy)
    return torch.cat(tokens), torch.cat(labels)


def train_teacher(
    teacher: Teacher,
    tokenizer: Tokenizer,
    condition: Condition,
    tokens: Tensor,
    labels: Tensor,
    settings: TeacherSettings,
    run: Run,
    key: str,
) -> None:
    """Train `teacher` in place, with the text encoder if there is one: cross entropy of every token given the
    AR steps before it and the condition.
    """
    family_trainer = trainer(teacher.family)
    family_trainer.initialise_teacher(teacher, run.generator("teacher-init"))
    trained = nn.ModuleList([teacher, *condition.trained()])

    def cross_entropy(batch: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            tokens = family_trainer.teacher_inputs(tokenizer, batch)
        with bfloat16():
            logits = teacher(tokens, *inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), batch.flatten())

    alike = _Alike(labels, condition.images)
    cross_entropy_compiled = compiled(cross_entropy, run.compile)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(tokens), (settings.batch // condition.images,), generator=generator)
        dropped = torch.rand(len(index), generator=generator) < settings.drop_label
        inputs = condition.inputs(condition.rows(labels[index], generator))
        figures = condition.losses(inputs, labels[index])
        inputs = condition.without(inputs, dropped, teacher)
        index = alike(index, generator).flatten()
        return cross_entropy_compiled(tokens[index].long(), inputs) + sum(figures.values()), figures

    fit("teacher", run, settings, trained, loss, key)


class _Alike:
    """Finds images of a label, for a sentence that several of a batch share."""

    def __init__(self, labels: Tensor, images: int) -> None:
        self.labels, self.others = labels, images - 1
        self.order, self.counts = labels.argsort(), torch.bincount(labels)
        self.starts = self.counts.cumsum(0) - self.counts

    def __call__(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Of images (n,) each with random others of its label: (n, images)."""
        label = self.labels[index]
        pick = torch.rand(self.others, len(index), generator=generator) * self.counts[label]
        return torch.stack([index, *self.order[self.starts[label] + pick.long()]], 1)


@torch.no_grad()
def generate(
    teacher: Teacher,
    tokenizer: Tokenizer,
    condition: tuple[Tensor, ...],
    choose: Choose,
    guidance: float,
    top_k: int = 0,
) -> Tensor:
    """Sample AR step by AR step, with cached keys and values: tokens (B, L) int64. condition: as that of
    `Trainer.generate`.

    `choose(log_p, positions)` picks the tokens (B, n) of one AR step from its log probabilities (B, n, V)
    float64; `positions` is the step's slice of the sequence. Guidance is meant as the family has it.
    """

    def choose_from(logits: Tensor, positions: slice) -> Tensor:
        return choose(log_probabilities(logits, top_k), positions)

    return trainer(teacher.family).generate(teacher, tokenizer, condition, choose_from, guidance)


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
