"""The VAR modules compute what the published code computes: every number of the golden file, to 2e-5."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ddexport.families import family
from ddexport.families._checkpoint import load_part
from ddexport.families._var_tokenizer import phi_of_scale
from ddexport.families.var_dd import guided
from ddexport.recipe import load_recipe, recipe_from_dict
from ddexport.runtime.errors import DDError

GOLDEN = Path(__file__).parents[2] / "golden" / "var-dd-small"
TOLERANCE = 2e-5
ENDS = [0, 1, 5, 14, 30]


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "expected.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(str(GOLDEN / "recipe.yaml"))


@pytest.fixture(scope="module")
def tokenizer(recipe):
    return load_part(recipe, "tokenizer", GOLDEN / "vae.pth")


@pytest.fixture(scope="module")
def teacher(recipe):
    return load_part(recipe, "teacher", GOLDEN / "teacher.pth")


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_latent_and_image(expected, tokenizer):
    f_hat = tokenizer.latent(expected["onestep_step0_sequence"])
    close(f_hat, expected["onestep_fhat"])
    close(tokenizer.decode(f_hat), expected["onestep_image"])


def test_phis_of_the_real_scales():
    """Scales 2 and 7 of ten are exact ties that only float64 rounding decides."""
    assert phi_of_scale(10) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert phi_of_scale(4) == [0, 1, 2, 3]


@torch.no_grad()
def test_teacher_greedy(expected, tokenizer, teacher):
    """Scale by scale with a cache and guidance: raw and guided logits, greedy tokens, the image."""
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
def test_teacher_forcing_equals_sampling(expected, tokenizer, teacher):
    """The training pass over all scales at once gives the logits that sampling sees scale by scale."""
    tokens = torch.cat([expected[f"teacher_ar_tokens_scale{k}"] for k in range(4)], dim=1)
    features = tokenizer.teacher_features(tokenizer.embed(tokens))
    logits = teacher(features, expected["labels"])
    sampled = torch.cat([expected[f"teacher_ar_rawlogits_scale{k}"][:2] for k in range(4)], dim=1)
    close(logits, sampled)


@torch.no_grad()
def test_student_mask_hides_the_own_scale(expected, recipe):
    """Moving one position changes itself and later scales, and nothing of its own or earlier scales."""
    student, known = load_part(recipe, "student", GOLDEN / "student.pth"), torch.zeros(2, dtype=torch.int64)
    moved = expected["noise"].clone()
    moved[:, 7] += 1.0  # inside the third scale, positions 5 to 13
    before, _ = student.heads(expected["noise"], expected["labels"], known)
    after, _ = student.heads(moved, expected["labels"], known)
    changed = (before - after).abs().amax(dim=(0, 2)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [7, *range(14, 30)]


@torch.no_grad()
def test_encoder_and_residual_quantisation(tokenizer):
    """A sequence of codes decodes to a latent whose own tokens, scale by scale, reduce the residual to its
    end."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = tokenizer.encode(images)
    assert latent.shape == (2, 8, 4, 4)
    tokens = tokenizer.tokens(latent)
    assert tokens.shape == (2, 30) and tokens.dtype == torch.int64
    rest = latent
    for k, (a, b) in enumerate(pairwise(ENDS)):
        view = torch.nn.functional.adaptive_avg_pool2d(rest, k + 1).flatten(2).transpose(1, 2)
        assert torch.equal(torch.cdist(view, tokenizer.codebook).argmin(-1), tokens[:, a:b])
        rest = rest - tokenizer.contribution(tokenizer.embed(tokens[:, a:b]), k)
    torch.testing.assert_close(latent - rest, tokenizer.latent(tokenizer.embed(tokens)))


def test_real_sizes_have_the_published_number_of_parameters():
    """d16, d20 and d24 as the paper counts them, and the tokenizer; on the meta device, so nothing is
    allocated."""
    for name in ("var-d16", "var-d20", "var-d24"):
        recipe = load_recipe(name)
        with torch.device("meta"):
            parts = {
                role: family("var_dd").build(recipe, role) for role in ("student", "tokenizer", "teacher")
            }
        counts = {role: sum(p.numel() for p in part.parameters()) for role, part in parts.items()}
        assert counts["student"] == recipe.parameters["student"]
        assert counts["tokenizer"] == recipe.parameters["tokenizer"] == 108_948_355
        assert (
            counts["teacher"]
            == {"var-d16": 310_283_520, "var-d20": 600_917_136, "var-d24": 1_033_399_360}[name]
        )


@pytest.mark.parametrize("scales", [4, "1234", [4], None])
def test_scales_that_are_no_list_are_a_clear_error(scales):
    """A recipe of one's own may get this wrong; it must not end in a traceback."""
    data = load_recipe(str(GOLDEN / "recipe.yaml")).to_dict()
    data["model"]["scales"] = scales
    with pytest.raises(DDError, match=r"scales|model\["):
        family("var_dd").build(recipe_from_dict(data), "student")
