"""Workers: a process that dies or raises is an error with its reason, and none outlives the benchmark."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddexport.validate.bench import clock, roofline, session
from ddexport.validate.bench.roofline import measure_rate
from ddexport.validate.bench.session import Job, Session
from ddexport.validate.bench.worker import POOLS, Worker, WorkerError


def gone(process):
    """Whether it runs no more; in a container nobody may have buried it."""
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until_gone(process):
    until = time.monotonic() + 60
    while not gone(process) and time.monotonic() < until:
        time.sleep(0.05)
    return gone(process)


def test_a_real_worker(entry_of, bundle):
    """It opens, runs and raises; what another process cannot unpickle comes as text; then it is killed."""
    entry = entry_of()
    with Worker(1) as worker:
        assert worker.call("open", Job(bundle, entry.configuration, 1))
        assert worker.call("run", 2, 2).peak_mib > 10
        with pytest.raises(WorkerError, match="9 steps"):
            worker.call("run", 1, 9)
        with pytest.raises(WorkerError, match="TypeError"):
            worker.call("run")
        worker.process.kill()
        for _ in range(2):  # also when it is asked once more
            with pytest.raises(WorkerError, match="SIGKILL"):
                worker.call("run", 1, 1)
    assert gone(worker.process.pid) and all(name not in os.environ or os.environ[name] for name in POOLS)


def test_none_is_left_after_an_interrupt():
    """Also one that computes: leaving does not wait for it."""
    with pytest.raises(KeyboardInterrupt), Worker(1) as worker:
        worker._pool.submit(time.sleep, 300)
        began = time.monotonic()
        raise KeyboardInterrupt
    assert wait_until_gone(worker.process.pid) and time.monotonic() - began < 200


def test_it_ends_with_its_parent():
    """A parent that is killed closes nothing; the worker ends even while it computes."""
    parent = (
        "import os, signal, time\n"
        "from ddexport.validate.bench.worker import Worker\n"
        "if __name__ == '__main__':\n"
        "    worker = Worker(1)\n"
        "    worker._pool.submit(time.sleep, 300)\n"
        "    print(worker.process.pid, flush=True)\n"
        "    time.sleep(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], check=False, stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == -9 and wait_until_gone(int(done.stdout))


def test_timed_runs_do_not_ask_for_logits(entry_of, bundle, monkeypatch):
    """As users do not; they are computed once more, after the last run."""
    from ddexport.runtime.backends.onnxruntime import OnnxRuntime

    asked, run = [], OnnxRuntime.run

    def spy(self, graph, feeds, names=None):
        asked.append(names)
        return run(self, graph, feeds, names)

    monkeypatch.setattr(OnnxRuntime, "run", spy)
    opened = Session()
    opened.open(Job(bundle, entry_of().configuration, 1))
    done = opened.run(3, 2)
    assert not any("logits" in (names or ()) for names in asked)
    outputs = opened.outputs(3, 2)
    assert done.total >= done.student + done.decoder > 0 and done.teacher == 0
    assert [step.role for step in outputs.steps] == ["student"] * 2
    assert len(outputs.outputs) == 2 and outputs.pixels.shape[0] == 3
    assert session.SESSION is not opened


def test_engines_multiply(monkeypatch):
    """The shortest product counts, and the first one is not measured."""
    for engine in ("onnxruntime", "openvino", "torch"):
        monkeypatch.setattr(roofline, "SECONDS", 6.0)
        ticks = iter([0.0, 3.0, 3.0, 4.0, 4.0, 6.0])
        monkeypatch.setattr(clock.time, "perf_counter", lambda ticks=ticks: next(ticks))
        assert measure_rate(engine, "fp32", 1, size=64) == pytest.approx(2 * 64**3 / 1e9)
        monkeypatch.undo()
        monkeypatch.setattr(roofline, "SECONDS", 0.01)
        precision = "bf16" if engine == "torch" else "int8"
        assert measure_rate(engine, precision, 1, size=64) > 0
    with pytest.raises(ValueError):
        measure_rate("onnxruntime", "bf17", 1, size=64)
