"""Whether a built engine runs on this machine: all that does not fit, and the command that rebuilds."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddexport.runtime.engines import DEFAULT_TARGET, Engine, Found, find_engines, graph_digest
from ddexport.runtime.errors import BundleError
from ddexport.runtime.machine import Gpu, Machine
from ddexport.runtime.manifest import Graph

DEFAULT_CAPABILITIES = ((8, 0), (8, 6), (8, 9))
DEFAULT_FROM = (12, 0)
RTX_TARGETS = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
"""NVIDIA's support matrix of TensorRT-RTX: what the default engine runs on, and what can be named."""
HOPPER = (9, 0)
HARDWARE_FROM = {"ampere+": (8, 0)}
"""What full TensorRT's hardware compatibility levels reach to; the others stay with the targets."""
PRECISION_ORDER = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Fit:
    """misfits: why the engine cannot run here, and another one could. lacking: what the machine has not, for
    any engine. doubts: what its maker does not promise. notes: worth knowing."""

    misfits: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def obstacles(self) -> tuple[str, ...]:
        return (*self.misfits, *self.lacking)

    def __add__(self, other: Fit) -> Fit:
        """Both, each text once."""
        return Fit(
            *(
                tuple(dict.fromkeys((*getattr(self, field.name), *getattr(other, field.name))))
                for field in dataclasses.fields(Fit)
            )
        )


@dataclass(frozen=True)
class Build:
    """The engines of one folder in one precision, by role."""

    folder: str
    precision: str
    engines: Mapping[str, Found]

    @property
    def any_engine(self) -> Engine:
        return next(iter(self.engines.values())).engine


def builds(root: Path) -> tuple[list[Build], list[BundleError]]:
    """The bundle's engines by folder and precision, the fastest precision first, and what cannot be read."""
    found, errors = find_engines(root)
    groups: dict[tuple[str, str], dict[str, Found]] = {}
    for each in found:
        roles = groups.setdefault((each.folder, each.engine.precision), {})
        if each.engine.role in roles:
            where = each.sidecar.relative_to(root).as_posix()
            errors.append(BundleError(f"{where} is a second {each.engine.role} of its folder", "Remove one."))
            continue
        roles[each.engine.role] = each
    made = [Build(folder, precision, roles) for (folder, precision), roles in groups.items()]
    return sorted(made, key=lambda build: (precision_rank(build.precision), build.folder)), errors


def precision_rank(precision: str) -> int:
    """The place of a precision among those of engines, the fastest first."""
    return PRECISION_ORDER.index(precision) if precision in PRECISION_ORDER else len(PRECISION_ORDER)


def fit(build: Build, graphs: Mapping[str, Graph], machine: Machine, device: int = 0) -> Fit:
    """Holds a build against the bundle's graphs and the machine; all it finds, not the first only.

    graphs: one for each role that is wanted, in the build's precision. The contents of the plans are not
    read here: their SHA-256 is compared with what is loaded, when it is loaded.
    """
    result = Fit()
    for role, graph in graphs.items():
        if role not in build.engines:
            result += Fit((f"there is no {role} engine",))
        else:
            result += _against_graph(build.engines[role], graph)
    for engine in (found.engine for found in build.engines.values()):
        result += _against_packages(engine, machine) + _against_gpu(engine, machine, device)
    return result


def rebuild_command(
    root: Path, build: Build | None, machine: Machine, device: int = 0, precision: str = PRECISION_ORDER[0]
) -> str:
    """The command that makes engines for this machine, like those of `build` where there is one."""
    gpu = machine.gpus[device] if device < len(machine.gpus) else None
    words = ["ddexport", "trt", str(root), "--backend", _backend_for(build, gpu)]
    words += ["--precision", build.precision if build else precision]
    profiles = build.any_engine.profiles if build else ()
    for profile in profiles:
        words += ["--batch", profile.batch.replace("/", ",")]
    if not profiles:
        words += ["--batch", "1,4,8"]
    if gpu and words[4] == "tensorrt-rtx" and not runs_default(gpu.capability):
        words += ["--compute-capability", gpu.target]
    return shlex.join(words)


def runs_default(capability: tuple[int, int]) -> bool:
    """Whether a TensorRT-RTX engine without named targets is made for GPUs of this capability."""
    return capability in DEFAULT_CAPABILITIES or capability >= DEFAULT_FROM


def _backend_for(build: Build | None, gpu: Gpu | None) -> str:
    if gpu and gpu.capability not in RTX_TARGETS and not runs_default(gpu.capability):
        return "tensorrt"  # TensorRT-RTX has no engine for it
    return build.any_engine.backend if build else "tensorrt-rtx"


def _against_graph(found: Found, graph: Graph) -> Fit:
    engine = found.engine
    wrong = []
    if engine.source != graph_digest(graph):
        wrong.append(f"{found.plan.name} was built from another {graph.file}")
    if (engine.inputs, engine.outputs) != (graph.inputs, graph.outputs):
        wrong.append(f"{found.plan.name} has other inputs or outputs than {graph.file}")
    if engine.options.get("strip_plan"):
        wrong.append(f"{found.plan.name} was built without its weights, which this runtime cannot put back")
    if not found.plan.is_file():
        wrong.append(f"{found.plan.name} is missing")
    elif (size := found.plan.stat().st_size) != engine.bytes:
        wrong.append(f"{found.plan.name} has {size} bytes, but its sidecar says {engine.bytes}")
    return Fit(tuple(wrong))


def _against_packages(engine: Engine, machine: Machine) -> Fit:
    misfits, lacking = [], []
    if engine.platform != machine.platform:
        misfits.append(f"it was built for {engine.platform}, and this is {machine.platform}")
    here = machine.engine_packages[engine.backend]
    if here.problem:
        lacking.append(here.problem)
    elif not _version_fits(engine, here.version or ""):
        misfits.append(f"it was built with {engine.backend} {engine.version}, and here is {here.version}")
    if machine.bindings.problem:
        lacking.append(machine.bindings.problem)
    lacking += machine.cuda_troubles(engine.backend)
    return Fit(tuple(misfits), tuple(lacking))


def _version_fits(engine: Engine, here: str) -> bool:
    if here == engine.version:
        return True
    # Version-compatible engines of full TensorRT run on later releases of the same major version.
    return (
        engine.backend == "tensorrt"
        and engine.version_compatible
        and _major(here) == _major(engine.version)
        and _numbers(here) > _numbers(engine.version)
    )


def _against_gpu(engine: Engine, machine: Machine, device: int) -> Fit:
    if device >= len(machine.gpus):
        why = machine.cuda_problem or f"there is no device {device}, but {len(machine.gpus)} in all"
        return Fit(lacking=(why,))
    gpu = machine.gpus[device]
    here = f"{gpu.name} has {gpu.target}"
    reach = _reach(engine)
    if not reach.holds(gpu.capability):
        if engine.backend == "tensorrt-rtx" and DEFAULT_TARGET in engine.targets and gpu.capability == HOPPER:
            return Fit(doubts=(f"{here}, which is outside NVIDIA's support matrix of TensorRT-RTX",))
        return Fit(misfits=(f"it was built for {reach}, and {here}",))
    notes = []
    made_on, driver = (engine.made_with.get(key) for key in ("name", "driver"))
    if engine.backend == "tensorrt" and isinstance(made_on, str) and made_on != gpu.name:
        notes.append(f"it was tuned on {made_on}, and here is {gpu.name}: it may run slower than it could")
    if isinstance(driver, str) and machine.cuda and machine.cuda < _numbers(driver):
        supported = ".".join(map(str, machine.cuda))
        notes.append(f"it was built with a driver for CUDA {driver}, and this one supports {supported}")
    return Fit(notes=tuple(notes))


@dataclass(frozen=True)
class _Reach:
    """The capabilities an engine runs on: those named, and all from `lowest` on."""

    named: tuple[str, ...]
    lowest: tuple[int, int] | None

    def holds(self, capability: tuple[int, int]) -> bool:
        return _target(capability) in self.named or (self.lowest is not None and capability >= self.lowest)

    def __str__(self) -> str:
        later = f" and {_target(self.lowest)} or later" if self.lowest else ""
        return (", ".join(self.named) + later).removeprefix(" and ")


def _reach(engine: Engine) -> _Reach:
    if engine.backend == "tensorrt-rtx" and DEFAULT_TARGET in engine.targets:
        return _Reach(tuple(map(_target, DEFAULT_CAPABILITIES)), DEFAULT_FROM)
    if engine.hardware in HARDWARE_FROM:
        return _Reach((), HARDWARE_FROM[engine.hardware])
    return _Reach(engine.targets, None)


def _target(capability: tuple[int, int]) -> str:
    return f"sm{capability[0]}{capability[1]}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _major(version: str | None) -> int | None:
    return next(iter(_numbers(version or "")), None)
