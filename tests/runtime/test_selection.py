"""What `--backend auto` takes, why not something else, and options that an engine does not have."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import runtime
from runtime import selection
from runtime.errors import BackendError
from runtime.machine import Gpu, Machine, Package
from runtime.manifest import read_manifest
from runtime.options import Options
from runtime.selection import Candidate, candidates, choose

Builder = Callable[..., Path]
CPU = ("CPUExecutionProvider",)
CUDA = ("CUDAExecutionProvider", "CPUExecutionProvider")


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


def test_a_machine_can_be_made_up() -> None:
    gpu = Gpu(0, "Toy", (12, 0), 1)
    machine = Machine(gpus=(gpu,), onnxruntime=Package("onnxruntime", None, "missing"))
    assert machine.gpus[0].target == "sm120"
    assert machine.providers == ()
    with pytest.raises(TypeError, match="a machine has no wheels"):
        Machine(wheels=4)
