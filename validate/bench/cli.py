"""`ddexport bench`: how fast a bundle is in every engine, and whether what was timed is right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.bundle import FULL
from ddexport.runtime.errors import BackendError, DDError, VerificationError
from ddexport.runtime.options import PATH, comma_list, known, number, option
from ddexport.validate.options import shared

if TYPE_CHECKING:
    from ddexport.validate.bench.plan import Request
    from ddexport.validate.bench.run import Peaks, Row

SCHEMA = 1
TEACHER = "teacher"
EPILOG = """
\b
Examples:
  ddexport bench digits-var
  ddexport bench digits-var --backend onnxruntime,openvino --save
  ddexport bench digits-var --backend openvino,torch-eager,naive --against naive
  ddexport bench digits-var --backend openvino --steps 1,teacher --against torch-eager --against-steps teacher
  ddexport bench digits-var --decoder full,small --batch 1,8,32 --precision fp32
  ddexport bench digits-var digits-llamagen --batch 1,8 --plot bench.png --json
"""


def _steps(word: str) -> int | str:
    return word if word == TEACHER else number(word)


def _backend(word: str) -> str:
    from ddexport.validate.bench.plan import backend_names

    return known(word, backend_names())


def _against(word: str) -> str:
    from ddexport.validate.bench.plan import TORCH, backend_names

    return known(word, [TORCH, *backend_names()])


_precision = partial(known, names=("fp32", "fp16", "bf16", "int8"))


@click.command("bench", cls=console.Command, epilog=EPILOG)
@shared("bundle", name="bundles", metavar="[BUNDLE]...", nargs=-1)
@option("--backend", "backends", callback=comma_list(_backend), metavar="NAME,...",
        show_default="all but naive",
        help="Inference engines, separated by commas; also torch-eager and torch-compile (the PyTorch"
        " model), and naive (sampling in the style of the published code). All are in memory at the same"
        " time.")  # fmt: skip
@shared("device")
@option("--batch", "batches", callback=comma_list(number), default="1", metavar="N,...",
        help="Numbers of images per batch, separated by commas.")  # fmt: skip
@option("--steps", callback=comma_list(_steps), show_default="1; teacher, where there is no student",
        metavar="N,...,teacher",
        help="Numbers of steps, separated by commas. teacher: all steps of the auto-regressive"
        " model.")  # fmt: skip
@option("--precision", "precisions", callback=comma_list(_precision), metavar="NAME,...",
        show_default="all that an engine can run",
        help="Precisions to compute in, separated by commas: fp32, fp16, bf16, int8.")  # fmt: skip
@option("--against", callback=comma_list(_against, single=True), metavar="NAME",
        show_default="torch, where one of its two is in the table",
        help="What each row is compared with: one of --backend, or torch: the faster one of torch-eager and"
        " torch-compile.")  # fmt: skip
@option("--against-steps", callback=comma_list(_steps, single=True), metavar="N|teacher",
        show_default="those of each row", help="Number of steps for --against.")  # fmt: skip
@option("--against-precision", callback=comma_list(_precision, single=True), metavar="NAME",
        show_default="that of each row; fp32 for naive", help="Precision for --against.")  # fmt: skip
@option("--threads", callback=comma_list(number), metavar="N,...", show_default="all cores",
        help="Numbers of CPU threads, separated by commas.")  # fmt: skip
@option("--warmup", type=click.IntRange(0), metavar="N", default=1, help="Number of runs before timing.")
@option("--duration", type=click.FloatRange(0), default=2.0, metavar="SECONDS",
        help="Time for each row, and again for its throughput. A row is run at least five times, or for"
        " half a minute.")  # fmt: skip
@shared("seed", help="Seed of the noise, the labels and the order of the runs.")
@option("--decoder", "decoders", callback=comma_list(str), default=FULL, metavar="NAME,...",
        help="Decoders, separated by commas: full, small.")  # fmt: skip
@shared("checkpoint", "vae", "teacher", "small-decoder", "weights")
@option("--roofline/--no-roofline", default=True, help="Also measure the peak speed of the CPU or GPU.")
@option("--save", is_flag=True,
        help="Store in the bundle which engine is the fastest on this CPU, for --backend auto.")  # fmt: skip
@option("--plot", type=PATH, metavar="FILE.png", help="Write a plot of the times.")
@shared("json")
@console.debug_option
def command(
    save: bool,
    plot: Path | None,
    as_json: bool,
    checkpoint: Path | None,
    small_decoder: Path | None,
    vae: Path | None,
    teacher: Path | None,
    **asked: Any,
) -> None:
    """Measure the speed of BUNDLE in every inference engine.

    There is one row for each engine, precision, batch size and number of steps; docs/validation.md explains
    the columns. The rows are timed in turns, so that other work on the machine slows all of them.

    The outputs are compared with those of the PyTorch model. Exit code 3 if a row exceeds the limits of the
    bundle.
    """
    from ddexport.runtime.files import check_writable, write_image
    from ddexport.validate.bench.plan import Request
    from ddexport.validate.bench.table import remarks

    if asked["against"] is None and (asked["against_steps"] or asked["against_precision"]):
        raise click.UsageError("--against-steps and --against-precision need --against.")
    if save and asked["decoders"] != (FULL,):
        raise click.UsageError("--save needs the full decoder: its times choose the engine for all.")
    if plot is not None and plot.suffix.lower() != ".png":
        raise click.BadParameter(f"{plot} does not end in .png.", param_hint="--plot")
    files = {"student": checkpoint, "tokenizer": vae, "teacher": teacher, "decoder_small": small_decoder}
    request = Request(files=files, **asked)
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
        raise DDError(f"missing: {'; '.join(missing)}", hint)
    entries = [entry for plan in plans.values() for entry in plan.entries]
    if not entries:
        what = f"nothing can be timed here: {'; '.join(skipped)}"
        raise BackendError(what, "`ddexport doctor` shows what is installed.")
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

    gflops = {
        f"{precision}, {f'threads {threads}' if device == 'cpu' else device}": rate
        for (device, threads, precision), rate in sorted(peaks.items())
    }
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
            click.echo(f"speed-up: over {against}, with its 95 % interval")


def _save(root: Path, rows: Sequence[Row]) -> str:
    """Keeps the times that `--backend auto` goes by in the bundle; for people, what became of it."""
    from ddexport.runtime.backends import choose
    from ddexport.runtime.backends._saved import save
    from ddexport.runtime.bundle import read_manifest
    from ddexport.validate.bench.table import times_to_save

    manifest = read_manifest(root, verify=False)
    times, precision = times_to_save(rows, manifest.precisions[0]), manifest.precisions[0]
    if not times:
        return f"nothing to save in {root}: no CPU backend met the limits in {precision} and one step"
    texts = [f"{name} {milliseconds:.3g} ms" for name, milliseconds in times.items()]
    path = save(root, manifest, times)
    return f"saved in {path}: {', '.join(texts)} per image; auto takes {choose(root, manifest)}"


def _end(rows: Sequence[Row]) -> None:
    """Raises VerificationError for a wrong row, else DDError for one that failed."""
    from ddexport.validate.bench.table import name_of

    wrong = [name_of(row) for row in rows if row["passed"] is False]
    failed = [name_of(row) for row in rows if row["error"] is not None]
    if wrong:
        raise VerificationError(
            f"{len(wrong)} of {len(rows)} rows exceed the limits of the bundle: {'; '.join(wrong)}",
            "`ddexport validate parity BUNDLE` shows where.",
        )
    if failed:
        fault = f"{len(failed)} of {len(rows)} rows could not be timed: {'; '.join(failed)}"
        raise DDError(fault, "The lines above say why.")
