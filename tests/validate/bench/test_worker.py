"""Workers: what is said over the pipe, and that none outlives its end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddexport.validate.bench.case import Job
from ddexport.validate.bench.memory import peak_mib, reset_peak
from ddexport.validate.bench.peak import PRECISIONS, Peak, best_of, fastest, rates_of
from ddexport.validate.bench.processes import Gang, Worker, WorkerError
from ddexport.validate.bench.worker import KEPT, Session, serve

REPLIES = "import sys\nfor line in sys.stdin:\n    "


def job(root="", backend="onnxruntime", directory="", **more):
    return Job(**{
        "bundle": str(root), "backend": backend, "precision": "fp32", "threads": 1, "mode": None, "seed": 0,
        "directory": str(directory), "files": {}, **more,
    })  # fmt: skip


def worker(code):
    return Worker(job(), command=[sys.executable, "-c", code])


def gone(process):
    """Whether it runs no more; in a container nobody may have buried it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="module")
def session(bundle, tmp_path_factory):
    return Session(job(bundle, directory=tmp_path_factory.mktemp("worker")))


class TestSession:
    def test_a_run_tells_times_memory_and_where_its_outputs_are(self, session):
        assert session.hello["provider"] == "cpu" and session.hello["version"]
        session.answer({"do": "prepare", "batch": 2, "steps": 2})
        reply = session.answer({"do": "run", "batch": 2, "steps": 2, "keep": True})
        times = reply["times"]
        assert times["student"] > 0 and times["decoder"] > 0 and times["teacher"] == 0
        assert times["total"] >= times["student"] + times["decoder"]
        assert reply["peak"] > 10
        assert reply["file"].endswith("2-2-0.npz")
        json.dumps(reply)

    def test_equal_outputs_are_kept_once(self, session):
        first, second = (
            session.answer({"do": "run", "batch": 1, "steps": 1, "keep": True}) for _ in range(2)
        )
        assert first["file"] and second["file"] is None
        assert session.answer({"do": "run", "batch": 1, "steps": 2})["file"] is None  # of a warm-up

    def test_only_so_many_different_ones_are_kept(self, session):
        class Outputs:
            def __init__(self, number):
                self.number = number

            def digest(self):
                return str(self.number)

            def write(self, path):
                path.touch()

        kept = [session._keep("case", Outputs(number)) for number in range(KEPT + 2)]
        assert sum(path is not None for path in kept) == KEPT

    def test_requests_and_replies_are_lines_and_errors_are_replies(self, bundle, tmp_path):
        requests = [
            job(bundle, directory=tmp_path).to_dict(),
            {"do": "prepare", "batch": 1, "steps": 9},
            {"do": "run", "batch": 1, "steps": "teacher", "keep": True},
            {"do": "run"},
        ]
        replies = io.StringIO()
        serve(io.StringIO("".join(json.dumps(one) + "\n" for one in requests)), replies)
        hello, unknown, run, defect = map(json.loads, replies.getvalue().splitlines())
        assert hello["version"]
        assert "no schedule of 9 steps" in unknown["error"] and "1, 2" in unknown["hint"]
        assert run["times"]["teacher"] > 0 and run["times"]["student"] == 0
        assert defect["error"].startswith("KeyError")

    def test_what_cannot_be_opened_is_told_once_asked(self, tmp_path):
        replies = io.StringIO()
        serve(io.StringIO(json.dumps(job(tmp_path).to_dict()) + "\n"), replies)
        assert "not a bundle" in json.loads(replies.getvalue())["error"]


class TestProcesses:
    def test_one_that_dies_says_how(self):
        with (
            worker(REPLIES + "import os; os.kill(os.getpid(), 9)") as one,
            pytest.raises(WorkerError, match=r"SIGKILL.*memory"),
        ):
            one.ready()
        with (
            worker(REPLIES + "print('out of luck', file=sys.stderr); sys.exit(4)") as one,
            pytest.raises(WorkerError, match="code 4: out of luck"),
        ):
            one.ready()

    def test_one_that_answers_nonsense_is_no_crash_of_the_parent(self):
        with worker(REPLIES + "print('{'); sys.exit(0)") as one, pytest.raises(WorkerError, match="code 0"):
            one.ready()

    def test_errors_come_back(self):
        answer = json.dumps({"error": "no such thing", "hint": "look"})
        with worker(REPLIES + f"print({answer!r}, flush=True)") as one, pytest.raises(WorkerError) as caught:
            one.ready()
        assert (caught.value.message, caught.value.hint) == ("no such thing", "look")

    def test_none_is_left_after_an_error_or_an_interrupt(self):
        """Also one that computes and does not listen."""
        for error in (KeyboardInterrupt, RuntimeError):
            numbers = []
            with (
                pytest.raises(error),
                Gang([worker("import time; time.sleep(60)") for _ in range(2)]) as gang,
            ):
                numbers = [one._process.pid for one in gang.workers]
                raise error
            assert numbers and all(map(gone, numbers))

    def test_a_terminated_parent_tidies_up(self, tmp_path):
        """As `timeout` ends one: its workers end, and so do the files of the run."""
        code = (
            "import os, signal, tempfile\n"
            "from ddexport.validate.bench.processes import tidy_at_sigterm\n"
            f"with tidy_at_sigterm(), tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
        assert done.returncode == 128 + 15 and not list(tmp_path.iterdir())

    def test_closing_twice_is_fine(self):
        one = worker("pass")
        one.close()
        one.close()

    def test_a_gang_is_asked_at_once(self):
        """Both have begun before the first one is waited for."""
        code = REPLIES + "import time; time.sleep(0.3); print('{\"value\": 1}', flush=True)"
        with Gang([worker(code), worker(code)]) as gang:
            assert [reply["value"] for reply in gang.ask({"do": "run"})] == [1, 1]
            for one in gang.workers:
                one.send({"do": "run"})
            time.sleep(0.1)
            assert [one.receive()["value"] for one in gang.workers] == [1, 1]

    def test_it_ends_with_its_parent(self):
        """Even while it computes: a parent that is killed closes nothing."""
        child = (
            "import time, validate.bench.worker as w\n"
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
        found = {one.precision: one for one in rates_of(engine, 1, size=64, seconds=0.0)}
        assert list(found) == list(PRECISIONS)
        assert found["fp32"].gflops > 0
        assert engine != "numpy" or found["int8"].gflops is None

    def test_the_best_engine_or_all_reasons(self):
        found = [
            Peak("fp32", 10.0, "a"),
            Peak("fp32", 20.0, "b"),
            Peak("int8", None, "a", "a: no"),
            Peak("int8", None, "b", "b: no"),
        ]
        assert best_of(found, "fp32") == Peak("fp32", 20.0, "b")
        assert best_of(found, "int8").why == "a: no; b: no"
        assert best_of([], "bf16").gflops is None
