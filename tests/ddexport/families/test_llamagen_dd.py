"""LlamaGen's tokenizer and teacher compute what the published code computes: every number of the golden file,
to 2e-5. Its student: test_students.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ddexport.families._checkpoint import published_state
from ddexport.families._llamagen_models import guided
from ddexport.validate.bench.naive import llamagen_dd
from tests.goldens import LLAMAGEN, close, fixed_images, known


def unclamped(sequence: Tensor) -> Tensor:
    """The image as the golden file has it."""
    return (LLAMAGEN.tokenizer.pixels(LLAMAGEN.tokenizer.latent(sequence)) + 1) / 2


@torch.no_grad()
def test_the_epsilons_of_both_heads() -> None:
    """At a variance of 1e-6, where an epsilon is half of what is divided by or more; the golden file's hidden
    states vary by 1 and do not see it. By the formulas of arXiv 2406.06525 and the published code's epsilons
    (the golden file's README: 1e-5 for RMSNorm, 1e-6 for LayerNorm) in float64, for blocks that add nothing.
    """
    student, tokens, label = LLAMAGEN.student(), LLAMAGEN.expected["noise"], LLAMAGEN.expected["labels"]
    for block in student.blocks:
        block.attention.proj.weight.zero_()
        block.mlp.output.weight.zero_()
    for part in (student.condition_embedding, student.token_embedding, student.noise_or_data_embedding):
        part.weight.mul_(1e-2)
    student.token_embedding.bias.zero_()
    state = published_state(student, LLAMAGEN.recipe(), "student")
    S = {key: value.double().numpy() for key, value in state.items()}
    condition = S["cls_embedding.embedding_table.weight"][label][:, None]
    x = tokens.double().numpy() @ S["tok_embeddings.weight"].T + S["n_d_embed.weight"][0]
    assert 1e-7 < x.var(-1).min() < x.var(-1).max() < 2e-5
    shift, scale = np.split(S["final_layer_conti.scale_shift_table"] + condition, 2, axis=1)
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    vectors = (normal * (1 + scale) + shift) @ S["final_layer_conti.linear.weight"].T
    vectors += S["final_layer_conti.linear.bias"]
    normal = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    logits = (normal * S["norm.weight"]) @ S["output.weight"].T
    literal = llamagen_dd.literal_step(state, student.codebook, 2, 5, tokens, label, 0)[1:]
    for got in (student.heads(tokens, label, known(0)), literal):
        close(got[0].double(), logits)
        close(got[1].double(), vectors)


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_the_teacher_draws_the_published_tokens(strength: float) -> None:
    """Token by token with a cache: logits with and without guidance, greedy tokens, the image."""
    expected, guides = LLAMAGEN.expected, strength > 1
    labels, name = expected["labels"], "teacher_ar" if guides else "teacher_ar_nocfg"
    if guides:
        labels = torch.cat([labels, torch.full((2,), 10)])
    cache, chosen, logits = LLAMAGEN.teacher.new_cache(), [], []
    last = torch.zeros(len(labels), 0, dtype=torch.int64)
    for _ in range(16):
        found = LLAMAGEN.teacher.step(last, labels, cache)
        logits.append(guided(found, strength) if guides else found)
        chosen.append(logits[-1].argmax(-1))
        last = chosen[-1].repeat(len(labels) // 2)[:, None]
    close(torch.stack(logits, 1), expected[f"{name}_{'cfg' if guides else ''}logits"])
    tokens = torch.stack(chosen, 1)
    assert torch.equal(tokens, expected[f"{name}_tokens"])
    if guides:
        close(unclamped(LLAMAGEN.tokenizer.embed(tokens)), expected["teacher_ar_image"])


@torch.no_grad()
def test_teacher_forcing_equals_sampling() -> None:
    """The training pass over all positions gives the logits that sampling sees one by one, and does not read
    the last token."""
    tokens = LLAMAGEN.expected["teacher_ar_nocfg_tokens"].clone()
    tokens[:, -1] = 0
    close(LLAMAGEN.teacher(tokens, LLAMAGEN.expected["labels"]), LLAMAGEN.expected["teacher_ar_nocfg_logits"])


@torch.no_grad()
@pytest.mark.parametrize("case", ["teach_start0", "teach_start3", "teach_start3_split11"])
def test_the_teacher_goes_on_from_a_prefix_given_at_once(case: str) -> None:
    """As in teacher-involved sampling, whose sequences and images test_teacher_bundles.py compares."""
    expected = LLAMAGEN.expected
    tokens = expected.get(f"{case}_prefix_tokens", torch.zeros(2, 0, dtype=torch.int64))
    if tokens.shape[1]:
        first = LLAMAGEN.tokenizer.nearest(expected[f"{case}_first_sequence"])
        assert torch.equal(first[:, : tokens.shape[1]], tokens)
    both = torch.cat([expected["labels"], torch.full((2,), 10)])
    cache, new, logits = LLAMAGEN.teacher.new_cache(), tokens, []
    while tokens.shape[1] < 5:
        logits.append(guided(LLAMAGEN.teacher.step(new.repeat(2, 1), both, cache), 2.0))
        new = logits[-1].argmax(-1)[:, None]
        tokens = torch.cat([tokens, new], dim=1)
    assert torch.equal(tokens, expected[f"{case}_teacher_tokens"])
    close(torch.stack(logits, 1), expected[f"{case}_teacher_cfglogits"])
    with pytest.raises(RuntimeError):  # a full cache neither wraps around nor grows
        LLAMAGEN.teacher.step(torch.zeros(4, 12, dtype=torch.int64), both, cache)


def test_codes_have_unit_length() -> None:
    """The table in the file has not; the half-precision table is widened before it is normalised."""
    table = torch.load(LLAMAGEN.files["tokenizer"], weights_only=True)["model"]["quantize.embedding.weight"]
    assert (table.float().norm(dim=1) - 1).abs().max() > 0.1
    tokenizer = LLAMAGEN.tokenizer
    for codebook in (tokenizer.codebook, LLAMAGEN.student().codebook, tokenizer.embed(torch.arange(64))):
        close(codebook, LLAMAGEN.expected["codebook_normalised"], 1e-7)


@torch.no_grad()
def test_encoder_and_quantisation() -> None:
    """Images to tokens: the nearest code of the normalised latent, row by row."""
    tokenizer = LLAMAGEN.tokenizer
    latent = tokenizer.encode(fixed_images())
    assert latent.shape == (2, 8, 4, 4)
    tokens = tokenizer.tokens(latent)
    vectors = torch.nn.functional.normalize(latent, dim=1).permute(0, 2, 3, 1).reshape(2, 16, 8)
    assert torch.equal(tokens, torch.cdist(vectors, tokenizer.codebook).argmin(-1))
    codes = tokenizer.embed(tokens)
    assert torch.equal(tokenizer.nearest(codes), tokens)
    assert torch.equal(tokenizer.tokens(tokenizer.latent(codes)), tokens)  # the latent is laid out row by row
    assert torch.equal(tokenizer.latent(codes)[:, :, 1, 2], codes[:, 1 * 4 + 2])
