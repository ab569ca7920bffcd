"""Steps with a teacher, from a request to images: which graphs run on what, and what is reported."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from ddexport import runtime
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.errors import BackendError, BundleError, DDError, NoiseError, ScheduleError
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.pipeline import Pipeline, default_batch_size


@pytest.fixture
def pipe(shared_teacher_bundle: Path) -> Iterator[Pipeline]:
    with runtime.load(shared_teacher_bundle, threads=1) as pipeline:
        yield pipeline


def files(runs: list[Any]) -> list[str]:
    return [file.removesuffix(".onnx") for file, *_ in runs]


def test_three_steps(pipe: Pipeline, runs: list[Any]) -> None:
    """A student step, the teacher behind the student's tokens, and a student step on codes and original
    noise."""
    began = time.perf_counter()
    result = pipe([0, 2], 3, seed=4, num_images=2)
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


def test_every_pass_of_either_is_told(pipe: Pipeline) -> None:
    counts: list[int] = []
    pipe([0, 2], 3, num_images=2, on_pass=counts.append)
    list(pipe.stream([1, 0, 2], 4, batch_size=2, on_pass=counts.append))
    assert counts == [4] * 3 + [2] * 4 + [1] * 4


@pytest.mark.parametrize("steps", [2, 3, 4, "teacher"])
def test_the_batch_size_changes_nothing(pipe: Pipeline, steps: int | str) -> None:
    """Nor does it which images stand beside one: tokens come from seed and image."""
    whole = pipe([0, 1, 2], steps, num_images=3, seed=11, output="sequence")
    for batch_size in (1, 2, 4):
        parts = pipe([0, 1, 2], steps, num_images=3, seed=11, output="sequence", batch_size=batch_size)
        for one, other in zip(parts.steps, whole.steps, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.sequence, other.sequence, atol=1e-5)
        assert (parts.uniforms is None) == (steps == 2)
        if steps != 2:
            np.testing.assert_array_equal(parts.uniforms, whole.uniforms)
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


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ({"steps": 5}, ScheduleError, "5 steps"),
        ({"steps": "student"}, ScheduleError, "student steps"),
        (
            {"steps": 1, "guidance_scale": 2.0},
            ScheduleError,
            "guidance_scale can only be given",
        ),
        ({"steps": 1, "teacher_start": 0}, ScheduleError, "teacher_start is for schedules that involve"),
        ({"steps": 1, "uniforms": np.zeros((2, 6))}, ScheduleError, "uniforms can only be given"),
        ({"steps": 3, "teacher_start": 3}, ScheduleError, "position 3"),
        ({"steps": 3, "top_p": 0}, ScheduleError, "top_p must be above 0"),
        ({"steps": 3, "uniforms": np.zeros((2, 5))}, NoiseError, "shape (2, 6), but are float64 (2, 5)"),
        ({"steps": 3, "uniforms": np.ones((2, 6))}, NoiseError, "from 0 to below 1"),
    ],
)
def test_a_wrong_request_is_told_before_anything_is_drawn(
    pipe: Pipeline, runs: list[Any], given: dict[str, Any], error: type[DDError], named: str
) -> None:
    for call in (pipe, lambda labels, **request: next(pipe.stream(labels, **request))):
        with pytest.raises(error) as caught:
            call([0, 1], **given)
        assert named in caught.value.message
    assert runs == []


def test_the_caches_count_for_the_batch_size(pipe: Pipeline) -> None:
    """A teacher of d16's size: its caches are half as large as all else, and so is what fits."""
    manifest, teacher = pipe.manifest, pipe.manifest.teacher
    assert teacher is not None
    large = replace(
        manifest,
        sequence=replace(manifest.sequence, length=680, width=32, codebook=4096),
        image=replace(manifest.image, height=256, width=256),
        teacher=replace(teacher, layers=16, heads=16, head_width=64, starts=(0, 1, 2, 4, 680)),
    )
    plain, whole = default_batch_size(large), default_batch_size(large, large.schedule("teacher"))
    assert (plain, whole) == (6, 5)


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
def test_several_threads_open_the_teacher_once(
    shared_teacher_bundle: Path, opened: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxRuntime._open
    monkeypatch.setattr(OnnxRuntime, "_open", lambda *given: (time.sleep(0.05), original(*given))[1])
    drawn: dict[int, Any] = {}
    with runtime.load(shared_teacher_bundle, backend, threads=1) as pipe:

        def draw(seed: int) -> None:
            drawn[seed] = pipe([0, 1], 3, seed=seed).steps[1].tokens

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert opened.count("teacher.onnx") == 1
        for seed, tokens in drawn.items():
            np.testing.assert_array_equal(pipe([0, 1], 3, seed=seed).steps[1].tokens, tokens)
    assert len(drawn) == 4


def test_a_bad_codebook_opens_no_engine(teacher_bundle: Path, toy: Any, opened: list[str]) -> None:
    np.save(teacher_bundle / "codebook.npy", np.zeros((4, 4), np.float32))
    toy.put_file(teacher_bundle, "codebook.npy", (teacher_bundle / "codebook.npy").read_bytes())
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(BundleError, match=r"codebook\.npy"):
            runtime.load(teacher_bundle, backend)
    assert opened == []


def test_a_failing_close_of_the_student_closes_the_teacher(
    shared_teacher_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = runtime.load(shared_teacher_bundle, "openvino", threads=1, steps=3)
    closed: list[str] = []

    def fails() -> None:
        raise RuntimeError("the student cannot be closed")

    monkeypatch.setattr(pipe.backend, "close", fails)
    assert pipe.teacher_backend is not None
    monkeypatch.setattr(pipe.teacher_backend, "close", lambda: closed.append("teacher"))
    with pytest.raises(RuntimeError, match="the student"):
        pipe.close()
    assert closed == ["teacher"]


def test_a_load_that_fails_halfway_closes_what_it_opened(
    teacher_bundle: Path, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.put_file(teacher_bundle, "teacher.onnx", b"not a graph")
    closed: list[str] = []
    close: Callable[[Any], None] = OnnxRuntime.close
    monkeypatch.setattr(OnnxRuntime, "close", lambda self: (closed.append("closed"), close(self))[1])
    with pytest.raises(BackendError, match=r"teacher\.onnx"):
        runtime.load(teacher_bundle, "onnxruntime", steps=3)
    assert closed


def test_without_onnxruntime_the_teacher_says_what_to_install(
    shared_teacher_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest runs in OpenVINO."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with runtime.load(shared_teacher_bundle, "openvino") as pipe:
        assert len(pipe([0, 1], 2)) == 2
        with pytest.raises(BackendError, match="the teacher runs in ONNX Runtime") as caught:
            pipe(0, 3)
    assert caught.value.hint == 'pip install "ddexport[cpu]"'
