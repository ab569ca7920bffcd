"""OpenVINO computes what ONNX Runtime does, in the precision asked for, and compiles each graph once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddexport import runtime
from ddexport.runtime.backends import Configuration
from ddexport.runtime.backends import openvino as module
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import Graph, read_manifest
from ddexport.runtime.labels import read_labels
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.pipeline import Pipeline
from tests.runtime import toy

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
    if graph.role.startswith("decoder"):
        return {"sequence": noise}
    label, known = np.arange(batch) % manifest.classes, np.arange(batch) % (manifest.sequence.split + 1)
    return {"latents": noise, "label": label, "known": known}


def assert_close(got: Any, want: Any, within: float = CLOSE) -> None:
    assert set(got) == set(want)
    for name, array in got.items():
        np.testing.assert_allclose(array, want[name], rtol=0, atol=within, err_msg=name)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every model that is compiled from now on: its first output and the settings."""
    made: list[tuple[str, dict[str, Any]]] = []
    original = openvino.Core.compile_model

    def compile_model(self: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        made.append((model.outputs[0].get_any_name(), dict(settings)))
        return original(self, model, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    return made


@pytest.mark.parametrize("role", ["student", "decoder"])
def test_float32_is_that_of_onnxruntime_in_every_batch(shared_bundle: Path, role: str) -> None:
    """Rows do not depend on their place, a later run does not change an earlier result, and inputs may be
    read-only views, which are copied where they cannot be shared with the engine."""
    mine, reference = engine(shared_bundle), engine(shared_bundle, OnnxRuntime)
    graph = mine.manifest.graph(role)
    results = [(batch, mine.run(graph, feeds(shared_bundle, graph, batch))) for batch in BATCHES]
    for batch, outputs in results:
        assert_close(outputs, reference.run(graph, feeds(shared_bundle, graph, batch)))
    for rows in (np.random.default_rng(5).permutation(17), np.full(17, 3), slice(None, None, 2)):
        given = {name: array[rows] for name, array in feeds(shared_bundle, graph, 17).items()}
        for array in given.values():
            array.flags.writeable = False
        assert_close(mine.run(graph, given), {name: array[rows] for name, array in results[-1][1].items()})


def test_each_graph_is_compiled_twice_whatever_the_batches(
    shared_bundle: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one image, and once for all other sizes, also by several threads at once: they share requests, for
    where one is made while another runs, OpenVINO may never come back."""
    made: list[int] = []
    create = openvino.CompiledModel.create_infer_request
    monkeypatch.setattr(
        openvino.CompiledModel, "create_infer_request", lambda model: (made.append(1), create(model))[1]
    )
    counts = (1, 2, 3, 4) * 4
    with runtime.load(shared_bundle, "openvino", threads=1) as pipe:
        alone = [pipe(0, 2, num_images=count, output="numpy").images for count in counts]
        pipe(0, num_images=5, batch_size=3)
        with ThreadPoolExecutor(4) as pool:
            draw = lambda count: pipe(0, 2, num_images=count, output="numpy").images  # noqa: E731
            together = list(pool.map(draw, counts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [name for name, _ in compiled] == ["sequence", "image"] * 2 and len(made) == 4
    assert compiled[0][1]["INFERENCE_NUM_THREADS"] == 1


def test_images_of_large_graphs_are_run_one_by_one(
    shared_bundle: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For with a dynamic batch they take tens of gigabytes. Each is then, to the bit, what it is alone."""
    monkeypatch.setattr(module, "LARGE", 0)
    with runtime.load(shared_bundle, "openvino", threads=1) as pipe:
        together = pipe(0, 2, num_images=3, output="numpy")
        for number, image in enumerate(together.images):
            alone = pipe(0, 2, first_image=number, output="numpy")
            np.testing.assert_array_equal(alone.images[0], image)
            for one, all_of_them in zip(alone.steps, together.steps, strict=True):
                np.testing.assert_array_equal(one.sequence[0], all_of_them.sequence[number])
    assert [name for name, _ in compiled] == ["sequence", "image"]


def test_float32_is_float32(shared_bundle: Path) -> None:
    """OpenVINO takes bf16 by itself where the CPU has it. A bf16 product is off by some 1e-3; float32 agrees
    with float64 to 1e-6."""
    backend = engine(shared_bundle)
    graph = backend.manifest.graph("decoder")
    given = feeds(shared_bundle, graph, 4)
    weights = toy.constants(toy.decoder())["D"]
    exact = 1 / (1 + np.exp(-(given["sequence"].reshape(4, -1).astype(np.float64) @ weights)))
    assert abs(backend.run(graph, given)["image"].reshape(4, -1) - exact).max() < 2e-6
    if HAS_BF16:  # else the bound above would prove nothing
        image = engine(shared_bundle, precision="bf16").run(graph, given)["image"].reshape(4, -1)
        assert 1e-4 < abs(image - exact).max() < 5e-2


def test_what_it_can_compute_in(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precisions come from the float32 graphs, which the CPU must be capable of; int8 from its own.
    Without its part for CPUs OpenVINO can do nothing."""
    toy.add_precision(bundle, "fp8")
    configure = partial(OpenVino.configurations, bundle)
    monkeypatch.setattr(module, "capabilities", lambda: ("FP32", "BF16"))
    for precision, graphs, obstacle in (
        (None, "fp32", ""),
        ("bf16", "fp32", ""),
        ("fp16", "fp32", "no fp16 arithmetic"),
        ("int8", "int8", "no graphs in int8"),
        ("fp8", "fp8", "fp32, bf16, fp16, int8"),
    ):
        (chosen,) = configure(read_manifest(bundle), precision, None)
        assert (chosen.precision, chosen.graphs) == (precision or "fp32", graphs)
        assert obstacle in chosen.obstacle and bool(obstacle) == bool(chosen.obstacle)
    toy.add_precision(bundle, "int8")
    assert "no int8 arithmetic" in configure(read_manifest(bundle), "int8", "cpu")[0].obstacle
    assert configure(read_manifest(bundle), None, "cuda:0") == []

    def fail(*arguments: str) -> Any:
        raise RuntimeError("Device with CPU name is not registered")

    monkeypatch.setattr(openvino.Core, "get_property", fail)
    assert capabilities.__wrapped__() == ()


@pytest.fixture
def int8_bundle(teacher_bundle: Path) -> Path:
    """The toy with a teacher in int8 too, whose decoder is in truth quantised."""
    toy.add_precision(teacher_bundle, "int8")
    toy.put_file(teacher_bundle, "decoder_int8.onnx", toy.decoder(int8=True).SerializeToString())
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


def assert_drawn_alike(root: Path, atol: float) -> None:
    pipes = [runtime.load(root, name, threads=1) for name in ("onnxruntime", "openvino")]
    for steps in (*pipes[0].manifest.schedules, "teacher"):
        one, other = (pipe([0, 1, 2], steps, seed=2, num_images=2, output="numpy") for pipe in pipes)
        assert abs(np.subtract(one.images, other.images, dtype=int)).max() <= 1
        for step, its in zip(one.steps, other.steps, strict=True):
            np.testing.assert_array_equal(step.tokens, its.tokens)
            np.testing.assert_allclose(step.sequence, its.sequence, rtol=0, atol=atol)


def test_every_schedule_of_a_teacher_draws_the_same_tokens(shared_teacher_bundle: Path) -> None:
    assert_drawn_alike(shared_teacher_bundle, CLOSE)


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
    assert_drawn_alike(root, 1e-3)


@pytest.mark.parametrize("biased", [False, True])
def test_products_with_weights_are_its_own(biased: bool) -> None:
    """With the identity behind it none is left to MLAS, and the outputs stay, infinite ones and NaN too."""
    ops, rng = openvino.opset13, np.random.default_rng(0)
    weight, bias = (rng.standard_normal(shape, np.float32) for shape in ((64, 32), (32,)))
    given = rng.standard_normal((8, 64), np.float32)
    given[0, 0], given[1, 0] = np.nan, np.inf
    x = ops.parameter([8, 64], np.float32)
    product = ops.matmul(x, weight, False, False)
    model = openvino.Model([ops.add(product, bias) if biased else product], [x])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}

    def run() -> tuple[Any, list[str]]:
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        result = request.infer([given])[0].copy()
        kinds = [one.exec_type for one in request.get_profiling_info() if one.node_type == "FullyConnected"]
        return result, kinds

    wanted, _ = run()
    module._avoid_mlas(model)
    assert sum(node.get_type_name() == "PRelu" for node in model.get_ops()) == 1
    got, kinds = run()
    assert len(kinds) == 1 and "mlas" not in kinds[0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
