"""Ratios and their intervals: whatever the times, they contain the ratio and turn round with it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddexport.validate.bench.case import Times
from ddexport.validate.bench.figures import part_ms, percentiles, speedup
from ddexport.validate.bench.rounds import Sample

times = st.lists(st.floats(1e-4, 1e3), min_size=3, max_size=12)
few = settings(max_examples=25)


def numbered(values):
    return dict(enumerate(values))


@few
@given(baseline=times, own=times)
def test_the_interval_contains_the_ratio(baseline, own):
    found = speedup(numbered(baseline), numbered(own))
    assert 0 < found.low <= found.value <= found.high


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
    found = speedup(numbered([value * factor for value in own]), numbered(own))
    assert (found.low, found.high) == pytest.approx((factor, factor))


def test_only_common_rounds_count():
    found = speedup({0: 2.0, 1: 2.0, 2: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0, 4: 9.0, 5: 9.0, 6: 9.0})
    assert found.value == pytest.approx(2.0)
    assert speedup({0: 1.0}, {1: 1.0}) is None


def test_one_round_has_no_interval():
    """A teacher of minutes runs once: its ratio is told, and no precision is claimed."""
    found = speedup({0: 6.0}, {0: 2.0, 1: 2.5})
    assert (found.value, found.low, found.high) == (pytest.approx(3.0), None, None)


def test_medians_of_the_parts():
    samples = {i: Sample(Times(0.001 * i, 0.0, 0.002, 0.003), 0.003) for i in (3, 1, 2)}
    assert part_ms(samples, "student") == pytest.approx([1.0, 2.0, 3.0])
    assert percentiles([1.0, 2.0, 3.0, 4.0], [50, 99.9]) == {"50": 2.5, "99.9": pytest.approx(3.997)}
