"""How much arithmetic an image takes: the graphs of a schedule, counted, as often as they are run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ddexport.runtime.graphs import keys_of, student_key
from ddexport.runtime.manifest import Manifest, Schedule

from ddexport.graph.flops import count


def flops_of(
    root: Path, manifest: Manifest, schedule: Schedule, precision: str | None = None
) -> dict[str, float]:
    """Operations of one image by part, and in all. Raises CountError.

    precision: of the graphs to count; the bundle's first where it is None, or has no graphs of its own. A
    teacher's products with its cache count the whole length of the cache, as the graph computes them.
    """
    have = {graph.key for graph in manifest.graphs if graph.precision == precision}
    if not have.issuperset(keys_of(manifest, schedule)):
        precision = None
    parts: dict[str, float] = {}
    if schedule.known:
        graph = manifest.graph("student", precision, schedule.split)
        assert graph.key == student_key(manifest, schedule)
        parts["student"] = len(schedule.known) * _flops(root / graph.file, (("batch", 1),))
    span, teacher = schedule.teacher, manifest.teacher
    if span is not None and teacher is not None:
        file, filled, total = root / manifest.graph("teacher", precision).file, 0, 0
        for _, end in teacher.steps(span):
            total += _flops(file, (("batch", 1), ("new", end - filled), ("capacity", span.end)))
            filled = end
        parts["teacher"] = total
    parts["decoder"] = _flops(root / manifest.graph("decoder", precision).file, (("batch", 1),))
    return {**parts, "total": sum(parts.values())}


@cache
def _flops(file: Path, sizes: tuple[tuple[str, int], ...]) -> int:
    found: int = count(file, dict(sizes)).flops
    return found
