"""What a benchmark tells `--backend auto`: times and verdicts of the runtime's backends, in the bundle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ddexport.runtime.machine import Machine
from ddexport.runtime.manifest import Manifest
from ddexport.runtime.measured import Measured, engine_version, write_measured
from ddexport.runtime.registry import plugins
from ddexport.runtime.selection import BACKENDS, candidates, choose, explain
from ddexport.validate.bench.rows import Row


def records(rows: Iterable[Row], machine: Machine) -> list[Measured]:
    """One for each row of a runtime backend that was timed and judged; copies side by side are left out."""
    known = plugins(BACKENDS)
    found = []
    for row in rows:
        if row.backend not in known or row.processes > 1 or not row.timed or row.passed is None:
            continue
        assert row.total_ms is not None
        found.append(
            Measured(
                backend=row.backend,
                version=engine_version(row.backend, machine) or row.version,
                precision=row.precision,
                threads=row.threads,
                mode=row.mode,
                steps=row.steps,
                batch=row.batch,
                total_ms=row.total_ms,
                passed=row.passed,
                why=row.faults[0] if row.faults else "",
                provider=row.provider,
            )
        )
    return found


def remember(root: Path, manifest: Manifest, machine: Machine, rows: Iterable[Row]) -> Path | None:
    """Writes the records into the bundle; None if there are none or it cannot be written to."""
    found = records(rows, machine)
    return write_measured(root, manifest, machine, found) if found else None


def what_auto_takes(root: Path, manifest: Manifest, machine: Machine) -> str:
    """For people: the way that `--backend auto` takes now, and why."""
    found = candidates(root, manifest, machine)
    chosen = choose(found, explicit=False)
    if chosen is None:
        return "auto finds nothing that can run it here"
    return f"auto takes {chosen.name}: {explain(chosen, found)}"
