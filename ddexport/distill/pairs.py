"""Stage 4: pairs of noise and the tokens that the flow-matching map makes of it, under the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from ddexport.distill.loop import Run
from ddexport.distill.mapping import tokens_from_noise
from ddexport.distill.settings import PairSettings
from ddexport.distill.teacher import generate
from ddexport.distill.trainers import Choose, Tokenizer
from ddexport.families._base import Teacher
from ddexport.runtime.console import progress

CHUNK = 1000


def by_map(noise: Tensor, codebook: Tensor, steps: int) -> Choose:
    """Picks the token that the noise (B, L, Cv) of its position flows to."""

    def choose(log_p: Tensor, positions: slice) -> Tensor:
        return tokens_from_noise(noise[:, positions], log_p, codebook, steps)

    return choose


def mapped_tokens(
    teacher: Teacher, tokenizer: Tokenizer, noise: Tensor, labels: Tensor, settings: PairSettings
) -> Tensor:
    """noise (B, L, Cv), labels (B,) -> the map's tokens (B, L) int64."""
    choose = by_map(noise, tokenizer.codebook, settings.steps)
    return generate(teacher, tokenizer, labels, choose, settings.guidance, settings.top_k)


def make_pairs(teacher: Teacher, tokenizer: Tokenizer, settings: PairSettings, run: Run) -> dict[str, Tensor]:
    """All pairs: noise (N, L, Cv) float32, tokens (N, L) int16, labels (N,) int64 (uniform)."""
    length, width = teacher.geometry.length, teacher.geometry.code_width
    parts: list[dict[str, Tensor]] = []
    starts = range(0, settings.count, CHUNK)
    for number, start in enumerate(progress(starts, "pairs")):
        generator = run.generator("pairs", number)
        count = min(CHUNK, settings.count - start)
        labels = torch.randint(teacher.geometry.classes, (count,), generator=generator)
        noise = torch.randn(count, length, width, generator=generator)
        tokens = mapped_tokens(teacher, tokenizer, noise, labels, settings)
        parts.append({"noise": noise, "labels": labels, "tokens": tokens.to(torch.int16)})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
