"""Runs a bundle and its reference on the same labels and noise, and lines the outputs up for the metrics.

Three kinds of comparison, because each shows what the others hide:

- Every step on the same input: the bundle's graphs are given what the reference kept, so that one flipped
token in step 1 cannot make all of step 2 look wrong. - End to end: the `Pipeline` that users call against the
reference's loop (`validate/sampling.py`). - The bundle against itself: no row may depend on its neighbours
in the batch, and a seed gives its noise.

Shapes: N images, L positions, Cv width of a code, S split, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ddexport.runtime.bundle import Span
from ddexport.runtime.errors import BackendError, BundleError, ScheduleError, VerificationError
from ddexport.runtime.pipeline import Pipeline
from ddexport.runtime.registry import load_plugin, plugins
from ddexport.runtime.result import Result
from ddexport.runtime.teacher import Sampling, generate
from ddexport.validate.metrics._base import (
    Compare,
    Comparison,
    DrawnPair,
    FloatArray,
    ImagePair,
    IntArray,
    Limits,
    Measurement,
    StudentOutput,
    StudentPair,
    TeacherPair,
)

if TYPE_CHECKING:
    from ddexport.validate.reference import TorchReference
    from ddexport.validate.sampling import Pass, Plan

SMALL_SIZES = (1, 2, 3)


@dataclass(frozen=True)
class Request:
    """Labels (N,) int64 and a seed (N,) uint64 for each: it gives the noise of its image 0. batch: the
    largest."""

    labels: IntArray
    seeds: np.ndarray[Any, np.dtype[np.uint64]]
    batch: int

    @property
    def places(self) -> tuple[str, ...]:
        """The name of each image, for people."""
        return tuple(f"image {i} (label {label})" for i, label in enumerate(self.labels))


def request_of(images: int, seed: int, classes: int, batch: int) -> Request:
    """Labels spread over all classes, and consecutive seeds."""
    spread = np.arange(images, dtype=np.int64) * classes // images
    seeds = np.array([(seed + i) % 2**64 for i in range(images)], dtype=np.uint64)
    return Request((spread + seed % classes) % classes, seeds, batch)


@dataclass(frozen=True)
class ReferenceRun:
    """What the reference drew in one schedule: its passes, the images in [0, 1] (N, 3, H, W) and as bytes."""

    steps: str
    plan: Plan
    passes: list[Pass]
    images: FloatArray
    pixels: np.ndarray[Any, np.dtype[np.uint8]]

    @property
    def title(self) -> str:
        """The schedule, for people."""
        if self.steps == "teacher":
            return "teacher alone"
        return f"{self.steps} step{'s' if self.steps != '1' else ''}"

    @property
    def tokens(self) -> IntArray:
        """Of all passes (N, T)."""
        return np.concatenate([step.tokens for step in self.passes], axis=1)


@dataclass(frozen=True)
class Noise:
    """noise (N, L, Cv) float32 and uniforms (N, L) float64, made on the reference's side."""

    gaussian: FloatArray
    uniforms: np.ndarray[Any, np.dtype[np.float64]]


def noise_for(reference: TorchReference, request: Request) -> Noise:
    """The noise of a request."""
    from ddexport.validate.sampling import noise_of, uniforms_of

    assert reference.recipe is not None
    size = reference.recipe.sequence
    return Noise(noise_of(request.seeds, size.length, size.width), uniforms_of(request.seeds, size.length))


def run_reference(
    reference: TorchReference, request: Request, noise: Noise, advance: Callable[[int], None]
) -> list[ReferenceRun]:
    """Every schedule of the reference, in batches; `advance` is told how many images are done."""
    from ddexport.validate.sampling import Pass, pixels_of

    sampler, count = reference.sampler, len(request.labels)
    runs = []
    for steps, plan in reference.plans.items():
        parts: list[list[Pass]] = []
        images: list[FloatArray] = []
        for start in range(0, count, request.batch):
            rows = slice(start, start + request.batch)
            passes = sampler.sample(noise.gaussian[rows], request.labels[rows], plan, noise.uniforms[rows])
            parts.append(passes)
            images.append(sampler.decode(passes[-1].sequence))
            advance(len(request.labels[rows]))
        names = ("inputs", "logits", "tokens", "sequence")
        joined = [
            Pass(same[0].role, same[0].known, *(np.concatenate([getattr(p, n) for p in same]) for n in names))
            for same in zip(*parts, strict=True)
        ]
        decoded = np.concatenate(images)
        runs.append(ReferenceRun(steps, plan, joined, decoded, pixels_of(decoded)))
    return runs


def compare(
    pipe: Pipeline,
    runs: list[ReferenceRun],
    request: Request,
    noise: Noise,
    sampling: Sampling | None,
    advance: Callable[[int], None],
) -> Comparison:
    """All comparisons of an open bundle with what the reference drew. sampling: how the teacher's tokens are
    drawn.

    Raises VerificationError where a graph does not run or the outputs cannot be lined up.
    """
    try:
        bundle = _Bundle(pipe, request)
        comparison = Comparison([], [])
        steps: dict[Any, tuple[Pass, StudentOutput, int]] = {}
        for run in runs:
            for number, step in enumerate(run.passes):
                if step.role == "teacher":
                    comparison.teachers.extend(_teacher_pairs(bundle, run, step, noise, sampling))
                    continue
                drawn = any(before.role == "teacher" for before in run.passes[:number])
                key = (run.plan.split, *run.plan.passes[: number + 1], run.plan.teacher if drawn else None)
                if key in steps:  # schedules share their first steps
                    continue
                got = bundle.student(step.inputs, request.labels, step.known, run.plan.split)
                steps[key] = (step, got, run.plan.split)
                expected = StudentOutput(step.sequence, step.logits)
                _check_shapes("logits", expected.logits, got.logits)
                known = np.full_like(request.labels, step.known)
                scope = _scope(run, number)
                comparison.students.append(
                    StudentPair(scope, expected, got, known, run.plan.split, request.places)
                )
            comparison.images.append(bundle.decoded(run))
            advance(len(request.labels))
            comparison.drawn.extend(_end_to_end(bundle, run, noise))
            advance(len(request.labels))
        own = [row for row in steps.values() if row[2] == pipe.manifest.sequence.split]
        students, images = bundle.against_itself(own)
        comparison.students.extend(students)
        comparison.images.extend(images)
    except (BackendError, BundleError, ScheduleError) as error:
        raise VerificationError(f"the bundle does not run: {error.message}", error.hint) from error
    return comparison


def measure(comparison: Comparison, limits: Limits) -> list[Measurement]:
    """What every parity metric says, gathered by scope in the order in which the scopes were run."""
    scopes = comparison.scopes()
    rows = [row for metric in _parity_metrics() for row in metric(comparison, limits)]
    return sorted(rows, key=lambda row: scopes.index(row.scope))


def _parity_metrics() -> Iterable[Compare]:
    """The metric files that compare a bundle with its reference; the others serve other commands."""
    for name in plugins("ddexport.validate.metrics"):
        function = getattr(load_plugin("ddexport.validate.metrics", name), "compare", None)
        if function is not None:
            yield function


class _Bundle:
    """The graphs of an open bundle, run in batches of the request's size."""

    def __init__(self, pipe: Pipeline, request: Request) -> None:
        self.pipe, self.request = pipe, request

    def student(
        self,
        tokens: FloatArray,
        labels: IntArray,
        known: int | IntArray,
        split: int,
    ) -> StudentOutput:
        """tokens (N, L, Cv), labels (N,), known: of all or (N,)."""
        graph = self.pipe.manifest.graph("student", self.pipe.backend.configuration.graphs, split)
        size, counts = self.request.batch, np.broadcast_to(known, labels.shape).astype(np.int64)
        parts = []
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            feeds: dict[str, Any] = {"latents": tokens[rows], "label": labels[rows], "known": counts[rows]}
            outputs = self.pipe.backend.run(graph, feeds)
            _check_tokens(outputs["tokens"], outputs["logits"])
            parts.append(StudentOutput(outputs["sequence"], outputs["logits"]))
        return StudentOutput.concatenate(parts)

    def decode(self, sequence: FloatArray) -> FloatArray:
        """sequence (N, L, Cv) -> images (N, 3, H, W) in [0, 1]."""
        size = self.request.batch
        graph = self.pipe.manifest.graph("decoder", self.pipe.backend.configuration.graphs)
        parts = [
            self.pipe.backend.run(graph, {"sequence": sequence[start : start + size]})["image"]
            for start in range(0, len(sequence), size)
        ]
        return np.concatenate(parts)

    def decoded(self, run: ReferenceRun) -> ImagePair:
        """Both decoders on the reference's sequence."""
        images = self.decode(run.passes[-1].sequence)
        _check_shapes("image", run.images, images)
        everything = np.ones(len(images), dtype=np.bool_)
        scope = f"{run.title}, decoder on the same sequence"
        return ImagePair(scope, run.images, images, everything, self.request.places)

    def guided(self, step: Pass, plan: Plan, rows: slice) -> FloatArray:
        """The teacher's guided logits (n, P, V) on the tokens that the reference drew, with the bundle's
        caches."""
        teacher = self.pipe.manifest.teacher
        assert teacher is not None
        assert plan.teacher is not None
        parts: list[FloatArray] = []
        tokens, labels = step.tokens[rows], self.request.labels[rows]

        def forced(logits: FloatArray, positions: slice) -> IntArray:
            parts.append(logits.copy())
            return tokens[:, positions]

        engine, (start, end) = self.pipe.teacher_backend, plan.teacher
        assert engine is not None
        run = partial(engine.run, self.pipe.manifest.graph("teacher", engine.configuration.graphs))
        span, prefix = Span(start=start, end=end), step.inputs[rows]
        generate(run, teacher, span, prefix, labels, teacher.cfg, forced, new_cache=engine.new_cache)
        return np.concatenate(parts, axis=1)

    def against_itself(
        self, steps: list[tuple[Pass, StudentOutput, int]]
    ) -> tuple[list[StudentPair], list[ImagePair]]:
        """One batch of the largest size, its rows of all steps in turn; then its last rows in small
        batches."""
        size, split, labels = self.request.batch, self.pipe.manifest.sequence.split, self.request.labels
        picks = [(steps[i % len(steps)], i // len(steps) % len(labels)) for i in range(size)]
        tokens = np.stack([step.inputs[row] for (step, _, _), row in picks])
        label = np.array([labels[row] for _, row in picks])
        known = np.array([step.known for (step, _, _), _ in picks])
        alone = StudentOutput.concatenate([got.rows(slice(row, row + 1)) for (_, got, _), row in picks])
        places = tuple(f"{self.request.places[row]}, known {step.known}" for (step, _, _), row in picks)
        whole = self.student(tokens, label, known, split)
        mixed = StudentPair("steps mixed in a batch", alone, whole, known, split, places, itself=True)
        images = self.decode(whole.sequence)
        small = [np.arange(size - n, size) for n in SMALL_SIZES if n < size]
        cut = [self.student(tokens[rows], label[rows], known[rows], split) for rows in small]
        rows, got = np.concatenate(small), StudentOutput.concatenate(cut)
        names = tuple(f"batch of {len(index)}: {places[row]}" for index in small for row in index)
        scope = f"batch sizes {', '.join(str(len(index)) for index in small)}, {size}"
        pair = StudentPair(scope, whole.rows(rows), got, known[rows], split, names, itself=True)
        # The decoder is fed what the student gave, so a token that flips by rounding changes the picture too.
        agree = np.logical_not(pair.differing().any(axis=1))
        pictures = np.concatenate([self.decode(output.sequence) for output in cut])
        return [mixed, pair], [ImagePair(scope, images[rows], pictures, agree, names, itself=True)]


def _teacher_pairs(
    bundle: _Bundle, run: ReferenceRun, step: Pass, noise: Noise, sampling: Sampling | None
) -> list[TeacherPair]:
    """The teacher on the same tokens, and the last image alone against itself in its batch."""
    assert run.plan.teacher is not None
    assert sampling is not None
    (start, end), request = run.plan.teacher, bundle.request
    count = len(request.labels)
    starts = range(0, count, request.batch)
    got = np.concatenate([bundle.guided(step, run.plan, slice(i, i + request.batch)) for i in starts])
    _check_shapes("guided logits", step.logits, got)
    last, numbers = slice(count - 1, count), noise.uniforms[:, start:end]
    alone = bundle.guided(step, run.plan, last)
    scope = f"{run.title}, teacher (positions {start} to {end - 1})"
    name = f"{run.title}, teacher, one image alone"
    return [
        TeacherPair(scope, step.logits, got, start, numbers, sampling, request.places),
        TeacherPair(
            name, got[last], alone, start, numbers[last], sampling, request.places[last], itself=True
        ),
    ]


def _end_to_end(bundle: _Bundle, run: ReferenceRun, noise: Noise) -> list[DrawnPair]:
    """What users get: all images by the reference's noise, and the first one by its seed alone."""
    request, pipe = bundle.request, bundle.pipe
    steps = "teacher" if run.steps == "teacher" else int(run.steps)
    replayed: dict[str, Any] = {"uniforms": noise.uniforms} if run.plan.teacher else {}
    result = pipe(
        request.labels.tolist(),
        steps,
        noise=noise.gaussian,
        output="numpy",
        batch_size=request.batch,
        **replayed,
    )
    tokens, scope = _tokens(result), f"{run.title}, end to end"
    _check_shapes("tokens", run.tokens, tokens)
    first = pipe([int(request.labels[0])], steps, seed=int(request.seeds[0]), output="numpy")
    if not np.array_equal(first.noise, noise.gaussian[:1]) or (
        run.plan.teacher and not np.array_equal(first.uniforms, noise.uniforms[:1])  # type: ignore[arg-type]
    ):
        raise VerificationError(
            f"the noise of seed {request.seeds[0]} is not what docs/noise.md says",
            "runtime/noise.py is at fault",
        )
    pixels, alone = np.asarray(result.images), np.asarray(first.images)
    sequences = (run.passes[-1].sequence, result.steps[-1].sequence)
    own = (result.steps[-1].sequence[:1], first.steps[-1].sequence)
    return [
        DrawnPair(
            scope,
            run.tokens,
            tokens,
            *sequences,
            run.pixels,
            pixels,
            request.places,
            by_teacher=run.plan.teacher is not None,
        ),
        DrawnPair(
            f"{run.title}, by its seed alone",
            tokens[:1],
            _tokens(first),
            *own,
            pixels[:1],
            alone,
            request.places[:1],
            itself=True,
        ),
    ]


def _tokens(result: Result) -> IntArray:
    return np.concatenate([step.tokens for step in result.steps], axis=1)


def _scope(run: ReferenceRun, number: int) -> str:
    known = [step.known for step in run.passes[: number + 1]]
    if run.plan.teacher is None:
        return f"step {number + 1} (known {', '.join(map(str, known))})"
    return f"{run.title}, student (known {known[-1]})"


def _check_tokens(tokens: IntArray, logits: FloatArray) -> None:
    """The student's tokens must be the largest of its logits, whichever of equal ones."""
    chosen = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    if not np.array_equal(chosen, logits.max(-1)):
        raise VerificationError(
            "the student's tokens are not the largest of its logits", "the graph is damaged: export it again"
        )


def _check_shapes(name: str, expected: Any, got: Any) -> None:
    if expected.shape != got.shape:
        raise VerificationError(
            f"the bundle's {name} has shape {got.shape}, the reference's {expected.shape}",
            "the graphs and the recipe of this bundle disagree: export it again",
        )
