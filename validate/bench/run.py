"""The benchmark of one bundle: workers, rounds, and what becomes of them: rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
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
from ddexport.validate.bench.roofline import ENGINES, PRECISIONS, Peak, Peaks, best_of, flops_of
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
        runner, workload = self.entry.runner, self.entry.workload
        row = Row(
            bundle=str(root),
            model=manifest.name,
            **asdict(runner),
            **asdict(workload),
            version=self.opened.version,
            machine=cpu().name,
            peak_mib=self.peak_mib,
            rounds=len(self.times),
            error=self.error,
        )
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
        if self.opened.teacher and manifest.schedule(workload.steps).teacher is not None:
            row.notes += (f"the teacher ran in {self.opened.teacher}",)
        _fill_roofline(row, root, manifest, peaks)
        return row


def run_bench(
    root: Path, manifest: Manifest, plan: Plan, request: Request, peaks: Peaks, start: Start = Worker
) -> list[Row]:
    """Times every entry of the plan and judges it. start: a worker in its process. Raises DDError.

    What goes wrong in a worker is told in its rows.
    """
    timings: dict[Entry, Timing] = {}
    with ExitStack() as stack:
        judges = _judges(root, manifest, plan, request, start)
        runners = dict.fromkeys(entry.runner for entry in plan.entries)
        opened = {runner: _opened(root, runner, request, start, stack) for runner in runners}
        for batch, entries in groupby(plan.entries, key=lambda entry: entry.workload.batch):
            group = {
                entry: Timing(entry=entry, opened=opened[entry.runner], judge=judges[entry.workload])
                for entry in entries
            }
            for entry, timing in group.items():
                with console.stage(f"preparing {entry.runner.name}, {entry.workload}", keep=False):
                    timing.prepare(request.warmup)
            ready = [timing for timing in group.values() if timing.error is None]
            with console.stage(f"timing {manifest.name}, batch {batch}, {len(ready)} rows"):
                interleave(ready, request.duration, request.seed, errors=WorkerError)
            timings |= group
    rows = {entry: timing.row(root, manifest, request, peaks) for entry, timing in timings.items()}
    for entry, baseline in plan.baselines.items():
        row, other = rows[entry], rows[baseline]
        row.against = f"{other.name}, steps {other.steps}"
        ratio = speedup(timings[baseline].walls, timings[entry].walls, request.seed)
        if row.timed and other.timed and ratio is not None:
            row.speedup, row.speedup_low, row.speedup_high = ratio
    return [rows[entry] for entry in plan.entries]


def measure_peaks(threads: Sequence[int], start: Start = Worker) -> dict[tuple[int, str], Peak]:
    """The machine's matrix-product peaks for each number of threads: the best of the installed engines.

    Each has a process of its own, because the libraries of several do not always go together.
    """
    best: dict[tuple[int, str], Peak] = {}
    for count in dict.fromkeys(threads):
        peaks: list[Peak] = []
        with console.stage(f"measuring the machine, {count} threads"):
            for engine in filter(find_spec, ENGINES):
                with start(count) as worker:
                    try:
                        peaks += worker.call("peaks", engine, count)
                    except WorkerError as error:
                        text = f"{engine}: {error.message}"
                        peaks += [Peak(precision, None, engine, text) for precision in PRECISIONS]
        best |= {(count, precision): best_of(peaks, precision) for precision in PRECISIONS}
    return best


def _job(root: Path, runner: RunnerConfiguration, request: Request) -> Job:
    return Job(root, runner, request.seed, request.files, request.weights)


def _judges(
    root: Path, manifest: Manifest, plan: Plan, request: Request, start: Start
) -> Mapping[Workload, Judge | str]:
    """Who judges each workload, or why nobody can: the float32 modules run it once, then their worker ends."""
    judges: dict[Workload, Judge | str] = {}
    runner = RunnerConfiguration(REFERENCE, "fp32", max(entry.runner.threads for entry in plan.entries))
    workloads = dict.fromkeys(entry.workload for entry in plan.entries)
    with console.stage("sampling from the reference"), start(runner.threads) as worker:
        try:
            worker.call("open", _job(root, runner, request))
        except WorkerError as error:
            return dict.fromkeys(workloads, _text(error))
        for workload in workloads:
            try:
                run: Run = worker.call("run", workload, True)
            except WorkerError as error:
                judges[workload] = _text(error)
                continue
            assert run.outputs is not None  # the first ones
            given = inputs_of(manifest, workload.batch, request.seed)
            judges[workload] = Judge(manifest, manifest.schedule(workload.steps), given, run.outputs)
    return judges


def _opened(
    root: Path, runner: RunnerConfiguration, request: Request, start: Start, stack: ExitStack
) -> Opened:
    """The open workers of a runner, which the stack closes."""
    opened = Opened()
    with console.stage(f"opening {runner.name}", keep=False):
        try:
            for _ in range(runner.processes):
                opened.workers.append(stack.enter_context(start(runner.threads_each)))
                job = _job(root, runner, request)
                opened.version, opened.teacher = opened.workers[-1].call("open", job)
        except WorkerError as error:
            opened.error = _text(error)
            for worker in opened.workers:
                worker.close()
    return opened


def _fill_roofline(row: Row, root: Path, manifest: Manifest, peaks: Peaks) -> None:
    """The row's own rate, and its share of what this machine multiplies at its best in that precision."""
    own = None if row.backend in IN_TORCH else row.precision
    row.flops = flops_of(root, manifest, manifest.schedule(row.steps), own)
    if not peaks:  # nobody wants them
        return
    peak = peaks.get((row.threads, row.precision))
    if row.device != "cpu":
        row.notes += ("no share of the peak: what was measured is the CPU's",)
    elif peak is None or not peak.gflops:
        obstacle = peak.obstacle if peak is not None else "it is not measured"
        row.notes += (f"no share of the peak in {row.precision}: {obstacle}",)
    elif row.images_per_s:
        row.peak_gflops = peak.gflops
        row.roofline = row.flops["total"] * row.images_per_s / (peak.gflops * 1e9)


def _text(error: WorkerError) -> str:
    return ". ".join(part for part in (error.message, error.hint) if part)


def _peak(runs: Sequence[Run]) -> float | None:
    """The memory of all processes together."""
    known = [run.peak_mib for run in runs if run.peak_mib is not None]
    return sum(known) if known else None
