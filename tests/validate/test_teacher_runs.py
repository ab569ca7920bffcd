"""Parity of steps with a teacher: what is held to a limit, which faults are seen, what is excused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import runtime
from runtime.manifest import Source as SourceFile
from runtime.manifest import Span, read_manifest, sha256_of
from runtime.pipeline import Pipeline
from runtime.teacher import Choice, choose
from validate.harness import Request, measure
from validate.metrics._base import Limits, Measurement, TeacherPair
from validate.metrics._draws import chi_square, deviations, excused_draws
from validate.metrics._draws import measure as measure_draws
from validate.parity import command
from validate.reference import ReferenceFilesError, build_reference
from validate.teacher_runs import compare_teachers, teacher_request, teacher_schedules

TESTS = Path(__file__).parents[1]
LIMITS = Limits(token_margin=1e-3, embedding_error=1e-4, image_psnr=60.0, image_max=2)
CHOICE = Choice(cfg=1.0, top_k=6, top_p=0.95, temperature=1.0)


def load(path: Path) -> ModuleType:
    name = f"_{path.stem}_of_runtime"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle of the runtime's tests, with its teacher."""
    root = load(TESTS / "runtime" / "conftest.py").write_bundle(tmp_path_factory.mktemp("toys") / "bundle")
    return Path(load(TESTS / "runtime" / "toy_teacher.py").add_teacher(root))


@pytest.fixture
def pipe(toy_bundle: Path) -> Iterator[Pipeline]:
    with runtime.load(toy_bundle, threads=1) as pipeline:
        yield pipeline


class Faulty:
    """Graphs of which one output is wrong."""

    def __init__(self, graphs: Any, key: str, output: str, error: float) -> None:
        self.graphs, self.key, self.output, self.error = graphs, key, output, error

    def run(self, key: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(self.graphs.run(key, feeds))
        if key == self.key:
            noise = np.random.default_rng(0).standard_normal(found[self.output].shape).astype(np.float32)
            found[self.output] = found[self.output] + np.float32(self.error) * noise
        return found


def measured(pipe: Pipeline, root: Path, bundle: Any) -> list[Measurement]:
    rng = np.random.default_rng(1)
    labels = np.arange(12, dtype=np.int64) % 3
    noise = rng.standard_normal((12, 6, 4)).astype(np.float32)
    request = teacher_request(root, pipe.manifest, "fp32", 5, Request(labels, noise, {}, 2, 5))
    assert request is not None
    return measure(compare_teachers(bundle, pipe.backend, request), LIMITS)


def test_a_bundle_agrees_with_itself(pipe: Pipeline, toy_bundle: Path) -> None:
    """In every schedule: all student steps, the teacher, the decoder, end to end, and one image alone."""
    found = measured(pipe, toy_bundle, pipe.backend)
    assert all(one.passed for one in found)
    scopes = dict.fromkeys(one.scope for one in found)
    for title, steps, span in (
        ("3 steps", (0, 4), "2 to 3"),
        ("4 steps", (4,), "0 to 3"),
        ("teacher alone", (), "0 to 5"),
    ):
        wanted = [f"{title}, student (known {known})" for known in steps]
        wanted += [f"{title}, teacher (positions {span})", f"{title}, teacher, one image alone"]
        wanted += [f"{title}, decoder on the same sequence", f"{title}, end to end"]
        assert set(wanted) <= set(scopes)
    drawn = [one for one in found if one.name == "tokens that differ, drawn" and "alone" not in one.scope]
    assert [one.counts["compared"] for one in drawn] == [12 * 2, 12 * 4]
    assert {one.name for one in found if one.scope == "teacher alone, teacher (positions 0 to 5)"} == {
        "guided logits, largest error",
        "tokens that differ, largest",
        "tokens that differ, drawn",
        "chi-square of draws, deviations",
    }


@pytest.mark.parametrize(
    ("key", "output", "error", "where", "name"),
    [
        ("teacher", "logits", 0.002, "teacher (positions", "guided logits, largest error"),
        ("teacher", "logits", 2.0, "teacher (positions", "tokens that differ, largest"),
        ("teacher", "logits", 2.0, "teacher (positions", "tokens that differ, drawn"),
        ("teacher", "logits", 2.0, "teacher (positions", "chi-square of draws, deviations"),
        # Seen by every pass after the first, which read the cache.
        ("teacher", "new_key_0", 0.05, "teacher alone, teacher (positions", "guided logits, largest error"),
        ("teacher", "new_value_0", 0.05, "teacher alone, teacher (positions", "guided logits, largest error"),
        ("student", "logits", 0.01, "3 steps, student (known 4)", "logits, largest error"),
        ("student@4", "sequence", 0.01, "4 steps, student (known 4)", "embeddings, relative error"),
        ("decoder", "image", 0.1, "decoder on the same sequence", "image, largest 8-bit difference"),
    ],
)
def test_a_fault_is_seen_where_it_is(
    pipe: Pipeline, toy_bundle: Path, key: str, output: str, error: float, where: str, name: str
) -> None:
    failed = [
        one for one in measured(pipe, toy_bundle, Faulty(pipe.backend, key, output, error)) if not one.passed
    ]
    assert any(where in one.scope and one.name == name for one in failed)
    if key != "teacher":
        assert not any("teacher (positions" in one.scope for one in failed)


def test_tokens_are_forced_so_that_one_flip_is_one_flip(pipe: Pipeline, toy_bundle: Path) -> None:
    """A fault in one AR step does not change what the steps behind it are compared on."""

    class FirstPass(Faulty):
        def run(self, key: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
            first = key == "teacher" and not feeds["filled"][0]
            return super().run(key, feeds) if first else dict(self.graphs.run(key, feeds))

    found = measured(pipe, toy_bundle, FirstPass(pipe.backend, "teacher", "logits", 3.0))
    (drawn,) = [
        one
        for one in found
        if one.scope == "teacher alone, teacher (positions 0 to 5)" and one.name.endswith("drawn")
    ]
    assert 1 <= drawn.value <= 12  # of the first position of twelve images; the other sixty agree


def test_what_is_compared(toy_bundle: Path) -> None:
    manifest = read_manifest(toy_bundle)
    found = teacher_schedules(manifest)
    assert list(found) == ["3", "4", "teacher"]
    assert found["teacher"].teacher == Span(0, 6)
    assert teacher_schedules(dataclasses.replace(manifest, teacher=None)) == {}


# What excuses another token


def pair_of(expected: np.ndarray, got: np.ndarray, numbers: np.ndarray, choice: Choice) -> TeacherPair:
    places = tuple(f"image {i}" for i in range(len(expected)))
    return TeacherPair("here", expected, got, 0, numbers, choice, places)


def test_rounding_is_excused_where_a_number_lies_on_a_step() -> None:
    """40,000 draws from logits that differ by less than the limit: some differ, all of them are excused."""
    rng = np.random.default_rng(2)
    for choice in (CHOICE, Choice(cfg=1.0, top_k=20, top_p=1.0, temperature=0.7)):
        expected = rng.standard_normal((40, 1000, 20)).astype(np.float32)
        got = (expected + rng.uniform(-1e-3, 1e-3, expected.shape)).astype(np.float32)
        differing, pardoned = excused_draws(pair_of(expected, got, rng.random((40, 1000)), choice), 1e-3)
        assert 3 <= differing.sum() <= 200
        np.testing.assert_array_equal(differing, pardoned)


def test_another_distribution_is_not_excused() -> None:
    """Logits that differ by more than the limit give tokens that no rounding explains."""
    rng = np.random.default_rng(3)
    expected = rng.standard_normal((10, 500, 20)).astype(np.float32)
    got = (expected + 0.1 * rng.standard_normal(expected.shape)).astype(np.float32)
    differing, pardoned = excused_draws(pair_of(expected, got, rng.random((10, 500)), CHOICE), 1e-3)
    assert differing.sum() > 100
    assert pardoned.sum() < 0.1 * differing.sum()


def test_a_token_at_the_threshold_may_come_or_go_but_no_other() -> None:
    """Two logits on both sides of the k-th place, closer than rounding, may change places."""
    top = Choice(cfg=1.0, top_k=2, top_p=1.0, temperature=1.0)
    for gap, excused in ((5e-4, True), (5e-2, False)):
        expected = np.array([[[1.0, 0.5, 0.5 + gap, -3.0]]], np.float32)
        got = np.array([[[1.0, 0.5 + gap, 0.5, -3.0]]], np.float32)
        numbers = np.array([[0.9]])
        assert choose(expected, numbers, top) != choose(got, numbers, top)
        _, pardoned = excused_draws(pair_of(expected, got, numbers, top), 1e-3)
        assert bool(pardoned[0, 0]) is excused


def test_the_law_of_the_draws_is_held_to_its_chi_square() -> None:
    """The same probabilities lie within 4 deviations; a temperature 10 % off does not."""
    logits = (2 * np.random.default_rng(4).standard_normal((200, 50))).astype(np.float32)
    same = deviations(*chi_square(logits, logits, CHOICE, 64))
    assert abs(same) < 4
    hotter = deviations(*chi_square(logits / np.float32(1.3), logits, CHOICE, 64))
    assert hotter > 5


def test_a_sure_token_leaves_nothing_to_test() -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[:, 2] = 100
    assert chi_square(logits, logits, CHOICE, 64) == (0.0, 0)
    assert deviations(0.0, 0) == 0.0


def test_greedy_has_no_draws_to_compare() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    greedy = dataclasses.replace(CHOICE, top_k=1)
    names = [one.name for one in measure_draws(pair_of(logits, logits, np.zeros((2, 3)), greedy), LIMITS)]
    assert names == ["guided logits, largest error", "tokens that differ, largest"]


# Against the PyTorch reference


@pytest.fixture(scope="module")
def tiny(cached_export: Any) -> Path:
    """A small VAR with random weights, a teacher, and a student of another split."""
    from ddexport.bundle import export_bundle
    from ddexport.recipe import load_recipe, recipe_from_dict
    from ddexport.sources import WeightRequest

    content = load_recipe(str(TESTS / "golden" / "var-dd-small" / "recipe.yaml")).to_dict()
    content |= {
        "name": "tiny",
        "image": {"size": 6, "channels": 3},
        "sequence": {"length": 14, "width": 8, "codebook": 16, "split": 1},
        "schedules": {
            "1": {"known": [0]},
            "3": {"known": [5], "split": 5, "teacher": {"start": 0, "end": 5}},
        },
        "model": {"depth": 1, "width": 64, "heads": 2, "scales": [1, 2, 3]},
        "tokenizer": {"channels": 32, "multipliers": [1, 1]},
        "teacher": {"cfg": 2.0, "top_k": 12, "top_p": 0.95},
    }
    recipe, request = recipe_from_dict(content, "tiny"), WeightRequest({}, random_seed=3, teacher=True)
    return Path(cached_export("teacher-runs", lambda target: export_bundle(recipe, target, request)).path)


def test_the_command_compares_the_teacher(tiny: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tiny), "--json", "--images", "4", "--report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"]
    rows = {(one["scope"], one["name"]) for one in report["measurements"] if one["limit"] is not None}
    assert ("3 steps, teacher (positions 0 to 4)", "tokens that differ, drawn") in rows
    assert ("3 steps, student (known 5)", "tokens that differ") in rows
    assert ("teacher alone, teacher (positions 0 to 13)", "chi-square of draws, deviations") in rows


def test_the_teacher_of_another_seed_fails(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A teacher that is not the bundle's own is seen, with exit code 3, and only the teacher's rows fail."""
    import ddexport.families._checkpoint as checkpoint

    original = checkpoint.random_part

    def other(recipe: Any, role: str, seed: int) -> Any:
        return original(recipe, role, seed + (role == "teacher"))

    monkeypatch.setattr(checkpoint, "random_part", other)
    result = CliRunner().invoke(command, [str(tiny), "--images", "3", "--report", str(tmp_path), "--json"])
    assert result.exit_code == 3
    failed = [one["scope"] for one in json.loads(result.stdout)["measurements"] if not one["passed"]]
    assert failed
    assert all("teacher (positions" in scope for scope in failed)


def test_the_teachers_file_has_to_be_the_bundles(tiny: Path, tmp_path: Path) -> None:
    """Missing, another one, or one too many: each says which option and file."""
    manifest = read_manifest(tiny)
    golden = TESTS / "golden" / "var-dd-small"
    files = {"student": golden / "student.pth", "tokenizer": golden / "vae.pth"}
    with pytest.raises(ReferenceFilesError, match="random weights, seed 3, not from") as caught:
        build_reference(manifest, {"teacher": tmp_path / "teacher.pth"})
    assert caught.value.hint == "leave out --teacher"
    sources = tuple(
        SourceFile(role, path.name, sha256_of(path), 1, None)
        for role, path in {**files, "teacher": golden / "teacher.pth"}.items()
    )
    recipe = {**manifest.recipe, **{k: v for k, v in _golden_recipe(golden).items() if k != "schedules"}}
    recipe["schedules"] = {"1": {"known": [0]}}
    checked = dataclasses.replace(
        manifest,
        recipe=recipe,
        weights=dataclasses.replace(manifest.weights, kind="checkpoint", seed=None, files=sources),
    )
    with pytest.raises(ReferenceFilesError, match=r"made from teacher\.pth") as caught:
        build_reference(checked, files, teacher=True)
    assert "--teacher teacher.pth" in caught.value.hint
    with pytest.raises(ReferenceFilesError, match=r"--teacher .* is not what bundle tiny was made from"):
        build_reference(checked, {**files, "teacher": golden / "vae.pth"}, teacher=True)
    assert build_reference(checked, {**files, "teacher": golden / "teacher.pth"}, teacher=True)
    assert build_reference(checked, files)  # where no teacher is run, its file is not asked for


def _golden_recipe(golden: Path) -> dict[str, Any]:
    from ddexport.recipe import load_recipe

    return load_recipe(str(golden / "recipe.yaml")).to_dict()


def test_pairs_of_images_are_of_students_alone(toy_bundle: Path) -> None:
    """`validate fid` pairs images by noise: by default it takes the schedules that the noise decides."""
    from validate.fid_plan import FidSettingError, Options, plan_of

    manifest = read_manifest(toy_bundle)
    options = Options(
        bundle=toy_bundle, features="digits", images=10, reference="none", reference_model=False
    )
    assert dict(plan_of(manifest, "fp32", options).schedules) == {1: (0,)}
    with pytest.raises(FidSettingError, match="the schedule of 3 steps involves the teacher") as caught:
        plan_of(manifest, "fp32", dataclasses.replace(options, steps=(1, 3)))
    assert "--steps takes 1; " in caught.value.hint
