"""What each stage must keep, in both families: the tokenizer's algebra, the teacher's sampling, the student's
start and its losses."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from ddexport.distill.conditions import Classes
from ddexport.distill.loop import Run
from ddexport.distill.machine import bfloat16
from ddexport.distill.pairs import make_pairs, mapped_tokens
from ddexport.distill.settings import PairSettings
from ddexport.distill.student import student_loss
from ddexport.distill.teacher import at_random, generate, log_probabilities
from ddexport.distill.tokenizer import quiet_residuals, seed_codebook
from ddexport.distill.trainers import llamagen_dd, var_dd
from ddexport.families._checkpoint import connect, random_part
from ddexport.recipe import load_recipe


class Model:
    """An embedded model with random weights, and its trainer."""

    def __init__(self, name: str, trains: ModuleType) -> None:
        self.recipe, self.trains, self.is_var = load_recipe(name), trains, trains is var_dd
        self.length, self.codes = self.recipe.sequence.length, self.recipe.sequence.codebook
        self.tokenizer = random_part(self.recipe, "tokenizer", 1)
        self.teacher = random_part(self.recipe, "teacher", 2)

    def student(self):
        student = random_part(self.recipe, "student", 3)
        connect(student, self.tokenizer)
        return student

    def latent(self):
        return self.trains.latent(self.tokenizer, images())

    def tokens(self):
        return self.tokenizer.tokens(self.tokenizer.encode(images()))


@pytest.fixture(params=["digits-var", "digits-llamagen"])
def model(request):
    return Model(request.param, var_dd if request.param == "digits-var" else llamagen_dd)


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_what_is_trained_is_what_is_used(model):
    """Tokens and latent of the published computation; gradients go to the codes, not to the encoder."""
    tokenizer = model.tokenizer.requires_grad_(True)
    latent = model.latent()
    sums, tokens = model.trains.partial_latents(tokenizer, latent)
    assert torch.equal(tokens, model.tokens())
    torch.testing.assert_close(sums[-1], tokenizer.latent(tokenizer.embed(tokens)))
    assert sums.shape == (len(tokenizer.scales) if model.is_var else 1, *latent.shape)
    (sums * torch.randn(sums.shape)).sum().backward()
    assert tokenizer.embedding.weight.grad.abs().sum() > 0
    assert all(phi.conv.weight.grad is not None for phi in getattr(tokenizer, "phis", ()))
    assert tokenizer.quant_conv.weight.grad is None


def test_settling_the_codebook_changes_no_token_and_no_image(model):
    """VAR's codes get a standard deviation of one, LlamaGen's a length of one."""
    tokenizer = model.tokenizer
    tokenizer.embedding.weight.mul_(3.0)  # so that there is something to fold
    tokens = model.tokens()
    image = tokenizer(tokenizer.embed(tokens))
    model.trains.settle_codebook(tokenizer)
    assert torch.equal(model.tokens(), tokens)
    torch.testing.assert_close(tokenizer(tokenizer.embed(tokens)), image, atol=2e-5, rtol=0)
    codes = tokenizer.embedding.weight
    size = codes.std()[None] if model.is_var else codes.norm(dim=1)
    torch.testing.assert_close(size, torch.ones_like(size), atol=1e-5, rtol=0)


def test_the_seeded_codebook_holds_vectors_of_every_scale(model):
    tokenizer, count = model.tokenizer, 64
    seed_codebook(tokenizer, model.trains, images(count), torch.Generator().manual_seed(0))
    codes = tokenizer.embedding.weight
    assert codes.abs().max() < 900  # no placeholder is left
    pools = model.trains.residual_vectors(tokenizer, model.trains.latent(tokenizer, images(count)))
    starts = tokenizer.scales if model.is_var else [4]
    assert [len(pool) for pool in pools] == [count * s * s for s in starts]
    first = codes[: len(codes) // len(pools)]
    assert (first[:, None] - pools[0]).norm(dim=-1).min(1).values.max() < 2e-3


def test_residual_blocks_start_as_the_identity(model):
    quiet_residuals(model.tokenizer)
    block, attention = model.tokenizer.encoder.mid[0], model.tokenizer.encoder.mid[1]
    block.conv2.bias.zero_()
    attention.proj.bias.zero_()
    x = torch.randn(2, block.conv2.out_channels, 4, 4)
    torch.testing.assert_close(attention(block(x)), x)


def met_while_drawing(model, labels, guidance):
    """The tokens drawn and the probabilities met, AR step by AR step."""
    met = []

    def choose(log_p, positions):
        assert (positions.start, positions.stop - positions.start) == (
            sum(m.shape[1] for m in met),
            log_p.shape[1],
        )
        met.append(log_p)
        return log_p.argmax(-1)

    return generate(model.teacher, model.tokenizer, (labels,), choose, guidance), torch.cat(met, 1)


@torch.no_grad()
def test_sampling_uses_the_trained_conditionals(model):
    """The probabilities met while drawing with the cache are those of one pass over the drawn tokens; with
    guidance they move away from the null class: uncond + s (cond - uncond), where VAR's s - 1 grows with the
    scale and leaves the first alone."""
    labels = torch.tensor([0, 3, 9])
    none = 0.0 if model.is_var else 1.0
    for guidance in (none, 2.0):
        tokens, met = met_while_drawing(model, labels, guidance)
        assert tokens.shape == (3, model.length)
        inputs = model.trains.teacher_inputs(model.tokenizer, tokens)
        logits, free = (model.teacher(inputs, which) for which in (labels, torch.full_like(labels, 10)))
        if model.is_var:
            ends = [*model.tokenizer.starts]
            scale = torch.bucketize(torch.arange(model.length), torch.tensor(ends[1:]), right=True)
            strength = 1 + guidance * scale[:, None] / (len(ends) - 2)
        else:
            strength = guidance
        expected = log_probabilities(free + strength * (logits - free))
        torch.testing.assert_close(met, expected, atol=1e-3 if guidance > none else 1e-4, rtol=0)


def test_top_k_leaves_exactly_k_codes():
    logits = torch.randn(4, 7, 50, generator=torch.Generator().manual_seed(0))
    kept = log_probabilities(logits, 5)
    assert (torch.isfinite(kept).sum(-1) == 5).all()
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(4, 7, dtype=torch.float64))


def test_ordinary_sampling_has_the_given_frequencies():
    log_p = torch.tensor([0.7, 0.2, 0.1]).double().log().expand(20_000, 1, 3)
    tokens = at_random(torch.Generator().manual_seed(0))(log_p, slice(0, 1))
    assert tokens.shape == (20_000, 1)
    share = tokens.flatten().bincount(minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.7, 0.2, 0.1]), atol=0.02, rtol=0)


def test_pairs_are_the_map_of_their_noise_whatever_the_chunk(model, tmp_path):
    """And a token depends on the noise up to its own AR step only, which a causal student can learn."""
    settings = PairSettings(count=6, guidance=1.5, steps=4)
    pairs = make_pairs(model.teacher, model.tokenizer, Classes(10), settings, Run(tmp_path, 5))
    again = make_pairs(model.teacher, model.tokenizer, Classes(10), settings, Run(tmp_path, 5))
    assert all(torch.equal(pairs[name], again[name]) for name in pairs)

    def mapped(noise):
        return mapped_tokens(model.teacher, model.tokenizer, noise, (pairs["labels"][3:4],), settings)

    noise, tokens = pairs["noise"][3:4].clone(), pairs["tokens"][3:4].long()
    assert torch.equal(mapped(noise), tokens)
    other = make_pairs(model.teacher, model.tokenizer, Classes(10), settings, Run(tmp_path, 6))
    noise[:, 5:] = other["noise"][3:4, 5:]
    changed = mapped(noise)
    assert torch.equal(changed[:, :5], tokens[:, :5]) and not torch.equal(changed, tokens)


def test_the_student_starts_as_the_teacher(model):
    student = model.student()
    model.trains.initialise_student(student, model.teacher, torch.Generator().manual_seed(0))
    ours, theirs = dict(student.named_parameters()), dict(model.teacher.named_parameters())
    if model.is_var:  # the tables get one row for the class position
        for name in ("positions", "level_embedding.weight"):
            rows, value = (
                (ours[name][0], theirs[name][0]) if name == "positions" else (ours[name], theirs[name])
            )
            assert torch.equal(rows[1:], value) and rows[0].abs().max() < 0.2
            del ours[name], theirs[name]
        new = {"noise_or_data", "embedding_modulation", "embedding_head"}
    else:  # the embedding is the linear reading of the teacher's table with the least squared error
        table = theirs.pop("token_embedding.weight")
        rest = table - student.token_embedding(student.codebook)
        assert (F.pad(student.codebook, (0, 1), value=1.0).T @ rest).abs().max() < 1e-3
        assert rest.square().mean() < table.square().mean()
        new = {"token_embedding", "noise_or_data_embedding", "embedding_modulation", "embedding_head"}
    for name, value in theirs.items():
        assert torch.equal(ours.pop(name), value), name
    assert {name.split(".")[0] for name in ours} == new
    assert all(value.abs().max() < 0.2 for name, value in ours.items() if "token_embedding" not in name)


@torch.no_grad()
def test_losses_count_unknown_positions_only_and_each_the_same(model):
    """Under the known tokens the noise is not seen; the mean is over positions, not over samples."""
    student, generator = model.student(), torch.Generator().manual_seed(0)
    noise = torch.randn(2, model.length, 8, generator=generator)
    tokens = torch.randint(model.codes, (2, model.length), generator=generator)
    labels, known = torch.tensor([1, 2]), torch.tensor([1, 5])

    def loss(noise=noise, tokens=tokens, rows=slice(None), weight=1.0):
        return student_loss(student, noise[rows], tokens[rows], (labels[rows],), known[rows], weight)

    value = loss()
    torch.testing.assert_close(value[0], value[1] + value[2])
    hidden, seen, other = noise.clone(), noise.clone(), tokens.clone()
    hidden[0, :1] += 1
    hidden[1, :5] += 1
    seen[:, 5:] += 1
    other[:, -1] = (other[:, -1] + 1) % model.codes
    torch.testing.assert_close(loss(hidden), value)
    assert abs(float(value[0] - loss(seen)[0])) > 1e-3
    assert abs(float(value[0] - loss(tokens=other)[0])) > 1e-4
    last = torch.full((2,), model.length - 1)
    tail = torch.cat([student.codebook[tokens[:, :-1]], noise[:, -1:]], dim=1)
    with bfloat16():
        logits = student.heads(tail, labels, last)[0][:, -1]
    entropy = student_loss(student, noise, tokens, (labels,), last, 0.0)[0]
    torch.testing.assert_close(entropy, F.cross_entropy(logits.float(), tokens[:, -1]), atol=1e-3, rtol=0)
    alone = [loss(rows=slice(i, i + 1), weight=0.0)[0] for i in range(2)]
    counts = [model.length - 1, model.length - 5]
    mean = (counts[0] * alone[0] + counts[1] * alone[1]) / sum(counts)
    torch.testing.assert_close(loss(weight=0.0)[0], mean, atol=5e-3, rtol=0)
