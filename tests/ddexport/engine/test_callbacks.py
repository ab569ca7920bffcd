"""What TensorRT says while it works, and the switch that stops a build."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ddexport.engine.callbacks import Log, Tracker, logger_to, monitor_to


def test_steps_are_counted_and_answered() -> None:
    """Protects Ctrl-C, which reaches TensorRT through the answer to a step, and the sign of life."""
    tracker = Tracker()
    monitor: Any = monitor_to(SimpleNamespace(IProgressMonitor=type("IProgressMonitor", (), {})), tracker)
    monitor.phase_start("build", None, 3)
    monitor.phase_start("optimise", "build", 1)
    assert monitor.step_complete("optimise", 0) is True
    monitor.phase_finish("optimise")
    assert monitor.step_complete("build", 0) is True
    assert tracker.steps == 2
    tracker.cancelled = True
    assert monitor.step_complete("build", 1) is False


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
