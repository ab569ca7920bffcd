"""A row of the result: what was timed, how fast it was, and whether it was right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ddexport.validate.bench.workload import IN_TORCH, RunnerConfiguration, Workload

VERDICTS = {True: "ok", False: "WRONG", None: "?"}


@dataclass
class Row:
    """A runner on a workload; a field that could not be measured is None.

    Times are medians over the rounds, in milliseconds a batch; with several processes a batch is one
    process's, and images_per_s is that of all. percentiles: by part, then by the percentile's name.
    roofline: the share of the machine's matrix-product peak of that precision. flops: of one image, by part
    and in all. peak_mib: of all its processes. passed: None where there was nothing to hold it against.
    speedup: how many times faster than `against` an image is, with its 95 % interval. error: why it was not
    timed.
    """

    bundle: str
    model: str
    runner: RunnerConfiguration
    workload: Workload
    version: str = ""
    machine: str = ""
    student_ms: float | None = None
    teacher_ms: float | None = None
    decoder_ms: float | None = None
    total_ms: float | None = None
    percentiles: dict[str, dict[str, float]] = field(default_factory=dict)
    rounds: int = 0
    images_per_s: float | None = None
    peak_mib: float | None = None
    flops: dict[str, float] | None = None
    peak_gflops: float | None = None
    roofline: float | None = None
    tokens_equal: float | None = None
    embedding_error: float | None = None
    image_psnr: float | None = None
    image_max: float | None = None
    passed: bool | None = None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    against: str | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    error: str | None = None

    @property
    def timed(self) -> bool:
        return self.error is None and self.total_ms is not None

    @property
    def verdict(self) -> str:
        """For people: ok, WRONG, failed, or a question mark where there was nothing to hold it against."""
        return "failed" if self.error is not None else VERDICTS[self.passed]

    def __str__(self) -> str:
        return f"{self.runner}, {self.workload}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data in one level. Equal images have an infinite PSNR, which JSON lacks: it becomes null
        there, and `image_max` is 0."""
        data = asdict(self)
        return {**data.pop("runner"), **data.pop("workload"), **data}


def best_rows(rows: Sequence[Row]) -> set[int]:
    """The indices of the fastest right row of each bundle and batch, by images a second."""
    best: dict[tuple[str, int], int] = {}
    for index, row in enumerate(rows):
        if row.timed and row.passed:
            other = best.setdefault((row.bundle, row.workload.batch), index)
            if (row.images_per_s or 0.0) > (rows[other].images_per_s or 0.0):
                best[row.bundle, row.workload.batch] = index
    return set(best.values())


def times_to_save(rows: Sequence[Row], precision: str) -> dict[str, float]:
    """Milliseconds an image of the runtime's CPU backends, for `--backend auto`: in one step, of the smallest
    batch and the most threads. Only rows in that precision count, and only those that met the limits."""
    right = [
        row
        for row in rows
        if row.runner.backend not in IN_TORCH
        and (row.runner.device, row.runner.precision, row.runner.processes) == ("cpu", precision, 1)
        and row.workload.steps == 1
        and row.timed
        and row.passed
    ]
    usual = min(((row.workload.batch, -row.runner.threads) for row in right), default=None)
    return {
        row.runner.backend: (row.total_ms or 0.0) / row.workload.batch
        for row in right
        if (row.workload.batch, -row.runner.threads) == usual
    }
