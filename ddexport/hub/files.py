"""Files of the Hub, in its usual cache, each compared with the Hub's hash.

huggingface_hub downloads. Here is what it leaves to others: it takes wrong bytes of the right size for whole,
keeps what killed downloads left, and only warns where the disk is too small.
"""

from __future__ import annotations

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


def parse(address: str, names_file: bool = False) -> HubFile:
    """What hf://USER/NAME[@REVISION] names, or hf://USER/NAME[@REVISION]/PATH. Raises HubError."""
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    with suppress(HfUriError):
        uri = parse_hf_uri(address)
        if uri.type == "model" and "/" in uri.id and bool(uri.path_in_repo) == names_file:
            return HubFile(uri.id, uri.path_in_repo, uri.revision)
    what, form = ("a file", "hf://USER/NAME/PATH") if names_file else ("a repository", "hf://USER/NAME")
    hint = f"Give {form}, or after NAME also @REVISION: a tag, a commit, or a branch without a slash."
    raise HubError(f"{address} is not the address of {what} on the Hub", hint)


def fetch(files: Sequence[HubFile], cache: Path | None = None, remark: str = "") -> list[LocalFile]:
    """The files, downloaded unless the cache has them. A line on stderr says which, how large, and `remark`.

    cache: its directory, None for that of huggingface_hub. Raises HubError: out of reach, not there, not
    allowed, too large for the disk, or other bytes than the Hub's hash is of, which are then removed.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cache = (cache or Path(constants.HF_HUB_CACHE)).absolute()
    if constants.HF_HUB_OFFLINE:
        cached = [try_to_load_from_cache(f.repository, f.path, cache, f.revision) for f in files]
        if absent := [file for file, path in zip(files, cached, strict=True) if not isinstance(path, str)]:
            raise offline(absent, cache)
    infos = [(file, _download(file, cache, dry_run=True)) for file in files]
    sizes = {file: info.file_size or 0 for file, info in infos if info.will_download}
    for repository in {file.repository for file in sizes}:
        _sweep(cache, repository)
    _announce(sizes, cache, remark)
    fetched = []
    for file, info in infos:
        path = Path(info.local_path)
        if not path.exists():  # asked for by its revision, not its commit, so that the cache knows both
            path = Path(_download(file, cache))
        _check_hash(path, file)
        commit = path.relative_to(cache).parts[2]  # models--USER--NAME/snapshots/COMMIT/PATH
        fetched.append(LocalFile(path, file.path, file.repository, commit))
    return fetched


def _download(file: HubFile, cache: Path, dry_run: bool = False) -> Any:
    """The path in the cache; dry_run: what a download would do."""
    with explained(file):
        from huggingface_hub import hf_hub_download

        return hf_hub_download(
            file.repository, file.path, revision=file.revision, cache_dir=cache, dry_run=dry_run
        )


def _announce(sizes: Mapping[HubFile, int], cache: Path, remark: str) -> None:
    """Says what is fetched, unless it is small. Raises HubError where the disk has no room for it.

    sizes: in bytes.
    """
    needed = sum(sizes.values()) / 2**20
    if sizes and (remark or needed >= 1):
        names = ", ".join(map(str, sizes)) if len(sizes) <= NAMED else f"{len(sizes)} files"
        click.echo(f"fetching {names} ({needed:,.1f} MiB){remark and f'; {remark}'}", err=True)
    require_room(cache, sum(sizes.values()))


def require_room(directory: Path, needed: int) -> None:
    """Raises HubError where the disk of a directory, which need not exist, has not so many bytes."""
    place = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        text = f"{place} has {free / 2**20:,.1f} MiB of free space, {needed / 2**20:,.1f} MiB are needed"
        raise HubError(text, ROOM)


def licence_remark(licence: Mapping[str, Any]) -> str:
    """What a recipe or a manifest says under `licence`, but for its notes, in one line of printable text."""
    named = {"weights": "licence", "intended_use": "intended use"}
    text = "; ".join(f"{name}: {licence[key]}" for key, name in named.items() if key in licence)
    return "".join(character if character.isprintable() else " " for character in text)


def _check_hash(path: Path, file: HubFile) -> None:
    """Raises HubError, and removes the file, unless its bytes are those that the Hub's ETag is the hash of.

    The cache names its files by their ETags: SHA-256 of what lies in LFS, else git's SHA-1.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils.sha import git_hash

    wanted: str | None = path.readlink().name if path.is_symlink() else None
    if wanted is None and not constants.HF_HUB_OFFLINE:  # a cache without links, as on exFAT
        with suppress(HubError), explained(file):
            url = hf_hub_url(file.repository, file.path, revision=file.revision)
            wanted = get_hf_file_metadata(url).etag
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", wanted or ""):
        logger.warning("%s cannot be compared: its ETag is %s", file, wanted or "not known")
        return
    hashed = sha256_of(path) if len(str(wanted)) == 64 else git_hash(path.read_bytes())
    if hashed == wanted:
        return
    with suppress(OSError):
        path.resolve().unlink()
        path.unlink()
    raise HubError(
        f"{file} is damaged{'' if path.exists() else ', and was removed'}: its hash is {hashed[:12]}...,"
        f" the Hub says {str(wanted)[:12]}...",
        "Run the command again. If it stays so, a proxy or a mirror changes files on their way.",
    )


def _sweep(cache: Path, repository: str) -> None:
    """Removes what killed downloads left. A download that runs holds the lock of its file."""
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    for partial in (cache / folder / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / folder / f"{partial.name.partition('.')[0]}.lock"
        with suppress(OSError), WeakFileLock(lock, timeout=0.1):  # filelock's Timeout is one
            partial.unlink(missing_ok=True)
