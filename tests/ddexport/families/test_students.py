"""The students of both families compute what the published code computes: every number of the golden files,
to 2e-5."""

from __future__ import annotations

import pytest
import torch

from ddexport.validate.bench.naive import llamagen_dd, var_dd
from tests.goldens import BOTH, LLAMAGEN, VAR, Golden, close, known

# A case of the golden file, and where its student's tokens end.
STEPS = [(family, case, 5) for family in (VAR, LLAMAGEN) for case in ("onestep", "twostep")]
STEPS += [(VAR, "twostep_split3", 14), (VAR, "twostep_split1", 1)]
STEPS += [(LLAMAGEN, "twostep_split9", 9), (LLAMAGEN, "twostep_split3", 3)]


@torch.no_grad()
@pytest.mark.parametrize(("family", "case", "split"), STEPS, ids=[f"{f.name}-{case}" for f, case, _ in STEPS])
def test_each_step_is_the_published_one(family: Golden, case: str, split: int) -> None:
    """Input, both heads, tokens and sequence of every step, and the image, as loaded and with tables."""
    expected, student = family.expected, family.student(split)
    for _ in range(2):
        sequence = expected["noise"]
        for step, kept in enumerate((0,) if case == "onestep" else (0, 5)):
            tokens = torch.cat([sequence[:, :kept], expected["noise"][:, kept:]], dim=1)
            logits, embeddings = student.heads(tokens, expected["labels"], known(kept))
            sequence, codes, used = student(tokens, expected["labels"], known(kept))
            prefix = f"{case}_step{step}"
            for name, value in (("input", tokens), ("raw_logits", logits), ("raw_conti", embeddings)):
                if f"{prefix}_{name}" in expected:
                    close(value, expected[f"{prefix}_{name}"])
            assert torch.equal(codes, used.argmax(-1))
            if f"{prefix}_raw_logits" in expected:
                assert torch.equal(codes, expected[f"{prefix}_raw_logits"][:, :split].argmax(-1))
            if f"{prefix}_gt_idx" in expected:
                assert torch.equal(family.tokenizer.nearest(tokens), expected[f"{prefix}_gt_idx"])
            close(sequence, expected[f"{prefix}_sequence"])
        student.tabulate()
    close(family.tokenizer(sequence), expected[f"{case}_image"].clamp(0, 1))
    if family is LLAMAGEN:  # whose golden image is not cut to [0, 1]
        pixels = family.tokenizer.pixels(family.tokenizer.latent(sequence))
        close((pixels + 1) / 2, expected[f"{case}_image"])


@torch.no_grad()
@BOTH
def test_the_other_copy_of_the_weights_is_another_model(family: Golden) -> None:
    """`--weights model` reads the set that is not sampled with; it must not be taken for the right one."""
    inputs = family.expected["noise"], family.expected["labels"], known(0)
    ema, other = family.student()(*inputs)[0], family.student(weights="model")(*inputs)[0]
    close(other, family.expected["nonema_onestep_step0_sequence"])
    assert (ema - other).abs().max() > 0.1


@torch.no_grad()
@BOTH
def test_known_is_per_image(family: Golden) -> None:
    """One batch may mix first and second steps."""
    expected = family.expected
    tokens = torch.cat([expected["onestep_step0_input"][:1], expected["twostep_step1_input"][1:]])
    sequence = family.student()(tokens, expected["labels"], torch.tensor([0, 5]))[0]
    close(sequence[0], expected["onestep_step0_sequence"][0])
    close(sequence[1], expected["twostep_step1_sequence"][1])


@torch.no_grad()
@BOTH
def test_the_simplifications_change_nothing(family: Golden) -> None:
    """Agrees with a literal reading of the formulas: VAR's two noise-or-data rows for all projections,
    LlamaGen's one product for gate and value, tables, heads where used, known passed through."""
    expected, noise = family.expected, family.expected["noise"]
    for kept in (0, 1, 5, 14):
        student = family.student()
        codes = student.codebook[torch.arange(noise[..., 0].numel()).view(2, -1) % 64]
        inputs = torch.cat([codes[:, :kept], noise[:, kept:]], dim=1), expected["labels"]
        if family is VAR:
            wanted, logits, embeddings = var_dd.literal_step(student, *inputs, kept)
        else:
            state = torch.load(family.files["student"], weights_only=True)["ema"]
            literal = llamagen_dd.literal_step(state, student.codebook, 2, 5, *inputs, kept)
            wanted, logits, embeddings = literal
        for _ in range(2):  # as loaded, then tabulated
            own_logits, own_embeddings = student.heads(*inputs, known(kept))
            sequence, _, used = student(*inputs, known(kept))
            close(own_logits, logits, 1e-5)
            close(own_embeddings, embeddings, 1e-5)
            close(used, logits[:, : used.shape[1]], 1e-5)
            close(sequence, wanted, 1e-5)
            student.tabulate()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changed"),
    [(VAR, [7, *range(14, 30)]), (LLAMAGEN, list(range(7, 16)))],
    ids=["var", "llamagen"],
)
def test_the_mask(family: Golden, changed: list[int]) -> None:
    """Moving one position changes itself and what comes later: in VAR later scales and nothing else of its
    own (positions 5 to 13), in LlamaGen all later positions, without a shift by one."""
    student, moved = family.student(), family.expected["noise"].clone()
    moved[:, 7] += 1.0
    before, _ = student.heads(family.expected["noise"], family.expected["labels"], known(0))
    after, _ = student.heads(moved, family.expected["labels"], known(0))
    assert ((before - after).abs().amax(dim=(0, 2)) > 1e-6).nonzero().flatten().tolist() == changed
