"""Directories that appear whole or not at all.

A bundle may take minutes and gigabytes to write. It is written to a hidden sibling and renamed into place at
the end, so that nobody ever sees half of one. An error or Ctrl-C removes the sibling. What a killed process
leaves is named in a warning of the next one and never removed: another machine may still be writing it.
"""

from __future__ import annotations

import errno
import glob
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddexport.runtime.errors import OutputError

PARTIAL, REPLACED = ".part", ".old"
LEFT = {PARTIAL: "what an export had written", REPLACED: "what was there before an export"}


@contextmanager
def staged_directory(
    target: Path, replace: bool = False, needed_bytes: int = 0, marker: str | None = None
) -> Iterator[Path]:
    """Yields an empty directory that becomes `target` when the block ends without an error.

    Args:
        target: the directory to make; its parents are made too.
        replace: whether an existing `target` may be replaced. It stays whole until the new one is complete.
        needed_bytes: refuse at once where the disk has less room than this.
        marker: replace only what holds a file of this name, or nothing: never somebody's other files.

    Raises:
        OutputError: `target` exists and `replace` is false, or is something else than what is written here,
            or the place cannot be written, or the disk is full.
    """
    target = target.resolve()
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        _check_replaceable(target, replace, marker)
        target.parent.mkdir(parents=True, exist_ok=True)
        _warn_of_leftovers(target)
        staging.mkdir()
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.filename}: {error.strerror}", "choose another place with -o"
        ) from error
    try:
        free = shutil.disk_usage(staging).free
        if free < needed_bytes:
            raise OutputError(
                f"{target.parent} has {free / 2**30:.1f} GiB of room,"
                f" about {needed_bytes / 2**30:.1f} GiB are needed",
                "make room, or choose another place with -o",
            )
        yield staging
        _check_replaceable(target, replace, marker)  # somebody may have made it in the meantime
        _swap(staging, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"no space left while writing {target}", "make room, or use -o") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(target: Path, replace: bool, marker: str | None) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file, not a directory", "use -o for another place")
    if not replace:
        raise OutputError(f"{target} exists already", "use --force to replace it, or -o for another place")
    if marker and not (target / marker).exists() and any(target.iterdir()):
        raise OutputError(
            f"{target} holds other files and no {marker}: it is not replaced", "use -o for another place"
        )


def _swap(staging: Path, target: Path) -> None:
    old = staging.with_suffix(REPLACED)
    try:
        if target.exists():
            target.rename(old)
        staging.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _warn_of_leftovers(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.*"):
        if path.suffix in LEFT:
            logging.getLogger(__name__).warning(
                "%s is %s that was killed, or that still runs: remove or rename it", path, LEFT[path.suffix]
            )
