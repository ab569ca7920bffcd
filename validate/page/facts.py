"""What is known of a bundle: its manifest, and the reports that lie in BUNDLE/parity.

A report that is missing is a fact too, with the command that makes it; one that cannot be read, or was made
from another manifest, becomes a remark. Nothing here trusts a report: what is shown as a number was read as
one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ddexport.runtime.bundle import FILE_NAME, TEACHER, Manifest, read_manifest, sha256_of
from ddexport.validate.page.evidence import Evidence, EvidenceError, evidence_from_dict
from ddexport.validate.page.latency import Latency, latencies
from ddexport.validate.page.reports import Drawn, Measured, Report, ReportError, read_comparison, read_report

FOLDER = "parity"
FILE_OPTIONS = {"student": "--checkpoint", "tokenizer": "--vae", TEACHER: "--teacher"}
MAX_BYTES = 64 << 20
WHAT = {
    "parity": "parity with PyTorch",
    "fid": "image quality",
    "evidence": "samples, worst cases and margins",
    "latency": "latency",
}
OF_MODELS = (
    "comparison",
    "latency",
)  # shown for information: `validate speed` and `comparison` name no bundle


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
        return [measurement for report in (*self.parity, *self.fid) for measurement in report.failures]


def collect(bundle: Path, shown: str | None = None) -> Facts:
    """Reads a bundle and its reports. Raises BundleError, also where a file has not the stated SHA-256.

    shown: how the bundle is named in commands; its path by default.
    """
    from ddexport.runtime.bundle import resolve
    from ddexport.runtime.labels import read_labels

    manifest = read_manifest(bundle, verify=True)
    labels = read_labels(resolve(bundle, manifest.labels.file), manifest.classes)
    facts = Facts(bundle, manifest, sha256_of(bundle / FILE_NAME), tuple(labels.names))
    commands = _commands(manifest, shown or str(bundle))
    for path, data in _reports(bundle / FOLDER, facts.remarks):
        for kind, reports, reads, wanted in _readers(facts):
            if wanted(path.name, data):
                if _stale(data, kind, facts):
                    again = commands[kind] + _other_precision(data, manifest)
                    facts.remarks.append(
                        f"{path.name} is left out: it is not of this {FILE_NAME}; make it again: {again}"
                    )
                else:
                    _take(path, partial(reads, path, data), reports, facts.remarks)
                break
    # A later run may have been written beside an earlier one: `parity.json` comes after `parity-fp32.json`.
    facts.parity = list({report.precision: report for report in facts.parity}.values())
    order = {precision: place for place, precision in enumerate(manifest.precisions)}
    for reports in (facts.parity, facts.fid, facts.evidence, facts.latency):
        reports.sort(key=lambda report: order.get(report.precision, len(order)))
    for report in (*facts.parity, *facts.fid):
        if report.no_verdict:
            facts.remarks.append(f"{report.file} has no verdict: {report.no_verdict}")
    facts.missing = [
        Missing(WHAT[kind], command)
        for kind, command in commands.items()
        if kind in WHAT and not getattr(facts, kind)
    ]
    return facts


def _readers(
    facts: Facts,
) -> list[tuple[str, list[Any], Callable[[Path, Any], Any], Callable[[str, Any], bool]]]:
    """A kind of report: its name, where the results go, what reads a file, and which files are of it."""

    def of_measurements(name: str, data: Any) -> bool:
        return isinstance(data, dict) and "measurements" in data

    return [
        (
            "evidence",
            facts.evidence,
            lambda path, data: evidence_from_dict(data),
            lambda name, _: name.startswith("evidence"),
        ),
        (
            "fid",
            facts.fid,
            lambda path, data: read_report(path, data, "fid", facts.manifest),
            lambda name, data: of_measurements(name, data) and "figures" in data,
        ),
        (
            "parity",
            facts.parity,
            lambda path, data: read_report(path, data, "parity", facts.manifest),
            of_measurements,
        ),
        (
            "comparison",
            facts.comparison,
            lambda path, data: read_comparison(data, facts.manifest),
            lambda name, _: name.startswith("comparison"),
        ),
        (
            "latency",
            facts.latency,
            lambda path, data: latencies(path.name, data),
            lambda name, _: any(word in name for word in ("latency", "speed", "bench")),
        ),
    ]


def _take(path: Path, read: Callable[[], Any], reports: list[Any], remarks: list[str]) -> None:
    try:
        result = read()
    except (ReportError, EvidenceError) as error:
        remarks.append(f"{path.name} is left out: {error}")
        return
    reports.extend(result if isinstance(result, list) else [result])


def _reports(folder: Path, remarks: list[str]) -> Iterable[tuple[Path, Any]]:
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            if path.is_symlink() or path.stat().st_size > MAX_BYTES:
                raise ValueError("a link, or too large")
            yield path, json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            remarks.append(f"{path.name} is left out: {error}")


def _stale(data: Any, kind: str, facts: Facts) -> bool:
    """Whether a report is of another manifest than the one that lies there, or does not say of which."""
    stated = data.get("manifest") if isinstance(data, dict) else None
    return stated != facts.manifest_sha256 and (stated is not None or kind not in OF_MODELS)


def _other_precision(data: Any, manifest: Manifest) -> str:
    precision = data.get("precision") if isinstance(data, dict) else None
    return f" --precision {precision}" if precision in manifest.precisions[1:] else ""


def _commands(manifest: Manifest, shown: str) -> dict[str, str]:
    """What makes the reports of a kind."""
    checkpoints = manifest.weights.files if manifest.weights.kind == "checkpoint" else ()
    options = {source.role: f" {FILE_OPTIONS[source.role]} {source.file}" for source in checkpoints}
    files = "".join(options.values())
    pairs = "".join(option for role, option in options.items() if role != TEACHER)
    again = f"ddexport validate report {shown} --run{files}"
    return {
        "parity": f"ddexport validate parity {shown}{files}",
        "fid": f"ddexport validate fid {shown}{pairs}",
        "evidence": again,
        "latency": again,
        "comparison": f"ddexport validate comparison {manifest.name} --json",
    }
