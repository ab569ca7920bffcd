"""From the decoder's floats to 8-bit images, and to one picture of many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddexport.runtime.errors import BackendError, OutputError

VISIBLE_SIDE = 128  # a 32 x 32 image is a speck on a screen
MAX_GRID_SIDE = 16384


def to_uint8(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Channels-first floats in [0, 1] (N, C, H, W) -> bytes (N, H, W, C): round(clip(x, 0, 1) * 255).

    Ties go to the even neighbour. Raises BackendError if a value is NaN or infinite.
    """
    if not np.isfinite(image).all():
        raise BackendError(
            "the decoder's image is not finite", "The weights are damaged, or too large for this precision."
        )
    scaled = np.rint(np.clip(image, 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))


def to_pil(images: NDArray[np.uint8]) -> list[Image.Image]:
    """uint8 (N, H, W, C) with C 1 or 3 -> N images."""
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size row by row in one picture; small ones are enlarged by a whole factor, to be seen."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    largest = MAX_GRID_SIDE // max(columns * width, rows * height)
    factor = max(1, min(VISIBLE_SIDE // max(width, height), largest))
    picture = Image.new(images[0].mode, (columns * width, rows * height), "white")
    for place, image in enumerate(images):
        picture.paste(image, (place % columns * width, place // columns * height))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def grid_columns(labels: int, num_images: int, width: int, height: int) -> int:
    """How many images of width x height stand side by side: those of a label, if it has several.

    Otherwise, and where that is too wide or too high, the grid is nearly square, if possible without a gap.
    Raises OutputError if no picture can hold so many.
    """
    count = labels * num_images
    side = math.isqrt(count - 1) + 1
    square = next((columns for columns in range(side, 2 * side) if count % columns == 0), side)
    for columns in (num_images, square, side) if num_images > 1 else (square, side):
        if max(columns * width, -(-count // columns) * height) <= MAX_GRID_SIDE:
            return columns
    raise OutputError(
        f"{count:,} images of {width} x {height} are too many for one picture",
        "Give a directory to -o, for one file per image.",
    )
