"""The baselines draw the same images: whoever beats them has done the same work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec import structs

from ddexport.families._checkpoint import connect, random_part
from ddexport.recipe import load_recipe
from ddexport.runtime.errors import DDError
from ddexport.validate.bench.naive import naive_step

GOLDEN = Path(__file__).parents[2] / "golden"


@torch.no_grad()
@pytest.mark.parametrize("name", ["var-dd-small", "llamagen-dd-small"])
def test_it_agrees_with_the_modules(name, known=5):
    """Found by the family's name; a student with tables, as it is timed against, gives the same too."""
    recipe = load_recipe(str(GOLDEN / name / "recipe.yaml"))
    student, size = random_part(recipe, "student", 3), recipe.sequence
    connect(student, random_part(recipe, "tokenizer", 3))
    tokens = torch.randn(2, size.length, size.width, generator=torch.Generator().manual_seed(0))
    tokens[:, :known] = student.codebook[:known]
    label, count = torch.tensor([1, 7]), torch.full((2,), known)
    sequence, logits, _ = naive_step(recipe, student)(tokens, label, known)
    for _ in range(2):
        wanted, _, chosen = student(tokens, label, count)
        torch.testing.assert_close(sequence, wanted, rtol=0, atol=2e-5)
        torch.testing.assert_close(logits[:, : size.split], chosen, rtol=0, atol=2e-5)
        student.tabulate()
    with pytest.raises(DDError):
        naive_step(structs.replace(recipe, family="other"), student)
