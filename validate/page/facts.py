"""What is known of a bundle: its manifest, and the reports that lie in BUNDLE/parity.

A report that is missing is a fact too, with the command that makes it; one that cannot be read, or is of
another bundle, becomes a remark. Nothing here trusts a report: what is shown as a number was read as one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from runtime.manifest import FILE_NAME, Manifest, read_manifest, sha256_of
from validate.page.evidence import Evidence, EvidenceError, evidence_from_dict
from validate.page.latency import Latency, latencies

FOLDER = "parity"
MAX_BYTES = 64 << 20

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
    paired: bool = True

    @property
    def gated(self) -> tuple[Measured, ...]:
        """The measurements that are held to a limit."""
        return tuple(one for one in self.measurements if one.gated)

    @property
    def failures(self) -> tuple[Measured, ...]:
        """Those past their limit."""
        return tuple(one for one in self.gated if not one.passed)


@dataclass(frozen=True)
class Drawn:
    """A row of `validate comparison`: a way to draw, its passes, Frechet distance, ms an image by batch."""

    name: str
    passes: int
    how: str
    frechet: float
    image_ms: dict[str, float]


@dataclass(frozen=True)
class Missing:
    """A report that is not there, and the command that makes it."""

    what: str
    command: str


@dataclass
class Facts:
    """Everything that the page shows."""

    bundle: Path
    manifest: Manifest
    manifest_sha256: str
    names: tuple[str, ...]
    parity: list[Report] = field(default_factory=list)
    fid: list[Report] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)
    comparison: list[Drawn] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Measured]:
        """Every measurement past its limit, in any report."""
        return [one for report in (*self.parity, *self.fid) for one in report.failures]


def collect(bundle: Path, shown: str | None = None) -> Facts:
    """Reads a bundle and its reports. Raises BundleError, also where a file has not the stated SHA-256.

    shown: how the bundle is named in commands; its path by default.
    """
    from runtime.labels import read_labels
    from runtime.manifest import resolve

    manifest = read_manifest(bundle, verify=True)
    labels = read_labels(resolve(bundle, manifest.labels.file), manifest.classes)
    facts = Facts(bundle, manifest, sha256_of(bundle / FILE_NAME), tuple(labels.names))
    for path, data in _reports(bundle / FOLDER, facts.remarks):
        for reads, found, wanted in _readers(facts):
            if wanted(path.name, data):
                _take(path, partial(reads, path, data), found, facts.remarks)
                break
    facts.missing = _missing(facts, shown or str(bundle))
    return facts


def _readers(facts: Facts) -> list[tuple[Callable[[Path, Any], Any], list[Any], Callable[[str, Any], bool]]]:
    """What reads a file, where the result goes, and which files it is for."""

    def of_measurements(name: str, data: Any) -> bool:
        return isinstance(data, dict) and "measurements" in data

    return [
        (
            lambda path, data: _evidence(data, facts),
            facts.evidence,
            lambda name, _: name.startswith("evidence"),
        ),
        (
            lambda path, data: _report(path, data, "fid", facts.manifest),
            facts.fid,
            lambda name, data: of_measurements(name, data) and "figures" in data,
        ),
        (lambda path, data: _report(path, data, "parity", facts.manifest), facts.parity, of_measurements),
        (
            lambda path, data: _comparison(data, facts.manifest),
            facts.comparison,
            lambda name, _: name.startswith("comparison"),
        ),
        (
            lambda path, data: latencies(path.name, data),
            facts.latency,
            lambda name, _: any(word in name for word in ("latency", "speed", "bench")),
        ),
    ]


def _take(path: Path, read: Callable[[], Any], found: list[Any], remarks: list[str]) -> None:
    try:
        result = read()
    except (ReportError, EvidenceError) as error:
        remarks.append(f"{path.name} is left out: {error}")
        return
    found.extend(result if isinstance(result, list) else [result])


def _reports(folder: Path, remarks: list[str]) -> Iterable[tuple[Path, Any]]:
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            if path.is_symlink() or path.stat().st_size > MAX_BYTES:
                raise ValueError("a link, or too large")
            yield path, json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            remarks.append(f"{path.name} is left out: {error}")


def _evidence(data: Any, facts: Facts) -> Evidence:
    found = evidence_from_dict(data)
    if found.manifest != facts.manifest_sha256:
        raise EvidenceError("it is of another export of this bundle; make it again with --run")
    return found


def _report(path: Path, data: Mapping[str, Any], kind: str, manifest: Manifest) -> Report:
    if data.get("name") != manifest.name:
        raise ReportError(f"it is of another bundle, {data.get('name')!r}")
    stated = {info.file: info.sha256 for info in manifest.files()}
    hashes = data.get("hashes")
    for name, digest in hashes.items() if isinstance(hashes, dict) else ():
        if stated.get(name, digest) != digest:
            raise ReportError(f"it was made with another {name}; make it again")
    compared = data.get("compared")
    versions = data.get("versions")
    return Report(
        file=path.name,
        kind=kind,
        precision=str(data.get("precision", "")),
        backend=str(data.get("backend", "")),
        images=_whole(data.get("images")),
        seed=_whole(data.get("seed", 0)),
        versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        measurements=tuple(_each(data["measurements"], _measured)),
        figures=tuple(_each(data.get("figures") or [], _quality)),
        features=str(data.get("features", "")),
        compared_with=str(compared.get("spec", "")) if isinstance(compared, dict) else "",
        paired=data.get("paired", True) is True,
    )


def _comparison(data: Any, manifest: Manifest) -> list[Drawn]:
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


def _measured(data: Mapping[str, Any]) -> Measured:
    limit = None if data.get("limit") is None else _number(data["limit"])
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


def _missing(facts: Facts, shown: str) -> list[Missing]:
    found, manifest = [], facts.manifest
    files = ""
    if manifest.weights.kind == "checkpoint":
        files = "".join(
            f" {'--checkpoint' if one.role == 'student' else '--vae'} {one.file}"
            for one in manifest.weights.files
        )
    if not facts.parity:
        found.append(Missing("parity with PyTorch", f"python -m validate parity {shown}{files}"))
    if not facts.fid:
        found.append(Missing("image quality", f"python -m validate fid {shown}{files}"))
    if not facts.evidence:
        found.append(
            Missing("samples, worst cases and margins", f"python -m validate report {shown} --run{files}")
        )
    if not facts.latency:
        found.append(Missing("latency", f"python -m validate report {shown} --run{files}"))
    return found
