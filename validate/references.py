"""What a set of images is compared with: statistics somebody published, images in a folder, a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddexport.runtime import console
from ddexport.validate.features._base import ByteImages, Extractor
from ddexport.validate.statistics import GaussianFit, Moments, Reservoir
from ddexport.validate.statistics_files import (
    MAX_SIDE,
    WHAT_IT_IS,
    ReferenceSetError,
    read_images,
    read_statistics,
)

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

Draw: TypeAlias = Callable[[Path], Iterable[ByteImages]]

DATA = "data"
ROWS = 10_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 50


@dataclass(frozen=True)
class Reference:
    """A set to compare with.

    name: what the user gave. moments: of its features, float64. features: (M, D) float32 of at most `rows`
    of its images, or None where there are only statistics: then no kernel distance and no precision and
    recall. count: its images, None where a file does not say. identity: the extractor that it was measured
    with; None where a file does not say, so that it rests on the user's word.
    """

    name: str
    moments: GaussianFit
    features: npt.NDArray[np.float32] | None
    count: int | None
    identity: str | None


def load(
    spec: str,
    extractor: Extractor,
    *,
    recipe: Recipe | None = None,
    draw: Draw | None = None,
    rows: int = ROWS,
) -> Reference:
    """The reference called `spec`: `data`, a file, a folder of images or a bundle.

    Args:
        spec: `data` for the training images of the recipe's own data set; else a path.
        extractor: reads images, and is what statistics must have been measured with.
        recipe: needed for `data`.
        draw: gives a bundle's images (n, H, W, 3) uint8, batch by batch; needed for a bundle.
        rows: features kept at most.

    Raises:
        ReferenceSetError: missing, damaged, or not of this extractor.
        FeatureError: images that the extractor cannot read.
    """
    if spec == DATA:
        return _of_images(spec, _data_images(recipe), extractor, rows)
    path = Path(spec)
    if path.is_dir():
        if (path / "bundle.json").is_file():
            if draw is None:
                raise ReferenceSetError(f"{path} is a bundle, which cannot be drawn here", WHAT_IT_IS)
            return _of_images(spec, draw(path), extractor, rows)
        return _of_images(spec, folder_images(path), extractor, rows)
    statistics = read_statistics(path, extractor.width)
    if statistics.identity is not None and statistics.identity != extractor.identity:
        raise ReferenceSetError(
            f"{path} was measured with {_short(statistics.identity)}, not with {_short(extractor.identity)}",
            "Distances between the features of two networks mean nothing: measure the reference again.",
        )
    if statistics.fit is None:
        return _of_images(spec, read_images(path), extractor, rows)
    features = _of_images(spec, read_images(path), extractor, rows).features if statistics.images else None
    return Reference(spec, statistics.fit, features, statistics.fit.count, statistics.identity)


def folder_images(folder: Path) -> Iterator[ByteImages]:
    """The images in a folder and the folders in it, by path: (n, H, W, 3) uint8, n at most 50, of one size
    each. Raises ReferenceSetError: none there, or one that cannot be decoded or is too large.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ReferenceSetError(f"{folder} holds no images ({', '.join(SUFFIXES)})", WHAT_IT_IS)
    batch: list[ByteImages] = []
    for path in console.progress(paths, "reading images"):
        image = _decoded(path)
        if batch and (len(batch) == BATCH or batch[0].shape != image.shape):
            yield np.stack(batch)
            batch = []
        batch.append(image)
    yield np.stack(batch)


def _decoded(path: Path) -> ByteImages:
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE:  # known before anything is unpacked
                raise ReferenceSetError(
                    f"{path} is {image.size[0]} x {image.size[1]}, larger than {MAX_SIDE} a side",
                    "Leave it out, or make it smaller.",
                )
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ReferenceSetError(
            f"{path} cannot be decoded: {error}", "Leave it out, or write it again."
        ) from error


def _data_images(recipe: Recipe | None) -> Iterator[ByteImages]:
    from ddexport.distill.data import load_data
    from ddexport.distill.settings import distill_settings

    if recipe is None:
        raise ReferenceSetError("`data` means the data set of a recipe, and there is none here", WHAT_IT_IS)
    pixels = load_data(distill_settings(recipe).data).train.pixels.numpy()
    for start in range(0, len(pixels), 500):
        part = pixels[start : start + 500]
        yield np.repeat(part[..., None], 3, axis=3) if part.ndim == 3 else part


def _of_images(name: str, batches: Iterable[ByteImages], extractor: Extractor, rows: int) -> Reference:
    moments, sample = Moments(extractor.width), Reservoir(extractor.width, rows)
    for images in batches:
        features = extractor(images).features
        moments.update(features)
        sample.update(features, np.arange(sample.count, sample.count + len(features)))
    if moments.count < 2:
        raise ReferenceSetError(f"the reference {name} has {moments.count} images", "Two are the least.")
    return Reference(name, moments, sample.features, moments.count, extractor.identity)


def _short(identity: str) -> str:
    name, _, digest = identity.partition(":")
    return f"{name} ({digest[:17]})"
