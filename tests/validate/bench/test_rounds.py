"""Rounds are fair: all in turn, each until it has had its time, and a failure ends one row only. Ratios and
their intervals: whatever the times, they contain the ratio and turn round with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddexport.validate.bench.rounds import (
    LONG,
    MOST_ROUNDS,
    Contender,
    interleave,
    least_rounds,
    percentiles,
    speedup,
)
from ddexport.validate.bench.workload import Times


@dataclass(kw_only=True)
class Fake(Contender):
    """Takes the same time in every run; fails in the round `fails`."""

    name: str
    seconds: float
    calls: list[str] = field(default_factory=list)
    fails: int | None = None

    def run(self) -> Times:
        if self.fails == len(self.times):
            raise RuntimeError("gone")
        self.calls.append(self.name)
        return Times(self.seconds, 0.0, 0.0, self.seconds)


def run(contenders, duration):
    interleave(contenders, duration, seed=0, errors=RuntimeError, pause=0.0)


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
    assert len(one.times) == pytest.approx(rounds, abs=1)
    assert len(slow.times) == 5
    assert list(one.times)[:5] == list(slow.times)  # the rounds that both have


def test_there_is_an_end():
    one = Fake(name="a", seconds=0.0)
    run([one], 1.0)
    assert len(one.times) == MOST_ROUNDS


def test_a_failure_ends_its_row_and_no_other():
    bad, good = Fake(name="bad", seconds=1.0, fails=2), Fake(name="good", seconds=1.0)
    run([bad, good], 0.0)
    assert (bad.error, len(bad.times)) == ("gone", 2)
    assert (good.error, len(good.times)) == (None, 5)


def test_only_a_teacher_of_minutes_runs_once():
    assert least_rounds(True, LONG + 1) == 1
    assert least_rounds(False, LONG + 1) == least_rounds(True, 1.0) == 5


times = st.lists(st.floats(1e-4, 1e3), min_size=3, max_size=12)
few = settings(max_examples=25)


def numbered(values):
    return dict(enumerate(values))


@few
@given(baseline=times, own=times)
def test_the_interval_contains_the_ratio(baseline, own):
    ratio = speedup(numbered(baseline), numbered(own))
    assert 0 < ratio.low <= ratio.value <= ratio.high


@few
@given(baseline=times, own=times)
def test_the_other_way_round_is_the_inverse(baseline, own):
    there, back = speedup(numbered(baseline), numbered(own)), speedup(numbered(own), numbered(baseline))
    assert back.value == pytest.approx(1 / there.value)
    assert back.low == pytest.approx(1 / there.high, rel=1e-6)
    assert back.high == pytest.approx(1 / there.low, rel=1e-6)


@few
@given(own=times, factor=st.floats(0.01, 100))
def test_pairing_cancels_what_slows_a_whole_round(own, factor):
    """A baseline that is always so many times slower has that ratio exactly, however noisy the rounds."""
    ratio = speedup(numbered([value * factor for value in own]), numbered(own))
    assert (ratio.low, ratio.high) == pytest.approx((factor, factor))


def test_only_common_rounds_count():
    ratio = speedup({0: 2.0, 1: 2.0, 2: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0, 4: 9.0, 5: 9.0, 6: 9.0})
    assert ratio.value == pytest.approx(2.0)
    assert speedup({0: 1.0}, {1: 1.0}) is None


def test_one_round_has_no_interval():
    """A teacher of minutes runs once: its ratio is told, and no precision is claimed."""
    ratio = speedup({0: 6.0}, {0: 2.0, 1: 2.5})
    assert (ratio.value, ratio.low, ratio.high) == (pytest.approx(3.0), None, None)


def test_percentiles_are_interpolated():
    assert percentiles([1.0, 2.0, 3.0, 4.0], [50, 99.9]) == {"50": 2.5, "99.9": pytest.approx(3.997)}
