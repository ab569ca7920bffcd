"""The students of both families compute what the published code computes: every number of the golden files,
to 2e-5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddexport.families._checkpoint import connect, load_part
from ddexport.recipe import Recipe, load_recipe, recipe_from_dict
from ddexport.validate.bench.naive import llamagen_dd, var_dd

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Family:
    """The golden checkpoint of a family. splits: of its cases beside `onestep` and `twostep`, which have 5.

    literal: a literal reading of the formulas: student, tokens, labels, known -> sequence and both heads.
    """

    name: str
    vae: str
    splits: Mapping[str, int]
    literal: Callable[..., tuple[Tensor, Tensor, Tensor]]

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        with np.load(GOLDEN / self.name / "expected.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def recipe(self, split: int) -> Recipe:
        data = load_recipe(str(GOLDEN / self.name / "recipe.yaml")).to_dict()
        data["sequence"]["split"] = split
        return recipe_from_dict(data)

    @cached_property
    def tokenizer(self) -> Any:
        return load_part(self.recipe(5), "tokenizer", GOLDEN / self.name / self.vae)

    def student(self, split: int = 5, weights: str = "ema") -> Any:
        student = load_part(self.recipe(split), "student", GOLDEN / self.name / "student.pth", weights)
        connect(student, self.tokenizer)
        return student


def literal_llamagen(student: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.load(GOLDEN / "llamagen-dd-small" / "student.pth", weights_only=True)["ema"]
    return llamagen_dd.literal_step(state, student.codebook, 2, 5, *inputs)


VAR = Family("var-dd-small", "vae.pth", {"twostep_split3": 14, "twostep_split1": 1}, var_dd.literal_step)
LLAMAGEN = Family("llamagen-dd-small", "vq.pth", {"twostep_split9": 9, "twostep_split3": 3}, literal_llamagen)
FAMILIES = pytest.mark.parametrize("family", [VAR, LLAMAGEN], ids=lambda family: family.name)
STEPS = [(family, case, 5) for family in (VAR, LLAMAGEN) for case in ("onestep", "twostep")] + [
    (family, case, split) for family in (VAR, LLAMAGEN) for case, split in family.splits.items()
]


def close(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def known(count: int) -> Tensor:
    return torch.full((2,), count)


@torch.no_grad()
@pytest.mark.parametrize("tabulated", [False, True])
@pytest.mark.parametrize(
    ("family", "case", "split"), STEPS, ids=[f"{family.name}-{case}" for family, case, _ in STEPS]
)
def test_each_step_is_the_published_one(family: Family, case: str, split: int, tabulated: bool) -> None:
    """Input, both heads, tokens and sequence of every step, and the image: one step, two steps, other
    splits."""
    expected, student = family.expected, family.student(split)
    if tabulated:
        student.tabulate()
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
    close(family.tokenizer(sequence), expected[f"{case}_image"].clamp(0, 1))
    if family is LLAMAGEN:  # whose golden image is not cut to [0, 1]
        pixels = family.tokenizer.pixels(family.tokenizer.latent(sequence))
        close((pixels + 1) / 2, expected[f"{case}_image"])


@torch.no_grad()
@FAMILIES
def test_the_other_copy_of_the_weights_is_another_model(family: Family) -> None:
    """`--weights model` reads the set that is not sampled with; it must not be taken for the right one."""
    inputs = family.expected["noise"], family.expected["labels"], known(0)
    ema, other = family.student()(*inputs)[0], family.student(weights="model")(*inputs)[0]
    close(other, family.expected["nonema_onestep_step0_sequence"])
    assert (ema - other).abs().max() > 0.1


@torch.no_grad()
@FAMILIES
def test_known_is_per_image(family: Family) -> None:
    """One batch may mix first and second steps."""
    expected = family.expected
    tokens = torch.cat([expected["onestep_step0_input"][:1], expected["twostep_step1_input"][1:]])
    sequence = family.student()(tokens, expected["labels"], torch.tensor([0, 5]))[0]
    close(sequence[0], expected["onestep_step0_sequence"][0])
    close(sequence[1], expected["twostep_step1_sequence"][1])


@torch.no_grad()
@FAMILIES
@pytest.mark.parametrize("kept", [0, 1, 5, 14])
def test_the_simplifications_change_nothing(family: Family, kept: int) -> None:
    """Agrees with a literal reading of the formulas: VAR's two noise-or-data rows for all projections,
    LlamaGen's one product for gate and value, tables, heads where used, known passed through."""
    expected, student = family.expected, family.student()
    noise = expected["noise"]
    codes = student.codebook[torch.arange(noise[..., 0].numel()).view(2, -1) % 64]
    inputs = torch.cat([codes[:, :kept], noise[:, kept:]], dim=1), expected["labels"]
    wanted, logits, embeddings = family.literal(student, *inputs, kept)
    for _ in range(2):  # as loaded, then tabulated
        own_logits, own_embeddings = student.heads(*inputs, known(kept))
        sequence, _, used = student(*inputs, known(kept))
        close(own_logits, logits, 1e-5)
        close(own_embeddings, embeddings, 1e-5)
        close(used, logits[:, : used.shape[1]], 1e-5)
        close(sequence, wanted, 1e-5)
        student.tabulate()
