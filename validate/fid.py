"""`validate fid`: does a bundle draw images as good as the PyTorch model's? See docs/image-quality.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.errors import DDError, OutputError, VerificationError

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
    from ddexport.validate.fid_run import run  # with torch and NumPy, which `--help` need not wait for

    return run(options, state)


def _steps(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """`1,2` -> (1, 2), each once and ascending; () for all that the bundle has."""
    try:
        numbers = [int(part) for part in value.split(",")] if value else []
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers like 1,2") from error
    return tuple(sorted(set(numbers)))


def _require_validate_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "safetensors", "yaml") if find_spec(name) is None]
    if missing:
        raise DDError(f"measuring images needs {', '.join(missing)}", 'pip install "ddexport[validate]"')


def _report_directory(bundle: Path, named: Path | None) -> Path | None:
    """Where report and state go, checked before the work. None, with a warning, where the bundle is
    read-only.
    """
    from ddexport.runtime.files import make_directory

    if named is None and not bundle.is_dir():
        return None  # which loading the bundle will explain
    directory = named or bundle / "parity"
    try:
        make_directory(directory)
    except OutputError as error:
        if named is not None:
            raise
        click.echo(
            f"warning: {error.message}: no report, and a stopped run starts again;"
            " name places with --report and --state",
            err=True,
        )
        return None
    return directory


_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)


@click.command("fid", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=_PATH)
@click.option("--images", type=_POSITIVE, metavar="N", help="How many.  [default: the recipe's]")
@click.option(
    "--per-class", type=_POSITIVE, metavar="N", help="Images of each class.  [default: labels at random]"
)
@click.option("--steps", metavar="1,2", callback=_steps, help="Which schedules.  [default: all]")
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of noise and labels."
)
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
@click.option("--batch", type=_POSITIVE, metavar="N", help="Images at once.  [default: by their size]")
@click.option("--precision", metavar="NAME", help="Which graphs of the bundle.  [default: its first]")
@click.option("--backend", metavar="NAME", default="auto", help="The engine.  [default: the best installed]")
@click.option(
    "--emulate/--no-emulate",
    default=None,
    help="Half precisions with every rounding of a half engine.  [default: emulate on the CPU alone]",
)
@click.option("--threads", type=_POSITIVE, metavar="N", help="Of engine and torch.  [default: their choice]")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Where PyTorch runs: cpu, cuda, cuda:1.",
)
@click.option("--checkpoint", type=_PATH, help="The student's checkpoint that the bundle was made from.")
@click.option("--vae", type=_PATH, help="The tokenizer's checkpoint that the bundle was made from.")
@click.option(
    "--weights",
    type=click.Choice(["ema", "model"]),
    help="Which copy of the student's weights to compare with.  [default: the bundle's own]",
)
@click.option("--allow-few", is_flag=True, help="Fewer images than the features need, for trials.")
@click.option(
    "--bootstrap",
    type=click.IntRange(min=0),
    metavar="N",
    help="Resamples for the intervals, 0 for none.  [default: 200, 40 for wide features]",
)
@click.option("--save-images", type=_PATH, metavar="DIR", help="Also write every image as a PNG.")
@click.option(
    "--state",
    type=_PATH,
    metavar="DIR",
    help="Where a stopped run goes on from.  [default: beside the report]",
)
@click.option("--report", type=_PATH, metavar="DIR", help="Where to write it.  [default: BUNDLE/parity]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@console.debug_option
def command(report: Path | None, as_json: bool, **options: Any) -> None:
    """Measure the images of BUNDLE (FID, Inception Score, precision, recall), paired with PyTorch's.

    Both draw from the same labels and noise; how far they may be apart is in the manifest. Exit code 3 if a
    limit is passed, 1 if there is no verdict. A run that was stopped goes on where it was.
    """
    from ddexport.validate.report import table, write

    if options["images"] and options["per_class"]:
        raise click.UsageError("--per-class says how many images: give one of --images and --per-class.")
    _require_validate_extra()
    request = Options(**options)
    directory = _report_directory(request.bundle, report)
    result = run_fid(request, directory / STATES if directory else None)
    if directory is not None:
        result = write(result, directory)
        click.echo(f"report: {directory}", err=True)
    if as_json:
        console.emit_json(result.to_dict())
    else:
        click.echo(table(result))
    hint = "docs/image-quality.md says what the limits hold, and when there is a verdict"
    if result.no_verdict:
        if request.reference_model:
            raise DDError(result.verdict, hint)
        return
    for measurement in result.failures:
        click.echo(f"failed: {measurement}", err=True)
    if result.failures:
        raise VerificationError(result.verdict, hint)
