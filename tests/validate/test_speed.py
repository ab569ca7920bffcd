"""`validate speed`: what is timed is the model's own sampling, and the passes are counted right."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from ddexport.recipe import load_recipe
from ddexport.validate.image_sets import load_models, student_sequences
from ddexport.validate.speed import Timing, command, few_steps, table


@pytest.mark.parametrize("steps", ["1", "2"])
def test_what_is_timed_draws_what_is_measured(steps):
    models = load_models(load_recipe("digits-var"), None)
    sequence, known = models.recipe.sequence, models.recipe.schedules[steps].known
    noise = torch.randn(3, sequence.length, sequence.width, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 5, 7])
    with torch.no_grad():
        timed = few_steps(models, known, noise, labels)
    torch.testing.assert_close(timed, student_sequences(models, noise, labels, known, sequence.split))


def test_the_command_counts_the_teachers_steps_and_the_students():
    result = CliRunner().invoke(command, ["digits-var", "--batches", "1,3", "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    timings = json.loads(result.stdout)["timings"]
    assert [(t["name"], t["passes"]) for t in timings] == [
        ("teacher", 4),
        ("student, 2", 2),
        ("student, 1", 1),
    ]
    for timing in timings:
        assert set(timing["image"]) == {"1", "3"}
        assert all(timing["image"][b] > timing["sequence"][b] > 0 for b in ("1", "3"))


def test_the_table_compares_with_the_teacher():
    text = table([Timing("teacher", 16, {1: 8.0}, {1: 10.0}), Timing("student, 1", 1, {1: 2.0}, {1: 4.0})])
    assert "4.00 ms (2.5x)" in text and "2.00 ms (4.0x)" in text


def test_sizes_must_be_numbers():
    result = CliRunner().invoke(command, ["digits-var", "--batches", "1,x"])
    assert result.exit_code == 2 and "list of sizes" in result.stderr
