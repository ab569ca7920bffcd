"""The VAR modules compute what the published code computes: every number of the golden file, to 2e-5."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ddexport.families import family
from ddexport.families._checkpoint import connect, load_part
from ddexport.families._var_tokenizer import phi_of_scale
from ddexport.families.var_dd import guided
from ddexport.recipe import load_recipe, recipe_from_dict
from ddexport.runtime.errors import DDError
from ddexport.validate.bench.published import var_dd

GOLDEN = Path(__file__).parents[2] / "golden" / "var-dd-small"
TOLERANCE = 2e-5
ENDS = [0, 1, 5, 14, 30]


@pytest.fixture(scope="module")
def expected():
    with np.load(GOLDEN / "expected.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def recipe_with_split(split):
    data = load_recipe(str(GOLDEN / "recipe.yaml")).to_dict()
    data["sequence"]["split"] = split
    return recipe_from_dict(data)


def load_student(split=5, weights="ema"):
    recipe = recipe_with_split(split)
    student = load_part(recipe, "student", GOLDEN / "student.pth", weights)
    connect(student, load_part(recipe, "tokenizer", GOLDEN / "vae.pth"))
    return student


@pytest.fixture(scope="module")
def tokenizer():
    return load_part(recipe_with_split(5), "tokenizer", GOLDEN / "vae.pth")


@pytest.fixture(scope="module")
def teacher():
    return load_part(recipe_with_split(5), "teacher", GOLDEN / "teacher.pth")


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


CASES = {
    "onestep": ((0,), 5),
    "twostep": ((0, 5), 5),
    "twostep_split3": ((0, 5), 14),
    "twostep_split1": ((0, 5), 1),
}


@torch.no_grad()
@pytest.mark.parametrize("tabulated", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_step_is_the_published_one(case, tabulated, expected, tokenizer):
    """Input, both heads, tokens and sequence of every step, and the image: one step, two steps, other
    splits."""
    schedule, split = CASES[case]
    student = load_student(split)
    if tabulated:
        student.tabulate()
    sequence = expected["noise"]
    for n, known in enumerate(schedule):
        tokens = torch.cat([sequence[:, :known], expected["noise"][:, known:]], dim=1)
        count = torch.full((2,), known)
        logits, embeddings = student.heads(tokens, expected["labels"], count)
        sequence, codes, used = student(tokens, expected["labels"], count)
        prefix = f"{case}_step{n}"
        for name, value in (("input", tokens), ("raw_logits", logits), ("raw_conti", embeddings)):
            if f"{prefix}_{name}" in expected:
                close(value, expected[f"{prefix}_{name}"])
        if f"{prefix}_raw_logits" in expected:
            assert torch.equal(codes, expected[f"{prefix}_raw_logits"][:, :split].argmax(-1))
        assert torch.equal(codes, used.argmax(-1))
        close(sequence, expected[f"{prefix}_sequence"])
    if f"{case}_image" in expected:
        close(tokenizer(sequence), expected[f"{case}_image"])


@torch.no_grad()
def test_the_other_copy_of_the_weights_is_another_model(expected):
    """`--weights model` reads the set that is not sampled with; it must not be taken for the right one."""
    known = torch.zeros(2, dtype=torch.int64)
    ema = load_student()(expected["noise"], expected["labels"], known)[0]
    other = load_student(weights="model")(expected["noise"], expected["labels"], known)[0]
    close(other, expected["nonema_onestep_step0_sequence"])
    assert (ema - other).abs().max() > 0.1


@torch.no_grad()
def test_known_is_per_image(expected):
    """One batch may mix first and second steps."""
    student = load_student()
    first, second = expected["onestep_step0_input"], expected["twostep_step1_input"]
    tokens = torch.cat([first[:1], second[1:]])
    sequence = student(tokens, expected["labels"], torch.tensor([0, 5]))[0]
    close(sequence[0], expected["onestep_step0_sequence"][0])
    close(sequence[1], expected["twostep_step1_sequence"][1])


@torch.no_grad()
@pytest.mark.parametrize("known", [0, 1, 5, 14])
def test_the_simplifications_change_nothing(known, expected):
    """Two noise-or-data rows for all projections, tables for classes, heads where used, known passed
    through."""
    student = load_student()
    codes = student.codebook[torch.arange(60).view(2, 30) % 64]
    tokens = torch.cat([codes[:, :known], expected["noise"][:, known:]], dim=1)
    wanted, logits, embeddings = var_dd.literal_step(student, tokens, expected["labels"], known)
    count = torch.full((2,), known)
    for _ in range(2):  # as loaded, then tabulated
        own_logits, own_embeddings = student.heads(tokens, expected["labels"], count)
        sequence, _, used = student(tokens, expected["labels"], count)
        torch.testing.assert_close(own_logits, logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(own_embeddings, embeddings, rtol=0, atol=1e-5)
        torch.testing.assert_close(used, logits[:, : used.shape[1]], rtol=0, atol=1e-5)
        torch.testing.assert_close(sequence, wanted, rtol=0, atol=1e-5)
        student.tabulate()


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
def test_student_mask_hides_the_own_scale(expected):
    """Moving one position changes itself and later scales, and nothing of its own or earlier scales."""
    student, known = load_student(), torch.zeros(2, dtype=torch.int64)
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
