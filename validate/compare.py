"""Runs a bundle on what its reference was run on, and lines the outputs up for the metrics.

Three kinds of comparison, because each shows what the others hide: every step on the same input, so that one
flipped token in step 1 cannot make all of step 2 look wrong; end to end, the `Pipeline` that users call
against the reference's loop (`validate/sampling.py`); and a batch against its rows one by one.

Shapes: N images, L positions, Cv width of a code, S split, V codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ddexport.recipe import Limits
from ddexport.runtime.backends import Arrays
from ddexport.runtime.bundle import DAMAGED, FULL, Graph, PipelineGraph, decoder_role, resolve
from ddexport.runtime.conditions import Conditions
from ddexport.runtime.errors import BackendError, BundleError, ScheduleError, VerificationError
from ddexport.runtime.pipeline import Pipeline
from ddexport.runtime.registry import load_plugin, plugins
from ddexport.runtime.schedule import Span
from ddexport.runtime.teacher import Sampling, generate
from ddexport.validate.conditions import Texts
from ddexport.validate.metrics._base import (
    Comparison,
    Drawn,
    DrawnPair,
    FloatArray,
    ImagePair,
    IntArray,
    StepOutput,
    StepPair,
    TextPair,
)
from ddexport.validate.report import Measurement
from ddexport.validate.runners import in_batches

if TYPE_CHECKING:
    from ddexport.validate.reference import ReferenceRun, Request
    from ddexport.validate.sampling import Pass

PACKAGE = "ddexport.validate.metrics"


def compare(
    pipe: Pipeline, runs: list[ReferenceRun], request: Request, advance: Callable[[int], None]
) -> Comparison:
    """All comparisons of an open bundle with what the reference drew; `advance` is told how many images are
    done. Raises VerificationError where a graph does not run or the outputs cannot be lined up."""
    comparison, count = Comparison(), len(request.labels)
    students: dict[int, dict[Any, Pass]] = {}  # by split, and by what led to the step
    try:
        bundle = _Bundle(pipe, request)
        comparison.texts.extend(bundle.texts())
        for run in runs:
            for number, step in enumerate(run.passes):
                if step.role == "teacher":
                    comparison.steps.extend(bundle.teacher(run, step))
                    continue
                drawn = any(before.role == "teacher" for before in run.passes[:number])
                history = (*run.plan.passes[: number + 1], run.plan.teacher if drawn else None)
                seen = students.setdefault(run.plan.split, {})
                if history not in seen:  # schedules share their first steps
                    seen[history] = step
                    comparison.steps.append(bundle.student(run, number))
            comparison.images.extend(bundle.decoded(run, name) for name in (FULL, *run.others))
            advance(count)
            comparison.drawn.extend(
                bundle.end_to_end(run, name) for name in (FULL, *first_decoders(runs, run))
            )
            advance(count)
        for split, steps in students.items():
            comparison.steps.append(bundle.mixed(split, list(steps.values())))
        for name in (FULL, *runs[-1].others):
            comparison.images.append(bundle.decoded_alone(runs[-1], name))
        for pipeline in bundle.manifest.pipelines:
            if pipeline.precision == pipe.backend.configuration.graphs:
                run = next(run for run in runs if run.steps == str(pipeline.steps))
                comparison.drawn.append(bundle.one_graph(pipeline, run))
        bundle.check_seed(next((run for run in runs if run.plan.teacher), runs[0]))
    except (BackendError, BundleError, ScheduleError) as error:
        raise VerificationError(f"the bundle does not run: {error.message}", error.hint) from error
    return comparison


def measure(comparison: Comparison, limits: Limits) -> list[Measurement]:
    """What every parity metric says, gathered by scope in the order in which the scopes were run."""
    scopes = comparison.scopes()
    modules = [load_plugin(PACKAGE, name) for name in plugins(PACKAGE)]
    # The other files there serve other commands.
    metrics = [module for module in modules if hasattr(module, "compare")]
    rows = [row for metric in metrics for row in metric.compare(comparison, limits)]
    return sorted(rows, key=lambda row: scopes.index(row.scope))


class _Bundle:
    """An open bundle, run on the inputs of the reference in batches of the request's size."""

    def __init__(self, pipe: Pipeline, request: Request) -> None:
        self.pipe, self.request, self.manifest = pipe, request, pipe.manifest
        self.given = self._conditions(np.arange(request.conditions.count)).rows(request.labels)

    def texts(self) -> list[TextPair]:
        """What both sides' text encoders make of the prompts."""
        conditions, texts = self.request.conditions, self.pipe.texts
        if not (conditions.prompts and isinstance(conditions, Texts) and texts):
            return []
        sides = conditions.features.features, texts.features(list(conditions.prompts)).features
        return [TextPair("text encoder", *sides, [repr(prompt[:20]) for prompt in conditions.prompts])]

    def student(self, run: ReferenceRun, number: int) -> StepPair:
        """A student step on the reference's input."""
        step = run.passes[number]
        known = np.full(len(self.given), step.known)
        given = self.given.feeds("student")
        got = self._student(step.inputs, given, known, run.plan.split, self.request.batch)
        before = ", ".join(str(earlier.known) for earlier in run.passes[: number + 1])
        scope = f"step {number + 1} (known {before})"
        if run.plan.teacher is not None:
            scope = f"{run.title}, student (known {step.known})"
        return StepPair(scope, StepOutput(step.logits, step.sequence), got, known, self.request.places)

    def teacher(self, run: ReferenceRun, step: Pass) -> list[StepPair]:
        """The teacher on the tokens that the reference drew, with the bundle's caches; then the last image
        alone."""
        engine, teacher, count = self.pipe.teacher_backend, self.manifest.teacher, len(self.request.labels)
        assert run.plan.teacher is not None and engine is not None and teacher is not None
        span = Span(start=run.plan.teacher[0], end=run.plan.teacher[1])
        graph = self.manifest.graph("teacher", engine.configuration.graphs)

        def guided(feeds: Arrays) -> dict[str, Any]:
            parts: list[FloatArray] = []

            def forced(logits: FloatArray, positions: slice) -> IntArray:
                parts.append(logits.copy())
                return np.asarray(feeds["tokens"][:, positions])

            passes, cache = partial(engine.run, graph), engine.new_cache
            condition = {name: feeds[name] for name in given}
            generate(passes, teacher, span, feeds["prefix"], condition, teacher.cfg, forced, new_cache=cache)
            return {"logits": np.concatenate(parts, axis=1)}

        given = self.given.feeds("teacher")
        feeds = {"prefix": step.inputs, "tokens": step.tokens, **given}
        got = StepOutput(in_batches(guided, feeds, self.request.batch)["logits"])
        last = slice(count - 1, count)
        own_feeds = self._conditions(self.request.labels[last]).feeds("teacher")
        alone = StepOutput(guided({name: rows[last] for name, rows in feeds.items()} | own_feeds)["logits"])
        known, numbers = np.full(count, span.start), self.request.uniforms[:, span.start : span.end]
        sampling = Sampling(teacher.cfg, teacher.top_k, teacher.top_p, teacher.temperature)
        own: dict[str, Any] = {"start": span.start, "sampling": sampling}
        places = self.request.places
        scope = f"{run.title}, teacher (positions {span.start} to {span.end - 1})"
        return [
            StepPair(scope, StepOutput(step.logits), got, known, places, uniforms=numbers, **own),
            StepPair(
                f"{run.title}, teacher, one image alone", got.rows(last), alone, known[last], places[last],
                itself=True, uniforms=numbers[last], **own,
            ),
        ]  # fmt: skip

    def decoded(self, run: ReferenceRun, decoder: str) -> ImagePair:
        """Both sides' decoders of that name on the reference's sequence."""
        images = self._decode(run.passes[-1].sequence, self.request.batch, decoder)
        everything = np.ones(len(images), dtype=np.bool_)
        scope = f"{run.title}, {_called(decoder)} on the same sequence"
        sides = (run.decoded(decoder), images)
        return ImagePair(scope, *sides, everything, self.request.places, further=decoder != FULL)

    def end_to_end(self, run: ReferenceRun, decoder: str) -> DrawnPair:
        """What users get from the reference's noise."""
        request, by_teacher = self.request, run.plan.teacher is not None
        how: dict[str, Any] = {"uniforms": request.uniforms} if by_teacher else {}
        how |= {"noise": request.noise, "output": "numpy", "batch_size": request.batch, "decoder": decoder}
        result = self.pipe(request.conditions.of_bundle(request.labels), steps_of(run), **how)
        tokens = np.concatenate([step.tokens for step in result.steps], axis=1)
        got = Drawn(tokens, result.steps[-1].sequence, np.asarray(result.images))
        return drawn_pair(run, decoder, got, request.places)

    def one_graph(self, pipeline: PipelineGraph, run: ReferenceRun) -> DrawnPair:
        """What they get from the reference's noise who do not use the runtime."""
        from ddexport.graph.emulate import EmulatedGraph
        from ddexport.validate.sampling import pixels_of

        feeds: Arrays = {"noise": self.request.noise, "label": self.request.labels}
        try:
            graph = EmulatedGraph(resolve(self.pipe.root, pipeline.file))
            outputs = in_batches(graph.run, feeds, self.request.batch)
        except Exception as error:  # of ONNX Runtime or of what reads the file
            raise VerificationError(f"{pipeline.file} does not run: {error}", DAMAGED) from error
        expected = Drawn(run.passes[-1].tokens, None, pixels_of(run.decoded(pipeline.decoder)))
        got = Drawn(outputs["tokens"], None, outputs["image"])
        return DrawnPair(pipeline.file, expected, got, self.request.places)

    def mixed(self, split: int, steps: list[Pass]) -> StepPair:
        """A batch that mixes rows of all steps, and its rows one by one: none may depend on the others."""
        size, count, labels = self.request.batch, len(self.given), self.request.labels
        picks = [(steps[i % len(steps)], i // len(steps) % count) for i in range(size)]
        rows = [row for _, row in picks]
        known = np.array([step.known for step, _ in picks])
        latents = np.stack([step.inputs[row] for step, row in picks])
        own = [self._conditions(labels[[row]]).feeds("student") for row in rows]
        apart = {name: np.concatenate([one[name] for one in own]) for name in own[0]}
        sides = (self.given.rows(rows).feeds("student"), size), (apart, 1)
        batch, alone = (self._student(latents, given, known, split, n) for given, n in sides)
        places = [f"{self.request.places[row]}, known {step.known}" for step, row in picks]
        scope = f"student, split {split}: batch of {size} against single images"
        return StepPair(scope, batch, alone, known, places, itself=True)

    def decoded_alone(self, run: ReferenceRun, decoder: str) -> ImagePair:
        """The first batch of images, and each of them alone."""
        size = self.request.batch
        sequence, places = run.passes[-1].sequence[:size], self.request.places[:size]
        together, alone = (self._decode(sequence, rows, decoder) for rows in (size, 1))
        everything = np.ones(len(alone), dtype=np.bool_)
        scope = f"{_called(decoder)}: batch of {len(alone)} against single images"
        return ImagePair(scope, together, alone, everything, places, itself=True)

    def check_seed(self, run: ReferenceRun) -> None:
        """Raises VerificationError where the seed that users give is not the noise that was compared."""
        request = self.request
        label = request.conditions.of_bundle(request.labels[:1])
        first = self.pipe(label, steps_of(run), seed=int(request.seeds[0]), output="sequence")
        same = np.array_equal(first.noise, request.noise[:1])
        if run.plan.teacher is not None:
            same &= first.uniforms is not None and np.array_equal(first.uniforms, request.uniforms[:1])
        if not same:
            raise VerificationError(
                f"the noise of seed {request.seeds[0]} is not that of docs/bundle.md",
                "runtime/noise.py is wrong: please report it",
            )

    def _conditions(self, labels: IntArray) -> Conditions:
        return self.pipe.conditions(self.request.conditions.of_bundle(labels))

    def _student(
        self, latents: FloatArray, given: Arrays, known: IntArray, split: int, size: int
    ) -> StepOutput:
        outputs = self._run("student", {"latents": latents, **given, "known": known}, size, split)
        tokens, logits = outputs["tokens"], outputs["logits"]
        # Whichever of equal ones.
        if not np.array_equal(np.take_along_axis(logits, tokens[..., None], -1)[..., 0], logits.max(-1)):
            raise VerificationError(
                "the student's tokens are not those of its largest logits",
                "the graph is damaged: export it again",
            )
        return StepOutput(logits, outputs["sequence"])

    def _decode(self, sequence: FloatArray, size: int, decoder: str) -> FloatArray:
        return np.asarray(self._run(decoder_role(decoder), {"sequence": sequence}, size)["image"])

    def _run(self, role: str, feeds: Arrays, size: int, split: int | None = None) -> dict[str, Any]:
        graph: Graph = self.manifest.graph(role, self.pipe.backend.configuration.graphs, split)
        return in_batches(partial(self.pipe.backend.run, graph), feeds, size)


def drawn_pair(run: ReferenceRun, decoder: str, got: Drawn, places: Sequence[str]) -> DrawnPair:
    """What users get with a decoder, beside what the reference drew."""
    expected, scope = run.drawn, f"{run.title}, end to end"
    if decoder != FULL:
        from ddexport.validate.sampling import pixels_of  # with torch

        scope = f"{run.title}, {_called(decoder)}, end to end"
        expected = replace(expected, pixels=pixels_of(run.others[decoder]))
    return DrawnPair(scope, expected, got, places, run.plan.teacher is not None)


def _called(decoder: str) -> str:
    return "decoder" if decoder == FULL else f"decoder {decoder}"


def first_decoders(runs: list[ReferenceRun], run: ReferenceRun) -> list[str]:
    """The further decoders, of the first schedule alone: the way from noise to them is the same in all."""
    return list(run.others) if run is runs[0] else []


def steps_of(run: ReferenceRun) -> int | str:
    """The number of steps as a pipeline takes it."""
    return run.steps if run.steps == "teacher" else int(run.steps)
