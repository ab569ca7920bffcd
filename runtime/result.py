"""The result of a request: images, the steps that made them, and the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddexport.runtime.sampler import Step

Images: TypeAlias = list[Image.Image] | NDArray[Any]


@dataclass(frozen=True, repr=False)
class Result:
    """N images and the steps that made them; a notebook shows the images.

    images: a list of PIL images, uint8 (N, H, W, C), or for output "sequence" float32 (N, L, Cv), not
    decoded. labels: int64 (N,). noise: float32 (N, L, Cv). steps: one Step for each student step and one for
    all AR steps of a teacher; the last one was decoded. seed: None where the noise was given. uniforms:
    float64 (N, L), the random numbers by which a teacher chose tokens. seconds: spent in student, teacher and
    decoder.
    """

    images: Images
    labels: NDArray[np.int64]
    noise: NDArray[np.float32]
    steps: list[Step]
    seconds: dict[str, float]
    seed: int | None = None
    uniforms: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"<{len(self)} images{seed}, {sum(self.seconds.values()):.3g} s>"

    def _repr_png_(self) -> bytes | None:
        """All images in one picture, for notebooks; None if they are not decoded."""
        import io

        from ddexport.runtime.images import grid, grid_columns, to_pil

        images = self.images
        if not isinstance(images, list):
            if images.dtype != np.uint8:
                return None
            images = to_pil(images)
        stream = io.BytesIO()
        grid(images, grid_columns(len(images), 1, *images[0].size)).save(stream, format="png")
        return stream.getvalue()


def joined(parts: list[Result]) -> Result:
    """The results of consecutive batches as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    images: Images
    if isinstance(first.images, list):
        images = [image for part in parts for image in part.images]
    else:
        images = np.concatenate([part.images for part in parts])
    return Result(
        images,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.noise for part in parts]),
        [
            Step(
                np.concatenate([step.tokens for step in same]),
                np.concatenate([step.sequence for step in same]),
                same[0].role,
                sum(step.seconds for step in same),
            )
            for same in zip(*(part.steps for part in parts), strict=True)
        ],
        {name: sum(part.seconds[name] for part in parts) for name in first.seconds},
        first.seed,
        None if first.uniforms is None else np.concatenate([part.uniforms for part in parts]),
    )
