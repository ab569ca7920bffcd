"""Inside a worker: an open pipeline, its timed runs, and what they gave."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.backends import Configuration
from ddexport.runtime.bundle import FULL, TEACHER, Manifest, read_manifest
from ddexport.runtime.conditions import Conditions
from ddexport.runtime.images import to_uint8
from ddexport.runtime.machine import version_of
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.pipeline import Pipeline, load
from ddexport.runtime.result import Result
from ddexport.runtime.sampler import Step
from ddexport.runtime.schedule import Schedule
from ddexport.runtime.teacher import generate
from ddexport.validate.bench.clock import clock_of
from ddexport.validate.bench.plan import IN_TORCH, Steps
from ddexport.validate.bench.torch_engine import REFERENCE, TorchEngine, TorchPipeline
from ddexport.validate.conditions import conditions_of, spread
from ddexport.validate.metrics._base import FloatArray, IntArray, StepOutput


class Job(NamedTuple):
    """What a worker opens. files, weights: the published checkpoints by role, and which copy in them."""

    bundle: Path
    configuration: Configuration
    threads: int
    seed: int = 0
    files: Mapping[str, Path | None] = {}
    weights: str | None = None


class Inputs(NamedTuple):
    """noise (B, L, Cv) float32, uniforms (B, L) float64: the same for all rows. given: what a pipeline draws
    from, labels, or features of texts: their encoder is not timed."""

    given: Any
    noise: FloatArray
    uniforms: NDArray[np.float64]


class Outputs(NamedTuple):
    """What parity is measured on: the sampler's steps, the logits of each, of a student's also the
    sequence, and pixels (B, H, W, 3) uint8."""

    steps: Sequence[Step]
    outputs: Sequence[StepOutput]
    pixels: NDArray[np.uint8]


class Run(NamedTuple):
    """Seconds of all student steps, all AR steps, the decoder, and of everything from labels to 8-bit images.

    peak_mib, gpu_mib: the most memory in use; None where the system does not tell, or there is no GPU.
    """

    student: float
    teacher: float
    decoder: float
    total: float
    peak_mib: float | None = None
    gpu_mib: float | None = None


def inputs_of(manifest: Manifest, batch: int, seed: int) -> Inputs:
    """Labels spread over all classes or texts, noise and uniform numbers of the seed."""
    size, conditions, images = manifest.sequence, conditions_of(manifest, encoder=False), range(batch)
    given = conditions.of_bundle(spread(conditions.count, batch, seed))
    noise = gaussian_noise(seed, images, size.length, size.width)
    return Inputs(given, noise, uniform_numbers(seed, images, size.length))


class Session:
    """What can be called in a worker; each method raises DDError, or whatever an engine raises."""

    def open(self, job: Job) -> str:
        """Opens a bundle as a user does, or the modules that it was made from; the engine's version."""
        self.manifest, self.seed = read_manifest(job.bundle, verify=False), job.seed
        self.results: dict[tuple[int, Steps, str], Result] = {}
        chosen, names = job.configuration, ["torch"]
        self.clock = clock_of(chosen.device)
        if chosen.backend in (*IN_TORCH, REFERENCE):
            engine = TorchEngine(job.bundle, self.manifest, chosen, job.threads, job.files, job.weights)
            self.pipe: Pipeline = TorchPipeline(engine)
        else:
            how = (chosen.backend, job.threads, chosen.precision)
            self.pipe = load(job.bundle, *how, verify=False, device=chosen.device)
            names = [chosen.backend + tail for tail in ("", "-gpu", "-rtx")]
        return next(filter(None, map(version_of, names)), "")

    def run(self, batch: int, steps: Steps, decoder: str = FULL) -> Run:
        """Draws once, as a user does."""
        draw = partial(self._draw, inputs_of(self.manifest, batch, self.seed), steps, decoder)
        result, total, memory = self.clock.measure(draw)
        self.results[batch, steps, decoder], seconds = result, result.seconds
        return Run(seconds["student"], seconds.get(TEACHER, 0.0), seconds["decoder"], total, *memory)

    def throughput(self, batch: int, steps: Steps, decoder: str, duration: float) -> tuple[int, float]:
        """How many images, and the seconds from the start of the first run to the end of the last, one behind
        the other, for `duration` at least."""
        inputs, count = inputs_of(self.manifest, batch, self.seed), 0
        began, spent = time.perf_counter(), 0.0
        while not count or spent < duration:
            self._draw(inputs, steps, decoder)
            count, spent = count + batch, time.perf_counter() - began
        return count, spent

    def _draw(self, inputs: Inputs, steps: Steps, decoder: str) -> Result:
        options: dict[str, Any] = {"noise": inputs.noise, "output": "numpy", "batch_size": len(inputs.noise)}
        options |= {"uniforms": inputs.uniforms} if self.manifest.schedule(steps).teacher else {}
        return self.pipe(inputs.given, steps, decoder=decoder, **options)

    def outputs(self, batch: int, steps: Steps, decoder: str = FULL) -> Outputs:
        """What the last run gave. Logits, which users do not ask for, are computed once more."""
        result = self.results[batch, steps, decoder]
        again = self._again(batch, steps, result.steps)
        timed = [
            StepOutput(one.logits, None if one.sequence is None else step.sequence)
            for one, step in zip(again, result.steps, strict=True)
        ]
        return Outputs(result.steps, timed, np.asarray(result.images))

    def expected(self, batch: int, steps: Steps, done: Sequence[Step], decoder: str = FULL) -> Outputs:
        """What this pipeline gives where each step, and the decoder, has the input that it had in `done`."""
        graph = self.manifest.decoder(decoder, self.pipe.backend.configuration.graphs)
        image = self.pipe.backend.run(graph, {"sequence": done[-1].sequence})["image"]
        return Outputs(done, self._again(batch, steps, done), to_uint8(image))

    def rate(self, engine: str, precision: str, threads: int, device: str) -> float:
        """GFLOP/s of a matrix product."""
        from ddexport.validate.bench.roofline import measure_rate

        return measure_rate(engine, precision, threads, device)

    def _again(self, batch: int, steps: Steps, done: Sequence[Step]) -> list[StepOutput]:
        """Every step on its input again; a teacher's on the tokens that it drew."""
        schedule, backend = self.manifest.schedule(steps), self.pipe.backend
        labels, noise, _ = inputs_of(self.manifest, batch, self.seed)
        given = self.pipe.conditions(labels)
        outputs, before, known = [], noise, iter(schedule.known)
        for step in done:
            if step.role == TEACHER:
                outputs.append(StepOutput(self._guided(given, schedule, step)))
            else:
                count = next(known)
                latents = np.concatenate([before[:, :count], noise[:, count:]], axis=1)
                feeds = {"latents": latents, **given.feeds("student"), "known": np.full(batch, count)}
                graph = self.manifest.graph("student", backend.configuration.graphs, schedule.split)
                outputs.append(StepOutput(**backend.run(graph, feeds, ("sequence", "logits"))))
            before = step.sequence
        return outputs

    def _guided(self, given: Conditions, schedule: Schedule, step: Step) -> FloatArray:
        """The teacher's logits (B, P, V) where the tokens of a step are forced."""
        engine: Any = self.pipe.teacher_backend
        teacher, span, parts = self.manifest.teacher, schedule.teacher, []
        assert teacher is not None and span is not None

        def forced(logits: FloatArray, positions: slice) -> IntArray:
            parts.append(np.array(logits, dtype=np.float32))
            return step.tokens[:, positions]

        prefix, condition = step.tokens[:, : span.start], given.feeds(TEACHER)
        if isinstance(engine, TorchEngine):
            engine.generate(condition, prefix, span, forced, teacher.cfg)
        else:
            run = partial(engine.run, self.manifest.graph(TEACHER, engine.configuration.graphs))
            how = {"new_cache": engine.new_cache}
            generate(run, teacher, span, prefix, condition, teacher.cfg, forced, **how)
        return np.concatenate(parts, axis=1)


SESSION = Session()
