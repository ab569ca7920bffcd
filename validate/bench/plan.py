"""What will be timed, and what cannot be here, each with its reason. Nothing is opened for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from ddexport.runtime import backends
from ddexport.runtime.bundle import Manifest
from ddexport.runtime.errors import DDError
from ddexport.runtime.machine import cpu
from ddexport.runtime.registry import plugins
from ddexport.validate.bench.workload import (
    COMPILED,
    IN_TORCH,
    PUBLISHED,
    TORCH,
    RunnerConfiguration,
    Workload,
)

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
    device: str | None = None
    batches: tuple[int, ...] = (1,)
    steps: tuple[int | str, ...] = (1,)
    threads: tuple[int, ...] = ()
    processes: tuple[int, ...] = (1,)
    against: str | None = None
    against_steps: int | str | None = None
    against_precision: str = "fp32"
    warmup: int = 1
    duration: float = 2.0
    percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    seed: int = 0
    roofline: bool = True
    save: bool = False
    files: Mapping[str, Path | None] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True)
class Entry:
    """One row to be."""

    runner: RunnerConfiguration
    workload: Workload


@dataclass(frozen=True)
class Plan:
    """entries: in the order of the table. skipped: what cannot run here, and why. baselines: which entry each
    one is held against."""

    entries: tuple[Entry, ...]
    skipped: tuple[str, ...]
    baselines: Mapping[Entry, Entry]


def backend_names() -> list[str]:
    """Everything that `--backend` takes."""
    return [*plugins(backends.__name__), *IN_TORCH]


def make_plan(root: Path, manifest: Manifest, request: Request) -> Plan:
    """Raises BackendError for an unknown backend or device: what cannot run is listed."""
    planner = _Planner(root, manifest, request)
    usual = dict.fromkeys((*manifest.precisions, *USUAL))
    wanted = [
        planner.runner(backend, precision, threads, processes)
        for backend in request.backends or plugins(backends.__name__)
        for threads in request.threads or (cpu().cores,)
        for processes in request.processes
        for precision in request.precisions or OF_TORCH.get(backend) or usual
    ]
    workloads = [Workload(batch, steps) for batch in request.batches for steps in request.steps]
    planned = [planner.entry(runner, workload) for workload in workloads for runner in wanted]
    entries = dict.fromkeys(entry for entry in planned if entry is not None)
    baselines: dict[Entry, Entry] = {}
    for entry in list(entries) if request.against is not None else ():
        baseline = planner.baseline(entry)
        if baseline is not None:
            entries[baseline] = None
            baselines[entry] = baselines[baseline] = baseline
    ordered = sorted(entries, key=lambda entry: entry.workload.order)  # stable: runners stay as asked for
    skipped = tuple(f"{'; '.join(names)}: {reason}" for reason, names in planner.skipped.items())
    return Plan(tuple(ordered), skipped, baselines)


class _Planner:
    """Decides what can run. skipped: what cannot, by its reason."""

    def __init__(self, root: Path, manifest: Manifest, request: Request) -> None:
        self.root, self.manifest, self.request = root, manifest, request
        self.skipped: dict[str, dict[str, None]] = {}
        # By runner, the precision of the graphs that it reads; None for PyTorch's.
        self._graphs: dict[RunnerConfiguration, str | None] = {}

    def runner(
        self, backend: str, precision: str, threads: int, processes: int = 1
    ) -> RunnerConfiguration | None:
        """The runner if it can run, else None."""
        if processes > threads:
            self._skip(f"{processes} processes", f"they need as many threads, not {threads}")
            return None
        runner, graphs = RunnerConfiguration(backend, precision, threads, processes=processes), None
        if backend in IN_TORCH:
            obstacle = torch_obstacle(backend, precision, self.request.device)
        else:
            chosen, obstacle = self._configuration(backend, precision)
            if chosen is not None:
                runner, graphs = replace(runner, device=chosen.device), chosen.graphs
        if obstacle:
            self._skip(str(runner), obstacle)
            return None
        self._graphs[runner] = graphs
        return runner

    def entry(self, runner: RunnerConfiguration | None, workload: Workload) -> Entry | None:
        """The entry if the runner can run the workload, else None."""
        if runner is None:
            return None
        obstacle, graphs = "", self._graphs[runner]
        try:
            schedule = self.manifest.schedule(workload.steps)
            if schedule.teacher is not None and runner.backend in (COMPILED, PUBLISHED):
                obstacle = "the auto-regressive model in PyTorch is timed by --backend torch"
            if schedule.known and graphs is not None:
                self.manifest.graph("student", graphs, schedule.split)
        except DDError as error:
            obstacle = f"{error.message}. {error.hint}"
        if obstacle:
            self._skip(f"{runner}, steps {workload.steps}", obstacle)
        return None if obstacle else Entry(runner, workload)

    def baseline(self, entry: Entry) -> Entry | None:
        """What an entry is held against: of the same batch and threads."""
        request, workload = self.request, entry.workload
        assert request.against is not None
        runner = self.runner(request.against, request.against_precision, entry.runner.threads)
        return self.entry(runner, replace(workload, steps=request.against_steps or workload.steps))

    def _configuration(self, backend: str, precision: str) -> tuple[backends.Configuration | None, str]:
        """The configuration that `ddexport.runtime.load` takes, or None and what stands in the way."""
        device = self.request.device
        options = backends.configurations(self.root, self.manifest, backend, precision, device)
        for configuration in options:
            if not configuration.obstacle:
                return configuration, ""
        # Where no GPU is to be used, why there is none is not what stands in the way.
        near = [configuration for configuration in options if configuration.device == "cpu"] or options
        obstacles = dict.fromkeys(configuration.obstacle for configuration in near)
        return None, "; ".join(obstacles) or f"it does not run on {device}"

    def _skip(self, what: str, reason: str) -> None:
        self.skipped.setdefault(reason, {})[what] = None


def torch_obstacle(backend: str, precision: str, device: str | None = None) -> str:
    """What keeps PyTorch from being timed; "" if nothing."""
    missing = [name for name in ("torch", "safetensors", "yaml") if find_spec(name) is None]
    if missing:
        return f"it needs {', '.join(missing)}: {EXTRA}"
    if device not in (None, "cpu"):
        return "PyTorch is timed on the CPU alone"
    if precision not in OF_TORCH[backend]:
        return f"{backend} computes in {' or '.join(OF_TORCH[backend])}"
    if backend == COMPILED and compiler() is None:
        return "torch.compile needs a C++ compiler: install g++ or clang++, or name one in CXX"
    return ""


def compiler() -> str | None:
    """The C++ compiler that torch.compile finds, if any."""
    names = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)
