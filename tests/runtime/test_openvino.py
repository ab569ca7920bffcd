"""OpenVINO computes what ONNX Runtime does, in the precision asked for, and compiles each graph once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from ddexport import runtime
from ddexport.runtime.backends import Configuration
from ddexport.runtime.backends import openvino as module
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import Graph, read_manifest
from ddexport.runtime.errors import BackendError
from ddexport.runtime.labels import read_labels
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.pipeline import Pipeline

openvino = pytest.importorskip("openvino")
OpenVino, capabilities = module.OpenVino, module.capabilities

HAS_BF16 = "BF16" in capabilities()
BATCHES = (1, 2, 3, 17)
CLOSE = 1e-5


def engine(root: Path, kind: Any = OpenVino, precision: str = "fp32", graphs: str = "fp32") -> Any:
    chosen = Configuration(kind.name, "cpu", precision, graphs, 0)
    return kind(root, read_manifest(root, verify=False), chosen, 1)


def feeds(root: Path, graph: Graph, batch: int, seed: int = 0) -> dict[str, Any]:
    """Inputs for a graph: noise, mixed classes, mixed steps."""
    manifest = read_manifest(root, verify=False)
    noise = gaussian_noise(seed, range(batch), manifest.sequence.length, manifest.sequence.width)
    if graph.role == "decoder":
        return {"sequence": noise}
    label, known = np.arange(batch) % manifest.classes, np.arange(batch) % (manifest.sequence.split + 1)
    return {"latents": noise, "label": label, "known": known}


def assert_close(got: Any, want: Any, within: float = CLOSE) -> None:
    assert set(got) == set(want)
    for name, array in got.items():
        np.testing.assert_allclose(array, want[name], rtol=0, atol=within, err_msg=name)


@pytest.fixture(scope="module")
def opened_model(shared_bundle: Path) -> Iterator[OpenVino]:
    backend = engine(shared_bundle)
    yield backend
    backend.close()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every model that is compiled from now on: its name and the settings."""
    made: list[tuple[str, dict[str, Any]]] = []
    original = openvino.Core.compile_model

    def compile_model(self: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        made.append((model.outputs[0].get_any_name(), dict(settings)))
        return original(self, model, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    return made


@pytest.mark.parametrize("role", ["student", "decoder"])
def test_float32_is_that_of_onnxruntime_in_every_batch(
    opened_model: OpenVino, shared_bundle: Path, role: str
) -> None:
    """Rows do not depend on their place, and a later run does not change an earlier result."""
    graph, reference = opened_model.manifest.graph(role), engine(shared_bundle, OnnxRuntime)
    results = [(batch, opened_model.run(graph, feeds(shared_bundle, graph, batch))) for batch in BATCHES]
    for batch, outputs in results:
        assert_close(outputs, reference.run(graph, feeds(shared_bundle, graph, batch)))
    order = np.random.default_rng(5).permutation(17)
    for rows in (order, np.full(17, 3)):
        given = {name: array[rows] for name, array in feeds(shared_bundle, graph, 17).items()}
        assert_close(opened_model.run(graph, given), {n: array[rows] for n, array in results[-1][1].items()})


def test_inputs_may_be_read_only_views(opened_model: OpenVino, shared_bundle: Path) -> None:
    """They are shared with the engine where that can be, and copied where it cannot."""
    graph = opened_model.manifest.graph("decoder")
    view = feeds(shared_bundle, graph, 6)["sequence"][::2]
    view.flags.writeable = False
    wanted = engine(shared_bundle, OnnxRuntime).run(graph, {"sequence": view})
    assert_close(opened_model.run(graph, {"sequence": view}), wanted)


def test_several_threads_may_run_it(opened_model: OpenVino, shared_bundle: Path) -> None:
    """With other batch sizes at once."""
    graph = opened_model.manifest.graph("decoder")
    given = {batch: feeds(shared_bundle, graph, batch, seed=batch) for batch in (1, 2, 3, 4)}
    alone = {batch: opened_model.run(graph, arrays) for batch, arrays in given.items()}
    results: dict[int, Any] = {}

    def work(batch: int) -> None:
        for _ in range(5):
            results[batch] = opened_model.run(graph, given[batch])

    threads = [threading.Thread(target=work, args=(batch,)) for batch in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, outputs in alone.items():
        assert_close(results[batch], outputs)


def test_requests_of_any_size_in_turn_compile_each_graph_once(shared_bundle: Path, compiled: Any) -> None:
    with runtime.load(shared_bundle, "openvino", threads=1) as pipe:
        for _ in range(2):
            for count in (1, 2, 3):
                pipe(0, 2, num_images=count)
        pipe(0, num_images=5, batch_size=3)
    assert [name for name, _ in compiled] == ["sequence", "image"]
    assert compiled[0][1]["INFERENCE_NUM_THREADS"] == 1


# Precision


def test_float32_is_float32(opened_model: OpenVino, shared_bundle: Path) -> None:
    """OpenVINO takes bf16 by itself where the CPU has it. A bf16 product is off by some 1e-3; float32 agrees
    with float64 to 1e-6."""
    graph = opened_model.manifest.graph("decoder")
    weights = {
        v.name: onnx.numpy_helper.to_array(v) for v in onnx.load(shared_bundle / graph.file).graph.initializer
    }
    given = feeds(shared_bundle, graph, 4)
    exact = 1 / (1 + np.exp(-(given["sequence"].reshape(4, -1).astype(np.float64) @ weights["D"])))
    assert abs(opened_model.run(graph, given)["image"].reshape(4, -1) - exact).max() < 2e-6
    if HAS_BF16:  # else the bound above would prove nothing
        image = engine(shared_bundle, precision="bf16").run(graph, given)["image"].reshape(4, -1)
        assert 1e-4 < abs(image - exact).max() < 5e-2


def test_what_it_can_compute_in(bundle: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precisions come from the float32 graphs, which the CPU must be capable of; int8 from its own."""
    toy.add_precision(bundle, "fp8")
    monkeypatch.setattr(module, "capabilities", lambda: ("FP32", "BF16"))

    def configured(precision: str | None) -> Configuration:
        (chosen,) = OpenVino.configurations(bundle, read_manifest(bundle), precision, None)
        return chosen

    for precision, graphs, obstacle in (
        (None, "fp32", ""),
        ("bf16", "fp32", ""),
        ("fp16", "fp32", "OpenVINO has no fp16 arithmetic on this CPU"),
        ("int8", "int8", "the bundle has no graphs in int8"),
        ("fp8", "fp8", "it computes in fp32, bf16, fp16, int8"),
    ):
        chosen = configured(precision)
        assert (chosen.precision, chosen.graphs) == (precision or "fp32", graphs)
        assert chosen.obstacle == obstacle
    toy.add_precision(bundle, "int8")
    assert configured("int8").obstacle == "OpenVINO has no int8 arithmetic on this CPU"
    assert OpenVino.configurations(bundle, read_manifest(bundle), None, "cuda:0") == []


def test_an_openvino_without_its_part_for_cpus_can_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: str) -> Any:
        raise RuntimeError("Device with CPU name is not registered")

    monkeypatch.setattr(openvino.Core, "get_property", fail)
    capabilities.cache_clear()
    assert capabilities() == ()
    capabilities.cache_clear()


@pytest.fixture
def int8_bundle(teacher_bundle: Path, toy: Any) -> Path:
    """The toy with a teacher in int8 too: the two sides of the decoder's product are quantised."""
    toy.add_precision(teacher_bundle, "int8")
    model = onnx.load(teacher_bundle / "decoder.onnx")
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    place = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    for name, value in {"s": np.float32(0.04), "z": np.int8(0)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    made = [helper.make_node("MatMul", [f"{side}_d" for side in node.input], node.output)]
    for side in node.input:
        made.insert(0, helper.make_node("DequantizeLinear", [f"{side}_q", "s", "z"], [f"{side}_d"]))
        made.insert(0, helper.make_node("QuantizeLinear", [side, "s", "z"], [f"{side}_q"]))
    for offset, one in enumerate(made):
        model.graph.node.insert(place + offset, one)
    toy.put_file(teacher_bundle, "decoder_int8.onnx", model.SerializeToString())
    return teacher_bundle


def test_int8_does_not_depend_on_what_was_opened_before(int8_bundle: Path, compiled: Any) -> None:
    """Nor on the teacher, which has no int8 graph: it runs in float32, in ONNX Runtime. Every graph is
    compiled for the precision of the pipeline."""
    manifest, drawn = read_manifest(int8_bundle), []
    labels = read_labels(int8_bundle / "labels.json", 3)
    for order in itertools.permutations(["decoder", "student", "teacher"]):
        with Pipeline(int8_bundle, manifest, labels, engine(int8_bundle, OpenVino, "int8", "int8")) as pipe:
            assert isinstance(pipe.teacher_backend, OnnxRuntime)
            assert pipe.teacher_backend.configuration.precision == "fp32"
            for role in order:
                chosen = pipe.teacher_backend if role == "teacher" else pipe.backend
                chosen.open(manifest.graph(role, chosen.configuration.graphs))
            drawn.append([pipe([0, 1, 2], steps, output="numpy").images for steps in (1, 2, 3, "teacher")])
    for images in drawn[1:]:
        np.testing.assert_array_equal(images, drawn[0])
    assert {hints["INFERENCE_PRECISION_HINT"] for _, hints in compiled} == {"bf16" if HAS_BF16 else "f32"}


def test_int8_reads_the_int8_graphs(int8_bundle: Path) -> None:
    """And rounds as they say: to a step of the quantiser like ONNX Runtime, whatever computes the rest. What
    has no int8 graph is float32, and nothing else is."""
    images = {}
    for name, precision in (("openvino", "int8"), ("onnxruntime", "int8"), ("onnxruntime", "fp32")):
        with runtime.load(int8_bundle, name, 1, precision, steps=3) as pipe:
            graph = pipe.manifest.graph("decoder", precision)
            images[name, precision] = pipe.backend.run(graph, feeds(int8_bundle, graph, 3))["image"]
            assert set(pipe.backend._sessions or ()) >= {f"decoder{'_int8' * (precision == 'int8')}.onnx"}
            teacher = pipe.teacher_backend
            assert teacher is not None and "teacher.onnx" in (teacher._sessions or ())
            assert (teacher is pipe.backend) == (precision == "fp32")
    assert abs(images["openvino", "int8"] - images["onnxruntime", "int8"]).max() < 1e-3
    assert abs(images["openvino", "int8"] - images["onnxruntime", "fp32"]).max() > 5e-3


# What is read


def test_a_damaged_graph_is_an_error_of_one_line(
    bundle: Path, toy: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    toy.put_file(bundle, "decoder.onnx", b"not a graph")
    with pytest.raises(BackendError, match=r"openvino cannot load decoder\.onnx") as caught:
        runtime.load(bundle, "openvino")
    assert "\n" not in caught.value.message
    assert capfd.readouterr().err == ""  # no other format was tried on it


def test_a_graph_that_is_not_the_one_of_the_contract(lying_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"inputs of student\.onnx are not those of the contract"):
        runtime.load(lying_bundle, "openvino")


def test_weights_outside_the_bundle_are_not_read(bundle: Path, toy: Any) -> None:
    model = onnx.load(bundle / "decoder.onnx")
    weight = next(value for value in model.graph.initializer if value.name == "D")
    (bundle.parent / "outside.data").write_bytes(weight.raw_data)
    onnx.external_data_helper.set_external_data(weight, "../outside.data")
    weight.ClearField("raw_data")
    toy.put_file(bundle, "decoder.onnx", model.SerializeToString())
    for backend in ("openvino", "onnxruntime"):
        with pytest.raises(BackendError, match=rf"{backend} cannot load decoder\.onnx"):
            runtime.load(bundle, backend)


# Whole pipelines


@pytest.mark.parametrize("steps", [1, 2, 3, "teacher"])
def test_every_schedule_of_a_teacher_draws_the_same_tokens(shared_teacher_bundle: Path, steps: Any) -> None:
    results = []
    for name in ("onnxruntime", "openvino"):
        with runtime.load(shared_teacher_bundle, name, threads=1) as pipe:
            results.append(pipe([0, 1, 2], steps, seed=2, num_images=2, output="sequence"))
    np.testing.assert_allclose(results[1].images, results[0].images, rtol=0, atol=CLOSE)
    for mine, theirs in zip(results[1].steps, results[0].steps, strict=True):
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits-var", "digits-llamagen"])
def test_the_embedded_models_agree(embedded_bundle: Callable[[str], Path], model: str) -> None:
    """Attention, normalisation and convolutions as PyTorch exports them: graph by graph in every batch, then
    image by image."""
    root = embedded_bundle(model)
    manifest, mine, reference = read_manifest(root), engine(root), engine(root, OnnxRuntime)
    for batch in BATCHES:
        for graph in manifest.graphs:
            if graph.precision == "fp32" and graph.role != "teacher":
                given = feeds(root, graph, batch)
                want = reference.run(graph, given)
                scale = max(1.0, float(abs(want["logits"]).max())) if "logits" in want else 1.0
                assert_close(mine.run(graph, given), want, CLOSE * scale)
    pipes = [runtime.load(root, name, threads=1) for name in ("onnxruntime", "openvino")]
    for steps in (*manifest.schedules, "teacher"):
        theirs, ours = (pipe([1, 7, 3], steps, seed=1, output="numpy") for pipe in pipes)
        assert abs(np.subtract(ours.images, theirs.images, dtype=int)).max() <= 1
        for step, other in zip(ours.steps, theirs.steps, strict=True):
            np.testing.assert_array_equal(step.tokens, other.tokens)
