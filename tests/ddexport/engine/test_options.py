"""What is asked of a build is read strictly: a slip in a number must not cost an hour of building."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ddexport.runtime.engines import Profile

from ddexport.engine.options import (
    BuildOptions,
    OptionError,
    bytes_from_text,
    profile_from_text,
    seconds_from_text,
    targets_from_text,
)


def test_a_batch_is_three_sizes_or_one() -> None:
    """Protects the meaning of --batch."""
    assert profile_from_text("1,4,8") == Profile(1, 4, 8)
    assert profile_from_text("16") == Profile(16, 16, 16)
    assert profile_from_text(" 2, 2 ,3") == Profile(2, 2, 3)


@pytest.mark.parametrize(
    "text", ["", "1,2", "4,1,8", "0,1,2", "-1,1,1", "a", "1,4,8,16", "1.5", "1,4,99999999"]
)
def test_batches_out_of_order_are_refused(text: str) -> None:
    """Protects against ranges that TensorRT would reject after minutes, or that are not what was meant."""
    with pytest.raises(OptionError, match="batch sizes"):
        profile_from_text(text)


def test_targets_are_one_set_however_written() -> None:
    """Protects the cache key and the folder's name: order, case and repetition are no difference."""
    same = {targets_from_text(text) for text in ("sm80,sm89", "SM89, sm_80", "8.0,8.9", "80,89,sm80")}
    assert same == {("sm80", "sm89")}
    assert targets_from_text("sm120,sm89") == ("sm89", "sm120")  # by number, not by letter
    assert targets_from_text("current") == ("current",)
    assert targets_from_text("default") == ()


@pytest.mark.parametrize("text", ["", ",", "ada", "sm80,current", "sm8", "smx9", "12345"])
def test_what_is_no_capability_is_refused(text: str) -> None:
    """Protects against a typing error that would build for something else."""
    with pytest.raises(OptionError):
        targets_from_text(text)


def test_sizes_and_times_have_units() -> None:
    """Protects --workspace, --max-size and --older-than from a factor of a thousand."""
    assert bytes_from_text("4GB") == bytes_from_text("4g") == bytes_from_text("4 GiB") == 4 << 30
    assert bytes_from_text("1.5k") == 1536
    assert bytes_from_text("77") == bytes_from_text("77b") == 77
    assert seconds_from_text("30d") == 30 * 86400
    assert seconds_from_text("1.5h") == 5400
    for wrong in ("", "4 apples", "-1GB", "GB", "1e3"):
        with pytest.raises(OptionError):
            bytes_from_text(wrong)
    for wrong in ("30", "d", "-1d", "1y"):
        with pytest.raises(OptionError):
            seconds_from_text(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"profiles": ()},
        {"workspace": 0},
        {"optimization_level": 6},
        {"optimization_level": -1},
        {"hardware": "x"},
    ],
)
def test_senseless_options_are_refused_at_once(wrong: dict[str, object]) -> None:
    """Protects the builder: TensorRT only logs some of these, and builds something else."""
    with pytest.raises(OptionError):
        BuildOptions(**wrong)  # type: ignore[arg-type]


def test_every_option_shapes_the_engine_or_is_left_out_knowingly() -> None:
    """Protects the cache against an option that is added and forgotten in the key."""
    changed = {
        "workspace": 1,
        "optimization_level": 1,
        "tf32": True,
        "strip_plan": True,
        "refittable": True,
        "weight_streaming": True,
        "sparse_weights": True,
    }
    base = BuildOptions().canonical()
    assert set(base) == set(changed)
    for name, value in changed.items():
        assert replace(BuildOptions(), **{name: value}).canonical() != base, name  # type: ignore[arg-type]
