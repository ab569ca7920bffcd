"""What will be timed, what cannot run here and why, and what is missing. Nothing is opened for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ddexport.recipe import FILE_OPTIONS
from ddexport.runtime import backends
from ddexport.runtime.backends import CPU, Configuration
from ddexport.runtime.bundle import ENCODER, FULL, TEACHER, Manifest
from ddexport.runtime.errors import DDError
from ddexport.runtime.machine import cpu, gpu_fault
from ddexport.runtime.registry import plugins

EAGER, COMPILED, NAIVE = "torch-eager", "torch-compile", "naive"
IN_TORCH = (EAGER, COMPILED, NAIVE)
# What PyTorch computes in; float16 on a CPU is emulated, and its int8 is torchao's, which has to be compiled.
ON_CPU = {EAGER: ("fp32", "bf16"), COMPILED: ("fp32", "bf16", "int8"), NAIVE: ("fp32",)}
ON_GPU = {EAGER: ("fp32", "fp16", "bf16"), COMPILED: ("fp32", "fp16", "bf16"), NAIVE: ()}
BF16 = frozenset(["avx512_bf16", "amx_bf16", "bf16"])  # of a CPU that multiplies in it
TORCH = "torch"  # of --against: the faster of `torch-eager` and `torch-compile` in the precision of a row
RIVALS = {TORCH: (EAGER, COMPILED)}
PACKAGES = ("torch", "safetensors", "yaml", "onnx")
Steps = int | str  # of a schedule, or "teacher": all tokens from the auto-regressive model


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see its `--help`. Empty names mean all that there is."""

    bundles: tuple[Path, ...]
    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    device: str | None = None
    batches: tuple[int, ...] = (1,)
    steps: tuple[Steps, ...] = (1,)
    threads: tuple[int, ...] = ()
    against: str | None = None
    against_steps: Steps | None = None
    against_precision: str | None = None
    warmup: int = 1
    duration: float = 2.0
    seed: int = 0
    roofline: bool = True
    files: Mapping[str, Path | None] = field(default_factory=dict)
    weights: str | None = None
    decoders: tuple[str, ...] = (FULL,)


@dataclass(frozen=True)
class Entry:
    """A row to be: an engine in one configuration, threads of the CPU, images at once, steps and decoder."""

    configuration: Configuration
    threads: int
    batch: int
    steps: Steps
    decoder: str = FULL

    @property
    def work(self) -> tuple[int, Steps, str]:
        """What a session draws."""
        return self.batch, self.steps, self.decoder

    @property
    def runner(self) -> tuple[Configuration, int]:
        """What gets a process of its own."""
        return self.configuration, self.threads


@dataclass(frozen=True)
class Plan:
    """entries: in the order of the table. baselines: those of a row, of which the fastest counts. skipped:
    what cannot run here, and why. missing: what has to be there before anything can be measured."""

    entries: tuple[Entry, ...]
    baselines: Mapping[Entry, tuple[Entry, ...]]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]


def backend_names() -> list[str]:
    """Everything that `--backend` takes."""
    return [*plugins(backends.__name__), *IN_TORCH]


def default_backends() -> list[str]:
    """Timed unless names are given: the engines, and both PyTorch ways that they are compared with."""
    return [*plugins(backends.__name__), *RIVALS[TORCH]]


def make_plan(root: Path, manifest: Manifest, request: Request, packages: tuple[str, ...] = PACKAGES) -> Plan:
    """packages: that are needed. Raises BackendError for an unknown device, BundleError for a decoder."""
    for decoder in request.decoders:
        manifest.decoder(decoder)
    missing = dict.fromkeys(f"the package {name}" for name in packages if find_spec(name) is None)
    skipped: dict[str, None] = {}

    def entry(
        backend: str, precision: str, threads: int, batch: int, steps: Steps, decoder: str, device: str | None
    ) -> Entry | None:
        chosen = configuration_of(root, manifest, backend, precision, device)
        unfit = _unfit(manifest, chosen, steps)
        named = (*request.backends, *RIVALS.get(request.against or "", (request.against,)))
        if backend in named and chosen.obstacle.startswith("missing: "):
            missing[chosen.obstacle.removeprefix("missing: ")] = None
        elif chosen.obstacle:
            skipped[f"{backend} {precision}: {chosen.obstacle.removeprefix('missing: ')}"] = None
        elif unfit:
            skipped[f"{backend} {precision}, steps {steps}: {unfit}"] = None
        return None if chosen.obstacle or unfit else Entry(chosen, threads, batch, steps, decoder)

    def rivals(one: Entry) -> Iterator[Entry]:
        """What a row is compared with: the same work, in its own precision unless another is named."""
        own, device = one.configuration.precision, one.configuration.device
        for backend in RIVALS.get(request.against or TORCH, (request.against or "",)):
            able = _torch_precisions(backend, device)
            precision = request.against_precision or (able[0] if len(able) == 1 else own)
            if request.against is None and backend not in timed:
                continue
            if able and precision not in able and request.against_precision is None:
                continue  # PyTorch has no such precision
            steps = request.against_steps or one.steps
            rival = entry(backend, precision, one.threads, one.batch, steps, one.decoder, device)
            if rival is not None and (request.against or rival in entries):
                yield rival

    timed = request.backends or default_backends()
    usual = dict.fromkeys((*manifest.precisions, "fp32", "bf16", "int8"))
    asked = [
        entry(backend, precision, threads, batch, steps, decoder, request.device)
        for batch in sorted(request.batches)
        for steps in request.steps or ((1,) if manifest.schedules else (TEACHER,))
        for backend in timed
        for threads in request.threads or (cpu().cores,)
        for precision in request.precisions or _torch_precisions(backend, request.device) or usual
        for decoder in request.decoders
    ]
    entries = dict.fromkeys(one for one in asked if one)
    entries |= dict.fromkeys(rival for one in list(entries) for rival in rivals(one))
    baselines = {one: own for one in entries if (own := tuple(rivals(one)))}
    by_teacher = any(manifest.schedule(one.steps).teacher for one in entries)
    missing |= dict.fromkeys(missing_files(manifest, request.files, by_teacher))
    ordered = sorted(entries, key=lambda one: one.batch)  # baselines stand behind the others
    return Plan(tuple(ordered), baselines, tuple(skipped), tuple(missing))


def configuration_of(
    root: Path, manifest: Manifest, backend: str, precision: str, device: str | None
) -> Configuration:
    """The one that `runtime.load` takes; where none can run, with what stands in the way."""
    if backend in IN_TORCH:
        graphs = precision if precision in manifest.precisions else manifest.precisions[0]
        place = device or ("cpu" if gpu_fault(0) else "cuda:0")
        obstacle = _torch_obstacle(backend, precision, place)
        if backend == NAIVE and manifest.text:
            obstacle = "there is no naive sampler of texts"
        return Configuration(backend, place, precision, graphs, CPU, obstacle)
    options = backends.configurations(root, manifest, backend, precision, device)
    for option in options:
        if not option.obstacle:
            return option
    # Where no GPU is to be used, why there is none is not what stands in the way.
    near = [option for option in options if option.device == "cpu"] or options
    obstacle = "; ".join(dict.fromkeys(option.obstacle for option in near)) or f"it does not run on {device}"
    mark = "missing: " if "is not installed" in obstacle else ""
    return Configuration(backend, device or "cpu", precision, precision, CPU, mark + obstacle)


def _torch_precisions(backend: str, device: str | None) -> tuple[str, ...]:
    """What a PyTorch way computes in on a device; () of an engine."""
    return (ON_GPU if (device or "cpu").startswith("cuda") else ON_CPU).get(backend, ())


def _torch_obstacle(backend: str, precision: str, device: str) -> str:
    able, on_cpu = _torch_precisions(backend, device), device == "cpu"
    if precision not in able:
        return f"{backend} computes in {' or '.join(able)}" if able else f"{backend} runs on the CPU alone"
    if not on_cpu:
        return gpu_fault(Configuration(backend, device, precision, precision, CPU).gpu)
    if precision == "bf16" and cpu().flags and not cpu().flags & BF16:
        return "this CPU has no bf16 arithmetic: PyTorch would emulate it, more slowly than fp32"
    if precision == "int8" and find_spec("torchao") is None:
        return "missing: torchao, PyTorch's library of int8 models: pip install torchao"
    if backend == COMPILED and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))):
        return "missing: a C++ compiler for torch-compile: g++, clang++, or the one that CXX names"
    return ""


def _unfit(manifest: Manifest, configuration: Configuration, steps: Steps) -> str:
    """Why a configuration cannot run a schedule; "" if it can."""
    try:
        schedule = manifest.schedule(steps)
        if schedule.known and not configuration.obstacle:
            manifest.graph("student", configuration.graphs, schedule.split)
    except DDError as error:
        return f"{error.message}. {error.hint}"
    if schedule.teacher is not None and configuration.backend in (COMPILED, NAIVE):
        return f"the auto-regressive model in PyTorch is timed by --backend {EAGER}"
    return ""


def missing_files(manifest: Manifest, files: Mapping[str, Path | None], by_teacher: bool) -> Iterator[str]:
    """The published files of a bundle that are not given, not there, or not those that it was made from."""
    from ddexport.families._weight_file import fingerprint
    from ddexport.recipe import recipe_of

    for source in manifest.weights.files if manifest.weights.kind == "checkpoint" else ():
        path, option = files.get(source.role), FILE_OPTIONS[source.role]
        part = recipe_of(manifest).files.get(source.role)
        embedded = part.embedded if part else ""
        if source.role == ENCODER or (source.role == "teacher" and not by_teacher):
            continue
        if path is None:
            if not source.repository and source.file != embedded:
                yield f"{option} {source.file}, which {manifest.name} was made from"
        elif not path.exists():
            yield f"{option}: there is no file {path}"
        elif fingerprint(path)[0] != source.sha256:
            yield f"{option}: {path} is not the {source.file} that {manifest.name} was made from"
