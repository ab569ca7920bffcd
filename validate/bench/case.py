"""What is timed: an alternative (a way to compute), and a case (how many images, in how many steps)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from ddexport.runtime.manifest import Manifest

TEACHER = "teacher"
TORCH, COMPILED, PUBLISHED = "torch", "torch-compile", "published"
IN_TORCH = (TORCH, COMPILED, PUBLISHED)
"""What is computed by PyTorch, beside the backends of the runtime."""
REFERENCE, PEAK = "reference", "peak"
"""What workers also do: the float32 modules that outputs are held against, and the machine's own speed."""


def way_name(backend: str, precision: str, mode: str | None, processes: int) -> str:
    """For people: `openvino bf16, throughput, 2 processes`."""
    parts = [f"{backend} {precision}"]
    if mode:
        parts.append(mode)
    if processes > 1:
        parts.append(f"{processes} processes")
    return ", ".join(parts)


@dataclass(frozen=True)
class Alternative:
    """One way to compute: backend (of the runtime, or of `IN_TORCH`), precision, threads in all.

    mode: latency or throughput, of a backend that has the option. processes: how many copies run side by
    side; they share the threads.
    """

    backend: str
    precision: str
    threads: int
    mode: str | None = None
    processes: int = 1

    @property
    def threads_each(self) -> int:
        return max(1, self.threads // self.processes)

    @property
    def name(self) -> str:
        return way_name(self.backend, self.precision, self.mode, self.processes)


@dataclass(frozen=True)
class Case:
    """A batch of images in a number of steps, or in all of the teacher's."""

    batch: int
    steps: int | str

    @property
    def by_teacher(self) -> bool:
        return self.steps == TEACHER

    @property
    def order(self) -> tuple[int, bool, int]:
        """Small ones first, so that each finds no more memory in use than it needs itself."""
        return (self.batch, self.by_teacher, 0 if isinstance(self.steps, str) else self.steps)

    @property
    def name(self) -> str:
        return f"batch {self.batch}, steps {self.steps}"


@dataclass(frozen=True)
class Inputs:
    """labels (B,) int64, noise (B, L, Cv) float32, uniforms (B, L) float64: the same for all alternatives."""

    labels: npt.NDArray[np.int64]
    noise: npt.NDArray[np.float32]
    uniforms: npt.NDArray[np.float64]


def inputs(manifest: Manifest, batch: int, seed: int) -> Inputs:
    """Labels spread over all classes, noise and uniform numbers of the seed, as in `validate parity`."""
    import numpy as np
    from ddexport.runtime.noise import gaussian_noise, uniform_numbers

    sequence, classes = manifest.sequence, manifest.classes
    spread = np.arange(batch, dtype=np.int64) * classes // batch
    return Inputs(
        (spread + seed % classes) % classes,
        gaussian_noise(seed, range(batch), sequence.length, sequence.width),
        uniform_numbers(seed, range(batch), sequence.length),
    )


@dataclass(frozen=True)
class Job:
    """What a worker process is told at its start.

    backend: of an alternative, or `REFERENCE`, or `PEAK` of the engine that `precision` names. directory:
    where its outputs go. files: the published checkpoints, by role, of a bundle that was made from some.
    weights: which copy in them.
    """

    bundle: str
    backend: str
    precision: str
    threads: int
    mode: str | None
    seed: int
    directory: str
    files: Mapping[str, str | None]
    weights: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the pipe."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Job:
        """From plain data."""
        return Job(**{field.name: data[field.name] for field in fields(Job)})


@dataclass(frozen=True)
class Times:
    """Seconds of one run: all student steps, all AR steps of the teacher, the decoder, and from labels and
    noise to 8-bit images."""

    student: float
    teacher: float
    decoder: float
    total: float
