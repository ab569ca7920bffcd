"""Steps with a teacher, from a request to images: which graphs run on what, and what is reported."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddexport import runtime
from ddexport.runtime import console, infer
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.errors import BackendError, DDError, NoiseError, ScheduleError
from ddexport.runtime.noise import gaussian_noise, uniform_numbers
from ddexport.runtime.pipeline import Pipeline, default_batch_size


@pytest.fixture
def pipe(shared_teacher_bundle: Path) -> Iterator[Pipeline]:
    with runtime.load(shared_teacher_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every run of a graph: its key and its inputs."""
    seen: list[tuple[str, dict[str, Any]]] = []
    original = OnnxRuntime.run

    def run(self: OnnxRuntime, role: str, feeds: Any) -> Any:
        seen.append((role, {name: array.copy() for name, array in feeds.items()}))
        return original(self, role, feeds)

    monkeypatch.setattr(OnnxRuntime, "run", run)
    return seen


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that the engine opens."""
    seen: list[str] = []
    original = OnnxRuntime._session

    def session(self: OnnxRuntime, graph: Any) -> Any:
        seen.append(graph.file)
        return original(self, graph)

    monkeypatch.setattr(OnnxRuntime, "_session", session)
    return seen


def test_three_steps(pipe: Pipeline, runs: list[Any]) -> None:
    """A student step, the teacher behind the student's tokens, and a student step on codes and original
    noise."""
    began = time.perf_counter()
    result = pipe([0, 2], 3, seed=4, num_images=2)
    assert 0 < sum(step.seconds for step in result.steps) < time.perf_counter() - began
    assert [key for key, _ in runs] == ["student", "teacher", "student", "decoder"]
    first, teacher, last = result.steps
    assert [step.role for step in result.steps] == ["student", "teacher", "student"]
    noise = gaussian_noise(4, range(4), 6, 4)
    np.testing.assert_array_equal(runs[0][1]["tokens"], noise)
    np.testing.assert_array_equal(runs[1][1]["tokens"][:, :2], first.tokens)
    assert runs[1][1]["positions"].tolist() == [0, 1, 2, 3]
    assert pipe.codebook is not None
    np.testing.assert_array_equal(runs[2][1]["tokens"][:, :4], pipe.codebook[teacher.tokens])
    np.testing.assert_array_equal(runs[2][1]["tokens"][:, 4:], noise[:, 4:])
    assert runs[2][1]["known"].tolist() == [4] * 4
    np.testing.assert_array_equal(teacher.sequence, runs[2][1]["tokens"])
    np.testing.assert_array_equal(last.tokens, teacher.tokens[:, :2])  # the split lies before what is known
    np.testing.assert_array_equal(last.sequence, runs[3][1]["sequence"])
    np.testing.assert_array_equal(result.uniforms, uniform_numbers(4, range(4), 6))
    assert result.timings.teacher > 0


def test_each_pass_of_either_is_told(pipe: Pipeline) -> None:
    counts: list[int] = []
    list(pipe.stream([0, 2], 3, num_images=2, on_pass=counts.append))
    assert counts == [4] * 3
    list(pipe.stream([1], 4, on_pass=counts.append))
    assert counts[3:] == [1] * 4


def test_without_a_first_student_step_and_with_another_split(pipe: Pipeline, runs: list[Any]) -> None:
    result = pipe(1, 4, seed=1)
    assert [key for key, _ in runs] == ["teacher", "teacher", "teacher", "student@4", "decoder"]
    assert [step.tokens.shape for step in result.steps] == [(1, 4), (1, 4)]
    np.testing.assert_array_equal(result.steps[1].tokens, result.steps[0].tokens)


def test_the_whole_teacher(pipe: Pipeline, runs: list[Any]) -> None:
    """No student takes part: the decoder is given the codes of its tokens."""
    result = pipe([1, 2], "teacher", seed=3)
    assert [key for key, _ in runs] == ["teacher"] * 4 + ["decoder"]
    assert pipe.codebook is not None
    np.testing.assert_array_equal(runs[-1][1]["sequence"], pipe.codebook[result.steps[0].tokens])
    assert result.timings.student == 0


def test_a_prefix_behind_the_split_is_the_nearest_codes(pipe: Pipeline, runs: list[Any]) -> None:
    result = pipe([1, 2], "teacher", seed=3, teacher_start=4)
    assert [key for key, _ in runs] == ["student", "teacher", "decoder"]
    assert pipe.codebook is not None
    distances = ((result.steps[0].sequence[:, 2:4, None] - pipe.codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(runs[1][1]["tokens"][:, 2:4], distances.argmin(-1))
    np.testing.assert_array_equal(runs[1][1]["tokens"][:, :2], result.steps[0].tokens)


@pytest.mark.parametrize("steps", [2, 3, 4, "teacher"])
def test_the_batch_size_changes_nothing(pipe: Pipeline, steps: int | str) -> None:
    """Nor does it which images stand beside one: tokens come from seed and image."""
    whole = pipe([0, 1, 2], steps, num_images=3, seed=11, output="sequence")
    for batch_size in (1, 2, 4):
        parts = pipe([0, 1, 2], steps, num_images=3, seed=11, output="sequence", batch_size=batch_size)
        for one, other in zip(parts.steps, whole.steps, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.sequence, other.sequence, atol=1e-5)


def test_the_seed_decides_the_draws_and_uniform_numbers_replay_them(pipe: Pipeline) -> None:
    def tokens(**changes: Any) -> list[Any]:
        given = {"seed": 5, "num_images": 6, "temperature": 3.0, "top_k": 5, "top_p": 1.0}
        result = pipe([0, 1], "teacher", output="sequence", **(given | changes))
        return result.steps[0].tokens.tolist()  # type: ignore[no-any-return]

    assert tokens() == tokens()
    assert tokens() != tokens(seed=6)
    assert tokens(seed=6, uniforms=uniform_numbers(5, range(12), 6)) == tokens()
    assert tokens(top_k=1) == tokens(top_k=1, seed=6)
    assert tokens(cfg=0.0) != tokens(cfg=9.0)


def test_only_what_a_request_needs_is_opened(shared_teacher_bundle: Path, opened: list[str]) -> None:
    """At once for the steps that `load` is told, later for others."""
    with runtime.load(shared_teacher_bundle, steps="teacher") as pipe:
        assert opened == ["teacher.onnx", "decoder.onnx"]
        pipe(0, "teacher")
        assert len(opened) == 2
        pipe(0, 2)
        assert opened[2:] == ["student_split4.onnx"]
        pipe(0, 4)
        assert len(opened) == 3
    opened.clear()
    with runtime.load(shared_teacher_bundle) as pipe:
        assert opened == ["student.onnx", "decoder.onnx"]
    with pytest.raises(BackendError, match="is closed"):
        pipe(0, "teacher")
    assert len(opened) == 2


def test_a_key_that_no_graph_has(pipe: Pipeline) -> None:
    with pytest.raises(BackendError, match="no graph for the role 'student@5'") as caught:
        pipe.backend.run("student@5", {})
    assert caught.value.hint == "There is: student, decoder, teacher, student@4."


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"steps": 5}, ScheduleError, "toy has no schedule of 5 steps"),
        ({"steps": "student"}, ScheduleError, "toy has no schedule of student steps"),
        ({"steps": 1, "cfg": 2.0}, ScheduleError, "cfg can only be given for steps that involve a teacher"),
        ({"steps": 1, "teacher_start": 0}, ScheduleError, "teacher_start is for schedules that involve"),
        ({"steps": 3, "teacher_start": 3}, ScheduleError, "the teacher cannot start at position 3"),
        ({"steps": 3, "top_p": 0}, ScheduleError, "top_p must be above 0"),
        ({"steps": 3, "uniforms": np.zeros((2, 5))}, NoiseError, "a float64 array of shape (2, 6), but are"),
        ({"steps": 3, "uniforms": np.ones((2, 6))}, NoiseError, "must be from 0 to below 1"),
    ],
)
def test_a_wrong_request_is_told_at_once(
    pipe: Pipeline, request_: dict[str, Any], error: type[DDError], message: str
) -> None:
    with pytest.raises(error) as caught:
        pipe.stream([0, 1], **request_)
    assert message in caught.value.message
    with pytest.raises(error):
        pipe([0, 1], **request_)


def test_the_caches_count_for_the_batch_size(pipe: Pipeline) -> None:
    """A teacher of d16's size: its caches are half as large as all else, and so is what fits."""
    manifest = pipe.manifest
    assert manifest.teacher is not None
    large = dataclasses.replace(
        manifest,
        sequence=dataclasses.replace(manifest.sequence, length=680, width=32, codebook=4096, split=55),
        image=dataclasses.replace(manifest.image, height=256, width=256),
        teacher=dataclasses.replace(
            manifest.teacher, layers=16, heads=16, head_width=64, starts=(0, 424, 680)
        ),
    )
    plain, whole = default_batch_size(large), default_batch_size(large, large.schedule("teacher"))
    assert 1 <= whole < plain


# The command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sample(shared_teacher_bundle: Path, folder: Path) -> Callable[..., Result]:
    def run(*options: object) -> Result:
        return CliRunner().invoke(infer.command, [str(shared_teacher_bundle), *map(str, options)])

    return run


def test_steps_teacher_and_its_options(sample: Callable[..., Result], shared_teacher_bundle: Path) -> None:
    """All of them arrive: the dump has the tokens that the Python interface gives for the same request."""
    options = ("--steps", 3, "--teacher-start", 1, "--cfg", 1.5, "--top-k", 3, "--top-p", 0.9)
    result = sample(*options, "--temperature", 2, "--seed", 7, "--dump", "d.npz", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["steps"] == 4  # another start than the schedule's
    assert report["seconds"].keys() == {"load", "student", "decoder", "teacher"}
    with runtime.load(shared_teacher_bundle) as pipe:
        wanted = pipe([0, 1, 2], 3, seed=7, teacher_start=1, cfg=1.5, top_k=3, top_p=0.9, temperature=2.0)
    with np.load("d.npz") as dump:
        assert list(dump) == [
            "labels", "noise", "uniforms", "step1_tokens", "step1_sequence",
            "teacher_tokens", "teacher_sequence", "step2_tokens", "step2_sequence", "images",
        ]  # fmt: skip
        np.testing.assert_array_equal(dump["teacher_tokens"], wanted.steps[1].tokens)
        np.testing.assert_array_equal(dump["uniforms"], wanted.uniforms)


def test_a_dump_replays_the_draws(sample: Callable[..., Result]) -> None:
    """Without a seed: its uniform numbers are used; steps without a teacher leave them alone."""
    assert sample("--steps", "teacher", "--seed", 8, "--dump", "one.npz").exit_code == 0
    assert sample("--steps", "teacher", "--noise", "one.npz", "--dump", "two.npz").exit_code == 0
    with np.load("one.npz") as one, np.load("two.npz") as two:
        np.testing.assert_array_equal(one["teacher_tokens"], two["teacher_tokens"])
        np.testing.assert_array_equal(one["images"], two["images"])
    assert sample("--steps", 1, "--noise", "one.npz").exit_code == 0


def test_the_whole_teacher_draws(sample: Callable[..., Result]) -> None:
    result = sample("--steps", "teacher")
    assert result.exit_code == 0
    assert "out.png: 3 images in 4 steps; teacher " in result.stdout  # and no time of a student


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--steps", "all"), 2, "'all' is not a valid integer range"),
        (("--steps", 0), 2, "0 is not in the range"),
        (("--top-k", 0), 2, "0 is not in the range"),
        (("--steps", 7), 1, "It can draw in: 1, 2, 3, 4, teacher."),
        (("--steps", 2, "--cfg", 1), 1, "cfg can only be given for steps that involve a teacher"),
        (("--steps", 3, "--top-p", 2), 1, "top_p must be above 0 and at most 1, but is 2.0"),
    ],
)
def test_wrong_options(
    sample: Callable[..., Result], options: tuple[object, ...], code: int, message: str
) -> None:
    result = sample(*options)
    assert result.exit_code == code
    assert message in result.stderr


def test_a_long_run_shows_its_passes(
    shared_teacher_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar advances with every pass of the teacher, not only with every batch."""
    seen: list[int] = []
    monkeypatch.setattr(console.Progress, "advance", lambda self, count=1: seen.append(count))
    infer.draw(infer.Request(shared_teacher_bundle, ("0",), steps="teacher", num_images=3))
    assert seen == [3] * 4
