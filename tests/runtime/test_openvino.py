"""OpenVINO computes what ONNX Runtime does, in the precision asked for, in both modes, and from its cache."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import helper

from ddexport import runtime
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import Graph, read_manifest
from ddexport.runtime.errors import BackendError, OutputError
from ddexport.runtime.infer import command
from ddexport.runtime.machine import Machine
from ddexport.runtime.noise import gaussian_noise
from ddexport.runtime.options import Options

pytest.importorskip("openvino")

from ddexport.runtime.backends import _openvino
from ddexport.runtime.backends.openvino import OpenVino

HAS_BF16 = "BF16" in Machine().openvino_capabilities
BATCHES = (1, 2, 3, 17)
CLOSE = 1e-5


def graphs(bundle: Path) -> dict[str, Graph]:
    manifest = read_manifest(bundle, verify=False)
    return {graph.key: graph for graph in manifest.graphs if graph.precision == "fp32"}


def engine(bundle: Path, **options: Any) -> OpenVino:
    return OpenVino(bundle, graphs(bundle), Options(threads=1, **options))


def feeds(bundle: Path, role: str, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs for a role: noise, mixed classes, mixed steps."""
    manifest = read_manifest(bundle, verify=False)
    noise = gaussian_noise(seed, range(batch), manifest.sequence.length, manifest.sequence.width)
    if role == "decoder":
        return {"sequence": noise}
    label, known = np.arange(batch) % manifest.classes, np.arange(batch) % (manifest.sequence.split + 1)
    return {"tokens": noise, "label": label, "known": known}


def pick(arrays: dict[str, NDArray[Any]], rows: Any) -> dict[str, NDArray[Any]]:
    return {name: array[rows] for name, array in arrays.items()}


def assert_close(got: Any, want: Any, within: float = CLOSE) -> None:
    assert set(got) == set(want)
    for name, array in got.items():
        np.testing.assert_allclose(array, want[name], rtol=0, atol=within, err_msg=name)


@pytest.fixture(scope="module", params=["latency", "throughput"])
def opened(request: pytest.FixtureRequest, shared_bundle: Path) -> Iterator[OpenVino]:
    with engine(shared_bundle, mode=request.param) as backend:
        yield backend


@pytest.fixture(scope="module")
def reference(shared_bundle: Path) -> Iterator[OnnxRuntime]:
    with OnnxRuntime(shared_bundle, graphs(shared_bundle), Options(threads=1)) as backend:
        yield backend


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("role", ["student", "decoder"])
def test_float32_is_that_of_onnxruntime_in_every_batch_and_mode(
    opened: OpenVino, reference: OnnxRuntime, shared_bundle: Path, role: str, batch: int
) -> None:
    given = feeds(shared_bundle, role, batch)
    assert_close(opened.run(role, given), reference.run(role, given))


@pytest.mark.parametrize("role", ["student", "decoder"])
def test_rows_do_not_depend_on_their_place(opened: OpenVino, shared_bundle: Path, role: str) -> None:
    """Identical rows agree and a permuted batch is permuted: nothing leaks between rows or streams."""
    given = feeds(shared_bundle, role, 17)
    order = np.random.default_rng(5).permutation(17)
    outputs = opened.run(role, given)
    assert_close(opened.run(role, pick(given, order)), pick(outputs, order))
    assert_close(opened.run(role, pick(given, np.full(17, 3))), pick(outputs, np.full(17, 3)))


def test_outputs_stay_as_they_are(opened: OpenVino, shared_bundle: Path) -> None:
    """The engine's own memory is not handed out: a later run must not change an earlier result."""
    for batch in (1, 5):
        first = opened.run("decoder", feeds(shared_bundle, "decoder", batch, seed=1))
        kept = {name: array.copy() for name, array in first.items()}
        opened.run("decoder", feeds(shared_bundle, "decoder", batch, seed=2))
        assert_close(first, kept, 0.0)


def test_inputs_may_be_read_only_views(opened: OpenVino, reference: OnnxRuntime, shared_bundle: Path) -> None:
    """They are shared with the engine where that can be, and copied where it cannot."""
    given = feeds(shared_bundle, "decoder", 6)
    view = given["sequence"][::2]
    view.flags.writeable = False
    assert_close(opened.run("decoder", {"sequence": view}), reference.run("decoder", {"sequence": view}))


def test_several_threads_may_run_it(opened: OpenVino, shared_bundle: Path) -> None:
    """Other batch sizes at once, so that models are compiled and dropped meanwhile."""
    given = {batch: feeds(shared_bundle, "decoder", batch, seed=batch) for batch in (1, 2, 3, 4)}
    alone = {batch: opened.run("decoder", each) for batch, each in given.items()}
    found: dict[int, Any] = {}

    def work(batch: int) -> None:
        for _ in range(5):
            found[batch] = opened.run("decoder", given[batch])

    threads = [threading.Thread(target=work, args=(batch,)) for batch in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batch, outputs in alone.items():
        assert_close(found[batch], outputs)


def test_a_dynamic_batch_computes_the_same(
    shared_bundle: Path, reference: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other setting of the choice that is made in the backend."""
    monkeypatch.setattr(_openvino, "FIXED_BATCH", False)
    with engine(shared_bundle) as backend:
        for batch in (2, 1):
            given = feeds(shared_bundle, "student", batch)
            assert_close(backend.run("student", given), reference.run("student", given))


def test_few_batch_sizes_stay_compiled(shared_bundle: Path) -> None:
    """Each holds the weights once more; the one that `open` makes goes at once if it is not wanted."""
    with engine(shared_bundle) as backend:
        sizes = backend._models["decoder"]._compiled
        for batch, kept in ((4, [4]), (1, [4, 1]), (2, [1, 2]), (3, [2, 3]), (2, [3, 2]), (1, [2, 1])):
            backend.run("decoder", feeds(shared_bundle, "decoder", batch))
            assert list(sizes) == kept


def test_nothing_is_compiled_twice(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two sizes in turn, as a request has them that does not come out even."""
    made = []
    compiled = _openvino.Model._compile
    monkeypatch.setattr(_openvino.Model, "_compile", lambda self, n: (made.append(n), compiled(self, n))[1])
    for mode, sizes in (("latency", [1, 1, 3, 3, 2, 2]), ("throughput", [1, 1])):
        made.clear()
        with runtime.load(shared_bundle, "openvino", threads=1, mode=mode) as pipe:
            for _ in range(3):
                pipe(0, num_images=5, batch_size=3)
        assert made == sizes


def test_throughput_asks_for_batches_that_keep_the_streams_busy(shared_bundle: Path) -> None:
    with engine(shared_bundle, mode="throughput") as backend:
        assert backend.batch_size is not None
        assert backend.batch_size >= 8
        assert backend._models["decoder"]._for(1)._queue is None
        backend.run("decoder", feeds(shared_bundle, "decoder", 3))
        assert backend._models["decoder"]._for(1)._queue is not None  # which is what spreads the rows
    with engine(shared_bundle) as backend:
        assert backend.batch_size is None
    assert backend.batch_size is None


def test_it_closes_twice_and_then_says_so(shared_bundle: Path) -> None:
    backend = engine(shared_bundle)
    backend.open()
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="backend openvino is closed"):
        backend.run("decoder", feeds(shared_bundle, "decoder", 1))


# Precision


def test_float32_is_float32(shared_bundle: Path) -> None:
    """OpenVINO takes bf16 by itself where the CPU has it. A bf16 product is off by some 1e-3; float32 agrees
    with float64 to 1e-6."""
    model = onnx.load(shared_bundle / "decoder.onnx")
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    given = feeds(shared_bundle, "decoder", 4)["sequence"]
    exact = 1 / (1 + np.exp(-(given.reshape(4, -1).astype(np.float64) @ weights["D"])))
    for mode in ("latency", "throughput"):
        with engine(shared_bundle, mode=mode) as backend:
            image = backend.run("decoder", {"sequence": given})["image"].reshape(4, -1)
            assert abs(image - exact).max() < 2e-6
    if HAS_BF16:  # else the bound above would prove nothing
        with engine(shared_bundle, compute="bf16") as backend:
            image = backend.run("decoder", {"sequence": given})["image"].reshape(4, -1)
            assert 1e-4 < abs(image - exact).max() < 5e-2


@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
def test_bf16_comes_from_the_float32_graphs(shared_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The bundle has no bf16 graphs: the precision is named, the pipeline says so, and its images differ."""
    with runtime.load(shared_bundle, "openvino", threads=1) as plain:
        exact = plain([0, 1], seed=3, output="sequence").images
        assert plain.precision == "fp32"
    assert not caplog.records
    with (
        caplog.at_level(logging.WARNING),
        runtime.load(shared_bundle, precision="bf16", mode="latency") as pipe,
    ):
        assert (pipe.backend.name, pipe.precision) == ("openvino", "bf16")
        assert not np.array_equal(pipe([0, 1], seed=3, output="sequence").images, exact)
    assert "openvino, bf16: the bundle states no limits for bf16" in caplog.text


def test_a_precision_that_the_cpu_lacks_is_refused_when_opened(shared_bundle: Path) -> None:
    machine = Machine(openvino_capabilities=("FP32",))
    backend = OpenVino(shared_bundle, graphs(shared_bundle), Options(compute="bf16"), machine)
    with pytest.raises(BackendError, match="openvino cannot compute in bf16 here"):
        backend.open()
    backend = OpenVino(shared_bundle, graphs(shared_bundle), Options(compute="fp8"), machine)
    with pytest.raises(BackendError, match="openvino does not compute in fp8") as caught:
        backend.open()
    assert "fp32, bf16, fp16, int8" in caught.value.hint


def quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The toy decoder with quantisation of the product's two sides, as a quantised bundle has it."""
    node = next(each for each in model.graph.node if each.op_type == "MatMul")
    model.graph.node.remove(node)
    for name, value in {"s": np.float32(0.04), "z": np.int8(0)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    made = []
    for side in node.input:
        made += [
            helper.make_node("QuantizeLinear", [side, "s", "z"], [f"{side}_q"]),
            helper.make_node("DequantizeLinear", [f"{side}_q", "s", "z"], [f"{side}_d"]),
        ]
    made.append(helper.make_node("MatMul", [f"{side}_d" for side in node.input], node.output))
    for place, each in enumerate(made):
        model.graph.node.insert(1 + place, each)
    return model


def test_int8_reads_the_int8_graphs(
    bundle: Path, add_graphs: Callable[..., None], replace_file: Callable[[str, bytes], None]
) -> None:
    """And rounds as they say: to a step of the quantiser like ONNX Runtime, whatever computes the rest."""
    add_graphs("int8")
    model = quantised(onnx.load(bundle / "decoder_int8.onnx"))
    replace_file("decoder_int8.onnx", model.SerializeToString())
    images = {}
    for name, precision in (("openvino", "int8"), ("onnxruntime", "int8"), ("onnxruntime", "fp32")):
        with runtime.load(bundle, name, threads=1, precision=precision) as pipe:
            assert pipe.precision == precision
            given = feeds(bundle, "decoder", 3)
            images[name, precision] = pipe.backend.run("decoder", given)["image"]
    assert abs(images["openvino", "int8"] - images["onnxruntime", "int8"]).max() < 1e-3
    assert abs(images["openvino", "int8"] - images["onnxruntime", "fp32"]).max() > 5e-3


# What is read


def test_a_damaged_graph_is_an_error_of_one_line(
    bundle: Path, replace_file: Callable[[str, bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    replace_file("decoder.onnx", b"not a graph")
    with pytest.raises(BackendError, match=r"openvino cannot load decoder\.onnx") as caught:
        engine(bundle).open()
    assert "\n" not in caught.value.message
    assert capfd.readouterr().err == ""  # no other format was tried on it


def test_a_graph_that_is_not_the_one_in_the_manifest(lying_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"student\.onnx are not those that bundle\.json names"):
        engine(lying_bundle).open()


def test_weights_outside_the_bundle_are_not_read(
    bundle: Path, replace_file: Callable[[str, bytes], None]
) -> None:
    model = onnx.load(bundle / "decoder.onnx")
    weight = next(each for each in model.graph.initializer if each.name == "D")
    (bundle.parent / "outside.data").write_bytes(weight.raw_data)
    onnx.external_data_helper.set_external_data(weight, "../outside.data")
    weight.ClearField("raw_data")
    replace_file("decoder.onnx", model.SerializeToString())
    with pytest.raises(BackendError, match=r"openvino cannot load decoder\.onnx.*outside the base directory"):
        engine(bundle).open()


# The cache


def blobs(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.blob"))


def from_cache(backend: OpenVino) -> list[bool]:
    made = [next(iter(model._compiled.values())) for model in backend._models.values()]
    return [bool(each._model.get_property("LOADED_FROM_CACHE")) for each in made]


@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_a_second_load_comes_from_the_cache(
    shared_bundle: Path, tmp_path: Path, reference: OnnxRuntime, mode: str
) -> None:
    cache, given = tmp_path / "deep" / "cache", feeds(shared_bundle, "student", 2)
    with engine(shared_bundle, cache=cache, mode=mode) as backend:
        first = backend.run("student", given)
        assert from_cache(backend) == [False, False]
    made = blobs(cache)
    assert len(made) >= 2
    with engine(shared_bundle, cache=str(cache), mode=mode) as backend:
        assert from_cache(backend) == [True, True]
        assert_close(backend.run("student", given), first, 0.0)
    assert blobs(cache) == made
    assert_close(first, reference.run("student", given))


def test_a_damaged_cache_is_compiled_again(
    shared_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenVINO itself loads changed weights out of it without a word."""
    with engine(shared_bundle, cache=tmp_path) as backend:
        want = backend.run("decoder", feeds(shared_bundle, "decoder", 1))
    for blob in blobs(tmp_path):
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 255
        blob.chmod(0o644)
        blob.write_bytes(content)
    with engine(shared_bundle, cache=tmp_path) as backend:
        assert from_cache(backend) == [False, False]
        assert_close(backend.run("decoder", feeds(shared_bundle, "decoder", 1)), want, 0.0)
    assert "is not as it was written" in caplog.text


def test_other_weights_and_settings_have_other_places_in_the_cache(
    bundle: Path, tmp_path: Path, replace_file: Callable[[str, bytes], None]
) -> None:
    """The path of the bundle is the same, and so is the size of the file."""
    with engine(bundle, cache=tmp_path / "cache") as backend:
        before = backend.run("decoder", feeds(bundle, "decoder", 1))["image"]
    model = onnx.load(bundle / "decoder.onnx")
    for each in model.graph.initializer:
        if each.name == "D":
            each.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(each), "D"))
    replace_file("decoder.onnx", model.SerializeToString())
    with engine(bundle, cache=tmp_path / "cache") as backend:
        after = backend.run("decoder", feeds(bundle, "decoder", 1))["image"]
    np.testing.assert_allclose(after, 1 - before, atol=1e-5)  # the sigmoid of the opposite
    folders = len(list((tmp_path / "cache").iterdir()))
    with engine(bundle, cache=tmp_path / "cache", mode="throughput"):
        assert len(list((tmp_path / "cache").iterdir())) > folders


def test_a_cache_that_cannot_be_made_is_an_error(shared_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        engine(shared_bundle, cache=tmp_path / "file").open()


def test_a_cache_that_is_lost_while_it_is_used_is_an_error_of_its_own(
    shared_bundle: Path, tmp_path: Path
) -> None:
    """A new batch size is compiled in the middle of a run."""
    cache = tmp_path / "cache"
    with engine(shared_bundle, cache=cache) as backend:
        shutil.rmtree(cache)
        cache.write_text("")
        with pytest.raises(OutputError, match="cannot be written"):
            backend.run("decoder", feeds(shared_bundle, "decoder", 2))


# Whole pipelines


def test_the_command_line_has_mode_and_cache(shared_bundle: Path, tmp_path: Path) -> None:
    """They rule out the other engines, so that `auto` comes to OpenVINO."""
    words = [
        shared_bundle,
        "--mode",
        "throughput",
        "--model-cache",
        tmp_path / "cache",
        "--threads",
        1,
        "--json",
    ]
    result = CliRunner().invoke(command, [*map(str, words), "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["backend"] == "openvino"
    assert len(blobs(tmp_path / "cache")) == 2
    assert CliRunner().invoke(command, [str(shared_bundle), "--mode", "fast"]).exit_code == 2


@pytest.mark.parametrize("steps", [1, 2, 3, "teacher"])
def test_every_schedule_of_a_teacher_draws_the_same_tokens(shared_teacher_bundle: Path, steps: Any) -> None:
    """The teacher's graph has more dynamic sizes than the batch; in either mode it stays on all threads."""
    results = []
    for name, mode in (("onnxruntime", None), ("openvino", "latency"), ("openvino", "throughput")):
        with runtime.load(shared_teacher_bundle, name, threads=1, mode=mode) as pipe:
            results.append(pipe([0, 1, 2], steps, seed=2, num_images=2, output="sequence"))
    for other in results[1:]:
        np.testing.assert_allclose(other.images, results[0].images, rtol=0, atol=CLOSE)
        for mine, theirs in zip(other.steps, results[0].steps, strict=True):
            np.testing.assert_array_equal(mine.tokens, theirs.tokens)


@pytest.mark.parametrize("steps", [1, 2])
def test_an_exported_model_draws_the_same_images(golden_bundle: Path, steps: int) -> None:
    """Attention, normalisation and convolutions, as PyTorch exports them; every batch size once."""
    images = []
    for name, mode in (("onnxruntime", None), ("openvino", "latency"), ("openvino", "throughput")):
        with runtime.load(golden_bundle, name, threads=1, mode=mode) as pipe:
            images.append(pipe(0, steps, num_images=5, batch_size=3, output="numpy").images)
    for other in images[1:]:
        assert abs(np.subtract(other, images[0], dtype=int)).max() <= 1


@pytest.fixture(scope="module", params=["digits-var", "digits-llamagen"])
def digits(request: pytest.FixtureRequest, embedded_bundle: Callable[[str], Path]) -> Path:
    return embedded_bundle(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_the_embedded_models_agree_graph_by_graph(digits: Path, mode: str) -> None:
    """Students of every split, decoder, and the teacher pass by pass with its caches."""
    manifest = read_manifest(digits)
    assert manifest.teacher is not None
    with (
        OnnxRuntime(digits, graphs(digits), Options(threads=1)) as reference,
        engine(digits, mode=mode) as mine,
    ):
        assert any("@" in key for key in mine.graphs)
        for batch in BATCHES:
            for key in mine.graphs:
                if key != "teacher":
                    given = feeds(digits, key.partition("@")[0], batch)
                    want = reference.run(key, given)
                    scale = max(1.0, float(abs(want["logits"]).max())) if "logits" in want else 1.0
                    assert_close(mine.run(key, given), want, CLOSE * scale)
    results = []
    for name, chosen in (("onnxruntime", None), ("openvino", mode)):
        with runtime.load(digits, name, threads=1, mode=chosen) as pipe:
            results.append(
                [pipe([1, 7, 3], n, seed=1, output="numpy") for n in (*manifest.schedules, "teacher")]
            )
    for ours, theirs in zip(*results, strict=True):
        assert abs(np.subtract(ours.images, theirs.images, dtype=int)).max() <= 1
        for step, other in zip(ours.steps, theirs.steps, strict=True):
            np.testing.assert_array_equal(step.tokens, other.tokens)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
def test_bf16_is_computed_in_bf16(digits: Path) -> None:
    """That it keeps to the bundle's limits is what `make parity` shows."""
    with engine(digits) as exact, engine(digits, compute="bf16") as half:
        given = feeds(digits, "decoder", 2)
        assert abs(exact.run("decoder", given)["image"] - half.run("decoder", given)["image"]).max() > 1e-3
