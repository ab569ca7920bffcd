"""The benchmark of one bundle: a worker a configuration, rounds over all of them, and rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from ddexport.graph.flops import CountError, count_flops
from ddexport.runtime import console
from ddexport.runtime.backends import CPU, Configuration
from ddexport.runtime.bundle import FULL, TEACHER, Manifest, decoder_role
from ddexport.runtime.errors import BundleError
from ddexport.validate.bench.agreement import agreement
from ddexport.validate.bench.plan import Entry, Plan, Request
from ddexport.validate.bench.roofline import ENGINES
from ddexport.validate.bench.rounds import LONG, interleave, speedup, summary, wants_round
from ddexport.validate.bench.session import Job, Run, inputs_of
from ddexport.validate.bench.torch_engine import REFERENCE
from ddexport.validate.bench.worker import Worker, WorkerError

Row: TypeAlias = dict[str, Any]
Peaks: TypeAlias = Mapping[tuple[str, int, str], float]  # GFLOP/s by device, threads and precision
SERIES = 4  # of a row's throughput, between those of the others
FIELDS = (
    "version", "rounds", "student_ms", "teacher_ms", "decoder_ms", "total_ms", "total_min_ms", "total_max_ms",
    "total_p90_ms", "total_p99_ms", "images_per_s", "peak_mib", "gpu_mib", "gflop", "peak_gflops", "roofline",
    "tokens_equal", "embedding_error", "image_psnr", "image_max", "passed", "faults", "notes", "against",
    "speedup", "speedup_low", "speedup_high", "small_over_full", "decoder_trained", "error",
)  # fmt: skip


@dataclass
class Timing:
    """An entry while it is timed. runs: by the number of the round. series: of runs behind each other, their
    images and seconds. error: why it takes part no longer."""

    entry: Entry
    worker: Worker
    version: str
    error: str
    runs: dict[int, Run] = field(default_factory=dict)
    series: list[tuple[int, float]] = field(default_factory=list)
    parity: Row = field(default_factory=dict)

    @property
    def seconds(self) -> dict[int, float]:
        """Of a batch, by the number of the round."""
        return {number: run.total for number, run in self.runs.items()}

    def call(self, method: str, *more: Any) -> Any:
        """What the worker returns; None, and the reason in `error`, where it fails or has failed."""
        try:
            return None if self.error else self.worker.call(method, *self.entry.work, *more)
        except WorkerError as error:
            self.error = str(error)
            return None

    def prepare(self, warmup: int) -> None:
        """The first run, which opens and compiles, and those that warm up; none is counted."""
        first: Run | None = self.call("run")
        for _ in range(warmup if first is not None and first.total < LONG else 0):
            self.call("run")

    def run(self, number: int) -> None:
        """One timed run."""
        if (done := self.call("run")) is not None:
            self.runs[number] = done

    def wants_series(self) -> bool:
        """A run of half a minute is a series of its own."""
        spent = max(self.seconds.values(), default=LONG) + sum(spent for _, spent in self.series)
        return not self.error and len(self.series) < SERIES and spent < LONG

    def run_series(self, duration: float) -> None:
        """Runs behind each other."""
        if (done := self.call("throughput", duration)) is not None:
            self.series.append(done)

    def images_per_s(self) -> float:
        """Of all series; of all runs where none was short enough."""
        count, spent = map(sum, zip(*self.series, strict=True)) if self.series else (0, 0.0)
        runs = self.seconds.values()
        return count / spent if count else self.entry.batch * len(runs) / sum(runs)

    def compare(self, manifest: Manifest, reference: Worker, seed: int) -> None:
        """The outputs of the last run with the reference's."""
        if (got := self.call("outputs")) is not None:
            try:
                expected = reference.call("expected", *self.entry.work[:2], got.steps, self.entry.decoder)
            except WorkerError as error:
                self.error = f"not compared: {error}"
            else:
                inputs = inputs_of(manifest, self.entry.batch, seed)
                self.parity = agreement(manifest, self.entry, inputs, got, expected)

    def row(self, root: Path, manifest: Manifest, peaks: Peaks) -> Row:
        """Flat: which row it is, then `FIELDS`, None where one could not be measured."""
        entry, chosen = self.entry, self.entry.configuration
        runs = [] if self.error else [*self.runs.values()]
        row: Row = {"bundle": str(root), "model": manifest.name}
        row |= {name: getattr(chosen, name) for name in ("backend", "precision", "device")}
        row |= {
            "threads": entry.threads,
            "batch": entry.batch,
            "steps": entry.steps,
            "decoder": entry.decoder,
        }
        row |= dict.fromkeys(FIELDS)
        row |= {"version": self.version, "rounds": len(runs), "error": self.error or None, **self.parity}
        if runs:
            parts = {name: [getattr(run, name) for run in runs] for name in ("student", "teacher", "decoder")}
            row |= {f"{name}_ms": median(spent) * 1e3 or None for name, spent in parts.items()}
            row |= summary([run.total for run in runs])
            row["images_per_s"] = self.images_per_s()
            for name in ("peak_mib", "gpu_mib"):
                row[name] = max((mib for run in runs if (mib := getattr(run, name))), default=None)
        if entry.decoder != FULL:
            row["decoder_trained"] = manifest.weights.kind != "random"
        with suppress(CountError):  # a graph of another exporter
            row["gflop"] = gflop_of(root, manifest, entry)
        peak = peaks.get((chosen.device, entry.threads, chosen.precision))
        if peak and row["gflop"] and runs:
            rate = row["gflop"] * entry.batch * 1e3 / row["total_ms"]
            row |= {"peak_gflops": peak, "roofline": rate / peak}
        return row


def run_bench(root: Path, manifest: Manifest, plan: Plan, request: Request, peaks: Peaks) -> list[Row]:
    """Times every entry of the plan, and compares what was timed with the reference: `Timing.row` of each.

    What goes wrong in a worker is told in its rows. Raises DDError where the reference cannot be opened.
    """
    timings: dict[Entry, Timing] = {}
    seconds = request.duration / SERIES

    def job(configuration: Configuration, threads: int) -> Job:
        return Job(root, configuration, threads, request.seed, request.files, request.weights)

    with ExitStack() as stack:
        with console.stage(f"opening {manifest.name}", keep=False):
            threads = max(entry.threads for entry in plan.entries)
            float32 = Configuration(REFERENCE, "cpu", "fp32", manifest.precisions[0], CPU)
            reference = stack.enter_context(Worker(threads))
            reference.call("open", job(float32, threads))
            runners = dict.fromkeys(entry.runner for entry in plan.entries)
            opened = {runner: _open(job(*runner), stack) for runner in runners}
        for batch, entries in groupby(plan.entries, key=lambda entry: entry.batch):
            group = [Timing(entry, *opened[entry.runner]) for entry in entries]
            with console.stage(f"timing {manifest.name}, batch {batch}, {len(group)} rows"):
                for timing in group:
                    timing.prepare(request.warmup)
                interleave(group, lambda one: _wants(one, request.duration), Timing.run, request.seed)
                interleave(group, Timing.wants_series, lambda one, _: one.run_series(seconds), request.seed)
            with console.stage(f"comparing {manifest.name}, batch {batch}, with PyTorch"):
                for timing in group:
                    timing.compare(manifest, reference, request.seed)
            timings |= {timing.entry: timing for timing in group}
    rows = {entry: timing.row(root, manifest, peaks) for entry, timing in timings.items()}
    for entry, rivals in plan.baselines.items():
        running = [rival for rival in rivals if not rows[rival]["error"]]
        if running and not rows[entry]["error"]:
            baseline = min(running, key=lambda rival: float(rows[rival]["total_ms"]))
            name = f"{baseline.configuration.backend} {baseline.configuration.precision}"
            rows[entry]["against"] = f"{name}, steps {baseline.steps}"
            rows[entry] |= speedup(timings[baseline].seconds, timings[entry].seconds, request.seed)
    for entry, row in rows.items():
        full = rows.get(replace(entry, decoder=FULL), {}).get("total_ms")
        if entry.decoder != FULL and full and row["total_ms"]:
            row["small_over_full"] = full / row["total_ms"]
    return [rows[entry] for entry in plan.entries]


def measure_peaks(entries: Iterable[Entry]) -> Peaks:
    """What the machine multiplies at: the best of the installed engines, each in a process of its own."""
    wanted = {(one.configuration.device, one.threads, one.configuration.precision) for one in entries}
    peaks: dict[tuple[str, int, str], float] = {}
    for device, threads in sorted({key[:2] for key in wanted}):
        for engine in filter(find_spec, ENGINES[device.partition(":")[0]]):
            with Worker(threads) as worker:
                for key in sorted(key for key in wanted if key[:2] == (device, threads)):
                    with suppress(WorkerError):  # it has no such product
                        rate = worker.call("rate", engine, key[2], threads, device)
                        peaks[key] = max(rate, peaks.get(key, 0.0))
    return peaks


def gflop_of(root: Path, manifest: Manifest, entry: Entry) -> float:
    """Operations of one image in 1e9, from the graphs of the row's precision. Raises CountError.

    A teacher's products with its cache count the whole length of the cache, as the graph computes them.
    """
    schedule, teacher, filled = manifest.schedule(entry.steps), manifest.teacher, 0

    def count(role: str, **sizes: int) -> int:
        split = schedule.split if role == "student" else None
        try:
            graph = manifest.graph(role, entry.configuration.graphs, split)
        except BundleError:  # there is no teacher in int8
            graph = manifest.graph(role, None, split)
        return count_flops(root / graph.file, batch=1, **sizes)

    total = count(decoder_role(entry.decoder)) + (
        len(schedule.known) * count("student") if schedule.known else 0
    )
    for _, end in teacher.steps(schedule.teacher) if teacher and schedule.teacher else ():
        total += count(TEACHER, new=end - filled, capacity=schedule.teacher.end if schedule.teacher else 0)
        filled = end
    return total / 1e9


def _open(job: Job, stack: ExitStack) -> tuple[Worker, str, str]:
    """A worker of the job, the engine's version, and why it could not be opened."""
    worker = stack.enter_context(Worker(job.threads))
    try:
        return worker, worker.call("open", job), ""
    except WorkerError as error:
        return worker, "", str(error)


def _wants(timing: Timing, duration: float) -> bool:
    return not timing.error and wants_round([*timing.seconds.values()], duration)
