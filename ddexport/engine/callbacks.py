"""How far a build of TensorRT is, and the switch that stops it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
