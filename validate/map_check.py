"""Does the flow-matching map draw tokens by the trained teacher's probabilities? A chi-square test of up to
four AR steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddexport.distill.mapping import tokens_from_noise
from ddexport.distill.teacher import generate
from ddexport.validate.image_sets import Models

CONTEXTS, SEED = 8, 77
TESTED = 4  # AR steps, evenly spread: all scales of a small VAR, some tokens of a raster order
LEVEL = 0.001  # a correct map fails one such test in a thousand


@dataclass(frozen=True)
class ChiSquare:
    """One AR step's test over all its contexts: the statistic, its degrees of freedom, and how likely so much
    is.
    """

    step: int
    statistic: float
    degrees: int
    p_value: float

    @property
    def accepted(self) -> bool:
        """Whether the drawn tokens can pass for the teacher's."""
        return self.p_value > LEVEL

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "step": self.step,
            "statistic": self.statistic,
            "degrees": self.degrees,
            "p_value": self.p_value,
            "accepted": self.accepted,
        }


def chi_square(tokens: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom of drawn tokens (N,) against probabilities (V,).

    Codes expected fewer than 5 times are one bin, as the test's theory asks; if that bin is still expected
    fewer than 5 times, it joins the last of the others.
    """
    expected = probabilities.double() / probabilities.sum() * len(tokens)
    observed = torch.bincount(tokens, minlength=len(expected)).double()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    if expected[-1] < 5 and len(expected) > 1:  # too rare even together: part of the last common bin
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
        observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def p_value(statistic: float, degrees: int) -> float:
    """Probability of a chi-square of `degrees` degrees of freedom to be at least `statistic`."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1])) if degrees else 1.0


def check_map(models: Models, draws: int, steps: int | None = None) -> list[ChiSquare]:
    """Test AR steps in `CONTEXTS` contexts (label, tokens before it, position) of `draws` tokens each."""
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randint(models.recipe.classes, (CONTEXTS,), generator=generator)
    chosen: list[Tensor] = []

    def choose(log_p: Tensor, positions: slice) -> Tensor:
        chosen.append(log_p)
        return torch.multinomial(log_p.exp().flatten(0, 1), 1, generator=generator).view(log_p.shape[:-1])

    generate(models.teacher, models.tokenizer, labels, choose, models.pairs.guidance, models.pairs.top_k)
    codebook = models.tokenizer.codebook
    results = []
    groups = list(pairwise(models.tokenizer.starts))
    for step in sorted({round(i * (len(groups) - 1) / (TESTED - 1)) for i in range(TESTED)}):
        a, b = groups[step]
        statistic, degrees = 0.0, 0
        for context in range(CONTEXTS):
            position = int(torch.randint(b - a, (1,), generator=generator))
            log_p = chosen[step][context, position]
            noise = torch.randn(draws, codebook.shape[1], generator=generator)
            tokens = tokens_from_noise(noise, log_p.expand(draws, -1), codebook, steps or models.pairs.steps)
            value, free = chi_square(tokens, log_p.exp())
            statistic, degrees = statistic + value, degrees + free
        results.append(ChiSquare(step, statistic, degrees, p_value(statistic, degrees)))
    return results
