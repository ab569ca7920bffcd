"""Files of the Hub, in its usual cache, each compared with the Hub's hash.

huggingface_hub downloads. Here is what it leaves to others: it takes wrong bytes of the right size for whole,
keeps what killed downloads left, and only warns where the disk is too small.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import click

from ddexport.hub.errors import ROOM, HubError, explained, offline
from ddexport.runtime.bundle import sha256_of

SCHEME = "hf://"
NAMED = 3  # files: of more the number is told
MENTIONED = 1 << 20  # bytes

logger = logging.getLogger(__name__)
logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own


class HubFile(NamedTuple):
    """A file of a repository. revision: a branch, a tag or a commit; None: `main`."""

    repository: str
    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path} of {self.repository}"


class LocalFile(NamedTuple):
    """A file on this machine. Of one that was fetched `name` is its path in the repository at that commit."""

    path: Path
    name: str
    repository: str | None = None
    commit: str | None = None


def parse(address: str) -> HubFile:
    """What hf://USER/NAME[@REVISION][/PATH] names; without a path it is "". Raises HubError."""
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        uri = parse_hf_uri(address)
    except HfUriError:
        uri = None
    if uri is None or uri.type != "model" or uri.id.count("/") != 1:
        hint = "Give hf://USER/NAME, or hf://USER/NAME@REVISION for a branch, a tag or a commit."
        raise HubError(f"{address} is not the address of a model on the Hub", hint)
    return HubFile(uri.id, uri.path_in_repo, uri.revision)


def fetch(files: Sequence[HubFile], cache: Path | None = None, remark: str = "") -> list[LocalFile]:
    """The files, downloaded unless the cache has them. A line on stderr says which, how large, and `remark`.

    cache: its directory, None for that of huggingface_hub. Raises HubError: out of reach, not there, not
    allowed, too large for the disk, or other bytes than the Hub's hash is of, which are then removed.
    """
    from huggingface_hub import constants

    cache = (cache or Path(constants.HF_HUB_CACHE)).expanduser().absolute()
    infos = [(file, _download(file, cache, dry_run=True)) for file in files]
    if absent := [file for file, info in infos if info is None]:
        raise offline(absent, cache)
    sizes = {file: info.file_size or 0 for file, info in infos if info.will_download}
    _announce(sizes, cache, remark)
    for repository in {file.repository for file in sizes}:
        _sweep(cache, repository)
    fetched = []
    for file, info in infos:
        path = Path(info.local_path)
        if not path.exists():  # asked for by its revision, not its commit, so that the cache knows both
            path = Path(_download(file, cache))
        _check_hash(path, file)
        commit = path.parents[file.path.count("/")].name  # .../snapshots/COMMIT/PATH
        fetched.append(LocalFile(path, file.path, file.repository, commit))
    return fetched


def _download(file: HubFile, cache: Path, dry_run: bool = False) -> Any:
    """The path in the cache. dry_run: only what a download would do; None where the cache alone is asked, and
    lacks the file."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    names = {"revision": file.revision, "cache_dir": cache, "library_name": "ddexport"}
    with explained(file):
        try:
            return hf_hub_download(file.repository, file.path, **names, dry_run=dry_run)
        except LocalEntryNotFoundError:
            if dry_run and constants.HF_HUB_OFFLINE:
                return None
            raise


def _announce(sizes: dict[HubFile, int], cache: Path, remark: str) -> None:
    """Says what is fetched, unless it is small. Raises HubError where the disk has no room for it."""
    needed = sum(sizes.values())
    if needed >= MENTIONED or (sizes and remark):
        names = ", ".join(f"{file} ({_size(size)})" for file, size in sizes.items())
        if len(sizes) > NAMED:
            names = f"{len(sizes)} files of {next(iter(sizes)).repository} ({_size(needed)})"
        click.echo(f"fetching {names}{remark and f'; {remark}'}", err=True)
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise HubError(f"{place} has {_size(free)} of free space, {_size(needed)} are needed", ROOM)


def _size(size: int) -> str:
    """A number of bytes for people: `1.2 GiB`, `0.3 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def licence_remark(licence: Mapping[str, Any]) -> str:
    """What a recipe or a manifest says under `licence`, but for its notes, in one line."""
    named = {"weights": "licence", "intended_use": "intended use"}
    return "; ".join(f"{name}: {licence[key]}" for key, name in named.items() if key in licence)


def _check_hash(path: Path, file: HubFile) -> None:
    """Raises HubError, and removes the file, unless its bytes are those that the Hub's ETag is the hash of.

    The cache names its files by their ETags: SHA-256 of what lies in LFS, else git's SHA-1.
    """
    wanted = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", wanted):
        kind, hashed = "SHA-256", sha256_of(path)
    elif re.fullmatch("[0-9a-f]{40}", wanted):
        content = path.read_bytes()  # what is not in LFS is small
        kind, hashed = "SHA-1", hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
    else:
        logger.warning("%s cannot be compared: its ETag %s is no hash", file, wanted or "is not known, and")
        return
    if hashed == wanted:
        return
    for wrong in (path.resolve(), path.parent / path.readlink(), path):
        with suppress(OSError):
            wrong.unlink()
    raise HubError(
        f"{file} is damaged, and was removed: its {kind} is {hashed[:12]}..., the Hub says {wanted[:12]}...",
        "Run the command again. If it stays so, a proxy or a mirror changes files on their way.",
    )


def _sweep(cache: Path, repository: str) -> None:
    """Removes what killed downloads left. A download that runs holds the lock of its file."""
    from filelock import Timeout
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    for partial in (cache / folder / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / folder / f"{partial.name.partition('.')[0]}.lock"
        with suppress(Timeout, OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock, timeout=0.1):
                partial.unlink(missing_ok=True)
