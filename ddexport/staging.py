"""Directories that appear whole or not at all.

A bundle may take minutes and gigabytes to write. It is written to a hidden sibling and renamed into place at
the end, so that nobody ever sees half of one; into a mount point, as a container's volume is, from a hidden
directory in it. An error or Ctrl-C removes what was written. What a killed process leaves is named in a
warning of the next one and never removed: another machine may still be writing it.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddexport.runtime.errors import OutputError

PARTIAL, REPLACED = ".part", ".old"
LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(part|old)")  # in a mount point
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
    name = f"{uuid.uuid4().hex}{PARTIAL}"
    inside = target.is_dir() and not _can_be_renamed(target)
    staging = target / f".{name}" if inside else target.with_name(f".{target.name}.{name}")
    try:
        check_target(target, replace, marker)
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
                f"{staging.parent} has {free / 2**30:.1f} GiB of free space,"
                f" about {needed_bytes / 2**30:.1f} GiB are needed",
                "free some space, or choose another place with -o",
            )
        yield staging
        check_target(target, replace, marker)  # somebody may have made it in the meantime
        if inside:
            _fill(target, staging, marker)
        else:
            _swap(target, staging)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left while writing {target}", "free some space, or choose another place with -o"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, replace: bool, marker: str | None) -> None:
    """Raises OutputError unless `target` is not there, is empty, or may be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} is a file, not a directory", "choose another place with -o")
    if not _content(target):
        return
    if not replace:
        raise OutputError(
            f"{target} exists already", "use --force to replace it, or choose another place with -o"
        )
    if marker and not (target / marker).exists():
        raise OutputError(
            f"{target} holds other files and no {marker}: it is not replaced", "choose another place with -o"
        )


def _content(target: Path) -> list[Path]:
    """What lies in a directory, but for what a file system or a killed process left there."""
    named = [path for path in target.iterdir() if path.name != "lost+found"]
    return [path for path in named if not LEFTOVER.fullmatch(path.name)]


def _can_be_renamed(target: Path) -> bool:
    """Whether another directory can take the place of `target`: not of a mount point.

    A bind mount within one file system shows in nothing but its entry in mountinfo.
    """
    mounts = Path("/proc/self/mountinfo")
    lines = mounts.read_text(errors="replace").splitlines() if mounts.exists() else []
    name = str(target).replace(" ", "\\040")
    mounted = os.path.ismount(target) or any(line.split()[4] == name for line in lines)
    return not mounted and os.access(target.parent, os.W_OK)


def _swap(target: Path, staging: Path) -> None:
    """`staging`, which lies beside `target`, takes its place."""
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


def _fill(target: Path, staging: Path, marker: str | None) -> None:
    """The content of `staging`, which lies in `target`, takes the place of the rest.

    `marker` goes first and comes last: after a kill in between no directory looks whole.
    """
    old = staging.with_suffix(REPLACED)
    before = sorted(_content(target), key=lambda path: path.name != marker)
    after = sorted(staging.iterdir(), key=lambda path: path.name == marker)
    moves = [(path, old / path.name) for path in before] + [(path, target / path.name) for path in after]
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for source, place in moves:
            source.rename(place)
            moved.append((source, place))
    except BaseException:
        for source, place in reversed(moved):
            place.rename(source)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _warn_of_leftovers(target: Path) -> None:
    beside = target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.*")
    inside = [path for path in target.iterdir() if LEFTOVER.fullmatch(path.name)] if target.is_dir() else []
    for path in [*beside, *inside]:
        if path.suffix in LEFT:
            logging.getLogger(__name__).warning(
                "%s is %s that was killed, or that still runs: remove or rename it", path, LEFT[path.suffix]
            )
