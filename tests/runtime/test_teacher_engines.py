"""The teacher on the fake device of `fake_cuda.py`: engines with more dynamic sizes than the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.backends.tensorrt import TensorRt
from ddexport.runtime.engines import Profile, SizeRange, find_engines, read_engine
from ddexport.runtime.errors import BackendError
from ddexport.runtime.manifest import read_manifest
from ddexport.runtime.options import Options

from ddexport import runtime

ROLES = ("student", "student@4", "teacher", "decoder")
ANY = (SizeRange("new", 1, 2, 6), SizeRange("capacity", 4, 6, 6))
SHORT = (SizeRange("new", 1, 1, 2), SizeRange("capacity", 4, 6, 6))
Build = Callable[..., Path]


@pytest.fixture
def build(teacher_bundle: Path, write_engines: Build) -> Build:
    """Engines of all graphs of the toy bundle with a teacher."""
    return partial(write_engines, teacher_bundle, roles=ROLES, others=(ANY,))


def opened(bundle: Path, kind: Any = TensorRt, **options: Any) -> Any:
    backend = kind(
        bundle, {"teacher": read_manifest(bundle, verify=False).graph("teacher")}, Options(**options)
    )
    backend.open()
    return backend


def feeds(batch: int, new: int, capacity: int = 6, filled: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(batch * 100 + new * 10 + filled)
    return {
        "tokens": rng.integers(0, 5, (batch, 6)),
        "label": rng.integers(0, 3, batch),
        "positions": np.arange(filled, filled + new),
        "guidance": rng.random(batch).astype(np.float32),
        "filled": np.array([filled]),
        **{
            name: rng.standard_normal((2, batch, 1, capacity, 2)).astype(np.float32)
            for name in ("key_0", "value_0")
        },
    }


def assert_equal(have: dict[str, Any], want: dict[str, Any]) -> None:
    assert have.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value, atol=1e-5)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_images_are_those_of_onnx_runtime(
    gpu: Any, teacher_bundle: Path, build: Build, backend: str, cuda_graphs: bool
) -> None:
    """Student and teacher in turn, and the teacher alone, greedy and drawn; five images by engines that take
    two to four, again and again, so that graphs are recorded and replayed."""
    build(backend, profiles=((2, 3, 4),))
    load = partial(runtime.load, teacher_bundle)
    with load("onnxruntime", threads=1) as truth, load("tensorrt", cuda_graphs=cuda_graphs) as engines:
        for steps, sampling in ((3, {}), (4, {"top_k": 1}), ("teacher", {}), ("teacher", {"top_k": 1})):
            want, have = (
                pipe([0, 2, 1, 1, 0], steps, seed=3, output="numpy", batch_size=5, **sampling)
                for pipe in (truth, engines)
            )
            for one, other in zip(want.steps, have.steps, strict=True):
                np.testing.assert_array_equal(other.tokens, one.tokens)
                np.testing.assert_allclose(other.sequence, one.sequence, atol=1e-5)
            assert np.abs(have.images.astype(int) - want.images).max() <= 1
    assert gpu.cuda.left_behind == []
    assert (gpu.full.recorded > 0) == (backend == "tensorrt" and cuda_graphs)


def test_every_size_of_a_pass_gives_what_the_graph_gives(
    gpu: Any, teacher_bundle: Path, build: Build
) -> None:
    """Padded, exact, split; one position and all; and each again when others have used the buffers."""
    build("tensorrt", profiles=((2, 3, 4),))
    engines, truth = opened(teacher_bundle), opened(teacher_bundle, OnnxRuntime, threads=1)
    sizes = [(1, 6, 6, 0), (5, 1, 6, 5), (4, 2, 5, 2), (2, 1, 4, 0), (3, 4, 6, 1), (9, 3, 6, 3)]
    for batch, new, capacity, filled in (*sizes, *sizes, *reversed(sizes)):
        given = feeds(batch, new, capacity, filled)
        assert_equal(engines.run("teacher", given), truth.run("teacher", given))
    assert gpu.full.recorded > 0
    engines.close()
    assert gpu.cuda.left_behind == []


def test_a_profile_is_picked_by_all_sizes(gpu: Any, teacher_bundle: Path, build: Build) -> None:
    """The tuned one where both can, the only one that can where one can, whatever the batch prefers."""
    build("tensorrt", profiles=((1, 2, 4),), others=(ANY, SHORT))
    engines = opened(teacher_bundle, cuda_graphs=False)
    for new, number in ((1, 1), (2, 0), (5, 0)):
        gpu.full.executed.clear()
        engines.run("teacher", feeds(5, new))
        assert gpu.full.executed == [(number, 4), (number, 1)]
    with pytest.raises(
        BackendError, match=r"no profile of the engine takes new 1, capacity 3: 1/2/4 \(new 1/2/6"
    ):
        engines.run("teacher", feeds(1, 1, capacity=3))
    engines.close()
    assert gpu.cuda.left_behind == []


def test_buffers_are_made_once(gpu: Any, teacher_bundle: Path, build: Build) -> None:
    """As large as the profiles' largest sizes, whatever comes."""
    build("tensorrt", profiles=((1, 2, 4),), others=(SHORT, ANY))
    engines = opened(teacher_bundle)
    before = {kind: gpu.cuda.allocated(kind) for kind in ("host", "device")}
    graph = read_manifest(teacher_bundle).graph("teacher")
    largest = {"batch": 4, "new": 6, "capacity": 6}
    tensors = sum(
        int(np.prod(spec.sized(largest))) * np.dtype(spec.dtype).itemsize
        for spec in (*graph.inputs, *graph.outputs)
    )
    assert before["host"] == tensors
    calls = gpu.cuda.calls.copy()
    for number in range(60):
        engines.run("teacher", feeds(1 + number % 7, 1 + number % 6))
    assert {kind: gpu.cuda.allocated(kind) for kind in ("host", "device")} == before
    assert gpu.cuda.calls["cudaMalloc"] == calls["cudaMalloc"]
    engines.close()


def test_passes_that_come_in_turn_keep_their_contexts(gpu: Any, teacher_bundle: Path, build: Build) -> None:
    """As many as the ten scales of a published teacher: none is made again, and all replay their graphs."""
    build("tensorrt", profiles=((1, 2, 4),))
    engines = opened(teacher_bundle)
    for _ in range(3):
        for number in range(10):
            engines.run("teacher", feeds(1 + number // 5, 1 + number % 5))
    assert sum(len(engine.contexts) for engine in gpu.full.engines) == 10
    assert gpu.full.recorded == 10
    assert gpu.cuda.calls["cudaGraphLaunch"] == 20
    engines.close()


def test_a_bundle_without_an_engine_of_its_teacher_says_so(
    gpu: Any, teacher_bundle: Path, build: Build
) -> None:
    """The student still runs, as before there were engines of teachers."""
    build(roles=("student", "student@4", "decoder"))
    with runtime.load(teacher_bundle, "tensorrt") as engines:
        assert engines(0, 1, output="sequence").images.shape == (1, 6, 4)
        with pytest.raises(BackendError, match="there is no teacher engine") as caught:
            engines(0, "teacher")
    assert "ddexport trt" in caught.value.hint


def test_sidecars_say_all_sizes(teacher_bundle: Path, build: Build) -> None:
    """Those of a teacher only: what was written of students before, reads and is written as it was."""
    folder = build()
    engine = read_engine(teacher_bundle, folder / "teacher_fp32.json")
    assert engine.profiles == (Profile(1, 4, 8, ANY),)
    assert str(engine.profiles[0]) == "1/4/8 (new 1/2/6, capacity 4/6/6)"
    assert json.loads(engine.to_json()) == json.loads((folder / "teacher_fp32.json").read_text())
    student = json.loads((folder / "student_fp32.json").read_text())
    assert student["profiles"] == [{"minimum": 1, "optimum": 4, "maximum": 8}]


@pytest.mark.parametrize(
    ("file", "others", "message"),
    [
        ("teacher", [], "profiles must give the range of batch, new, capacity, each once"),
        ("teacher", ["new", "new", "capacity"], "profiles must give the range of"),
        ("teacher", ["capacity", "batch"], "profiles must give the range of"),
        ("student", ["new"], "profiles must give the range of batch, each once"),
    ],
)
def test_a_sidecar_with_other_sizes_than_its_tensors_is_named(
    teacher_bundle: Path, build: Build, file: str, others: list[str], message: str
) -> None:
    path = build() / f"{file}_fp32.json"
    content = json.loads(path.read_text())
    content["profiles"][0]["others"] = [
        {"name": name, "minimum": 1, "optimum": 1, "maximum": 6} for name in others
    ]
    path.write_text(json.dumps(content))
    found, errors = find_engines(teacher_bundle)
    assert file not in [each.engine.role for each in found]
    assert message in errors[0].message


def test_a_sidecar_with_a_range_out_of_order_is_named(teacher_bundle: Path, build: Build) -> None:
    path = build() / "teacher_fp32.json"
    content = json.loads(path.read_text())
    content["profiles"][0]["others"][1]["optimum"] = 99
    path.write_text(json.dumps(content))
    assert "1 <= minimum <= optimum <= maximum" in find_engines(teacher_bundle)[1][0].message


def test_a_plan_with_other_ranges_than_its_sidecar_is_refused(
    gpu: Any, teacher_bundle: Path, build: Build
) -> None:
    """Its buffers would be too small, or its passes outside of its profile."""
    path = build() / "teacher_fp32.json"
    content = json.loads(path.read_text())
    content["profiles"][0]["others"][0]["maximum"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(BackendError, match=r"not what its sidecar says: profiles 1/4/8 \(new 1/2/6"):
        opened(teacher_bundle)
    assert gpu.cuda.left_behind == []
