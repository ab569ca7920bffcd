"""What TensorRT says while it works: its log, and how far it is.

The classes derive from TensorRT's, and so are made once that is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)


@dataclass
class Log:
    """What was logged. TensorRT rejects some settings by logging an error and going on."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def logger_to(trt: Any, record: Log) -> Any:
    """A TensorRT logger that keeps errors and warnings in `record`, and passes all on to `logging`."""
    severity = trt.ILogger
    levels = {
        severity.INTERNAL_ERROR: logging.INFO,  # whoever builds reports errors; here they are kept
        severity.ERROR: logging.INFO,
        severity.WARNING: logging.INFO,
        severity.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                record.errors.append(message)
            elif level == severity.WARNING:
                record.warnings.append(message)
            if level in levels:  # the verbose rest is thousands of lines
                log.log(levels[level], "%s", message)

    return Logger()


class Tracker:
    """Nested phases as one share of the work done; and the switch that stops it.

    TensorRT reports phases by name, each with its parent and a number of steps. A phase counts as the part of
    its parent's current step that it has done.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self.cancelled = False
        self._report = report
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name: parent, steps, steps done
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._phases[name] = (parent, max(steps, 1), 0)

    def step(self, name: str, step: int) -> bool:
        """Records a step. False asks TensorRT to stop."""
        if name in self._phases:
            parent, steps, _ = self._phases[name]
            self._phases[name] = (parent, steps, min(step + 1, steps))
            self._update(name)
        return not self.cancelled

    def finish(self, name: str) -> None:
        self._phases.pop(name, None)

    def _update(self, name: str) -> None:
        within, node = 0.0, name
        for _ in range(len(self._phases)):  # a loop among the parents would be a defect of TensorRT
            parent, steps, done = self._phases[node]
            within = min((done + within) / steps, 1.0)
            if parent is None or parent not in self._phases:
                break
            node = parent
        if within >= self._share + 0.01:  # thousands of steps, of which nobody wants to hear each
            self._share = within
            self._report(within)


def monitor_to(trt: Any, tracker: Tracker) -> Any:
    """A TensorRT progress monitor that tells `tracker`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tracker.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return tracker.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            tracker.finish(phase_name)

    return Monitor()
