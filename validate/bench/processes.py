"""The parent's side of the workers: started, asked one at a time, and gone when the benchmark ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ddexport.runtime.errors import DDError
from ddexport.validate.bench.case import Job

POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Where libraries read the number of threads that they cannot be told otherwise."""
ROOT = Path(__file__).parents[2]
SHOWN = 300


class WorkerError(DDError):
    """A worker that could not open its alternative or run a case, or that died."""


class Worker:
    """One process; a context manager."""

    def __init__(self, job: Job, command: list[str] | None = None) -> None:
        """Starts it; what it has opened is known after `ready`. command: in place of the real worker."""
        self.job = job
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            command or [sys.executable, "-m", "ddexport.validate.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=_environment(job.threads),
            # An interrupt of the terminal is for the parent, which ends its workers itself.
            start_new_session=True,
        )
        self._hello: dict[str, Any] | None = None

    def ready(self) -> dict[str, Any]:
        """Version and provider of what it has opened. Raises WorkerError."""
        if self._hello is None:
            self._hello = self.ask(self.job.to_dict())
        return self._hello

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request. Raises WorkerError, also where the worker dies over it."""
        self.send(request)
        return self.receive()

    def send(self, request: Mapping[str, Any]) -> None:
        """Lets it begin; `receive` waits for the reply. Raises WorkerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._death() from error

    def receive(self) -> dict[str, Any]:
        """The reply to what was sent. Raises WorkerError."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError as error:  # nothing, or what a dying process left half written
            raise self._death() from error
        if "error" in reply:
            raise WorkerError(str(reply["error"])[:SHOWN], str(reply.get("hint", "")))
        return reply

    def close(self) -> None:
        """Ends the process, whatever it does; may be called twice."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:  # of what was buffered for it
                    continue

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _death(self) -> WorkerError:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return WorkerError("the worker does not answer")
        if code < 0:
            name = signal.Signals(-code).name
            memory = ", which is what a system does that is short of memory" if name == "SIGKILL" else ""
            return WorkerError(f"the worker was ended by {name}{memory}", "Time fewer at once: --backend.")
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        last = said[-1][:SHOWN] if said else "it said nothing"
        return WorkerError(f"the worker ended with code {code}: {last}")


class Gang:
    """One alternative as so many processes side by side; a context manager. One is the usual case."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers

    def ready(self) -> dict[str, Any]:
        """As a worker's, of the first."""
        return self.workers[0].ready()

    def ask(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All of them work on the request at once. Raises WorkerError."""
        for worker in self.workers:
            worker.send(request)
        return [worker.receive() for worker in self.workers]

    def close(self) -> None:
        """Ends all."""
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> Gang:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def tidy_at_sigterm() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that workers end and the files of the run go."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread, where nobody can
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _environment(threads: int) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **dict.fromkeys(POOLS, str(threads)),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        # Else PyTorch's compiler keeps a pool of processes, which would outlive a worker that is ended.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
