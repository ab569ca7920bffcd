"""What a request gives: images, how they came about, and how long that took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from ddexport.runtime.sampler import Step
from numpy.typing import NDArray
from PIL import Image

Images: TypeAlias = list[Image.Image] | NDArray[Any]


@dataclass(frozen=True)
class Timings:
    """Seconds spent in the student (all steps), in the decoder and in the teacher (all AR steps)."""

    student: float
    decoder: float
    teacher: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            self.student + other.student, self.decoder + other.decoder, self.teacher + other.teacher
        )

    def by_part(self) -> dict[str, float]:
        """The times by name, in the order of the work; a teacher's where there is one."""
        teacher = {"teacher": self.teacher} if self.teacher else {}
        return {"student": self.student, **teacher, "decoder": self.decoder}


@dataclass(frozen=True)
class Result:
    """N images and how they came about.

    images: a list of PIL images, uint8 (N, H, W, C), or for output "sequence" float32 (N, L, Cv), undecoded.
    labels: int64 (N,). noise: float32 (N, L, Cv). steps: one Step for each student step and one for all AR
    steps of a teacher, the last one is what was decoded. uniforms: float64 (N, L), what a teacher drew by.
    """

    images: Images
    labels: NDArray[np.int64]
    noise: NDArray[np.float32]
    steps: list[Step]
    timings: Timings
    uniforms: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def joined(parts: list[Result]) -> Result:
    """The results of consecutive batches as one."""
    if len(parts) == 1:
        return parts[0]
    images: Images
    if isinstance(parts[0].images, list):
        images = [image for part in parts for image in part.images]
    else:
        images = np.concatenate([part.images for part in parts])
    return Result(
        images,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.noise for part in parts]),
        [
            Step(
                np.concatenate([s.tokens for s in same]),
                np.concatenate([s.sequence for s in same]),
                same[0].role,
                sum(s.seconds for s in same),
            )
            for same in zip(*(part.steps for part in parts), strict=True)
        ],
        sum((part.timings for part in parts), Timings(0.0, 0.0)),
        None if parts[0].uniforms is None else np.concatenate([part.uniforms for part in parts]),
    )
