"""How a bundle draws: student steps, and spans in which the teacher draws instead. Format: docs/bundle.md."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ddexport.runtime.contract import FileInfo
from ddexport.runtime.errors import ScheduleError

Steps = TypeVar("Steps", int, str)
GUIDANCES = ("rising", "constant")
SHOWN_STARTS = 20


@dataclass(frozen=True)
class Span:
    """The positions from `start` to `end` (not included) that the teacher draws."""

    start: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """For each student step the number of leading positions that hold data.

    split: positions before it are codebook entries; None is the manifest's own. teacher: what the teacher
    draws, before the last student step, or to the end where it is the last of all.
    """

    known: tuple[int, ...]
    split: int | None = None
    teacher: Span | None = None

    @property
    def before(self) -> tuple[int, ...]:
        """The `known` numbers of the student steps before the teacher's, or of all where it draws nothing."""
        if self.teacher is None:
            return self.known
        return self.known[: 1 if self.teacher.start else 0]

    @property
    def after(self) -> tuple[int, ...]:
        """The `known` numbers of the student steps after the teacher's."""
        return self.known[len(self.before) :]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The auto-regressive model in a bundle, and how its tokens are chosen unless a request says otherwise.

    starts: where its AR steps start, and the length. layers, heads, head_width: of its key-value cache.
    guidance: `rising` from 0 in the first AR step to `cfg` in the last one, or `constant` at `cfg` - 1.
    top_k, top_p, temperature: which tokens can be drawn. codebook: npy, float32 (V, Cv).
    """

    starts: tuple[int, ...]
    layers: int
    heads: int
    head_width: int
    guidance: str
    cfg: float
    top_k: int
    top_p: float
    temperature: float
    codebook: FileInfo

    def steps(self, span: Span) -> list[tuple[int, int]]:
        """The AR steps of a span, each by its first position and the one after its last."""
        inside = [start for start in self.starts if span.start <= start <= span.end]
        return list(itertools.pairwise(inside))

    def strength(self, start: int, cfg: float) -> float:
        """The g of logits c + g (c - u) in the AR step that starts at position `start`.

        Source: VAR (arXiv 2404.02905) counts from no guidance and lets it rise with the scale; LlamaGen
        (arXiv 2406.06525) calls no guidance 1.
        """
        if self.guidance == "constant":
            return max(cfg - 1.0, 0.0)
        return cfg * self.starts.index(start) / max(len(self.starts) - 2, 1)


def by_student_alone(schedules: Mapping[Steps, Schedule], split: int) -> dict[Steps, tuple[int, ...]]:
    """The `known` numbers of the schedules that involve neither a teacher nor another split than `split`."""
    return {
        steps: schedule.known
        for steps, schedule in schedules.items()
        if schedule.teacher is None and schedule.split in (None, split)
    }


def moved(schedule: Schedule, teacher: Teacher | None, start: int) -> Schedule:
    """The schedule with a teacher that starts at another position. Raises ScheduleError if it cannot."""
    span = schedule.teacher
    if span is None or teacher is None:
        raise ScheduleError("teacher_start is for schedules that involve the teacher", "Choose other steps.")
    starts = [number for number in teacher.starts if number < span.end]
    if start not in starts:
        have = ", ".join(map(str, starts)) if len(starts) <= SHOWN_STARTS else f"0 to {starts[-1]}"
        raise ScheduleError(f"the teacher cannot start at position {start}", f"It can start at: {have}.")
    before = (0,) if start else ()
    return Schedule(before + schedule.after, schedule.split, Span(start, span.end))


def number_of_steps(schedule: Schedule, teacher: Teacher | None) -> int:
    """How many steps a schedule has, student steps and AR steps together."""
    drawn = len(teacher.steps(schedule.teacher)) if teacher and schedule.teacher else 0
    return len(schedule.known) + drawn


def contradiction(steps: int, schedule: Schedule, length: int, teacher: Teacher | None) -> str | None:
    """What is wrong with a schedule that is said to have so many steps, as `.key must ...`; else None."""
    if schedule.split is not None and not 1 <= schedule.split <= length:
        return f".split must be from 1 to {length}, but is {schedule.split}"
    if schedule.teacher is not None:
        return _span_contradiction(steps, schedule.known, schedule.teacher, length, teacher)
    known = schedule.known
    rising = all(before < after for before, after in itertools.pairwise(known))
    if len(known) != steps or known[:1] != (0,) or not rising or known[-1] >= length:
        return f".known must be {steps} rising numbers from 0 to below {length}, but is {list(known)}"
    return None


def _span_contradiction(
    steps: int, known: tuple[int, ...], span: Span, length: int, teacher: Teacher | None
) -> str | None:
    if teacher is None:
        return " involves a teacher, and the bundle has none"
    if not (span.start < span.end and {span.start, span.end} <= set(teacher.starts)):
        return f".teacher must go from one AR step's start to a later one's, not {span.start} to {span.end}"
    wanted = ((0,) if span.start else ()) + ((span.end,) if span.end < length else ())
    if known != wanted:
        return f".known must be {list(wanted)} around that teacher, but is {list(known)}"
    found = len(known) + len(teacher.steps(span))
    return None if found == steps else f" has {found} steps"


def teacher_contradiction(teacher: Teacher, length: int) -> str | None:
    """What is wrong with the teacher of a bundle of so many positions, as `.key must ...`; else None."""
    starts = teacher.starts
    rising = all(before < after for before, after in itertools.pairwise(starts))
    if starts[:1] != (0,) or starts[-1:] != (length,) or not rising:
        return f".starts must rise from 0 to {length}, but is {list(starts)}"
    for key in ("layers", "heads", "head_width", "top_k"):
        if getattr(teacher, key) < 1:
            return f".{key} must be at least 1, but is {getattr(teacher, key)}"
    if teacher.guidance not in GUIDANCES:
        return f".guidance is {teacher.guidance!r}, not one of {', '.join(GUIDANCES)}"
    if teacher.cfg < 0 or not 0 < teacher.top_p <= 1 or teacher.temperature <= 0:
        return " must have cfg of at least 0, top_p above 0 and at most 1, and a temperature above 0"
    return None
