"""Stage 4: pairs of noise and the tokens that the flow-matching map makes of it, under the teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddexport.distill.conditions import Condition
from ddexport.distill.loop import Run
from ddexport.distill.mapping import tokens_from_noise
from ddexport.distill.settings import PairSettings
from ddexport.distill.teacher import generate
from ddexport.distill.trainers import Choose, Tokenizer
from ddexport.families._base import Teacher
from ddexport.runtime.console import progress
from ddexport.runtime.errors import DDError


def by_map(noise: Tensor, codebook: Tensor, steps: int) -> Choose:
    """Picks the token that the noise (B, L, Cv) of its position flows to."""

    def choose(log_p: Tensor, positions: slice) -> Tensor:
        return tokens_from_noise(noise[:, positions], log_p, codebook, steps)

    return choose


def mapped_tokens(
    teacher: Teacher,
    tokenizer: Tokenizer,
    noise: Tensor,
    condition: tuple[Tensor, ...],
    settings: PairSettings,
) -> Tensor:
    """noise (B, L, Cv), and what the teacher reads of each image -> the map's tokens (B, L) int64."""
    choose = by_map(noise, tokenizer.codebook, settings.steps)
    return generate(teacher, tokenizer, condition, choose, settings.guidance, settings.top_k)


@torch.no_grad()
def make_pairs(
    teacher: Teacher, tokenizer: Tokenizer, condition: Condition, settings: PairSettings, run: Run
) -> dict[str, Tensor]:
    """All pairs: noise (N, L, Cv) float32, tokens (N, L) int16, and the rows of the condition."""
    length, width = teacher.geometry.length, teacher.geometry.code_width
    device = tokenizer.codebook.device
    parts: list[dict[str, Tensor]] = []
    starts = range(0, settings.count, settings.batch)
    for number, start in enumerate(progress(starts, "pairs")):
        generator = run.generator("pairs", number)
        count = min(settings.batch, settings.count - start)
        labels = condition.labels(count // condition.images, generator)
        rows = condition.rows(labels, generator)
        rows = {name: row.repeat_interleave(condition.images, 0) for name, row in rows.items()}
        noise = torch.randn(count, length, width, generator=generator)
        inputs = tuple(tensor.to(device) for tensor in condition.inputs(rows))
        tokens = mapped_tokens(teacher, tokenizer, noise.to(device), inputs, settings)
        parts.append({"noise": noise, "tokens": tokens.to(torch.int16).cpu(), **rows})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def read_pairs(path: Path) -> dict[str, Tensor]:
    """What `make_pairs` made. Raises DDError for a damaged file."""
    try:
        pairs: dict[str, Tensor] = load_file(path)
        return pairs
    except (OSError, SafetensorError) as error:
        hint = "delete it and repeat the command: the pairs are made again"
        raise DDError(f"{path} is damaged: {error}", hint) from error
