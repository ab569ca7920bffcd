"""Directories that appear whole or not at all.

A bundle may take minutes and gigabytes to write. It is written to a hidden sibling and renamed into place at
the end, so that nobody ever sees half of one. What remains after an error, Ctrl-C or a kill is removed: by
the context manager, by a small helper process that outlives a killed parent, or, after a power cut, by the
next run.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddexport.runtime.errors import OutputError

# Runs in its own process and session: waits until the parent closes the pipe (or dies), then tidies up.
JANITOR = """
import os, shutil, sys
staging, backup, target = sys.argv[1:]
sys.stdin.read()
shutil.rmtree(staging, ignore_errors=True)
if os.path.isdir(backup):
    if os.path.exists(target):
        shutil.rmtree(backup, ignore_errors=True)
    else:
        os.rename(backup, target)
"""


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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)  # first: it may put a bundle back
        _check_replaceable(target, replace, marker)
        name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        staging = target.with_name(f".{target.name}.partial-{name}")
        backup = target.with_name(f".{target.name}.replaced-{name}")
        staging.mkdir()
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.filename}: {error.strerror}", "choose another place with -o"
        ) from error
    janitor = subprocess.Popen(
        [sys.executable, "-c", JANITOR, str(staging), str(backup), str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/" if os.name == "posix" else None,
    )
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
        _swap(staging, backup, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"no space left while writing {target}", "make room, or use -o") from error
        raise
    finally:
        janitor.communicate()


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


def _swap(staging: Path, backup: Path, target: Path) -> None:
    if target.exists():
        target.rename(backup)
    staging.rename(target)


def _remove_leftovers(target: Path) -> None:
    """What a run left behind when the machine went down: partial directories, and a replaced one to put
    back."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-(\d+)-[0-9a-f]{{8}}")
    for path in list(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or _is_running(int(match[2])):
            continue
        if match[1] == "replaced" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
