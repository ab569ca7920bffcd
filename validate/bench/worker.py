"""A configuration in a process of its own: its peak memory is its own, no thread pool disturbs another's,
and its crash is only a row with a reason."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from ddexport.runtime.backends import said
from ddexport.runtime.errors import DDError

# Where libraries read the number of threads that they cannot be told otherwise.
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerError(DDError):
    """A worker that could not do what it was asked for, or that died."""

    def __str__(self) -> str:
        """Message and hint in a line."""
        return ". ".join(filter(None, (self.message, self.hint)))


class Worker:
    """The parent's side of one spawned process; a context manager, which ends it whatever it does."""

    def __init__(self, threads: int) -> None:
        with _environment(threads):
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin)
            number = self._pool.submit(os.getpid).result()
        self.process = next(one for one in multiprocessing.active_children() if one.pid == number)

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of `Session` returns. Raises WorkerError, also where the process dies over it."""
        try:
            return self._pool.submit(_call, method, *arguments).result()
        except BrokenProcessPool as error:
            self._pool.shutdown()  # its thread waits for the process: of two that wait, one gets no exit code
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            memory = ", probably because memory is short" if how == "SIGKILL" else ""
            raise WorkerError(f"the worker was ended by {how}{memory}") from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self._pool.shutdown()


def _begin() -> None:
    """In the process. An interrupt is for the parent, which kills its workers; stdout is for its results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    # Else PyTorch's compiler keeps processes, which outlive a worker that is killed.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(method: str, *arguments: Any) -> Any:
    from ddexport.validate.bench.session import SESSION

    try:
        return getattr(SESSION, method)(*arguments)
    except DDError as error:
        raise WorkerError(error.message, error.hint) from None
    except Exception as error:  # of any engine: not all can be pickled
        raise WorkerError(f"{type(error).__name__}: {said(error)}") from None


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """What a process that is spawned inherits. Warnings of libraries are not about the bundle."""
    before, wanted = dict(os.environ), {**dict.fromkeys(POOLS, str(threads)), "PYTHONWARNINGS": "ignore"}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in wanted if name in before})
