"""Workers: what is said over the pipe, and that none outlives its end."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddexport.runtime.errors import DDError
from ddexport.validate.bench.processes import Worker, call_all
from ddexport.validate.bench.roofline import best_of, fastest, rate_of
from ddexport.validate.bench.worker import KEPT, Session, WorkerError, peak_mib, reset_peak, serve
from ddexport.validate.bench.workload import Job, RunnerConfiguration, Workload

REPLIES = "import pickle, sys\nwhile True:\n    pickle.load(sys.stdin.buffer); "
ANSWER = "pickle.dump({!r}, sys.stdout.buffer); sys.stdout.flush()"


def job(root):
    return Job(root, RunnerConfiguration("onnxruntime", "fp32", 1))


def worker(code):
    return Worker(1, command=[sys.executable, "-c", code])


def gone(process):
    """Whether it runs no more; in a container nobody may have buried it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def session(bundle):
    session = Session()
    version, teacher = session.open(job(bundle))
    assert version and not teacher
    return session


class TestSession:
    def test_a_run_tells_times_memory_and_its_outputs(self, session):
        session.prepare(Workload(2, 2))
        run = session.run(Workload(2, 2), True)
        assert run.times.student > 0 and run.times.decoder > 0 and run.times.teacher == 0
        assert run.times.total >= run.times.student + run.times.decoder
        assert run.peak_mib > 10
        assert len(run.outputs.steps) == len(run.outputs.logits) == 2 and len(run.outputs.image) == 2

    def test_equal_outputs_are_kept_once(self, session):
        first, second = (session.run(Workload(1, 1), True) for _ in range(2))
        assert first.outputs is not None and second.outputs is None
        assert session.run(Workload(1, 2)).outputs is None  # of a warm-up

    def test_only_so_many_different_ones_are_kept(self, session):
        class Outputs:
            def __init__(self, number):
                self.digest = lambda: str(number)

        assert sum(session._is_new("w", Outputs(number)) for number in range(KEPT + 2)) == KEPT

    def test_calls_are_pickled_and_errors_are_replies(self, bundle):
        calls = [
            ("open", (job(bundle),)),
            ("prepare", (Workload(1, 9),)),
            ("run", (Workload(1, "teacher"), True)),
            ("run", ()),
        ]
        replies = io.BytesIO()
        serve(io.BytesIO(b"".join(map(pickle.dumps, calls))), replies)
        replies.seek(0)
        opened, unknown, run, defect = (pickle.load(replies) for _ in calls)
        assert opened[0]
        assert "no schedule of 9 steps" in unknown.message and "1, 2" in unknown.hint
        assert run.times.teacher > 0 and run.times.student == 0 and run.outputs.guided is not None
        assert isinstance(defect, WorkerError) and defect.message.startswith("TypeError")

    def test_what_cannot_be_opened_is_told(self, tmp_path):
        with Worker(1) as one, pytest.raises(WorkerError, match="not a bundle"):
            one.call("open", job(tmp_path))


class TestProcesses:
    def test_one_that_dies_says_how(self):
        with (
            worker(REPLIES + "import os; os.kill(os.getpid(), 9)") as one,
            pytest.raises(WorkerError, match=r"SIGKILL.*memory"),
        ):
            one.call("run")
        with (
            worker(REPLIES + "print('out of luck', file=sys.stderr); sys.exit(4)") as one,
            pytest.raises(WorkerError, match="code 4: out of luck"),
        ):
            one.call("run")

    def test_one_that_answers_nonsense_is_no_crash_of_the_parent(self):
        code = REPLIES + "sys.stdout.buffer.write(b'{'); sys.exit(0)"
        with worker(code) as one, pytest.raises(WorkerError, match="code 0"):
            one.call("run")

    def test_none_is_left_after_an_error_or_an_interrupt(self):
        """Also one that computes and does not listen."""
        for error in (KeyboardInterrupt, RuntimeError):
            with pytest.raises(error), worker("import time; time.sleep(60)") as one:
                raise error
            assert gone(one._process.pid)

    def test_closing_twice_is_fine(self):
        one = worker("pass")
        one.close()
        one.close()

    def test_several_work_at_once(self):
        """Both have begun before the first one is waited for, and both are read before an error is told."""
        slow = REPLIES + "import time; time.sleep(0.3); " + ANSWER.format(1)
        with worker(slow) as first, worker(slow) as second:
            assert call_all([first, second], "run") == [1, 1]
            for one in (first, second):
                one.send("run")
            time.sleep(0.1)
            assert [one.receive() for one in (first, second)] == [1, 1]
        with worker(REPLIES + "sys.exit(4)") as first, worker(REPLIES + ANSWER.format(1)) as second:
            with pytest.raises(WorkerError, match="code 4"):
                call_all([first, second], "run")
            assert second.call("run") == 1

    def test_it_ends_with_its_parent(self):
        """Even while it computes: a parent that is killed closes nothing."""
        child = (
            "import time, ddexport.validate.bench.worker as w\n"
            "w.LOOK_EVERY = 0.05; w._end_with_parent(); time.sleep(60)"
        )
        parent = (
            "import subprocess, sys\n"
            f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            "print(p.pid, flush=True)\n"
            "import time; time.sleep(2)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", parent], capture_output=True, text=True, check=True, timeout=60
        )
        until = time.monotonic() + 20
        while not gone(int(done.stdout)) and time.monotonic() < until:
            time.sleep(0.05)
        assert gone(int(done.stdout))


class TestMemory:
    def test_the_peak_is_that_since_the_reset(self, tmp_path):
        status = tmp_path / "status"
        status.write_text("Name:\tx\nVmHWM:\t  204800 kB\n")
        assert reset_peak(tmp_path) and (tmp_path / "clear_refs").read_text() == "5"
        assert peak_mib(tmp_path) == 200.0

    def test_a_system_that_does_not_tell(self, tmp_path):
        assert not reset_peak(tmp_path / "none")
        assert peak_mib(tmp_path / "none") > 1  # of the process, from its start


class TestPeak:
    def test_the_fastest_product_counts_and_the_first_is_warming_up(self):
        ticks = iter([0.0, 3.0, 3.0, 4.0, 4.0, 6.0, 6.0, 9.0])
        assert fastest(lambda: None, 6.0, lambda: next(ticks)) == 1.0

    @pytest.mark.parametrize("engine", ["numpy", "torch", "onnxruntime"])
    def test_engines_multiply(self, engine):
        assert rate_of(engine, "fp32", 1, size=64, seconds=0.0) > 0
        if engine == "numpy":
            with pytest.raises(DDError, match="does not multiply"):
                rate_of(engine, "int8", 1, size=64)
        else:
            assert rate_of(engine, "int8", 1, size=64, seconds=0.0) > 0

    def test_the_best_engine_or_all_reasons(self):
        assert best_of([10.0, "b: no", 20.0]) == 20.0
        assert best_of(["a: no", "b: no"]) == "a: no; b: no"
