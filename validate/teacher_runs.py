"""Schedules that involve a teacher, run by a bundle and its reference, and lined up for the metrics.

As in `validate.harness`: the teacher is held to the limits on the same tokens, those that the reference drew;
the student step behind it on the same codes; end to end each side draws for itself by the same numbers. Both
sides are driven by the runtime's own loop (`runtime.teacher`), so that what is compared are the graphs. That
the loop is right is shown by the golden cases and by tests without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.graphs import keys_of, student_key
from runtime.manifest import Manifest, Schedule, Teacher
from runtime.noise import uniform_numbers
from runtime.sampler import Step, TeacherRun, sample
from runtime.teacher import Choice, Pick, Sampling, by_stream, choice_of, read_codebook
from validate.metrics._base import (
    Comparison,
    FloatArray,
    ImagePair,
    IntArray,
    StudentOutput,
    StudentPair,
    TeacherPair,
)

if TYPE_CHECKING:
    from validate.harness import Request

Arrays = Mapping[str, npt.NDArray[Any]]


class Graphs(Protocol):
    """One side: runs a graph of the bundle, or the module that it was made from, by the graph's key."""

    def run(self, key: str, feeds: Arrays) -> Arrays:
        """Named arrays as `runtime.contract` has them."""


@dataclass(frozen=True)
class TeacherRequest:
    """What is drawn: labels (N,), noise (N, L, Cv), uniforms (N, L), by these schedules, in such batches."""

    manifest: Manifest
    labels: IntArray
    noise: FloatArray
    uniforms: npt.NDArray[np.float64]
    codebook: FloatArray
    schedules: Mapping[str, Schedule]
    choice: Choice
    batch: int
    places: tuple[str, ...]

    @property
    def teacher(self) -> Teacher:
        assert self.manifest.teacher is not None  # or there would be no schedules
        return self.manifest.teacher

    @property
    def numbers(self) -> list[int]:
        """The numbers of steps of the schedules."""
        return [self.manifest.number_of_steps(schedule) for schedule in self.schedules.values()]

    @property
    def work(self) -> int:
        """How many rows are run, for a progress bar."""
        return sum(3 * steps * len(self.labels) + 3 * len(self.labels) + steps for steps in self.numbers)


class WatchedGraphs:
    """Graphs that say how many rows they have run."""

    def __init__(self, graphs: Graphs, advance: Callable[[int], None]) -> None:
        self._graphs, self._advance = graphs, advance

    def run(self, key: str, feeds: Arrays) -> Arrays:
        """As the graphs'."""
        found = self._graphs.run(key, feeds)
        self._advance(len(next(iter(feeds.values()))))
        return found


def teacher_request(
    root: Path, manifest: Manifest, precision: str, seed: int, request: Request
) -> TeacherRequest | None:
    """The same images as in `request`, by the schedules with a teacher that the precision has graphs for.

    None without one. Raises BundleError for a damaged codebook.
    """
    keys = {graph.key for graph in manifest.graphs if graph.precision == precision}
    schedules = {
        name: schedule
        for name, schedule in teacher_schedules(manifest).items()
        if keys.issuperset(keys_of(manifest, schedule))
    }
    if not schedules or manifest.teacher is None:
        return None
    choice = choice_of(schedules["teacher"], manifest.teacher, Sampling())
    assert choice is not None  # the schedule has a teacher
    count, length = len(request.labels), manifest.sequence.length
    return TeacherRequest(
        manifest,
        request.labels,
        request.noise,
        uniform_numbers(seed, range(count), length),
        read_codebook(root, manifest),
        schedules,
        choice,
        request.batch,
        request.places,
    )


def teacher_schedules(manifest: Manifest) -> dict[str, Schedule]:
    """The schedules with a teacher by name, the whole teacher last; none if the bundle has none."""
    if manifest.teacher is None:
        return {}
    found = {str(steps): schedule for steps, schedule in sorted(manifest.schedules.items())}
    found = {name: schedule for name, schedule in found.items() if schedule.teacher is not None}
    return {**found, "teacher": manifest.schedule("teacher")}


def compare_teachers(bundle: Graphs, reference: Graphs, request: TeacherRequest) -> Comparison:
    """Runs every schedule of the request on both sides."""
    students: list[StudentPair] = []
    images: list[ImagePair] = []
    teachers: list[TeacherPair] = []
    for name, schedule in request.schedules.items():
        title = "teacher alone" if name == "teacher" else f"{name} steps"
        expected = _Run.of(reference, request, schedule)
        same = _Run.of(bundle, request, schedule, forced=expected)
        own = _Run.of(bundle, request, schedule)
        students += _student_pairs(title, request, schedule, expected, same)
        teachers += _teacher_pairs(title, request, schedule, expected, same, bundle)
        students_pair, images_pairs = _end_to_end(title, request, expected, own, bundle, reference)
        students.append(students_pair)
        images += images_pairs
    return Comparison(students, images, teachers)


@dataclass(frozen=True)
class _Run:
    """A schedule as one side ran it: its steps, the student's logits of each, and the teacher's."""

    steps: list[Step]
    students: list[StudentOutput]
    guided: FloatArray  # (N, end - start, V)

    @classmethod
    def of(
        cls, graphs: Graphs, request: TeacherRequest, schedule: Schedule, forced: _Run | None = None
    ) -> _Run:
        """All images, in batches. forced: where every step starts from what that run kept."""
        size, count = request.batch, len(request.labels)
        parts = [
            _run_batch(graphs, request, schedule, slice(start, start + size), forced)
            for start in range(0, count, size)
        ]
        return cls(
            [
                Step(
                    np.concatenate([step.tokens for step in same]),
                    np.concatenate([step.sequence for step in same]),
                    same[0].role,
                )
                for same in zip(*(part.steps for part in parts), strict=True)
            ],
            [
                StudentOutput.concatenate(same)
                for same in zip(*(part.students for part in parts), strict=True)
            ],
            np.concatenate([part.guided for part in parts]),
        )

    @property
    def drawn(self) -> IntArray:
        """The teacher's tokens (N, end), prefix included."""
        return next(step.tokens for step in self.steps if step.role == "teacher")


def _run_batch(
    graphs: Graphs, request: TeacherRequest, schedule: Schedule, rows: slice, forced: _Run | None
) -> _Run:
    outputs: list[StudentOutput] = []
    guided: list[FloatArray] = []
    given = None if forced is None else forced.drawn[rows]

    def student(feeds: Arrays) -> Arrays:
        found = graphs.run(student_key(request.manifest, schedule), feeds)
        outputs.append(StudentOutput(found["sequence"], found["logits"]))
        if forced is None:
            return found
        kept = forced.students[len(outputs) - 1].rows(rows)
        return {"sequence": kept.sequence, "logits": kept.logits}

    pick = _recorded(guided, by_stream(request.uniforms[rows], request.choice), given)
    run = partial(graphs.run, "teacher")
    teacher = TeacherRun(run, request.teacher, request.codebook, request.choice.cfg, pick)
    steps = sample(student, request.noise[rows], request.labels[rows], schedule, teacher)
    return _Run(steps, outputs, np.concatenate(guided, axis=1))


def _recorded(guided: list[FloatArray], pick: Pick, given: IntArray | None) -> Pick:
    def recorded(logits: FloatArray, positions: slice) -> IntArray:
        guided.append(logits.copy())
        return pick(logits, positions) if given is None else given[:, positions]

    return recorded


def _student_pairs(
    title: str, request: TeacherRequest, schedule: Schedule, expected: _Run, same: _Run
) -> list[StudentPair]:
    """Every student step on the same input."""
    split = schedule.split or request.manifest.sequence.split
    return [
        StudentPair(
            f"{title}, student (known {known})",
            wanted,
            got,
            np.full_like(request.labels, known),
            split,
            request.places,
        )
        for known, wanted, got in zip(schedule.known, expected.students, same.students, strict=True)
    ]


def _teacher_pairs(
    title: str,
    request: TeacherRequest,
    schedule: Schedule,
    expected: _Run,
    same: _Run,
    bundle: Graphs,
) -> list[TeacherPair]:
    """The teacher on the same tokens, and the last image alone against itself in its batch."""
    span = schedule.teacher
    assert span is not None
    positions = slice(span.start, span.end)
    numbers, last = request.uniforms[:, positions], slice(len(request.labels) - 1, None)
    alone = _run_batch(bundle, request, schedule, last, expected)
    pair = partial(TeacherPair, start=span.start, choice=request.choice)
    return [
        pair(
            f"{title}, teacher (positions {span.start} to {span.end - 1})",
            expected.guided,
            same.guided,
            uniforms=numbers,
            places=request.places,
        ),
        pair(
            f"{title}, teacher, one image alone",
            same.guided[last],
            alone.guided,
            uniforms=numbers[last],
            places=request.places[last],
            itself=True,
        ),
    ]


def _end_to_end(
    title: str, request: TeacherRequest, expected: _Run, own: _Run, bundle: Graphs, reference: Graphs
) -> tuple[StudentPair, list[ImagePair]]:
    """Each side with the tokens that it drew; the images are compared where all tokens agree."""
    wanted, got = expected.steps[-1], own.steps[-1]
    split = request.manifest.sequence.codebook
    agree = np.ones(len(request.labels), dtype=np.bool_)
    for one, other in zip(expected.steps, own.steps, strict=True):
        agree &= (one.tokens == other.tokens).all(axis=1)
    scope = f"{title}, end to end"
    pair = StudentPair(
        scope,
        StudentOutput(wanted.sequence, _one_hot(wanted.tokens, split)),
        StudentOutput(got.sequence, _one_hot(got.tokens, split)),
        np.zeros_like(request.labels),
        wanted.tokens.shape[1],
        request.places,
        gate=False,
    )
    pictures = _decoded(reference, wanted.sequence, request.batch)
    same = _decoded(bundle, wanted.sequence, request.batch)
    drawn = _decoded(bundle, got.sequence, request.batch)
    everywhere = np.ones_like(agree)
    return pair, [
        ImagePair(f"{title}, decoder on the same sequence", pictures, same, everywhere, request.places),
        ImagePair(scope, pictures, drawn, agree, request.places),
    ]


def _one_hot(tokens: IntArray, codes: int) -> FloatArray:
    """Logits (N, S, V) that say which token was kept: what a step drew itself, or was given."""
    return np.asarray(np.arange(codes) == tokens[..., None], dtype=np.float32)


def _decoded(graphs: Graphs, sequence: FloatArray, batch: int) -> FloatArray:
    parts = [
        graphs.run("decoder", {"sequence": sequence[start : start + batch]})["image"]
        for start in range(0, len(sequence), batch)
    ]
    return np.concatenate(parts)
