"""The JSON reports of `validate parity`, `fid` and `comparison`, read with suspicion.

What is shown as a number was read as one. Whether a value keeps to its limit is decided here, whatever the
report says, and the limits of image quality are the manifest's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta, Struct, ValidationError, convert, structs

from ddexport.recipe import FidLimits
from ddexport.runtime.bundle import Manifest
from ddexport.validate.fid_report import CHANGED, DIFFERENCE, DISTANCE

T = TypeVar("T")


class ReportError(ValueError):
    """A report that does not hold what it should."""


class Measured(Struct, frozen=True):
    """One measurement of a report."""

    scope: str = ""
    name: str = ""
    value: float = math.nan
    limit: float | None = None
    direction: Literal["at most", "at least"] = "at most"
    passed: bool = True
    where: str = ""
    note: str = ""

    @property
    def gated(self) -> bool:
        """Whether it is held to a limit."""
        return self.limit is not None

    def held_to(self, limit: float | None) -> Measured:
        """The same with this limit, and whether it is kept."""
        kept = limit is None or (self.value <= limit if self.direction == "at most" else self.value >= limit)
        return structs.replace(self, limit=limit, passed=kept)


class Interval(Struct, frozen=True):
    """A figure and, where it was resampled, its interval."""

    value: float
    low: float | None = None
    high: float | None = None


class Quality(Struct, frozen=True):
    """A figure of image quality in one schedule, of both sides."""

    steps: int
    bundle: Interval
    name: str = ""
    reference: Interval | None = None
    difference: Interval | None = None


class Report(Struct, frozen=True, kw_only=True):
    """One JSON report of `validate parity` or `validate fid`."""

    file: str = ""
    kind: str = ""
    name: str
    precision: str = ""
    backend: str = ""
    images: int
    seed: int = 0
    versions: dict[str, str] = {}
    measurements: tuple[Measured, ...]
    figures: tuple[Quality, ...] = ()
    features: str = ""
    compared: dict[str, Any] | None = None
    passed: Any = None
    no_verdict: str | None = None

    @property
    def compared_with(self) -> str:
        """What the images were held against."""
        return str((self.compared or {}).get("spec", ""))

    @property
    def gated(self) -> tuple[Measured, ...]:
        """The measurements that are held to a limit."""
        return tuple(row for row in self.measurements if row.gated)

    @property
    def failures(self) -> tuple[Measured, ...]:
        """Those past their limit, where the report has a verdict."""
        return () if self.no_verdict else tuple(row for row in self.gated if not row.passed)


class _Row(Struct):
    """A row of `validate comparison`; in `image_ms` by batch size."""

    name: str
    passes: int
    how: str
    frechet: Annotated[tuple[float, ...], Meta(min_length=1)]
    image_ms: dict[str, float]


class _Comparison(Struct):
    model: str
    rows: list[_Row]


@dataclass(frozen=True)
class Drawn:
    """A row of `validate comparison`: how images are made, in how many passes, Frechet distance, ms an image
    by batch."""

    name: str
    passes: int
    how: str
    frechet: float
    image_ms: dict[str, float]


def read_report(path: Path, data: Mapping[str, Any], kind: str, manifest: Manifest) -> Report:
    """A report of parity or image quality. Raises ReportError, also for one of another bundle."""
    if data.get("name") != manifest.name:
        raise ReportError(f"it is of another bundle, {data.get('name')!r}")
    report = _converted(Report, data)
    limits = _stated_limits(manifest, report.precision) if kind == "fid" else {}
    unsaid = "" if report.passed is True else "it does not say that it passed"
    return structs.replace(
        report,
        file=path.name,
        kind=kind,
        measurements=tuple(
            row.held_to(None if row.limit is None else limits.get(row.name, row.limit))
            for row in report.measurements
        ),
        no_verdict=report.no_verdict or unsaid,
    )


def read_comparison(data: Any, manifest: Manifest) -> list[Drawn]:
    """The rows of `validate comparison --json`. Raises ReportError, also for those of another model."""
    if not isinstance(data, dict) or data.get("model") != manifest.name:
        raise ReportError("it is of another model")
    return [
        Drawn(row.name, row.passes, row.how, sum(row.frechet) / len(row.frechet), row.image_ms)
        for row in _converted(_Comparison, data).rows
    ]


def _converted(kind: type[T], data: Any) -> T:
    """Keys that the page does not show may be there; texts may stand for the numbers that JSON lacks."""
    try:
        return convert(data, kind, strict=False)
    except ValidationError as error:
        raise ReportError(str(error)) from error


def _stated_limits(manifest: Manifest, precision: str) -> dict[str, float | None]:
    """The manifest's limits of image quality, by the names of their rows."""
    stated: Any = manifest.parity
    for key in ("fid", "limits", precision):
        stated = stated.get(key) if isinstance(stated, dict) else None
    limits = _converted(FidLimits, stated) if stated else None
    rows = {"difference": DIFFERENCE, "distance": DISTANCE, "changed": CHANGED}
    return {row: getattr(limits, key, None) for key, row in rows.items()}
