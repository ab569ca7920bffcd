"""A row of the result: what was timed, how fast it was, and whether it was right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ddexport.validate.bench.case import way_name

VERDICTS = {True: "ok", False: "WRONG", None: "?"}


@dataclass
class Row:
    """One alternative on one case; a field that could not be measured is None.

    Times are medians over the rounds, in milliseconds a batch; with several processes a batch is one
    process's, and images_per_s is that of all. percentiles: by part, then by the percentile's name.
    roofline: the share of the machine's matrix-product peak of that precision. flops: of one image, by part
    and in all. peak_mib: of all its processes. passed: None where there was nothing to hold it against.
    speedup: how many times faster than `against` an image is, with its 95 % interval. error: why it was not
    timed.
    """

    bundle: str
    model: str
    backend: str
    precision: str
    batch: int
    steps: int | str
    threads: int
    mode: str | None = None
    processes: int = 1
    provider: str | None = None
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
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    against: str | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """For people, without what the table says elsewhere."""
        return way_name(self.backend, self.precision, self.mode, self.processes)

    @property
    def timed(self) -> bool:
        return self.error is None and self.total_ms is not None

    @property
    def verdict(self) -> str:
        """For people: ok, WRONG, failed, or a question mark where there was nothing to hold it against."""
        return "failed" if self.error is not None else VERDICTS[self.passed]

    def to_dict(self) -> dict[str, Any]:
        """As plain data. Equal images have an infinite PSNR, which JSON lacks: it becomes null there, and
        `image_max` is 0."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def best_rows(rows: list[Row]) -> set[int]:
    """The indices of the fastest right row of each bundle and batch, by images a second."""
    best: dict[tuple[str, int], int] = {}
    for index, row in enumerate(rows):
        if not row.timed or row.passed is not True:
            continue
        key = (row.bundle, row.batch)
        if key not in best or _rate(row) > _rate(rows[best[key]]):
            best[key] = index
    return set(best.values())


def _rate(row: Row) -> float:
    return row.images_per_s or 0.0


@dataclass(frozen=True)
class Environment:
    """The machine of a run, for people who read the figures later."""

    cpu: str
    cores: int
    features: tuple[str, ...]
    versions: Mapping[str, str]
    date: str

    @property
    def line(self) -> str:
        parts = [self.cpu, f"{self.cores} core{'s' * (self.cores != 1)}", " ".join(self.features)]
        return ", ".join(part for part in parts if part)
