"""Rounds are fair: each row runs once, until it has had its time. Ratios and their intervals: whatever the
times, they contain the ratio, and the inverse ratio has the inverse interval."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddexport.validate.bench.rounds import MOST_ROUNDS, interleave, speedup, summary, wants_round


def run(seconds, duration):
    """Rows that take so long each; by round, which ran."""
    rounds = {}
    spent = {name: [] for name in seconds}

    def once(name, number):
        spent[name].append(seconds[name])
        rounds.setdefault(number, []).append(name)

    interleave([*seconds], lambda name: wants_round(spent[name], 5, duration), once, seed=0, pause=0.0)
    return rounds


def test_every_round_has_each_once_in_another_order():
    """What is compared lies beside each other in time: no row runs twice before another has run."""
    rounds = run({"a": 1.0, "b": 1.0, "c": 1.0}, 7.0)
    assert [sorted(names) for names in rounds.values()] == [["a", "b", "c"]] * 7
    assert len({tuple(names) for names in rounds.values()}) > 1  # none always follows the same


def test_the_duration_is_each_rows_own():
    for seconds, rounds in ((0.1, 20), (1.0, 5), (100.0, 5), (0.0, MOST_ROUNDS)):
        counted = run({"slow": 3.0, "one": seconds}, 2.0)
        assert sum("one" in names for names in counted.values()) == pytest.approx(rounds, abs=1)
        assert sum("slow" in names for names in counted.values()) == 5
        assert all("one" in counted[number] for number in range(5))  # the rounds that both have


def test_percentiles_only_where_there_are_a_hundred_rounds():
    few = summary([0.001, 0.002, 0.006])
    assert few == pytest.approx({"total_ms": 2.0, "total_min_ms": 1.0, "total_max_ms": 6.0})
    assert "total_p99_ms" not in summary([1.0] * 99)
    many = summary([number / 1e3 for number in range(101)])
    assert (many["total_ms"], many["total_p90_ms"], many["total_p99_ms"]) == pytest.approx((50, 90, 99))


times = st.lists(st.floats(1e-4, 1e3), min_size=3, max_size=12)
few = settings(max_examples=25)


def numbered(values):
    return dict(enumerate(values))


@few
@given(baseline=times, own=times)
def test_the_interval_contains_the_ratio_and_turns_with_it(baseline, own):
    there, back = speedup(numbered(baseline), numbered(own)), speedup(numbered(own), numbered(baseline))
    assert 0 < there["speedup_low"] <= there["speedup"] <= there["speedup_high"]
    assert back["speedup"] == pytest.approx(1 / there["speedup"])
    assert back["speedup_low"] == pytest.approx(1 / there["speedup_high"], rel=1e-6)
    assert back["speedup_high"] == pytest.approx(1 / there["speedup_low"], rel=1e-6)


@few
@given(own=times, factor=st.floats(0.01, 100))
def test_pairing_cancels_what_slows_a_whole_round(own, factor):
    """A baseline that is always so many times slower has that ratio exactly, however noisy the rounds."""
    ratio = speedup(numbered([value * factor for value in own]), numbered(own))
    assert [*ratio.values()] == pytest.approx([factor] * 3)


def test_only_common_rounds_count_and_few_have_no_interval():
    ratio = speedup({0: 2.0, 1: 2.0, 2: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0, 4: 9.0, 5: 9.0, 6: 9.0})
    assert ratio["speedup"] == pytest.approx(2.0)
    assert speedup({0: 1.0}, {1: 1.0}) == {}
    assert speedup({0: 6.0}, {0: 2.0, 1: 2.5}) == {"speedup": pytest.approx(3.0)}  # a teacher of minutes
