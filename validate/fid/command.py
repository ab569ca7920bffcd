"""`validate fid`: does a bundle draw images as good as the PyTorch model's? See docs/image-quality.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.errors import DDError
from ddexport.validate.options import (
    PATH,
    POSITIVE,
    comma_list,
    conclude,
    number,
    report_directory,
    require_validate_extra,
    shared,
)

if TYPE_CHECKING:
    from ddexport.validate.report import Report

EPILOG = """
\b
Examples:
  ddexport validate fid build/digits-var
  ddexport validate fid build/var-d16 --checkpoint var-d16.pth --vae vae_ch160v4096z32.pth \\
      --features-weights pt_inception-2015-12-05.pth --reference statistic.pth
  ddexport validate fid build/digits-var --images 500 --steps 2 --no-reference-model --json
"""
STATES = "fid-state"


@dataclass(frozen=True)
class Options:
    """What the command line asks for; see `--help`."""

    bundle: Path
    images: int | None = None
    per_class: int | None = None
    steps: tuple[int, ...] = ()
    seed: int = 0
    features: str | None = None
    features_weights: str | None = None
    reference: str | None = None
    reference_model: bool = True
    batch: int | None = None
    precision: str | None = None
    backend: str = "auto"
    emulate: bool | None = None
    threads: int | None = None
    device: str = "cpu"
    checkpoint: Path | None = None
    vae: Path | None = None
    weights: str | None = None
    allow_few: bool = False
    bootstrap: int | None = None
    save_images: Path | None = None
    state: Path | None = None


def run_fid(options: Options, state: Path | None = None) -> Report:
    """Draws, measures and compares; goes on where a stopped run of the same settings was.

    state: the directory of the states of all runs, in which each has its own, unless `options.state` names
    one; None: the features are kept in a temporary directory. Raises DDError for everything that can be wrong
    with bundle, options, files and places.
    """
    from ddexport.validate.fid.run import run  # with torch and NumPy, which `--help` need not wait for

    return run(options, state)


@click.command("fid", cls=console.Command, epilog=EPILOG)
@shared("bundle", "images")
@click.option(
    "--per-class", type=POSITIVE, metavar="N", help="Images of each class.  [default: labels at random]"
)
@click.option("--steps", metavar="1,2", callback=comma_list(number), help="Which schedules.  [default: all]")
@shared("seed", help="Of noise and labels.")
@click.option("--features", metavar="NAME", help="The extractor: digits, inception.  [default: the recipe's]")
@click.option("--features-weights", metavar="FILE|random:SEED", help="Its weights, where none ship with it.")
@click.option(
    "--reference",
    metavar="FILE|DIR|data|none",
    help="What to measure against: statistics, images, the model's data.  [default: the recipe's]",
)
@click.option(
    "--reference-model/--no-reference-model",
    default=True,
    help="Measure PyTorch's images beside the bundle's; alone there is no verdict.",
)
@shared("batch", default=None, type=POSITIVE, help="Images at once.  [default: by their size]")
@shared("precision", "backend", "emulate", "threads", "device", "checkpoint", "vae", "weights")
@click.option("--allow-few", is_flag=True, help="Fewer images than the features need, for trials.")
@click.option(
    "--bootstrap",
    type=click.IntRange(min=0),
    metavar="N",
    help="Resamples for the intervals, 0 for none.  [default: 200, 40 for wide features]",
)
@click.option("--save-images", type=PATH, metavar="DIR", help="Also write every image as a PNG.")
@click.option("--state", type=PATH, metavar="DIR", help="Of a stopped run.  [default: beside the report]")
@shared("report", "json")
@console.debug_option
def command(report: Path | None, as_json: bool, **options: Any) -> None:
    """Measure the images of BUNDLE (FID, Inception Score, precision, recall), paired with PyTorch's.

    Both draw from the same labels and noise; how far they may be apart is in the manifest. Exit code 3 if a
    limit is passed, 1 if there is no verdict. A run that was stopped goes on where it was.
    """
    from ddexport.validate import plots
    from ddexport.validate.page import write_page
    from ddexport.validate.report import write

    if options["images"] and options["per_class"]:
        raise click.UsageError("--per-class says how many images: give one of --images and --per-class.")
    require_validate_extra()
    request = Options(**options)
    directory = report_directory(request.bundle, report)
    result = run_fid(request, directory / STATES if directory else None)
    if directory is not None:
        result = write(result, directory, plots.of_fid(result))
        if report is None:
            write_page(request.bundle)
    hint = "docs/image-quality.md says what the limits hold, and when there is a verdict"
    conclude(result, directory, as_json, hint)
    if result.no_verdict and request.reference_model:
        raise DDError(result.verdict, hint)
