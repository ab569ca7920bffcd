"""The parent's side of the workers: started, called, and gone when the benchmark ends."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

from ddexport.validate.bench.worker import WorkerError

# Where libraries read the number of threads that they cannot be told otherwise.
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# Not with -m: what it pickles must bear the name of its module.
COMMAND = (sys.executable, "-c", "from ddexport.validate.bench.worker import main; main()")
SHOWN = 300


class Worker:
    """One process; a context manager. Its calls are those of `ddexport.validate.bench.worker.Session`."""

    def __init__(self, threads: int, command: Sequence[str] = COMMAND) -> None:
        """Starts it. command: in place of the real worker."""
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        # Without the last one PyTorch's compiler keeps processes, which would outlive a worker that is ended.
        pools = dict.fromkeys(POOLS, str(threads)) | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | pools,
            # An interrupt of the terminal is for the parent, which ends its workers itself.
            start_new_session=True,
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method gives. Raises WorkerError, also where the worker dies over it."""
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments: Any) -> None:
        """Lets it begin; `receive` waits for the reply. Raises WorkerError."""
        assert self._process.stdin is not None
        try:
            pickle.dump((method, arguments), self._process.stdin)
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise self._death() from error

    def receive(self) -> Any:
        """The reply to what was sent. Raises WorkerError."""
        assert self._process.stdout is not None
        try:
            reply = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:  # nothing, or what a dying process half wrote
            raise self._death() from error
        if isinstance(reply, WorkerError):
            raise reply
        return reply

    def close(self) -> None:
        """Ends the process, whatever it does; may be called twice."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):  # of what was buffered for it
                    stream.close()

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
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return WorkerError(f"the worker ended with code {code}: {lines[-1][:SHOWN] if lines else 'silently'}")


def call_all(workers: Sequence[Worker], method: str, *arguments: Any) -> list[Any]:
    """What all of them give, working at the same time. Raises WorkerError, after all have replied."""
    for worker in workers:
        worker.send(method, *arguments)
    replies, errors = [], []
    for worker in workers:
        try:
            replies.append(worker.receive())
        except WorkerError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return replies
