"""What `--backend auto` takes, why not something else, and options that an engine does not have."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ddexport.runtime import selection
from ddexport.runtime.errors import BackendError, BundleError
from ddexport.runtime.machine import Cpu, Gpu, Machine, Package
from ddexport.runtime.manifest import read_manifest
from ddexport.runtime.measured import Measured, write_measured
from ddexport.runtime.options import Options
from ddexport.runtime.selection import Candidate, candidates, choose, explain

from ddexport import runtime

Builder = Callable[..., Path]
CPU = ("CPUExecutionProvider",)
CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")


@pytest.fixture(autouse=True)
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say which engines there are: a machine made up with OpenVINO has it nevertheless."""
    missing = Package("openvino", None, "openvino is not installed: pip install openvino", missing=True)
    fact = cached_property(lambda machine: missing)
    fact.__set_name__(Machine, "openvino")
    monkeypatch.setattr(Machine, "openvino", fact)


def taken(bundle: Path, machine: Machine, **asked: Any) -> str | None:
    found = candidates(bundle, read_manifest(bundle, verify=False), machine, **asked)
    chosen = choose(found, explicit="backend" in asked)
    return chosen.name if chosen else None


def with_providers(machine: Machine, providers: tuple[str, ...]) -> Machine:
    machine.__dict__["providers"] = providers
    return machine


def test_the_order(bundle: Path, build: Builder, add_graphs: Callable[..., None], machine: Machine) -> None:
    """The CPU; ONNX Runtime on the GPU before it; before that engines, in fp32, bf16, fp16."""
    assert taken(bundle, with_providers(machine, CPU)) == "onnxruntime, cpu, fp32"
    assert taken(bundle, with_providers(machine, CUDA)) == "onnxruntime, cuda, fp32"
    for precision in ("fp32", "bf16", "fp16"):
        if precision != "fp32":
            add_graphs(precision)
        build(precision=precision)
        assert taken(bundle, machine) == f"tensorrt, {precision}"
    assert taken(bundle, machine, precision="bf16") == "tensorrt, bf16"
    assert taken(bundle, machine, backend="onnxruntime") == "onnxruntime, cuda, fp32"
    assert taken(bundle, machine, backend="onnxruntime", options=Options(provider="cpu")) == (
        "onnxruntime, cpu, fp32"
    )


def test_engines_that_do_not_fit_are_passed_over(
    gpu: Any, bundle: Path, build: Builder, add_graphs: Callable[..., None], machine: Machine
) -> None:
    add_graphs("fp16")
    build(precision="fp16", version="1.6.0.1")
    build()
    assert taken(bundle, machine) == "tensorrt, fp32"
    gpu.cuda.devices = []
    assert taken(bundle, Machine()) == "onnxruntime, cpu, fp32"


def test_a_damaged_engine_does_not_hinder_the_others(bundle: Path, build: Builder, machine: Machine) -> None:
    folder = build()
    assert taken(bundle, machine) == "tensorrt, fp32"
    (folder / "student_fp32.json").write_text("{")
    assert taken(bundle, machine) == "onnxruntime, cpu, fp32"


def test_hopper_is_skipped_by_auto_and_tried_with_a_warning_when_asked_for(
    gpu: Any, bundle: Path, build: Builder, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.cuda.devices = [SimpleNamespace(name=b"H100", major=9, minor=0, totalGlobalMem=1 << 36)]
    build()
    with caplog.at_level(logging.WARNING), runtime.load(bundle) as pipe:
        assert pipe.backend.name == "onnxruntime"
    assert not caplog.records
    with caplog.at_level(logging.WARNING), runtime.load(bundle, backend="tensorrt") as pipe:
        assert len(pipe(0).images) == 1
    assert "H100 has sm90, which is outside NVIDIA's support matrix" in caplog.text


def test_auto_takes_the_bundles_first_precision_on_the_cpu(
    gpu: Any, bundle: Path, add_graphs: Callable[..., None]
) -> None:
    add_graphs("fp16", first=True)
    with runtime.load(bundle) as pipe:
        assert pipe.precision == "fp16"


def test_every_reason_is_given_when_nothing_can_run(
    bundle: Path, build: Builder, add_graphs: Callable[..., None], gpu: Any
) -> None:
    gpu.cuda.devices = []
    add_graphs("bf16")
    with pytest.raises(BackendError) as caught:
        runtime.load(bundle, precision="bf16")
    message = caught.value.message
    assert message.startswith("no engine here can run toy: tensorrt, bf16: no engines are built in bf16; ")
    assert "onnxruntime, cuda, bf16: the installed onnxruntime has no CUDAExecutionProvider" in message
    assert "onnxruntime, cpu, bf16: ONNX Runtime's CPU provider has no bf16 operators" in message


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("tensorrt", {"provider": "cuda"}, "backend tensorrt has no option provider"),
        ("tensorrt", {"threads": 2}, "backend tensorrt has no option threads"),
        ("onnxruntime", {"cuda_graphs": True}, "backend onnxruntime has no option cuda_graphs"),
        ("onnxruntime", {"provider": "cpu", "device": 0}, "the CPU has no --device"),
        ("auto", {"provider": "rocm"}, "there is no provider called 'rocm'"),
        ("auto", {"device": -1}, "the device must be at least 0"),
        ("auto", {"threads": 0}, "threads must be at least 1"),
        ("auto", {"provider": "cpu", "cuda_graphs": False}, "onnxruntime, fp32: has no option cuda_graphs"),
    ],
)
def test_an_option_that_is_not_there_is_an_error(
    bundle: Path, gpu: Any, backend: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError) as caught:
        runtime.load(bundle, backend=backend, **options)
    assert message in caught.value.message


def test_an_option_rules_out_the_engines_that_do_not_have_it(
    bundle: Path, build: Builder, machine: Machine
) -> None:
    build()
    assert taken(bundle, machine, options=Options(threads=1)) == "onnxruntime, cpu, fp32"
    assert taken(bundle, machine, options=Options(cuda_graphs=False)) == "tensorrt, fp32"
    assert taken(bundle, machine, options=Options(device=1)) is None


def test_a_second_gpu(bundle: Path, build: Builder, gpu: Any) -> None:
    gpu.cuda.devices *= 2
    build()
    with runtime.load(bundle, device=1) as pipe:
        assert pipe.backend.name == "tensorrt"
    with pytest.raises(BackendError, match="there is no device 2, but 2 in all"):
        runtime.load(bundle, backend="tensorrt", device=2)


def test_the_choice_depends_on_speed_alone_among_those_that_can() -> None:
    ways = [
        Candidate("a", "fp32", Options(), 9, why_not=("it is not installed",)),
        Candidate("b", "fp32", Options(), 5, doubts=("nobody has tried",)),
        Candidate("c", "fp32", Options(), 1),
        Candidate("d", "fp32", Options(), 0),
    ]
    assert choose(ways, explicit=False) is ways[2]
    assert choose(ways, explicit=True) is ways[1]
    assert choose(ways[:2], explicit=False) is None


def test_a_new_engine_takes_part_by_its_file_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    class Faster:
        refused = staticmethod(lambda options: [])

        @staticmethod
        def candidates(*arguments: Any) -> list[Candidate]:
            return [Candidate("faster", "int8", Options(), 1000)]

    real = selection.backend_class
    monkeypatch.setattr(selection, "plugins", lambda package: ["faster", "onnxruntime"])
    monkeypatch.setattr(selection, "backend_class", lambda name: Faster if name == "faster" else real(name))
    assert taken(bundle, machine) == "faster, int8"


# OpenVINO, and what was measured

EPYC = Cpu("Toy EPYC", 4, ("AVX2", "AVX-512", "BF16"))
VERSIONS = {"openvino": "2026.4.1", "onnxruntime": "1.31.0"}


def with_openvino(*capabilities: str, **known: Any) -> Machine:
    """A machine without a GPU that has both engines of the CPU."""
    facts: dict[str, Any] = {
        "cpu": EPYC,
        "gpus": (),
        "cuda_problem": "no driver",
        "providers": CPU,
        "onnxruntime": Package("onnxruntime", VERSIONS["onnxruntime"], None),
        "openvino": Package("openvino", VERSIONS["openvino"], None),
        "openvino_capabilities": ("FP32", *capabilities),
        "engine_packages": {},
        "distributions": {},
    }
    return Machine(**(facts | known))


def limits_for(bundle: Path, *precisions: str) -> None:
    """States limits for precisions."""
    path = bundle / "bundle.json"
    content = json.loads(path.read_text())
    content["parity"] |= {each: {"image_max": 9} for each in precisions}
    path.write_text(json.dumps(content))


def note(bundle: Path, machine: Machine, backend: str, precision: str, ms: float, **more: Any) -> None:
    """Writes down a measurement of one image in one step, which met its limits unless told otherwise."""
    facts: dict[str, Any] = {
        "version": VERSIONS[backend],
        "threads": None,
        "mode": "latency" if backend == "openvino" else None,
        "steps": 1,
        "batch": 1,
        "passed": True,
    }
    record = Measured(backend, precision=precision, total_ms=ms, **(facts | more))
    assert write_measured(bundle, read_manifest(bundle, verify=False), machine, [record])


def ways(bundle: Path, machine: Machine, **asked: Any) -> list[str]:
    found = candidates(bundle, read_manifest(bundle, verify=False), machine, **asked)
    return [each.name for each in found if each.runs_on_cpu]


def reasons(bundle: Path, machine: Machine, name: str, **asked: Any) -> str:
    found = candidates(bundle, read_manifest(bundle, verify=False), machine, **asked)
    return next(each.reasons for each in found if each.name == name)


def test_unmeasured_float32_in_static_order_and_nothing_less(bundle: Path) -> None:
    """Float32 needs no proof; bf16 is there for those who name it."""
    machine = with_openvino("BF16")
    limits_for(bundle, "bf16")
    assert taken(bundle, machine) == "openvino, fp32"
    assert ways(bundle, machine) == ["openvino, fp32", "onnxruntime, cpu, fp32", "openvino, bf16"]
    assert "not measured yet: ddexport bench BUNDLE" in reasons(bundle, machine, "openvino, bf16")
    assert taken(bundle, machine, backend="openvino") == "openvino, fp32"
    assert taken(bundle, machine, backend="openvino", precision="bf16") == "openvino, bf16"


def test_openvino_without_graphs_it_reads(bundle: Path, add_graphs: Callable[..., None]) -> None:
    add_graphs("fp16", first=True)
    edit = json.loads((bundle / "bundle.json").read_text())
    edit["graphs"] = [graph for graph in edit["graphs"] if graph["precision"] == "fp16"]
    (bundle / "bundle.json").write_text(json.dumps(edit))
    machine = with_openvino()
    assert taken(bundle, machine) == "onnxruntime, cpu, fp16"
    assert reasons(bundle, machine, "openvino, fp32") == "the bundle has no graphs in fp32"


def test_a_gpu_goes_before_the_cpu_whatever_was_measured_there(
    bundle: Path, build: Builder, gpu: Any
) -> None:
    build()
    machine = Machine()
    note(bundle, machine, "onnxruntime", "fp32", 0.1, version=str(machine.onnxruntime.version))
    assert taken(bundle, machine) == "tensorrt, fp32"
    assert taken(bundle, with_providers(machine, CUDA), options=Options(threads=None, provider="cuda")) == (
        "onnxruntime, cuda, fp32"
    )


def test_the_fastest_that_was_measured_and_met_its_limits(
    bundle: Path, add_graphs: Callable[..., None]
) -> None:
    add_graphs("int8")
    limits_for(bundle, "bf16", "int8")
    machine = with_openvino("BF16", "INT8")
    note(bundle, machine, "onnxruntime", "fp32", 9.0)
    assert taken(bundle, machine) == "onnxruntime, cpu, fp32"  # before what was not measured
    note(bundle, machine, "openvino", "fp32", 8.0)
    assert taken(bundle, machine) == "openvino, fp32"
    note(bundle, machine, "openvino", "bf16", 5.0)
    assert taken(bundle, machine) == "openvino, bf16"
    note(bundle, machine, "openvino", "int8", 2.0, passed=False, why="3.1 % of tokens differ")
    assert taken(bundle, machine) == "openvino, bf16"
    assert reasons(bundle, machine, "openvino, int8") == "measured here: 3.1 % of tokens differ"
    assert ways(bundle, machine) == [
        "openvino, bf16",
        "openvino, fp32",
        "onnxruntime, cpu, fp32",
        "onnxruntime, cpu, int8",
        "openvino, int8",
    ]
    note(bundle, machine, "onnxruntime", "int8", 3.0)
    assert taken(bundle, machine) == "onnxruntime, cpu, int8"
    # A named precision keeps auto within it; what failed is taken only if nothing else can.
    assert taken(bundle, machine, precision="int8") == "onnxruntime, cpu, int8"
    assert taken(bundle, machine, precision="fp32") == "openvino, fp32"
    assert taken(bundle, machine, backend="openvino", precision="int8") == "openvino, int8"


def test_an_engine_that_failed_in_float32_is_out(bundle: Path) -> None:
    machine = with_openvino()
    note(bundle, machine, "openvino", "fp32", 1.0, passed=False)
    assert taken(bundle, machine) == "onnxruntime, cpu, fp32"
    assert reasons(bundle, machine, "openvino, fp32") == (
        "measured here: its outputs miss the bundle's limits"
    )


def test_a_precision_without_limits_is_never_taken_by_itself(bundle: Path) -> None:
    machine = with_openvino("BF16")
    note(bundle, machine, "openvino", "bf16", 0.1)
    assert taken(bundle, machine) == "openvino, fp32"
    assert reasons(bundle, machine, "openvino, bf16") == "the bundle states no limits for bf16"


def test_times_are_compared_under_one_setting(bundle: Path) -> None:
    """Not one image of the one with eight of the other, nor four threads with one."""
    machine = with_openvino()
    note(bundle, machine, "openvino", "fp32", 40.0, batch=8)
    note(bundle, machine, "onnxruntime", "fp32", 10.0)
    note(bundle, machine, "onnxruntime", "fp32", 60.0, batch=8)
    assert taken(bundle, machine) == "openvino, fp32"
    note(bundle, machine, "openvino", "fp32", 11.0)
    assert taken(bundle, machine) == "onnxruntime, cpu, fp32"
    note(bundle, machine, "openvino", "fp32", 30.0, threads=1)
    note(bundle, machine, "onnxruntime", "fp32", 31.0, threads=1)
    assert taken(bundle, machine) == "onnxruntime, cpu, fp32"
    assert taken(bundle, machine, options=Options(threads=4)) == "onnxruntime, cpu, fp32"
    assert taken(bundle, machine, options=Options(threads=1)) == "openvino, fp32"


def test_a_tie_is_decided_by_the_static_order(bundle: Path) -> None:
    machine = with_openvino()
    note(bundle, machine, "onnxruntime", "fp32", 7.0)
    note(bundle, machine, "openvino", "fp32", 7.0)
    assert taken(bundle, machine) == "openvino, fp32"


def test_a_named_precision_that_is_not_proven_is_taken_with_a_warning(
    bundle: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By `load` too, where only one engine could compute in it; unnamed it is left alone."""
    machine = with_openvino("BF16")
    limits_for(bundle, "bf16")
    found = candidates(bundle, read_manifest(bundle, verify=False), machine, precision="bf16")
    assert choose(found, explicit=False) is None
    chosen = choose(found, explicit=False, named=True)
    assert chosen is not None
    assert (chosen.name, chosen.reads, chosen.options.compute) == ("openvino, bf16", "fp32", "bf16")
    monkeypatch.setattr("ddexport.runtime.pipeline.Machine", lambda: machine)
    monkeypatch.setattr(
        "ddexport.runtime.backends.openvino.OpenVino.available", classmethod(lambda cls: "no matter")
    )
    with caplog.at_level(logging.WARNING), pytest.raises(BackendError, match="openvino cannot be used"):
        runtime.load(bundle, precision="bf16")
    assert "openvino, bf16: its parity on this CPU is not measured yet" in caplog.text


def test_a_precision_that_nobody_can_is_an_error_with_what_there_is(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for capabilities, precision, hint in (
        (["BF16"], "fp8", "It has: fp32. From these graphs engines can also compute in: bf16 (openvino)."),
        ([], "bf16", "It has: fp32. openvino, bf16: OpenVINO has no bf16 arithmetic on this CPU."),
    ):
        machine = with_openvino(*capabilities)
        monkeypatch.setattr("ddexport.runtime.pipeline.Machine", lambda machine=machine: machine)
        with pytest.raises(BundleError, match=f"no student in precision {precision}") as caught:
            runtime.load(bundle, precision=precision)
        assert caught.value.hint == hint


def test_options_of_openvino_rule_out_the_others(bundle: Path, build: Builder) -> None:
    build()
    machine = with_openvino()
    assert taken(bundle, machine, options=Options(mode="throughput")) == "openvino, fp32"
    assert taken(bundle, machine, options=Options(cache="somewhere")) == "openvino, fp32"
    assert taken(bundle, machine, options=Options(provider="cpu")) == "onnxruntime, cpu, fp32"
    with pytest.raises(BackendError, match="backend onnxruntime has no option mode"):
        candidates(
            bundle,
            read_manifest(bundle, verify=False),
            machine,
            backend="onnxruntime",
            options=Options(mode="latency"),
        )
    with pytest.raises(BackendError, match="there is no mode called 'fast'"):
        Options(mode="fast")


def test_why(bundle: Path) -> None:
    machine = with_openvino("BF16")
    limits_for(bundle, "bf16")

    def why() -> str:
        found = candidates(bundle, read_manifest(bundle, verify=False), machine)
        chosen = choose(found, explicit=False)
        assert chosen is not None
        return explain(chosen, found)

    assert why() == "the first that needs no proof; ddexport bench BUNDLE measures the others"
    note(bundle, machine, "openvino", "bf16", 5.0)
    assert why() == "the fastest that met the bundle's limits here: 5 ms"


def test_a_machine_can_be_made_up() -> None:
    gpu = Gpu(0, "Toy", (12, 0), 1)
    machine = Machine(gpus=(gpu,), onnxruntime=Package("onnxruntime", None, "missing"))
    assert machine.gpus[0].target == "sm120"
    assert machine.providers == ()
    with pytest.raises(TypeError, match="a machine has no wheels"):
        Machine(wheels=4)
