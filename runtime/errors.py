"""Errors a user can act on: what went wrong, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DDError(Exception):
    """A user or environment error. The command line prints `message` and `hint` in two lines.

    Anything raised that is not a `DDError` is a defect of this project and shows its traceback.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(DDError):
    """A command line that names no command, or leaves out what cannot be guessed."""

    exit_code = 2


class BundleError(DDError):
    """A bundle that is incomplete, damaged, too new, or reaches outside its directory."""


class LabelError(DDError):
    """A class label that the model does not have."""


class TextError(DDError):
    """A prompt, or features of one, that the model cannot take."""


class ScheduleError(DDError):
    """A number of steps that the model has no schedule for."""


class NoiseError(DDError):
    """Noise of the wrong shape or type, or not finite."""


class BackendError(DDError):
    """An inference engine that is unknown, not installed, or that cannot run the graph."""


class OutputError(DDError):
    """A result that cannot be written where it was asked for."""


class VerificationError(DDError):
    """Outputs that differ from the reference by more than the stated limit."""

    exit_code = 3


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The start of a hint, `Did you mean var-d16? `, or nothing if no name is similar."""
    known = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), known, 1)
    return f"Did you mean {known[near[0]]}? " if near else ""
