"""What is timed, a runner on a workload, and what goes to its process and comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddexport.runtime.bundle import TEACHER, Manifest
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.sampler import Step
from ddexport.validate.metrics._base import FloatArray, IntArray

TORCH, COMPILED, PUBLISHED = "torch", "torch-compile", "published"
IN_TORCH = (TORCH, COMPILED, PUBLISHED)  # what PyTorch computes, beside the backends of the runtime
REFERENCE = "reference"  # the float32 modules that outputs are held against


@dataclass(frozen=True)
class RunnerConfiguration:
    """What computes: a backend of the runtime, one of `IN_TORCH`, or `REFERENCE`.

    threads: of the CPU, in all. processes: how many copies run side by side; they share the threads.
    """

    backend: str
    precision: str
    threads: int
    device: str = "cpu"
    processes: int = 1

    @property
    def threads_each(self) -> int:
        return max(1, self.threads // self.processes)

    def __str__(self) -> str:
        """For people: `onnxruntime bf16, cuda:0, 2 processes`."""
        device = f", {self.device}" if self.device != "cpu" else ""
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return f"{self.backend} {self.precision}{device}{processes}"


@dataclass(frozen=True)
class Workload:
    """A batch of images in a number of steps, or in all of the teacher's."""

    batch: int
    steps: int | str

    @property
    def by_teacher(self) -> bool:
        return self.steps == TEACHER

    @property
    def order(self) -> tuple[int, bool, int]:
        """Small ones first, so that none finds more memory in use than it needs itself."""
        return (self.batch, self.by_teacher, 0 if isinstance(self.steps, str) else self.steps)

    def __str__(self) -> str:
        return f"batch {self.batch}, steps {self.steps}"


@dataclass(frozen=True)
class Inputs:
    """labels (B,) int64, noise (B, L, Cv) float32, uniforms (B, L) float64: the same for all runners."""

    labels: IntArray
    noise: FloatArray
    uniforms: npt.NDArray[np.float64]


def inputs_of(manifest: Manifest, batch: int, seed: int) -> Inputs:
    """Labels spread over all classes, noise and uniform numbers of the seed, as in `validate parity`."""
    sequence, classes = manifest.sequence, manifest.classes
    spread = np.arange(batch, dtype=np.int64) * classes // batch
    return Inputs(
        (spread + seed % classes) % classes,
        gaussian_noise(seed, range(batch), sequence.length, sequence.width),
        uniform_numbers(seed, range(batch), sequence.length),
    )


@dataclass(frozen=True)
class Job:
    """What a worker process opens. files: the published checkpoints by role, of a bundle that was made from
    some. weights: which copy in them."""

    bundle: Path
    runner: RunnerConfiguration
    seed: int = 0
    files: Mapping[str, Path | None] | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of one run: all student steps, all AR steps of the teacher, the decoder, and everything from
    labels and noise to 8-bit images."""

    student: float
    teacher: float
    decoder: float
    total: float


@dataclass(frozen=True)
class Outputs:
    """What parity is measured on: the sampler's steps, image (B, 3, H, W) float32, guided (B, P, V), the
    teacher's logits of the positions that it generated, and logits (B, S, V) of every student step."""

    steps: Sequence[Step]
    image: FloatArray
    guided: FloatArray | None = None
    logits: Sequence[FloatArray] = ()

    def digest(self) -> str:
        """Equal for runs that gave the same to the bit."""
        digest = hashlib.sha256()
        of_steps = [array for step in self.steps for array in (step.tokens, step.sequence)]
        for array in (self.image, *([] if self.guided is None else [self.guided]), *of_steps):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Run:
    """One run of a workload. peak_mib: the most memory in use. outputs: None where such were seen before."""

    times: Times
    peak_mib: float | None = None
    outputs: Outputs | None = None
