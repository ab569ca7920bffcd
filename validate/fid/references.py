"""What a set of images is compared with: statistics somebody published, images in a folder, a data set.

| reference | holds |
|---|---|
| torch file | `{"m": mean, "s": covariance}`, tensors or NumPy arrays: the published statistic.pth |
| npz | `mu`, `sigma`: what pytorch-fid writes |
| folder | images |
| `data` | the training images of the recipe's own data set |

Files are untrusted: what they unpack to is known before they are read; pickles are read with `weights_only`,
objects in arrays are refused; and a matrix must be the covariance that it is said to be.
"""

from __future__ import annotations

import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ddexport.runtime import console
from ddexport.runtime.errors import DDError
from ddexport.validate.features._base import ByteImages, Extractor
from ddexport.validate.metrics.frechet import FrechetTo, Gaussian, gaussian

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

DATA = "data"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SIDE = 8192
BATCH = 50
INCEPTION_WIDTH = 2048  # of what is given by mistake: it is read, so that the error can name its width
WHAT_IT_IS = (
    "Give {'m': mean, 's': covariance} (torch), an npz with `mu` and `sigma`, or a folder of images"
    " (`validate fid --save-images` writes one)."
)


class ReferenceSetError(DDError):
    """A reference that cannot be read, or that is not what it is said to be."""


@dataclass(frozen=True)
class Reference:
    """A set to compare with.

    name: what the user gave. fit: of its features; without a count where a file does not say. features:
    (M, D) float32, on disk; None where there are only statistics: then no precision and recall.
    """

    name: str
    fit: Gaussian
    features: npt.NDArray[np.float32] | None = None

    @cached_property
    def frechet(self) -> FrechetTo:
        """The distance to this set."""
        return FrechetTo(self.fit)


def load(name: str, extractor: Extractor, recipe: Recipe | None = None) -> Reference:
    """The reference called `name`: `data`, which needs the recipe; a file of statistics; a folder of images.

    Raises ReferenceSetError: missing, damaged, or of other features; FeatureError: images that the extractor
    cannot read.
    """
    path = Path(name)
    if name != DATA and not path.is_dir():
        return Reference(name, read_statistics(path, extractor.width))
    batches = _data_images(recipe) if name == DATA else folder_images(path)
    with tempfile.TemporaryFile() as stream:  # mapped below, and gone with the mapping
        count = sum(stream.write(extractor(images).features.tobytes()) for images in batches)
        count //= 4 * extractor.width
        if count < 2:
            raise ReferenceSetError(f"the reference {name} has {count} images", "Two are the least.")
        stream.flush()
        features = np.memmap(stream, np.float32, "r").reshape(count, extractor.width)
    return Reference(name, gaussian(features), features)


def folder_images(folder: Path) -> Iterator[ByteImages]:
    """The images in a folder and the folders in it, by path: (n, H, W, 3) uint8, n at most 50, of one size
    each. Raises ReferenceSetError: none there, or one that cannot be decoded or is too large.
    """
    if (folder / "bundle.json").is_file():  # its pictures are of reports
        raise ReferenceSetError(f"{folder} is a bundle and no folder of images", WHAT_IT_IS)
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


def _data_images(recipe: Recipe | None) -> Iterable[ByteImages]:
    from ddexport.distill.data import load_data
    from ddexport.distill.settings import distill_settings

    if recipe is None:
        raise ReferenceSetError("`data` means the data set of a recipe, and there is none here", WHAT_IT_IS)
    pixels = load_data(distill_settings(recipe).data).train.pixels.numpy()
    for start in range(0, len(pixels), 500):
        part = pixels[start : start + 500]
        yield np.repeat(part[..., None], 3, axis=3) if part.ndim == 3 else part


def read_statistics(path: Path, width: int) -> Gaussian:
    """Mean (width,) and covariance (width, width) of a file, as float64.

    Raises ReferenceSetError: no such file or a damaged one, other shapes or types, numbers that are not
    finite, a matrix that is not symmetric, or that has clearly negative eigenvalues.
    """
    npz = path.suffix.lower() == ".npz"
    names = ("mu", "sigma") if npz else ("m", "s")
    most = 4 * 8 * max(width, INCEPTION_WIDTH) ** 2  # four float64 matrices
    try:
        arrays = _read_npz(path, names, most) if npz else _read_torch(path, names, most)
    except FileNotFoundError as error:
        raise ReferenceSetError(f"there is no reference {path}", WHAT_IT_IS) from error
    except pickle.UnpicklingError as error:
        raise ReferenceSetError(
            f"{path} holds more than numbers, or is no torch file; it is not read", WHAT_IT_IS
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, MemoryError,
            zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        text = (str(error).splitlines() or [""])[0][:200]
        raise ReferenceSetError(f"{path} cannot be read: {text}", WHAT_IT_IS) from error
    return _checked(path, arrays[0], arrays[1], width)


def _read_npz(path: Path, names: tuple[str, str], most: int) -> list[Any]:
    with np.load(path, allow_pickle=False) as archive:
        _require_keys(path, names, archive.files)
        infos = [info for info in archive.zip.infolist() if info.filename.removesuffix(".npy") in names]
        _require_small(path, sum(info.file_size for info in infos), most)
        return [archive[name] for name in names]


def _read_torch(path: Path, names: tuple[str, str], most: int) -> list[Any]:
    import torch

    size = path.stat().st_size
    if zipfile.is_zipfile(path):  # which may be packed, and unpacks to its whole size
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(info.file_size for info in archive.infolist()))
    _require_small(path, size, most)
    # The published script saved arrays, not tensors. These are what the pickle of an array of floats names,
    # under NumPy's old and new module; none of them runs code of the file.
    rebuild = np.zeros(1).__reduce__()[0]
    moved = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")]
    kinds = [np.ndarray, np.dtype, type(np.dtype(np.float32)), type(np.dtype(np.float64))]
    with torch.serialization.safe_globals([*kinds, *moved]):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ReferenceSetError(f"{path} holds no dict but a {type(state).__name__}", WHAT_IT_IS)
    _require_keys(path, names, state)
    values = (state[name] for name in names)
    return [value.numpy() if isinstance(value, torch.Tensor) else value for value in values]


def _require_keys(path: Path, names: tuple[str, str], held: Iterable[Any]) -> None:
    held = [*map(str, held)]
    if not {*names} <= {*held}:
        raise ReferenceSetError(
            f"{path} has no `{names[0]}` and `{names[1]}`, but: {', '.join(held[:8]) or 'nothing'}",
            WHAT_IT_IS,
        )


def _require_small(path: Path, size: int, most: int) -> None:
    if size > most:
        raise ReferenceSetError(
            f"{path} holds {size >> 20} MiB, too much for the statistics of these features",
            "The statistics are of another feature extractor, or the file holds something else.",
        )


def _checked(path: Path, mean: Any, covariance: Any, width: int) -> Gaussian:
    for name, array, shape in (("mean", mean, (width,)), ("covariance", covariance, (width, width))):
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise ReferenceSetError(f"{path}: the {name} is no array of real numbers", WHAT_IT_IS)
        if array.shape != shape:
            raise ReferenceSetError(
                f"{path}: the {name} is {array.shape}, but these features have {width} numbers",
                "The statistics are of another feature extractor.",
            )
        if not np.isfinite(array).all():
            raise ReferenceSetError(f"{path}: the {name} has numbers that are not finite", "It is damaged.")
    sigma = np.asarray(covariance, dtype=np.float64)
    size = np.abs(sigma).max()
    lowest = float(np.linalg.eigvalsh((sigma + sigma.T) / 2)[0])
    if np.abs(sigma - sigma.T).max() > 1e-4 * size:
        raise ReferenceSetError(f"{path}: the covariance is not symmetric", "The file is damaged.")
    if lowest < -1e-4 * size:  # smaller ones are rounding, where it is stored in float32
        raise ReferenceSetError(
            f"{path}: the covariance has the eigenvalue {lowest:.3g}, so it is none", "The file is damaged."
        )
    return Gaussian(np.asarray(mean, dtype=np.float64), (sigma + sigma.T) / 2)
