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
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
TRANSPORT = ("httpx2", "httpcore2", "hf_xet")  # packages whose errors need not be an OSError
EXPLANATIONS = {  # by the name in huggingface_hub.errors, the narrower kinds first
    "GatedRepoError": (
        "{repository} is gated, and you have no access",
        f"Ask for access at {{hub}}/{{repository}}, then {LOG_IN}.",
    ),
    "RepositoryNotFoundError": (
        "there is no repository {repository} at {hub}, or it is private",
        f"Check the name; if it is private, {LOG_IN}.",
    ),
    "RevisionNotFoundError": (
        "{repository} has no revision {revision}",
        "Give a branch, a tag or a commit that {hub}/{repository}/commits shows.",
    ),
    "RemoteEntryNotFoundError": (
        "{repository} has no file {path} in its revision {revision}",
        "{hub}/{repository}/tree/{revision} lists its files.",
    ),
    "HFValidationError": ("{repository} is not the name of a repository", "Give USER/NAME."),
    "FileMetadataError": (
        "{hub} does not answer as the Hub does: perhaps a proxy's page",
        "Check the network's login page, HTTPS_PROXY, and HF_ENDPOINT if it is set.",
    ),
    "HfHubHTTPError": (
        "{hub} refuses {repository}: {status} {reason}",
        f"If it is the token, {LOG_IN}; else try again later.",
    ),
}


class HubError(DDError):
    """A file of the Hub that cannot be had, or a repository that cannot be written."""


class MissingFileError(HubError):
    """A file that a repository, or offline the cache, does not have."""


def offline(absent: Sequence[HubFile], cache: Path) -> MissingFileError:
    """The error for files that are not in the cache, where nothing but the cache may be asked."""
    revisions = [f" --revision {file.revision}" if file.revision else "" for file in absent]
    commands = [f"hf download {f.repository} {f.path}{r}" for f, r in zip(absent, revisions, strict=True)]
    return MissingFileError(
        f"offline, and not in {cache}: {', '.join(map(str, absent))}",
        f"Where there is a network, run `{' && '.join(commands)}`, and copy that directory here.",
    )


@contextmanager
def explained(file: HubFile) -> Iterator[None]:
    """Turns what huggingface_hub raises about a file, or about a repository, into a HubError."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, (OSError, ValueError)) and package not in TRANSPORT:
            raise
        raise _explanation(error, file) from error


def _explanation(error: Exception, file: HubFile) -> HubError:
    from huggingface_hub import constants, errors

    # The cache was asked after the Hub, and lacks it: what the Hub said is the reason.
    cause = (isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__) or error
    names = {**file._asdict(), "revision": file.revision or "main", "hub": constants.ENDPOINT}
    if isinstance(cause, errors.HfHubHTTPError):
        response = cause.response
        reason = response.headers.get("X-Error-Message") or response.reason_phrase
        names |= {"status": response.status_code, "reason": reason}
    for kind, (message, hint) in EXPLANATIONS.items():
        if isinstance(cause, getattr(errors, kind)):
            missing = kind == "RemoteEntryNotFoundError"
            return (MissingFileError if missing else HubError)(message.format(**names), hint.format(**names))
    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return HubError(f"{file} cannot be written: {reason}", ROOM)
    if "Consistency check failed" in reason:
        return HubError(f"{file} arrived incomplete, and was not kept", "Run the command again.")
    if isinstance(cause, ValueError):
        return HubError(f"{file} cannot be fetched: {reason}", "Correct its name.")
    return HubError(
        f"{constants.ENDPOINT} cannot be reached: {reason}",
        "Check the network, HTTPS_PROXY and HF_ENDPOINT; what is in the cache works with --offline.",
    )
