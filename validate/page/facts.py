"""What is known of a bundle: its manifest, and the reports that lie in BUNDLE/parity.

A report that is missing is a fact too, with the command that makes it; one that cannot be read, or is of
another bundle, becomes a remark. Nothing here trusts a report: what is shown as a number was read as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from runtime.manifest import FILE_NAME, TEACHER, Manifest, read_manifest, sha256_of
from validate.page.evidence import Evidence, EvidenceError, evidence_from_dict
from validate.page.latency import Latency, latencies
from validate.page.reports import Drawn, Measured, Report, ReportError, read_comparison, read_report

FOLDER = "parity"
FILE_OPTIONS = {"student": "--checkpoint", "tokenizer": "--vae", TEACHER: "--teacher"}
MAX_BYTES = 64 << 20


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
    # A later run may have been written beside an earlier one: `parity.json` comes after `parity-fp32.json`.
    facts.parity = list({one.precision: one for one in facts.parity}.values())
    order = {precision: place for place, precision in enumerate(manifest.precisions)}
    for found in (facts.parity, facts.fid, facts.evidence, facts.latency):
        found.sort(key=lambda one: order.get(one.precision, len(order)))
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
            lambda path, data: read_report(path, data, "fid", facts.manifest),
            facts.fid,
            lambda name, data: of_measurements(name, data) and "figures" in data,
        ),
        (lambda path, data: read_report(path, data, "parity", facts.manifest), facts.parity, of_measurements),
        (
            lambda path, data: read_comparison(data, facts.manifest),
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


def _missing(facts: Facts, shown: str) -> list[Missing]:
    found, manifest = [], facts.manifest
    given = manifest.weights.files if manifest.weights.kind == "checkpoint" else ()
    options = {one.role: f" {FILE_OPTIONS[one.role]} {one.file}" for one in given}
    files = "".join(options.values())
    pairs = "".join(option for role, option in options.items() if role != TEACHER)
    if not facts.parity:
        found.append(Missing("parity with PyTorch", f"python -m validate parity {shown}{files}"))
    if not facts.fid:
        found.append(Missing("image quality", f"python -m validate fid {shown}{pairs}"))
    if not facts.evidence:
        found.append(
            Missing("samples, worst cases and margins", f"python -m validate report {shown} --run{files}")
        )
    if not facts.latency:
        found.append(Missing("latency", f"python -m validate report {shown} --run{files}"))
    return found
