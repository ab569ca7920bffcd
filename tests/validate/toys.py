"""A student and a decoder of a few matrices, for tests that need no engine, and what they give when
compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddexport.runtime.images import to_uint8
from ddexport.validate.fid.draws import ByteImages, Draw, Order, Schedules
from ddexport.validate.metrics._base import StepOutput

LENGTH, WIDTH, CODEBOOK, SPLIT, CLASSES = 6, 3, 5, 2, 4
SCHEDULES = {1: (0,), 2: (0, 1), 3: (0, 1, 4)}


@dataclass(frozen=True)
class Rows:
    """What the toys are compared on: labels (N,) and noise (N, L, Cv)."""

    labels: np.ndarray
    noise: np.ndarray


@dataclass
class ToyModel:
    """A student and a decoder that treat every row alone, unless one of the faults below is switched on."""

    embedding_error: float = 0.0
    pixel_error: float = 0.0
    flip_first_token: bool = False  # of the first step: another token than the reference's, in every row

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        self.logit_weight = generator.normal(size=(WIDTH, CODEBOOK)).astype(np.float32)
        self.embedding_weight = generator.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        self.codebook = generator.normal(size=(CODEBOOK, WIDTH)).astype(np.float32)

    def student(self, tokens: np.ndarray, label: np.ndarray, known: np.ndarray) -> StepOutput:
        hidden = tokens + 0.1 * label[:, None, None].astype(np.float32)
        hidden = hidden + 0.1 * np.tril(np.ones((LENGTH, LENGTH), np.float32)) @ tokens
        logits = hidden @ self.logit_weight
        if self.flip_first_token:
            lowest = logits[:, 0].argmin(-1)
            logits[np.flatnonzero(known == 0), 0, lowest[known == 0]] += 100
        drawn = hidden @ self.embedding_weight + np.float32(self.embedding_error)
        drawn[:, :SPLIT] = self.codebook[logits[:, :SPLIT].argmax(-1)]
        is_known = np.arange(LENGTH)[None, :] < known[:, None]
        sequence = np.where(is_known[..., None], tokens, drawn)
        return StepOutput(logits[:, :SPLIT].astype(np.float32), sequence.astype(np.float32))

    def decode(self, sequence: np.ndarray) -> np.ndarray:
        image = 1.0 / (1.0 + np.exp(-sequence[:, :, :, None]))  # (N, L, 3, 1)
        return (image[:, :3, :3].repeat(3, axis=3) + self.pixel_error).astype(np.float32)


def sampled(
    model: ToyModel, known: tuple[int, ...], labels: np.ndarray, noise: np.ndarray
) -> list[StepOutput]:
    """The steps of a schedule."""
    outputs: list[StepOutput] = []
    for count in known:
        before = outputs[-1].sequence if outputs else noise
        tokens = np.concatenate([before[:, :count], noise[:, count:]], axis=1)
        outputs.append(model.student(tokens, labels, np.full_like(labels, count)))
    return outputs


def draw_of(model: ToyModel, schedules: Schedules) -> Draw:
    """One side of `validate fid`."""

    def draw(order: Order, indices: range) -> dict[int, ByteImages]:
        labels, noise = order.labels(indices), order.noise(indices)
        return {
            steps: to_uint8(model.decode(sampled(model, known, labels, noise)[-1].sequence))
            for steps, known in schedules.items()
        }

    return draw
