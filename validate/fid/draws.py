"""The images that `validate fid` measures: labels and noise by index, and the two sides that draw from them.

Image i of a seed has the same label and the same noise whatever the batch, the side and the moment at which a
run was stopped; that is what makes two sides comparable image by image, and a run resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.bundle import FULL
from ddexport.runtime.errors import BackendError, VerificationError
from ddexport.runtime.noise import gaussian_noise, uniform_labels
from ddexport.runtime.pipeline import Pipeline
from ddexport.runtime.schedule import Schedule
from ddexport.validate.conditions import conditions_of

if TYPE_CHECKING:
    from ddexport.validate.reference import TorchReference

FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]
ByteImages: TypeAlias = npt.NDArray[np.uint8]
Schedules: TypeAlias = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Order:
    """Which images are drawn: `images` of them, with labels uniform at random from the seed.

    With `per_class` the labels go round instead: 0, 1, ..., classes - 1, 0, ..., so many of each; `given` are
    those of images that were drawn before. classes: their number, or that of the texts.
    """

    images: int
    seed: int
    classes: int
    length: int
    width: int
    per_class: int | None = None
    given: tuple[int, ...] | None = None

    def labels(self, indices: range) -> IntArray:
        """The labels (N,) int64 of the images `indices`."""
        if self.given is not None:
            return np.array(self.given[indices.start : indices.stop], np.int64)
        if self.per_class is not None:
            return np.arange(indices.start, indices.stop, dtype=np.int64) % self.classes
        return uniform_labels(self.seed, indices, self.classes)

    def noise(self, indices: range) -> FloatArray:
        """The noise (N, L, Cv) float32 of the images `indices`, the runtime's own for this seed."""
        return gaussian_noise(self.seed, indices, self.length, self.width)

    def batches(self, size: int) -> list[range]:
        """All images in batches of at most `size`."""
        return [range(i, min(i + size, self.images)) for i in range(0, self.images, size)]

    @property
    def label_rule(self) -> str:
        """How the labels are chosen, in words."""
        if self.given is not None:
            return "of the shards"
        return "uniform" if self.per_class is None else f"{self.per_class} of each class"


def student_schedules(schedules: Mapping[Any, Schedule], split: int) -> dict[Any, tuple[int, ...]]:
    """The `known` numbers of the schedules that involve neither a teacher nor another split than `split`."""
    return {
        steps: schedule.known
        for steps, schedule in schedules.items()
        if schedule.teacher is None and schedule.split in (None, split)
    }


Draw: TypeAlias = Callable[[Order, range], dict[int, ByteImages]]
"""The images of some indices, uint8 (N, H, W, 3), by the number of steps."""


def by_pipeline(pipe: Pipeline, schedules: Schedules, decoder: str = FULL) -> Draw:
    """As users draw them, who have a prompt encoded once for all its images."""
    conditions = conditions_of(pipe.manifest)
    whole = cache(lambda: pipe.conditions(conditions.of_bundle(np.arange(conditions.count))))

    def drawn(order: Order, indices: range) -> dict[int, ByteImages]:
        labels, noise = order.labels(indices), order.noise(indices)
        how: dict[str, Any] = {
            "noise": noise,
            "output": "numpy",
            "batch_size": len(labels),
            "decoder": decoder,
        }
        try:
            given = whole().rows(labels)
            return {steps: np.asarray(pipe(given, steps, **how).images) for steps in schedules}
        except BackendError as error:
            span = f"images {indices.start} to {indices.stop - 1}"
            raise VerificationError(f"{span} of the bundle: {error.message}", error.hint) from error

    return drawn


def by_reference(reference: TorchReference, schedules: Schedules) -> Draw:
    """By the reference's own loop. Raises VerificationError where an image is not finite."""
    from ddexport.validate.sampling import pixels_of

    sampler = reference.sampler

    def drawn(order: Order, indices: range) -> dict[int, ByteImages]:
        noise = order.noise(indices)
        given = reference.conditions.of_reference(order.labels(indices))
        images = {}
        for steps in schedules:
            passes = sampler.sample(noise, given, reference.plans[str(steps)])
            pictures = sampler.decode(passes[-1].sequence)
            if not np.isfinite(pictures).all():
                raise VerificationError(
                    f"images {indices.start} to {indices.stop - 1} of the reference are not finite",
                    "the weights are damaged",
                )
            images[steps] = pixels_of(pictures)
        return images

    return drawn
