"""Rounds are fair: all in turn, each until it has had its time, and a failure ends one row only."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ddexport.validate.bench.case import Times
from ddexport.validate.bench.rounds import LONG, MOST_ROUNDS, Contender, Sample, interleave, least_rounds


@dataclass(kw_only=True)
class Fake(Contender):
    """Takes the same time whenever it is drawn; fails in the round `fails`."""

    name: str
    seconds: float
    calls: list[str] = field(default_factory=list)
    fails: int | None = None

    def draw(self) -> Sample:
        if self.fails == len(self.samples):
            raise RuntimeError("gone")
        self.calls.append(self.name)
        return Sample(Times(self.seconds, 0.0, 0.0, self.seconds), self.seconds)


def run(contenders, duration, **extra):
    interleave(contenders, duration, sleep=lambda _: None, errors=RuntimeError, **extra)


def test_every_round_has_each_once():
    """What is compared lies beside each other in time: no row runs twice before another has run."""
    calls = []
    fakes = [Fake(name=name, seconds=1.0, calls=calls) for name in "abc"]
    run(fakes, 7.0)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 7
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1  # none always follows the same


@pytest.mark.parametrize(("seconds", "rounds"), [(0.1, 20), (1.0, 5), (100.0, 5)])
def test_the_duration_is_each_rows_own(seconds, rounds):
    slow = Fake(name="slow", seconds=3.0)
    one = Fake(name="one", seconds=seconds)
    run([slow, one], 2.0)
    assert len(one.samples) == pytest.approx(rounds, abs=1)
    assert len(slow.samples) == 5
    assert list(one.samples)[:5] == list(slow.samples)  # the rounds that both have


def test_there_is_an_end():
    one = Fake(name="a", seconds=0.0)
    run([one], 1.0)
    assert len(one.samples) == MOST_ROUNDS


def test_a_failure_ends_its_row_and_no_other():
    bad, good = Fake(name="bad", seconds=1.0, fails=2), Fake(name="good", seconds=1.0)
    run([bad, good], 0.0)
    assert (bad.error, len(bad.samples)) == ("gone", 2)
    assert (good.error, len(good.samples)) == (None, 5)


def test_only_a_teacher_of_minutes_is_drawn_once():
    assert least_rounds(True, LONG + 1) == 1
    assert least_rounds(False, LONG + 1) == least_rounds(True, 1.0) == 5
