"""Drawing AR steps at once: the marginals are the teacher's, the dependence is gone, the prefix is kept."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ddexport.recipe import load_recipe
from ddexport.validate.image_sets import load_models
from ddexport.validate.set_prediction import draw_until, one_pass_runner, rest_at_once, teacher_of

COUNT, STARTS = 4000, [0, 1, 2, 4]


class CopyingTeacher:
    """Three AR steps over codes 0 and 1: a biased first token, a fair coin, and two copies of the coin."""

    def __init__(self) -> None:
        self.passes: list[int] = []

    def __call__(self, labels, choose):
        count, known = len(labels), []
        for start, stop in pairwise(STARTS):
            self.passes.append(start)
            p = torch.full((count, stop - start), 0.9 if start == 0 else 0.5)
            if start == 2:
                p = known[-1].double().expand(-1, 2)
            log_p = torch.stack([1 - p, p], -1).double().clamp_min(1e-12).log()
            known.append(choose(log_p, slice(start, stop)))
        return torch.cat(known, 1)


@pytest.fixture
def labels():
    return torch.zeros(COUNT, dtype=torch.int64)


def drawn(labels, first, teacher=None):
    return rest_at_once(teacher or CopyingTeacher(), STARTS, labels, first, torch.Generator().manual_seed(0))


def agreement(tokens, a, b):
    return (tokens[:, a] == tokens[:, b]).double().mean().item()


def test_all_at_once_keeps_every_marginal_and_no_dependence(labels):
    tokens = drawn(labels, 0)
    expected = torch.tensor([0.9, 0.5, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(tokens.double().mean(0), expected, atol=0.03, rtol=0)
    for a, b in ((1, 2), (1, 3), (2, 3)):
        assert agreement(tokens, a, b) == pytest.approx(0.5, abs=0.03)


def test_behind_the_prefix_positions_know_the_prefix_and_not_each_other(labels):
    """With one step of the teacher's own the coin is still drawn apart from its copies; with two it is
    known, and the copies must follow it.
    """
    one, two = drawn(labels, 1), drawn(labels, 2)
    assert agreement(one, 1, 2) == pytest.approx(0.5, abs=0.03)
    assert agreement(one, 2, 3) == pytest.approx(0.5, abs=0.03)
    assert agreement(two, 1, 2) == agreement(two, 1, 3) == 1.0


def test_no_pass_is_made_behind_what_is_wanted(labels):
    teacher = CopyingTeacher()
    tokens = draw_until(teacher, labels[:3], lambda log_p, positions: log_p.argmax(-1), 2)
    assert tokens.shape == (3, 2) and teacher.passes == [0, 1]


@pytest.mark.parametrize("name", ["digits-var", "digits-llamagen"])
def test_the_real_teachers_continue_their_prefix(name):
    """Every continuation has to start from the same prefix, or its token belongs to another image."""
    models = load_models(load_recipe(name), None)
    teacher, starts = teacher_of(models), list(models.tokenizer.starts)
    labels = torch.tensor([3, 8])
    first = len(starts) - 3  # two steps are left, the second of which needs continuations
    prefixes = []

    def watched(labels, choose):
        def look(log_p, positions):
            tokens = choose(log_p, positions)
            if positions.stop <= starts[first]:
                prefixes.append((positions.start, tokens))
            return tokens

        return teacher(labels, look)

    tokens = rest_at_once(watched, starts, labels, first, torch.Generator().manual_seed(0))
    assert tokens.shape == (2, starts[-1])
    assert len(prefixes) == first * (1 + starts[-1] - starts[-2])
    for start, kept in prefixes:
        assert torch.equal(kept, tokens[:, start : start + kept.shape[1]])


@pytest.mark.parametrize(("name", "first"), [("digits-var", 0), ("digits-var", 1), ("digits-llamagen", 3)])
def test_what_is_timed_runs_as_many_passes_as_are_stated(name, first, monkeypatch):
    models = load_models(load_recipe(name), None)
    kind, passes = type(models.teacher), []
    for method in ("step", "forward"):
        original = getattr(kind, method)

        def counted(self, *args, _of=original, _name=method):
            passes.append(_name)
            return _of(self, *args)

        monkeypatch.setattr(kind, method, counted)
    sequence = models.recipe.sequence
    with torch.inference_mode():
        runner = one_pass_runner(models, first)
        out = runner(torch.zeros(2, sequence.length, sequence.width), torch.tensor([1, 2]))
    assert passes == ["step"] * first + ["forward"]
    assert out.shape == (2, sequence.length, sequence.width)
