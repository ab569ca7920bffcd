"""Progress is one rising share of nested phases, and the switch that stops a build."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ddexport.engine.callbacks import Log, Tracker, logger_to


def test_nested_phases_are_one_share() -> None:
    """Protects the bar: a phase counts as a part of its parent's current step."""
    shares: list[float] = []
    tracker = Tracker(shares.append)
    tracker.start("build", None, 2)
    tracker.start("optimise", "build", 4)
    for step in range(4):
        assert tracker.step("optimise", step)
    assert shares == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    tracker.finish("optimise")
    tracker.step("build", 0)
    tracker.step("build", 1)
    tracker.finish("build")
    assert shares[-1] == pytest.approx(1.0)


def test_the_share_never_falls() -> None:
    """Protects the bar from the phases that TensorRT starts again under the same name."""
    shares: list[float] = []
    tracker = Tracker(shares.append)
    tracker.start("build", None, 2)
    for _ in range(3):
        tracker.start("again", "build", 10)
        for step in range(10):
            tracker.step("again", step)
        tracker.finish("again")
    tracker.step("never started", 0)
    assert shares == sorted(shares) and len(shares) == 10


def test_thousands_of_steps_are_not_thousands_of_reports() -> None:
    """Protects the terminal: TensorRT takes a step for each layer."""
    shares: list[float] = []
    tracker = Tracker(shares.append)
    tracker.start("build", None, 100_000)
    for step in range(100_000):
        tracker.step("build", step)
    assert 50 < len(shares) <= 100


def test_cancelling_answers_no_to_the_next_step() -> None:
    """Protects Ctrl-C, which reaches TensorRT through this answer."""
    tracker = Tracker(lambda share: None)
    tracker.start("build", None, 2)
    assert tracker.step("build", 0)
    tracker.cancelled = True
    assert not tracker.step("build", 1)
    assert not tracker.step("unknown phase", 0)


def test_errors_are_kept_and_the_rest_is_not(caplog: pytest.LogCaptureFixture) -> None:
    """Protects the rule that a logged error is a failure, and a warning is not."""

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    record = Log()
    logger: Any = logger_to(SimpleNamespace(ILogger=ILogger), record)
    with caplog.at_level("DEBUG"):
        for level, text in enumerate(("internal", "error", "warning", "info", "verbose")):
            logger.log(level, text)
    assert record.errors == ["internal", "error"] and record.warnings == ["warning"]
    assert [entry.message for entry in caplog.records] == ["internal", "error", "warning", "info"]
