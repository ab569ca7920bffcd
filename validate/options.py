"""What the commands that compare a bundle with PyTorch share: their options, and where their reports go."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console, options
from ddexport.runtime.errors import DDError, OutputError, VerificationError
from ddexport.runtime.options import PATH, POSITIVE

if TYPE_CHECKING:
    from ddexport.validate.report import Report

MADE_FROM = "Needed if the bundle was exported from such a file."
# fmt: off
OPTIONS: dict[str, dict[str, Any]] = {
    **options.OPTIONS,
    "images": {"type": POSITIVE, "metavar": "N", "show_default": "the recipe's, or 8",
               "help": "Number of images."},
    "batch": {"type": click.IntRange(min=2), "metavar": "N", "default": 8,
              "help": "Largest number of images per batch."},
    "emulate": {"names": ("--emulate/--no-emulate",), "default": None, "show_default": "--emulate on the CPU",
                "help": "Emulate fp16 and bf16: round the result of every operator, as engines for half"
                " precision do. --no-emulate runs the graphs in the engine itself."},
    "checkpoint": {"type": PATH, "metavar": "PATH", "help": f"Weights of the student. {MADE_FROM}"},
    "vae": {"type": PATH, "metavar": "PATH", "help": f"Weights of the tokenizer. {MADE_FROM}"},
    "teacher": {"type": PATH, "metavar": "PATH", "help": f"Weights of the teacher. {MADE_FROM}"},
    "text-encoder": {"type": PATH, "metavar": "DIR", "help": f"Directory of the text encoder. {MADE_FROM}"},
    "small-decoder": {"type": PATH, "metavar": "PATH", "help": f"Weights of the small decoder. {MADE_FROM}"},
    "weights": {"metavar": "NAME", "show_default": "the one that was exported",
                "help": "State dict to load from a checkpoint that has several."},
    "torch-device": {"names": ("--device",), "metavar": "NAME", "default": "cpu",
                     "help": "Device of the PyTorch model: cpu, cuda or cuda:N."},
    "report": {"type": PATH, "metavar": "DIR", "show_default": "BUNDLE/parity",
               "help": "Directory to write the report to."},
}
# fmt: on
KINDS = {"parity": "parity", "fid": "image quality"}  # of reports
shared = partial(options.shared, options=OPTIONS)


def require_validate_extra() -> None:
    """Raises DDError where the PyTorch side is not installed."""
    missing = [name for name in ("torch", "safetensors", "yaml") if find_spec(name) is None]
    if missing:
        raise DDError(f"the PyTorch reference needs {', '.join(missing)}", 'pip install "ddexport[validate]"')


def report_directory(bundle: Path, named: Path | None) -> Path | None:
    """Where the report goes, made before the work. None, with a warning, where the bundle is read-only.

    Raises OutputError for a named directory that cannot be made.
    """
    from ddexport.runtime.bundle import FILE_NAME
    from ddexport.runtime.files import make_directory

    if named is None and not (bundle / FILE_NAME).is_file():
        return None  # which loading the bundle will explain
    directory = named or bundle / "parity"
    try:
        make_directory(directory)
    except OutputError as error:
        if named is not None:
            raise
        click.echo(
            f"warning: {error.message}, so no report is written; choose a directory with --report", err=True
        )
        return None
    return directory


def conclude(report: Report, directory: Path | None, as_json: bool, hint: str) -> None:
    """Prints a report. Raises VerificationError where a limit is passed."""
    from ddexport.validate.report import table

    if directory is not None:
        click.echo(f"report: {directory}", err=True)
    if as_json:
        console.emit_json(report.to_dict())
    else:
        click.echo(table(report))
    if report.no_verdict:
        return
    for measurement in report.failures:
        click.echo(f"failed: {measurement}", err=True)
    if report.failures:
        raise VerificationError(report.verdict, hint)
