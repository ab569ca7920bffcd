"""The baseline draws the same images: whoever beats it has done the same work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from ddexport.families._checkpoint import connect, random_part
from ddexport.recipe import load_recipe
from ddexport.runtime.errors import DDError
from ddexport.validate.bench.published import published_step
from ddexport.validate.bench.torch_runners import LeanRunner, PublishedRunner, TorchRunner

GOLDEN = Path(__file__).parents[2] / "golden"


def parts(name):
    recipe = load_recipe(str(GOLDEN / name / "recipe.yaml"))
    student, tokenizer = random_part(recipe, "student", 3), random_part(recipe, "tokenizer", 3)
    connect(student, tokenizer)
    return recipe, student, tokenizer


@torch.no_grad()
@pytest.mark.parametrize("name", ["var-dd-small", "llamagen-dd-small"])
@pytest.mark.parametrize("known", [0, 5])
def test_it_agrees_with_the_modules(name, known):
    """Found by the family's name; a student with tables, as it is timed against, gives the same too."""
    recipe, student, _ = parts(name)
    size = recipe.sequence
    tokens = torch.randn(2, size.length, size.width, generator=torch.Generator().manual_seed(0))
    tokens[:, :known] = student.codebook[:known]
    label, count = torch.tensor([1, 7]), torch.full((2,), known)
    sequence, logits, _ = published_step(recipe, student)(tokens, label, known)
    for _ in range(2):
        wanted, _, chosen = student(tokens, label, count)
        torch.testing.assert_close(sequence, wanted, rtol=0, atol=2e-5)
        torch.testing.assert_close(logits[:, : size.split], chosen, rtol=0, atol=2e-5)
        student.tabulate()


@pytest.mark.parametrize("name", ["var-dd-small", "llamagen-dd-small"])
def test_all_runners_of_pytorch_take_and_give_the_same(name):
    """Arrays by the names of the graphs, in float32 and with half regions."""
    recipe, student, tokenizer = parts(name)
    size = recipe.sequence
    noise = torch.randn(2, size.length, size.width, generator=torch.Generator().manual_seed(1)).numpy()
    feeds = {"latents": noise, "label": np.array([1, 7]), "known": np.zeros(2, np.int64)}
    wanted = TorchRunner(student, tokenizer).run("student", None, feeds)
    published = PublishedRunner(student, tokenizer, recipe).run("student", None, feeds)
    for precision, tolerance in (("fp32", 2e-5), ("bf16", 0.2)):
        lean = LeanRunner(student, tokenizer, precision).run("student", None, feeds)
        for outputs, near in ((published, 2e-5), (lean, tolerance)):
            assert outputs.keys() == wanted.keys()
            assert abs(outputs["logits"] - wanted["logits"]).max() < near
            assert (outputs["tokens"] == outputs["logits"].argmax(-1)).all()
    image = PublishedRunner(student, tokenizer, recipe).run("decoder", None, {"sequence": noise})["image"]
    assert image.shape == (2, 3, recipe.image.size, recipe.image.size)


def test_a_family_without_one_says_so():
    recipe, student, _ = parts("var-dd-small")
    with pytest.raises(DDError, match="no published sampler"):
        published_step(structs.replace(recipe, family="other"), student)
