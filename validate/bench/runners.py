"""Inside a worker: an open runner, and one timed run of it.

Whatever computes, the runtime's own sampler drives it, so that all runners do the same work: what is timed
are graphs and modules. The one exception is PyTorch's auto-regressive model, which is run as the published
samplers run it (`ddexport.validate.bench.torch_runners`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ddexport.runtime.bundle import TEACHER, Manifest, Schedule, Span, Teacher
from ddexport.runtime.images import to_uint8
from ddexport.runtime.machine import version_of
from ddexport.runtime.pipeline import Pipeline, load
from ddexport.runtime.sampler import Step, sample
from ddexport.runtime.teacher import (
    Arrays,
    Cache,
    HostCache,
    Pick,
    choose,
    generate,
    read_codebook,
    sampling_of,
)
from ddexport.validate.bench.workload import IN_TORCH, REFERENCE, Inputs, Job, Outputs, Times
from ddexport.validate.metrics._base import FloatArray, IntArray

DISTRIBUTIONS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "tensorrt": ("tensorrt", "tensorrt-rtx")}


class Runner(ABC):
    """An open configuration. version: of the engine. teacher: what else runs the teacher, if anything."""

    version: str
    teacher = ""

    @abstractmethod
    def open(self, schedule: Schedule) -> None:
        """Opens what a schedule runs. Raises DDError."""

    @abstractmethod
    def run(self, role: str, split: int | None, feeds: Arrays, names: Sequence[str] | None = None) -> Arrays:
        """What the graph of a role, of the student with that split, gives; the names are the contract's.

        names: the outputs that are wanted, all if None. Raises DDError.
        """

    def new_cache(self, teacher: Teacher, count: int, capacity: int) -> Cache:
        """A teacher's cache, where this runner wants it."""
        return HostCache(teacher, count, capacity)

    def generate_alone(self, labels: IntArray, pick: Pick, guidance_scale: float) -> Step | None:
        """Everything from the teacher by a loop of the runner's own, or None if it has none."""
        return None


class RuntimeRunner(Runner):
    """A bundle as a user opens it."""

    def __init__(self, job: Job) -> None:
        """Raises DDError."""
        chosen = job.runner
        self._pipe: Pipeline = load(
            job.bundle,
            chosen.backend,
            chosen.threads_each,
            chosen.precision,
            verify=False,
            device=chosen.device,
        )
        engine = self._pipe.teacher_backend
        if engine is not None and engine is not self._pipe.backend:
            self.teacher = str(engine.configuration)
        distributions = DISTRIBUTIONS.get(chosen.backend, (chosen.backend,))
        self.version = next(filter(None, map(version_of, distributions)), "")

    def open(self, schedule: Schedule) -> None:
        self._pipe.open(schedule)

    def run(self, role: str, split: int | None, feeds: Arrays, names: Sequence[str] | None = None) -> Arrays:
        engine = self._pipe.teacher_backend if role == TEACHER else self._pipe.backend
        assert engine is not None  # `open` has seen to it
        graph = self._pipe.manifest.graph(role, engine.configuration.graphs, split)
        return engine.run(graph, feeds, names)

    def new_cache(self, teacher: Teacher, count: int, capacity: int) -> Cache:
        assert self._pipe.teacher_backend is not None
        return self._pipe.teacher_backend.new_cache(teacher, count, capacity)


def open_runner(job: Job, manifest: Manifest) -> Runner:
    """Opens what the job names. Raises DDError."""
    if job.runner.backend in (*IN_TORCH, REFERENCE):
        from ddexport.validate.bench.torch_runners import open_torch

        return open_torch(job, manifest)
    return RuntimeRunner(job)


class TimedSampler:
    """Samples from one open runner, and keeps what it gave."""

    def __init__(self, runner: Runner, manifest: Manifest, root: Path) -> None:
        """Raises BundleError for a bad codebook."""
        self.runner, self.manifest = runner, manifest
        self._codebook = read_codebook(root, manifest) if manifest.teacher else None

    def run(self, schedule: Schedule, inputs: Inputs) -> tuple[Times, Outputs, list[Arrays]]:
        """One run from labels and noise to 8-bit images, as the runtime does it, and what the student was
        fed. Raises DDError.

        Beside that it keeps copies of the logits that a teacher's tokens were chosen from.
        """
        runner, teacher = self.runner, self.manifest.teacher
        sampling = sampling_of(schedule, teacher, {})
        fed: list[Arrays] = []
        guided: list[FloatArray] = []

        def student(feeds: Arrays) -> Arrays:
            fed.append(feeds)
            return runner.run("student", schedule.split, feeds, ("sequence", "tokens"))

        def picked(logits: FloatArray, positions: slice) -> IntArray:
            assert sampling is not None
            guided.append(np.array(logits, dtype=np.float32))
            return choose(logits, inputs.uniforms[:, positions], sampling)

        def continued(span: Span, prefix: IntArray) -> IntArray:
            assert teacher is not None and sampling is not None
            graph, scale = partial(runner.run, TEACHER, None), sampling.guidance_scale
            new_cache = runner.new_cache
            return generate(graph, teacher, span, prefix, inputs.labels, scale, picked, new_cache=new_cache)

        began, alone = time.perf_counter(), None
        if sampling is not None and not schedule.known:
            alone = runner.generate_alone(inputs.labels, picked, sampling.guidance_scale)
        noise, codebook = inputs.noise, self._codebook
        steps = [alone] if alone else sample(student, noise, inputs.labels, schedule, continued, codebook)
        sampled = time.perf_counter()
        image = runner.run("decoder", None, {"sequence": steps[-1].sequence})["image"]
        decoded = time.perf_counter()
        to_uint8(image)
        total = time.perf_counter() - began
        by_teacher = sum(step.seconds for step in steps if step.role == TEACHER)
        by_student = sum(step.seconds for step in steps) - by_teacher
        outputs = Outputs(steps, image, np.concatenate(guided, axis=1) if guided else None)
        return Times(by_student, by_teacher, decoded - sampled, total), outputs, fed

    def logits(self, schedule: Schedule, fed: list[Arrays]) -> list[FloatArray]:
        """The student's logits of what it was fed: users do not ask for them, so that no timed run does."""
        return [
            np.asarray(self.runner.run("student", schedule.split, feeds, ("logits",))["logits"])
            for feeds in fed
        ]
