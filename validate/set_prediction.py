"""Drawing several AR steps of a teacher at once: the baselines that a distilled student is compared with.

A network that draws positions in one pass draws them independently of each other, whatever it was trained
on. The best it can do is to draw each from its own marginal law p(q_j | prefix, label): that is where the
cross entropy of set prediction has its minimum (Distilled Decoding, arXiv 2412.17153). No such
network is trained here. Its draws are made exactly, by the teacher: for every position a continuation of
the prefix of its own, of which this one position is kept. They then have the marginals to the last digit and
no dependence at all, which no trained network can beat at this.

Its time is that of one pass of a network of the teacher's size, without guidance, which would be trained in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

import torch
from torch import Tensor

from ddexport.distill.teacher import at_random, generate, log_probabilities
from ddexport.distill.trainers import Choose, trainer
from ddexport.validate.image_sets import Models

Draw: TypeAlias = Callable[[Tensor, Choose], Tensor]  # labels (B,), choose -> tokens (B, L)


class _EnoughError(Exception):
    """Raised by a `Choose` when the positions that were wanted are drawn."""


def teacher_of(models: Models) -> Draw:
    """The teacher as it is sampled for its pairs: guidance and top-k of the recipe."""

    def drawn(labels: Tensor, choose: Choose) -> Tensor:
        tokens: Tensor = generate(
            models.teacher, models.tokenizer, labels, choose, models.pairs.guidance, models.pairs.top_k
        )
        return tokens

    return drawn


def draw_until(teacher: Draw, labels: Tensor, choose: Choose, stop: int) -> Tensor:
    """The first `stop` positions of each sequence, (B, stop) int64, without the passes after them."""
    tokens: list[Tensor] = []

    def collect(log_p: Tensor, positions: slice) -> Tensor:
        tokens.append(choose(log_p, positions))
        if positions.stop >= stop:
            raise _EnoughError
        return tokens[-1]

    with suppress(_EnoughError):
        teacher(labels, collect)
    return torch.cat(tokens, 1)[:, :stop]


def rest_at_once(
    teacher: Draw, starts: list[int], labels: Tensor, first: int, generator: torch.Generator
) -> Tensor:
    """The first AR steps by the teacher, all others at once, each position from its marginal given those.

    Args:
        teacher: draws tokens (B, L) for labels.
        starts: where the AR steps start, and L.
        labels: (B,) int64.
        first: how many AR steps are the teacher's, 0 to the number of steps - 1. With that last number
            nothing is left to be drawn at once, and the law is the teacher's.
        generator: of all draws.

    Returns:
        tokens (B, L) int64. Costs one draw of the teacher for every position behind step `first`.
    """
    sample, known = at_random(generator), starts[first]
    # The next step is drawn by the teacher's own law: positions of one step do not see each other.
    tokens = draw_until(teacher, labels, sample, starts[first + 1])

    def go_on(log_p: Tensor, positions: slice) -> Tensor:
        return tokens[:, positions] if positions.stop <= known else sample(log_p, positions)

    columns = [tokens]
    for start, stop in zip(starts[first + 1 : -1], starts[first + 2 :], strict=True):
        for position in range(start, stop):
            columns.append(draw_until(teacher, labels, go_on, stop)[:, position : position + 1])
    return torch.cat(columns, 1)


def one_pass_runner(models: Models, first: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What `rest_at_once` costs a network trained for it, to be timed: noise, labels -> (B, L, Cv).

    `first` passes of the teacher, one pass over all positions, one draw of every position left. The last pass
    reads stand-ins for what the teacher is not given, so the images mean nothing.
    """
    teacher, tokenizer = models.teacher, models.tokenizer
    known, sample = tokenizer.starts[first], at_random(torch.Generator().manual_seed(0))
    drawn, whole = teacher_of(models), torch.zeros(1, tokenizer.starts[-1], dtype=torch.int64)
    inputs = trainer(teacher.family).teacher_inputs(tokenizer, whole)

    def sequences(noise: Tensor, labels: Tensor) -> Tensor:
        parts = [draw_until(drawn, labels, sample, known)] if first else []
        logits = teacher(inputs.expand(len(labels), *inputs.shape[1:]), labels)[:, known:]
        rest = log_probabilities(logits, models.pairs.top_k)
        parts.append(sample(rest, slice(known, tokenizer.starts[-1])))
        embedded: Tensor = tokenizer.embed(torch.cat(parts, 1))
        return embedded

    return sequences
