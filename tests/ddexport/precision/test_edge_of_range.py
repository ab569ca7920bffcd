"""At the edge of the half range a module that is half throughout fails, and the policy does not."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("edge_of_range", Path(__file__).with_name("edge_of_range.py"))
assert spec is not None and spec.loader is not None
edge_of_range = importlib.util.module_from_spec(spec)
sys.modules["edge_of_range"] = edge_of_range
spec.loader.exec_module(edge_of_range)


@pytest.mark.parametrize("part", ["student", "decoder"])
@pytest.mark.parametrize("family", ["var", "llamagen"])
class TestStretched:
    def test_fp16(self, family: str, part: str) -> None:
        """The stretched model computes the same: all in half it overflows, the policy is as good as ever."""
        before, after = edge_of_range.experiment(family, part, "fp16")
        assert before.stream < 100
        assert after.stream > 65504  # the stream, which the policy keeps in float32
        assert before.all_half_error < 0.01
        assert not after.all_half_error < 1  # nan where it overflowed, or nothing to do with the result
        assert after.policy_infinite == 0
        assert after.policy_error < 2 * before.policy_error < 0.01

    def test_bf16(self, family: str, part: str) -> None:
        """bf16 has float32's range: nothing overflows, and the islands still make it better."""
        before, after = edge_of_range.experiment(family, part, "bf16")
        assert after.policy_infinite == after.all_half_infinite == 0
        assert math.isfinite(after.all_half_error)
        assert after.policy_error < after.all_half_error
        assert after.policy_error < 2 * before.policy_error < 0.1
