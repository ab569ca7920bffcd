"""Which engine runs a bundle on this machine, in which precision, and why not another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddexport.runtime.errors import BackendError, BundleError
from ddexport.runtime.manifest import Manifest
from ddexport.runtime.measured import Measured, common_setting, read_measured, times_of
from ddexport.runtime.options import Options
from ddexport.runtime.registry import load_plugin, plugins

if TYPE_CHECKING:
    from ddexport.runtime.backends._base import Backend
    from ddexport.runtime.machine import Machine

BACKENDS = "ddexport.runtime.backends"
AUTO = "auto"
FAILED = "measured here: "  # how a reason begins that was found by measuring
NEED_PROOF = ("bf16", "int8")
"""Precisions in which each CPU, and each engine, rounds in its own way."""


@dataclass(frozen=True)
class Candidate:
    """A way to run a bundle.

    options: as asked for, with what the backend would choose for itself, such as the provider. speed: the
    order of preference, the largest first. why_not: what stands in the way; empty if nothing. doubts: what is
    outside the engine's promises, though it may work: `auto` keeps clear of it, an explicit choice is warned.
    remedy: what to do about it. graphs: the precision of the graphs it reads, where it is not `precision`.
    on_cpu: ranked among the ways on the CPU, by what was measured here. unproven: what is not known of its
    outputs, or known to be bad: `auto` keeps clear of it unless the precision is named. total_ms: measured
    here, None if it was not.
    """

    backend: str
    precision: str
    options: Options
    speed: int
    why_not: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    remedy: str = ""
    graphs: str | None = None
    on_cpu: bool = False
    unproven: tuple[str, ...] = ()
    total_ms: float | None = None

    @property
    def name(self) -> str:
        """For people: `onnxruntime, cuda, fp32`."""
        return ", ".join(part for part in (self.backend, self.options.provider, self.precision) if part)

    @property
    def reasons(self) -> str:
        return "; ".join((*self.why_not, *self.doubts, *self.unproven))

    @property
    def runs_on_cpu(self) -> bool:
        return self.on_cpu and not self.why_not

    @property
    def failed(self) -> bool:
        """Whether its outputs were measured here and missed the bundle's limits."""
        return any(why.startswith(FAILED) for why in self.unproven)

    @property
    def computes(self) -> bool:
        """Whether it can compute in a precision that is not that of its graphs."""
        return self.graphs is not None and not self.why_not

    @property
    def reads(self) -> str:
        """The precision of the graphs that it reads."""
        return self.graphs or self.precision


def backend_class(name: str) -> type[Backend]:
    """The engine of that name. Raises BackendError, which lists those there are."""
    engine: type[Backend] = load_plugin(BACKENDS, name, kind="backend", error=BackendError).ENGINE
    return engine


def candidates(
    root: Path,
    manifest: Manifest,
    machine: Machine,
    *,
    backend: str = AUTO,
    precision: str | None = None,
    options: Options | None = None,
) -> list[Candidate]:
    """Every way to run the bundle that the arguments leave open, the most preferred first, with reasons.

    Depends on nothing but its arguments and the files of the bundle. Raises BackendError for an unknown
    backend and for an option that a named backend does not have.
    """
    options = options or Options()
    found: list[Candidate] = []
    for name in plugins(BACKENDS) if backend == AUTO else [backend]:
        engine = backend_class(name)
        refused = engine.refused(options)
        if not refused:
            found += engine.candidates(root, manifest, machine, options, precision)
        elif backend != AUTO:
            raise BackendError(f"backend {name} has no option {', '.join(refused)}", engine.option_list())
        else:
            why = f"has no option {', '.join(refused)}"
            found.append(Candidate(name, precision or manifest.precisions[0], Options(), -1, (why,)))
    records = read_measured(root, manifest, machine)
    return ranked(found, manifest, records, options, machine.cpu.cores)


def ranked(
    found: Iterable[Candidate],
    manifest: Manifest,
    records: Sequence[Measured],
    asked: Options,
    cores: int,
) -> list[Candidate]:
    """The most preferred first: by speed, and those on the CPU among themselves by what was measured here.

    Of these, first what met its limits, by its time; then what needs no proof; then what has none; and last
    what failed. asked: the options as the user gave them. cores: of this machine.
    """
    judged = [_judged(each, manifest, records) for each in found]
    tables = [
        times_of(records, each.backend, each.precision, each.options, cores) if each.runs_on_cpu else {}
        for each in judged
    ]
    setting = common_setting(tables, asked, cores)
    if setting is not None:
        timed = zip(judged, tables, strict=True)
        judged = [replace(each, total_ms=table.get(setting)) for each, table in timed]
    block = max((each.speed for each in judged if each.on_cpu), default=0)

    def key(each: Candidate) -> tuple[float, ...]:
        if not each.on_cpu:
            return (-each.speed,)
        if each.unproven:
            return (-block, 3 if each.failed else 2, 0.0, -each.speed)
        return (-block, each.total_ms is None, each.total_ms or 0.0, -each.speed)

    return sorted(judged, key=key)


def _judged(candidate: Candidate, manifest: Manifest, records: Sequence[Measured]) -> Candidate:
    """With what was measured of its outputs on this CPU."""
    if not candidate.runs_on_cpu:
        return candidate
    mine = [each for each in records if each.is_of(candidate.backend, candidate.precision, candidate.options)]
    if bad := [each.why or "its outputs miss the bundle's limits" for each in mine if not each.passed]:
        return replace(candidate, unproven=(f"{FAILED}{bad[0]}",))
    precision = candidate.precision
    needs = precision in NEED_PROOF or candidate.reads != precision
    if not needs or (candidate.reads == precision == manifest.precisions[0]):
        return candidate
    if precision not in manifest.parity:
        return replace(candidate, unproven=(f"the bundle states no limits for {precision}",))
    if not mine:
        why = "its parity on this CPU is not measured yet: ddexport bench BUNDLE"
        return replace(candidate, unproven=(why,))
    return candidate


def choose(found: Sequence[Candidate], *, explicit: bool, named: bool = False) -> Candidate | None:
    """The first that can run. explicit: the user has named the backend, so that doubts do not hinder.

    named: the user has named the precision, so that what is not known of it does not hinder, where nothing
    else can run it.
    """
    able = [each for each in found if not each.why_not and (explicit or not each.doubts)]
    proven = [each for each in able if not each.unproven]
    return next(iter(proven or (able if explicit or named else ())), None)


def explain(chosen: Candidate, found: Sequence[Candidate]) -> str:
    """Why `auto` takes this one, in a sentence."""
    if not chosen.on_cpu:
        return "an engine of the GPU that fits this machine"
    rivals = [each for each in found if each.runs_on_cpu]
    if chosen.total_ms is not None:
        return f"the fastest that met the bundle's limits here: {chosen.total_ms:.3g} ms"
    if any(each.total_ms is not None or each.unproven for each in rivals):
        return "the first that needs no proof; ddexport bench BUNDLE measures the others"
    return "the first that can run; ddexport bench BUNDLE measures which is fastest"


def no_such_precision(
    manifest: Manifest, precision: str, found: Sequence[Candidate], others: Sequence[Candidate]
) -> BundleError:
    """The error for a precision that the bundle lacks and no engine computes in here.

    found: the ways to run it in that precision. others: those in any precision.
    """
    able = dict.fromkeys(f"{each.precision} ({each.backend})" for each in others if each.computes)
    more = f" From these graphs engines can also compute in: {', '.join(able)}." if able else ""
    for each in found:
        if each.graphs and each.graphs in manifest.precisions:
            more += f" {each.name}: {each.reasons}."
    return BundleError(
        f"bundle {manifest.name} has no student in precision {precision}",
        f"It has: {', '.join(manifest.precisions)}.{more}",
    )


def nothing_fits(found: Sequence[Candidate], backend: str, manifest: Manifest) -> BackendError:
    """The error when none can run: all reasons, and what to do."""
    reasons = "; ".join(f"{each.name}: {each.reasons}" for each in found)
    who = "no engine here can" if backend == AUTO else f"backend {backend} cannot"
    remedies = dict.fromkeys(each.remedy for each in found if each.remedy)
    return BackendError(f"{who} run {manifest.name}: {reasons}", " Or: ".join(remedies))
