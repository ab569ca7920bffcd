"""The rows of a whole run, in the test's own process: what is in them, and how it is computed."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from ddexport.graph.flops import count_flops
from ddexport.validate.bench import run as module
from ddexport.validate.bench import session as session_module
from ddexport.validate.bench.plan import Request, make_plan
from ddexport.validate.bench.run import gflop_of, run_bench
from ddexport.validate.bench.session import Job, Run, Session
from ddexport.validate.bench.table import tables
from ddexport.validate.bench.worker import WorkerError


@pytest.fixture
def rows_of(bundle, manifest, in_process):
    """Rows of a request in float32, made by workers in this process; others where they are given."""

    def rows(peaks=None, **changes):
        request = dataclasses.replace(
            Request((bundle,), duration=0.0, threads=(1,), precisions=("fp32",)), **changes
        )
        plan = make_plan(bundle, manifest, request)
        assert not plan.skipped and not plan.missing
        return run_bench(bundle, manifest, plan, request, peaks or {})

    return rows


@pytest.fixture
def failing(monkeypatch, in_process):
    """failing(backend, method, after): workers of that backend that die after so many calls of a method."""

    def make(backend, method, after=0):
        class Dying(in_process):
            calls = 0

            def call(self, name, *arguments):
                done = super().call(name, *arguments)
                if (self.backend, name) == (backend, method):
                    Dying.calls += 1
                    if Dying.calls > after:
                        raise WorkerError("the worker was ended by SIGKILL", "Another one.")
                return done

        monkeypatch.setattr(module, "Worker", Dying)

    return make


def test_the_arithmetic_of_a_row(rows_of, monkeypatch, in_process, bundle, manifest, entry_of):
    """By a made-up clock: the first run and the warm-up do not count, medians do, and the largest memory."""
    milliseconds = {
        "onnxruntime": iter([(90, 90, 900), (90, 90, 900), *((s, 6, 300 + s) for s in (3, 1, 2, 5, 4))]),
        "torch-eager": itertools.chain([(90, 90, 900)] * 2, itertools.repeat((9, 10, 1))),
    }

    class Clocked(in_process):
        def call(self, method, *arguments):
            reply = super().call(method, *arguments)
            if method != "run":
                return (500, 2.0) if method == "throughput" else reply
            student, decoder, peak = next(milliseconds[self.backend])
            return Run(student / 1e3, 0.0, decoder / 1e3, (student + decoder + 1) / 1e3, peak)

    monkeypatch.setattr(module, "Worker", Clocked)
    fast, slow = rows_of(
        {("cpu", 1, "fp32"): 100.0},
        backends=("onnxruntime", "torch-eager"),
        batches=(4,),
        against="torch-eager",
    )
    names = ("student_ms", "decoder_ms", "total_ms", "total_min_ms", "total_max_ms")
    assert [fast[name] for name in names] == pytest.approx([3.0, 6.0, 10.0, 8.0, 12.0])
    assert fast["teacher_ms"] is None and fast["total_p99_ms"] is None and fast["rounds"] == 5
    assert fast["images_per_s"] == 250.0 and fast["peak_mib"] == 305
    assert slow["total_ms"] == pytest.approx(20.0) and fast["speedup"] == pytest.approx(2.0)
    assert 20 / 12 <= fast["speedup_low"] <= 2.0 <= fast["speedup_high"] <= 20 / 8 + 1e-9
    assert [slow[f"speedup{end}"] for end in ("", "_low", "_high")] == [1.0] * 3
    assert fast["against"] == "torch-eager fp32, steps 1"
    # The share of the peak: the work of four images in ten milliseconds, of 100 GFLOP/s.
    assert fast["gflop"] == gflop_of(bundle, manifest, entry_of())
    assert fast["roofline"] == pytest.approx(4 * fast["gflop"] / 0.010 / 100)
    assert json.dumps(fast) and not any(isinstance(value, (dict, list)) for value in fast.values())


def test_the_teacher_gives_the_same_tokens_in_pytorch_and_in_the_runtime(rows_of):
    """The published sampler with its own cache, and the runtime's loop over the graph, by equal numbers."""
    for row in rows_of(backends=("onnxruntime", "torch-eager"), steps=("teacher",), batches=(2,)):
        assert row["passed"] is True and row["tokens_equal"] == 1.0 and row["image_psnr"] > 60
        assert row["student_ms"] is None and row["teacher_ms"] > 0


def test_the_work_of_a_schedule(bundle, manifest, entry_of):
    one, two, teacher = (gflop_of(bundle, manifest, entry_of(4, steps)) for steps in (1, 2, "teacher"))
    decoder = 2 * one - two
    steps = manifest.teacher.steps(manifest.schedule("teacher").teacher)
    length = {"batch": 1, "capacity": manifest.sequence.length}
    passes = [count_flops(bundle / "teacher.onnx", new=end - start, **length) for start, end in steps]
    assert 0 < decoder < one and teacher == pytest.approx(decoder + sum(passes) / 1e9)
    assert gflop_of(bundle, manifest, entry_of(1, "teacher", "int8")) > decoder  # whose teacher is float32


@pytest.mark.parametrize("call", [("open", 0), ("run", 3), ("outputs", 0)])
def test_a_worker_that_dies_is_a_row_with_its_error(rows_of, failing, call):
    """While it is opened, timed or asked for its outputs; the others go on."""
    failing("torch-eager", *call)
    good, bad = rows_of(backends=("onnxruntime", "torch-eager"), against="torch-eager")
    assert bad["error"] == "the worker was ended by SIGKILL. Another one."
    assert bad["total_ms"] is None and bad["passed"] is None
    assert good["total_ms"] and good["passed"] is True and good["speedup"] is None


def test_a_reference_that_fails(rows_of, failing):
    """Before anything is measured it ends the benchmark, afterwards the row."""
    failing("reference", "expected")
    (row,) = rows_of(backends=("onnxruntime",))
    assert "the worker was ended" in row["error"] and row["passed"] is None
    failing("reference", "open")
    with pytest.raises(WorkerError):
        rows_of(backends=("onnxruntime",))


def test_the_small_decoder_beside_the_full_one(rows_of, manifest, monkeypatch):
    """The same engine, batch and steps; and against PyTorch with the small decoder too."""
    wanted = {"backends": ("onnxruntime",), "decoders": ("full", "small"), "against": "torch-eager"}
    rows = rows_of(**wanted)
    times = {(row["backend"], row["decoder"]): row["total_ms"] for row in rows}
    assert len(times) == len(rows) == 4
    for row in rows:
        rival = times["torch-eager", row["decoder"]]
        assert row["speedup"] == pytest.approx(rival / row["total_ms"]) and row["passed"]
        ratio = times[row["backend"], "full"] / row["total_ms"]
        small = row["decoder"] == "small"
        assert row["small_over_full"] == (pytest.approx(ratio) if small else None)
        assert row["decoder_trained"] is (True if small else None)
    assert "untrained" not in tables(rows) and "small over full" in tables(rows)
    assert "2.00x, untrained at this size" in tables(
        [{**row, "small_over_full": 2.0, "decoder_trained": False} for row in rows]
    )


def test_the_small_decoder_alone_is_over_nothing(rows_of):
    (row,) = rows_of(backends=("onnxruntime",), decoders=("small",))
    assert row["total_ms"] and row["small_over_full"] is None and row["decoder_trained"] is True


def test_throughput_counts_from_the_first_start_to_the_last_end(bundle, manifest, entry_of, monkeypatch):
    """Also what lies between two runs."""
    session, now = Session(), itertools.count(step=0.5)
    session.open(Job(bundle, entry_of().configuration, 1))
    drawn = []
    monkeypatch.setattr(session_module.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(session, "_draw", lambda inputs, *_: drawn.append(len(inputs.noise)))
    assert session.throughput(3, 1, "full", 2.0) == (sum(drawn), 2.0) and len(drawn) == 4
    assert session.throughput(3, 1, "full", 0.0) == (3, 0.5)
