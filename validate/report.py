"""What a parity run found: a table for people, JSON for machines, and a directory with pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ddexport.runtime.files import atomic_write, make_directory, write_image
from ddexport.validate import pictures
from ddexport.validate.metrics._base import Comparison, Limits, Measurement

SCHEMA = 1
PAGE_NAME = "report.html"
NAME_WIDTH = 44
HEADINGS = ("", "value", "limit", "", "worst at")


@dataclass(frozen=True)
class Settings:
    """What was compared, and how: everything needed to run it again."""

    bundle: str
    manifest: str  # SHA-256 of the bundle.json
    name: str
    weights: str
    precision: str
    backend: str
    images: int
    seed: int
    batch: int
    labels: tuple[int, ...]
    steps: tuple[str, ...]
    versions: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class ParityReport:
    """The settings, the limits and every measurement of one run."""

    settings: Settings
    limits: Limits
    measurements: tuple[Measurement, ...]

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The measurements past their limit."""
        return tuple(row for row in self.measurements if not row.passed)

    @property
    def passed(self) -> bool:
        """Whether every gated measurement keeps to its limit."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """As plain data: parity.json, and what `--json` prints."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            **asdict(self.settings),
            "limits": asdict(self.limits),
            "measurements": [row.to_dict() for row in self.measurements],
        }


def table(report: ParityReport) -> str:
    """The measurements as text, gathered by scope."""
    settings = report.settings
    lines = [_title(settings), ""]
    for scope, group in _by_scope(report):
        lines.append(scope)
        for row in group:
            value, limit, verdict, where = _cells(row)
            lines.append(f"  {row.name:{NAME_WIDTH}}{value:>10}  {limit:>10}  {verdict:4}  {where}".rstrip())
    return "\n".join([*lines, "", verdict_line(report)])


def verdict_line(report: ParityReport) -> str:
    """One sentence: whether parity holds, and what was left out of it."""
    gated = sum(row.gated for row in report.measurements)
    rows = [row for row in report.measurements if row.rule.endswith("left_out") and row.value]
    left_out = [f"{row.note} in {row.scope.partition(',')[0]}" for row in rows]
    provisional = " (provisional: nobody has measured this model)" if report.limits.provisional else ""
    images = f"; images left out because a token differs: {', '.join(left_out)}" if left_out else ""
    if report.passed:
        return f"parity holds: {gated} of {gated} measurements within their limits{provisional}{images}"
    failed = f"{len(report.failures)} of {gated} measurements past their limits"
    return f"parity fails: {failed}{provisional}{images}"


def failure_line(row: Measurement) -> str:
    """One failed row, in words."""
    value, limit, _, where = _cells(row)
    return f"{row.scope}: {row.name} {value}, limit {limit}, worst at {where}"


def write_report(report: ParityReport, comparison: Comparison, directory: Path) -> Path:
    """Writes parity.json, worst.png, margins.png and report.html, which shows all of them. Returns the last.

    Raises `OutputError` where the directory cannot be written.
    """
    make_directory(directory)
    margins = pictures.token_margins(comparison, report.limits.token_margin)
    write_image(directory / "worst.png", pictures.worst_images(comparison))
    write_image(directory / "margins.png", margins)
    texts = {
        "parity.json": json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n",
        PAGE_NAME: _page(report),
    }
    for name, text in texts.items():
        with atomic_write(directory / name) as stream:
            stream.write(text.encode())
    return directory / PAGE_NAME


def _title(settings: Settings) -> str:
    steps = " and ".join(map(str, settings.steps))
    return (
        f"{settings.name}: {settings.backend} in {settings.precision} against PyTorch,"
        f" {settings.images} images in {steps} steps, seed {settings.seed} ({settings.weights})"
    )


def _by_scope(report: ParityReport) -> Iterator[tuple[str, Iterator[Measurement]]]:
    return groupby(report.measurements, key=lambda row: row.scope)


def _cells(row: Measurement) -> tuple[str, str, str, str]:
    """Value, limit, verdict and the remark of a row."""
    limit = "" if row.limit is None else f"{'<=' if row.direction == 'at most' else '>='} {row.limit:g}"
    verdict = "" if not row.gated else "ok" if row.passed else "FAIL"
    remark = "; ".join(part for part in (row.where, row.note) if part)
    return f"{row.value:.4g}", limit, verdict, remark


def _page(report: ParityReport) -> str:
    rows = []
    for scope, group in _by_scope(report):
        rows.append(f'<tr><th colspan="5" scope="rowgroup">{html.escape(scope)}</th></tr>')
        for row in group:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (row.name, *_cells(row)))
            rows.append(f'<tr class="{"" if row.passed else "fail"}">{cells}</tr>')
    headings = "".join(f"<th>{html.escape(heading)}</th>" for heading in HEADINGS)
    versions = ", ".join(f"{name} {version}" for name, version in report.settings.versions.items())
    return PAGE.format(
        title=html.escape(_title(report.settings)),
        verdict=html.escape(verdict_line(report)),
        verdict_class="" if report.passed else "fail",
        headings=headings,
        rows="\n".join(rows),
        versions=html.escape(f"{versions}; {report.settings.seconds:.1f} s"),
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #202024; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
td, th {{ text-align: left; padding: 2px 10px; border-bottom: 1px solid #e6e6ea; }}
td:nth-child(2), td:nth-child(3) {{ text-align: right; white-space: nowrap; }}
th[scope=rowgroup] {{ padding-top: 1em; }}
.fail {{ color: #c82828; font-weight: 600; }}
img {{ max-width: 100%; border: 1px solid #e6e6ea; }}
</style>
</head>
<body>
<h1>Parity</h1>
<p>{title}</p>
<p class="{verdict_class}">{verdict}</p>
<h2>Worst images</h2>
<img src="worst.png" alt="bundle, reference and amplified difference of the images that differ most">
<h2>Token margins</h2>
<img src="margins.png" alt="histogram of the reference's top-2 logit margins">
<h2>Measurements</h2>
<table>
<thead><tr>{headings}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p>{versions}</p>
</body>
</html>
"""
