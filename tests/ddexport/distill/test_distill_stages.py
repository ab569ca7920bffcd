"""What each stage must keep: the tokenizer's algebra, the teacher's sampling, the student's start and its
losses.
"""

from __future__ import annotations

import pytest
import torch

from ddexport.distill.loop import Run
from ddexport.distill.pairs import make_pairs, mapped_tokens
from ddexport.distill.settings import PairSettings
from ddexport.distill.student import student_loss
from ddexport.distill.teacher import at_random, generate, log_probabilities
from ddexport.distill.tokenizer import quiet_residuals, seed_codebook
from ddexport.distill.trainers import trainer
from ddexport.distill.trainers.var_dd import (
    initialise_student,
    initialise_teacher,
    partial_latents,
    residual_vectors,
    settle_codebook,
)
from ddexport.families._checkpoint import connect, random_part
from ddexport.recipe import load_recipe


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("digits-var")


@pytest.fixture
def tokenizer(recipe):
    return random_part(recipe, "tokenizer", 1)


@pytest.fixture(scope="module")
def teacher(recipe):
    return random_part(recipe, "teacher", 2)


@pytest.fixture
def student(recipe, tokenizer):
    student = random_part(recipe, "student", 3)
    connect(student, tokenizer)
    return student


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_last_partial_sum_is_the_tokenizers_own_latent(tokenizer):
    """What is trained is what is used: same tokens and same f_hat as the published computation."""
    latent = tokenizer.encode(images())
    sums, tokens = partial_latents(tokenizer, latent)
    assert torch.equal(tokens, tokenizer.tokens(latent))
    torch.testing.assert_close(sums[-1], tokenizer.latent(tokenizer.embed(tokens)))


def test_partial_sums_pass_gradients_to_codes_and_phis_but_not_to_the_encoder(tokenizer):
    tokenizer.requires_grad_(True)
    sums, _ = partial_latents(tokenizer, tokenizer.encode(images()))
    sums.square().mean().backward()
    assert tokenizer.embedding.weight.grad.abs().sum() > 0
    assert all(phi.conv.weight.grad is not None for phi in tokenizer.phis)
    assert tokenizer.quant_conv.weight.grad is None


def test_scaling_the_codebook_changes_no_token_and_no_image(tokenizer):
    before_tokens = tokenizer.tokens(tokenizer.encode(images()))
    before = tokenizer(tokenizer.embed(before_tokens))
    tokenizer.embedding.weight.mul_(3.0)  # so that there is something to fold
    tokens = tokenizer.tokens(tokenizer.encode(images()))
    expected = tokenizer(tokenizer.embed(tokens))
    divisor = settle_codebook(tokenizer)
    assert divisor > 2 and tokenizer.codebook.std().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(tokenizer.tokens(tokenizer.encode(images())), tokens)
    torch.testing.assert_close(tokenizer(tokenizer.embed(tokens)), expected, atol=2e-5, rtol=0)
    assert not torch.equal(before_tokens, tokens) or not torch.allclose(before, expected)


def test_the_seeded_codebook_holds_vectors_of_every_scale(tokenizer):
    seed_codebook(tokenizer, trainer("var_dd"), images(64), torch.Generator().manual_seed(0))
    assert tokenizer.codebook.abs().max() < 900  # no placeholder is left
    pools = residual_vectors(tokenizer, tokenizer.encode(images(64)))
    assert [len(pool) for pool in pools] == [64 * s * s for s in tokenizer.scales]
    first = tokenizer.codebook[: len(tokenizer.codebook) // len(tokenizer.scales)]
    assert torch.cdist(first, pools[0]).min(1).values.max() < 2e-3


def test_residual_blocks_start_as_the_identity(tokenizer):
    quiet_residuals(tokenizer)
    block, attention = tokenizer.encoder.mid[0], tokenizer.encoder.mid[1]
    block.conv2.bias.zero_()
    attention.proj.bias.zero_()
    x = torch.randn(2, 64, 4, 4)
    torch.testing.assert_close(attention(block(x)), x)


def test_sampling_scale_by_scale_uses_the_trained_conditionals(teacher, tokenizer):
    """The probabilities met while drawing are those of one block-causal pass over the drawn tokens."""
    met = []

    def choose(log_p, positions):
        met.append(log_p)
        return log_p.argmax(-1)

    labels = torch.tensor([0, 3, 9])
    tokens = generate(teacher, tokenizer, labels, choose, guidance=0.0)
    with torch.no_grad():
        logits = teacher(tokenizer.teacher_features(tokenizer.embed(tokens)), labels)
    torch.testing.assert_close(torch.cat(met, 1), log_probabilities(logits), atol=1e-4, rtol=0)


def test_guidance_grows_with_the_scale_and_leaves_the_first_alone(teacher, tokenizer):
    def met_with(guidance):
        found = []

        def choose(log_p, positions):
            found.append(log_p)
            return torch.zeros(log_p.shape[:-1], dtype=torch.int64)

        generate(teacher, tokenizer, torch.tensor([1, 2]), choose, guidance)
        return found

    plain, strong = met_with(0.0), met_with(2.0)
    torch.testing.assert_close(plain[0], strong[0], atol=1e-5, rtol=0)
    gaps = [(a - b).abs().mean().item() for a, b in zip(plain, strong, strict=True)]
    assert gaps[1] > 0.01 and gaps[3] > gaps[1]


def test_top_k_leaves_exactly_k_codes():
    logits = torch.randn(4, 7, 50, generator=torch.Generator().manual_seed(0))
    kept = log_probabilities(logits, 5)
    assert (torch.isfinite(kept).sum(-1) == 5).all()
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(4, 7, dtype=torch.float64))


def test_pairs_are_the_map_of_their_noise_whatever_the_chunk(teacher, tokenizer, tmp_path):
    settings = PairSettings(count=12, guidance=1.0, steps=4)
    pairs = make_pairs(teacher, tokenizer, settings, Run(tmp_path, 5))
    again = make_pairs(teacher, tokenizer, settings, Run(tmp_path, 5))
    assert all(torch.equal(pairs[name], again[name]) for name in pairs)
    alone = mapped_tokens(teacher, tokenizer, pairs["noise"][3:4], pairs["labels"][3:4], settings)
    assert torch.equal(alone[0], pairs["tokens"][3].long())
    other = make_pairs(teacher, tokenizer, settings, Run(tmp_path, 6))
    assert not torch.equal(pairs["noise"], other["noise"])


def test_ordinary_sampling_has_the_given_frequencies():
    log_p = torch.tensor([0.7, 0.2, 0.1]).double().log().expand(20_000, 1, 3)
    tokens = at_random(torch.Generator().manual_seed(0))(log_p, slice(0, 1))
    assert tokens.shape == (20_000, 1)
    share = tokens.flatten().bincount(minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.7, 0.2, 0.1]), atol=0.02, rtol=0)


def test_the_student_starts_as_the_teacher_row_by_row(student, teacher):
    initialise_student(student, teacher, torch.Generator().manual_seed(0))
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    new = {name for name in ours if name not in theirs}
    assert {name.split(".")[0] for name in new} == {
        "noise_or_data",
        "embedding_modulation",
        "embedding_head",
    }
    for name, value in theirs.items():
        if name == "positions":
            assert ours[name].shape[1] == value.shape[1] + 1
            assert torch.equal(ours[name][:, 1:], value) and ours[name][:, 0].abs().max() < 0.2
        elif name == "level_embedding.weight":
            assert torch.equal(ours[name][1:], value) and ours[name][0].abs().max() < 0.2
        else:
            assert torch.equal(ours[name], value), name
    for name in new:
        assert ours[name].abs().max() < 0.2, name


def test_the_teachers_start_lets_a_tenth_through_each_gate(teacher, recipe):
    fresh = random_part(recipe, "teacher", 4)
    initialise_teacher(fresh, torch.Generator().manual_seed(0))
    width = recipe.model["width"]
    for linear in fresh.conditioning.blocks:
        assert (linear.bias[: 2 * width] == 0.1).all() and not linear.bias[2 * width :].any()
    assert fresh.positions.std().item() == pytest.approx(0.02, rel=0.1)


def test_losses_count_unknown_positions_only(student):
    """Changing a known token's target changes nothing; changing an unknown one's does."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 30, 8, generator=generator)
    tokens = torch.randint(128, (4, 30), generator=generator)
    labels, known = torch.arange(4), torch.full((4,), 5)
    with torch.no_grad():
        value = student_loss(student, noise, tokens, labels, known, 1.0)
        noise_changed = noise.clone()
        noise_changed[:, :5] += 1  # under the known tokens the noise is not seen
        same = student_loss(student, noise_changed, tokens, labels, known, 1.0)
        tokens_changed = tokens.clone()
        tokens_changed[:, 29] = (tokens_changed[:, 29] + 1) % 128
        other = student_loss(student, noise, tokens_changed, labels, known, 1.0)
    torch.testing.assert_close(value, same)
    assert abs(float(value[0] - other[0])) > 1e-4
    torch.testing.assert_close(value[0], value[1] + value[2])


def test_losses_weigh_every_unknown_position_the_same(student):
    """A sample with fewer unknown positions does not count for more: the mean is over positions."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 30, 8, generator=generator)
    tokens = torch.randint(128, (2, 30), generator=generator)
    labels, known = torch.tensor([1, 2]), torch.tensor([0, 5])
    with torch.no_grad():
        both = student_loss(student, noise, tokens, labels, known, 0.0)[0]
        alone = [
            student_loss(
                student, noise[i : i + 1], tokens[i : i + 1], labels[i : i + 1], known[i : i + 1], 0.0
            )[0]
            for i in range(2)
        ]
    torch.testing.assert_close(both, (30 * alone[0] + 25 * alone[1]) / 55, atol=5e-3, rtol=0)
