"""`ddexport bench`: how fast a bundle is in every engine, beside whether what was timed is right."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.errors import BackendError, DDError, VerificationError

if TYPE_CHECKING:
    from ddexport.validate.bench.plan import Request
    from ddexport.validate.bench.roofline import Peaks
    from ddexport.validate.bench.rows import Row

TEACHER = "teacher"
EPILOG = """
\b
Examples:
  ddexport bench build/digits-var --save
  ddexport bench build/digits-var --backend openvino,torch,published --against published
  ddexport bench build/var-d16 --steps 1,2,teacher --against torch --against-steps teacher
  ddexport bench build/digits-var build/digits-llamagen --batch 1,8 --plot bench.png --json
"""
_PATH = click.Path(path_type=Path)


def comma_list(read: Callable[[str], Any], single: bool = False) -> Callable[..., Any]:
    """A callback for words between commas: a tuple of each once, or with `single` one or None.

    read: a word as what it means; its ValueError says what there is.
    """

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        words = [word.strip() for word in (value or "").split(",") if word.strip()]
        try:
            values = tuple(dict.fromkeys([read(word) for word in words or [""] * (value is not None)]))
        except ValueError as error:
            raise click.BadParameter(f"{value!r}: {error}.", ctx, param) from error
        if single and len(values) > 1:
            raise click.BadParameter(f"it takes one, not {value!r}.", ctx, param)
        return (values[0] if values else None) if single else values

    return callback


def _number(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise ValueError("it must be a list of numbers above 0, like 1,4,8")
    return int(word)


def _steps(word: str) -> int | str:
    if word != TEACHER and (not word.isdecimal() or int(word) < 1):
        raise ValueError(f"there is: numbers above 0 that the bundle has schedules for, and {TEACHER}")
    return word if word == TEACHER else int(word)


def _percentile(word: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?", word) or float(word) > 100:
        raise ValueError("it must be a list of percentiles, like 50,90,99")
    return float(word)


def _backend(word: str) -> str:
    from ddexport.validate.bench.plan import backend_names

    return _known(word, backend_names())


def _precision(word: str) -> str:
    from ddexport.validate.bench.plan import PRECISIONS

    return _known(word, PRECISIONS)


def _known(word: str, names: Sequence[str]) -> str:
    if word not in names:
        raise ValueError(f"there is: {', '.join(names)}")
    return word


def block_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    """A callback for a name that can stand in a comment of Markdown."""
    if value is not None and not re.fullmatch(r"[a-z0-9][a-z0-9-]*", value):
        raise click.BadParameter(f"{value!r} is no name of small letters, digits and hyphens.", ctx, param)
    return value or ""


@click.command("bench", cls=console.Command, epilog=EPILOG, context_settings={"show_default": True})
@click.argument("bundles", metavar="BUNDLE...", type=_PATH, nargs=-1, required=True)
@click.option("--backend", "backends", callback=comma_list(_backend), metavar="A,B,...",
              help="Backends of the runtime, and torch, torch-compile, published. All that are named stay in"
              " memory at once: name fewer where it is short.  [default: the runtime's]")  # fmt: skip
@click.option("--device", "--provider", "device", metavar="NAME",
              help="cpu, cuda or cuda:N.  [default: any]")  # fmt: skip
@click.option("--batch", "batches", callback=comma_list(_number), default="1", metavar="N,N,...")
@click.option("--steps", callback=comma_list(_steps), default="1", metavar="N,...,teacher",
              help="Schedules of the bundle; teacher is the whole auto-regressive model.")  # fmt: skip
@click.option("--precision", "precisions", callback=comma_list(_precision), metavar="NAME,...",
              help="fp32, fp16, bf16, int8.  [default: all that each backend can run]")  # fmt: skip
@click.option("--against", callback=comma_list(_backend, single=True), metavar="BACKEND",
              help="How many times faster than that one each row is; it is timed too if it was not"
              " named.")  # fmt: skip
@click.option("--against-steps", callback=comma_list(_steps, single=True), metavar="N|teacher",
              help="The steps of --against.  [default: those of each row]")  # fmt: skip
@click.option("--against-precision", callback=comma_list(_precision, single=True), default="fp32",
              metavar="NAME", help="The precision of --against.")  # fmt: skip
@click.option("--threads", callback=comma_list(_number), metavar="N,...",
              help="Of the CPU.  [default: all cores]")  # fmt: skip
@click.option("--processes", "--streams", "processes", callback=comma_list(_number), default="1",
              metavar="N,...", help="Copies side by side that share the threads; images a second are those"
              " of all.")  # fmt: skip
@click.option("--warmup", type=click.IntRange(0), default=1, help="Runs that are not counted.")
@click.option("--duration", type=click.FloatRange(0), default=2.0, metavar="S",
              help="Seconds of rounds for each row; five rounds at least, of a teacher's minutes"
              " one.")  # fmt: skip
@click.option("--percentile", "percentiles", callback=comma_list(_percentile), default="50,90,99",
              metavar="P,...")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0,
              help="Of noise and labels, and of the order in the rounds.")  # fmt: skip
@click.option("--checkpoint", type=_PATH, help="The student's checkpoint that the bundle was made from.")
@click.option("--vae", type=_PATH, help="The tokenizer's checkpoint that the bundle was made from.")
@click.option("--teacher", type=_PATH, help="The teacher's checkpoint that the bundle was made from.")
@click.option("--weights", type=click.Choice(["ema", "model"]), help="Which copy in --checkpoint.")
@click.option("--roofline/--no-roofline", default=True, help="Whether to measure the machine's own peak.")
@click.option("--save", is_flag=True,
              help="Keep in the bundle how fast each CPU backend is in one step and the first precision, for"
              " --backend auto.")  # fmt: skip
@click.option("--plot", type=_PATH, metavar="FILE.png", help="Plot the times.")
@click.option("--update", type=_PATH, metavar="FILE.md",
              help="Replace what is between <!-- bench --> and <!-- /bench --> in a Markdown file by the"
              " tables.")  # fmt: skip
@click.option("--block", callback=block_name, metavar="NAME",
              help="Which block of --update, of a page with several: <!-- bench NAME -->.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the rows as a JSON list.")
@console.debug_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    as_json: bool,
    plot: Path | None,
    update: Path | None,
    block: str,
    checkpoint: Path | None,
    vae: Path | None,
    teacher: Path | None,
    **asked: Any,
) -> None:
    """Time BUNDLE in every engine, round after round in turn, and hold what was timed against PyTorch.

    What cannot run here is listed with its reason. Exit code 3 if the outputs of a row miss the bundle's
    limits: a fast wrong row is marked as wrong. docs/benchmark.md explains the columns.
    """
    from ddexport.runtime.files import check_writable
    from ddexport.validate.bench import report
    from ddexport.validate.bench.plan import Request
    from ddexport.validate.bench.table import remarks

    if asked["against"] is None and asked["against_steps"] is not None:
        raise click.UsageError("--against-steps says which steps of --against: give both.")
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise click.BadParameter(f"{plot} does not end in .png.", ctx, param_hint="--plot")
        check_writable(plot)
    if update is not None:
        report.check_page(update, block)
    request = Request(files={"student": checkpoint, "tokenizer": vae, "teacher": teacher}, **asked)
    rows, peaks, skipped = _measure(request)
    machine, stamp = report.environment()
    if as_json:
        console.emit_json([row.to_dict() for row in rows])
    else:
        report.show(rows, peaks, machine, request.percentiles)
    if plot is not None and any(row.timed for row in rows):
        from ddexport.validate.bench.plot import write_plot

        write_plot(rows, machine, plot)
        click.echo(f"plot: {plot}", err=True)
    if update is not None:
        picture = report.address(plot, update) if plot is not None and plot.exists() else None
        parts = (command_line(ctx), stamp, request.percentiles, skipped, picture)
        text = report.block(rows, peaks, *parts)
        report.update(update, text, block)
        click.echo(f"updated: {update}", err=True)
    for remark in remarks(rows):
        click.echo(remark, err=True)
    for root in request.bundles if request.save else ():
        click.echo(_save(root, [row for row in rows if row.bundle == str(root)]), err=True)
    _end(rows)


def command_line(ctx: click.Context) -> str:
    """The command as it was given, from what click has read of it."""
    words = ["ddexport", "bench"]
    for param in ctx.command.params:
        name = param.name or ""
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if isinstance(value, bool):
            words.append((param.opts if value or not param.secondary_opts else param.secondary_opts)[0])
            continue
        values = value if isinstance(value, tuple) else (value,)
        texts = [f"{item:g}" if isinstance(item, float) else str(item) for item in values]
        words += texts if isinstance(param, click.Argument) else [param.opts[0], ",".join(texts)]
    return shlex.join(words)


def _measure(request: Request) -> tuple[list[Row], Peaks, list[str]]:
    """The rows of all bundles, the machine's peaks, and what was skipped. Raises DDError."""
    from ddexport.runtime.backends._saved import FILE
    from ddexport.runtime.bundle import read_manifest
    from ddexport.runtime.files import check_writable
    from ddexport.validate.bench.plan import make_plan
    from ddexport.validate.bench.run import measure_peaks, run_bench

    plans = []
    for root in request.bundles:
        with console.stage(f"loading {root}", keep=False):
            manifest = read_manifest(root)
        if request.save:
            check_writable(root / FILE)
        plans.append((root, manifest, make_plan(root, manifest, request)))
    skipped = [f"{manifest.name}: {text}" for _, manifest, plan in plans for text in plan.skipped]
    for text in skipped:
        click.echo(f"skipped: {text}", err=True)
    runners = [entry.runner for _, _, plan in plans for entry in plan.entries]
    if not runners:
        what = f"nothing that was asked for can be timed here: {'; '.join(skipped)}"
        raise BackendError(what, "ddexport doctor says what is installed.")
    peaks = measure_peaks(runners) if request.roofline else {}
    rows: list[Row] = []
    for root, manifest, plan in plans:
        if plan.entries:
            rows += run_bench(root, manifest, plan, request, peaks)
    return rows, peaks, skipped


def _save(root: Path, rows: Sequence[Row]) -> str:
    """Keeps the times that `--backend auto` goes by in the bundle; for people, what became of it."""
    from ddexport.runtime.backends import choose
    from ddexport.runtime.backends._saved import save
    from ddexport.runtime.bundle import read_manifest
    from ddexport.validate.bench.rows import times_to_save

    manifest = read_manifest(root, verify=False)
    times, precision = times_to_save(rows, manifest.precisions[0]), manifest.precisions[0]
    if not times:
        return f"nothing to save in {root}: no CPU backend was timed and right in {precision} and one step"
    texts = [f"{name} {milliseconds:.3g} ms" for name, milliseconds in times.items()]
    path = save(root, manifest, times)
    return f"saved in {path}: {', '.join(texts)} an image; auto takes {choose(root, manifest)}"


def _end(rows: Sequence[Row]) -> None:
    """Raises VerificationError for a wrong row, else DDError for one that failed."""
    wrong = [row for row in rows if row.passed is False]
    failed = [row for row in rows if row.error is not None]
    if wrong:
        raise VerificationError(
            f"{len(wrong)} of {len(rows)} rows miss the bundle's limits: {'; '.join(map(str, wrong))}",
            "ddexport validate parity BUNDLE says where.",
        )
    if failed:
        raise DDError(f"{len(failed)} of {len(rows)} rows could not be timed: {'; '.join(map(str, failed))}")
