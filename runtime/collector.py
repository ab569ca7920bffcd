"""Takes the results of a request batch by batch and writes what its output needs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ddexport.runtime.files import write_arrays, write_image
from ddexport.runtime.images import grid, grid_columns, to_pil
from ddexport.runtime.result import Result, Timings, joined
from numpy.typing import NDArray


@dataclass
class Collector:
    """Takes results batch by batch, and keeps only what the output needs: nothing, when it is a directory.

    dump: where all arrays go, which keeps all results. `finish` writes what is left. Raises OutputError.
    """

    output: Path
    into_directory: bool
    dump: Path | None = None
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    seconds: Timings | None = None
    count: int = 0

    def add(self, result: Result) -> None:
        """The next batch, images as bytes."""
        if self.into_directory:
            self._write_each(result)
        else:
            self.pixels.append(result.images)  # type: ignore[arg-type]
        if self.dump:
            self.results.append(result)
        self.seconds = result.timings if self.seconds is None else self.seconds + result.timings
        self.count += len(result)

    def finish(self, labels: int, num_images: int) -> None:
        """All batches are there: so many images of so many labels."""
        if not self.into_directory:
            images = [image for batch in self.pixels for image in to_pil(batch)]
            write_image(self.output, grid(images, grid_columns(labels, num_images)))
        if self.dump:
            write_arrays(self.dump, dump_arrays(self.results))

    def _write_each(self, result: Result) -> None:
        images = to_pil(result.images)  # type: ignore[arg-type]
        for number, (image, label) in enumerate(zip(images, result.labels, strict=True), self.count):
            write_image(self.output / f"{number:05d}-class{label:04d}.png", image)


def dump_arrays(results: list[Result]) -> dict[str, NDArray[Any]]:
    """The arrays of a dump: labels, noise, step{k}_tokens and step{k}_sequence of the student's steps from
    k = 1, in between those of a teacher with its uniform numbers, images.
    """
    whole = joined(results)
    arrays: dict[str, NDArray[Any]] = {"labels": whole.labels, "noise": whole.noise}
    if whole.uniforms is not None:
        arrays["uniforms"] = whole.uniforms
    numbers = itertools.count(1)
    for step in whole.steps:
        name = "teacher" if step.role == "teacher" else f"step{next(numbers)}"
        arrays[f"{name}_tokens"] = step.tokens
        arrays[f"{name}_sequence"] = step.sequence
    arrays["images"] = whole.images  # type: ignore[assignment]
    return arrays
