"""`parity/golden.npz`: what the PyTorch side drew, for checks where neither PyTorch nor the checkpoint is.

docs/validation.md has the format; `ddexport.runtime.check` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddexport.runtime.files import write_arrays
from ddexport.validate.metrics.tokens import margins
from ddexport.validate.reference import seeds_of

if TYPE_CHECKING:
    from ddexport.validate.conditions import Classes, Texts
    from ddexport.validate.reference import ReferenceRun
    from ddexport.validate.report import Report

IMAGES = 8


def write_golden(path: Path, report: Report, runs: list[ReferenceRun], conditions: Classes | Texts) -> None:
    """Writes those images whose tokens were clearest to the reference, which no rounding should change, and
    the texts that their labels number.

    Raises OutputError.
    """
    closest = np.min([_smallest_margin(run) for run in runs], axis=0)
    rows = np.sort(np.argsort(-closest, kind="stable")[:IMAGES])
    arrays = {
        "manifest": np.array(report.manifest),
        "steps": np.array([run.steps for run in runs]),
        "seeds": seeds_of(report.images, report.seed)[rows],
        "labels": np.array(report.settings["labels"], dtype=np.int64)[rows],
        **conditions.stored(),
    }
    for run in runs:
        arrays[f"tokens_{run.steps}"] = run.passes[-1].tokens[rows]
        arrays[f"sequences_{run.steps}"] = run.passes[-1].sequence[rows]
        arrays[f"images_{run.steps}"] = run.pixels[rows]
    write_arrays(path, arrays)


def _smallest_margin(run: ReferenceRun) -> np.ndarray:
    """(N,): of the student's decisions; a teacher's are draws, which a margin says nothing about."""
    students = [step for step in run.passes if step.role == "student" and step.logits.shape[1] > step.known]
    smallest = [margins(step.logits[:, step.known :]).min(axis=1) for step in students]
    return np.min(smallest, axis=0) if smallest else np.full(len(run.pixels), np.inf)
