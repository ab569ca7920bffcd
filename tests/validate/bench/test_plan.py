"""What was asked for is either timed or listed with its reason."""

from __future__ import annotations

import dataclasses

import pytest
from msgspec import structs

from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.machine import Cpu, Machine
from ddexport.validate.bench import plan as module
from ddexport.validate.bench.case import Alternative, Case
from ddexport.validate.bench.plan import backend_names, make_plan, nothing_left


@pytest.fixture
def planned(bundle, quick):
    manifest = read_manifest(bundle)
    machine = Machine(cpu=Cpu("a processor", 4, ("AVX2",)))

    def make(**changes):
        return make_plan(bundle, manifest, machine, dataclasses.replace(quick, **changes))

    return make


def reasons(plan):
    return {one.what: one.reason for one in plan.skipped}


def names(plan):
    return [(one.alternative.name, one.case.batch, one.case.steps) for one in plan.entries]


def test_every_case_of_every_alternative_from_the_smallest_on(planned):
    found = planned(
        backends=("onnxruntime", "torch"), precisions=("fp32",), batches=(4, 1), steps=("teacher", 2, 1)
    )
    order = [(batch, steps) for _, batch, steps in names(found)][::2]
    assert order == [(1, 1), (1, 2), (1, "teacher"), (4, 1), (4, 2), (4, "teacher")]
    assert len(found.entries) == 12 and not found.skipped


def test_what_cannot_run_is_listed_with_its_reason(planned):
    """Not installed, no such graphs, no such schedule, no such arithmetic: none is dropped in silence."""
    found = reasons(
        planned(backends=("onnxruntime", "tensorrt", "torch"), precisions=("fp32", "int8"), steps=(1, 7))
    )
    assert found["onnxruntime int8"] == "the bundle has no graphs in int8"
    assert found["torch int8"] == "torch computes in fp32 or bf16"
    assert any("tensorrt fp32" in what for what in found)
    schedule = next(reason for what, reason in found.items() if "steps 7" in what)
    assert "7 steps" in schedule and "1, 2, teacher" in schedule


def test_by_default_every_backend_of_the_runtime_in_what_it_can(planned):
    found = planned()
    spoken = {entry.alternative.backend for entry in found.entries} | {
        name.split()[0] for one in found.skipped for name in one.what.split("; ")
    }
    assert {"onnxruntime", "openvino", "tensorrt"} <= spoken
    assert ("onnxruntime fp32", 1, 1) in names(found)


def test_a_bundle_without_a_teacher(planned, bundle, quick):
    manifest = read_manifest(bundle)
    alone = {steps: one for steps, one in manifest.schedules.items() if one.teacher is None}
    manifest = structs.replace(manifest, teacher=None, schedules=alone)
    request = dataclasses.replace(
        quick, backends=("onnxruntime", "torch"), precisions=("fp32",), steps=("teacher",)
    )
    found = make_plan(bundle, manifest, Machine(), request)
    assert not found.entries
    assert "no schedule of teacher steps" in found.skipped[0].reason
    assert "no schedule of teacher steps" in nothing_left(found.skipped).message


def test_torch_compile_needs_a_compiler(planned, monkeypatch):
    monkeypatch.setattr(module, "compiler", lambda: None)
    found = planned(backends=("torch-compile",), precisions=("fp32",))
    assert not found.entries and "C++ compiler" in reasons(found)["torch-compile fp32"]


def test_the_teacher_in_pytorch_is_torch_alone(planned):
    found = planned(
        backends=("torch", "torch-compile", "published"), precisions=("fp32",), steps=("teacher",)
    )
    assert names(found) == [("torch fp32", 1, "teacher")]
    assert set(reasons(found).values()) == {
        "the auto-regressive model in PyTorch is timed by --backend torch"
    }


def test_a_baseline_is_timed_though_it_was_not_named(planned):
    """Of the same batch and threads, in float32, in the steps that were asked for."""
    found = planned(
        backends=("onnxruntime",),
        precisions=("fp32",),
        threads=(1, 2),
        against="torch",
        against_steps="teacher",
    )
    for entry, baseline in found.baselines.items():
        wanted = Alternative("torch", "fp32", entry.alternative.threads)
        assert (baseline.alternative, baseline.case) == (wanted, Case(1, "teacher"))
    assert len(found.entries) == len(found.baselines) == 4  # those of the baseline are their own
    own = planned(backends=("onnxruntime",), precisions=("fp32",), steps=(1, 2), against="onnxruntime")
    assert all(baseline == entry for entry, baseline in own.baselines.items())
    assert len(own.baselines) == len(own.entries) == 2


def test_a_baseline_that_cannot_run_is_listed(planned):
    found = planned(
        backends=("onnxruntime",), precisions=("fp32",), against="published", against_steps="teacher"
    )
    assert len(found.entries) == 1 and not found.baselines
    assert any("published" in what for what in reasons(found))


def test_modes_are_for_those_that_have_them(planned):
    found = planned(backends=("onnxruntime", "torch"), precisions=("fp32",), modes=("latency", "throughput"))
    assert [entry.alternative.mode for entry in found.entries] == [None, None]
    assert "--processes" in reasons(found)["onnxruntime, throughput; torch, throughput"]


def test_processes_share_the_threads(planned):
    found = planned(backends=("onnxruntime",), precisions=("fp32",), threads=(4, 1), processes=(1, 2))
    each = [
        (e.alternative.threads, e.alternative.processes, e.alternative.threads_each) for e in found.entries
    ]
    assert each == [(4, 1, 4), (4, 2, 2), (1, 1, 1)]
    assert reasons(found) == {"2 processes": "they need as many threads, not 1"}


def test_the_names_are_those_of_the_runtime_and_pytorchs():
    assert {"onnxruntime", "torch", "torch-compile", "published"} <= set(backend_names())
