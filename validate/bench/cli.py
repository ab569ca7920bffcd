"""`ddexport bench`: how fast a bundle is in every engine, and whether what was timed is right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.errors import BackendError, DDError, VerificationError
from ddexport.validate.options import PATH, comma_list, number, shared

if TYPE_CHECKING:
    from ddexport.validate.bench.plan import Request
    from ddexport.validate.bench.run import Peaks, Row

SCHEMA = 1
TEACHER = "teacher"
EPILOG = """
\b
Examples:
  ddexport bench build/digits-var --save
  ddexport bench build/digits-var --backend openvino,torch-eager,naive --against naive
  ddexport bench build/var-d16 --steps 1,2,teacher --against torch-eager --against-steps teacher
  ddexport bench build/digits-var build/digits-llamagen --batch 1,8 --plot bench.png --json
"""


def _steps(word: str) -> int | str:
    if word != TEACHER and (not word.isdecimal() or int(word) < 1):
        raise ValueError(f"there is: numbers above 0 that the bundle has schedules for, and {TEACHER}")
    return word if word == TEACHER else int(word)


def _backend(word: str) -> str:
    from ddexport.validate.bench.plan import backend_names

    return _known(word, backend_names())


def _known(word: str, names: Sequence[str]) -> str:
    if word not in names:
        raise ValueError(f"there is: {', '.join(names)}")
    return word


_precision = partial(_known, names=("fp32", "fp16", "bf16", "int8"))


@click.command("bench", cls=console.Command, epilog=EPILOG, context_settings={"show_default": True})
@click.argument("bundles", metavar="BUNDLE...", type=PATH, nargs=-1, required=True)
@click.option("--backend", "backends", callback=comma_list(_backend), metavar="A,B,...",
              help="Backends of the runtime, and torch-eager, torch-compile, naive. All that are named stay"
              " in memory at once: name fewer where it is short.  [default: the runtime's]")  # fmt: skip
@click.option("--device", "--provider", "device", metavar="NAME",
              help="cpu, cuda or cuda:N.  [default: any]")  # fmt: skip
@click.option("--batch", "batches", callback=comma_list(number), default="1", metavar="N,N,...")
@click.option("--steps", callback=comma_list(_steps), default="1", metavar="N,...,teacher",
              help="Schedules of the bundle; teacher is the whole auto-regressive model.")  # fmt: skip
@click.option("--precision", "precisions", callback=comma_list(_precision), metavar="NAME,...",
              help="fp32, fp16, bf16, int8.  [default: all that each backend can run]")  # fmt: skip
@click.option("--against", callback=comma_list(_backend, single=True), metavar="BACKEND",
              help="Say how many times faster than that one each row is.")  # fmt: skip
@click.option("--against-steps", callback=comma_list(_steps, single=True), metavar="N|teacher",
              help="The steps of --against.  [default: those of each row]")  # fmt: skip
@click.option("--against-precision", callback=comma_list(_precision, single=True), default="fp32",
              metavar="NAME", help="The precision of --against.")  # fmt: skip
@click.option("--threads", callback=comma_list(number), metavar="N,...",
              help="Of the CPU.  [default: all cores]")  # fmt: skip
@click.option("--warmup", type=click.IntRange(0), default=1, help="Runs that are not counted.")
@click.option("--duration", type=click.FloatRange(0), default=2.0, metavar="S",
              help="Seconds of rounds for each row; five rounds at least, of a teacher's minutes"
              " one.")  # fmt: skip
@shared("seed", help="Of noise and labels, and of the order in the rounds.")
@shared("checkpoint", "vae", "teacher", "weights")
@click.option("--roofline/--no-roofline", default=True, help="Whether to measure the machine's own peak.")
@click.option("--save", is_flag=True,
              help="Keep in the bundle how fast each CPU backend is in one step and the first precision, for"
              " --backend auto.")  # fmt: skip
@click.option("--plot", type=PATH, metavar="FILE.png", help="Plot the times.")
@shared("json")
@console.debug_option
def command(
    save: bool,
    plot: Path | None,
    as_json: bool,
    checkpoint: Path | None,
    vae: Path | None,
    teacher: Path | None,
    **asked: Any,
) -> None:
    """Time BUNDLE in every engine, in rounds over all of them, and compare what was timed with PyTorch.

    What cannot run here is listed with its reason. Exit code 3 if the outputs of a row miss the bundle's
    limits: a fast wrong row is marked as wrong. docs/benchmark.md explains the columns.
    """
    from ddexport.runtime.files import check_writable, write_image
    from ddexport.validate.bench.plan import Request
    from ddexport.validate.bench.table import remarks

    if asked["against"] is None and asked["against_steps"] is not None:
        raise click.UsageError("--against-steps says which steps of --against: give both.")
    if plot is not None and plot.suffix.lower() != ".png":
        raise click.BadParameter(f"{plot} does not end in .png.", param_hint="--plot")
    request = Request(files={"student": checkpoint, "tokenizer": vae, "teacher": teacher}, **asked)
    for path in [*([plot] if plot else []), *(root / "bench.json" for root in request.bundles if save)]:
        check_writable(path)
    rows, peaks = _measure(request, plot is not None)
    _show(rows, peaks, as_json)
    if plot is not None and any(row["total_ms"] for row in rows):
        from ddexport.validate.plots import bench_bars

        write_image(plot, bench_bars(rows, _machine()), follow=True)
        click.echo(f"plot: {plot}", err=True)
    for remark in remarks(rows):
        click.echo(remark, err=True)
    for root in request.bundles if save else ():
        click.echo(_save(root, [row for row in rows if row["bundle"] == str(root)]), err=True)
    _end(rows)


def _measure(request: Request, plot: bool) -> tuple[list[Row], Peaks]:
    """The rows of all bundles, and the machine's peaks. Raises DDError, for all that is missing at once."""
    from ddexport.runtime.bundle import read_manifest
    from ddexport.validate.bench.plan import PACKAGES, make_plan
    from ddexport.validate.bench.run import measure_peaks, run_bench

    packages = (*PACKAGES, "matplotlib") if plot else PACKAGES
    manifests = {root: read_manifest(root) for root in request.bundles}
    plans = {root: make_plan(root, manifest, request, packages) for root, manifest in manifests.items()}
    skipped = [f"{manifests[root].name}: {text}" for root, plan in plans.items() for text in plan.skipped]
    for text in skipped:
        click.echo(f"skipped: {text}", err=True)
    if missing := list(dict.fromkeys(text for plan in plans.values() for text in plan.missing)):
        hint = 'give the files; pip install "ddexport[validate]" brings the packages of PyTorch'
        raise DDError(f"this is missing: {'; '.join(missing)}", hint)
    entries = [entry for plan in plans.values() for entry in plan.entries]
    if not entries:
        what = f"nothing that was asked for can be timed here: {'; '.join(skipped)}"
        raise BackendError(what, "ddexport doctor says what is installed.")
    peaks: Peaks = {}
    if request.roofline:
        with console.stage("measuring the machine"):
            peaks = measure_peaks(entries)
    rows: list[Row] = []
    for root, plan in plans.items():
        rows += run_bench(root, manifests[root], plan, request, peaks) if plan.entries else []
    return rows, peaks


def _machine() -> str:
    from ddexport.runtime.machine import cpu

    return f"{cpu().name}, {cpu().cores} core{'s' * (cpu().cores != 1)}"


def _show(rows: Sequence[Row], peaks: Peaks, as_json: bool) -> None:
    """On stdout: {"schema", "machine", "rows"} as JSON, or tables."""
    from ddexport.validate.bench.table import tables
    from ddexport.validate.report import versions

    gflops = {f"{precision}, threads {threads}": rate for (threads, precision), rate in sorted(peaks.items())}
    if as_json:
        machine = {
            "cpu": _machine(),
            "versions": versions(*{row["backend"] for row in rows}),
            "peak_gflops": gflops,
        }
        console.emit_json({"schema": SCHEMA, "machine": machine, "rows": rows})
        return
    rates = ", ".join(f"{rate:.0f} GFLOP/s ({name})" for name, rate in gflops.items())
    click.echo("; ".join(filter(None, (_machine(), rates and f"a matrix product: {rates}"))))
    for bundle in dict.fromkeys(row["bundle"] for row in rows):
        own = [row for row in rows if row["bundle"] == bundle]
        click.echo(f"\n{click.style(own[0]['model'], bold=True)}\n{tables(own)}")
        if against := " / ".join(dict.fromkeys(row["against"] for row in own if row["speedup"])):
            click.echo(f"speed-up: against {against}, with its 95 % interval")


def _save(root: Path, rows: Sequence[Row]) -> str:
    """Keeps the times that `--backend auto` goes by in the bundle; for people, what became of it."""
    from ddexport.runtime.backends import choose
    from ddexport.runtime.backends._saved import save
    from ddexport.runtime.bundle import read_manifest
    from ddexport.validate.bench.table import times_to_save

    manifest = read_manifest(root, verify=False)
    times, precision = times_to_save(rows, manifest.precisions[0]), manifest.precisions[0]
    if not times:
        return f"nothing to save in {root}: no CPU backend was timed and right in {precision} and one step"
    texts = [f"{name} {milliseconds:.3g} ms" for name, milliseconds in times.items()]
    path = save(root, manifest, times)
    return f"saved in {path}: {', '.join(texts)} an image; auto takes {choose(root, manifest)}"


def _end(rows: Sequence[Row]) -> None:
    """Raises VerificationError for a wrong row, else DDError for one that failed."""
    from ddexport.validate.bench.table import name_of

    wrong = [name_of(row) for row in rows if row["passed"] is False]
    failed = [name_of(row) for row in rows if row["error"] is not None]
    if wrong:
        raise VerificationError(
            f"{len(wrong)} of {len(rows)} rows miss the bundle's limits: {'; '.join(wrong)}",
            "ddexport validate parity BUNDLE says where.",
        )
    if failed:
        raise DDError(f"{len(failed)} of {len(rows)} rows could not be timed: {'; '.join(failed)}")
