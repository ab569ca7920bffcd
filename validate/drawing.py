"""The images that `validate fid` measures: labels and noise by index, and the way from them to 8-bit images.

Image i of a seed has the same label and the same noise whatever the batch, the side and the moment at which a
run was stopped; that is what makes two sides comparable image by image, and a run resumable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from runtime.errors import VerificationError
from runtime.images import to_uint8
from runtime.noise import gaussian_noise, philox4x32
from validate.batches import Model
from validate.metrics._base import FloatArray, IntArray

ByteImages: TypeAlias = npt.NDArray[np.uint8]
Schedules: TypeAlias = Mapping[int, tuple[int, ...]]

LABEL_DOMAIN = 1  # the second counter word is 0 for noise (docs/noise.md), so labels never share its numbers
LOW_WORD, WORD_BITS = np.uint64(0xFFFFFFFF), np.uint64(32)


@dataclass(frozen=True)
class Order:
    """Which images are drawn: `images` of them, with labels uniform at random from the seed.

    With `per_class` the labels go round instead: 0, 1, ..., classes - 1, 0, ..., so many of each.
    """

    images: int
    seed: int
    classes: int
    length: int
    width: int
    per_class: int | None = None

    def labels(self, indices: range) -> IntArray:
        """The labels (N,) int64 of the images `indices`."""
        index = np.arange(indices.start, indices.stop, dtype=np.uint64)
        if self.per_class is not None:
            return (index % np.uint64(self.classes)).astype(np.int64)
        zero = np.zeros_like(index)
        counter = np.stack([zero, zero + np.uint64(LABEL_DOMAIN), index & LOW_WORD, index >> WORD_BITS])
        word = philox4x32(counter, self.seed)[0]
        return np.asarray((word * np.uint64(self.classes)) >> WORD_BITS, dtype=np.int64)

    def noise(self, indices: range) -> FloatArray:
        """The noise (N, L, Cv) float32 of the images `indices`, the runtime's own for this seed."""
        return gaussian_noise(self.seed, indices, self.length, self.width)

    def batches(self, size: int, start: int = 0) -> list[range]:
        """The images from `start` on in batches of at most `size`."""
        return [range(i, min(i + size, self.images)) for i in range(start, self.images, size)]

    @property
    def label_rule(self) -> str:
        """How the labels are chosen, in words."""
        return "uniform" if self.per_class is None else f"{self.per_class} of each class"


def draw(
    model: Model, order: Order, indices: range, schedules: Schedules, name: str
) -> dict[int, ByteImages]:
    """The images `indices` in every schedule, by its number of steps: uint8 (N, H, W, 3).

    Steps that several schedules share are run once. `name` is what an error calls the model.
    Raises VerificationError where an image is not finite.
    """
    labels, noise = order.labels(indices), order.noise(indices)
    sequences: dict[tuple[int, ...], FloatArray] = {}
    images: dict[int, ByteImages] = {}
    for count, known in schedules.items():
        tokens = noise
        for step in range(len(known)):
            prefix = known[: step + 1]
            if prefix not in sequences:
                kept = np.full(len(labels), known[step], dtype=np.int64)
                tokens = np.concatenate([tokens[:, : known[step]], noise[:, known[step] :]], axis=1)
                sequences[prefix] = model.student(tokens, labels, kept).sequence
            tokens = sequences[prefix]
        drawn = model.decode(tokens)
        finite = np.isfinite(drawn).all(axis=(1, 2, 3))
        if not finite.all():
            image = indices.start + int(np.argmin(finite))
            raise VerificationError(
                f"image {image} of {name} is not finite in {count} step{'s' if count > 1 else ''}",
                "the weights are damaged, or too large for this precision",
            )
        images[count] = to_uint8(drawn)
    return images
