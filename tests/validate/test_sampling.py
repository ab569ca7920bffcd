"""The reference's own loop: against the published code's outputs, and its choice of tokens against plain
Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddexport.distill.trainers import trainer
from ddexport.families._checkpoint import connect, load_part
from ddexport.recipe import load_recipe
from ddexport.validate.sampling import Pass, Plan, Sampler, TokenChoice, chosen_tokens, noise_of, uniforms_of

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZERS = {"var-dd-small": "vae.pth", "llamagen-dd-small": "vq.pth"}
GREEDY = TokenChoice(cfg=2.0, top_k=1, top_p=1.0, temperature=1.0)


def sample(name: str, plan: Plan) -> tuple[list[Pass], np.ndarray, Any]:
    """The passes and the images of a plan from the golden labels and noise, and the golden arrays."""
    folder = GOLDEN / name
    recipe = load_recipe(str(folder / "recipe.yaml"))
    files = {"student": "student.pth", "tokenizer": TOKENIZERS[name], "teacher": "teacher.pth"}
    parts = {role: load_part(recipe, role, folder / file) for role, file in files.items()}
    connect(parts["student"], parts["tokenizer"])
    sampler = Sampler(
        parts["student"], parts["tokenizer"], parts["teacher"], trainer(recipe.family).generate, GREEDY
    )
    golden = np.load(folder / "expected.npz")
    uniforms = np.zeros(golden["noise"].shape[:2])
    passes = sampler.sample(golden["noise"], (golden["labels"],), plan, uniforms)
    return passes, sampler.decode(passes[-1].sequence), golden


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "case", "plan"),
    [
        ("var-dd-small", "onestep", Plan((0,), 5)),
        ("var-dd-small", "twostep", Plan((0, 5), 5)),
        ("var-dd-small", "twostep_split1", Plan((0, 5), 1)),
        ("llamagen-dd-small", "onestep", Plan((0,), 5)),
        ("llamagen-dd-small", "twostep", Plan((0, 5), 5)),
        ("llamagen-dd-small", "twostep_split9", Plan((0, 5), 9)),
    ],
)
def test_student_steps_are_the_published_ones(name: str, case: str, plan: Plan) -> None:
    passes, images, golden = sample(name, plan)
    for number, one in enumerate(passes):
        close(one.sequence, golden[f"{case}_step{number}_sequence"])
    close(images, golden[f"{case}_image"].clip(0, 1))


@pytest.mark.parametrize(
    ("name", "case", "plan"),
    [
        ("var-dd-small", "teach_start0", Plan((14,), 14, (0, 14))),
        ("var-dd-small", "teach_start1", Plan((0, 14), 14, (1, 14))),
        ("var-dd-small", "teach_start2_split2", Plan((0, 14), 5, (5, 14))),
        ("llamagen-dd-small", "teach_start0", Plan((5,), 5, (0, 5))),
        ("llamagen-dd-small", "teach_start3", Plan((0, 5), 5, (3, 5))),
        ("llamagen-dd-small", "teach_start3_split11", Plan((0, 5), 11, (3, 5))),
    ],
)
def test_steps_with_a_teacher_are_the_published_ones(name: str, case: str, plan: Plan) -> None:
    passes, images, golden = sample(name, plan)
    teacher = next(one for one in passes if one.role == "teacher")
    start, end = plan.teacher or (0, 0)
    if name == "var-dd-small":
        scales = [s for s in range(3) if f"{case}_teacher_tokens_scale{s}" in golden]
        tokens = np.concatenate([golden[f"{case}_teacher_tokens_scale{s}"] for s in scales], axis=1)
        logits = np.concatenate([golden[f"{case}_teacher_cfglogits_scale{s}"] for s in scales], axis=1)
    else:
        tokens, logits = golden[f"{case}_teacher_tokens"][:, start:], golden[f"{case}_teacher_cfglogits"]
    np.testing.assert_array_equal(teacher.tokens[:, start:end], tokens)
    close(teacher.logits, logits)
    close(passes[-1].sequence, golden[f"{case}_sequence"])
    close(images, golden[f"{case}_image"].clip(0, 1))


def by_hand(logits: np.ndarray, number: float, choice: TokenChoice) -> int:
    """One token, in the words of docs/teacher.md."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: choice.top_k]
    mass = {token: math.exp(logits[token] / choice.temperature) for token in order}
    total, kept, reached = sum(mass.values()), [], 0.0
    for token in order:
        if reached >= choice.top_p * total:
            break
        kept.append(token)
        reached += mass[token]
    passed, goal = 0.0, number * sum(mass[token] for token in kept)
    for token in sorted(kept):
        passed += mass[token]
        if passed > goal:
            return token
    raise AssertionError("a number below 1 always falls somewhere")


def test_tokens_are_chosen_as_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits, numbers = 2 * rng.standard_normal((6, 50, 20)), rng.random((6, 50))
    numbers[:, 0] = 0.0
    for values in ((1.0, 20, 1.0, 1.0), (1.0, 7, 0.8, 1.0), (1.0, 20, 0.5, 1.7)):
        choice = TokenChoice(*values)
        chosen = chosen_tokens(torch.from_numpy(logits), torch.from_numpy(numbers), choice)
        wanted = [
            [by_hand(row, number, choice) for row, number in zip(rows, some, strict=True)]
            for rows, some in zip(logits, numbers, strict=True)
        ]
        np.testing.assert_array_equal(chosen.numpy(), wanted)


def test_every_seed_gives_the_noise_of_its_first_image() -> None:
    seeds = np.array([0, 2**64 - 1], np.uint64)
    assert noise_of(seeds, 1, 6)[0, 0, 0] == np.float32(0.991137683)  # docs/bundle.md
    assert uniforms_of(seeds, 6)[0, 0] == pytest.approx(0.3476322190, abs=1e-10)
