"""Does the flow-matching map draw tokens by the trained teacher's probabilities? A chi-square test of up to
four AR steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddexport.distill.mapping import tokens_from_noise
from ddexport.validate.distilled.draws import Models

CONTEXTS, SEED = 8, 77
TESTED = 4  # AR steps, evenly spread: all scales of a small VAR, some tokens of a raster order
LEVEL = 0.001  # a correct map fails one such test in a thousand
LEAST_EXPECTED = 5  # counts of a bin, for the statistic to have its law


def check_map(models: Models, draws: int, steps: int | None = None) -> list[dict[str, Any]]:
    """One test an AR step: its number, statistic, degrees of freedom, p-value, and whether it is accepted.

    Each is over `CONTEXTS` contexts (label, tokens before, position) of `draws` tokens. steps: of the flow's
    integration; the recipe's by default.
    """
    generator = torch.Generator().manual_seed(SEED)
    labels = models.condition.labels(CONTEXTS, generator)
    laws: list[Tensor] = []  # of each AR step, log probabilities (CONTEXTS, n, V)

    def choose(log_p: Tensor, positions: slice) -> Tensor:
        laws.append(log_p)
        return torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator).view(log_p.shape[:-1])

    with torch.inference_mode():
        condition = models.condition.inputs(models.condition.rows(labels, generator))
    models.teacher_tokens(condition, choose)
    codebook, sizes = models.tokenizer.codebook, [log_p.shape[1] for log_p in laws]
    results = []
    for step in sorted({round(i * (len(sizes) - 1) / (TESTED - 1)) for i in range(TESTED)}):
        statistic, degrees = 0.0, 0
        for context in range(CONTEXTS):
            position = int(torch.randint(sizes[step], (1,), generator=generator))
            log_p = laws[step][context, position]
            noise = torch.randn(draws, codebook.shape[1], generator=generator)
            tokens = tokens_from_noise(noise, log_p.expand(draws, -1), codebook, steps or models.pairs.steps)
            value, free = chi_square(tokens, log_p.exp())
            statistic, degrees = statistic + value, degrees + free
        p = p_value(statistic, degrees)
        figures = {"step": step, "statistic": statistic, "degrees": degrees, "p_value": p}
        results.append({**figures, "accepted": p > LEVEL})
    return results


def chi_square(tokens: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom of drawn tokens (N,) against probabilities (V,).

    Codes expected too rarely are one bin; if that bin is still too rare, it joins the last of the others.
    """
    expected = probabilities.double() / probabilities.sum() * len(tokens)
    counts = torch.stack([torch.bincount(tokens, minlength=len(expected)).double(), expected])
    rare = expected < LEAST_EXPECTED
    counts = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], 1)
    if counts[1, -1] < LEAST_EXPECTED and counts.shape[1] > 1:
        counts = torch.cat([counts[:, :-2], counts[:, -2:].sum(1, keepdim=True)], 1)
    observed, expected = counts
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def p_value(statistic: float, degrees: int) -> float:
    """Probability of a chi-square of `degrees` degrees of freedom to be at least `statistic`."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1])) if degrees else 1.0
