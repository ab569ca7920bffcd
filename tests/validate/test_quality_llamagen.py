"""`validate quality` and `validate speed` know no family: a raster-order model goes through both."""

from __future__ import annotations

import pytest
import torch

from ddexport.distill.settings import distill_settings
from ddexport.families._checkpoint import connect, random_part
from ddexport.recipe import load_recipe
from ddexport.validate.image_sets import Models, drawn_rows, student_sequences
from ddexport.validate.map_check import check_map
from ddexport.validate.quality_grid import write_grid
from ddexport.validate.speed import measure_speed


@pytest.fixture
def models():
    """`digits-llamagen` with random weights: the numbers mean nothing, the way they take does."""
    recipe = load_recipe("digits-llamagen")
    parts = {role: random_part(recipe, role, 0) for role in ("tokenizer", "teacher", "student")}
    connect(parts["student"], parts["tokenizer"])
    return Models(recipe, **parts, pairs=distill_settings(recipe).pairs)


def test_every_row_is_drawn(models):
    rows = drawn_rows(models, seed=0, count=20)
    assert [row.name for row in rows] == [
        "teacher",
        "mapped pairs",
        "two steps",
        "one step",
        "two steps, all discrete",
        "one step, all discrete",
        "set prediction",
    ]
    assert all(row.images.shape == (20, 3, 32, 32) for row in rows)


def test_the_map_is_tested_at_steps_from_the_first_to_the_last(models):
    tests = check_map(models, draws=300)
    assert [test.step for test in tests] == [0, 5, 10, 15]
    assert all(test.degrees > 0 for test in tests)


def test_the_grid_is_drawn(models, tmp_path):
    write_grid(models, 0, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_a_teacher_in_raster_order_takes_as_many_passes_as_tokens(models):
    timings = measure_speed(models, [2], rounds=1)
    assert [(t.name, t.passes) for t in timings] == [("teacher", 16), ("student, 2", 2), ("student, 1", 1)]


def test_sampling_here_is_the_modules_own_forward(models):
    noise, labels = torch.randn(3, 16, 8), torch.tensor([0, 4, 9])
    split = models.recipe.sequence.split
    with torch.no_grad():
        sequence, *_ = models.student(noise, labels, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(student_sequences(models, noise, labels, (0,), split), sequence)
    two = student_sequences(models, noise, labels, (0, 8), split)
    assert torch.equal(two[:, :8], sequence[:, :8]) and not torch.equal(two[:, 8:], sequence[:, 8:])
