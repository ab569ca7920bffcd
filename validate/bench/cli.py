"""`ddexport bench`: how fast a bundle is in every engine, beside whether what was timed is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ddexport.runtime import console
from ddexport.runtime.errors import DDError, VerificationError
from ddexport.validate.bench import options

if TYPE_CHECKING:
    from ddexport.runtime.machine import Machine
    from ddexport.validate.bench.peak import Peak
    from ddexport.validate.bench.plan import Request
    from ddexport.validate.bench.rows import Row

EPILOG = """
\b
Examples:
  ddexport bench build/digits-var
  ddexport bench build/digits-var --backend openvino,torch,published --against published
  ddexport bench build/var-d16 --steps 1,2,teacher --against torch --against-steps teacher
  ddexport bench build/digits-var build/digits-llamagen --batch 1,8 --plot bench.png --json
"""


_PATH = click.Path(path_type=Path)


@click.command("bench", cls=console.Command, epilog=EPILOG)
@click.argument("bundles", metavar="BUNDLE...", type=_PATH, nargs=-1, required=True)
@click.option(
    "--backend",
    "backends",
    callback=options.BACKEND,
    metavar="A,B,...",
    help="Backends of the runtime, and torch, torch-compile, published. All that are named stay in memory at"
    " once: name fewer where it is short.  [default: the runtime's]",
)
@click.option(
    "--batch", "batches", callback=options.numbers, default="1", show_default=True, metavar="N,N,..."
)
@click.option(
    "--steps",
    callback=options.steps,
    default="1",
    show_default=True,
    metavar="N,...,teacher",
    help="Schedules of the bundle; teacher is the whole auto-regressive model.",
)
@click.option(
    "--precision",
    "precisions",
    callback=options.PRECISION,
    metavar="NAME,...",
    help="fp32, fp16, bf16, int8.  [default: all that each backend can run]",
)
@click.option(
    "--against",
    callback=options.one(options.BACKEND),
    metavar="BACKEND",
    help="How many times faster than that one each row is; it is timed too if it was not named.",
)
@click.option(
    "--against-steps",
    callback=options.one(options.steps),
    metavar="N|teacher",
    help="The steps of --against.  [default: those of each row]",
)
@click.option(
    "--against-precision",
    callback=options.one(options.PRECISION),
    default="fp32",
    show_default=True,
    metavar="NAME",
    help="The precision of --against.",
)
@click.option(
    "--threads", callback=options.numbers, metavar="N,...", help="Of each alternative.  [default: all cores]"
)
@click.option(
    "--mode",
    "modes",
    callback=options.MODE,
    metavar="NAME,...",
    help="latency and throughput, of backends that have the option.  [default: theirs]",
)
@click.option(
    "--processes",
    "--streams",
    "processes",
    callback=options.numbers,
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
    callback=options.percentiles,
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
@click.option(
    "--block",
    default="",
    callback=options.block_name,
    metavar="NAME",
    help="Which block of --update, of a page with several: <!-- bench NAME -->.",
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
    from ddexport.validate.bench.page import check_page
    from ddexport.validate.bench.plan import Request
    from ddexport.validate.bench.processes import tidy_at_sigterm
    from ddexport.validate.bench.report import environment_of, say_work, show, write

    if asked["against"] is None and asked["against_steps"] is not None:
        raise click.UsageError("--against-steps says which steps of --against: give both.")
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise click.BadParameter(f"{plot} does not end in .png.", ctx, param_hint="--plot")
        check_writable(plot)
    if update is not None:
        check_page(update, block)
    files = {"student": checkpoint, "tokenizer": vae, "teacher": teacher}
    request = Request(files={role: str(path) if path else None for role, path in files.items()}, **asked)
    with tidy_at_sigterm():
        rows, peaks, skipped, machine = _measure(request)
    environment = environment_of(machine)
    if as_json:
        console.emit_json([row.to_dict() for row in rows])
        say_work(rows, peaks)
    else:
        show(rows, peaks, environment, request.percentiles)
    line = options.command_line(ctx)
    write(rows, peaks, environment, skipped, request.percentiles, line, plot, update, block)
    _end(rows)


def _measure(
    request: Request,
) -> tuple[list[Row], dict[tuple[int, str], Peak], list[str], Machine]:
    """The rows of all bundles, the machine's peaks, and what was skipped. Raises DDError."""
    from ddexport.runtime.machine import Machine
    from ddexport.runtime.manifest import read_manifest
    from ddexport.validate.bench.plan import make_plan, nothing_left
    from ddexport.validate.bench.remember import remember, what_auto_takes
    from ddexport.validate.bench.run import measure_peaks, run_bench

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
