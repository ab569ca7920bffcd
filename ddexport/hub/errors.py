"""What can go wrong with the Hub, in two lines."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ddexport.runtime.errors import DDError

if TYPE_CHECKING:
    from ddexport.hub.files import HubFile

ROOM = "Free some space, or name another place with --cache-dir, or HF_HOME in the environment."
LONGEST = 300  # characters of what huggingface_hub says
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(DDError):
    """A file of the Hub that cannot be had, or a repository that cannot be written."""


class MissingFileError(HubError):
    """A file that a repository, or offline the cache, does not have."""


def offline(absent: Sequence[HubFile], cache: Path) -> MissingFileError:
    """The error for files that are not in the cache, where nothing but the cache may be asked."""
    revisions = [f" --revision {file.revision}" if file.revision else "" for file in absent]
    commands = [f"hf download {f.repository} {f.path}{r}" for f, r in zip(absent, revisions, strict=True)]
    hint = f"Where there is a network, run `{' && '.join(commands)}`, and copy that directory here."
    return MissingFileError(f"offline, and not in {cache}: {', '.join(map(str, absent))}", hint)


@contextmanager
def explained(file: HubFile) -> Iterator[None]:
    """Turns what huggingface_hub raises about a file, or about a repository, into a HubError."""
    from huggingface_hub import errors

    try:
        yield
    except (OSError, ValueError, RuntimeError, errors.HTTPError, errors.XetDownloadError) as error:
        # The cache was asked after the Hub, and lacks it: what the Hub said is the reason.
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
        raise _explanation(cause or error, file) from error


def _explanation(error: BaseException, file: HubFile) -> HubError:
    """The narrower kinds of errors come first."""
    from huggingface_hub import constants, errors

    hub, repository, revision = constants.ENDPOINT, file.repository, file.revision or "main"
    reason = " ".join(str(error).split())[:LONGEST] or type(error).__name__
    match error:
        case errors.GatedRepoError():
            message = f"{repository} is gated, and you have no access"
            hint = f"Ask for access at {hub}/{repository}, then {LOG_IN}."
        case errors.RepositoryNotFoundError():
            message = f"there is no repository {repository} at {hub}, or it is private"
            hint = f"Check the name; if it is private, {LOG_IN}."
        case errors.RevisionNotFoundError():
            message = f"{repository} has no revision {revision}"
            hint = f"Give a branch, a tag or a commit that {hub}/{repository}/commits shows."
        case errors.RemoteEntryNotFoundError():
            message = f"{repository} has no file {file.path} in its revision {revision}"
            return MissingFileError(message, f"{hub}/{repository}/tree/{revision} lists its files.")
        case errors.FileMetadataError():
            message = f"{hub} does not answer as the Hub does: perhaps a proxy's page"
            hint = "Check the network's login page, HTTPS_PROXY, and HF_ENDPOINT if it is set."
        case errors.HfHubHTTPError(response=response):
            said = response.headers.get("X-Error-Message") or response.reason_phrase
            message = f"{hub} refuses {repository}: {response.status_code} {said}"
            hint = f"If it is the token, {LOG_IN}; else try again later."
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EACCES | errno.EROFS | errno.ENOTDIR):
            message, hint = f"{file} cannot be written: {reason}", ROOM
        case errors.HTTPError() | ConnectionError() | TimeoutError():
            message = f"{hub} cannot be reached: {reason}"
            hint = "Check the network, HTTPS_PROXY and HF_ENDPOINT; --offline takes what is in the cache."
        case _:  # a wrong name or token, fewer bytes than the Hub announced, a card that it refuses
            message = f"{file}: {reason}"
            hint = "Check the name, the token and the network, or run the command again."
    return HubError(message, hint)
