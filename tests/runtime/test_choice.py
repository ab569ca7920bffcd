"""What `auto` takes and why: the order of preference, saved benchmarks, and nothing by itself that draws
something else than the bundle's first precision."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ddexport import runtime
from ddexport.runtime import backends
from ddexport.runtime.backends import Configuration, _saved, checked_device, choose, configurations
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BackendError
from ddexport.runtime.machine import Cpu, gpu_fault
from ddexport.runtime.registry import load_plugin, plugins
from tests.runtime import toy

GPU_ENGINE = Configuration("tensorrt", "cuda:0", "fp16", "fp16", backends.ENGINE, folder="rtx")
ON_CUDA = Configuration("onnxruntime", "cuda:0", "fp32", "fp32", backends.CUDA)
ON_CPU = Configuration("onnxruntime", "cpu", "fp32", "fp32", backends.CPU)
OPENVINO = Configuration("openvino", "cpu", "fp32", "fp32", backends.OTHER)
HOPPER = Configuration("tensorrt", "cuda:0", "fp32", "fp32", backends.UNSUPPORTED, folder="old")
EVERYTHING = [HOPPER, OPENVINO, ON_CPU, ON_CUDA, GPU_ENGINE]


@pytest.fixture
def there_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Configuration]], None]:
    """Says what the engines can do here; they are plug-ins, known by their files alone."""

    def say(made_up: list[Configuration]) -> None:
        def engine(name: str) -> Any:
            mine = [configuration for configuration in made_up if configuration.backend == name]
            return SimpleNamespace(configurations=lambda root, manifest, precision, device: mine)

        monkeypatch.setattr(backends, "plugins", lambda package: sorted({c.backend for c in made_up}))
        monkeypatch.setattr(backends, "backend_class", engine)

    return say


def save(root: Path, **milliseconds: float) -> Path:
    return _saved.save(root, read_manifest(root, verify=False), milliseconds)


def taken(root: Path, *asked: Any) -> Configuration:
    return choose(root, read_manifest(root, verify=False), *asked)


def test_the_order_of_preference(bundle: Path, there_is: Any) -> None:
    """Each is taken when all before it cannot run; where none can, all reasons are given."""
    save(bundle, openvino=2.0, onnxruntime=3.0)
    order = [GPU_ENGINE, ON_CUDA, replace(OPENVINO, rank=backends.SAVED), ON_CPU, HOPPER]
    broken: list[str] = []
    for wanted in order:
        there_is([replace(c, obstacle="broken" if str(c) in broken else "") for c in EVERYTHING])
        assert replace(taken(bundle), note="") == wanted
        broken.append(str(wanted))
    (bundle / _saved.FILE).unlink()
    there_is(EVERYTHING)
    assert configurations(bundle, read_manifest(bundle)) == [GPU_ENGINE, ON_CUDA, ON_CPU, OPENVINO, HOPPER]
    there_is([replace(c, obstacle=f"reason {number}") for number, c in enumerate(EVERYTHING)])
    with pytest.raises(BackendError) as caught:
        taken(bundle, "auto", "fp32")
    assert "tensorrt, cuda:0, fp16, rtx: reason 4" in caught.value.message
    assert all(f"{c}: reason {number}" in caught.value.message for number, c in enumerate(EVERYTHING))
    assert "fp32" in caught.value.hint


def test_a_benchmark_is_followed_on_this_cpu_with_this_engine_and_these_graphs_alone(
    bundle: Path, there_is: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer time takes the place of the older one, and the others stay."""
    there_is([OPENVINO, ON_CPU])
    assert taken(bundle) == ON_CPU
    save(bundle, openvino=2.0, onnxruntime=3.0)
    assert (taken(bundle).backend, taken(bundle).rank) == ("openvino", backends.SAVED)
    assert "2 ms" in taken(bundle).note
    save(bundle, onnxruntime=1.5)
    assert (taken(bundle).backend, taken(bundle).rank) == ("onnxruntime", backends.SAVED)
    save(bundle, onnxruntime=9.0)
    assert taken(bundle).backend == "openvino"
    assert (bundle / _saved.FILE).read_text().count("milliseconds") == 2
    cpu = _saved.cpu()
    others = [("cpu", lambda other=other: other) for other in (Cpu("Toy", cpu.cores), Cpu(cpu.name, 0))]
    for name, found in [*others, ("version_of", lambda name: "2099.1")]:
        with monkeypatch.context() as patch:
            patch.setattr(_saved, name, found)
            assert taken(bundle) == ON_CPU
    assert taken(bundle).backend == "openvino"
    toy.put_file(bundle, "student.onnx", (bundle / "student.onnx").read_bytes() + b"\0")
    assert taken(bundle) == ON_CPU


def test_the_first_precision_unless_another_is_named(bundle: Path) -> None:
    """Also where a benchmark was saved, which says nothing of another one."""
    toy.add_precision(bundle, "int8")
    save(bundle, openvino=0.1)
    for asked, wanted in ((None, "openvino"), ("fp32", "openvino"), ("int8", "openvino")):
        chosen = taken(bundle, "auto", asked)
        assert (chosen.backend, chosen.precision, chosen.graphs) == (wanted, *[asked or "fp32"] * 2)
    toy.add_precision(bundle, "fp16", first=True)
    manifest = read_manifest(bundle)
    assert manifest.precisions == ("fp16", "fp32", "int8")
    assert {c.precision for c in configurations(bundle, manifest) if c.backend != "tensorrt"} == {"fp16"}
    for asked, precision in ((None, "fp16"), ("int8", "int8")):
        with runtime.load(bundle, precision=asked) as pipe:
            assert pipe.precision == precision


def test_onnxruntime_computes_int8_on_the_cpu_where_nothing_else_does(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a bundle of int8 alone; a benchmark and a user may take it first."""
    toy.add_precision(bundle, "int8", first=True)
    for asked in (("auto",), ("auto", "int8")):
        assert taken(bundle, *asked).backend == "openvino"
    assert taken(bundle, "auto", "fp32").backend == "onnxruntime"
    save(bundle, onnxruntime=1.0)
    assert (taken(bundle).backend, taken(bundle).rank) == ("onnxruntime", backends.SAVED)
    (bundle / _saved.FILE).unlink()
    monkeypatch.setattr("ddexport.runtime.backends.openvino.import_fault", lambda *names: "not installed")
    assert taken(bundle).backend == "onnxruntime" and "int8 decoder" in taken(bundle).note


def test_a_damaged_benchmark_is_left_aside(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a word, and is written anew."""
    (bundle / _saved.FILE).write_bytes(b'[{"cpu": 1}]')
    assert taken(bundle).backend == "onnxruntime" and "bench.json" in caplog.text
    save(bundle, openvino=1.0)
    assert taken(bundle).backend == "openvino"


def test_devices(shared_bundle: Path) -> None:
    """On a machine without a GPU a line says what to install; the CPU is not taken in its place."""
    names = {None: None, "cpu": "cpu", "cuda": "cuda:0", "cuda:0": "cuda:0", "cuda:12": "cuda:12"}
    assert {name: checked_device(name) for name in names} == names
    for name in ("rocm", "cpu:0", "cuda:x", "cuda:-1", "gpu"):
        with pytest.raises(BackendError, match=name):
            runtime.load(shared_bundle, device=name)
    assert (ON_CPU.gpu, replace(ON_CUDA, device="cuda:3").gpu) == (0, 3)
    for backend, device in (("openvino", "cuda"), ("tensorrt", "cpu")):
        with pytest.raises(BackendError, match=f"{backend} does not run on {device}"):
            runtime.load(shared_bundle, backend, device=device)
    if gpu_fault(0):
        for device, name in (("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
            with pytest.raises(BackendError, match=f"onnxruntime, {name}, fp32: ") as caught:
                runtime.load(shared_bundle, device=device)
            assert 'pip install "ddexport[gpu]"' in caught.value.message
            assert "openvino" not in caught.value.message


def test_files_without_underscore_are_the_plugins_and_are_imported_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_plugins").mkdir()
    texts = {"__init__": "", "_base": "", "second": "raise RuntimeError", "first": "VALUE = 1"}
    for name, text in texts.items():
        (tmp_path / "toy_plugins" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("toy_plugins", "toy_plugins.first"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert plugins("toy_plugins") == ["first", "second"]
    assert load_plugin("toy_plugins", "first").VALUE == 1  # importing `second` would raise
    for name in ("frist", "_base", "../first", "os", ""):
        with pytest.raises(BackendError) as caught:
            load_plugin("toy_plugins", name, kind="engine", error=BackendError)
        assert "first, second" in caught.value.hint
        assert name != "frist" or "Did you mean first?" in caught.value.hint
