"""VAR's tokenizer and teacher compute what the published code computes: every number of the golden file, to
2e-5. Its student: test_students.py."""

from __future__ import annotations

from itertools import pairwise

import torch

from ddexport.families._var_tokenizer import phi_of_scale
from ddexport.families.var_dd import guided
from tests.goldens import VAR, close, fixed_images

ENDS = [0, 1, 5, 14, 30]


@torch.no_grad()
def test_latent_and_image() -> None:
    latent = VAR.tokenizer.latent(VAR.expected["onestep_step0_sequence"])
    close(latent, VAR.expected["onestep_fhat"])
    close(VAR.tokenizer.decode(latent), VAR.expected["onestep_image"])


def test_phis_of_the_real_scales() -> None:
    """Scales 2 and 7 of ten are exact ties that only float64 rounding decides."""
    assert phi_of_scale(10) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_of_scale(4) == [0, 1, 2, 3]


@torch.no_grad()
def test_the_teacher_draws_the_published_tokens() -> None:
    """Scale by scale with a cache and guidance: raw and guided logits, greedy tokens, the image."""
    expected, tokenizer, teacher = VAR.expected, VAR.tokenizer, VAR.teacher
    scales, cache, f_hat, sequence = 4, teacher.new_cache(), torch.zeros(2, 8, 4, 4), []
    labels = torch.cat([expected["labels"], torch.full((2,), 10)])
    features = torch.zeros(2, 1, 8)
    for k, (a, b) in enumerate(pairwise(ENDS)):
        logits = teacher.step(features.repeat(2, 1, 1), labels, a, cache)
        close(logits, expected[f"teacher_ar_rawlogits_scale{k}"])
        mixed = guided(logits, 1.5 * k / (scales - 1))
        close(mixed, expected[f"teacher_ar_cfglogits_scale{k}"])
        tokens = mixed.argmax(-1)
        assert torch.equal(tokens, expected[f"teacher_ar_tokens_scale{k}"])
        assert tokens.shape[1] == b - a
        sequence.append(tokenizer.embed(tokens))
        f_hat = f_hat + tokenizer.contribution(sequence[-1], k)
        if k + 1 < scales:
            features = tokenizer.next_features(f_hat, k + 1)
    close(tokenizer.decode(f_hat), expected["teacher_ar_image"])
    close(tokenizer(torch.cat(sequence, 1)), expected["teacher_ar_image"])


@torch.no_grad()
def test_teacher_forcing_equals_sampling() -> None:
    """The training pass over all scales at once gives the logits that sampling sees scale by scale."""
    tokens = torch.cat([VAR.expected[f"teacher_ar_tokens_scale{k}"] for k in range(4)], dim=1)
    features = VAR.tokenizer.teacher_features(VAR.tokenizer.embed(tokens))
    sampled = [VAR.expected[f"teacher_ar_rawlogits_scale{k}"][:2] for k in range(4)]
    close(VAR.teacher(features, VAR.expected["labels"]), torch.cat(sampled, dim=1))


@torch.no_grad()
def test_encoder_and_residual_quantisation() -> None:
    """A sequence of codes decodes to a latent whose own tokens, scale by scale, reduce the residual to its
    end."""
    tokenizer = VAR.tokenizer
    latent = tokenizer.encode(fixed_images())
    assert latent.shape == (2, 8, 4, 4)
    tokens = tokenizer.tokens(latent)
    assert tokens.shape == (2, 30) and tokens.dtype == torch.int64
    rest = latent
    for k, (a, b) in enumerate(pairwise(ENDS)):
        view = torch.nn.functional.adaptive_avg_pool2d(rest, k + 1).flatten(2).transpose(1, 2)
        assert torch.equal(torch.cdist(view, tokenizer.codebook).argmin(-1), tokens[:, a:b])
        rest = rest - tokenizer.contribution(tokenizer.embed(tokens[:, a:b]), k)
    torch.testing.assert_close(latent - rest, tokenizer.latent(tokenizer.embed(tokens)))
