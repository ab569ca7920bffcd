"""The schedules of a manifest: which positions hold data in each step, and what the teacher generates."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ddexport.runtime.errors import ScheduleError
from ddexport.runtime.records import Natural, Positive, Record

if TYPE_CHECKING:
    from ddexport.runtime.bundle import Teacher

SHOWN_STARTS = 20


class Span(Record, frozen=True, kw_only=True):
    """The positions from `start` to `end` (not included) that the teacher generates."""

    start: Natural
    end: Natural


class Schedule(Record, frozen=True, kw_only=True):
    """For each student step `known`, the number of leading positions that hold data and pass through.

    split: positions before it are codebook entries; None is the manifest's own. teacher: what the teacher
    generates, before the last student step, or to the end where it is the last of all.
    """

    known: tuple[Natural, ...]
    split: Positive | None = None
    teacher: Span | None = None

    def with_teacher_start(self, teacher: Teacher | None, start: int) -> Schedule:
        """The schedule with a teacher that starts at another position. Raises ScheduleError if it cannot."""
        if self.teacher is None or teacher is None:
            raise ScheduleError("teacher_start needs a schedule that uses the teacher", "Choose other steps.")
        starts = [number for number in teacher.starts if number < self.teacher.end]
        if start not in starts:
            have = ", ".join(map(str, starts)) if len(starts) <= SHOWN_STARTS else f"0 to {starts[-1]}"
            raise ScheduleError(f"the teacher cannot start at position {start}", f"It can start at: {have}.")
        after = self.known[-1:] if self.teacher.end in self.known else ()
        span = Span(start=start, end=self.teacher.end)
        return Schedule(known=((0,) if start else ()) + after, split=self.split, teacher=span)


def schedule_fault(steps: int, schedule: Schedule, length: int, starts: tuple[int, ...] | None) -> str:
    """What is wrong with a schedule that is said to have so many steps, as `.key must ...`; "" if nothing.

    starts: where the teacher's AR steps start, and the length; () without a teacher, None if not known yet.
    """
    known, split, span = schedule.known, schedule.split, schedule.teacher
    if split is not None and not 1 <= split <= length:
        return f".split must be from 1 to {length}, but is {split}"
    if span is None:
        whole = len(known) == steps and known[:1] == (0,) and rises(known) and known[-1] < length
        rule = f".known must be {steps} rising numbers from 0 to below {length}, but is {list(known)}"
        return "" if whole else rule
    if starts == ():
        return " involves a teacher, and there is none"
    ends = {span.start, span.end}
    if not (span.start < span.end <= length and (starts is None or ends <= set(starts))):
        return f".teacher must go from one AR step's start to a later one's, not {span.start} to {span.end}"
    wanted = ((0,) if span.start else ()) + ((span.end,) if span.end < length else ())
    if known != wanted:
        return f".known must be {list(wanted)} around that teacher, but is {list(known)}"
    count = len(known) + starts.index(span.end) - starts.index(span.start) if starts else steps
    return "" if count == steps else f" has {count} steps: call it {count}"


def rises(numbers: tuple[int, ...]) -> bool:
    return all(before < after for before, after in itertools.pairwise(numbers))
