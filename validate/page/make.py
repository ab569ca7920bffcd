"""`validate report --run`: makes the reports that a page lacks, of modest size, each where the command of its
own writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddexport.runtime import console
from ddexport.runtime.bundle import FILE_NAME, sha256_of
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write, make_directory
from ddexport.validate.page.evidence import Evidence, Sample, closeness, samples_of, worst_cases
from ddexport.validate.page.facts import FOLDER, Facts
from ddexport.validate.page.latency import measure

if TYPE_CHECKING:
    from ddexport.runtime.pipeline import Pipeline
    from ddexport.validate.metrics._base import Comparison
    from ddexport.validate.report import ParityReport

AT_ONCE = 5000  # images of the recipe's that are measured as they are: a minute or two for an embedded model
FID_IMAGES, SAMPLES = 500, 10  # in place of more, which may well not do for a verdict


@dataclass(frozen=True)
class Making:
    """What `--run` makes, and with what; see `--help`."""

    bundle: Path
    images: int | None = None
    seed: int = 0
    precision: str | None = None
    backend: str = "auto"
    threads: int | None = None
    checkpoint: Path | None = None
    vae: Path | None = None
    teacher: Path | None = None


def make_missing(facts: Facts, making: Making) -> list[str]:
    """Makes what `facts` lacks in the precision asked for. Returns what could not be made, and why.

    Raises DDError where not even parity can be measured, OutputError for a bundle that cannot be written to.
    """
    directory = making.bundle / FOLDER
    make_directory(directory)
    precision = making.precision or next(iter(facts.manifest.precisions), "")
    troubles: list[str] = []
    if not _has(facts.parity, precision) or not _has(facts.evidence, precision):
        _make_parity(making, directory)
    if not _has(facts.latency, precision):
        rows = [row.to_dict() for row in _times(making)]
        _write(directory / f"latency-{precision}.json", {"manifest": facts.manifest_sha256, "rows": rows})
    if not _has(facts.fid, precision):
        _tried("image quality", lambda: _make_fid(facts, making, directory), troubles)
    return troubles


def evidence_of(
    report: ParityReport, comparison: Comparison, bundle: Path, samples: dict[int, tuple[Sample, ...]]
) -> Evidence:
    """What the page shows of a parity run, and samples by the number of steps."""
    settings = report.settings
    return Evidence(
        manifest=sha256_of(bundle / FILE_NAME),
        precision=settings.precision,
        backend=settings.backend,
        images=settings.images,
        seed=settings.seed,
        worst=worst_cases(comparison),
        samples=samples,
        **closeness(comparison, report.limits.token_margin),
    )


def draw_samples(pipe: Pipeline, seed: int, count: int = SAMPLES) -> dict[int, tuple[Sample, ...]]:
    """Images of classes spread over all, in every schedule from the same noise."""
    classes = pipe.manifest.classes
    labels = sorted({number * classes // count for number in range(count)})
    return {
        steps: samples_of(np.asarray(pipe(labels, steps, seed=seed, output="numpy").images), labels)
        for steps in sorted(pipe.manifest.schedules)
    }


def _make_parity(making: Making, directory: Path) -> None:
    from ddexport.validate.parity import Options, run_parity
    from ddexport.validate.report import write_report

    with console.stage("parity"):
        report, comparison, _ = run_parity(
            Options(
                bundle=making.bundle,
                images=making.images,
                seed=making.seed,
                precision=making.precision,
                backend=making.backend,
                checkpoint=making.checkpoint,
                vae=making.vae,
                teacher=making.teacher,
                threads=making.threads,
            )
        )
    write_report(report, comparison, directory)  # as parity.json, which the next precision replaces
    _write(directory / f"parity-{report.settings.precision}.json", report.to_dict())
    with console.stage("samples"), _opened(making) as pipe:
        samples = draw_samples(pipe, making.seed)
    evidence = evidence_of(report, comparison, making.bundle, samples)
    _write(directory / f"evidence-{report.settings.precision}.json", evidence.to_dict())


def _make_fid(facts: Facts, making: Making, directory: Path) -> None:
    from ddexport.validate.fid_plan import Options
    from ddexport.validate.fid_report import write_report
    from ddexport.validate.fid_run import run_fid

    stated = (facts.manifest.parity.get("fid") or {}).get("images") or FID_IMAGES
    options = Options(
        bundle=making.bundle,
        images=int(stated) if int(stated) <= AT_ONCE else FID_IMAGES,
        seed=making.seed,
        precision=making.precision,
        backend=making.backend,
        threads=making.threads,
        checkpoint=making.checkpoint,
        vae=making.vae,
    )
    with console.stage("image quality"):
        result = run_fid(options, None)
    write_report(result, directory)


def _times(making: Making) -> list[Any]:
    with console.stage("latency"), _opened(making) as pipe:
        return measure(pipe)


def _opened(making: Making) -> Pipeline:
    from ddexport.runtime.pipeline import load

    return load(making.bundle, making.backend, making.threads, making.precision, verify=False)


def _has(reports: list[Any], precision: str) -> bool:
    return any(report.precision == precision for report in reports)


def _tried(what: str, work: Callable[[], None], troubles: list[str]) -> None:
    try:
        work()
    except DDError as error:
        troubles.append(f"{what} could not be measured: {error.message}. {error.hint}".strip())


def _write(path: Path, data: Any) -> None:
    with atomic_write(path) as stream:
        stream.write((json.dumps(data, allow_nan=False) + "\n").encode())
