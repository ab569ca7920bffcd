"""Draws the images of every side and schedule, and keeps their features on disk, row by row.

Nothing is kept of an image but its row, in memory-mapped files: memory does not grow with the number of
images, and a run that was stopped goes on with the rows that it lacks.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write, make_directory
from ddexport.validate.features._base import Extractor, Readings
from ddexport.validate.fid.draws import ByteImages, Draw, Order

Array: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = dict[str, tuple[type[np.generic], tuple[int, ...]]]  # dtype and shape of a row, by name

BUNDLE, REFERENCE = "bundle", "reference"
HEADER, MARKS = "run.json", "marks"


class StateError(DDError):
    """A state that belongs to another run, or that cannot be read."""


class FeatureFiles:
    """Arrays of one row an image, each memory-mapped from a file of `directory`, and which rows are filled.

    `run.json` is written last and says what the run is. `marks.npy` has the checksum of every filled row, 0
    for the others. It is set after the row's data, and a row whose data do not have it counts as not filled:
    so no kill, no full disk and no flipped bit makes a wrong row.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any], images: int, columns: Columns) -> None:
        """Opens the files of the same run (plain data), or makes them where there are none.

        Raises StateError for those of another run, which says what differs, and for damaged ones; OutputError
        where there is no room.
        """
        self.directory, self._header = directory, directory / HEADER
        columns = {**columns, MARKS: (np.uint32, ())}
        if not self._header.is_file():
            make_directory(directory)
            for name, (kind, shape) in columns.items():
                # Zeros to the last byte: a hole that the disk has no room for would later end the process.
                with atomic_write(self._path(name)) as stream:
                    npy.write_array(stream, np.broadcast_to(kind(0), (images, *shape)))
            with atomic_write(self._header) as stream:
                stream.write(json.dumps(run, indent=2).encode())
        self._require_run(run)
        try:
            self.arrays: dict[str, Array] = {
                name: npy.open_memmap(self._path(name), mode="r+") for name in columns
            }
            for name, (kind, shape) in columns.items():
                if self.arrays[name].shape != (images, *shape) or self.arrays[name].dtype != kind:
                    raise ValueError(f"{name}.npy is {self.arrays[name].dtype} {self.arrays[name].shape}")
        except (OSError, ValueError, EOFError) as error:
            raise self._unreadable(error) from error
        self._marks = self.arrays.pop(MARKS)
        marked = np.flatnonzero(self._marks)
        self._marks[marked[self._marks[marked] != self._checksums(marked)]] = 0

    @property
    def filled(self) -> npt.NDArray[np.bool_]:
        """(N,): the images whose rows are there."""
        return np.asarray(self._marks != 0)

    def write(self, indices: range, values: Mapping[str, Array]) -> None:
        """Fills the rows of the images `indices` (n,) with values (n, ...) by the names of the columns."""
        rows = slice(indices.start, indices.stop)
        for name, array in self.arrays.items():
            array[rows] = values[name]
            array.flush()  # type: ignore[attr-defined]
        self._marks[rows] = self._checksums(np.arange(rows.start, rows.stop))
        self._marks.flush()  # type: ignore[attr-defined]

    def discard(self) -> None:
        """Removes the files of a run that has ended, and their directory if nothing else is in it."""
        with suppress(OSError):
            for path in (self._header, *map(self._path, (MARKS, *self.arrays))):
                path.unlink(missing_ok=True)
            self.directory.rmdir()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.npy"

    def _checksums(self, indices: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint32]:
        sums = np.zeros(len(indices), dtype=np.uint32)
        for place, index in enumerate(indices):
            total = 0
            for array in self.arrays.values():
                total = zlib.crc32(array[index : index + 1].data, total)
            sums[place] = total or 1
        return sums

    def _require_run(self, run: Mapping[str, Any]) -> None:
        try:
            stored = dict(json.loads(self._header.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise self._unreadable(error) from error
        wanted = json.loads(json.dumps(run))
        differences = [
            f"{name} {_shown(stored.get(name))}, here {_shown(wanted.get(name))}"
            for name in sorted({*stored, *wanted})
            if stored.get(name) != wanted.get(name)
        ]
        if differences:
            raise StateError(
                f"{self.directory} holds the state of another run: {'; '.join(differences)}",
                "finish that run, delete the directory, or choose another one with --state",
            )

    def _unreadable(self, error: Exception) -> StateError:
        return StateError(
            f"{self.directory} cannot be read as the state of a run: {error}",
            "delete it to begin again, or choose another one with --state",
        )


def digest_of(run: Mapping[str, Any]) -> str:
    """A short name of a run."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]


def columns_of(sides: list[str], steps: list[int], extractor: Extractor) -> Columns:
    """Features of every side and schedule; probabilities, if there is a classifier; and, of two sides, the
    largest 8-bit difference of an image.
    """
    columns: Columns = {}
    for count in steps:
        for side in sides:
            columns[f"{side}-{count}"] = (np.float32, (extractor.width,))
            if extractor.classes is not None:
                columns[f"{side}-{count}-probabilities"] = (np.float32, (extractor.classes,))
        if len(sides) > 1:
            columns[f"difference-{count}"] = (np.uint8, ())
    return columns


def readings_of(files: FeatureFiles, side: str, steps: int) -> Readings:
    """The columns of one set of images."""
    return Readings(files.arrays[f"{side}-{steps}"], files.arrays.get(f"{side}-{steps}-probabilities"))


def draw_features(
    order: Order,
    batch: int,
    sides: Mapping[str, Draw],
    extractor: Extractor,
    files: FeatureFiles,
    advance: Callable[[int], None],
) -> None:
    """Fills every batch that is not: all sides and schedules from the same labels and noise."""
    for indices in order.batches(batch):
        if files.filled[indices.start : indices.stop].all():
            continue
        values: dict[str, Array] = {}
        drawn: dict[int, list[ByteImages]] = {}
        for side, draw in sides.items():
            for steps, images in draw(order, indices).items():
                readings = extractor(images)
                values[f"{side}-{steps}"] = readings.features
                if readings.probabilities is not None:
                    values[f"{side}-{steps}-probabilities"] = readings.probabilities
                drawn.setdefault(steps, []).append(images)
        for steps, pair in drawn.items():
            if len(pair) > 1:
                values[f"difference-{steps}"] = largest_difference(*pair)
        files.write(indices, values)
        advance(len(indices))


def largest_difference(first: ByteImages, second: ByteImages) -> npt.NDArray[np.uint8]:
    """(n,): of the 8-bit values of each image, (n, H, W, 3) both."""
    return np.asarray(np.abs(first.astype(np.int16) - second).max(axis=(1, 2, 3)), dtype=np.uint8)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
