"""`ddexport bench`: how fast a bundle is in every engine, beside whether what was timed is right."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime import console
from runtime.errors import DDError, VerificationError

if TYPE_CHECKING:
    from runtime.machine import Machine
    from validate.bench.peak import Peak
    from validate.bench.plan import Request
    from validate.bench.rows import Environment, Row

TEACHER = "teacher"
MODES = ("latency", "throughput")
PACKAGES = ("ddexport", "numpy", "torch", "onnxruntime", "openvino")
EPILOG = """
\b
Examples:
  ddexport bench build/digits-var
  ddexport bench build/digits-var --backend openvino,torch,published --against published
  ddexport bench build/var-d16 --steps 1,2,teacher --against torch --against-steps teacher
  ddexport bench build/digits-var build/digits-llamagen --batch 1,8 --plot bench.png --json
"""


def _words(value: str) -> list[str]:
    return [word for part in value.split(",") if (word := part.strip())]


def _names(known: Callable[[], Sequence[str]], what: str) -> Callable[..., Any]:
    """A callback for a list of names; an unknown one is a usage error that lists those there are."""

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
        names = _words(value or "")
        if value is not None and not names:
            raise click.BadParameter(f"it names no {what}.", ctx, param)
        for name in names:
            if name not in (have := known()):
                raise click.BadParameter(
                    f"there is no {what} called {name!r}. There is: {', '.join(have)}.", ctx, param
                )
        return tuple(dict.fromkeys(names))

    return check


def _backends() -> Sequence[str]:
    from validate.bench.plan import backend_names

    return backend_names()


def _precisions() -> Sequence[str]:
    from validate.bench.plan import PRECISIONS

    return PRECISIONS


def _one(check: Callable[..., Any]) -> Callable[..., Any]:
    """The same for one name."""

    def checked(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        found = check(ctx, param, value)
        if len(found) > 1:
            raise click.BadParameter(f"it takes one name, not {value!r}.", ctx, param)
        return found[0] if found else None

    return checked


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    words = _words(value)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{value!r} is not a list of numbers above 0, like 1,4,8.", ctx, param)
    return tuple(dict.fromkeys(int(word) for word in words))


def _steps(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int | str, ...]:
    found: dict[int | str, None] = {}
    for word in _words(value or ""):
        found[word if word == TEACHER else _numbers(ctx, param, word)[0]] = None
    if value is not None and not found:
        raise click.BadParameter("it names no steps, like 1,2,teacher.", ctx, param)
    return tuple(found)


def _one_steps(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    found = _steps(ctx, param, value)
    if len(found) > 1:
        raise click.BadParameter(f"it takes one number of steps, or {TEACHER}, not {value!r}.", ctx, param)
    return found[0] if found else None


def _percentiles(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        found = [float(word) for word in _words(value)]
    except ValueError:
        found = []
    if not found or not all(0 <= number <= 100 for number in found):
        raise click.BadParameter(f"{value!r} is not a list of percentiles, like 50,90,99.", ctx, param)
    return tuple(dict.fromkeys(found))


_PATH = click.Path(path_type=Path)
_BACKEND = _names(_backends, "backend")
_PRECISION = _names(_precisions, "precision")


@click.command("bench", cls=console.Command, epilog=EPILOG)
@click.argument("bundles", metavar="BUNDLE...", type=_PATH, nargs=-1, required=True)
@click.option(
    "--backend",
    "backends",
    callback=_BACKEND,
    metavar="A,B,...",
    help="Backends of the runtime, and torch, torch-compile, published. All that are named stay in memory at"
    " once: name fewer where it is short.  [default: the runtime's]",
)
@click.option("--batch", "batches", callback=_numbers, default="1", show_default=True, metavar="N,N,...")
@click.option(
    "--steps",
    callback=_steps,
    default="1",
    show_default=True,
    metavar="N,...,teacher",
    help="Schedules of the bundle; teacher is the whole auto-regressive model.",
)
@click.option(
    "--precision",
    "precisions",
    callback=_PRECISION,
    metavar="NAME,...",
    help="fp32, fp16, bf16, int8.  [default: all that each backend can run]",
)
@click.option(
    "--against",
    callback=_one(_BACKEND),
    metavar="BACKEND",
    help="How many times faster than that one each row is; it is timed too if it was not named.",
)
@click.option(
    "--against-steps",
    callback=_one_steps,
    metavar="N|teacher",
    help="The steps of --against.  [default: those of each row]",
)
@click.option(
    "--against-precision",
    callback=_one(_PRECISION),
    default="fp32",
    show_default=True,
    metavar="NAME",
    help="The precision of --against.",
)
@click.option(
    "--threads", callback=_numbers, metavar="N,...", help="Of each alternative.  [default: all cores]"
)
@click.option(
    "--mode",
    "modes",
    callback=_names(lambda: MODES, "mode"),
    metavar="NAME,...",
    help="latency and throughput, of backends that have the option.  [default: theirs]",
)
@click.option(
    "--processes",
    callback=_numbers,
    default="1",
    show_default=True,
    metavar="N,...",
    help="Copies side by side that share the threads; images a second are those of all.",
)
@click.option(
    "--warmup",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Runs of a row that are not counted.",
)
@click.option(
    "--duration",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    metavar="S",
    help="Seconds of rounds for each row; five rounds at least, of a teacher's minutes one.",
)
@click.option(
    "--percentile",
    "percentiles",
    callback=_percentiles,
    default="50,90,99",
    show_default=True,
    metavar="P,...",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Of noise and labels, and of the order in the rounds.",
)
@click.option("--checkpoint", type=_PATH, help="The student's checkpoint that the bundle was made from.")
@click.option("--vae", type=_PATH, help="The tokenizer's checkpoint that the bundle was made from.")
@click.option("--teacher", type=_PATH, help="The teacher's checkpoint that the bundle was made from.")
@click.option("--weights", type=click.Choice(["ema", "model"]), help="Which copy in --checkpoint.")
@click.option("--roofline/--no-roofline", default=True, help="Whether to measure the machine's own peak.")
@click.option(
    "--remember/--no-remember", default=True, help="Whether to tell --backend auto, by a file in the bundle."
)
@click.option("--plot", type=_PATH, metavar="FILE.png", help="Draw the times.")
@click.option(
    "--update",
    type=_PATH,
    metavar="FILE.md",
    help="Replace what is between <!-- bench --> and <!-- /bench --> in a Markdown file by the tables.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as a JSON list.")
@console.debug_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    as_json: bool,
    plot: Path | None,
    update: Path | None,
    checkpoint: Path | None,
    vae: Path | None,
    teacher: Path | None,
    **options: Any,
) -> None:
    """Time BUNDLE in every engine, round after round in turn, and hold what was timed against PyTorch.

    What cannot run here is listed with its reason. Exit code 3 if the outputs of a row miss the bundle's
    limits: a fast wrong row is marked as wrong. docs/benchmark.md explains the columns.
    """
    from runtime.files import check_writable
    from validate.bench.page import check_page
    from validate.bench.plan import Request

    if options["against"] is None and options["against_steps"] is not None:
        raise click.UsageError("--against-steps says which steps of --against: give both.")
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise click.BadParameter(f"{plot} does not end in .png.", ctx, param_hint="--plot")
        check_writable(plot)
    if update is not None:
        check_page(update)
    files = {"student": checkpoint, "tokenizer": vae, "teacher": teacher}
    request = Request(files={role: str(path) if path else None for role, path in files.items()}, **options)
    rows, peaks, skipped, machine = _measure(request)
    environment = _environment(machine)
    if as_json:
        console.emit_json([row.to_dict() for row in rows])
    else:
        _show(rows, peaks, environment, request.percentiles)
    _write(rows, peaks, environment, skipped, request, _command_line(ctx), plot, update)
    _end(rows)


def _measure(
    request: Request,
) -> tuple[list[Row], dict[tuple[int, str], Peak], list[str], Machine]:
    """The rows of all bundles, the machine's peaks, and what was skipped. Raises DDError."""
    from runtime.machine import Machine
    from runtime.manifest import read_manifest
    from validate.bench.plan import make_plan, nothing_left
    from validate.bench.remember import remember, what_auto_takes
    from validate.bench.run import measure_peaks, run_bench

    machine = Machine()
    plans = []
    for root in request.bundles:
        with console.stage(f"loading {root}", keep=False):
            manifest = read_manifest(root)
        plans.append((root, manifest, make_plan(root, manifest, machine, request)))
    skipped = [
        f"{manifest.name}: {one.what}: {one.reason}" for _, manifest, plan in plans for one in plan.skipped
    ]
    for text in skipped:
        click.echo(f"skipped: {text}", err=True)
    if not any(plan.entries for _, _, plan in plans):
        raise nothing_left([one for _, _, plan in plans for one in plan.skipped])
    threads = [entry.alternative.threads for _, _, plan in plans for entry in plan.entries]
    peaks = measure_peaks(sorted(threads)) if request.roofline else {}
    rows: list[Row] = []
    for root, manifest, plan in plans:
        if not plan.entries:
            continue
        found = run_bench(root, manifest, plan, request, peaks, machine.cpu.name)
        rows += found
        if request.remember:
            kept = remember(root, manifest, machine, found)
            if kept is not None:
                click.echo(f"{manifest.name}: {what_auto_takes(root, manifest, machine)}", err=True)
    return rows, peaks, skipped, machine


def _environment(machine: Machine) -> Environment:
    from datetime import datetime, timezone
    from importlib.metadata import PackageNotFoundError, version

    from validate.bench.rows import Environment

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cpu = machine.cpu
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return Environment(cpu.name, cpu.cores, cpu.features or (), versions, date)


def _show(
    rows: Sequence[Row],
    peaks: dict[tuple[int, str], Peak],
    environment: Environment,
    marks: Sequence[float],
) -> None:
    """The tables for people, on stdout."""
    from validate.bench.table import parity_grid, times_grid, work_line

    click.echo(environment.line)
    for bundle in dict.fromkeys(row.bundle for row in rows):
        own = [row for row in rows if row.bundle == bundle]
        against = dict.fromkeys(row.against for row in own if row.speedup is not None)
        click.echo(f"\n{click.style(own[0].model, bold=True)}: {work_line(own, peaks)}")
        click.echo("\n" + times_grid(own, marks).text())
        if against:
            click.echo(f"speed-up: against {' / '.join(map(str, against))}, with its 95 % interval")
        click.echo("\n" + parity_grid(own).text())


def _write(
    rows: Sequence[Row],
    peaks: dict[tuple[int, str], Peak],
    environment: Environment,
    skipped: Sequence[str],
    request: Request,
    line: str,
    plot: Path | None,
    update: Path | None,
) -> None:
    """Plot and page, and on stderr what is to be said about single rows."""
    from validate.bench.page import address, block
    from validate.bench.page import update as update_page
    from validate.bench.plot import write_plot
    from validate.bench.table import remarks

    if plot is not None and any(row.timed for row in rows):
        write_plot(rows, environment.line, plot)
        click.echo(f"plot: {plot}", err=True)
    if update is not None:
        picture = address(plot, update) if plot is not None and plot.exists() else None
        update_page(update, block(rows, peaks, environment, line, request.percentiles, skipped, picture))
        click.echo(f"updated: {update}", err=True)
    for text in remarks(rows):
        click.echo(text, err=True)


def _end(rows: Sequence[Row]) -> None:
    """Raises VerificationError for a wrong row, else DDError for one that failed."""
    wrong = [row for row in rows if row.passed is False]
    failed = [row for row in rows if row.error is not None]
    if wrong:
        raise VerificationError(
            f"{len(wrong)} of {len(rows)} rows miss the bundle's limits: {_list(wrong)}",
            "ddexport validate parity BUNDLE says where.",
        )
    if failed:
        raise DDError(f"{len(failed)} of {len(rows)} rows could not be timed: {_list(failed)}")


def _list(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row.name}, batch {row.batch}, steps {row.steps}" for row in rows)


def _command_line(ctx: click.Context) -> str:
    """The command as it was given, from what click has read of it."""
    words = ["ddexport", "bench"]
    for param in ctx.command.params:
        if ctx.get_parameter_source(param.name or "") is not click.core.ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[param.name or ""]
        if isinstance(param, click.Argument):
            words += [str(each) for each in value]
        elif isinstance(value, bool):
            words.append((param.opts if value or not param.secondary_opts else param.secondary_opts)[0])
        else:
            many = isinstance(value, tuple)
            words += [param.opts[0], ",".join(_plain(each) for each in value) if many else _plain(value)]
    return shlex.join(words)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
