"""Steps with a teacher, from a request to images: which graphs run on what, and what is reported."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from ddexport import runtime
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.backends.openvino import OpenVino
from ddexport.runtime.errors import BackendError, BundleError, DDError, LabelError, NoiseError, ScheduleError
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.pipeline import Pipeline, default_batch_size
from tests.runtime import toy


@pytest.fixture
def pipe(shared_teacher_bundle: Path) -> Iterator[Pipeline]:
    with runtime.load(shared_teacher_bundle, threads=1) as pipeline:
        yield pipeline


def files(runs: list[Any]) -> list[str]:
    return [file.removesuffix(".onnx") for file, *_ in runs]


def test_three_steps(pipe: Pipeline, runs: list[Any]) -> None:
    """A student step, the teacher behind the student's tokens, and a student step on codes and original
    noise."""
    began, counts = time.perf_counter(), list[int]()
    result = pipe([0, 2], 3, seed=4, num_images=2, on_pass=counts.append)
    assert counts == [4] * 3
    assert 0 < sum(step.seconds for step in result.steps) < time.perf_counter() - began
    assert files(runs) == ["student", "teacher", "student", "decoder"]
    first, teacher, last = result.steps
    assert [step.role for step in result.steps] == ["student", "teacher", "student"]
    noise, (one, two, three, four) = gaussian_noise(4, range(4), 6, 4), [feeds for _, feeds, _ in runs]
    np.testing.assert_array_equal(one["latents"], noise)
    np.testing.assert_array_equal(two["tokens"][:, :2], first.tokens)
    assert two["positions"].tolist() == [0, 1, 2, 3]
    assert pipe.codebook is not None
    np.testing.assert_array_equal(three["latents"][:, :4], pipe.codebook[teacher.tokens])
    np.testing.assert_array_equal(three["latents"][:, 4:], noise[:, 4:])
    assert three["known"].tolist() == [4] * 4
    np.testing.assert_array_equal(teacher.sequence, three["latents"])
    np.testing.assert_array_equal(last.tokens, teacher.tokens[:, :2])  # the split lies before what is known
    np.testing.assert_array_equal(last.sequence, four["sequence"])
    np.testing.assert_array_equal(result.uniforms, uniform_numbers(4, range(4), 6))
    assert list(result.seconds) == ["student", "teacher", "decoder"] and min(result.seconds.values()) > 0
    assert result.seconds["teacher"] == teacher.seconds
    assert result.seconds["student"] == first.seconds + last.seconds


def test_which_graphs_the_other_schedules_run(pipe: Pipeline, runs: list[Any]) -> None:
    """Without a first student step and with another split; the whole teacher, whose codes are decoded; a
    prefix behind the split, of which the nearest codes are taken."""
    counts: list[int] = []
    list(pipe.stream([1, 0, 2], 4, batch_size=2, on_pass=counts.append))
    assert counts == [2] * 4 + [1] * 4
    runs.clear()
    result = pipe(1, 4, seed=1)
    assert files(runs) == ["teacher"] * 3 + ["student_split4", "decoder"]
    assert [step.tokens.shape for step in result.steps] == [(1, 4), (1, 4)]
    np.testing.assert_array_equal(result.steps[1].tokens, result.steps[0].tokens)
    runs.clear()
    result = pipe([1, 2], "teacher", seed=3)
    assert files(runs) == ["teacher"] * 4 + ["decoder"]
    assert pipe.codebook is not None
    np.testing.assert_array_equal(runs[-1][1]["sequence"], pipe.codebook[result.steps[0].tokens])
    assert (result.seconds["student"], result.steps[0].tokens.shape) == (0, (2, 6))
    runs.clear()
    result = pipe([1, 2], "teacher", seed=3, teacher_start=4)
    assert files(runs) == ["student", "teacher", "decoder"]
    distances = ((result.steps[0].sequence[:, 2:4, None] - pipe.codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(runs[1][1]["tokens"][:, 2:4], distances.argmin(-1))
    np.testing.assert_array_equal(runs[1][1]["tokens"][:, :2], result.steps[0].tokens)
    runs.clear()
    result = pipe([1, 2], 3, seed=3, teacher_start=1)  # behind fewer tokens than the student gives
    assert files(runs) == ["student", "teacher", "teacher", "student", "decoder"]
    np.testing.assert_array_equal(result.steps[1].tokens[:, :1], result.steps[0].tokens[:, :1])


def test_the_batch_size_changes_nothing(pipe: Pipeline) -> None:
    """Nor do the other images of the batch: noise and tokens come from seed and image."""
    for steps in (1, 2, 3, 4, "teacher"):
        whole = pipe([0, 1, 2], steps, num_images=3, seed=11, output="numpy")
        np.testing.assert_array_equal(whole.noise, gaussian_noise(11, range(9), 6, 4))
        assert whole.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        for batch_size in (1, 2, 7):
            parts = pipe([0, 1, 2], steps, num_images=3, seed=11, output="numpy", batch_size=batch_size)
            assert (parts.seed, parts.seconds.keys()) == (11, whole.seconds.keys())
            np.testing.assert_array_equal(parts.noise, whole.noise)
            np.testing.assert_array_equal(parts.labels, whole.labels)
            for one, other in zip(parts.steps, whole.steps, strict=True):
                np.testing.assert_array_equal(one.tokens, other.tokens)
                np.testing.assert_allclose(one.sequence, other.sequence, atol=1e-5)
            assert abs(np.subtract(parts.images, whole.images, dtype=int)).max() <= 1
            if steps in (1, 2):
                assert parts.uniforms is None
            else:
                np.testing.assert_array_equal(parts.uniforms, uniform_numbers(11, range(9), 6))
        part = pipe([1, 2, 2], steps, seed=11, first_image=5, output="sequence")
        np.testing.assert_array_equal(part.steps[-1].tokens, whole.steps[-1].tokens[5:8])


def test_the_seed_decides_the_draws_and_uniform_numbers_replay_them(pipe: Pipeline) -> None:
    def tokens(**changes: Any) -> list[Any]:
        given = {"seed": 5, "num_images": 6, "temperature": 3.0, "top_k": 5, "top_p": 1.0}
        result = pipe([0, 1], "teacher", output="sequence", **(given | changes))
        return result.steps[0].tokens.tolist()  # type: ignore[no-any-return]

    assert tokens() == tokens()
    assert tokens() != tokens(seed=6)
    for batch_size in (None, 5):
        numbers = uniform_numbers(5, range(12), 6)
        assert tokens(seed=6, uniforms=numbers, batch_size=batch_size) == tokens()
    assert tokens(top_k=1) == tokens(top_k=1, seed=6)
    assert tokens(guidance_scale=0.0) != tokens(guidance_scale=9.0) == tokens(cfg=9.0)


NOT_FINITE = np.where(np.arange(48).reshape(2, 6, 4) == 38, np.nan, 0).astype(np.float32)
WRONG: list[tuple[dict[str, Any], type[DDError], str]] = [
    ({"labels": 3}, LabelError, "label 3"),
    ({"labels": []}, LabelError, "label"),
    ({"steps": 5}, ScheduleError, "5 steps"),
    ({"steps": "student"}, ScheduleError, "student"),
    ({"seed": -1}, NoiseError, "seed"),
    ({"first_image": -1}, NoiseError, "image index"),
    ({"num_images": 0}, DDError, "num_images"),
    ({"num_images": True}, DDError, "num_images"),
    ({"batch_size": 0}, DDError, "batch_size"),
    ({"output": "jpeg"}, DDError, "'jpeg'"),
    ({"noise": np.zeros((2, 6, 4))}, NoiseError, "float64"),
    ({"noise": [[0.0]]}, NoiseError, "list"),
    ({"noise": np.zeros((3, 6, 4), np.float32)}, NoiseError, "(3, 6, 4)"),
    ({"noise": NOT_FINITE}, NoiseError, "nan at (1, 3, 2)"),
    ({"guidance_scale": 2.0}, ScheduleError, "guidance_scale"),
    ({"teacher_start": 0}, ScheduleError, "teacher_start"),
    ({"uniforms": np.zeros((2, 6))}, ScheduleError, "uniforms"),
    ({"steps": 3, "teacher_start": 3}, ScheduleError, "position 3"),
    ({"steps": 3, "top_p": 0}, ScheduleError, "top_p"),
    ({"steps": 3, "uniforms": np.zeros((2, 5))}, NoiseError, "(2, 5)"),
    ({"steps": 3, "uniforms": np.ones((2, 6))}, NoiseError, "below 1"),
]


def test_a_wrong_request_is_told_before_anything_is_drawn(pipe: Pipeline, runs: list[Any]) -> None:
    for request, error, named in WRONG:
        for call in (pipe, lambda **words: next(pipe.stream(**words))):
            with pytest.raises(error) as caught:
                call(**{"labels": [0, 1], **request})  # type: ignore[operator]
            assert named in caught.value.message
    assert runs == []


def test_the_caches_count_for_the_batch_size(pipe: Pipeline) -> None:
    """A teacher of d16's size: its caches are two thirds as large as all else."""
    manifest, teacher = pipe.manifest, pipe.manifest.teacher
    assert teacher is not None
    large = replace(
        manifest,
        sequence=replace(manifest.sequence, length=680, width=32, codebook=4096),
        image=replace(manifest.image, height=256, width=256),
        teacher=replace(teacher, layers=16, heads=16, head_width=64, starts=(0, 1, 2, 4, 680)),
    )
    plain, whole = default_batch_size(large), default_batch_size(large, large.schedule("teacher"))
    assert (plain, whole) == (5, 3)


# What is opened


def test_only_what_a_request_needs_is_opened(shared_teacher_bundle: Path, opened: list[str]) -> None:
    """At once for the steps that `load` is told, later for others."""
    with runtime.load(shared_teacher_bundle, steps="teacher") as pipe:
        assert sorted(opened) == ["decoder.onnx", "teacher.onnx"]
        pipe(0, "teacher")
        assert len(opened) == 2
        for steps in (2, 4):
            pipe(0, steps)
            assert opened[2:] == ["student_split4.onnx"]
    opened.clear()
    with runtime.load(shared_teacher_bundle) as pipe:
        assert opened == ["student.onnx", "decoder.onnx"]
    with pytest.raises(BackendError, match="is closed"):
        pipe(0, "teacher")
    assert len(opened) == 2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_several_threads_open_the_teacher_once_and_draw_what_each_draws_alone(
    shared_teacher_bundle: Path, opened: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxRuntime._open
    monkeypatch.setattr(OnnxRuntime, "_open", lambda *graph: (time.sleep(0.05), original(*graph))[1])
    requests = [(number, steps) for number in range(4) for steps in (3, 2, 1, 4, "teacher")]
    with runtime.load(shared_teacher_bundle, backend, threads=1) as pipe:

        def draw(request: Any) -> Any:
            number, steps = request
            return pipe([number % 3, 1], steps, seed=number, num_images=number + 1, output="numpy")

        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(draw, requests))
        assert opened.count("teacher.onnx") == 1
        for request, result in zip(requests, together, strict=True):
            alone = draw(request)
            np.testing.assert_array_equal(result.images, alone.images)
            for one, other in zip(result.steps, alone.steps, strict=True):
                np.testing.assert_array_equal(one.tokens, other.tokens)


def test_the_teacher_runs_in_the_precision_of_the_student_if_it_can(teacher_bundle: Path) -> None:
    """And then in the same engine, which else is another one, in float32."""
    for precision in ("fp16", "int8"):
        toy.add_precision(teacher_bundle, precision)
    toy.change(teacher_bundle, lambda m: m["graphs"].append(m["graphs"][2] | {"precision": "fp16"}))
    for precision, own in (("fp32", "fp32"), ("fp16", "fp16"), ("int8", "fp32")):
        with runtime.load(teacher_bundle, "onnxruntime", precision=precision) as pipe:
            assert pipe.teacher_backend and pipe.teacher_backend.configuration.precision == own
            assert (pipe.teacher_backend is pipe.backend) == (precision == own)


def test_what_fails_leaves_nothing_open(
    teacher_bundle: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close of the student that fails, a load that fails halfway; a bad codebook opens no engine."""
    closed: list[str] = []
    close, close_openvino = OnnxRuntime.close, OpenVino.close
    monkeypatch.setattr(OnnxRuntime, "close", lambda self: (closed.append("onnxruntime"), close(self)))

    def fails(self: Any) -> None:
        close_openvino(self)
        raise RuntimeError("the student cannot be closed")

    pipe = runtime.load(teacher_bundle, "openvino", threads=1, steps=3)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cannot be closed"):
        patch.setattr(OpenVino, "close", fails)
        pipe.close()
    assert closed == ["onnxruntime"]
    toy.put_file(teacher_bundle, "teacher.onnx", b"not a graph")
    with pytest.raises(BackendError, match=r"teacher\.onnx"):
        runtime.load(teacher_bundle, "onnxruntime", steps=3)
    assert len(closed) > 1
    opened.clear()
    np.save(teacher_bundle / "codebook.npy", np.zeros((4, 4), np.float32))
    toy.put_file(teacher_bundle, "codebook.npy", (teacher_bundle / "codebook.npy").read_bytes())
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(BundleError, match=r"codebook\.npy"):
            runtime.load(teacher_bundle, backend)
    assert opened == []


def test_without_onnxruntime_the_teacher_says_what_to_install(
    shared_teacher_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest runs in OpenVINO."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with runtime.load(shared_teacher_bundle, "openvino") as pipe:
        assert len(pipe([0, 1], 2)) == 2
        with pytest.raises(BackendError) as caught:
            pipe(0, 3)
    assert "ddexport[cpu]" in caught.value.hint
