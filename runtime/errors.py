"""Errors a user can act on: what went wrong, and what to do about it."""

from __future__ import annotations


class DDError(Exception):
    """A user or environment error. The command line prints `message` and `hint` in two lines.

    Anything raised that is not a `DDError` is a defect of this project and shows its traceback.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BundleError(DDError):
    """A bundle that is incomplete, damaged, too new, or reaches outside its directory."""


class LabelError(DDError):
    """A class label that the model does not have."""


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
