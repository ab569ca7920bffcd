"""Stage 3: the VAR teacher, trained on the tokens of augmented copies of the data, and how it is sampled."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.distill.augment import random_affine
from ddexport.distill.data import ImageSet
from ddexport.distill.loop import Run, fit
from ddexport.distill.machine import bfloat16, compiled
from ddexport.distill.settings import Augmentation, TeacherSettings
from ddexport.distill.tokenizer import tokens_of_images
from ddexport.families._var_tokenizer import MultiScaleTokenizer
from ddexport.families.var_dd import VarTeacher, guided

Choose = Callable[[Tensor, slice], Tensor]


def initialise_transformer(module: nn.Module, generator: torch.Generator) -> None:
    """Start values of VAR: small normal products and tables, gates that let a tenth through, a quiet output
    head.
    """
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("log_scale"):
                continue
            if p.ndim < 2 or name.endswith("bias"):
                p.zero_()
            else:
                p.normal_(0.0, 0.02, generator=generator)
            if ".conditioning.blocks." in f".{name}" and name.endswith("bias"):
                width = p.shape[0] // 6
                p[: 2 * width] = 0.1


def token_copies(
    tokenizer: MultiScaleTokenizer, images: ImageSet, copies: int, augment: Augmentation, run: Run
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
    teacher: VarTeacher,
    tokenizer: MultiScaleTokenizer,
    tokens: Tensor,
    labels: Tensor,
    settings: TeacherSettings,
    run: Run,
    key: str,
) -> None:
    """Train `teacher` in place: cross entropy of every token given the scales before it and the label."""
    initialise_transformer(teacher, run.generator("teacher-init"))
    null = teacher.geometry.classes
    with torch.no_grad():
        embedded = tokenizer.codebook.detach().clone()

    def cross_entropy(batch: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            features = tokenizer.teacher_features(embedded[batch])
        with bfloat16():
            logits = teacher(features, label)
        return F.cross_entropy(logits.float().flatten(0, 1), batch.flatten())

    cross_entropy_compiled = compiled(cross_entropy, run.compile)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(tokens), (settings.batch,), generator=generator)
        dropped = torch.rand(settings.batch, generator=generator) < settings.drop_label
        label = labels[index].masked_fill(dropped, null)
        return cross_entropy_compiled(tokens[index].long(), label), {}

    fit("teacher", run, settings, teacher, loss, key)


@torch.no_grad()
def draw(
    teacher: VarTeacher,
    tokenizer: MultiScaleTokenizer,
    labels: Tensor,
    choose: Choose,
    guidance: float,
    top_k: int = 0,
) -> Tensor:
    """Sample scale by scale, with cached keys and values: labels (B,) -> tokens (B, L) int64.

    `choose(log_p, positions)` picks the tokens (B, n) of one scale from its log probabilities (B, n, V)
    float64; `positions` is the scale's slice of the sequence. Guidance grows with the scale as in VAR: g * k
    / (K - 1).
    """
    scales = len(tokenizer.scales)
    cache = teacher.new_cache()
    pair = torch.cat([labels, torch.full_like(labels, teacher.geometry.classes)]) if guidance else labels
    features = torch.zeros(len(labels), 1, tokenizer.codebook.shape[1])
    f_hat = torch.zeros(())
    tokens = []
    for k, (a, b) in enumerate(pairwise(tokenizer.starts)):
        doubled = torch.cat([features, features]) if guidance else features
        logits = teacher.step(doubled, pair, a, cache)
        if guidance:
            logits = guided(logits, guidance * k / max(1, scales - 1))
        tokens.append(choose(log_probabilities(logits, top_k), slice(a, b)))
        f_hat = f_hat + tokenizer.contribution(tokenizer.embed(tokens[-1]), k)
        if k + 1 < scales:
            features = tokenizer.next_features(f_hat, k + 1)
    return torch.cat(tokens, 1)


def log_probabilities(logits: Tensor, top_k: int = 0) -> Tensor:
    """logits (..., V) -> log probabilities float64; with top_k > 0, -inf outside the k largest."""
    logits = logits.double()
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return logits.log_softmax(-1)


def at_random(generator: torch.Generator) -> Choose:
    """Ordinary sampling, to compare the map with."""

    def choose(log_p: Tensor, positions: slice) -> Tensor:
        flat = log_p.exp().flatten(0, 1)
        return torch.multinomial(flat, 1, generator=generator).view(log_p.shape[:-1])

    return choose
