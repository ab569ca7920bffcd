"""What `validate fid` found: figures of both sets of images, the distance between them, and the verdict."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddexport.runtime.files import atomic_write, make_directory
from ddexport.validate import bootstrap
from ddexport.validate.metrics._base import Measurement

SCHEMA = 1
NAME_WIDTH, CELL_WIDTH = 30, 32
FID = "FID"
DIFFERENCE, DISTANCE, CHANGED = "FID, difference", "feature distance, paired", "images that differ"
LEAST_RESAMPLES = 40  # of a 95 % interval: one beyond either end


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, and by how much resampling raised it; without a bootstrap, alone."""

    value: float
    low: float | None = None
    high: float | None = None
    bias: float | None = None

    @staticmethod
    def of(figure: bootstrap.Figure) -> Estimate:
        """A figure of `ddexport.validate.bootstrap`."""
        return Estimate(figure.value, figure.low, figure.high, figure.bias)

    def text(self, sign: bool = False) -> str:
        """`0.431 [0.402, 0.467]`."""
        plus = "+" if sign else ""
        if self.low is None or self.high is None:
            return f"{self.value:{plus}.4g}"
        return f"{self.value:{plus}.4g} [{self.low:{plus}.3g}, {self.high:{plus}.3g}]"

    def to_dict(self) -> dict[str, Any]:
        """As plain data. A value that is not finite becomes a string."""
        return {name: _plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Figure:
    """One figure in one schedule: of the bundle, of the PyTorch reference, and their paired difference."""

    steps: int
    name: str
    bundle: Estimate
    reference: Estimate | None = None
    difference: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the JSON report."""
        sides = {side: getattr(self, side) for side in ("bundle", "reference", "difference")}
        estimates = {side: estimate.to_dict() if estimate else None for side, estimate in sides.items()}
        return {"steps": self.steps, "name": self.name, **estimates}


@dataclass(frozen=True)
class Compared:
    """The set of images that the figures are measured against."""

    spec: str
    images: int | None
    identity: str | None  # of the features; None where a file of statistics does not say


@dataclass(frozen=True)
class Settings:
    """What was measured, and how: everything needed to run it again."""

    bundle: str
    manifest: str  # SHA-256 of the bundle.json
    name: str
    weights: str
    precision: str
    backend: str
    images: int
    seed: int
    labels: str
    batch: int
    steps: tuple[int, ...]
    features: str
    features_identity: str
    features_width: int
    compared: Compared | None
    paired: bool
    bootstrap: int
    versions: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    resumed_at: int = 0
    seconds: float = 0.0
    allow_few: bool = False
    random_features: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class FidReport:
    """Settings, limits, figures, and the measurements that are held to limits."""

    settings: Settings
    limits: dict[str, float | None]
    figures: tuple[Figure, ...]
    measurements: tuple[Measurement, ...]

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The measurements past their limit."""
        return tuple(row for row in self.measurements if not row.passed)

    @property
    def no_verdict(self) -> str:
        """Why the rows, within their limits or past them, say nothing; "" where they do."""
        settings, rows = self.settings, [row for row in self.measurements if row.name == DIFFERENCE]
        if not settings.paired:
            return "measured alone, without PyTorch beside it"
        compared = {row.scope for row in rows} == {scope_of(steps) for steps in settings.steps}
        differences = [figure.difference for figure in self.figures if figure.name == FID]
        interval = all(difference is not None and difference.low is not None for difference in differences)
        reasons = {
            "no FID compares the two sides (--reference none)": not compared,
            "--allow-few is for trials of the tools": settings.allow_few,
            "random feature weights measure nothing": settings.random_features,
            f"the limits are not for the features {settings.features}": not all(row.gated for row in rows)
            and not settings.random_features,
            f"no interval of the FID difference (--bootstrap {LEAST_RESAMPLES} at least)": not interval
            or settings.bootstrap < LEAST_RESAMPLES,
        }
        return "; ".join(reason for reason, holds in reasons.items() if holds)

    @property
    def passed(self) -> bool | None:
        """Whether every gated measurement keeps to its limit; None: there is no verdict."""
        return None if self.no_verdict else not self.failures

    def to_dict(self) -> dict[str, Any]:
        """As plain data: the JSON report, and what `--json` prints."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "no_verdict": self.no_verdict or None,
            **asdict(self.settings),
            "steps": list(self.settings.steps),
            "limits": self.limits,
            "figures": [figure.to_dict() for figure in self.figures],
            "measurements": [row.to_dict() for row in self.measurements],
        }


def write_report(report: FidReport, directory: Path) -> Path:
    """Writes `fid-PRECISION.json` and returns its path. Raises OutputError."""
    make_directory(directory)
    path = directory / f"fid-{report.settings.precision}.json"
    with atomic_write(path) as stream:
        stream.write((json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n").encode())
    return path


def table(report: FidReport) -> str:
    """Figures and measurements as text, by schedule."""
    lines = [_title(report.settings)]
    heads = ("bundle", "PyTorch", "difference") if report.settings.paired else ("bundle",)
    schedules = map(scope_of, report.settings.steps)
    for scope in dict.fromkeys((*schedules, *(row.scope for row in report.measurements))):
        figures = [figure for figure in report.figures if scope_of(figure.steps) == scope]
        titles = "".join(f"{head:<{CELL_WIDTH}}" for head in heads) if figures else ""
        lines += ["", f"{scope:{NAME_WIDTH}}{titles}".rstrip(), *map(_figure_line, figures)]
        lines += [_measurement_line(row) for row in report.measurements if row.scope == scope]
    return "\n".join([*lines, "", verdict_line(report)])


def verdict_line(report: FidReport) -> str:
    """One sentence: whether the gate holds."""
    gated = sum(row.gated for row in report.measurements)
    if report.no_verdict:
        return f"no verdict: {report.no_verdict}"
    provisional = " (provisional: nobody has measured this model)" if report.limits.get("provisional") else ""
    if report.passed:
        return f"image quality holds: {gated} of {gated} measurements within their limits{provisional}"
    failed = len(report.failures)
    return f"image quality fails: {failed} of {gated} measurements past their limits{provisional}"


def failure_line(row: Measurement) -> str:
    """One failed row, in words."""
    place = f", {row.where}" if row.where else ""
    return f"{row.scope}: {row.name} {row.value:.4g}, limit {row.limit:.4g}{place}"


def scope_of(steps: int) -> str:
    """The name of a schedule, for people."""
    return f"{steps} step{'s' if steps > 1 else ''}"


def _title(settings: Settings) -> str:
    against = " against PyTorch" if settings.paired else ""
    lines = [
        f"{settings.name}: {settings.backend} in {settings.precision}{against}, {settings.images:,} images,"
        f" seed {settings.seed}, labels {settings.labels} ({settings.weights})",
        f"features: {settings.features}, {settings.features_width} wide",
    ]
    if settings.compared is not None:
        count = settings.compared.images
        known = f" ({count:,} images)" if count is not None else ""
        lines.append(f"reference set: {settings.compared.spec}{known}")
    if settings.bootstrap:
        lines.append(f"in brackets: 95 % of {settings.bootstrap} resamples")
    return "\n".join(lines)


def _figure_line(figure: Figure) -> str:
    cells = [figure.bundle.text()]
    cells += [figure.reference.text()] if figure.reference else []
    cells += [figure.difference.text(sign=True)] if figure.difference else []
    return f"  {figure.name:{NAME_WIDTH - 2}}" + "".join(f"{cell:<{CELL_WIDTH}}" for cell in cells).rstrip()


def _measurement_line(row: Measurement) -> str:
    limit = "" if row.limit is None else f"<= {row.limit:.4g}"
    verdict = "" if not row.gated else "ok" if row.passed else "FAIL"
    remark = "; ".join(part for part in (row.where, row.note) if part)
    return f"    {row.name:{NAME_WIDTH + 4}}{row.value:>10.4g}  {limit:>12}  {verdict:4}  {remark}".rstrip()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value
