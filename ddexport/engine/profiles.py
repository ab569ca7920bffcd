"""The sizes that an engine is built for: the batches asked for, and what else a teacher's passes have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from statistics import median_high

from ddexport.runtime.contract import BATCH, TEACHER, dynamic_sizes
from ddexport.runtime.engines import Profile, SizeRange
from ddexport.runtime.manifest import Graph, Manifest
from ddexport.runtime.schedules import Span, Teacher


def profiles_for(graph: Graph, manifest: Manifest, batches: tuple[Profile, ...]) -> tuple[Profile, ...]:
    """The profiles of a graph: `batches`, with a range for every dynamic dimension that is not the batch.

    Raises KeyError for one that the runtime's loop does not know (runtime/teacher.py).
    """
    names = [name for name in dynamic_sizes(graph.inputs) if name != BATCH]
    if not names or manifest.teacher is None:
        return batches
    known = {each.name: each for each in pass_sizes(manifest, manifest.teacher)}
    others = tuple(known[name] for name in names)
    return tuple(dataclasses.replace(batch, others=others) for batch in batches)


def pass_sizes(manifest: Manifest, teacher: Teacher) -> tuple[SizeRange, SizeRange]:
    """`new` and `capacity` of every pass that a request can ask for, the typical one of each the median of
    all passes of all schedules.

    The capacity is the end of a span. A pass has the positions of an AR step; the first one also carries the
    prefix, which a request may move to any start of its span.
    """
    spans = {manifest.schedule(steps).teacher for steps in (*manifest.schedules, TEACHER)}
    found = [span for span in spans if span is not None]
    passes = [(new, span.end) for span in found for new in _passes(teacher, span)]
    new, capacity = zip(*passes, strict=True)
    last = max(span.end for span in found)  # the prefix and the last AR step in one pass
    return (
        SizeRange("new", min(new), median_high(new), last),
        SizeRange("capacity", min(capacity), median_high(capacity), max(capacity)),
    )


def _passes(teacher: Teacher, span: Span) -> Iterator[int]:
    """How many positions each pass of a span has."""
    for number, (start, end) in enumerate(teacher.steps(span)):
        yield end if number == 0 else end - start
