"""A report: rows with their limits, how they were measured, and of which bundle; as text, as JSON, read back.

`validate parity` and `validate fid` write one into BUNDLE/parity, as `KIND-PRECISION.json` with its pictures
beside it; `validate/page.py` shows all that lie there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from msgspec import to_builtins
from PIL import Image

from ddexport.runtime.bundle import FULL
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write, make_directory, write_image
from ddexport.runtime.machine import version_of
from ddexport.runtime.records import Record, convert, read_json
from ddexport.validate.options import KINDS

SCHEMA = 2
Direction = Literal["at most", "at least"]
NAME_WIDTH = 44
ENGINES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx")


class ReportError(DDError):
    """A file that is not a report, or not one of this schema."""


class Measurement(Record, frozen=True):
    """One number, its limit, and where it is worst.

    low, high: a 95 % interval, where there is one. `limit` None makes it information: it cannot fail. A value
    that is not a number never passes. `counts` holds what the value was counted from. rule: the field of the
    limits that `limit` is.
    """

    metric: str
    scope: str
    name: str
    value: float
    limit: float | None = None
    direction: Direction = "at most"
    where: str = ""
    note: str = ""
    counts: dict[str, int] = {}
    rule: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def gated(self) -> bool:
        """Whether this measurement can fail."""
        return self.limit is not None

    @property
    def passed(self) -> bool:
        """Whether the value keeps to the limit; always true for information."""
        if self.limit is None:
            return True
        return self.value <= self.limit if self.direction == "at most" else self.value >= self.limit

    @property
    def value_text(self) -> str:
        """`0.431`, or `0.431 [0.402, 0.467]`."""
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def limit_text(self) -> str:
        """`<= 0.01`; empty for information."""
        return "" if self.limit is None else f"{'<=' if self.direction == 'at most' else '>='} {self.limit:g}"

    @property
    def verdict(self) -> str:
        """`ok`, `FAIL`, or empty for information."""
        return "" if not self.gated else "ok" if self.passed else "FAIL"

    @property
    def remark(self) -> str:
        """Where it is worst, and the note."""
        return "; ".join(part for part in (self.where, self.note) if part)

    def __str__(self) -> str:
        """In words, for an error."""
        where = f", worst at {self.remark}" if self.remark else ""
        return f"{self.scope}: {self.name} {self.value_text}, limit {self.limit_text}{where}"


class Report(Record, frozen=True):
    """All that one run measured of one precision of a bundle.

    manifest: SHA-256 of the bundle.json. settings: what else is needed to run it again. no_verdict: why the
    rows say nothing. pictures: what each shows, and its file beside the report.
    """

    schema: int
    kind: Literal["parity", "fid"]
    name: str
    title: str
    manifest: str
    precision: str
    backend: str
    images: int
    seed: int
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    rows: tuple[Measurement, ...]
    no_verdict: str = ""
    provisional: bool = False
    decoder: str = FULL
    pictures: dict[str, str] = {}

    @property
    def variant(self) -> str:
        """What was measured of the bundle: `fp32`, or `fp32-small` with a further decoder."""
        return self.precision if self.decoder == FULL else f"{self.precision}-{self.decoder}"

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The measurements past their limit."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def passed(self) -> bool | None:
        """Whether every gated measurement keeps to its limit; None: there is no verdict."""
        return None if self.no_verdict else not self.failures

    @property
    def by_scope(self) -> list[tuple[str, list[Measurement]]]:
        """The rows of each scope."""
        return [(scope, list(rows)) for scope, rows in groupby(self.rows, key=lambda row: row.scope)]

    @property
    def verdict(self) -> str:
        """One sentence: whether the bundle keeps to its limits, and what was left out."""
        if self.no_verdict:
            return f"no verdict: {self.no_verdict}"
        gated, failed = sum(row.gated for row in self.rows), len(self.failures)
        left = [row for row in self.rows if row.rule.endswith("left_out") and row.value]
        left_out = ", ".join(f"{row.note} in {row.scope.partition(',')[0]}" for row in left)
        provisional = " (provisional limits: this model was never measured)" if self.provisional else ""
        tail = provisional + (f"; images left out because a token differs: {left_out}" if left else "")
        if not failed:
            return f"{KINDS[self.kind]} holds: {gated} of {gated} measurements within their limits{tail}"
        return f"{KINDS[self.kind]} fails: {failed} of {gated} measurements past their limits{tail}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the verdict; what is not finite becomes a string, as JSON lacks it."""
        data: dict[str, Any] = _finite(to_builtins(self))
        for row, measured in zip(data["rows"], self.rows, strict=True):
            row["passed"] = measured.passed
        return data | {"passed": self.passed, "verdict": self.verdict}


def table(report: Report) -> str:
    """The rows as text, gathered by scope."""
    lines = [report.title, ""]
    for scope, rows in report.by_scope:
        lines.append(scope)
        for row in rows:
            cells = f"{row.value_text:>10}  {row.limit_text:>10}  {row.verdict:4}  {row.remark}"
            lines.append(f"  {row.name:{NAME_WIDTH}}{cells}".rstrip())
    return "\n".join([*lines, "", report.verdict])


def wide_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of the same keys as text: a line a row, a column a key."""
    lines = [{key: key for key in rows[0]}, *rows] if rows else []
    widths = {key: max(len(line[key]) for line in lines) for key in (rows[0] if rows else ())}
    first = next(iter(widths), "")
    cells = [[(line[key], "<" if key == first else ">", widths[key]) for key in widths] for line in lines]
    return "\n".join(
        "  ".join(f"{text:{side}{width}}" for text, side, width in line).rstrip() for line in cells
    )


def write(report: Report, directory: Path, pictures: Mapping[str, Image.Image] | None = None) -> Report:
    """Writes `KIND-PRECISION.json`, or `KIND-PRECISION-DECODER.json`, and the pictures beside it; `pictures`:
    what each shows, and the picture.

    Returns the report with their names. Raises OutputError where the directory cannot be written.
    """
    from msgspec.structs import replace

    make_directory(directory)
    stem = f"{report.kind}-{report.variant}"
    names = {title: f"{stem}-{number}.png" for number, title in enumerate(pictures or {})}
    for title, picture in (pictures or {}).items():
        write_image(directory / names[title], picture)
    report = replace(report, pictures=names)
    with atomic_write(directory / f"{stem}.json") as stream:
        stream.write((json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n").encode())
    return report


def read(path: Path) -> Report:
    """What `write` wrote. Verdicts are made again from the values. Raises ReportError."""
    data = read_json(path, ReportError)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ReportError(f"{path} is not a report of schema {SCHEMA}", "make it again")
    fields = {key: value for key, value in data.items() if key not in ("passed", "verdict")}
    return convert(Report, _numbers(fields), path.name, ReportError)


def versions(*backends: str) -> dict[str, str]:
    """Of the packages that a measurement depends on. backends: what ran the bundle."""
    engines = [name for name in ENGINES if any(one.startswith(name.partition("-")[0]) for one in backends)]
    known = {name: version_of(name) for name in ("ddexport", "torch", "numpy", *engines)}
    return {name: version for name, version in known.items() if version}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """The values that are not finite as numbers again, and no verdicts."""
    rows = fields.get("rows")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            row.pop("passed", None)
        for key in ("value", "low", "high", "limit") if isinstance(row, dict) else ():
            if row.get(key) in ("nan", "inf", "-inf"):
                row[key] = float(row[key])
    return fields
