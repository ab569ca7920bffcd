"""The backend for engines, on a GPU made of plain memory that computes with ONNX Runtime (`fake_cuda.py`,
`fake_tensorrt.py`).

What only a real GPU can show is in tests/gpu.
"""

from __future__ import annotations

import gc
import importlib
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddexport.runtime.backends import _executor
from ddexport.runtime.backends._cuda import CudaDevice, CudaError
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.backends.tensorrt import TensorRt
from ddexport.runtime.errors import BackendError, BundleError
from ddexport.runtime.manifest import read_manifest
from ddexport.runtime.options import Options

from ddexport import runtime

BACKENDS = ("tensorrt", "tensorrt-rtx")
Build = Callable[..., Path]


def graphs(bundle: Path) -> dict[str, Any]:
    manifest = read_manifest(bundle, verify=False)
    return {role: manifest.graph(role) for role in ("student", "decoder")}


def feeds(batch: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.standard_normal((batch, 6, 4)).astype(np.float32),
        "label": rng.integers(0, 3, batch),
        "known": rng.integers(0, 7, batch),
    }


def opened(bundle: Path, **options: Any) -> TensorRt:
    backend = TensorRt(bundle, graphs(bundle), Options(**options))
    backend.open()
    return backend


@pytest.fixture
def truth(bundle: Path) -> Iterator[OnnxRuntime]:
    with OnnxRuntime(bundle, graphs(bundle), Options(threads=1)) as backend:
        yield backend  # type: ignore[misc]


def assert_equal(have: dict[str, Any], want: dict[str, Any]) -> None:
    assert have.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_any_batch_gives_what_the_graph_gives(
    gpu: Any, bundle: Path, build: Build, truth: OnnxRuntime, backend: str, cuda_graphs: bool
) -> None:
    """Below the smallest batch, within, at the ends, several times the largest; and again, now recorded."""
    build(backend, profiles=((2, 3, 5),))
    engines = opened(bundle, cuda_graphs=cuda_graphs)
    for batch in (1, 2, 3, 5, 6, 11, 3, 1, 11, 4):
        given = feeds(batch, seed=batch)
        want = truth.run("student", given)
        assert_equal(engines.run("student", given), want)
        picture = {"sequence": want["sequence"]}
        assert_equal(engines.run("decoder", picture), truth.run("decoder", picture))
    sizes = {size for _, size in gpu.package(backend).executed}
    assert sizes == {2, 3, 4, 5}  # a batch of one was padded to two
    assert (gpu.full.recorded > 0) == (backend == "tensorrt" and cuda_graphs)
    engines.close()
    assert gpu.cuda.left_behind == []


def test_the_results_do_not_change_with_the_next_request(gpu: Any, bundle: Path, build: Build) -> None:
    """They are the caller's, not views of a buffer."""
    build()
    engines = opened(bundle)
    first = engines.run("student", feeds(3, seed=1))
    kept = {name: value.copy() for name, value in first.items()}
    engines.run("student", feeds(3, seed=2))
    assert_equal(first, kept)


def test_inputs_in_any_memory_layout(gpu: Any, bundle: Path, build: Build, truth: OnnxRuntime) -> None:
    build()
    given = feeds(6) | {"tokens": np.asfortranarray(feeds(6)["tokens"])}
    half = {name: value[::2] for name, value in given.items()}
    assert_equal(opened(bundle).run("student", half), truth.run("student", half))


def test_each_profile_runs_its_own_batches(gpu: Any, bundle: Path, build: Build) -> None:
    build("tensorrt", profiles=((1, 1, 1), (2, 4, 4), (8, 8, 16)))
    engines = opened(bundle, cuda_graphs=False)
    gpu.full.executed.clear()
    for batch, want in ((1, [(0, 1)]), (3, [(1, 3)]), (6, [(2, 8)]), (17, [(2, 16), (0, 1)])):
        engines.run("student", feeds(batch))
        assert gpu.full.executed == want
        gpu.full.executed.clear()


def test_buffers_are_made_once(gpu: Any, bundle: Path, build: Build) -> None:
    """A thousand requests of every size need no more memory than the first, on the host and on the device."""
    build("tensorrt", profiles=((1, 4, 8),))
    engines = opened(bundle)
    before = {kind: gpu.cuda.allocated(kind) for kind in ("host", "device")}
    calls = gpu.cuda.calls.copy()
    for number in range(1000):
        engines.run("student", feeds(1 + number % 20))
    assert {kind: gpu.cuda.allocated(kind) for kind in ("host", "device")} == before
    for name in ("cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"):
        assert gpu.cuda.calls[name] == calls[name]
    assert len(gpu.cuda.graphs) <= _executor.MAX_CONTEXTS
    engines.close()


def test_roles_share_the_memory_they_work_in(gpu: Any, bundle: Path, build: Build) -> None:
    """Full TensorRT's contexts get their scratch memory from us: one block, however many there are."""
    build("tensorrt")
    engines = opened(bundle)
    engines.run("student", feeds(1))
    engines.run("student", feeds(2))
    engines.run("decoder", {"sequence": feeds(1)["tokens"]})
    contexts = [context for engine in gpu.full.engines for context in engine.contexts]
    assert len(contexts) == 3
    assert len({context.scratch for context in contexts}) == 1


def test_a_batch_size_is_recorded_when_it_comes_again(gpu: Any, bundle: Path, build: Build) -> None:
    """The first run of a size prepares it, the second records it, all others replay."""
    build("tensorrt")
    engines = opened(bundle)
    for _ in range(5):
        engines.run("student", feeds(4))
    assert gpu.full.executed == [(0, 4), (0, 4)]
    assert gpu.cuda.calls["cudaGraphLaunch"] == 4
    engines.run("student", feeds(3))
    assert gpu.full.recorded == 1
    engines.close()


def test_the_size_not_used_for_longest_makes_room(
    gpu: Any, bundle: Path, build: Build, truth: OnnxRuntime
) -> None:
    build("tensorrt", profiles=((1, 4, 16),))
    engines = opened(bundle)
    for batch in [*range(1, 17)] * 2:
        assert_equal(engines.run("student", feeds(batch)), truth.run("student", feeds(batch)))
        assert len(gpu.cuda.graphs) <= _executor.MAX_CONTEXTS
    engines.close()
    assert gpu.cuda.left_behind == []


@pytest.mark.parametrize("trouble", ["enqueue", "cudaStreamBeginCapture", "cudaGraphInstantiate"])
def test_without_graphs_it_goes_on_plainly_and_says_so_once(
    gpu: Any, bundle: Path, build: Build, truth: OnnxRuntime, trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    build("tensorrt")
    engines = opened(bundle)
    if trouble == "enqueue":
        gpu.full.refuse_to_record = True
    else:
        gpu.cuda.fail(trouble, type_of_error(gpu).cudaErrorInvalidValue)
    with caplog.at_level(logging.WARNING):
        for batch in (2, 2, 2, 3, 3, 2):
            assert_equal(engines.run("student", feeds(batch)), truth.run("student", feeds(batch)))
    assert len(caplog.records) == 1
    assert "CUDA graphs are not used for student_fp32.plan" in caplog.text
    assert not gpu.cuda.graphs
    engines.close()
    assert gpu.cuda.left_behind == []


def type_of_error(gpu: Any) -> Any:
    return type(gpu.cuda.cudaGetLastError()[0])


def test_tensorrt_rtx_records_by_itself(gpu: Any, bundle: Path, build: Build) -> None:
    build()
    for cuda_graphs, strategy in ((None, "WHOLE"), (False, "DISABLED")):
        gpu.rtx.engines.clear()
        opened(bundle, cuda_graphs=cuda_graphs).close()
        assert {config.cuda_graph_strategy for e in gpu.rtx.engines for config in e.configs} == {strategy}
    assert gpu.cuda.calls["cudaStreamBeginCapture"] == 0


def test_what_tensorrt_rtx_compiles_is_kept(
    gpu: Any, bundle: Path, build: Build, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In one file for each engine and GPU; a foreign or damaged one is made anew."""
    build()
    opened(bundle).close()
    files = sorted((tmp_path / "cache" / "ddexport" / "compiled").iterdir())
    assert len(files) == 2
    assert all(file.name.endswith("-1.7.1.116-sm89.bin") for file in files)
    assert {file.read_bytes() for file in files} == {b"compiled here"}
    before = [file.stat().st_mtime_ns for file in files]
    opened(bundle).close()
    assert [file.stat().st_mtime_ns for file in files] == before
    files[0].write_bytes(b"something else")
    opened(bundle).close()
    assert files[0].read_bytes() == b"compiled here"


def test_a_cache_that_cannot_be_kept_harms_nobody(
    gpu: Any, bundle: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a_file"))
    build()
    engines = opened(bundle)
    engines.run("student", feeds(1))
    engines.close()
    assert gpu.cuda.left_behind == []


def test_threads_take_turns(gpu: Any, bundle: Path, build: Build, truth: OnnxRuntime) -> None:
    """The buffers are shared: nobody may get another one's images. Every thread sets its device."""
    build("tensorrt")
    engines = opened(bundle)
    before = gpu.cuda.calls["cudaSetDevice"]
    requests = [feeds(1 + number % 5, seed=number) for number in range(60)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda given: engines.run("student", given), requests))
    for given, answer in zip(requests, answers, strict=True):
        assert_equal(answer, truth.run("student", given))
    assert gpu.cuda.calls["cudaSetDevice"] - before == 60
    engines.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_frees_engines_too(gpu: Any, bundle: Path, build: Build, backend: str) -> None:
    """The packages free an engine when nobody refers to it any more."""
    build(backend)
    engines = opened(bundle)
    engines.run("student", feeds(2))
    package = gpu.package(backend)
    alive = [weakref.ref(engine) for engine in package.engines]
    assert len(alive) == 2
    package.engines.clear()
    engines.close()
    engines.close()
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    with pytest.raises(BackendError, match="backend tensorrt is closed"):
        engines.run("student", feeds(1))


CALLS_WHILE_OPENING = ["cudaSetDevice", "cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"]


@pytest.mark.parametrize("name", CALLS_WHILE_OPENING)
@pytest.mark.parametrize("after", range(6))
def test_a_failure_while_opening_leaves_nothing_behind(
    gpu: Any, bundle: Path, build: Build, name: str, after: int
) -> None:
    """Wherever it happens, and it names the call."""
    build("tensorrt")
    gpu.cuda.fail(name, type_of_error(gpu).cudaErrorMemoryAllocation, after)
    engines = TensorRt(bundle, graphs(bundle))
    try:
        engines.open()
    except CudaError as error:
        assert error.message.startswith(f"{name} failed: the fake says 2 (cudaErrorMemoryAllocation)")
        assert "smaller batches" in error.hint
        assert gpu.cuda.left_behind == []
        with pytest.raises(BackendError, match="is closed"):
            engines.run("student", feeds(1))
    else:
        assert gpu.cuda.calls[name] <= after  # so many calls are not needed
        gpu.cuda.fails.clear()
        engines.close()


@pytest.mark.parametrize(
    "name", ["cudaSetDevice", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch"]
)
def test_a_failing_call_is_named(gpu: Any, bundle: Path, build: Build, name: str) -> None:
    """And the backend can still be closed, and frees everything."""
    build("tensorrt")
    engines = opened(bundle)
    for _ in range(2):
        engines.run("student", feeds(2))
    gpu.cuda.fail(name, type_of_error(gpu).cudaErrorIllegalAddress)
    with pytest.raises(CudaError, match=rf"{name} failed: .*\(cudaErrorIllegalAddress\)"):
        engines.run("student", feeds(2))
    gpu.cuda.fails.clear()
    engines.close()
    assert gpu.cuda.left_behind == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refusal_of_the_package_tells_its_reason(
    gpu: Any, bundle: Path, build: Build, backend: str, truth: OnnxRuntime
) -> None:
    """And the request after it is right again."""
    build(backend)
    engines = opened(bundle)
    package = gpu.package(backend)
    package.refuse_to_run = True
    with pytest.raises(BackendError, match=re.escape("execute_async_v3 failed: the fake refuses")):
        engines.run("student", feeds(2))
    package.refuse_to_run = False
    assert_equal(engines.run("student", feeds(2)), truth.run("student", feeds(2)))
    package.no_contexts = True
    with pytest.raises(BackendError, match="gives no execution context: out of memory, says the fake"):
        engines.run("decoder", {"sequence": feeds(1)["tokens"]})
    engines.close()
    assert gpu.cuda.left_behind == []


def change_sidecar(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_plan_with_another_hash_is_not_loaded(gpu: Any, bundle: Path, build: Build) -> None:
    plan = build() / "decoder_fp32.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b" ")
    with pytest.raises(BundleError, match=re.escape("the SHA-256 of decoder_fp32.plan is not the one")):
        opened(bundle)
    assert not gpu.rtx.host_code_allowed, "no plan was given to the package"
    assert gpu.cuda.left_behind == []


def test_a_plan_that_is_none_says_what_the_package_says(gpu: Any, bundle: Path, build: Build) -> None:
    from ddexport.runtime.manifest import sha256_of

    folder = build()
    plan = folder / "student_fp32.plan"
    sidecar = folder / "student_fp32.json"
    was = sha256_of(plan)
    plan.write_bytes(b"x" * plan.stat().st_size)
    change_sidecar(sidecar, was, sha256_of(plan))
    with pytest.raises(BackendError, match=r"cannot load student_fp32\.plan: magicTag is wrong"):
        opened(bundle)
    assert gpu.cuda.left_behind == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"optimum": 4', '"optimum": 5', r"is not what its sidecar says: profiles 1/4/8"),
        ('"student"', '"decoder"', "is a second decoder of its folder"),
    ],
)
def test_a_plan_that_its_sidecar_does_not_describe(
    gpu: Any, bundle: Path, build: Build, old: str, new: str, message: str
) -> None:
    sidecar = build() / "student_fp32.json"
    change_sidecar(sidecar, old, new)
    if "second" in message:
        from ddexport.runtime.fit import builds

        assert any(message in error.message for error in builds(bundle)[1])
        return
    with pytest.raises(BackendError, match=message):
        opened(bundle)
    assert gpu.cuda.left_behind == []


def test_a_package_that_does_not_start_says_why(
    gpu: Any, bundle: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(logger: Any) -> None:
        logger.log(gpu.rtx.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    build()
    monkeypatch.setattr(gpu.rtx, "Runtime", none)
    with pytest.raises(BackendError, match="tensorrt-rtx cannot start: CUDA initialization failure"):
        opened(bundle)
    assert gpu.cuda.left_behind == []


def test_only_a_version_compatible_plan_may_bring_code(gpu: Any, bundle: Path, build: Build) -> None:
    build("tensorrt")
    opened(bundle).close()
    assert gpu.full.host_code_allowed == [False, False]
    build("tensorrt", version_compatible=True)
    opened(bundle).close()
    assert gpu.full.host_code_allowed[2:] == [True, True]


def test_images_from_engines_are_those_of_onnxruntime(gpu: Any, bundle: Path, build: Build) -> None:
    """A whole request, in two steps; `auto` takes the engines, and batches of their size."""
    with runtime.load(bundle, backend="onnxruntime", provider="cpu", threads=1) as pipe:
        want = pipe([0, 1, 2], 2, num_images=3, seed=4, output="numpy", batch_size=2)
    build(profiles=((1, 4, 4),))
    with runtime.load(bundle) as pipe:
        assert (pipe.backend.name, pipe.backend.provider, pipe.precision) == (
            "tensorrt",
            "tensorrt-rtx",
            "fp32",
        )
        have = pipe([0, 1, 2], 2, num_images=3, seed=4, output="numpy")
    np.testing.assert_array_equal(have.steps[-1].tokens, want.steps[-1].tokens)
    assert abs(np.subtract(have.images, want.images, dtype=int)).max() <= 1
    assert {size for _, size in gpu.rtx.executed} == {4, 1}


def test_the_real_bindings_have_what_is_called() -> None:
    """Every call of the fake device exists in cuda-bindings under that name."""
    real = pytest.importorskip("cuda.bindings.runtime")
    used = set(re.findall(r'_call\("(\w+)"|self\._cuda\.(\w+)', Path(source("_cuda")).read_text()))
    names = {one or other for one, other in used}
    assert len(names) > 15
    assert {name for name in names if not hasattr(real, name)} == set()


def source(name: str) -> str:
    file = importlib.import_module(f"runtime.backends.{name}").__file__
    assert file
    return file


def test_the_real_bindings_fail_in_words_without_a_gpu() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    if not int(real.cudaGetDeviceCount()[0]):
        pytest.skip("there is a GPU")
    with pytest.raises(CudaError, match=r"cudaSetDevice failed: .* \(cudaError\w+\)"):
        CudaDevice(0)


@pytest.mark.tensorrt
def test_the_real_package_has_what_is_called() -> None:
    """Every attribute that the runtime takes from TensorRT-RTX exists there."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert {"WHOLE_GRAPH_CAPTURE", "DISABLED"} <= set(trt.CudaGraphStrategy.__members__)
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__
    wanted = {
        trt.Runtime: "deserialize_cuda_engine engine_host_code_allowed",
        trt.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape"
        " get_tensor_profile_shape num_optimization_profiles device_memory_size_v2 create_execution_context"
        " create_runtime_config",
        trt.IRuntimeConfig: "cuda_graph_strategy create_runtime_cache set_runtime_cache",
        trt.IRuntimeCache: "serialize deserialize",
        trt.IExecutionContext: "set_input_shape set_tensor_address set_optimization_profile_async"
        " execute_async_v3 set_device_memory",
        trt.ILogger: "INTERNAL_ERROR ERROR log",
        trt.DataType: "FLOAT INT64",
        trt.TensorIOMode: "INPUT",
    }
    missing = [
        f"{kind.__name__}.{n}"
        for kind, names in wanted.items()
        for n in names.split()
        if not hasattr(kind, n)
    ]
    assert missing == []
