"""The backend for engines, on a GPU made of plain memory (`fake_cuda.py`, `fake_tensorrt.py`).

What only a real GPU can show is in tests/gpu.
"""

from __future__ import annotations

import gc
import logging
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from ddexport.runtime.backends import _cuda
from ddexport.runtime.backends.tensorrt import MAX_CONTEXTS, TensorRt
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BackendError, BundleError
from tests.runtime import fake_tensorrt as fake
from tests.runtime.fake_cuda import Error

BACKENDS = ("tensorrt", "tensorrt-rtx")
STEP = ("sequence", "tokens")
Opener = Callable[..., TensorRt]


@pytest.fixture
def engines_of(gpu: Any, bundle: Path) -> Opener:
    """`engines_of("tensorrt", ...)`: the backend with new engines; nothing is on the device yet."""
    manifest = read_manifest(bundle)

    def make(backend: str = "tensorrt", **changes: Any) -> TensorRt:
        shutil.rmtree(bundle / "engines", ignore_errors=True)
        fake.write_engines(bundle, manifest, backend, **changes)
        (configuration, *_) = TensorRt.configurations(bundle, manifest, None, "cuda:0")
        assert configuration.obstacle == ""
        return TensorRt(bundle, manifest, configuration)

    return make


def feeds(batch: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((batch, 6, 4), np.float32)
    return {"latents": latents, "label": rng.integers(0, 3, batch), "known": rng.integers(0, 7, batch)}


def run(backend: TensorRt, given: dict[str, Any], names: tuple[str, ...] | None = None) -> Any:
    return backend.run(backend.manifest.graph("student"), given, names)


def assert_close(have: dict[str, Any], want: dict[str, Any]) -> None:
    assert have.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value, atol=1e-5)


def check(backend: TensorRt, batch: int, seed: int = 0) -> None:
    """All outputs of both roles are those of the graphs."""
    given = feeds(batch, seed)
    want = fake.compute("student", given)
    assert_close(run(backend, given), want)
    picture = {"sequence": want["sequence"]}
    image = backend.run(backend.manifest.graph("decoder"), picture)
    assert_close(image, fake.compute("decoder", picture))


def test_any_batch_gives_what_the_graph_gives(gpu: Any, engines_of: Opener) -> None:
    """Below the smallest batch, within, at the ends, several times the largest; and again, now recorded. Each
    profile runs its own batches."""
    for backend in BACKENDS:
        engines, launched = engines_of(backend, profiles=((2, 3, 5),)), gpu.cuda.calls["cudaGraphLaunch"]
        assert engines.max_batch == 5
        for batch in (1, 2, 3, 5, 6, 11, 3, 1, 11, 4):
            check(engines, batch, seed=batch)
        executed = gpu.package(backend).executed
        assert {size for _, size in executed} == {2, 3, 4, 5}  # a batch of one was padded to two
        assert (gpu.cuda.calls["cudaGraphLaunch"] > launched) == (backend == "tensorrt")
        strategies = {config.cuda_graph_strategy for engine in gpu.rtx.engines for config in engine.configs}
        assert strategies == ({"WHOLE"} if backend == "tensorrt-rtx" else set())
        engines.close()
        assert gpu.cuda.left_behind == []
    engines = engines_of("tensorrt-rtx", profiles=((1, 1, 1), (2, 4, 4), (8, 8, 16)))
    for batch, want in ((1, [(0, 1)]), (3, [(1, 3)]), (6, [(2, 8)]), (17, [(2, 16), (0, 1)])):
        gpu.rtx.executed.clear()
        run(engines, feeds(batch))
        assert gpu.rtx.executed == want


def test_results_and_inputs_are_the_callers_own_and_logits_stay_on_the_device(
    gpu: Any, engines_of: Opener
) -> None:
    """Results are no views of a buffer; inputs may have any memory layout. What is not asked for (8.5 MB of
    logits per image for llamagen-l) is neither copied, nor given page-locked memory."""
    engines = engines_of()
    assert set(run(engines, feeds(3), STEP)) == set(STEP)
    assert gpu.cuda.downloaded == [3 * 6 * 4 * 4, 3 * 2 * 8]
    host = gpu.cuda.allocated("host")
    first = run(engines, feeds(3, seed=1))
    assert gpu.cuda.allocated("host") - host == 8 * 2 * 5 * 4
    kept = {name: value.copy() for name, value in first.items()}
    given = feeds(6) | {"latents": np.asfortranarray(feeds(6)["latents"])}
    half = {name: value[::2] for name, value in given.items()}
    assert_close(run(engines, half), fake.compute("student", half))
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])


def test_buffers_and_recordings_are_made_once_and_contexts_are_bounded(gpu: Any, engines_of: Opener) -> None:
    """The first run of a size prepares it, the second records it, all others replay. Requests of every size
    need no more memory than the first; the size not used for longest makes room."""
    engines = engines_of(profiles=((1, 4, 20),))
    for _ in range(5):
        run(engines, feeds(4))
    assert gpu.full.executed == [(0, 4), (0, 4)]
    assert gpu.cuda.calls["cudaGraphLaunch"] == 4
    run(engines, feeds(3))
    assert gpu.cuda.calls["cudaStreamBeginCapture"] == 1
    check(engines, 1)
    before = {kind: gpu.cuda.allocated(kind) for kind in ("host", "device")}
    for batch in [*range(1, 21)] * 2 + [20, 20]:
        check(engines, batch)
        assert len(gpu.cuda.graphs) <= 2 * MAX_CONTEXTS
    assert {kind: gpu.cuda.allocated(kind) for kind in ("host", "device")} == before
    assert gpu.cuda.calls["cudaStreamCreateWithFlags"] == 1
    for engine in gpu.full.engines:
        assert len({context.scratch for context in engine.contexts}) == 1, "contexts share their memory"


def test_without_graphs_it_goes_on_and_says_so_once(
    gpu: Any, engines_of: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    for trouble in ("cudaStreamBeginCapture", "cudaGraphInstantiate", "enqueue"):
        gpu.cuda.fail(trouble, Error.cudaErrorInvalidValue)
        gpu.full.refuse_to_record = trouble == "enqueue"
        engines = engines_of()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for batch in (2, 2, 2, 3, 3, 2):
                given = feeds(batch)
                assert_close(run(engines, given), fake.compute("student", given))
        (record,) = caplog.records
        assert "student_fp32.plan" in record.getMessage()
        engines.close()
        assert gpu.cuda.left_behind == []
        gpu.cuda.fails.clear()


def test_what_tensorrt_rtx_compiles_is_kept(engines_of: Opener, tmp_path: Path) -> None:
    """In one file for each engine and GPU; a foreign one is made anew; one that cannot be kept is no harm."""
    folder = tmp_path / "cache" / "ddexport" / "compiled"

    def use() -> list[Path]:
        engines = engines_of("tensorrt-rtx")
        check(engines, 2)
        engines.close()
        return sorted(folder.iterdir()) if folder.is_dir() else []

    files = use()
    assert len(files) == 2 and all(file.name.endswith("-1.7.1.116-sm89.bin") for file in files)
    times = [file.stat().st_mtime_ns for file in files]
    assert [file.stat().st_mtime_ns for file in use()] == times
    files[0].write_bytes(b"of another GPU")
    use()
    assert {file.read_bytes() for file in files} == {b"compiled here"}
    for file in files:
        file.unlink()
    folder.rmdir()
    folder.touch()
    assert use() == []


def test_threads_take_turns(gpu: Any, engines_of: Opener) -> None:
    """The buffers are shared: nobody may get another one's images. Every thread sets its device."""
    engines = engines_of()
    check(engines, 1)
    before = gpu.cuda.calls["cudaSetDevice"]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: check(engines, 1 + number % 5, seed=number), range(60)))
    assert gpu.cuda.calls["cudaSetDevice"] - before == 120
    assert len(gpu.full.engines) == 2, "each graph was opened once"
    closing = Thread(target=engines.close)
    closing.start()
    closing.join()
    assert gpu.cuda.left_behind == []


def test_closing_frees_engines_too_and_a_failing_free_leaves_nothing_else(
    gpu: Any, engines_of: Opener
) -> None:
    """The packages free an engine when nobody refers to it any more."""
    for backend in BACKENDS:
        engines, package = engines_of(backend), gpu.package(backend)
        check(engines, 2)
        alive = [weakref.ref(engine) for engine in package.engines]
        assert len(alive) == 2
        package.engines.clear()
        engines.close()
        engines.close()
        gc.collect()
        assert [reference() for reference in alive] == [None, None]
        with pytest.raises(BackendError, match="closed"):
            run(engines, feeds(1))
    for name in ("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy", "cudaSetDevice", "cudaStreamDestroy"):
        engines = engines_of()
        for _ in range(2):
            check(engines, 2)
        gpu.cuda.fail(name, Error.cudaErrorIllegalAddress)
        with pytest.raises(BackendError, match=name):
            engines.close()
        gpu.cuda.fails.clear()
        assert gpu.cuda.left_behind == [], name


def test_a_failure_while_opening_leaves_nothing_behind(gpu: Any, engines_of: Opener) -> None:
    """Wherever it happens, and it names the call."""
    failed = set()
    for name in ("cudaSetDevice", "cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"):
        for after in range(8):
            engines = engines_of()
            gpu.cuda.fail(name, Error.cudaErrorMemoryAllocation, after)
            try:
                check(engines, 2)
            except BackendError as error:
                assert error.message.startswith(name) and "smaller batches" in error.hint
                failed.add(name)
            gpu.cuda.fails.clear()
            engines.close()
            assert gpu.cuda.left_behind == [], (name, after)
    assert len(failed) == 4


def test_a_failing_run_tells_its_reason_and_the_next_is_right(gpu: Any, engines_of: Opener) -> None:
    for backend in BACKENDS:
        engines, package = engines_of(backend), gpu.package(backend)
        for flag, reason in (("no_contexts", "out of memory"), ("refuse_to_run", "the fake refuses")):
            setattr(package, flag, True)
            with pytest.raises(BackendError, match=reason):
                run(engines, feeds(2))
            setattr(package, flag, False)
            check(engines, 2)
        for name in ("cudaSetDevice", "cudaMemcpyAsync", "cudaStreamSynchronize"):
            gpu.cuda.fail(name, Error.cudaErrorIllegalAddress)
            with pytest.raises(BackendError, match=rf"{name}.*cudaErrorIllegalAddress"):
                run(engines, feeds(2))
            gpu.cuda.fails.clear()
            check(engines, 2)
        engines.close()
        assert gpu.cuda.left_behind == []


def test_what_the_sidecar_does_not_describe_is_not_run(
    gpu: Any, engines_of: Opener, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's hash before it is loaded; its tensors and profiles, and what the package says, after. Only a
    version-compatible plan may bring code."""
    rows: list[tuple[dict[str, Any], str]] = [
        ({"has_profiles": ((1, 5, 8),)}, "1/5/8"),
        ({"has_tensor": ("known", "float32", ("batch",))}, "known float32"),
        ({"has_tensor": ("given", "int64", ("batch",))}, "given int64"),
        ({"has_tensor": ("known", "int64", (2,))}, "known int64"),
        ({"version_compatible": True, "has_profiles": ((1, 5, 8),)}, "1/5/8"),
    ]
    for changes, named in rows:
        engines = engines_of(**changes)
        with pytest.raises(BackendError, match=named):
            run(engines, feeds(2))
        engines.close()
    assert gpu.full.host_code_allowed == [False] * 4 + [True]
    engines, loaded = engines_of(), len(gpu.full.host_code_allowed)
    for plan in bundle.glob("engines/*/student_fp32.plan"):
        plan.write_bytes(plan.read_bytes()[:-1] + b" ")
    with pytest.raises(BundleError, match=r"student_fp32\.plan"):
        run(engines, feeds(1))
    assert len(gpu.full.host_code_allowed) == loaded, "no plan was given to the package"
    engines.close()
    engines = engines_of()
    monkeypatch.setattr("ddexport.runtime.backends.tensorrt._read_plan", lambda path, sha256: b"no plan")
    with pytest.raises(BackendError, match="magicTag is wrong"):
        run(engines, feeds(1))
    gpu.full.broken = True
    with pytest.raises(BackendError, match="CUDA initialization failure"):
        run(engines, feeds(1))
    engines.close()
    assert gpu.cuda.left_behind == []


def test_the_real_bindings_have_what_is_called() -> None:
    """tests/gpu calls them; the fake device has no other names."""
    text = Path(str(_cuda.__file__)).read_text()
    names = {one or other for one, other in re.findall(r'_call\("(\w+)"|self\._cuda\.(\w+)', text)}
    assert len(names) > 15
    code = f"import cuda.bindings.runtime as real; print(set({names!r}) - set(dir(real)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()" or "ModuleNotFoundError" in done.stderr


@pytest.mark.tensorrt
def test_the_real_package_has_what_is_called() -> None:
    """Every attribute that the runtime takes from TensorRT-RTX exists there."""
    trt = pytest.importorskip("tensorrt_rtx")
    wanted = """
        CudaGraphStrategy.WHOLE_GRAPH_CAPTURE ExecutionContextAllocationStrategy.USER_MANAGED
        Runtime.deserialize_cuda_engine Runtime.engine_host_code_allowed ICudaEngine.num_io_tensors
        ICudaEngine.get_tensor_name ICudaEngine.get_tensor_mode ICudaEngine.get_tensor_dtype
        ICudaEngine.get_tensor_shape ICudaEngine.get_tensor_profile_shape
        ICudaEngine.num_optimization_profiles ICudaEngine.device_memory_size_v2
        ICudaEngine.create_execution_context ICudaEngine.create_runtime_config
        IRuntimeConfig.cuda_graph_strategy IRuntimeConfig.create_runtime_cache
        IRuntimeConfig.set_runtime_cache IRuntimeCache.serialize IRuntimeCache.deserialize
        IExecutionContext.set_input_shape IExecutionContext.set_tensor_address
        IExecutionContext.set_optimization_profile_async IExecutionContext.execute_async_v3
        IExecutionContext.set_device_memory ILogger.INTERNAL_ERROR ILogger.ERROR ILogger.log
        DataType.FLOAT DataType.INT64 TensorIOMode.INPUT
    """
    names = [name.split(".") for name in wanted.split()]
    assert [name for name in names if not hasattr(getattr(trt, name[0]), name[1])] == []
