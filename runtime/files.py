"""Files the command line reads and writes: noise, dumps, images. Nothing is ever left half written."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from ddexport.runtime.errors import DDError, NoiseError, OutputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_ARRAY_BYTES = 4 << 30
WHAT_NOISE_IS = (
    "It must be an npz with `noise` float32 (N, L, Cv), optionally `labels` (N,) of class numbers, and for a"
    " teacher `uniforms` float64 (N, L)."
)
KINDS = {"integers": "iu", "integers or bools": "iub", "floats": "f"}
NOISE_ARRAYS = {"noise": ("float32", 3), "labels": ("integers", 1), "uniforms": ("float64", 2)}


@contextmanager
def atomic_write(path: Path, follow: bool = False) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` when it is complete, else not at all. Raises OutputError.

    follow: a link is followed, for outputs that a user names; else it is replaced, for a bundle's links lead
    into the Hub's cache, or wherever its maker wants. What cannot be replaced is written into, once the
    content is complete: a device, a FIFO, a mounted file, a file in a directory that is read-only.
    """
    with _explained(path):
        if (follow or not path.is_symlink()) and _in_place(path):
            with tempfile.TemporaryFile() as content:
                yield content
                _copy(content, path)
            return
        if follow:
            path = Path(os.path.realpath(path))
        partial = path.with_name(f".ddexport-{uuid.uuid4().hex}.part")
        try:
            with partial.open("wb") as stream:
                yield stream
            if path.is_file() and not path.is_symlink():
                shutil.copymode(path, partial)
            try:
                partial.replace(path)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                with partial.open("rb") as content:  # a mount point
                    _copy(content, path)
        finally:
            with suppress(OSError):
                partial.unlink()


def _in_place(path: Path) -> bool:
    """Whether `path` is there, and no other file can take its place."""
    if not path.exists() or path.is_dir():
        return False
    return not path.is_file() or (os.access(path, os.W_OK) and not os.access(path.parent, os.W_OK))


def _copy(content: IO[bytes], path: Path) -> None:
    content.seek(0)
    with path.open("wb") as stream:
        shutil.copyfileobj(content, stream)


def check_writable(path: Path) -> None:
    """Raises OutputError if no file can be made at `path`: better known before the work than after it.

    For outputs that a user names: a link is followed.
    """
    with _explained(path):
        if _in_place(path):
            return
        path = Path(os.path.realpath(path))
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        with suppress(FileNotFoundError):
            path.lstat()  # a name that is too long
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def check_image_suffix(path: Path) -> None:
    """Raises OutputError if the name does not say an image format."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise OutputError(
            f"{path} has no suffix of an image format",
            f"Give one of {', '.join(IMAGE_SUFFIXES)}, or end the name in / for a directory of images.",
        )


def make_directory(path: Path) -> None:
    """Makes a directory with its parents if need be, into which files can be written. Raises OutputError."""
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def write_image(path: Path, image: Image.Image, follow: bool = False) -> None:
    """Writes an image in the format of its suffix; follow: as in `atomic_write`. Raises OutputError."""
    with atomic_write(path, follow) as stream:
        image.save(stream, format={".png": "png", ".webp": "webp"}.get(path.suffix.lower(), "jpeg"))


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], follow: bool = False) -> None:
    """Writes an npz; follow: as in `atomic_write`. Raises OutputError."""
    with atomic_write(path, follow) as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


class Replay(NamedTuple):
    """What a noise file holds: noise float32 (N, L, Cv), labels int64 (N,), uniforms float64 (N, L)."""

    noise: NDArray[np.float32] | None
    labels: NDArray[np.int64] | None
    uniforms: NDArray[np.float64] | None


def read_noise(path: Path) -> Replay:
    """Reads `noise` and, if there are any, `labels` and `uniforms` of an npz. Raises NoiseError."""
    arrays = read_arrays(path, NOISE_ARRAYS, ("noise",), NoiseError, WHAT_NOISE_IS)
    noise, labels = arrays["noise"], arrays.get("labels")
    if labels is not None and len(labels) != len(noise):
        raise NoiseError(f"{path} has {len(noise)} rows of noise but {len(labels)} labels", WHAT_NOISE_IS)
    return Replay(noise, None if labels is None else labels.astype(np.int64), arrays.get("uniforms"))


def read_arrays(
    path: Path,
    expected: Mapping[str, tuple[str, int]],
    needed: Sequence[str],
    fault: type[DDError],
    hint: str,
) -> dict[str, NDArray[Any]]:
    """The arrays of an npz that are expected, by their names.

    Headers are read before the data, so that a file cannot ask for more memory than the limit, and pickled
    objects are refused.

    Args:
        path: the file; errors call it by the first array that it needs.
        expected: type and number of dimensions of what may be there. needed: what must be.
        fault, hint: the error that is raised, and what to say of the content.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            for name in needed:
                if name not in names:
                    raise fault(f"{path} has no array `{name}`, but: {', '.join(names) or 'none'}", hint)
            for name in set(expected) & set(names):
                if message := _header_fault(archive, name, *expected[name]):
                    raise fault(f"{path}: {message}", hint)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in expected if name in names}
    except fault:
        raise
    except FileNotFoundError as error:
        raise fault(f"the {needed[0]} file {path} does not exist", "Check the path.") from error
    except Exception as error:  # the bytes are untrusted: a damaged zip can make its reader raise anything
        raise fault(f"{path} cannot be read as an npz: {error}", hint) from error


def _header_fault(archive: zipfile.ZipFile, name: str, kind: str, dimensions: int) -> str:
    """What is wrong with type, dimensions or size of an array; "" if nothing is."""
    with archive.open(f"{name}.npy") as stream:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(stream)
    fits = dtype.kind in KINDS[kind] if kind in KINDS else dtype == np.dtype(kind)
    if not fits or len(shape) != dimensions:
        return f"`{name}` must be {kind} of {dimensions} dimensions, but is {dtype} {shape}"
    if dtype.itemsize * int(np.prod(shape, dtype=object)) > MAX_ARRAY_BYTES:
        return f"`{name}` of shape {shape} is too large: split the file"
    return ""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns an OSError into an OutputError about `path`."""
    try:
        yield
    except OSError as error:
        hint = "Check the directory, its rights and the free space, or name another place."
        raise OutputError(f"{path} cannot be written: {error.strerror or error}", hint) from error
