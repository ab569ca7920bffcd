"""An engine is checked on the way in and on the way out, opens a graph once, and lets go of everything."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from ddexport import runtime
from ddexport.runtime.backends import Arrays, Backend, Configuration, open_backend
from ddexport.runtime.backends import onnxruntime as module
from ddexport.runtime.backends.onnxruntime import DeviceCache, cuda_options, run_bound
from ddexport.runtime.bundle import Graph, read_manifest
from ddexport.runtime.errors import BackendError
from tests.runtime import toy

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ON_CPU = Configuration("onnxruntime", "cpu", "fp32", "fp32", 0)


class Echo(Backend):
    """Computes nothing: returns what the test has put into `answer`."""

    name = "echo"
    answer: dict[str, Any]
    fails: str = ""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.opened, self.closed = list[str](), list[str]()

    @classmethod
    def configurations(cls, *arguments: Any) -> list[Configuration]:
        return []

    def _open(self, graph: Graph, closing: ExitStack) -> str:
        time.sleep(0.05)
        self.opened.append(graph.file)
        closing.callback(self._let_go, graph.file)
        if self.fails == f"open {graph.file}":
            raise BackendError(self.fails)
        return graph.file

    def _let_go(self, file: str) -> None:
        self.closed.append(file)
        if self.fails == f"close {file}":
            raise RuntimeError(self.fails)

    def _run(self, session: Any, feeds: Arrays, names: Sequence[str]) -> Arrays:
        return {name: self.answer[name] for name in self.answer if name in names or name == "more"}


def feeds(batch: int = 2) -> dict[str, Any]:
    numbers = np.zeros(batch, np.int64)
    return {"latents": np.zeros((batch, 6, 4), np.float32), "label": numbers, "known": numbers}


@pytest.fixture
def graphs(shared_bundle: Path) -> dict[str, Graph]:
    return {graph.role: graph for graph in read_manifest(shared_bundle).graphs}


@pytest.fixture
def echo(shared_bundle: Path) -> Echo:
    backend = Echo(shared_bundle, read_manifest(shared_bundle), ON_CPU)
    logits, tokens = np.zeros((2, 2, 5), np.float32), np.zeros((2, 2), np.int64)
    backend.answer = {"sequence": np.zeros((2, 6, 4), np.float32), "tokens": tokens, "logits": logits}
    return backend


def test_inputs_and_outputs_are_checked(echo: Echo, graphs: Any) -> None:
    """Inputs before anything is opened: their names, types, shapes, and one batch for all."""
    right = dict(echo.answer)
    assert echo.run(graphs["student"], feeds()).keys() == right.keys()
    echo.opened.clear()
    for wrong in (
        {"extra": np.zeros(2)},
        {"latents": np.zeros((2, 6, 4))},
        {"latents": np.zeros((2, 5, 4), np.float32)},
        {"known": np.zeros(3, np.int64)},
    ):
        with pytest.raises(BackendError, match=f"inputs of student.*{next(iter(wrong))}"):
            echo.run(graphs["student"], feeds() | wrong)
    assert not echo.opened
    for wrong in (
        {"logits": np.zeros((2, 2, 5), np.float16)},
        {"tokens": np.zeros((3, 2), np.int64)},
        {"more": np.zeros(1)},
    ):
        echo.answer = right | wrong
        with pytest.raises(BackendError, match=f"outputs of student.*{next(iter(wrong))}"):
            echo.run(graphs["student"], feeds())


def test_it_opens_once_and_closes_everything_even_if_one_part_fails(echo: Echo, graphs: Any) -> None:
    echo.fails = "open student.onnx"
    for _ in range(2):  # it is tried again, and nothing is left behind
        with pytest.raises(BackendError, match=echo.fails):
            echo.open(graphs["student"])
    assert echo.closed == echo.opened == ["student.onnx"] * 2
    echo.opened.clear(), echo.closed.clear()
    echo.fails = "close decoder.onnx"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: echo.run(graphs["student"], feeds()), range(4)))
    assert echo.opened == ["student.onnx"]
    echo.open(graphs["decoder"])
    with pytest.raises(RuntimeError, match=echo.fails):
        echo.close()
    assert echo.closed == ["decoder.onnx", "student.onnx"]
    echo.close()
    with pytest.raises(BackendError, match="closed"):
        echo.run(graphs["student"], feeds())
    assert len(echo.opened) == len(echo.closed) == 2


# ONNX Runtime


def weights_outside() -> onnx.ModelProto:
    """They lie there, but no graph may read anything outside of its folder."""
    model = toy.student()
    weight = next(value for value in model.graph.initializer if value.name == "W")
    onnx.external_data_helper.set_external_data(weight, "../outside.data")
    weight.ClearField("raw_data")
    return model


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_that_is_not_the_one_of_the_contract(
    bundle: Path, backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its hash is right; a line says what is wrong with it."""
    (bundle.parent / "outside.data").write_bytes(bytes(80))
    for content, named in (
        (b"no graph", "load student.onnx"),
        (weights_outside().SerializeToString(), "load student.onnx"),
        (toy.student(" label", " klass").SerializeToString(), "inputs of student.onnx"),
        (toy.student("batch", "2").SerializeToString(), "inputs of student.onnx"),
        (toy.student(", float[batch,2,5] logits)", ")").SerializeToString(), "outputs of student.onnx"),
    ):
        toy.put_file(bundle, "student.onnx", content)
        with pytest.raises(BackendError) as caught:
            runtime.load(bundle, backend)
        assert named in caught.value.message and "\n" not in caught.value.message
    assert capfd.readouterr().err == ""  # OpenVINO has not tried other formats on it


def test_what_is_asked_for_and_a_failure_of_the_engine(shared_bundle: Path, graphs: Any) -> None:
    """A label that the table of the graph lacks: the engine refuses it while it runs, in a line."""
    backend = open_backend(shared_bundle, read_manifest(shared_bundle), ON_CPU, 1)
    for names in (("tokens",), ("sequence", "tokens"), ("sequence", "tokens", "logits")):
        assert tuple(backend.run(graphs["student"], feeds(), names)) == names
    with pytest.raises(BackendError, match=r"student\.onnx") as caught:
        backend.run(graphs["student"], feeds() | {"label": np.array([0, 99])})
    assert "\n" not in caught.value.message
    assert backend.open(graphs["student"])._enable_fallback is False  # nor does it start again elsewhere
    with pytest.raises(BackendError, match="threads"):
        runtime.load(shared_bundle, threads=0)


def test_what_onnxruntime_cannot_do_is_known_before_anything_is_loaded(
    bundle: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.add_precision(bundle, "bf16")
    with pytest.raises(BackendError, match="no bf16 operators"):
        runtime.load(bundle, "onnxruntime", precision="bf16")
    with pytest.raises(BackendError, match="no graphs in fp16") as caught:
        runtime.load(bundle, precision="fp16")
    assert "fp32, bf16" in caught.value.hint
    monkeypatch.setattr(module, "version_of", lambda name: "1.31")
    with pytest.raises(BackendError, match="pip uninstall -y onnxruntime"):
        runtime.load(bundle, "onnxruntime")
    assert opened == []


# On a GPU: what is asked for is used, or it is an error


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An ONNX Runtime that says it has the CUDA provider, and then runs on the CPU; what it was asked for."""
    asked: list[dict[str, Any]] = []
    real = onnxruntime.InferenceSession

    def session(path: Path, options: Any, providers: list[Any]) -> Any:
        if providers != [CPU]:
            record = options.get_session_config_entry(module.RECORD_NODES)
            asked.append({"providers": providers, "record": record})
        return real(path, options, providers=[CPU])

    def preload() -> None:
        asked.append({"preloaded": True})
        print("what ONNX Runtime has to say")  # noqa: T201

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(module, "gpu_fault", lambda index: "" if index == 0 else "there is no such GPU")
    return asked


def test_a_silent_fallback_stops_the_load(
    with_cuda: list[dict[str, Any]], bundle: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `auto` has chosen the GPU; and so does the installed ONNX Runtime's own report, where the
    provider is there and does not take the nodes."""
    for device in ("cuda", None):
        with pytest.raises(BackendError, match=f"{CUDA}.*{CPU}"):
            runtime.load(bundle, device=device)
    with pytest.raises(BackendError, match="no such GPU"):
        runtime.load(bundle, device="cuda:1")
    assert capsys.readouterr().out == ""  # where results go
    options = (CUDA, {"device_id": "0", "use_tf32": "0"})
    assert with_cuda[:2] == [{"preloaded": True}, {"providers": [options, CPU], "record": "1"}]
    monkeypatch.setitem(module.PROVIDERS, "cuda", CPU)
    with pytest.raises(BackendError, match=r"nodes of student\.onnx to the CPU: .*MatMul"):
        runtime.load(bundle, device="cuda")


@pytest.mark.parametrize(
    ("role", "precision", "tf32"),
    [
        ("student", "fp32", "0"), ("student", "fp16", "0"), ("teacher", "fp16", "0"),
        ("decoder", "fp32", "0"), ("decoder", "fp16", "1"), ("decoder_small", "bf16", "1"),
    ],
)  # fmt: skip
def test_half_convolutions_may_use_tensor_cores(role: str, precision: str, tf32: str) -> None:
    """ONNX Runtime forbids them to all convolutions without TF32, and then a half decoder takes longer than
    a float32 one: 24.9 ms in place of 7.0 for var-d16 on an H200. Nothing else gains by TF32, and loses
    digits."""
    graph = Graph(role=role, precision=precision, file="x.onnx", files=())
    assert cuda_options(graph, 1) == {"device_id": "1", "use_tf32": tf32}


def copy_rows(target: int, pitch: int, source: int, other: int, width: int, rows: int) -> None:
    for row in range(rows):
        ctypes.memmove(target + row * pitch, source + row * other, width)


def test_a_pipeline_keeps_its_teachers_cache_on_the_device(
    with_cuda: list[dict[str, Any]], shared_teacher_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a GPU runs, with arrays of the CPU in its place; only the logits come to the host. The teacher
    starts at once, behind a student's tokens, and draws everything."""

    def drawn(device: str) -> list[Any]:
        with runtime.load(shared_teacher_bundle, "onnxruntime", 1, device=device) as pipe:
            return [pipe([0, 1, 2], steps, num_images=2, output="numpy") for steps in (4, 3, "teacher")]

    bound: list[Sequence[str]] = []

    def on_cpu(session: Any, feeds: Any, names: Sequence[str], kind: str, device: int) -> Any:
        bound.append((kind, device, *names))
        results = run_bound(session, feeds, names, "cpu", device)
        assert [name for name, value in results.items() if isinstance(value, np.ndarray)] == ["logits"]
        return results

    want = drawn("cpu")
    gpu = SimpleNamespace(index=0, copy_rows=copy_rows)
    monkeypatch.setattr("ddexport.runtime.backends._cuda.CudaDevice", lambda index: gpu)
    monkeypatch.setattr(module, "_check_on_gpu", lambda *arguments: None)
    monkeypatch.setattr(module, "run_bound", on_cpu)
    monkeypatch.setattr(
        module, "DeviceCache", lambda t, n, c, kind, i, copy: DeviceCache(t, n, c, "cpu", i, copy)
    )
    for one, other in zip(drawn("cuda"), want, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        for step, its in zip(one.steps, other.steps, strict=True):
            np.testing.assert_array_equal(step.tokens, its.tokens)
    assert bound == [("cuda", 0, "logits", "new_key_0", "new_value_0")] * (3 + 1 + 4)
