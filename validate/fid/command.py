"""`validate fid`: does a bundle draw images as good as the PyTorch model's? See docs/validation.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ddexport.runtime import console
from ddexport.runtime.bundle import FULL
from ddexport.runtime.errors import DDError
from ddexport.runtime.options import PATH, POSITIVE, comma_list, number, option
from ddexport.validate.options import (
    conclude,
    report_directory,
    require_validate_extra,
    shared,
)

if TYPE_CHECKING:
    from ddexport.validate.report import Report

EPILOG = """
\b
Examples:
  ddexport validate fid digits-var
  ddexport validate fid digits-var --images 500 --steps 2 --no-reference-model --report fid-500 --json
  ddexport validate fid digits-var --decoder small --steps 1,2 --seed 1
  ddexport validate fid digits-var --images-from digits-50k
  ddexport validate fid var-d16
  ddexport validate fid build/var-d16 --checkpoint var-d16.pth --vae vae_ch160v4096z32.pth \\
      --features-weights pt_inception-2015-12-05-6726825d.pth --reference statistic.pth
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
    text_encoder: Path | None = None
    small_decoder: Path | None = None
    decoder: str = FULL
    weights: str | None = None
    allow_few: bool = False
    bootstrap: int | None = None
    save_images: Path | None = None
    images_from: Path | None = None
    given: frozenset[str] = frozenset()  # the options that are not defaults
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
@shared("bundle")
@shared("images", show_default="the recipe's")
@option("--per-class", type=POSITIVE, metavar="N",
        help="Number of images per class, in place of --images with random classes.")  # fmt: skip
@option("--steps", metavar="N,...", callback=comma_list(number), show_default="all without the teacher",
        help="Schedules to measure, by number of steps, separated by commas.")  # fmt: skip
@shared("seed", help="Seed of the random noise and labels.")
@option("--features", metavar="NAME", show_default="the recipe's",
        help="Network that computes the features of the images: digits or inception.")  # fmt: skip
@option("--features-weights", metavar="FILE|random:SEED",
        show_default="those that ship with ddexport; of inception those of pytorch-fid, downloaded",
        help="Weights of that network. random:SEED: random weights, to try the command.")  # fmt: skip
@option("--reference", metavar="FILE|DIR|data|none", show_default="the recipe's",
        help="Reference set for FID: a file of statistics, a directory of images, data for the data set of"
        " the model, or none.")  # fmt: skip
@option("--reference-model/--no-reference-model", default=True,
        help="Also generate the images with PyTorch, and compare. Without, no limit is checked.")  # fmt: skip
@shared("batch", default=None, type=POSITIVE, show_default="chosen by the image size",
        help="Number of images per batch.")  # fmt: skip
@shared("decoder", "precision", "backend", "emulate", "threads", "torch-device", "checkpoint", "vae",
        "text-encoder", "small-decoder", "weights")  # fmt: skip
@option("--allow-few", is_flag=True,
        help="Allow fewer images than the features need. The figures mean nothing then.")  # fmt: skip
@option("--bootstrap", type=click.IntRange(min=0), metavar="N", show_default="200; 40 for inception",
        help="Number of bootstrap resamples for the confidence intervals. 0: no intervals.")  # fmt: skip
@option("--images-from", type=PATH, metavar="DIR",
        help="Measure the images in this directory, which `ddexport sample --shards` wrote, with its seed and"
        " steps.")  # fmt: skip
@option("--save-images", type=PATH, metavar="DIR", help="Also write every image to this directory, as PNG.")
@option("--state", type=PATH, metavar="DIR", show_default="beside the report",
        help="Directory of the state of an interrupted run.")  # fmt: skip
@shared("report", "json")
@console.debug_option
@click.pass_context
def command(ctx: click.Context, /, report: Path | None, as_json: bool, **options: Any) -> None:
    """Measure FID, Inception Score, precision and recall of BUNDLE.

    The images of the PyTorch model are measured too, from the same labels and noise. With --decoder small the
    PyTorch model has its full decoder, and the limits are those of the small decoder. Exit code 3 if the two
    differ by more than a limit in the manifest, 1 if the limits do not apply, for example with too few
    images. To continue an interrupted run, repeat the same command.
    """
    from ddexport.validate import plots
    from ddexport.validate.page import write_page
    from ddexport.validate.report import write

    if options["images"] and options["per_class"]:
        raise click.UsageError("--images and --per-class cannot be used together: give one of them.")
    require_validate_extra()
    given = (name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE)
    request = Options(**options, given=frozenset(given))
    directory = report_directory(request.bundle, report)
    result = run_fid(request, directory / STATES if directory else None)
    if directory is not None:
        result = write(result, directory, plots.of_fid(result))
        if report is None:
            write_page(request.bundle)
    hint = "docs/validation.md explains the limits, and when they apply"
    conclude(result, directory, as_json, hint)
    if result.no_verdict and request.reference_model:
        raise DDError(result.verdict, hint)
