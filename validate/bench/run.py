"""The benchmark of one bundle: workers, rounds, and what becomes of them: rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from ddexport.runtime import console
from ddexport.runtime.manifest import Manifest
from ddexport.runtime.registry import plugins
from ddexport.runtime.selection import BACKENDS
from ddexport.validate.bench.agreement import Agreement, Judge, worst_of
from ddexport.validate.bench.case import IN_TORCH, PEAK, REFERENCE, Alternative, Case, Job, Times, inputs
from ddexport.validate.bench.figures import PARTS, part_ms, percentiles, speedup
from ddexport.validate.bench.outputs import Outputs
from ddexport.validate.bench.peak import ENGINES, PRECISIONS, Peak, best_of
from ddexport.validate.bench.plan import Entry, Plan, Request
from ddexport.validate.bench.processes import Gang, Worker, WorkerError
from ddexport.validate.bench.rounds import LONG, Contender, Sample, interleave, least_rounds
from ddexport.validate.bench.rows import Row
from ddexport.validate.bench.work import flops_of

Start = Callable[[Job], Worker]
Peaks = Mapping[tuple[int, str], Peak]
"""By threads and precision."""


@dataclass(kw_only=True)
class Entrant(Contender):
    """An entry while it is timed: who draws it, and what came of it so far."""

    entry: Entry
    gang: Gang
    hello: dict[str, Any]
    peak_mib: float | None
    files: list[Path] = field(default_factory=list)

    def draw(self) -> Sample:
        """One timed run. Raises WorkerError."""
        case = self.entry.case
        replies = self.gang.ask({"do": "run", "batch": case.batch, "steps": case.steps, "keep": True})
        self.files += [Path(reply["file"]) for reply in replies if reply["file"]]
        if self.peak_mib is None:
            self.peak_mib = _sum(reply["peak"] for reply in replies)
        return slowest(replies)


def slowest(replies: Sequence[Mapping[str, Any]]) -> Sample:
    """What processes that worked side by side took: until the last one was done."""
    times = max((Times(**reply["times"]) for reply in replies), key=lambda one: one.total)
    return Sample(times, times.total)


def run_bench(
    root: Path,
    manifest: Manifest,
    plan: Plan,
    request: Request,
    peaks: Peaks,
    machine: str,
    start: Start = Worker,
) -> list[Row]:
    """Times every entry of the plan and judges it. start: a worker in its process. Raises DDError.

    What goes wrong in a worker is told in its rows.
    """
    with tempfile.TemporaryDirectory(prefix="ddexport-bench-") as folder, ExitStack() as stack:
        make = partial(_job, root=root, request=request, folder=Path(folder))
        judges = _references(manifest, plan, request, partial(_opened, start, make))
        gangs = {one: _gang(one, stack, start, make) for one in _alternatives(plan)}
        rows: dict[Entry, Row] = {}
        walls: dict[Entry, dict[int, float]] = {}
        for batch in dict.fromkeys(entry.case.batch for entry in plan.entries):
            group = [entry for entry in plan.entries if entry.case.batch == batch]
            blank = partial(_blank, root, manifest, machine)
            entrants = []
            for entry in group:
                found = _prepared(entry, gangs[entry.alternative], request)
                if isinstance(found, str):
                    rows[entry] = blank(entry, error=found)
                else:
                    entrants.append(found)
            with console.stage(f"timing {manifest.name}, batch {batch}, {len(entrants)} rows"):
                interleave(entrants, request.duration, request.seed, errors=WorkerError)
            for one in entrants:
                row = blank(one.entry)
                rows[one.entry] = row
                _fill(row, one, request)
                if row.error is None:
                    _fill_parity(row, _judged(one, judges.get(one.entry.case)))
                    _fill_roofline(row, root, manifest, peaks)
                images = batch * one.entry.alternative.processes
                walls[one.entry] = {k: s.wall / images for k, s in one.samples.items()}
        _fill_ratios(rows, walls, plan, request.seed)
    return [rows[entry] for entry in plan.entries]


def measure_peaks(threads: Sequence[int], start: Start = Worker) -> dict[tuple[int, str], Peak]:
    """The machine's matrix-product peaks for each number of threads: the best of the installed engines."""
    best: dict[tuple[int, str], Peak] = {}
    for count in dict.fromkeys(threads):
        found: list[Peak] = []
        with console.stage(f"measuring the machine, {count} threads"):
            for engine in ENGINES:
                if find_spec(engine) is None:
                    continue
                with start(Job("", PEAK, engine, count, None, 0, "", {})) as worker:
                    try:
                        worker.ready()
                        found += [Peak(**one) for one in worker.ask({"do": "peak"})["peaks"]]
                    except WorkerError as error:
                        why = f"{engine}: {error.message}"
                        found += [Peak(precision, None, engine, why) for precision in PRECISIONS]
        best |= {(count, precision): best_of(found, precision) for precision in PRECISIONS}
    return best


def _job(alternative: Alternative, number: int, *, root: Path, request: Request, folder: Path) -> Job:
    own = folder / f"{alternative.name.replace(', ', '-').replace(' ', '-')}-{alternative.threads}-{number}"
    own.mkdir(exist_ok=True)
    return Job(
        str(root),
        alternative.backend,
        alternative.precision,
        alternative.threads_each,
        alternative.mode,
        request.seed,
        str(own),
        dict(request.files),
        request.weights,
    )


def _alternatives(plan: Plan) -> list[Alternative]:
    return list(dict.fromkeys(entry.alternative for entry in plan.entries))


@contextmanager
def _opened(start: Start, make: Callable[..., Job], alternative: Alternative) -> Iterator[Worker]:
    with start(make(alternative, 0)) as worker:
        yield worker


def _references(
    manifest: Manifest, plan: Plan, request: Request, opened: Callable[[Alternative], Any]
) -> dict[Case, Judge | str]:
    """Who judges each case, or why nobody can: the float32 modules draw it once, then their worker ends."""
    judges: dict[Case, Judge | str] = {}
    cases = list(dict.fromkeys(entry.case for entry in plan.entries))
    threads = max(entry.alternative.threads for entry in plan.entries)
    with (
        console.stage("drawing the reference"),
        opened(Alternative(REFERENCE, "fp32", threads)) as worker,
    ):
        for case in cases:
            try:
                worker.ready()
                reply = worker.ask({"do": "run", "batch": case.batch, "steps": case.steps, "keep": True})
            except WorkerError as error:
                judges[case] = _words(error)
                continue
            file, given = Path(reply["file"]), inputs(manifest, case.batch, request.seed)
            judges[case] = Judge(manifest, manifest.schedule(case.steps), given, Outputs.read(file), file)
    return judges


def _gang(alternative: Alternative, stack: ExitStack, start: Start, make: Callable[..., Job]) -> Gang | str:
    """The open workers of an alternative, or why it cannot be opened."""
    gang = stack.enter_context(Gang([]))  # known to the stack before there is a process in it
    with console.stage(f"opening {alternative.name}", keep=False):
        try:
            for number in range(alternative.processes):
                gang.workers.append(start(make(alternative, number)))
                gang.workers[-1].ready()
        except WorkerError as error:
            gang.close()
            return _words(error)
    return gang


def _prepared(entry: Entry, gang: Gang | str, request: Request) -> Entrant | str:
    """The entrant after its first run and its warm-up, or why it cannot run.

    Entries are prepared from the smallest on, so that the memory that is read here is that of what is open by
    then, and no more.
    """
    if isinstance(gang, str):
        return gang
    case, peak = entry.case, None
    asked = {"batch": case.batch, "steps": case.steps}
    with console.stage(f"preparing {entry.alternative.name}, {case.name}", keep=False):
        try:
            first = slowest(gang.ask({"do": "prepare", **asked})).wall
            for _ in range(request.warmup if first < LONG else 0):
                peak = _sum(reply["peak"] for reply in gang.ask({"do": "run", **asked}))
        except WorkerError as error:
            return _words(error)
    least = least_rounds(case.by_teacher, first)
    return Entrant(least=least, entry=entry, gang=gang, hello=gang.ready(), peak_mib=peak)


def _blank(root: Path, manifest: Manifest, machine: str, entry: Entry, error: str | None = None) -> Row:
    one, case = entry.alternative, entry.case
    return Row(
        bundle=str(root),
        model=manifest.name,
        backend=one.backend,
        precision=one.precision,
        batch=case.batch,
        steps=case.steps,
        threads=one.threads,
        mode=one.mode,
        processes=one.processes,
        machine=machine,
        error=error,
    )


def _fill(row: Row, entrant: Entrant, request: Request) -> None:
    """Times, memory and what computed them."""
    row.error, row.version = entrant.error, entrant.hello["version"]
    row.provider, row.peak_mib = entrant.hello["provider"], entrant.peak_mib
    samples = entrant.samples
    row.rounds = len(samples)
    if not samples or row.error is not None:
        return
    for part in PARTS:
        times = part_ms(samples, part)
        if any(times):
            setattr(row, f"{part}_ms", median(times))
            row.percentiles[part] = percentiles(times, request.percentiles)
    wall = median(sample.wall for sample in samples.values())
    row.images_per_s = row.batch * row.processes / wall


def _judged(entrant: Entrant, judge: Judge | str | None) -> Agreement:
    """Parity of every different output of the timed runs."""
    if not isinstance(judge, Judge):
        return Agreement(notes=(f"not compared: {judge}",))
    precision, decoded = entrant.entry.alternative.precision, None
    found = [Outputs.read(path) for path in entrant.files]
    if all(judge.fits(one) and not judge.comparable(one).any() for one in found):
        try:
            reply = entrant.gang.workers[0].ask({"do": "decode", "file": str(judge.file)})
            decoded = np.load(reply["file"], allow_pickle=False)
        except WorkerError as error:
            return Agreement(passed=False, faults=(error.message,))
    return worst_of([judge.judge(one, precision, decoded) for one in found])


def _fill_parity(row: Row, found: Agreement) -> None:
    row.tokens_equal, row.embedding_error = found.tokens_equal, found.embedding_error
    row.image_psnr, row.image_max = found.image_psnr, found.image_max
    row.passed, row.faults, row.notes = found.passed, list(found.faults), list(found.notes)


def _fill_roofline(row: Row, root: Path, manifest: Manifest, peaks: Peaks) -> None:
    """The row's own rate, and its share of what this machine multiplies at its best in that precision."""
    own = None if row.backend in IN_TORCH else row.precision
    row.flops = flops_of(root, manifest, manifest.schedule(row.steps), own)
    if not peaks:  # nobody wants them
        return
    peak = peaks.get((row.threads, row.precision))
    if row.provider not in (None, "cpu") or row.backend == "tensorrt":
        row.notes.append("no share of the peak: what was measured is the processor's")
    elif peak is None or not peak.gflops:
        why = peak.why if peak is not None else "it is not measured"
        row.notes.append(f"no share of the peak in {row.precision}: {why}")
    elif row.images_per_s:
        row.peak_gflops = peak.gflops
        row.roofline = row.flops["total"] * row.images_per_s / (peak.gflops * 1e9)


def _fill_ratios(
    rows: Mapping[Entry, Row], walls: Mapping[Entry, Mapping[int, float]], plan: Plan, seed: int
) -> None:
    for entry, baseline in plan.baselines.items():
        row, other = rows[entry], rows[baseline]
        row.against = f"{other.name}, steps {other.steps}"
        if row.timed and other.timed:
            ratio = speedup(walls[baseline], walls[entry], seed)
            if ratio is not None:
                row.speedup, row.speedup_low, row.speedup_high = ratio.value, ratio.low, ratio.high


def _words(error: WorkerError) -> str:
    return ". ".join(part for part in (error.message, error.hint) if part)


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(sum(known)) if known else None


def is_of_runtime(row: Row) -> bool:
    """Whether a backend of the runtime was timed, one process of it."""
    return row.backend in plugins(BACKENDS) and row.processes == 1
