"""The rows of a whole run, in the test's own process: what is in them, and how it is computed."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from ddexport.runtime.bundle import read_manifest
from ddexport.validate.bench.agreement import Judge
from ddexport.validate.bench.plan import make_plan
from ddexport.validate.bench.roofline import flops_of
from ddexport.validate.bench.run import measure_peaks, run_bench
from ddexport.validate.bench.worker import WorkerError
from ddexport.validate.bench.workload import Run, RunnerConfiguration, Times

PEAKS = {(1, "fp32"): 100.0, (2, "fp32"): 100.0, (1, "bf16"): "no engine"}


@pytest.fixture
def rows_of(bundle, quick):
    """Rows of a request, made by `worker`."""

    def rows(worker, peaks=PEAKS, **changes):
        request = dataclasses.replace(quick, **changes)
        manifest = read_manifest(bundle)
        plan = make_plan(bundle, manifest, request)
        assert not plan.skipped
        return run_bench(bundle, manifest, plan, request, peaks, start=worker)

    return rows


def clocked(base, times):
    """Workers that tell made-up times: `times` gives those of a backend's runs, in milliseconds."""

    class Clocked(base):
        def receive(self):
            reply = super().receive()
            if not isinstance(reply, (Run, Times)):
                return reply
            student, teacher, decoder = (value / 1e3 for value in next(times[self.backend]))
            made = Times(student, teacher, decoder, student + teacher + decoder + 1e-3)
            if isinstance(reply, Times):
                return made
            return dataclasses.replace(reply, times=made, peak_mib=300.0)

    return Clocked


def test_the_arithmetic_of_a_row(rows_of, in_process, bundle):
    """By a made-up clock: the first run and the warm-up do not count, medians do."""
    times = {
        # prepared, warmed up, then five rounds
        "onnxruntime": iter([(90, 0, 90), (90, 0, 90), *((s, 0, 6) for s in (3, 1, 2, 5, 4))]),
        "torch": iter([(90, 0, 90), (90, 0, 90), *((s, 0, 10) for s in (9, 9, 9, 9, 9))]),
        "reference": itertools.repeat((1, 0, 1)),
    }
    fast, slow = rows_of(
        clocked(in_process, times), backends=("onnxruntime", "torch"), precisions=("fp32",), batches=(4,),
        against="torch", percentiles=(0.0, 50.0, 100.0),
    )  # fmt: skip
    assert (fast.student_ms, fast.decoder_ms, fast.total_ms) == pytest.approx((3.0, 6.0, 10.0))
    assert fast.teacher_ms is None
    assert fast.percentiles["student"] == pytest.approx({"0": 1.0, "50": 3.0, "100": 5.0})
    assert fast.rounds == 5
    assert fast.images_per_s == pytest.approx(4 / 0.010)
    assert fast.peak_mib == 300.0
    assert slow.total_ms == pytest.approx(20.0)
    assert fast.speedup == pytest.approx(2.0)
    assert 20 / 12 <= fast.speedup_low <= 2.0 <= fast.speedup_high <= 20 / 8 + 1e-9
    assert (slow.speedup, slow.speedup_low, slow.speedup_high) == (1.0, 1.0, 1.0)
    assert fast.against == "torch fp32, steps 1"
    # The share of the peak: the work of four images in ten milliseconds, of 100 GFLOP/s.
    manifest = read_manifest(bundle)
    work = flops_of(bundle, manifest, manifest.schedule(1))
    assert fast.flops == work and work["total"] == work["student"] + work["decoder"]
    assert fast.roofline == pytest.approx(4 * work["total"] / 0.010 / 100e9)


def test_every_runner_is_right_and_judged_on_what_it_gave(rows_of, in_process):
    rows = rows_of(
        in_process, backends=("onnxruntime", "torch", "published"), precisions=("fp32",), batches=(2,),
        steps=(1, 2),
    )  # fmt: skip
    assert [(row.runner.backend, row.workload.steps) for row in rows] == [
        (backend, steps) for steps in (1, 2) for backend in ("onnxruntime", "torch", "published")
    ]
    for row in rows:
        assert (row.passed, row.tokens_equal, row.error) == (True, 1.0, None)
        assert row.image_psnr > 60 and row.image_max <= 2 and row.embedding_error < 1e-4
        assert row.version and row.machine and row.model == "tiny"


def test_the_teacher_gives_the_same_tokens_in_pytorch_and_in_the_runtime(rows_of, in_process):
    """The published sampler with its own cache, and the runtime's loop over the graph, by equal numbers."""
    rows = rows_of(
        in_process, backends=("onnxruntime", "torch"), precisions=("fp32",), steps=("teacher",), batches=(3,)
    )
    for row in rows:
        assert row.passed is True and row.tokens_equal == 1.0 and row.image_psnr > 60
        assert row.student_ms is None and row.teacher_ms > 0
        assert set(row.flops) == {"teacher", "decoder", "total"}


def test_the_work_of_a_schedule(bundle):
    manifest = read_manifest(bundle)
    one, two, teacher = (flops_of(bundle, manifest, manifest.schedule(steps)) for steps in (1, 2, "teacher"))
    assert two["student"] == 2 * one["student"] and two["decoder"] == one["decoder"]
    assert teacher["total"] == teacher["teacher"] + teacher["decoder"]
    # A precision without graphs of its own computes on others.
    assert flops_of(bundle, manifest, manifest.schedule(1), "bf16") == one


def test_the_teacher_of_another_engine_is_told(rows_of, in_process):
    pytest.importorskip("openvino")
    (row,) = rows_of(in_process, backends=("openvino",), precisions=("fp32",), steps=("teacher",))
    assert row.passed is True and row.notes == ("the teacher ran in onnxruntime, cpu, fp32",)


def test_no_timed_run_asks_for_logits(rows_of, in_process, monkeypatch):
    """As users do not; they are computed once more, after the clock has stopped, for outputs that are new."""
    from ddexport.runtime.backends.onnxruntime import OnnxRuntime

    asked, run = [], OnnxRuntime.run

    def spy(self, graph, feeds, names=None):
        asked.append(names)
        return run(self, graph, feeds, names)

    monkeypatch.setattr(OnnxRuntime, "run", spy)
    (row,) = rows_of(in_process, backends=("onnxruntime",), precisions=("fp32",), steps=(2,))
    assert asked.count(("logits",)) == 2 and asked.count(("sequence", "tokens")) == 2 * (row.rounds + 2)
    assert asked.index(("logits",)) > asked.index(None) and row.passed is True


def test_a_peak_that_could_not_be_measured_has_its_reason(rows_of, in_process):
    (row,) = rows_of(in_process, {(1, "fp32"): "no engine"}, backends=("onnxruntime",), precisions=("fp32",))
    assert row.roofline is None and row.flops is not None
    assert "no share of the peak in fp32: no engine" in row.notes


def test_a_worker_that_dies_is_a_row_that_says_so(rows_of, in_process):
    """Here while it is timed; the others go on."""

    class Dying(in_process):
        count = 0

        def send(self, method, *arguments):
            if self.backend == "torch" and method == "run":
                Dying.count += 1
                if Dying.count > 3:
                    raise WorkerError("the worker was ended by SIGKILL")
            super().send(method, *arguments)

    good, bad = rows_of(Dying, backends=("onnxruntime", "torch"), precisions=("fp32",), against="torch")
    assert bad.error == "the worker was ended by SIGKILL" and bad.total_ms is None and bad.passed is None
    assert good.timed and good.passed is True and good.speedup is None


def test_what_cannot_be_opened_or_prepared_is_a_row_too(rows_of, in_process):
    class Closed(in_process):
        def send(self, method, *arguments):
            super().send(method, *arguments)
            if self.backend == "torch" and method == "open":
                raise WorkerError("no torch today")
            if self.backend == "published" and method == "prepare":
                raise WorkerError("not this workload", "Another one.")

    rows = rows_of(Closed, backends=("torch", "published", "onnxruntime"), precisions=("fp32",))
    assert [row.error for row in rows] == ["no torch today", "not this workload. Another one.", None]


def test_without_the_reference_rows_are_timed_and_not_judged(rows_of, in_process):
    class NoReference(in_process):
        def send(self, method, *arguments):
            super().send(method, *arguments)
            if self.backend == "reference":
                raise WorkerError("it needs that file", "give it with --checkpoint")

    (row,) = rows_of(NoReference, backends=("onnxruntime",), precisions=("fp32",))
    assert row.timed and row.passed is None
    assert row.notes == ("not compared: it needs that file. give it with --checkpoint",)


def test_copies_side_by_side_count_together(rows_of, in_process):
    times = {
        "onnxruntime": itertools.cycle([(1, 0, 8), (3, 0, 6)]),
        "reference": itertools.repeat((1, 0, 1)),
    }
    (row,) = rows_of(
        clocked(in_process, times), backends=("onnxruntime",), precisions=("fp32",), batches=(3,),
        threads=(2,), processes=(2,),
    )  # fmt: skip
    assert row.images_per_s == pytest.approx(2 * 3 / 0.010)
    assert row.peak_mib == 600.0 and row.passed is True


def test_an_image_whose_tokens_all_differ_is_compared_by_its_decoder(rows_of, in_process, monkeypatch):
    """And differing tokens are told."""
    monkeypatch.setattr(Judge, "comparable", lambda self, got: np.zeros(len(got.image), dtype=np.bool_))
    (row,) = rows_of(in_process, backends=("onnxruntime",), precisions=("fp32",))
    assert row.image_psnr > 60
    assert any("reference's sequence" in note for note in row.notes)


def test_peaks_of_engines_that_fail_are_reasons():
    class Engine:
        def __init__(self, threads):
            assert threads == 2

        def call(self, method, engine, precision, threads):
            if (engine, precision) != ("numpy", "fp32"):
                raise WorkerError("gone")
            return 7.0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    runners = [RunnerConfiguration("torch", precision, 2) for precision in ("fp32", "int8")]
    peaks = measure_peaks([*runners, RunnerConfiguration("onnxruntime", "fp16", 2, "cuda:0")], start=Engine)
    assert peaks[2, "fp32"] == 7.0
    assert "onnxruntime: gone" in peaks[2, "int8"] and len(peaks) == 2
