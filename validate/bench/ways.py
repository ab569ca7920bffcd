"""Inside a worker: an alternative that is open, and one timed run of it.

Whatever computes, the runtime's own sampler drives it, so that all alternatives do the same work: what is
timed are graphs and modules. The one exception is PyTorch's auto-regressive model, which is run the way the
published samplers run it (`ddexport.validate.bench.torch_ways`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from ddexport.runtime.graphs import keys_of, student_key
from ddexport.runtime.images import to_uint8
from ddexport.runtime.manifest import Manifest, Schedule, read_manifest
from ddexport.runtime.sampler import Step, TeacherRun, sample
from ddexport.runtime.teacher import Pick, Sampling, by_stream, choice_of, read_codebook
from ddexport.validate.bench.case import IN_TORCH, REFERENCE, Inputs, Job, Times
from ddexport.validate.bench.outputs import Outputs
from ddexport.validate.metrics._base import FloatArray, IntArray, StudentOutput

Arrays = Mapping[str, npt.NDArray[Any]]
DISTRIBUTIONS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "tensorrt": ("tensorrt", "tensorrt-rtx")}
"""Where a backend's engine is not the distribution of its own name."""


class Way(Protocol):
    """An open alternative. `run` takes and gives named arrays by a graph's key, as the runtime does."""

    version: str
    provider: str | None

    def open(self, keys: Iterable[str]) -> None: ...

    def run(self, key: str, feeds: Arrays) -> Arrays: ...

    def close(self) -> None: ...


class RuntimeWay:
    """A bundle as a user opens it."""

    def __init__(self, job: Job) -> None:
        """Raises DDError."""
        from ddexport.runtime.pipeline import load

        mode: dict[str, Any] = {} if job.mode is None else {"mode": job.mode}
        self._pipe = load(job.bundle, job.backend, job.threads, job.precision, verify=False, **mode)
        self.provider = self._pipe.backend.provider
        self.version = engine_version(job.backend)

    def open(self, keys: Iterable[str]) -> None:
        self._pipe.backend.open(keys)

    def run(self, key: str, feeds: Arrays) -> Arrays:
        return self._pipe.backend.run(key, feeds)

    def close(self) -> None:
        self._pipe.close()


def engine_version(backend: str) -> str:
    """Of the package behind a backend, for people and for records; empty if there is none."""
    for name in DISTRIBUTIONS.get(backend, (backend,)):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def open_way(job: Job, manifest: Manifest) -> Way:
    """Opens what the job names. Raises DDError."""
    if job.backend in (*IN_TORCH, REFERENCE):
        from ddexport.validate.bench.torch_ways import open_torch

        way: Way = open_torch(job, manifest)
        return way
    return RuntimeWay(job)


class Drawer:
    """Draws cases with one open alternative."""

    def __init__(self, job: Job, manifest: Manifest | None = None, way: Way | None = None) -> None:
        """Opens the alternative unless it is given. Raises DDError."""
        self.root = Path(job.bundle)
        self.manifest = manifest or read_manifest(self.root, verify=False)
        self.way = way or open_way(job, self.manifest)
        teacher = self.manifest.teacher
        self._codebook = None if teacher is None else read_codebook(self.root, self.manifest)

    def open(self, schedule: Schedule) -> None:
        """Opens the graphs of a schedule. Raises DDError."""
        self.way.open(keys_of(self.manifest, schedule))

    def draw(self, schedule: Schedule, given: Inputs) -> tuple[Times, Outputs]:
        """One run from labels and noise to 8-bit images. Raises DDError.

        As the runtime does it; what is kept for parity beside that are references, and copies of the
        logits that a teacher's tokens were chosen from.
        """
        students: list[StudentOutput] = []
        guided: list[FloatArray] = []
        began = time.perf_counter()
        steps = self._steps(schedule, given, students, guided)
        drawn = time.perf_counter()
        image = self.way.run("decoder", {"sequence": steps[-1].sequence})["image"]
        decoded = time.perf_counter()
        to_uint8(image)
        total = time.perf_counter() - began
        by_teacher = sum(step.seconds for step in steps if step.role == "teacher")
        by_student = sum(step.seconds for step in steps) - by_teacher
        logits = np.concatenate(guided, axis=1) if guided else None
        outputs = Outputs([step.tokens for step in steps], students, logits, steps[-1].sequence, image)
        return Times(by_student, by_teacher, decoded - drawn, total), outputs

    def _steps(
        self, schedule: Schedule, given: Inputs, students: list[StudentOutput], guided: list[FloatArray]
    ) -> list[Step]:
        teacher, choice = None, choice_of(schedule, self.manifest.teacher, Sampling())
        if choice is not None:
            assert self.manifest.teacher is not None and self._codebook is not None
            pick = recorded(by_stream(given.uniforms, choice), guided)
            alone = getattr(self.way, "teacher_alone", None)
            if alone is not None and not schedule.known:
                return [alone(given.labels, pick, choice.cfg)]
            run = partial(self.way.run, "teacher")
            teacher = TeacherRun(run, self.manifest.teacher, self._codebook, choice.cfg, pick)

        def student(feeds: Arrays) -> Arrays:
            found = self.way.run(student_key(self.manifest, schedule), feeds)
            students.append(StudentOutput(found["sequence"], found["logits"]))
            return found

        return sample(student, given.noise, given.labels, schedule, teacher)


def recorded(pick: Pick, guided: list[FloatArray]) -> Pick:
    """The same choice, which also keeps the logits that it was made from."""

    def picked(logits: FloatArray, positions: slice) -> IntArray:
        guided.append(np.array(logits, dtype=np.float32))
        return pick(logits, positions)

    return picked
