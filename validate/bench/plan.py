"""What will be timed, and what cannot be here, each with its reason. Nothing is opened for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from ddexport.runtime.errors import BackendError, DDError
from ddexport.runtime.graphs import keys_of
from ddexport.runtime.machine import Machine
from ddexport.runtime.manifest import Manifest
from ddexport.runtime.options import MODES, Options
from ddexport.runtime.registry import plugins
from ddexport.runtime.selection import BACKENDS, Candidate, backend_class, candidates, choose
from ddexport.validate.bench.case import COMPILED, IN_TORCH, PUBLISHED, TORCH, Alternative, Case

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
USUAL = ("fp32", "bf16", "int8")  # tried where none is named, beside those of the bundle
OF_TORCH = {TORCH: ("fp32", "bf16"), COMPILED: ("fp32", "bf16"), PUBLISHED: ("fp32",)}
EXTRA = 'pip install "ddexport[validate]"'


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see its `--help`. Empty names mean all that there is."""

    bundles: tuple[Path, ...]
    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    steps: tuple[int | str, ...] = (1,)
    threads: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    processes: tuple[int, ...] = (1,)
    against: str | None = None
    against_steps: int | str | None = None
    against_precision: str = "fp32"
    warmup: int = 1
    duration: float = 2.0
    percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    seed: int = 0
    roofline: bool = True
    remember: bool = True
    files: Mapping[str, str | None] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True)
class Skipped:
    """What was asked for and cannot run here."""

    what: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """One row to be: an alternative on a case."""

    alternative: Alternative
    case: Case


@dataclass(frozen=True)
class Plan:
    """entries: in the order of the table. baselines: which entry each one is held against."""

    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]
    baselines: Mapping[Entry, Entry]


@dataclass(frozen=True)
class _Able:
    """An alternative that can run, and the precision of the graphs that it reads; None for PyTorch's."""

    alternative: Alternative
    graphs: str | None


def backend_names() -> list[str]:
    """Everything that `--backend` takes."""
    return [*plugins(BACKENDS), *IN_TORCH]


def make_plan(root: Path, manifest: Manifest, machine: Machine, request: Request) -> Plan:
    """Raises DDError for nothing but an unknown backend: what cannot run is listed."""
    skipped: list[Skipped] = []
    able = list(_alternatives(root, manifest, machine, request, skipped))
    entries: dict[Entry, None] = {}
    for case in _cases(request, request.steps):
        for one in able:
            _add(entries, one, case, manifest, skipped)
    baselines: dict[Entry, Entry] = {}
    if request.against is not None and entries:
        wanted = {entry: _baseline(entry, able, request) for entry in entries}
        for entry, (alternative, case) in wanted.items():
            there = Entry(alternative, case)
            if there not in entries:
                for one in _judged(alternative, root, manifest, machine, skipped, able):
                    _add(entries, one, case, manifest, skipped)
            if there in entries:
                baselines[entry] = baselines[there] = there
    ordered = sorted(entries, key=lambda entry: entry.case.order)  # stable: alternatives stay as asked for
    return Plan(tuple(ordered), _once(skipped), baselines)


def _cases(request: Request, steps: Iterable[int | str]) -> Iterator[Case]:
    return (Case(batch, each) for batch in request.batches for each in steps)


def _alternatives(
    root: Path, manifest: Manifest, machine: Machine, request: Request, skipped: list[Skipped]
) -> Iterator[_Able]:
    for backend in request.backends or plugins(BACKENDS):
        for threads in request.threads or (machine.cpu.cores,):
            for processes in request.processes:
                for precision in _precisions(backend, manifest, request):
                    for mode in _modes(backend, request, skipped):
                        wanted = Alternative(backend, precision, threads, mode, processes)
                        yield from _judged(wanted, root, manifest, machine, skipped)


def _precisions(backend: str, manifest: Manifest, request: Request) -> Iterable[str]:
    if request.precisions:
        return request.precisions
    return OF_TORCH.get(backend) or dict.fromkeys((*manifest.precisions, *USUAL))


def _modes(backend: str, request: Request, skipped: list[Skipped]) -> Iterator[str | None]:
    """The modes asked for. What has no modes is as fast as it can be at one batch: it has latency alone."""
    if not request.modes:
        yield None
        return
    has_modes = backend not in IN_TORCH and "mode" in backend_class(backend).accepts
    for mode in request.modes:
        if has_modes:
            yield mode
        elif mode == MODES[0]:
            yield None
        else:
            skipped.append(
                Skipped(f"{backend}, {mode}", "it has no modes; --processes N runs copies side by side")
            )


def _judged(
    wanted: Alternative,
    root: Path,
    manifest: Manifest,
    machine: Machine,
    skipped: list[Skipped],
    known: Iterable[_Able] = (),
) -> Iterator[_Able]:
    """The alternative if it can run, else the reason among the skipped."""
    for one in known:
        if one.alternative == wanted:
            yield one
            return
    if wanted.processes > wanted.threads:
        why = f"they need as many threads, not {wanted.threads}"
        skipped.append(Skipped(f"{wanted.processes} processes", why))
        return
    if wanted.backend in IN_TORCH:
        reason = torch_reason(wanted.backend, wanted.precision)
        graphs = None
    else:
        candidate, reason = _candidate(wanted, root, manifest, machine)
        graphs = candidate.reads if candidate is not None else None
    if reason:
        skipped.append(Skipped(f"{wanted.backend} {wanted.precision}", reason))
    else:
        yield _Able(wanted, graphs)


def _candidate(
    wanted: Alternative, root: Path, manifest: Manifest, machine: Machine
) -> tuple[Candidate | None, str]:
    """The candidate that `ddexport.runtime.load` will take, or why there is none."""
    if why := backend_class(wanted.backend).available():
        return None, why
    try:
        options = Options(threads=wanted.threads, mode=wanted.mode)
        if "threads" in backend_class(wanted.backend).refused(options):
            options = replace(options, threads=None)  # of a GPU: no processor's threads compute
        found = candidates(
            root,
            manifest,
            machine,
            backend=wanted.backend,
            precision=wanted.precision,
            options=options,
        )
    except DDError as error:
        return None, error.message
    chosen = choose(found, explicit=True, named=True)
    if chosen is None:
        # Where no GPU is to be used, why there is none is not what stands in the way.
        near = [each for each in found if each.on_cpu] or found
        reasons = dict.fromkeys(reason for each in near for reason in (*each.why_not, *each.doubts))
        return None, "; ".join(reasons) or "it cannot run here"
    if chosen.reads not in manifest.precisions:
        have = ", ".join(manifest.precisions)
        return None, f"the bundle has no graphs in {chosen.reads}: it has {have}"
    return chosen, ""


def torch_reason(backend: str, precision: str) -> str:
    """Why PyTorch cannot be timed that way; empty if it can."""
    missing = [name for name in ("torch", "safetensors", "yaml") if find_spec(name) is None]
    if missing:
        return f"it needs {', '.join(missing)}: {EXTRA}"
    if precision not in OF_TORCH[backend]:
        return f"{backend} computes in {' or '.join(OF_TORCH[backend])}"
    if backend == COMPILED and compiler() is None:
        return "torch.compile needs a C++ compiler: install g++ or clang++, or name one in CXX"
    return ""


def compiler() -> str | None:
    """The C++ compiler that torch.compile finds, if any."""
    names = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _add(
    entries: dict[Entry, None], one: _Able, case: Case, manifest: Manifest, skipped: list[Skipped]
) -> None:
    """The entry if the alternative can run the case, else the reason among the skipped."""
    reason = _case_reason(one, case, manifest)
    if reason:
        skipped.append(Skipped(f"{one.alternative.name}, steps {case.steps}", reason))
    else:
        entries[Entry(one.alternative, case)] = None


def _case_reason(one: _Able, case: Case, manifest: Manifest) -> str:
    try:
        schedule = manifest.schedule(case.steps)
    except DDError as error:
        return f"{error.message}; {error.hint}" if error.hint else error.message
    backend = one.alternative.backend
    if schedule.teacher is not None and backend in (COMPILED, PUBLISHED):
        return "the auto-regressive model in PyTorch is timed by --backend torch"
    if one.graphs is None:
        return ""
    have = {graph.key for graph in manifest.graphs if graph.precision == one.graphs}
    lacking = [key for key in keys_of(manifest, schedule) if key not in have]
    return f"the bundle has no {' and no '.join(lacking)} in {one.graphs}" if lacking else ""


def _baseline(entry: Entry, able: Iterable[_Able], request: Request) -> tuple[Alternative, Case]:
    """What an entry is held against: of the same batch and threads, and where it can be a row there is."""
    assert request.against is not None
    case, own = entry.case, entry.alternative
    if request.against_steps is not None:
        case = replace(case, steps=request.against_steps)
    for one in able:
        other = one.alternative
        if (other.backend, other.precision, other.threads, other.processes) == (
            request.against,
            request.against_precision,
            own.threads,
            1,
        ):
            return other, case
    return Alternative(request.against, request.against_precision, own.threads), case


def _once(skipped: Iterable[Skipped]) -> tuple[Skipped, ...]:
    """Each once; what one reason holds for is put together."""
    together: dict[str, dict[str, None]] = {}
    for one in skipped:
        together.setdefault(one.reason, {})[one.what] = None
    return tuple(Skipped("; ".join(names), reason) for reason, names in together.items())


def nothing_left(skipped: Iterable[Skipped]) -> BackendError:
    """The error when every alternative is skipped."""
    reasons = "; ".join(f"{one.what}: {one.reason}" for one in skipped)
    return BackendError(
        f"nothing that was asked for can be timed here: {reasons}", "ddexport doctor says what is installed."
    )
