"""Where a long measurement stands, so that one that was stopped goes on with the very numbers it had.

One npz that is always whole: it is written beside itself and renamed into place. It carries the key of its
run, everything that its numbers depend on; another run does not touch it.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write, make_directory

FILE = "fid-state.npz"
KEY, DONE = "key", "done"
SAVE_SECONDS = 30.0
SHARE_OF_TIME = 20  # a save that takes long is made so much more rarely: at most a twentieth of the time

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]


class StateError(DDError):
    """A state that belongs to another run, or that cannot be read."""


def digest_of(key: Mapping[str, Any]) -> str:
    """A short name of a run."""
    return hashlib.sha256(_text(key).encode()).hexdigest()[:12]


class State:
    """The state of one run in a directory. `key`: plain data that names the run."""

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        self.path = directory / FILE
        self._key = key
        self._saved = time.monotonic()
        self._cost = 0.0

    def load(self, restore: Callable[[Arrays], None]) -> int:
        """Gives the saved arrays to `restore`, and returns how many images they hold; 0 where none are saved.

        The arrays are read one by one as they are asked for. Raises StateError for a state of another run,
        which says what differs, and for a damaged one.
        """
        if not self.path.is_file():
            return 0
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                differences = _differences(json.loads(str(archive[KEY])), json.loads(_text(self._key)))
                done = int(archive[DONE])
                if not differences:
                    restore(archive)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StateError(
                f"{self.path} cannot be read as the state of a run: {error}",
                "delete it to begin again, or name another directory with --state",
            ) from error
        if differences:
            raise StateError(
                f"{self.path} is the state of another run: {'; '.join(differences)}",
                "run that one to its end, delete the file, or name another directory with --state",
            )
        return done

    def due(self) -> bool:
        """Whether it is time to save again."""
        waited = time.monotonic() - self._saved
        return waited >= max(SAVE_SECONDS, SHARE_OF_TIME * self._cost)

    def save(self, done: int, arrays: Iterable[tuple[str, npt.NDArray[Any]]]) -> None:
        """Writes the state of a run after its first `done` images, one array after the other.

        Raises OutputError.
        """
        start = time.monotonic()
        make_directory(self.path.parent)
        own = ((KEY, np.array(_text(self._key))), (DONE, np.array(done)))
        with atomic_write(self.path) as stream, zipfile.ZipFile(stream, "w") as archive:
            for name, array in chain(own, arrays):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    npy.write_array(entry, np.asarray(array), allow_pickle=False)
        self._saved = time.monotonic()
        self._cost = self._saved - start

    def discard(self) -> None:
        """Removes the state of a run that has ended, and its directory if nothing else is in it."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            self.path.parent.rmdir()


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _differences(stored: Any, wanted: Any) -> list[str]:
    """`seed 1, here 2`, one for each entry that differs."""
    if not isinstance(stored, dict):
        return ["it names no run"]
    names = sorted({*stored, *wanted})
    return [
        f"{name} {_shown(stored.get(name))}, here {_shown(wanted.get(name))}"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
