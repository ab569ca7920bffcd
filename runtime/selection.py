"""Which engine runs a bundle on this machine, in which precision, and why not another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import BackendError
from runtime.manifest import Manifest
from runtime.options import Options
from runtime.registry import load_plugin, plugins

if TYPE_CHECKING:
    from runtime.backends._base import Backend
    from runtime.machine import Machine

BACKENDS = "runtime.backends"
AUTO = "auto"


@dataclass(frozen=True)
class Candidate:
    """A way to run a bundle.

    options: as asked for, with what the backend would choose for itself, such as the provider. speed: the
    order of preference, the largest first. why_not: what stands in the way; empty if nothing. doubts: what is
    outside the engine's promises, though it may work: `auto` keeps clear of it, an explicit choice is warned.
    remedy: what to do about it.
    """

    backend: str
    precision: str
    options: Options
    speed: int
    why_not: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def name(self) -> str:
        """For people: `onnxruntime, cuda, fp32`."""
        return ", ".join(part for part in (self.backend, self.options.provider, self.precision) if part)

    @property
    def reasons(self) -> str:
        return "; ".join((*self.why_not, *self.doubts))


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
    return sorted(found, key=lambda candidate: -candidate.speed)


def choose(found: Sequence[Candidate], *, explicit: bool) -> Candidate | None:
    """The first that can run. explicit: the user has named the backend, so that doubts do not hinder."""
    for candidate in found:
        if not candidate.why_not and (explicit or not candidate.doubts):
            return candidate
    return None


def nothing_fits(found: Sequence[Candidate], backend: str, manifest: Manifest) -> BackendError:
    """The error when none can run: all reasons, and what to do."""
    reasons = "; ".join(f"{each.name}: {each.reasons}" for each in found)
    who = "no engine here can" if backend == AUTO else f"backend {backend} cannot"
    remedies = dict.fromkeys(each.remedy for each in found if each.remedy)
    return BackendError(f"{who} run {manifest.name}: {reasons}", " Or: ".join(remedies))
