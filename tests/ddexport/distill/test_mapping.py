"""The flow-matching map: the tokens it draws follow the probabilities, and it is a map (same noise, same
token).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddexport.distill.mapping import posterior, tokens_from_noise, velocity

V, CV, DRAWS = 64, 8, 40_000
REJECT, ACCEPT = 1e-4, 1e-3


def problem(seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """A codebook of unit standard deviation and uneven probabilities, as a teacher gives them."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(V, CV, generator=generator)
    return codebook / codebook.std(), (torch.randn(V, generator=generator) * spread).log_softmax(0)


def noise(count: int = DRAWS, seed: int = 1) -> Tensor:
    return torch.randn(count, CV, generator=torch.Generator().manual_seed(seed))


def chi_square_p(tokens: Tensor, probabilities: Tensor) -> float:
    """Probability that tokens of these probabilities deviate as much; bins expected below 5 are merged."""
    expected = probabilities.double() * len(tokens)
    found = torch.bincount(tokens, minlength=V).double()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found = torch.cat([found[~rare], found[rare].sum()[None]])
    statistic = ((found - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2))


def euler(x: Tensor, log_p: Tensor, codebook: Tensor, steps: int) -> Tensor:
    """The plain solver on the velocity itself, to compare with and as a reference when the steps are many."""
    x, rows, codes = x.double(), log_p.double().expand(len(x), -1), codebook.double()
    for i in range(steps - 1):
        x = x + velocity(x, i / steps, rows, codes) / steps
    return posterior(x, (steps - 1) / steps, rows, codes).argmax(1)


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_the_tokens_follow_the_probabilities(spread):
    codebook, log_p = problem(spread=spread)
    tokens = tokens_from_noise(noise(), log_p.expand(DRAWS, V), codebook)
    assert chi_square_p(tokens, log_p.exp()) > ACCEPT


def test_the_same_chi_square_rejects_a_map_that_is_wrong():
    """Its power: too few steps, Euler's method, and probabilities that are off by a few percent must all
    fail.
    """
    codebook, log_p = problem()
    rows = log_p.expand(DRAWS, V)
    assert chi_square_p(tokens_from_noise(noise(), rows, codebook, steps=4), log_p.exp()) < REJECT
    assert chi_square_p(euler(noise(), log_p, codebook, 32), log_p.exp()) < REJECT
    slightly_off = (log_p * 1.05).log_softmax(0)
    tokens = tokens_from_noise(noise(), slightly_off.expand(DRAWS, V), codebook)
    assert chi_square_p(tokens, log_p.exp()) < REJECT


def test_it_agrees_with_a_solver_of_many_steps():
    codebook, log_p = problem()
    reference = euler(noise(3000), log_p, codebook, 1500)
    tokens = tokens_from_noise(noise(3000), log_p.expand(3000, V), codebook)
    assert (tokens == reference).double().mean() > 0.985


def test_same_noise_same_token_alone_or_in_any_batch():
    codebook, log_p = problem()
    x = noise(5000).view(50, 100, CV)
    rows = log_p.expand(50, 100, V)
    tokens = tokens_from_noise(x, rows, codebook)
    assert tokens.shape == (50, 100) and tokens.dtype == torch.int64
    torch.testing.assert_close(tokens_from_noise(x, rows, codebook), tokens)
    torch.testing.assert_close(tokens_from_noise(x[7, 3:4], rows[7, 3:4], codebook), tokens[7, 3:4])


def test_codes_without_probability_are_never_drawn():
    """And a certain one is drawn from all noise."""
    codebook, log_p = problem()
    for count in (5, 1):
        allowed = log_p.topk(count).indices
        masked = torch.full_like(log_p, -torch.inf)
        masked[allowed] = log_p[allowed]
        tokens = tokens_from_noise(noise(2000), masked.log_softmax(0).expand(2000, V), codebook)
        assert set(tokens.tolist()) <= set(allowed.tolist())


def test_the_velocity_is_the_closed_form():
    """v = sum_k w_k (c_k - x) / (1 - t), with w by Bayes' rule from the normal densities written out."""
    codebook, log_p = problem()
    x, codes, t = noise(20).double(), codebook.double(), 0.6
    density = torch.exp(-((x[:, None] - t * codes) ** 2).sum(-1) / (2 * (1 - t) ** 2)) * log_p.exp().double()
    weights = density / density.sum(1, keepdim=True)
    expected = (weights[..., None] * (codes - x[:, None])).sum(1) / (1 - t)
    found = velocity(x, t, log_p.double().expand(20, V), codes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
