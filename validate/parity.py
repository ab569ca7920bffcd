"""`validate parity`: is the bundle the model it was exported from? docs/validation.md explains every row."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.validate.options import conclude, report_directory, require_validate_extra, shared

if TYPE_CHECKING:
    from ddexport.runtime.pipeline import Pipeline
    from ddexport.validate.metrics._base import Comparison
    from ddexport.validate.reference import ReferenceRun
    from ddexport.validate.report import Report

IMAGES = 8  # unless the recipe says how many

EPILOG = """
\b
Examples:
  ddexport validate parity digits-var
  ddexport validate parity digits-half --precision fp16
  ddexport validate parity digits-var --images 32 --report parity-32 --json
  ddexport validate parity digits-var --backend browser
  ddexport validate parity build/var-d16 --checkpoint var-d16.pth --vae vae_ch160v4096z32.pth
"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see `--help`."""

    bundle: Path
    images: int | None = None
    seed: int = 0
    batch: int = 8
    precision: str | None = None
    backend: str = "auto"
    checkpoint: Path | None = None
    vae: Path | None = None
    small_decoder: Path | None = None
    teacher: Path | None = None
    text_encoder: Path | None = None
    weights: str | None = None
    threads: int | None = None
    emulate: bool | None = None
    device: str = "cpu"


def run_parity(options: Options, complete: bool = True) -> tuple[Report, Comparison, list[ReferenceRun]]:
    """Runs bundle and PyTorch model and compares them. complete: the manifest must have every limit.

    Raises DDError if one of the two cannot be run.
    """
    from msgspec.structs import asdict

    from ddexport.validate.browser import BROWSER, Tab, open_tab
    from ddexport.validate.compare import compare, measure
    from ddexport.validate.contents import check_contents, open_manifest
    from ddexport.validate.limits import limits_of
    from ddexport.validate.reference import build_reference, describe_weights, request_of
    from ddexport.validate.report import SCHEMA, Report, versions
    from ddexport.validate.runners import opened
    from ddexport.validate.weights import compare_weights

    start = time.perf_counter()
    with console.stage(f"loading {options.bundle}", keep=False):
        manifest, digest = open_manifest(options.bundle)
    with console.stage("loading the PyTorch model", keep=False):
        files = {
            "student": options.checkpoint,
            "tokenizer": options.vae,
            "teacher": options.teacher,
            "decoder_small": options.small_decoder,
            "text_encoder": options.text_encoder,
        }
        reference = build_reference(
            manifest, files, options.weights, options.threads, teacher=True, device=options.device
        )
        check_contents(options.bundle, manifest, reference)
    stated = int(manifest.parity.get("images") or IMAGES)
    images = options.images or stated
    if images < stated:
        click.echo(
            f"warning: the limits are for {stated} images; with {images}, a correct bundle can exceed one",
            err=True,
        )
    request = request_of(manifest, images, options.seed, options.batch, reference.conditions)
    how = (options.precision, options.emulate, options.threads)
    opening: AbstractContextManager[Pipeline | Tab]
    if options.backend == BROWSER:
        opening = open_tab(options.bundle, *how)
    else:
        opening = opened(options.bundle, manifest, options.backend, *how)
    with opening as pipe:
        limits = limits_of(manifest, pipe.precision, complete)
        with console.progress(3 * images * len(reference.plans), f"comparing {images} images") as bar:
            runs = reference.draw(request, bar.advance)
            if isinstance(pipe, Tab):
                comparison, backend, used = pipe.compare(runs, request, bar.advance), BROWSER, pipe.versions
            else:
                comparison, backend = compare(pipe, runs, request, bar.advance), pipe.backend.name
                used = versions(backend)
        precision = pipe.precision
    weights = compare_weights(options.bundle, manifest, precision, reference)
    source = describe_weights(manifest)
    report = Report(
        schema=SCHEMA,
        kind="parity",
        name=manifest.name,
        title=f"{manifest.name}: {backend} in {precision} against PyTorch, {images} images in"
        f" {' and '.join(reference.plans)} steps, seed {options.seed} ({source})",
        manifest=digest,
        precision=precision,
        backend=backend,
        images=images,
        seed=options.seed,
        settings={
            "weights": source,
            "batch": options.batch,
            "labels": request.labels.tolist(),
            "steps": list(reference.plans),
            "limits": asdict(limits),
        },
        versions=versions() | used,
        seconds=round(time.perf_counter() - start, 2),
        rows=(*weights, *measure(comparison, limits)),
        provisional=limits.provisional,
    )
    return report, comparison, runs


@click.command("parity", cls=console.Command, epilog=EPILOG)
@shared("bundle", "images", "seed", "batch", "precision")
@shared("backend", help="Inference engine: onnxruntime, openvino or tensorrt; or browser, which is Chromium."
        " auto: the best engine that runs here.")  # fmt: skip
@shared("emulate")
@shared(
    "checkpoint", "vae", "teacher", "text-encoder", "small-decoder", "weights", "threads", "torch-device",
    "report", "json",
)  # fmt: skip
@console.debug_option
def command(report: Path | None, as_json: bool, **options: Any) -> None:
    """Compare outputs of BUNDLE with those of the PyTorch model.

    Both get the same labels and noise, in every schedule of the bundle. The tokens, logits, embeddings and
    images are compared. Exit code 3 if a difference exceeds its limit in the manifest.

    The report is written to BUNDLE/parity. If all limits are met, golden.npz is written there too: the images
    of the PyTorch model, with which `ddexport doctor BUNDLE --check` tests another machine.
    """
    from ddexport.runtime.bundle import read_manifest
    from ddexport.validate import plots
    from ddexport.validate.conditions import conditions_of, names_of
    from ddexport.validate.golden import write_golden
    from ddexport.validate.page import write_page
    from ddexport.validate.report import write

    require_validate_extra()
    request = Options(**options)
    directory = report_directory(request.bundle, report)
    result, comparison, runs = run_parity(request)
    if directory is not None:
        manifest = read_manifest(request.bundle, verify=False)
        names = names_of(request.bundle, manifest)
        result = write(result, directory, plots.of_parity(result, comparison, names))
        if result.passed:
            write_golden(directory / "golden.npz", result, runs, conditions_of(manifest))
        if report is None:
            write_page(request.bundle)
    hint = f"see {directory}" if directory else "choose a directory for report and pictures with --report"
    conclude(result, directory, as_json, hint)
