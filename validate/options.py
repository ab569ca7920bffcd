"""What the commands that compare a bundle with PyTorch share: their options, and where their reports go."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ddexport.runtime import console
from ddexport.runtime.errors import DDError, OutputError, VerificationError

if TYPE_CHECKING:
    from ddexport.validate.report import Report

F = TypeVar("F", bound=Callable[..., Any])

PATH, POSITIVE = click.Path(path_type=Path), click.IntRange(min=1)
HALF = (
    "Round fp16 and bf16 on the CPU as a half engine does; not: the engine as it is.  [default: on the CPU]"
)
COPY = "Which state dict of the checkpoint to compare with.  [default: the bundle's own]"
SHARED: dict[str, dict[str, Any]] = {
    "images": {"type": POSITIVE, "metavar": "N", "help": "How many.  [default: the recipe's]"},
    "seed": {"type": click.IntRange(0, 2**64 - 1), "default": 0, "help": "Of the noise."},
    "batch": {"type": click.IntRange(min=2), "default": 8, "help": "The largest batch."},
    "precision": {"metavar": "NAME", "help": "Which graphs of the bundle.  [default: its first]"},
    "backend": {"metavar": "NAME", "default": "auto", "help": "The engine; auto: the best installed."},
    "emulate": {"default": None, "help": HALF},
    "checkpoint": {"type": PATH, "help": "The student's checkpoint that the bundle was made from."},
    "vae": {"type": PATH, "help": "The tokenizer's checkpoint that the bundle was made from."},
    "teacher": {"type": PATH, "help": "The teacher's checkpoint that the bundle was made from."},
    "weights": {"metavar": "NAME", "help": COPY},
    "threads": {"type": POSITIVE, "metavar": "N", "help": "Of engine and torch.  [default: their choice]"},
    "device": {"metavar": "NAME", "default": "cpu", "help": "Where PyTorch computes: cpu, cuda, cuda:1."},
    "report": {"type": PATH, "metavar": "DIR", "help": "Where to write it.  [default: BUNDLE/parity]"},
    "json": {"is_flag": True, "help": "Print the result as JSON."},
}
KINDS = {"parity": "parity", "fid": "image quality"}  # of reports
FILE_OPTIONS = {"student": "--checkpoint", "tokenizer": "--vae", "teacher": "--teacher"}  # by role
DECLARED = {"emulate": ("--emulate/--no-emulate",), "json": ("--json", "as_json")}


def shared(*names: str, **changes: Any) -> Callable[[F], F]:
    """Decorator: adds the options of these names in this order, `bundle` as the argument.

    changes: of click's settings of each of them.
    """

    def add(function: F) -> F:
        for name in reversed(names):
            if name == "bundle":
                function = click.argument(name, type=PATH)(function)
                continue
            settings = {**SHARED[name], **changes}
            settings["show_default"] = settings.get("default") is not None
            function = click.option(*DECLARED.get(name, (f"--{name}",)), **settings)(function)
        return function

    return add


def comma_list(read: Callable[[str], Any], single: bool = False) -> Callable[..., Any]:
    """A callback for words between commas: a tuple of each once, or with `single` one or None.

    read: a word as what it means; its ValueError says what there is.
    """

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        words = [] if value is None else [word.strip() for word in value.split(",")]
        try:
            values = tuple(dict.fromkeys(read(word) for word in words))
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: {error}.", ctx, param) from error
        if single and len(values) > 1:
            raise click.BadParameter(f"it takes one, not {value!r}.", ctx, param)
        return (values[0] if values else None) if single else values

    return callback


def number(word: str, least: int = 1) -> int:
    """A word of a `comma_list` as a number."""
    if not word.isdecimal() or int(word) < least:
        raise ValueError(f"it is not a list of whole numbers from {least} on, like 1,2")
    return int(word)


def require_validate_extra() -> None:
    """Raises DDError where the PyTorch side is not installed."""
    missing = [name for name in ("torch", "safetensors", "yaml") if find_spec(name) is None]
    if missing:
        raise DDError(f"the PyTorch reference needs {', '.join(missing)}", 'pip install "ddexport[validate]"')


def report_directory(bundle: Path, named: Path | None) -> Path | None:
    """Where the report goes, made before the work. None, with a warning, where the bundle is read-only.

    Raises OutputError for a named directory that cannot be made.
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
        click.echo(f"warning: {error.message}: no report; name a place with --report", err=True)
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
