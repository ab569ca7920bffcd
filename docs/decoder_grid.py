"""The images of a bundle that its small decoder changes most, each with the full decoder's above it.

`python docs/decoder_grid.py BUNDLE OUT.png` draws 4,000 images of seed 0 in one step, and keeps 20 pairs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import ddexport
from ddexport.runtime.files import write_image
from ddexport.runtime.images import grid, to_pil

IMAGES, KEPT, BATCH = 4000, 20, 200


def main(bundle: str, out: str) -> None:
    kept: list[tuple[float, np.ndarray, np.ndarray]] = []
    with ddexport.load(bundle) as pipe:
        for first in range(0, IMAGES, BATCH):
            labels = [index % pipe.manifest.classes for index in range(first, first + BATCH)]
            full, small = (
                np.asarray(pipe(labels, 1, first_image=first, output="numpy", decoder=name).images)
                for name in ("full", "small")
            )
            errors = np.square(full.astype(np.float64) - small).mean(axis=(1, 2, 3))
            kept = sorted([*kept, *zip(errors, full, small, strict=True)], key=lambda pair: -pair[0])[:KEPT]
    rows = [pair[place] for place in (1, 2) for pair in kept]
    write_image(Path(out), grid(to_pil(np.stack(rows)), KEPT))


if __name__ == "__main__":
    main(*sys.argv[1:])
