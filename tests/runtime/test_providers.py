"""ONNX Runtime's providers: what is asked for is used, or it is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from ddexport.runtime.backends import _providers
from ddexport.runtime.backends._providers import RECORD_NODES, BoundSession, check_used, provider_list
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.errors import BackendError
from ddexport.runtime.infer import command
from ddexport.runtime.machine import Machine
from ddexport.runtime.manifest import read_manifest
from ddexport.runtime.options import Options
from onnx import TensorProto, helper, numpy_helper

from ddexport import runtime

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


def graphs(bundle: Path, precision: str = "fp32") -> dict[str, Any]:
    manifest = read_manifest(bundle, verify=False)
    return {role: manifest.graph(role, precision) for role in ("student", "decoder")}


class Session:
    """A session that says where it runs its nodes."""

    def __init__(self, providers: list[str], nodes: dict[str, list[str]] | None = None) -> None:
        self.providers, self.nodes = providers, nodes
        self.fallback = True
        if nodes is not None:
            self.get_provider_graph_assignment_info = lambda: [
                SimpleNamespace(
                    ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=o) for o in ops]
                )
                for name, ops in nodes.items()
            ]

    def get_providers(self) -> list[str]:
        return self.providers

    def disable_fallback(self) -> None:
        self.fallback = False


def test_a_provider_that_was_not_loaded_is_an_error(shared_bundle: Path) -> None:
    """ONNX Runtime only logs that cuDNN is missing, and computes on the CPU."""
    student = graphs(shared_bundle)["student"]
    with pytest.raises(BackendError, match=f"could not load {CUDA} and fell back to {CPU}") as caught:
        check_used(Session([CPU]), "cuda", student)
    assert "--provider cpu" in caught.value.hint
    with pytest.raises(BackendError, match=f"could not load {TENSORRT} and fell back to {CUDA}, {CPU}"):
        check_used(Session([CUDA, CPU]), "tensorrt", student)
    check_used(Session([CPU]), "cpu", student)


def test_nodes_left_to_the_cpu_are_an_error(shared_bundle: Path) -> None:
    """All but the arithmetic of shapes, which ONNX Runtime keeps there itself."""
    student = graphs(shared_bundle)["student"]
    shapes = ["Shape", "Gather", "Concat", "Cast"]
    check_used(Session([CUDA, CPU], {CUDA: ["MatMul"], CPU: shapes}), "cuda", student)
    fallen = Session([CUDA, CPU], {CUDA: ["MatMul"], CPU: [*shapes, "Conv", "Softmax", "Conv"]})
    with pytest.raises(BackendError, match=r"leaves nodes of student\.onnx to the CPU: 2 Conv, 1 Softmax"):
        check_used(fallen, "cuda", student)
    check_used(Session([CUDA, CPU]), "cuda", student)  # an ONNX Runtime that does not tell


@pytest.fixture
def with_cuda(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An ONNX Runtime that says it has the CUDA provider, and then runs on the CPU; what it was asked for."""
    asked: list[dict[str, Any]] = []
    real = onnxruntime.InferenceSession

    def session(path: Path, options: Any, providers: list[Any]) -> Any:
        if providers != [CPU]:
            record = options.get_session_config_entry(RECORD_NODES)
            asked.append({"providers": providers, "record": record})
        return real(path, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])

    def preload() -> None:
        asked.append({"preloaded": True})
        print("what ONNX Runtime has to say")  # noqa: T201

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    return asked


def test_a_silent_fallback_stops_the_load(
    with_cuda: list[dict[str, Any]], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where `auto` has chosen the provider."""
    for arguments in ({"provider": "cuda"}, {}):
        with pytest.raises(BackendError, match="could not load CUDAExecutionProvider and fell back to CPU"):
            runtime.load(bundle, **arguments)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""  # where results go
    preloaded, asked = with_cuda[:2]
    assert preloaded == {"preloaded": True}
    assert asked["providers"][0] == (CUDA, {"device_id": "0", "use_tf32": "0"})
    assert asked["record"] == "1"


def test_real_nodes_on_the_cpu_are_seen(
    with_cuda: list[dict[str, Any]], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed ONNX Runtime's own report, where the provider is there and does not take the nodes."""
    monkeypatch.setitem(_providers.NAMES, "cuda", CPU)
    with pytest.raises(BackendError, match=r"leaves nodes of student\.onnx to the CPU: .*MatMul"):
        runtime.load(bundle, provider="cuda")


def test_images_through_bound_arrays(
    with_cuda: list[dict[str, Any]], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, with arrays of the CPU in its place: the images are the same at any batch size."""
    with runtime.load(bundle, "onnxruntime", provider="cpu", threads=1) as pipe:
        want = pipe([0, 1, 2], 2, num_images=4, output="numpy")
    monkeypatch.setattr("ddexport.runtime.backends.onnxruntime.check_used", lambda *arguments: None)
    real = BoundSession.__init__
    monkeypatch.setattr(
        BoundSession,
        "__init__",
        lambda self, session, graph, kind, device: real(self, session, graph, "cpu", device),
    )
    with runtime.load(bundle, "onnxruntime", provider="cuda", threads=1) as pipe:
        assert pipe.backend.provider == "cuda"
        for batch_size in (1, 5, 2, 12):
            have = pipe([0, 1, 2], 2, num_images=4, output="numpy", batch_size=batch_size)
            np.testing.assert_array_equal(have.steps[-1].tokens, want.steps[-1].tokens)
            assert abs(np.subtract(have.images, want.images, dtype=int)).max() <= 1


def test_a_teacher_on_a_device_gets_arrays_of_its_own(
    with_cuda: list[dict[str, Any]], shared_teacher_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its passes differ in more than the batch, so that no arrays can be kept for them: tokens stay equal."""
    with runtime.load(shared_teacher_bundle, "onnxruntime", provider="cpu", threads=1) as pipe:
        want = pipe([0, 1, 2], 3, num_images=2, output="numpy")
    monkeypatch.setattr("ddexport.runtime.backends.onnxruntime.check_used", lambda *arguments: None)
    real = BoundSession.__init__
    bound: list[str] = []

    def on_cpu(self: BoundSession, session: Any, graph: Any, kind: str, device: int) -> None:
        bound.append(graph.file)
        real(self, session, graph, "cpu", device)

    monkeypatch.setattr(BoundSession, "__init__", on_cpu)
    with runtime.load(shared_teacher_bundle, "onnxruntime", provider="cuda", threads=1) as pipe:
        have = pipe([0, 1, 2], 3, num_images=2, output="numpy")
    assert bound == ["student.onnx", "decoder.onnx"]
    for one, other in zip(have.steps, want.steps, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_bound_arrays_are_kept_for_a_few_batch_sizes(shared_bundle: Path) -> None:
    """And the results are the caller's, not views of them."""
    decoder = graphs(shared_bundle)["decoder"]
    session = onnxruntime.InferenceSession(shared_bundle / decoder.file, providers=[CPU])
    bound = BoundSession(session, decoder, "cpu", 0)
    given = np.random.default_rng(0).standard_normal((3, 6, 4)).astype(np.float32)
    first = bound.run({"sequence": given})["image"]
    kept = first.copy()
    slot = bound._slots[3]
    bound.run({"sequence": given[::-1]})
    assert bound._slots[3] is slot
    np.testing.assert_array_equal(first, kept)
    for batch in range(1, 9):
        bound.run({"sequence": np.zeros((batch, 6, 4), np.float32)})
    assert list(bound._slots) == [5, 6, 7, 8]


def test_a_failing_run_does_not_start_again_on_the_cpu(shared_bundle: Path) -> None:
    with OnnxRuntime(shared_bundle, graphs(shared_bundle), Options(threads=1)) as backend:
        assert isinstance(backend, OnnxRuntime)
        assert [session._enable_fallback for session in backend._sessions.values()] == [False, False]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_says_how_to_get_it(bundle: Path, provider: str) -> None:
    """The two packages share a module, so that the other one must go first."""
    machine = Machine(gpus=(), cuda_problem="no GPU can be used: no driver", providers=(CPU,))
    with pytest.raises(BackendError) as caught:
        OnnxRuntime(bundle, graphs(bundle), Options(provider=provider), machine).open()
    assert f"has no {_providers.NAMES[provider]}; no GPU can be used" in caught.value.message
    assert caught.value.hint == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    )


def test_what_a_provider_cannot_do_goes_to_the_next() -> None:
    assert provider_list("cpu", 0) == [CPU]
    assert [each if isinstance(each, str) else each[0] for each in provider_list("tensorrt", 1)] == [
        TENSORRT,
        CUDA,
        CPU,
    ]
    assert all(each[1]["device_id"] == "1" for each in provider_list("tensorrt", 1)[:2])


def test_bf16_on_the_cpu_is_refused_before_anything_is_loaded(
    bundle: Path, add_graphs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the class, by `load` and by the command line, with what can run it."""
    add_graphs("bf16")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(BackendError, match=r"onnxruntime cannot run bf16 here: .*Sigmoid") as caught:
        OnnxRuntime(bundle, graphs(bundle, "bf16")).open()
    assert "ddexport trt" in caught.value.hint
    options = ["--precision", "bf16", "--backend", "onnxruntime", "--provider", "cpu"]
    result = CliRunner().invoke(command, [str(bundle), *options])
    assert result.exit_code == 1
    assert "ONNX Runtime's CPU provider has no bf16 operators" in result.stderr
    assert "TensorRT engine" in result.stderr


def test_fp16_runs_on_the_cpu(
    bundle: Path, add_graphs: Callable[..., None], replace_file: Callable[[str, bytes], None]
) -> None:
    """A graph that computes in half precision, with float32 at its borders, as all have."""
    add_graphs("fp16")
    model = onnx.load(bundle / "decoder_fp16.onnx")
    for value in model.graph.initializer:
        if value.name == "D":
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value).astype(np.float16), "D"))
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.input[0], node.output[0] = "half", "half_values"
    nodes = list(model.graph.node)
    cast = [
        helper.make_node("Cast", ["row"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half_values"], ["values"], to=TensorProto.FLOAT),
    ]
    del model.graph.node[:]
    model.graph.node.extend([nodes[0], cast[0], nodes[1], cast[1], *nodes[2:]])
    replace_file("decoder_fp16.onnx", model.SerializeToString())
    with runtime.load(bundle) as pipe:
        want = pipe(1, output="numpy").images
    with runtime.load(bundle, precision="fp16", provider="cpu") as pipe:
        have = pipe(1, output="numpy").images
    difference = abs(np.subtract(have, want, dtype=int)).max()
    assert 0 < difference <= 2


def test_the_command_line_passes_provider_and_device_on(bundle: Path) -> None:
    result = CliRunner().invoke(command, [str(bundle), "--provider", "cpu", "--device", "1"])
    assert "the CPU has no --device" in result.stderr
    result = CliRunner().invoke(command, [str(bundle), "--provider", "openvino"])
    assert result.exit_code == 2
