"""The inside of a worker: one runner in a process of its own.

So its peak memory is its own, no thread pool disturbs another's, and its crash is only a row. It is driven
through its stdin and stdout: pickled calls of a `Session`, each of which gets one reply. What libraries print
goes to stderr. The end of stdin, or of the parent, ends the worker.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

from ddexport.runtime.backends import said
from ddexport.runtime.bundle import Schedule, read_manifest
from ddexport.runtime.errors import DDError
from ddexport.validate.bench.workload import Inputs, Job, Outputs, Run, Times, Workload, inputs_of
from ddexport.validate.metrics._base import FloatArray

KEPT = 3  # different outputs of a workload that are kept: an engine whose sums vary gives many
LOOK_EVERY = 1.0
PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # what makes Linux set VmHWM back to the present size: man 5 proc, clear_refs


class WorkerError(DDError):
    """A worker that could not open its runner or run a workload, or that died."""


class Session:
    """What can be called in a worker."""

    def __init__(self) -> None:
        self._seen: dict[Workload, set[str]] = {}

    def open(self, job: Job) -> tuple[str, str]:
        """Opens the runner; its version, and what else runs the teacher. Raises DDError."""
        from ddexport.validate.bench.runners import TimedSampler, open_runner

        self._seed, self._manifest = job.seed, read_manifest(job.bundle, verify=False)
        runner = open_runner(job, self._manifest)
        self._sampler = TimedSampler(runner, self._manifest, job.bundle)
        return runner.version, runner.teacher

    def prepare(self, workload: Workload) -> Times:
        """Opens what the workload needs, and runs it once. Raises DDError."""
        schedule, inputs = self._request(workload)
        self._sampler.runner.open(schedule)
        return self._sampler.run(schedule, inputs)[0]

    def run(self, workload: Workload, keep: bool = False) -> Run:
        """Runs it once more. keep: gives the outputs too, unless it gave the same before, or too many others.
        Raises DDError."""
        schedule, inputs = self._request(workload)
        reset_peak()
        times, outputs, fed = self._sampler.run(schedule, inputs)
        peak = peak_mib()
        if not keep or not self._is_new(workload, outputs):
            return Run(times, peak)
        return Run(times, peak, replace(outputs, logits=self._sampler.logits(schedule, fed)))

    def decode(self, sequence: FloatArray) -> FloatArray:
        """The image of a sequence. Raises DDError."""
        return self._sampler.runner.run("decoder", None, {"sequence": sequence})["image"]  # type: ignore[no-any-return]

    def rate(self, engine: str, precision: str, threads: int) -> float:
        """GFLOP/s of one engine at its best. Raises whatever it raises."""
        from ddexport.validate.bench.roofline import rate_of

        return rate_of(engine, precision, threads)

    def _request(self, workload: Workload) -> tuple[Schedule, Inputs]:
        schedule = self._manifest.schedule(workload.steps)
        return schedule, inputs_of(self._manifest, workload.batch, self._seed)

    def _is_new(self, workload: Workload, outputs: Outputs) -> bool:
        digest, seen = outputs.digest(), self._seen.setdefault(workload, set())
        if digest in seen or len(seen) >= KEPT:
            return False
        seen.add(digest)
        return True


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answers until the requests end."""
    session = Session()
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = getattr(session, method)(*arguments)
        except DDError as error:
            reply = WorkerError(error.message, error.hint)
        except Exception as error:  # whatever an engine raises is this row's end, not the benchmark's
            reply = WorkerError(f"{type(error).__name__}: {said(error)}")
        pickle.dump(reply, replies)
        replies.flush()


def reset_peak(process: Path = PROCESS) -> bool:
    """Starts counting memory anew. False where the system cannot: `peak_mib` counts from the start then."""
    try:
        (process / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def peak_mib(process: Path = PROCESS) -> float | None:
    """The most MiB of memory that were in use since the reset; None where the system does not tell."""
    try:
        line = re.search(r"^VmHWM:\s*(\d+) kB$", (process / "status").read_text(), re.M)
    except OSError:
        line = None
    if line:
        return int(line[1]) / 1024
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20) if sys.platform == "darwin" else most / 1024  # bytes there, kilobytes elsewhere


def _end_with_parent() -> None:
    """A worker that computes for minutes does not look at its stdin."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """The process: stdout is kept for replies, whatever else is printed goes to stderr."""
    _end_with_parent()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, replies)
