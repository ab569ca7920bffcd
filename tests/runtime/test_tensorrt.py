"""The backend for engines, on a GPU made of plain memory (`fake_cuda.py`, `fake_tensorrt.py`).

What only a real GPU can show is in tests/gpu.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import re
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from ddexport.runtime.backends import _cuda
from ddexport.runtime.backends._cuda import CudaDevice
from ddexport.runtime.backends.tensorrt import MAX_CONTEXTS, TensorRt
from ddexport.runtime.bundle import Manifest
from ddexport.runtime.errors import BackendError, BundleError, DDError

_spec = importlib.util.spec_from_file_location("fake_tensorrt", Path(__file__).with_name("fake_tensorrt.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

BACKENDS = ("tensorrt", "tensorrt-rtx")
STEP = ("sequence", "tokens")
Opener = Callable[..., TensorRt]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


@pytest.fixture
def manifest(root: Path) -> Manifest:
    made: Manifest = fake.write_bundle(root)
    return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return fake.install(monkeypatch, tmp_path / "cache")


@pytest.fixture
def opened(gpu: Any, root: Path, manifest: Manifest) -> Opener:
    """`opened("tensorrt", ...)`: the backend with new engines; nothing is on the device yet."""

    def make(backend: str = "tensorrt", **changes: Any) -> TensorRt:
        shutil.rmtree(root / "engines", ignore_errors=True)
        fake.write_engines(root, manifest, backend, **changes)
        (configuration, *_) = TensorRt.configurations(root, manifest, None, "cuda:0")
        assert configuration.obstacle == ""
        return TensorRt(root, manifest, configuration)

    return make


def feeds(batch: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((batch, 6, 4), np.float32)
    return {"latents": latents, "label": rng.integers(0, 3, batch), "known": rng.integers(0, 7, batch)}


def run(backend: TensorRt, role: str, given: dict[str, Any], names: tuple[str, ...] | None = None) -> Any:
    return backend.run(backend.manifest.graph(role), given, names)


def check(backend: TensorRt, batch: int, seed: int = 0) -> None:
    """All outputs of both roles are those of the graphs."""
    given = feeds(batch, seed)
    have, want = run(backend, "student", given), fake.compute("student", given)
    picture = {"sequence": want["sequence"]}
    have |= run(backend, "decoder", picture)
    want |= fake.compute("decoder", picture)
    assert have.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_batch_gives_what_the_graph_gives(gpu: Any, opened: Opener, backend: str) -> None:
    """Below the smallest batch, within, at the ends, several times the largest; and again, now recorded."""
    engines = opened(backend, profiles=((2, 3, 5),))
    assert engines.max_batch == 5
    for batch in (1, 2, 3, 5, 6, 11, 3, 1, 11, 4):
        check(engines, batch, seed=batch)
    executed = gpu.package(backend).executed
    assert {size for _, size in executed} == {2, 3, 4, 5}  # a batch of one was padded to two
    assert (gpu.cuda.calls["cudaGraphLaunch"] > 0) == (backend == "tensorrt")
    strategies = {config.cuda_graph_strategy for engine in gpu.rtx.engines for config in engine.configs}
    assert strategies == ({"WHOLE"} if backend == "tensorrt-rtx" else set())
    engines.close()
    assert gpu.cuda.left_behind == []


def test_results_and_inputs_are_the_callers_own(opened: Opener) -> None:
    """Results are no views of a buffer; inputs may have any memory layout."""
    engines = opened()
    first = run(engines, "student", feeds(3, seed=1))
    kept = {name: value.copy() for name, value in first.items()}
    given = feeds(6) | {"latents": np.asfortranarray(feeds(6)["latents"])}
    half = {name: value[::2] for name, value in given.items()}
    for name, value in run(engines, "student", half).items():
        np.testing.assert_allclose(value, fake.compute("student", half)[name], atol=1e-6)
        np.testing.assert_array_equal(first[name], kept[name])


def test_logits_stay_on_the_device_unless_asked_for(gpu: Any, opened: Opener) -> None:
    """8.5 MB an image for llamagen-l: neither copied, nor given page-locked memory."""
    engines = opened()
    assert set(run(engines, "student", feeds(3), STEP)) == set(STEP)
    assert gpu.cuda.downloaded == [3 * 6 * 4 * 4, 3 * 2 * 8]
    host = gpu.cuda.allocated("host")
    run(engines, "student", feeds(3))
    assert gpu.cuda.allocated("host") - host == 8 * 2 * 5 * 4
    engines.close()
    assert gpu.cuda.left_behind == []


def test_each_profile_runs_its_own_batches(gpu: Any, opened: Opener) -> None:
    engines = opened("tensorrt-rtx", profiles=((1, 1, 1), (2, 4, 4), (8, 8, 16)))
    for batch, want in ((1, [(0, 1)]), (3, [(1, 3)]), (6, [(2, 8)]), (17, [(2, 16), (0, 1)])):
        gpu.rtx.executed.clear()
        run(engines, "student", feeds(batch))
        assert gpu.rtx.executed == want


def test_buffers_are_made_once_and_contexts_are_bounded(gpu: Any, opened: Opener) -> None:
    """Requests of every size need no more memory than the first; the size not used for longest makes room."""
    engines = opened(profiles=((1, 4, 20),))
    check(engines, 1)
    before, calls = {kind: gpu.cuda.allocated(kind) for kind in ("host", "device")}, gpu.cuda.calls.copy()
    for batch in [*range(1, 21)] * 2 + [20, 20]:
        check(engines, batch)
        assert len(gpu.cuda.graphs) <= 2 * MAX_CONTEXTS
    assert {kind: gpu.cuda.allocated(kind) for kind in ("host", "device")} == before
    assert gpu.cuda.calls["cudaStreamCreateWithFlags"] == calls["cudaStreamCreateWithFlags"] == 1
    for engine in gpu.full.engines:
        assert len({context.scratch for context in engine.contexts}) == 1, "contexts share their memory"
    engines.close()
    assert gpu.cuda.left_behind == []


def test_a_batch_size_is_recorded_when_it_comes_again(gpu: Any, opened: Opener) -> None:
    """The first run of a size prepares it, the second records it, all others replay."""
    engines = opened()
    for _ in range(5):
        run(engines, "student", feeds(4))
    assert gpu.full.executed == [(0, 4), (0, 4)]
    assert gpu.cuda.calls["cudaGraphLaunch"] == 4
    run(engines, "student", feeds(3))
    assert gpu.cuda.calls["cudaStreamBeginCapture"] == 1


def test_without_graphs_it_goes_on_and_says_so_once(
    gpu: Any, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    for trouble in ("cudaStreamBeginCapture", "cudaGraphInstantiate", "enqueue"):
        gpu.cuda.fail(trouble, fake.fake_cuda.Error.cudaErrorInvalidValue)
        gpu.full.refuse_to_record = trouble == "enqueue"
        engines = opened()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for batch in (2, 2, 2, 3, 3, 2):
                given = feeds(batch)
                have, want = run(engines, "student", given, STEP), fake.compute("student", given)
                np.testing.assert_allclose(have["sequence"], want["sequence"], atol=1e-6)
        (record,) = caplog.records
        assert "CUDA graphs are not used for student_fp32.plan: " in record.getMessage()
        engines.close()
        assert gpu.cuda.left_behind == []
        gpu.cuda.fails.clear()


def test_what_tensorrt_rtx_compiles_is_kept(opened: Opener, tmp_path: Path) -> None:
    """In one file for each engine and GPU; a foreign one is made anew; one that cannot be kept is no harm."""
    folder = tmp_path / "cache" / "ddexport" / "compiled"

    def use() -> list[Path]:
        engines = opened("tensorrt-rtx")
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


def test_threads_take_turns(gpu: Any, opened: Opener) -> None:
    """The buffers are shared: nobody may get another one's images. Every thread sets its device."""
    engines = opened()
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


def test_closing_frees_engines_too(gpu: Any, opened: Opener) -> None:
    """The packages free an engine when nobody refers to it any more."""
    for backend in BACKENDS:
        engines, package = opened(backend), gpu.package(backend)
        check(engines, 2)
        alive = [weakref.ref(engine) for engine in package.engines]
        assert len(alive) == 2
        package.engines.clear()
        engines.close()
        engines.close()
        gc.collect()
        assert [reference() for reference in alive] == [None, None]
        with pytest.raises(BackendError, match="backend tensorrt is closed"):
            run(engines, "student", feeds(1))


def test_a_failing_free_leaves_nothing_else(gpu: Any, opened: Opener) -> None:
    for name in ("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy", "cudaSetDevice", "cudaStreamDestroy"):
        engines = opened()
        for _ in range(2):
            check(engines, 2)
        gpu.cuda.fail(name, fake.fake_cuda.Error.cudaErrorIllegalAddress)
        with pytest.raises(BackendError, match=f"{name} failed"):
            engines.close()
        gpu.cuda.fails.clear()
        assert gpu.cuda.left_behind == [], name


def test_a_failure_while_opening_leaves_nothing_behind(gpu: Any, opened: Opener) -> None:
    """Wherever it happens, and it names the call."""
    for name in ("cudaSetDevice", "cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"):
        for after in range(8):
            engines = opened()
            gpu.cuda.fail(name, fake.fake_cuda.Error.cudaErrorMemoryAllocation, after)
            try:
                check(engines, 2)
            except BackendError as error:
                assert error.message.startswith(f"{name} failed: the fake says 2 (cudaErrorMemoryAllocation)")
                assert "smaller batches" in error.hint
            gpu.cuda.fails.clear()
            engines.close()
            assert gpu.cuda.left_behind == [], (name, after)


def test_a_failing_run_tells_its_reason_and_the_next_is_right(gpu: Any, opened: Opener) -> None:
    for backend in BACKENDS:
        engines, package = opened(backend), gpu.package(backend)
        for flag, message in (
            ("no_contexts", "create_execution_context failed: out of memory, says the fake"),
            ("refuse_to_run", "execute_async_v3 failed: the fake refuses"),
        ):
            setattr(package, flag, True)
            with pytest.raises(BackendError, match=message):
                run(engines, "student", feeds(2))
            setattr(package, flag, False)
            check(engines, 2)
        for name in ("cudaSetDevice", "cudaMemcpyAsync", "cudaStreamSynchronize"):
            gpu.cuda.fail(name, fake.fake_cuda.Error.cudaErrorIllegalAddress)
            with pytest.raises(BackendError, match=rf"{name} failed: .*\(cudaErrorIllegalAddress\)"):
                run(engines, "student", feeds(2))
            gpu.cuda.fails.clear()
            check(engines, 2)
        engines.close()
        assert gpu.cuda.left_behind == []


def test_what_the_sidecar_does_not_describe_is_not_run(
    gpu: Any, opened: Opener, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's hash before it is loaded; its tensors and profiles, and what the package says, after."""
    rows: list[tuple[dict[str, Any], str]] = [
        ({"has_profiles": ((1, 5, 8),)}, "student_fp32.plan has other profiles than its sidecar: 1/5/8"),
        ({"has_tensor": ("known", "float32", ("batch",))}, "the inputs of student_fp32.plan are not those"),
        ({"has_tensor": ("given", "int64", ("batch",))}, "the inputs of student_fp32.plan are not those"),
        ({"has_tensor": ("known", "int64", (2,))}, "the inputs of student_fp32.plan are not those"),
    ]
    for changes, message in rows:
        engines = opened(**changes)
        with pytest.raises(BackendError, match=message):
            run(engines, "student", feeds(2))
        engines.close()
    engines, loaded = opened(), len(gpu.full.host_code_allowed)
    for plan in root.glob("engines/*/student_fp32.plan"):
        plan.write_bytes(plan.read_bytes()[:-1] + b" ")
    with pytest.raises(BundleError, match=r"the SHA-256 of student_fp32\.plan is not the one"):
        run(engines, "student", feeds(1))
    assert len(gpu.full.host_code_allowed) == loaded, "no plan was given to the package"
    engines.close()
    engines = opened()
    monkeypatch.setattr("ddexport.runtime.backends.tensorrt._read_plan", lambda path, sha256: b"no plan")
    with pytest.raises(BackendError, match=r"loading student_fp32\.plan failed: magicTag is wrong"):
        run(engines, "student", feeds(1))
    gpu.full.broken = True
    with pytest.raises(BackendError, match="starting tensorrt failed: CUDA initialization failure"):
        run(engines, "student", feeds(1))
    engines.close()
    assert gpu.cuda.left_behind == []


def test_only_a_version_compatible_plan_may_bring_code(gpu: Any, opened: Opener) -> None:
    check(opened(), 1)
    check(opened(version_compatible=True), 1)
    assert gpu.full.host_code_allowed == [False, False, True, True]


def test_rows_are_copied_within_the_device(gpu: Any) -> None:
    """As a teacher's cache is appended to: rows of one array into wider ones of another."""
    device = CudaDevice(0)
    source, target = device.allocate(3 * 4), device.allocate(3 * 10)
    gpu.cuda.memory[source][1][:] = np.arange(12)
    device.copy_rows(target + 2, 10, source, 4, 4, 3)
    rows = gpu.cuda.memory[target][1].reshape(3, 10)
    np.testing.assert_array_equal(rows[:, 2:6], np.arange(12).reshape(3, 4))
    assert (rows[:, :2] == fake.fake_cuda.POISON).all() and (rows[:, 6:] == fake.fake_cuda.POISON).all()
    assert gpu.cuda.calls["cudaDeviceSynchronize"] == 1


def test_the_real_bindings_have_what_is_called_and_fail_in_words() -> None:
    """Every call of the fake device exists in cuda-bindings under that name."""
    real = pytest.importorskip("cuda.bindings.runtime")
    source = Path(str(_cuda.__file__)).read_text()
    names = {one or other for one, other in re.findall(r'_call\("(\w+)"|self\._cuda\.(\w+)', source)}
    assert len(names) > 15 and {name for name in names if not hasattr(real, name)} == set()
    if int(real.cudaGetDeviceCount()[0]):
        with pytest.raises(DDError, match=r"cudaSetDevice failed: .* \(cudaError\w+\)"):
            CudaDevice(0)


@pytest.mark.tensorrt
def test_the_real_package_has_what_is_called() -> None:
    """Every attribute that the runtime takes from TensorRT-RTX exists there."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert "WHOLE_GRAPH_CAPTURE" in trt.CudaGraphStrategy.__members__
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
    attributes = [(kind, name) for kind, names in wanted.items() for name in names.split()]
    assert [(kind, name) for kind, name in attributes if not hasattr(kind, name)] == []
