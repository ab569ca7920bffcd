"""The benchmark of one bundle: workers, rounds, and what becomes of them: rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median

from ddexport.runtime import console
from ddexport.runtime.bundle import Manifest
from ddexport.runtime.machine import cpu
from ddexport.validate.bench.agreement import Agreement, Judge, worst_of
from ddexport.validate.bench.plan import Entry, Plan, Request
from ddexport.validate.bench.processes import Worker, call_all
from ddexport.validate.bench.roofline import ENGINES, Peak, Peaks, best_of, flops_of
from ddexport.validate.bench.rounds import LONG, Contender, interleave, least_rounds, percentiles, speedup
from ddexport.validate.bench.rows import Row
from ddexport.validate.bench.worker import WorkerError
from ddexport.validate.bench.workload import (
    IN_TORCH,
    REFERENCE,
    Job,
    Run,
    RunnerConfiguration,
    Times,
    Workload,
    inputs_of,
)

PARTS = ("student", "teacher", "decoder", "total")
Start = Callable[[int], Worker]  # by the number of its threads
JobOf = Callable[[RunnerConfiguration], Job]


@dataclass
class Opened:
    """The workers of one runner. version: of the engine. teacher: what else runs the teacher. error: why they
    could not be opened."""

    workers: list[Worker] = field(default_factory=list)
    version: str = ""
    teacher: str = ""
    error: str | None = None


@dataclass(kw_only=True)
class Timing(Contender):
    """An entry while it is timed: who runs it, who judges it, and what came of it so far.

    judge: why there is none, if it is text.
    """

    entry: Entry
    opened: Opened
    judge: Judge | str
    peak_mib: float | None = None
    agreements: list[Agreement] = field(default_factory=list)

    def prepare(self, warmup: int) -> None:
        """The first run, which opens and compiles, and those that warm up; neither is counted.

        Entries are prepared from the smallest on, so that the memory that is read here is that of what is
        open by then, and no more.
        """
        self.error = self.opened.error
        if self.error is not None:
            return
        workers, workload = self.opened.workers, self.entry.workload
        try:
            first = max(times.total for times in call_all(workers, "prepare", workload))
            for _ in range(warmup if first < LONG else 0):
                self.peak_mib = _peak(call_all(workers, "run", workload))
        except WorkerError as error:
            self.error = _text(error)
            return
        self.least = least_rounds(workload.by_teacher, first)

    def run(self) -> Times:
        """One timed run, until the last of the processes is done; what they gave is judged after it. Raises
        WorkerError."""
        runs: list[Run] = call_all(self.opened.workers, "run", self.entry.workload, True)
        if self.peak_mib is None:
            self.peak_mib = _peak(runs)
        for run in runs:
            if run.outputs is None or isinstance(self.judge, str):
                continue
            decoded = None
            if self.judge.fits(run.outputs) and not self.judge.comparable(run.outputs).any():
                decoded = self.opened.workers[0].call("decode", self.judge.expected.steps[-1].sequence)
            precision = self.entry.runner.precision
            self.agreements.append(self.judge.judge(run.outputs, precision, decoded))
        return max((run.times for run in runs), key=lambda times: times.total)

    @property
    def walls(self) -> dict[int, float]:
        """Seconds an image, by the number of the round."""
        images = self.entry.workload.batch * self.entry.runner.processes
        return {number: times.total / images for number, times in self.times.items()}

    def row(self, root: Path, manifest: Manifest, request: Request, peaks: Peaks) -> Row:
        """What is told of it."""
        row = Row(str(root), manifest.name, self.entry.runner, self.entry.workload, self.opened.version)
        row.machine, row.peak_mib, row.error = cpu().name, self.peak_mib, self.error
        row.rounds = len(self.times)
        if self.error is not None:
            return row
        for part in PARTS:
            milliseconds = [getattr(times, part) * 1e3 for times in self.times.values()]
            if any(milliseconds):
                setattr(row, f"{part}_ms", median(milliseconds))
                row.percentiles[part] = percentiles(milliseconds, request.percentiles)
        row.images_per_s = 1.0 / median(self.walls.values())
        agreement = Agreement(notes=(f"not compared: {self.judge}",))
        if not isinstance(self.judge, str):
            agreement = worst_of(self.agreements)
        vars(row).update(vars(agreement))
        if self.opened.teacher and manifest.schedule(row.workload.steps).teacher is not None:
            row.notes += (f"the teacher ran in {self.opened.teacher}",)
        _fill_roofline(row, root, manifest, peaks)
        return row


def run_bench(
    root: Path, manifest: Manifest, plan: Plan, request: Request, peaks: Peaks, start: Start = Worker
) -> list[Row]:
    """Times every entry of the plan and judges it. start: a worker in its process. Raises DDError.

    What goes wrong in a worker is told in its rows.
    """
    job_of = partial(Job, root, seed=request.seed, files=request.files, weights=request.weights)
    timings: dict[Entry, Timing] = {}
    with ExitStack() as stack:
        judges = _judges(manifest, plan, job_of, start)
        runners = dict.fromkeys(entry.runner for entry in plan.entries)
        opened = {runner: _opened(job_of(runner), start, stack) for runner in runners}
        for batch, entries in groupby(plan.entries, key=lambda entry: entry.workload.batch):
            group = {
                entry: Timing(entry=entry, opened=opened[entry.runner], judge=judges[entry.workload])
                for entry in entries
            }
            for entry, timing in group.items():
                with console.stage(f"preparing {entry.runner}, {entry.workload}", keep=False):
                    timing.prepare(request.warmup)
            ready = [timing for timing in group.values() if timing.error is None]
            with console.stage(f"timing {manifest.name}, batch {batch}, {len(ready)} rows"):
                interleave(ready, request.duration, request.seed, errors=WorkerError)
            timings |= group
    rows = {entry: timing.row(root, manifest, request, peaks) for entry, timing in timings.items()}
    for entry, baseline in plan.baselines.items():
        row, other = rows[entry], rows[baseline]
        row.against = f"{other.runner}, steps {other.workload.steps}"
        ratio = speedup(timings[baseline].walls, timings[entry].walls, request.seed)
        if row.timed and other.timed and ratio is not None:
            row.speedup, row.speedup_low, row.speedup_high = ratio
    return [rows[entry] for entry in plan.entries]


def measure_peaks(runners: Iterable[RunnerConfiguration], start: Start = Worker) -> Peaks:
    """The machine's matrix-product peaks for what runs on its CPU: the best of the installed engines.

    Each has a process of its own, because the libraries of several do not always go together.
    """
    rates: dict[tuple[int, str], list[Peak]] = {
        (runner.threads, runner.precision): [] for runner in runners if runner.device == "cpu"
    }
    for threads in sorted({threads for threads, _ in rates}):
        precisions = [precision for count, precision in rates if count == threads]
        with console.stage(f"measuring the machine, {threads} threads"):
            for engine in filter(find_spec, ENGINES):
                with start(threads) as worker:
                    for precision in precisions:
                        try:
                            rate: Peak = worker.call("rate", engine, precision, threads)
                        except WorkerError as error:
                            rate = f"{engine}: {error.message}"
                        rates[threads, precision].append(rate)
    return {key: best_of(values) for key, values in rates.items()}


def _judges(manifest: Manifest, plan: Plan, job_of: JobOf, start: Start) -> Mapping[Workload, Judge | str]:
    """Who judges each workload, or why nobody can: the float32 modules run it once in a worker."""
    judges: dict[Workload, Judge | str] = {}
    runner = RunnerConfiguration(REFERENCE, "fp32", max(entry.runner.threads for entry in plan.entries))
    workloads, job = dict.fromkeys(entry.workload for entry in plan.entries), job_of(runner)
    with console.stage("sampling from the reference"), start(runner.threads) as worker:
        try:
            worker.call("open", job)
        except WorkerError as error:
            return dict.fromkeys(workloads, _text(error))
        for workload in workloads:
            try:
                run: Run = worker.call("run", workload, True)
            except WorkerError as error:
                judges[workload] = _text(error)
                continue
            assert run.outputs is not None  # the first ones
            inputs = inputs_of(manifest, workload.batch, job.seed)
            judges[workload] = Judge(manifest, manifest.schedule(workload.steps), inputs, run.outputs)
    return judges


def _opened(job: Job, start: Start, stack: ExitStack) -> Opened:
    """The open workers of a runner, which the stack closes."""
    opened = Opened()
    with console.stage(f"opening {job.runner}", keep=False):
        try:
            for _ in range(job.runner.processes):
                opened.workers.append(stack.enter_context(start(job.runner.threads_each)))
                opened.version, opened.teacher = opened.workers[-1].call("open", job)
        except WorkerError as error:
            opened.error = _text(error)
            for worker in opened.workers:
                worker.close()
    return opened


def _fill_roofline(row: Row, root: Path, manifest: Manifest, peaks: Peaks) -> None:
    """The row's own rate, and its share of what this machine multiplies at its best in that precision."""
    runner, schedule = row.runner, manifest.schedule(row.workload.steps)
    row.flops = flops_of(root, manifest, schedule, None if runner.backend in IN_TORCH else runner.precision)
    if not peaks:  # nobody wants them
        return
    peak: Peak = "what was measured is the CPU's"
    if runner.device == "cpu":
        peak = peaks[runner.threads, runner.precision]
    if isinstance(peak, str):
        row.notes += (f"no share of the peak in {runner.precision}: {peak}",)
    elif row.images_per_s:
        row.peak_gflops = peak
        row.roofline = row.flops["total"] * row.images_per_s / (peak * 1e9)


def _text(error: WorkerError) -> str:
    return ". ".join(part for part in (error.message, error.hint) if part)


def _peak(runs: Sequence[Run]) -> float | None:
    """The memory of all processes together."""
    known = [run.peak_mib for run in runs if run.peak_mib is not None]
    return sum(known) if known else None
