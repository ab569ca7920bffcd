"""The JSON reports of `validate parity`, `fid` and `comparison`, read with suspicion.

What is shown as a number was read as one. Whether a value keeps to its limit is decided here, whatever the
report says, and the limits of image quality are the manifest's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ddexport.runtime.manifest import Manifest
from ddexport.validate.fid_report import CHANGED, DIFFERENCE, DISTANCE

T = TypeVar("T")


class ReportError(ValueError):
    """A report that does not hold what it should."""


@dataclass(frozen=True)
class Measured:
    """One measurement of a report."""

    scope: str
    name: str
    value: float
    limit: float | None
    direction: str
    passed: bool
    where: str
    note: str

    @property
    def gated(self) -> bool:
        """Whether it is held to a limit."""
        return self.limit is not None


@dataclass(frozen=True)
class Interval:
    """A figure and, where it was resampled, its interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Quality:
    """A figure of image quality in one schedule, of both sides."""

    steps: int
    name: str
    bundle: Interval
    reference: Interval | None
    difference: Interval | None


@dataclass(frozen=True)
class Report:
    """One JSON report of `validate parity` or `validate fid`."""

    file: str
    kind: str
    precision: str
    backend: str
    images: int
    seed: int
    versions: dict[str, str]
    measurements: tuple[Measured, ...]
    figures: tuple[Quality, ...] = ()
    features: str = ""
    compared_with: str = ""
    no_verdict: str = ""

    @property
    def gated(self) -> tuple[Measured, ...]:
        """The measurements that are held to a limit."""
        return tuple(one for one in self.measurements if one.gated)

    @property
    def failures(self) -> tuple[Measured, ...]:
        """Those past their limit, where the report has a verdict."""
        return () if self.no_verdict else tuple(one for one in self.gated if not one.passed)


@dataclass(frozen=True)
class Drawn:
    """A row of `validate comparison`: a way to draw, its passes, Frechet distance, ms an image by batch."""

    name: str
    passes: int
    how: str
    frechet: float
    image_ms: dict[str, float]


def read_report(path: Path, data: Mapping[str, Any], kind: str, manifest: Manifest) -> Report:
    """A report of parity or image quality. Raises ReportError, also for one of another bundle."""
    if data.get("name") != manifest.name:
        raise ReportError(f"it is of another bundle, {data.get('name')!r}")
    precision = str(data.get("precision", ""))
    limits = _stated_limits(manifest, precision) if kind == "fid" else {}
    unsaid = "" if data.get("passed") is True else "it does not say that it passed"
    compared = data.get("compared")
    versions = data.get("versions")
    return Report(
        file=path.name,
        kind=kind,
        precision=precision,
        backend=str(data.get("backend", "")),
        images=_whole(data.get("images")),
        seed=_whole(data.get("seed", 0)),
        versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        measurements=tuple(_each(data["measurements"], partial(_measured, limits))),
        figures=tuple(_each(data.get("figures") or [], _quality)),
        features=str(data.get("features", "")),
        compared_with=str(compared.get("spec", "")) if isinstance(compared, dict) else "",
        no_verdict=str(data.get("no_verdict") or unsaid),
    )


def read_comparison(data: Any, manifest: Manifest) -> list[Drawn]:
    """The rows of `validate comparison --json`. Raises ReportError, also for those of another model."""
    if not isinstance(data, dict) or data.get("model") != manifest.name:
        raise ReportError("it is of another model")

    def drawn(row: Mapping[str, Any]) -> Drawn:
        values, times = row.get("frechet"), row.get("image_ms")
        if not isinstance(values, list) or not values or not isinstance(times, dict):
            raise ReportError("a row without figures")
        mean = sum(map(_number, values)) / len(values)
        texts = (str(row.get("name", "")), _whole(row.get("passes")), str(row.get("how", "")))
        return Drawn(*texts, mean, {str(batch): _number(time) for batch, time in times.items()})

    return _each(data.get("rows"), drawn)


def _each(items: Any, read: Callable[[Mapping[str, Any]], T]) -> list[T]:
    if not isinstance(items, list) or not all(isinstance(one, dict) for one in items):
        raise ReportError("its figures are no list")
    return [read(one) for one in items]


def _stated_limits(manifest: Manifest, precision: str) -> dict[str, Any]:
    """The manifest's limits of image quality, by the names of their rows."""
    stated: Any = manifest.parity
    for key in ("fid", "limits", precision):
        stated = stated.get(key) if isinstance(stated, dict) else None
    limits = stated if isinstance(stated, dict) else {}
    rows = {"difference": DIFFERENCE, "distance": DISTANCE, "changed": CHANGED}
    return {row: limits.get(key) for key, row in rows.items()}


def _measured(limits: Mapping[str, Any], data: Mapping[str, Any]) -> Measured:
    """A row; `limits` are those that it does not say itself, by its name."""
    limit = data.get("limit")
    if limit is not None:
        limit = limits.get(str(data.get("name")), limit)
    limit = None if limit is None else _number(limit)
    value = _number(data.get("value"))
    direction = "at least" if data.get("direction") == "at least" else "at most"
    kept = limit is None or (value <= limit if direction == "at most" else value >= limit)
    texts = {key: str(data.get(key) or "") for key in ("scope", "name", "where", "note")}
    return Measured(**texts, value=value, limit=limit, direction=direction, passed=kept)


def _quality(data: Mapping[str, Any]) -> Quality:
    bundle = _interval(data.get("bundle"))
    if bundle is None:
        raise ReportError("a figure without a value")
    sides = (_interval(data.get("reference")), _interval(data.get("difference")))
    return Quality(_whole(data.get("steps")), str(data.get("name", "")), bundle, *sides)


def _interval(data: Any) -> Interval | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ReportError("a figure without a value")
    ends = (None if data.get(end) is None else _number(data[end]) for end in ("low", "high"))
    return Interval(_number(data.get("value")), *ends)


def _number(value: Any) -> float:
    """Numbers, and the words that reports have for what JSON lacks."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ReportError(f"{str(value)[:40]!r} is not a number")
    return float(value)


def _whole(value: Any) -> int:
    number = _number(value)
    if not math.isfinite(number) or number != int(number):
        raise ReportError(f"{value!r} is not a whole number")
    return int(number)
