"""What TensorRT says while it works: its log, and how far it is.

The classes derive from TensorRT's, and so are made once that is imported.
"""

from __future__ import annotations

import logging
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


@dataclass
class Tracker:
    """How many steps a build has done, and the switch that stops it.

    The steps of TensorRT's phases do not tell how much time is left: the last one takes most of it.
    """

    steps: int = 0
    cancelled: bool = False


def monitor_to(trt: Any, tracker: Tracker) -> Any:
    """A TensorRT progress monitor that counts in `tracker`, and answers with its switch."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            tracker.steps += 1
            return not tracker.cancelled

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()
