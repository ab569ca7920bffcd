"""Whether an image depends on the others that are drawn with it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.conditions import Conditions
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.pipeline import Pipeline

PROBE = "0"  # the number of a class in every bundle, and a text


def same_in_company(pipe: Pipeline, most: int) -> bool:
    """Whether the engine gives the same floats of an image alone and in batches of up to `most`.

    Tried on the fewest steps, a teacher's alone on two images only, because it is slow. Raises DDError.
    """
    size, schedule = pipe.manifest.sequence, pipe.schedule()
    decoder = pipe.manifest.decoder(precision=pipe.backend.configuration.graphs)
    given = pipe.conditions(PROBE)

    def floats(first: int, count: int) -> list[NDArray[np.float32]]:
        images = range(first, first + count)
        uniforms = uniform_numbers(0, images, size.length) if schedule.teacher else None
        noise = gaussian_noise(0, images, size.length, size.width)
        rows: Conditions = given.rows(np.zeros(count, np.int64))
        sequence = pipe(rows, noise=noise, output="sequence", batch_size=count, uniforms=uniforms).images
        assert isinstance(sequence, np.ndarray)
        return [sequence, pipe.backend.run(decoder, {"sequence": sequence})["image"]]

    for count in sorted({2, min(3, most), most}) if schedule.known else [2]:
        together = floats(0, count)
        for image in sorted({0, 1, count // 2, count - 1}):
            alone = floats(image, 1)
            if any(not np.array_equal(a[0], b[image]) for a, b in zip(alone, together, strict=True)):
                return False
    return True
