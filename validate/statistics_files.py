"""Files of feature statistics: the published torch file, pytorch-fid's npz, guided-diffusion's npz, ours.

| file | holds |
|---|---|
| torch | `{"m": mean, "s": covariance}`, tensors or NumPy arrays |
| npz | `mu`, `sigma`; guided-diffusion's also `arr_0`, images uint8 (N, H, W, 3) |
| our npz | `mu`, `sigma`, `count`, `identity` of the extractor |

Files are untrusted: headers are read before data, so that a file cannot ask for memory; pickles are read with
`weights_only`, objects in arrays are refused; and a matrix must be the covariance that it is said to be.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from ddexport.runtime.errors import DDError
from ddexport.runtime.files import write_arrays
from ddexport.validate.statistics import Gaussian, GaussianFit

ByteImages: TypeAlias = npt.NDArray[np.uint8]

MAX_SIDE = 8192
BATCH_BYTES = 64 << 20
WHAT_IT_IS = (
    "Give {'m': mean, 's': covariance} (torch), an npz with `mu` and `sigma`, an npz with images uint8"
    " (N, H, W, 3) as `arr_0`, or a folder of images."
)


class ReferenceSetError(DDError):
    """A reference that cannot be read, or that is not what it is said to be."""


@dataclass(frozen=True)
class StatisticsFile:
    """What a file holds: fit None if it holds images only; identity of the extractor if it is stated."""

    fit: Gaussian | None
    identity: str | None
    images: bool


def read_statistics(path: Path, width: int) -> StatisticsFile:
    """Of features `width` wide; its images are read by `read_images`. Raises ReferenceSetError."""
    return _read_npz(path, width) if path.suffix.lower() == ".npz" else _read_torch(path, width)


def save_statistics(path: Path, fit: GaussianFit, identity: str) -> None:
    """Writes an npz that pytorch-fid reads too, with the extractor's identity. Raises OutputError."""
    count = -1 if fit.count is None else fit.count
    arrays = {
        "mu": fit.mean,
        "sigma": fit.covariance,
        "count": np.array(count),
        "identity": np.array(identity),
    }
    write_arrays(path, arrays)


def read_images(path: Path) -> Iterator[ByteImages]:
    """The images `arr_0` of an npz, (n, H, W, 3) uint8 at a time, in constant memory.

    Raises ReferenceSetError: no images, or fewer than the header says.
    """
    with _explained(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        shape, fortran, dtype = _header(stream)
        wrong = dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran
        if wrong or not all(0 < side <= MAX_SIDE for side in shape[1:3]) or not shape[0]:
            raise ReferenceSetError(f"{path}: `arr_0` is {dtype} {shape} and not images", WHAT_IT_IS)
        image_bytes = int(np.prod(shape[1:]))
        batch = max(1, min(500, BATCH_BYTES // image_bytes))
        for start in range(0, shape[0], batch):
            count = min(batch, shape[0] - start)
            data = stream.read(count * image_bytes)
            if len(data) != count * image_bytes:
                raise ReferenceSetError(f"{path}: `arr_0` ends before its {shape[0]} images do", WHAT_IT_IS)
            yield np.frombuffer(data, dtype=np.uint8).reshape(count, *shape[1:])


def checked_fit(path: Path, mean: Any, covariance: Any, width: int, count: int | None = None) -> Gaussian:
    """Mean (width,) and covariance (width, width) as float64.

    Raises ReferenceSetError: other shapes or types, numbers that are not finite, a matrix that is not
    symmetric, or that has clearly negative eigenvalues.
    """
    for name, array, shape in (("mean", mean, (width,)), ("covariance", covariance, (width, width))):
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise ReferenceSetError(f"{path}: the {name} is no array of real numbers", WHAT_IT_IS)
        if array.shape != shape:
            raise ReferenceSetError(
                f"{path}: the {name} is {array.shape}, but these features have {width} numbers",
                "The statistics are of another feature extractor.",
            )
        if not np.isfinite(array).all():
            raise ReferenceSetError(
                f"{path}: the {name} has numbers that are not finite", "The file is damaged."
            )
    mu, sigma = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    size = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > 1e-4 * size:
        raise ReferenceSetError(f"{path}: the covariance is not symmetric", "The file is damaged.")
    sigma = (sigma + sigma.T) / 2
    lowest = float(np.linalg.eigvalsh(sigma)[0])
    if lowest < -1e-4 * size:
        raise ReferenceSetError(
            f"{path}: the covariance has the eigenvalue {lowest:.3g}, so it is none", "The file is damaged."
        )
    return Gaussian(mu, sigma, count)


def _read_npz(path: Path, width: int) -> StatisticsFile:
    with _explained(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if not {"mu", "sigma"} <= names:
            if "arr_0" in names:
                return StatisticsFile(None, None, True)
            held = ", ".join(sorted(names)[:8]) or "nothing"
            raise ReferenceSetError(f"{path} has no arrays `mu` and `sigma`, but: {held}", WHAT_IT_IS)
        mean, covariance = _array(path, archive, "mu", width), _array(path, archive, "sigma", width**2)
        count, identity = None, None
        if "count" in names:
            stated = _array(path, archive, "count", 1)
            count = int(stated) if stated.shape == () and stated.dtype.kind in "iu" and stated > 0 else None
        if "identity" in names:
            identity = str(_array(path, archive, "identity", 1))
    return StatisticsFile(checked_fit(path, mean, covariance, width, count), identity, "arr_0" in names)


def _array(path: Path, archive: zipfile.ZipFile, name: str, most: int) -> npt.NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        shape, _, dtype = _header(stream)
    if dtype.hasobject:
        raise ReferenceSetError(f"{path}: `{name}` holds objects of Python, which are never read", WHAT_IT_IS)
    if int(np.prod(shape, dtype=object)) > most or dtype.itemsize > 4096:
        raise ReferenceSetError(
            f"{path}: `{name}` is {shape}, too large for these features",
            "The statistics are of another feature extractor.",
        )
    with archive.open(f"{name}.npy") as stream:
        return np.asarray(npy.read_array(stream, allow_pickle=False))


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def _read_torch(path: Path, width: int) -> StatisticsFile:
    import torch

    with _explained(path):
        # Twice two float64 matrices and some: a zip may be packed, and unpacks to its whole size.
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = max(size, sum(info.file_size for info in archive.infolist()))
        if size > 4 * 8 * width**2 + (1 << 20):
            raise ReferenceSetError(
                f"{path} holds {size >> 20} MiB, too much for the statistics of {width} features",
                "The statistics are of another feature extractor, or the file holds something else.",
            )
        with torch.serialization.safe_globals(_numpy_globals()):
            state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not {"m", "s"} <= state.keys():
        held = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
        raise ReferenceSetError(f"{path} has no `m` and `s`, but: {held or 'nothing'}", WHAT_IT_IS)
    mean, covariance = (
        value.double().numpy() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in (state["m"], state["s"])
    )
    return StatisticsFile(checked_fit(path, mean, covariance, width), None, False)


def _numpy_globals() -> list[Any]:
    """What the pickle of a NumPy array of floats names, under its old and new module. The published script
    saved arrays, not tensors; none of these runs code of the file.
    """
    rebuild = np.zeros(1).__reduce__()[0]
    return [
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float32)),
        type(np.dtype(np.float64)),
        (rebuild, "numpy._core.multiarray._reconstruct"),
        (rebuild, "numpy.core.multiarray._reconstruct"),
    ]


_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what readers raise about a file into a ReferenceSetError."""
    try:
        yield
    except FileNotFoundError as error:
        raise ReferenceSetError(f"there is no reference {path}", WHAT_IT_IS) from error
    except pickle.UnpicklingError as error:
        raise ReferenceSetError(
            f"{path} holds more than numbers, or is no torch file; it is not read", WHAT_IT_IS
        ) from error
    except _UNREADABLE as error:
        text = (str(error).splitlines() or [""])[0][:200]
        raise ReferenceSetError(f"{path} cannot be read: {text}", WHAT_IT_IS) from error
