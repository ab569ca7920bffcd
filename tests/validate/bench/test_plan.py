"""What was asked for is timed, skipped with its reason, or missing before anything is measured. Rounds are
fair, and the interval of a ratio contains the ratio."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ddexport.runtime import backends
from ddexport.runtime.backends import CPU, Configuration
from ddexport.runtime.bundle import Source, Weights, sha256_of
from ddexport.runtime.errors import BackendError
from ddexport.validate.bench import plan as module
from ddexport.validate.bench.plan import Request, backend_names, make_plan
from ddexport.validate.bench.rounds import MOST_ROUNDS, interleave, speedup, summary, wants_round


@pytest.fixture
def planned(bundle, manifest):
    def make(manifest=manifest, packages=(), **changes):
        request = dataclasses.replace(Request((bundle,), precisions=("fp32",), threads=(1,)), **changes)
        return make_plan(bundle, manifest, request, packages)

    return make


def names(plan):
    return [(one.configuration.backend, one.threads, one.batch, one.steps) for one in plan.entries]


def test_every_workload_of_every_configuration_small_batches_first(planned):
    plan = planned(backends=("onnxruntime", "torch-eager"), batches=(4, 1), steps=(2, "teacher"))
    assert [(batch, steps) for _, _, batch, steps in names(plan)][::2] == [
        (1, 2), (1, "teacher"), (4, 2), (4, "teacher"),
    ]  # fmt: skip
    assert len(plan.entries) == 8 and not plan.skipped and not plan.missing


def test_what_cannot_run_is_listed(planned):
    """No such arithmetic, schedule or device: none is dropped in silence."""
    for changes in (
        {"backends": ("naive",), "precisions": ("bf16",)},
        {"backends": ("onnxruntime",), "steps": (7,)},
        {"backends": ("naive",), "steps": ("teacher",)},
        {"backends": ("torch-eager",), "precisions": ("fp16",)},
        {"backends": ("torch-eager",), "device": "cuda"},
        {"backends": ("naive",), "device": "cuda"},
        {"backends": ("onnxruntime",), "device": "cuda"},
    ):
        plan = planned(**changes)
        assert not plan.entries and not plan.missing
        assert len(plan.skipped) == 1 and changes["backends"][0] in plan.skipped[0]


def test_by_default_every_backend_of_the_runtime_in_what_it_can(planned, manifest):
    plan = planned(precisions=())
    named = {name for name, *_ in names(plan)} | {text.split()[0] for text in plan.skipped}
    assert {"onnxruntime", "openvino", "tensorrt", "torch-eager", "torch-compile"} <= named
    tried = {one.configuration for one in plan.entries if one.configuration.backend == "onnxruntime"}
    assert {one.precision for one in tried} == {"fp32", "fp16", "int8"}
    alone = structs.replace(manifest, teacher=None, schedules={1: manifest.schedules[1]})
    plan = planned(alone, backends=("onnxruntime",), steps=("teacher",))
    assert not plan.entries and "teacher" in plan.skipped[0]
    with pytest.raises(BackendError):
        planned(device="gpu")
    assert {"onnxruntime", "torch-eager", "torch-compile", "naive"} <= set(backend_names())


def test_a_baseline_is_timed_though_it_was_not_named(planned):
    """Of the same batch, threads and decoder, in the steps that were asked for."""
    plan = planned(
        backends=("onnxruntime",), threads=(1, 2), decoders=("full", "small"), against="torch-eager",
        against_steps="teacher",
    )  # fmt: skip
    for entry, (baseline,) in plan.baselines.items():
        assert (baseline.configuration.backend, baseline.steps) == ("torch-eager", "teacher")
        assert (baseline.threads, baseline.decoder) == (entry.threads, entry.decoder)
    assert len(plan.entries) == len(plan.baselines) == 8  # those of the baseline are their own
    own = planned(backends=("onnxruntime",), steps=(1, 2), against="onnxruntime")
    assert all(baseline == (entry,) for entry, baseline in own.baselines.items()) and len(own.entries) == 2
    lost = planned(backends=("onnxruntime",), against="naive", against_steps="teacher")
    assert len(lost.entries) == 1 and not lost.baselines and "naive" in lost.skipped[0]


def compared(plan):
    """The names of what each row is compared with."""
    name = lambda one: f"{one.configuration.backend} {one.configuration.precision}"  # noqa: E731
    return {name(one): [name(rival) for rival in rivals] for one, rivals in plan.baselines.items()}


def test_pytorch_of_the_same_precision_is_the_baseline(planned, monkeypatch):
    """The faster of its two ways, where they are in the table or asked for; never another precision."""
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    precisions = ("fp32", "int8")
    rivals = {"fp32": ["torch-eager fp32", "torch-compile fp32"], "int8": ["torch-compile int8"]}
    for changes in ({"backends": ("onnxruntime",), "against": "torch"}, {}):
        for name, against in compared(planned(precisions=precisions, **changes)).items():
            assert against == rivals[name.split()[1]], name
    assert not planned(backends=("onnxruntime",)).baselines
    named = planned(backends=("onnxruntime",), precisions=precisions, against="torch-eager")
    assert compared(named) == {
        f"{name} fp32": ["torch-eager fp32"] for name in ("onnxruntime", "torch-eager")
    }
    naive = compared(planned(backends=("onnxruntime",), precisions=("int8",), against="naive"))
    assert naive["onnxruntime int8"] == ["naive fp32"]  # which has no other
    teacher = planned(backends=("onnxruntime",), precisions=("int8",), against="torch-eager",
                      against_precision="fp32", against_steps="teacher")  # fmt: skip
    assert compared(teacher)["onnxruntime int8"] == ["torch-eager fp32"]


def test_what_pytorch_cannot_do_on_this_machine(planned, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "torchao" else object())
    monkeypatch.setattr(module.shutil, "which", lambda name: "/usr/bin/g++")
    plan = planned(backends=("torch-compile",), precisions=("int8",))
    assert not plan.entries and "torchao" in plan.missing[0]
    for flags, count in ((["avx512f"], 0), (["avx512f", "avx512_bf16"], 1), ([], 1)):
        here = module.cpu()._replace(flags=frozenset(flags))
        monkeypatch.setattr(module, "cpu", lambda here=here: here)
        plan = planned(backends=("torch-eager",), precisions=("bf16",))
        assert len(plan.entries) == count and len(plan.skipped) == 1 - count
    monkeypatch.setattr(module, "gpu_fault", lambda index: "")
    plan = planned(backends=("torch-eager", "torch-compile"), precisions=("fp16",), device="cuda:0")
    assert {one.configuration.device for one in plan.entries} == {"cuda:0"} and len(plan.entries) == 2


def test_all_that_is_missing_is_found_at_once(planned, manifest, monkeypatch, tmp_path):
    """Packages, a compiler, an engine that was named, and files of a bundle that was made from some."""
    absent = Configuration("openvino", "cpu", "fp32", "fp32", CPU, "openvino is not installed: pip it")
    monkeypatch.setattr(backends, "configurations", lambda *_: [absent])
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    other = tmp_path / "other.pth"
    other.write_bytes(b"other")
    roles = {"student": "s.pth", "tokenizer": "v.pth", "teacher": "t.pth"}
    sources = tuple(Source(role=role, file=file, sha256="0" * 64, bytes=5) for role, file in roles.items())
    made = structs.replace(manifest, weights=Weights(kind="checkpoint", files=sources))
    named, given = ("openvino", "torch-compile", "torch-eager"), {"tokenizer": other}
    plan = planned(made, ("torch", "no_such"), backends=named, files=given, steps=("teacher",))
    assert len(plan.missing) == 6
    for word in ("no_such", "openvino", "torch-compile", "--checkpoint s.pth", "--vae", "--teacher t.pth"):
        assert sum(word in one for one in plan.missing) == 1, word
    right = tuple(structs.replace(source, sha256=sha256_of(other)) for source in sources)
    made = structs.replace(manifest, weights=Weights(kind="checkpoint", files=right))
    files = {"student": other, "tokenizer": tmp_path / "none"}  # a teacher is not needed in one step
    (missing,) = planned(made, backends=named[2:], files=files).missing
    assert str(files["tokenizer"]) in missing
    assert not planned().missing  # of an engine that was not named


def run(seconds, duration):
    """Rows that take so long each; by round, which ran."""
    rounds = {}
    spent = {name: [] for name in seconds}

    def once(name, number):
        spent[name].append(seconds[name])
        rounds.setdefault(number, []).append(name)

    interleave([*seconds], lambda name: wants_round(spent[name], duration), once, seed=0, pause=0.0)
    return rounds


def test_every_round_has_each_once_in_another_order():
    """What is compared lies beside each other in time: no row runs twice before another has run."""
    rounds = run({"a": 1.0, "b": 1.0, "c": 1.0}, 7.0)
    assert [sorted(names) for names in rounds.values()] == [["a", "b", "c"]] * 7
    assert len({tuple(names) for names in rounds.values()}) > 1  # none always follows the same


def test_the_duration_is_each_rows_own():
    for seconds, rounds in ((0.1, 20), (1.0, 5), (12.0, 3), (100.0, 1), (0.0, MOST_ROUNDS)):
        counted = run({"slow": 3.0, "one": seconds}, 2.0)
        assert sum("one" in names for names in counted.values()) == pytest.approx(rounds, abs=1)
        assert sum("slow" in names for names in counted.values()) == 5
        assert all("one" in counted[number] for number in range(min(rounds, 5)))  # the rounds that both have


def test_percentiles_only_where_there_are_a_hundred_rounds():
    few = summary([0.001, 0.002, 0.006])
    assert few == pytest.approx({"total_ms": 2.0, "total_min_ms": 1.0, "total_max_ms": 6.0})
    assert "total_p99_ms" not in summary([1.0] * 99)
    many = summary([number / 1e3 for number in range(101)])
    assert (many["total_ms"], many["total_p90_ms"], many["total_p99_ms"]) == pytest.approx((50, 90, 99))


times = st.lists(st.floats(1e-4, 1e3), min_size=3, max_size=12)
few = settings(max_examples=25)


def numbered(values):
    return dict(enumerate(values))


@few
@given(baseline=times, own=times)
def test_the_interval_contains_the_ratio_and_turns_with_it(baseline, own):
    there, back = speedup(numbered(baseline), numbered(own)), speedup(numbered(own), numbered(baseline))
    assert 0 < there["speedup_low"] <= there["speedup"] <= there["speedup_high"]
    assert back["speedup"] == pytest.approx(1 / there["speedup"])
    assert back["speedup_low"] == pytest.approx(1 / there["speedup_high"], rel=1e-6)
    assert back["speedup_high"] == pytest.approx(1 / there["speedup_low"], rel=1e-6)


@few
@given(own=times, factor=st.floats(0.01, 100))
def test_pairing_cancels_what_slows_a_whole_round(own, factor):
    """A baseline that is always so many times slower has that ratio exactly, however noisy the rounds."""
    ratio = speedup(numbered([value * factor for value in own]), numbered(own))
    assert [*ratio.values()] == pytest.approx([factor] * 3)


def test_only_common_rounds_count_and_few_have_no_interval():
    ratio = speedup({0: 2.0, 1: 2.0, 2: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0, 4: 9.0, 5: 9.0, 6: 9.0})
    assert ratio["speedup"] == pytest.approx(2.0)
    assert speedup({0: 1.0}, {1: 1.0}) == {}
    assert speedup({0: 6.0}, {0: 2.0, 1: 2.5}) == {"speedup": pytest.approx(3.0)}  # a teacher of minutes
