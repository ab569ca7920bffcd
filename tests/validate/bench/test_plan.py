"""What was asked for is either timed or listed with its reason."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec import structs

from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BackendError
from ddexport.validate.bench import plan as module
from ddexport.validate.bench.plan import backend_names, make_plan
from ddexport.validate.bench.workload import RunnerConfiguration, Workload


@pytest.fixture
def planned(bundle, quick):
    manifest = read_manifest(bundle)

    def make(**changes):
        return make_plan(bundle, manifest, dataclasses.replace(quick, **changes))

    return make


def reasons(plan):
    return dict(text.split(": ", 1) for text in plan.skipped)


def names(plan):
    return [(str(entry.runner), entry.workload.batch, entry.workload.steps) for entry in plan.entries]


def test_every_workload_of_every_runner_from_the_smallest_on(planned):
    plan = planned(
        backends=("onnxruntime", "torch"), precisions=("fp32",), batches=(4, 1), steps=("teacher", 2, 1)
    )
    order = [(batch, steps) for _, batch, steps in names(plan)][::2]
    assert order == [(1, 1), (1, 2), (1, "teacher"), (4, 1), (4, 2), (4, "teacher")]
    assert len(plan.entries) == 12 and not plan.skipped


def test_what_cannot_run_is_listed_with_its_reason(planned):
    """Not installed, no such graphs, no such schedule, no such arithmetic: none is dropped in silence."""
    plan = reasons(
        planned(backends=("onnxruntime", "tensorrt", "torch"), precisions=("fp32", "int8"), steps=(1, 7))
    )
    assert plan["onnxruntime int8"] == "the bundle has no graphs in int8"
    assert plan["torch int8"] == "torch computes in fp32 or bf16"
    assert any("tensorrt fp32" in what for what in plan)
    schedule = next(reason for what, reason in plan.items() if "steps 7" in what)
    assert "7 steps" in schedule and "1, 2, teacher" in schedule


def test_by_default_every_backend_of_the_runtime_in_what_it_can(planned):
    plan = planned()
    spoken = {entry.runner.backend for entry in plan.entries} | {
        name.split()[0] for names in reasons(plan) for name in names.split("; ")
    }
    assert {"onnxruntime", "openvino", "tensorrt"} <= spoken
    assert ("onnxruntime fp32", 1, 1) in names(plan)


def test_a_bundle_without_a_teacher(planned, bundle, quick):
    manifest = read_manifest(bundle)
    alone = {steps: one for steps, one in manifest.schedules.items() if one.teacher is None}
    manifest = structs.replace(manifest, teacher=None, schedules=alone)
    request = dataclasses.replace(
        quick, backends=("onnxruntime", "torch"), precisions=("fp32",), steps=("teacher",)
    )
    plan = make_plan(bundle, manifest, request)
    assert not plan.entries
    assert "no schedule of teacher steps" in plan.skipped[0]


def test_torch_compile_needs_a_compiler(planned, monkeypatch):
    monkeypatch.setattr(module, "compiler", lambda: None)
    plan = planned(backends=("torch-compile",), precisions=("fp32",))
    assert not plan.entries and "C++ compiler" in reasons(plan)["torch-compile fp32"]


def test_the_teacher_in_pytorch_is_torch_alone(planned):
    plan = planned(backends=("torch", "torch-compile", "published"), precisions=("fp32",), steps=("teacher",))
    assert names(plan) == [("torch fp32", 1, "teacher")]
    assert set(reasons(plan).values()) == {"the auto-regressive model in PyTorch is timed by --backend torch"}


def test_a_baseline_is_timed_though_it_was_not_named(planned):
    """Of the same batch and threads, in float32, in the steps that were asked for."""
    plan = planned(
        backends=("onnxruntime",),
        precisions=("fp32",),
        threads=(1, 2),
        against="torch",
        against_steps="teacher",
    )
    for entry, baseline in plan.baselines.items():
        wanted = RunnerConfiguration("torch", "fp32", entry.runner.threads)
        assert (baseline.runner, baseline.workload) == (wanted, Workload(1, "teacher"))
    assert len(plan.entries) == len(plan.baselines) == 4  # those of the baseline are their own
    own = planned(backends=("onnxruntime",), precisions=("fp32",), steps=(1, 2), against="onnxruntime")
    assert all(baseline == entry for entry, baseline in own.baselines.items())
    assert len(own.baselines) == len(own.entries) == 2


def test_a_baseline_that_cannot_run_is_listed(planned):
    plan = planned(
        backends=("onnxruntime",), precisions=("fp32",), against="published", against_steps="teacher"
    )
    assert len(plan.entries) == 1 and not plan.baselines
    assert any("published" in what for what in reasons(plan))


def test_a_device_is_for_those_that_compute_on_it(planned):
    plan = reasons(
        planned(backends=("openvino", "onnxruntime", "torch"), precisions=("fp32",), device="cuda")
    )
    assert plan["openvino fp32"] == "it does not run on cuda"
    assert plan["torch fp32"] == "PyTorch is timed on the CPU alone"
    assert "CUDAExecutionProvider" in plan["onnxruntime fp32"]
    with pytest.raises(BackendError, match="no device 'gpu'"):
        planned(device="gpu")


def test_processes_share_the_threads(planned):
    plan = planned(backends=("onnxruntime",), precisions=("fp32",), threads=(4, 1), processes=(1, 2))
    shares = [(e.runner.threads, e.runner.processes, e.runner.threads_each) for e in plan.entries]
    assert shares == [(4, 1, 4), (4, 2, 2), (1, 1, 1)]
    assert reasons(plan) == {"2 processes": "they need as many threads, not 1"}


def test_the_names_are_those_of_the_runtime_and_pytorchs():
    assert {"onnxruntime", "torch", "torch-compile", "published"} <= set(backend_names())
