"""Built engines by content: what was built once from the same bytes in the same way is not built again.

An entry is a folder named by its key, with the plan and its sidecar, whose hash is checked on every hit. It
is written to a sibling folder and renamed; whoever looks for an entry, writes it or removes it holds the lock
of its key. A killed process leaves a `.partial` folder and no lock, by which the next one knows it.

Two builds of the same graph give different bytes, so the key is made of what goes in (`cache_key`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddexport.runtime._json import decode, read_json
from ddexport.runtime.engines import Engine
from ddexport.runtime.errors import BundleError, DDError, OutputError
from ddexport.runtime.manifest import sha256_of

log = logging.getLogger(__name__)

PLAN = "engine.plan"
ENTRY = "entry.json"
PARTIAL = ".partial"
REMOVED = ".removed"
LOCKS = "locks"


class CacheError(DDError):
    """A cache that cannot be used where it is."""


@dataclass(frozen=True)
class Stored:
    """The file entry.json: the sidecar of the engine, and the model it belongs to."""

    model: str
    created: float
    engine: Engine


@dataclass(frozen=True)
class Entry:
    """One engine of the cache. `used` and `created` are seconds since 1970."""

    key: str
    path: Path
    model: str
    created: float
    used: float
    bytes: int
    engine: Engine


def default_directory() -> Path:
    """`DDEXPORT_CACHE_DIR`, or the user's cache folder, with `engines` in it."""
    named = os.environ.get("DDEXPORT_CACHE_DIR")
    if named:
        return Path(named).expanduser() / "engines"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ddexport" / "engines"


def cache_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 in hex of `parts`, which must be JSON data, whatever the order of its keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class EngineCache:
    """The cache in a directory, which is made when it is first written to."""

    directory: Path

    @contextmanager
    def lock(self, key: str, timeout: float = -1) -> Iterator[None]:
        """Holds the lock of a key. Raises filelock.Timeout after `timeout` seconds, never with -1.

        The lock is the system's: it ends with the process that holds it, however that ends.
        """
        from filelock import FileLock

        try:
            (self.directory / LOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"the cache {self.directory} cannot be written: {error.strerror}",
                "set DDEXPORT_CACHE_DIR to another folder, or use --no-cache",
            ) from error
        with FileLock(self.directory / LOCKS / f"{key}.lock", timeout=timeout):
            self._clear(key)
            yield

    def find(self, key: str) -> Entry | None:
        """The entry of a key, its plan checked against its hash; a damaged one is removed. Needs the lock."""
        path = self.directory / key
        if not path.exists():
            return None
        try:
            entry = self._read(path)
            plan = path / PLAN
            if plan.stat().st_size != entry.engine.bytes or sha256_of(plan) != entry.engine.sha256:
                raise BundleError("its plan is not the one that was stored")
        except (BundleError, OSError) as error:
            log.warning("the cached engine %s is damaged and is built again: %s", key[:12], error)
            self._remove(key)
            return None
        os.utime(path / ENTRY)  # the time of the last use
        return entry

    def store(self, key: str, plan: Path, engine: Engine, model: str) -> None:
        """Copies a plan into the cache. Needs the lock. Raises `CacheError` if the disk is full."""
        partial = self.directory / f"{key}{PARTIAL}"
        stored = Stored(model, time.time(), dataclasses.replace(engine, file=PLAN))
        try:
            partial.mkdir()
            shutil.copyfile(plan, partial / PLAN)
            (partial / ENTRY).write_text(json.dumps(dataclasses.asdict(stored), indent=2) + "\n", "utf-8")
            self._remove(key)
            partial.rename(self.directory / key)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CacheError(
                f"the cache {self.directory} cannot be written: {error.strerror}",
                "make room with: ddexport cache prune --keep 10; or use --no-cache",
            ) from error

    def entries(self) -> tuple[list[Entry], list[str]]:
        """All entries, the one used last first, and the keys of those that cannot be read."""
        found: list[Entry] = []
        damaged: list[str] = []
        for path in self._folders():
            try:
                found.append(self._read(path))
            except (BundleError, OSError):
                damaged.append(path.name)
        return sorted(found, key=lambda entry: -entry.used), damaged

    def remove(self, key: str) -> bool:
        """Removes an entry, and says whether: one that is in use now stays."""
        from filelock import Timeout

        try:
            with self.lock(key, timeout=0):
                self._remove(key)
        except Timeout:
            return False
        return True

    def leftovers(self) -> list[str]:
        """The keys of what killed processes left half-written, and of what is being written now."""
        paths = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted({path.stem for path in paths if path.suffix in (PARTIAL, REMOVED)})

    def clear(self, key: str) -> bool:
        """Removes what a killed process left of an entry, and says whether: not while somebody writes it."""
        from filelock import Timeout

        try:
            with self.lock(key, timeout=0):  # which clears
                return True
        except Timeout:
            return False

    def _folders(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]

    def _read(self, path: Path) -> Entry:
        where = path / ENTRY
        stored = decode(Stored, read_json(where), file=f"{path.name[:12]}/{ENTRY}")
        return Entry(
            key=path.name,
            path=path,
            model=stored.model,
            created=stored.created,
            used=where.stat().st_mtime,
            bytes=sum(file.stat().st_size for file in path.iterdir()),
            engine=stored.engine,
        )

    def _remove(self, key: str) -> None:
        path, removed = self.directory / key, self.directory / f"{key}{REMOVED}"
        if path.exists():
            path.rename(removed)  # gone at once, even if the process dies while it deletes
            shutil.rmtree(removed, ignore_errors=True)

    def _clear(self, key: str) -> None:
        for suffix in (PARTIAL, REMOVED):
            shutil.rmtree(self.directory / f"{key}{suffix}", ignore_errors=True)


def copy_plan(entry: Entry, destination: Path) -> None:
    """Copies the plan of an entry. Raises OutputError if that fails."""
    try:
        shutil.copyfile(entry.path / PLAN, destination)
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {error.strerror}", "make room") from error
