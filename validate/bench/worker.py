"""`python -m ddexport.validate.bench.worker`: one alternative in a process of its own.

So peak memory is its own, no thread pool disturbs another's, and its crash is only a row. It is driven
through its stdin and stdout, one JSON object a line: first a `Job`, then requests, each of which gets one
reply. What libraries print goes to stderr. The end of stdin, or of the parent, ends the worker.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ddexport.runtime.errors import DDError
from ddexport.validate.bench.case import PEAK, Job, inputs
from ddexport.validate.bench.memory import peak_mib, reset_peak

KEPT = 3  # different outputs of a case that are kept: an engine whose sums vary gives many
LOOK_EVERY = 1.0


class Session:
    """Answers requests with one open alternative."""

    def __init__(self, job: Job) -> None:
        """Raises DDError where it cannot be opened."""
        from ddexport.validate.bench.ways import Drawer

        self.job, self._drawer = job, Drawer(job)
        self._seen: dict[str, list[str]] = {}

    @property
    def hello(self) -> dict[str, Any]:
        """What the parent is told once everything is open."""
        return {"version": self._drawer.way.version, "provider": self._drawer.way.provider}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to `prepare`, `run` or `decode`. Raises DDError."""
        if request["do"] == "decode":
            return self._decode(Path(request["file"]))
        batch, steps = request["batch"], request["steps"]
        manifest = self._drawer.manifest
        schedule, given = manifest.schedule(steps), inputs(manifest, batch, self.job.seed)
        if request["do"] == "prepare":
            self._drawer.open(schedule)
            times, _ = self._drawer.draw(schedule, given)
            return {"times": asdict(times)}
        reset_peak()
        times, outputs = self._drawer.draw(schedule, given)
        peak = peak_mib()
        file = self._keep(f"{batch}-{steps}", outputs) if request.get("keep") else None
        return {"times": asdict(times), "peak": peak, "file": file}

    def _keep(self, case: str, outputs: Any) -> str | None:
        """The file of these outputs; None if such were kept before, or too many others were."""
        digest, seen = outputs.digest(), self._seen.setdefault(case, [])
        if digest in seen or len(seen) >= KEPT:
            return None
        path = Path(self.job.directory) / f"{case}-{len(seen)}.npz"
        seen.append(digest)
        outputs.write(path)
        return str(path)

    def _decode(self, file: Path) -> dict[str, Any]:
        """The image of the sequence in a file of outputs, written beside it as an npy."""
        import numpy as np
        from ddexport.validate.bench.outputs import Outputs

        image = self._drawer.way.run("decoder", {"sequence": Outputs.read(file).sequence})["image"]
        path = Path(self.job.directory) / f"decoded-{file.stem}.npy"
        np.save(path, image)
        return {"file": str(path)}


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Answers until the requests end."""
    session: Any = None
    for line in requests:
        try:
            data = json.loads(line)
            if session is not None:
                reply = session.answer(data)
            else:
                session = _start(Job.from_dict(data))
                reply = session.hello
        except DDError as error:
            reply = {"error": error.message, "hint": error.hint}
        except Exception as error:  # whatever an engine raises is this row's end, not the benchmark's
            reply = {"error": f"{type(error).__name__}: {error}", "hint": ""}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _start(job: Job) -> Any:
    if job.backend == PEAK:
        from ddexport.validate.bench.peak import PeakSession

        return PeakSession(job.precision, job.threads)
    return Session(job)


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
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
