"""A bundle against its reference: what is compared, in which row a fault shows, and which files are
wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec import structs

from ddexport.recipe import Limits
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import Graph, read_manifest, sha256_of
from ddexport.runtime.bundle import Source as SourceFile
from ddexport.runtime.pipeline import Pipeline, load
from ddexport.validate.compare import compare, measure
from ddexport.validate.parity import command
from ddexport.validate.reference import ReferenceFilesError, TorchReference, build_reference, request_of
from ddexport.validate.report import Measurement

TESTS = Path(__file__).parents[1]
LIMITS = Limits(1e-3, 1e-4, 60.0, 2, 1e-4, 0.0, 1e-4, 60.0, 0.1)


@pytest.fixture(scope="module")
def tiny(cached_export: Any) -> Path:
    """A small VAR with random weights, a teacher, and a student of another split."""
    from ddexport.export import export_bundle
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
    return Path(cached_export("compare", lambda target: export_bundle(recipe, target, request)).path)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> TorchReference:
    return build_reference(read_manifest(tiny), {}, threads=1, teacher=True)


@pytest.fixture
def pipe(tiny: Path) -> Iterator[Pipeline]:
    with load(tiny, "onnxruntime", threads=1) as pipeline:
        yield pipeline


class Faulty(OnnxRuntime):
    """Graphs of which one output is wrong, in the rows that `where` picks by the feeds."""

    def __init__(
        self,
        pipe: Pipeline,
        role: str,
        output: str,
        error: float,
        where: Any = None,
        split: int | None = None,
    ) -> None:
        super().__init__(pipe.root, pipe.manifest, pipe.backend.configuration, 1)
        self.target, self.output, self.error, self.where = (role, split), output, error, where
        self.batches: list[int] = []

    def run(self, graph: Graph, feeds: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
        self.batches.append(len(next(iter(feeds.values()))))
        outputs = super().run(graph, feeds, names)
        if (graph.role, graph.split) == self.target and self.output in outputs:
            noise = np.random.default_rng(0).standard_normal(outputs[self.output].shape).astype(np.float32)
            if self.where is not None:
                noise *= self.where(feeds, len(noise)).reshape(-1, *[1] * (noise.ndim - 1))
            outputs[self.output] = outputs[self.output] + np.float32(self.error) * noise
            if graph.role == "student":
                outputs["tokens"] = outputs["logits"].argmax(-1) if "logits" in outputs else outputs["tokens"]
        return outputs


def measured(pipe: Pipeline, reference: TorchReference, graphs: Any = None) -> list[Measurement]:
    request = request_of(pipe.manifest, 12, 5, 5)
    runs = reference.draw(request, lambda rows: None)
    if graphs is not None:
        pipe = Pipeline(pipe.root, pipe.manifest, pipe.labels, graphs)
    return measure(compare(pipe, runs, request, lambda rows: None), LIMITS)


def test_a_bundle_agrees_with_its_reference(pipe: Pipeline, reference: TorchReference) -> None:
    """In every schedule: all steps on the same input, the decoder, end to end; and a batch with its rows."""
    rows = measured(pipe, reference)
    assert [row for row in rows if not row.passed] == []
    scopes = {row.scope for row in rows}
    assert scopes >= {"step 1 (known 0)", "3 steps, student (known 5)", "3 steps, teacher (positions 0 to 4)"}
    for title in ("1 step", "3 steps", "teacher alone"):
        assert scopes >= {f"{title}, {part}" for part in ("decoder on the same sequence", "end to end")}
    assert scopes >= {f"{part}: batch of 5 against single images"
                      for part in ("student, split 1", "student, split 5", "decoder")}  # fmt: skip
    assert scopes >= {f"{title}, teacher, one image alone" for title in ("3 steps", "teacher alone")}
    assert {row.name for row in rows if row.scope == "teacher alone, teacher (positions 0 to 13)"} == {
        "guided logits, largest error",
        "logits, rms error",
        "share of tokens that differ",
        "token histogram, bias",
        "tokens that differ, largest",
        "tokens that differ, drawn",
        "chi-square of draws, deviations",
    }


def test_the_reference_runs_graphs_as_an_engine_does(pipe: Pipeline, reference: TorchReference) -> None:
    """Named arrays in and out, by the contract: it takes the place of the engine, and nothing differs."""

    class Torch(Faulty):
        def run(self, graph: Graph, feeds: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
            return reference.run(graph, feeds)

    rows = measured(pipe, reference, Torch(pipe, "", "", 0.0))
    assert [row for row in rows if not row.passed] == []


@pytest.mark.parametrize(
    ("key", "output", "error", "where", "name"),
    [
        ("teacher", "logits", 0.01, "teacher (positions", "guided logits, largest error"),
        ("teacher", "logits", 2.0, "teacher (positions", "tokens that differ, largest"),
        ("teacher", "logits", 2.0, "teacher (positions", "tokens that differ, drawn"),
        ("teacher", "logits", 2.0, "teacher (positions", "chi-square of draws, deviations"),
        # Seen by every pass after the first, which read the cache.
        ("teacher", "new_key_0", 0.5, "teacher alone, teacher (positions", "guided logits, largest error"),
        ("teacher", "new_value_0", 0.5, "teacher alone, teacher (positions", "guided logits, largest error"),
        ("student", "logits", 0.01, "step 1 (known 0)", "logits, largest error"),
        ("student", "logits", 0.01, "step 1 (known 0)", "logits, rms error"),
        ("student, split 5", "sequence", 0.01, "3 steps, student (known 5)", "embeddings, relative error"),
        ("student, split 5", "sequence", 0.01, "3 steps, end to end", "sequence, relative error"),
        ("decoder", "image", 0.1, "decoder on the same sequence", "image, largest 8-bit difference"),
        ("decoder", "image", 0.1, "1 step, end to end", "8-bit image PSNR, dB"),
    ],
)
def test_a_fault_is_seen_where_it_is(
    pipe: Pipeline, reference: TorchReference, key: str, output: str, error: float, where: str, name: str
) -> None:
    role, split = ("student", 5) if key == "student, split 5" else (key, None)
    failed = [
        row
        for row in measured(pipe, reference, Faulty(pipe, role, output, error, split=split))
        if not row.passed
    ]
    assert any(where in row.scope and row.name == name for row in failed)
    if key != "teacher":
        assert not any("teacher (positions" in row.scope for row in failed)


def test_tokens_are_forced_so_that_one_flip_is_one_flip(pipe: Pipeline, reference: TorchReference) -> None:
    """A fault in the first AR step does not change what the steps behind it are compared on."""
    first = Faulty(pipe, "teacher", "logits", 3.0, lambda feeds, n: np.full(n, not feeds["filled"][0]))
    rows = measured(pipe, reference, first)
    scope, name = "teacher alone, teacher (positions 0 to 13)", "tokens that differ, drawn"
    (drawn,) = [row for row in rows if (row.scope, row.name) == (scope, name)]
    assert 1 <= drawn.value <= 12  # of the first position of twelve images


@pytest.mark.parametrize(
    "where",
    [
        lambda feeds, n: np.arange(n) > 0,  # the first row is right
        lambda feeds, n: np.full(n, n > 3),  # small batches are right
        lambda feeds, n: np.full(n, n == 1),  # one row alone is wrong
        lambda feeds, n: np.full(n, len(set(feeds["known"].tolist())) > 1),  # mixed steps are wrong
    ],
)
def test_a_row_that_depends_on_its_batch_fails_against_itself(
    golden_bundle: Path, golden_files: dict[str, Path], where: Any
) -> None:
    reference = build_reference(read_manifest(golden_bundle), golden_files, threads=1)
    with load(golden_bundle, "onnxruntime", threads=1) as pipe:
        rows = measured(pipe, reference, Faulty(pipe, "student", "sequence", 0.1, where))
    assert "student, split 5: batch of 5 against single images" in {
        row.scope for row in rows if not row.passed
    }


@pytest.mark.parametrize(
    ("role", "output", "scope"),
    [
        ("teacher", "logits", "teacher alone, teacher, one image alone"),
        ("decoder", "image", "decoder: batch of 5 against single images"),
    ],
)
def test_so_do_teacher_and_decoder(
    pipe: Pipeline, reference: TorchReference, role: str, output: str, scope: str
) -> None:
    alone = Faulty(pipe, role, output, 0.1, lambda feeds, n: np.full(n, n == 1))
    assert scope in {row.scope for row in measured(pipe, reference, alone) if not row.passed}


def test_runs_never_exceed_the_batch(pipe: Pipeline, reference: TorchReference) -> None:
    graphs = Faulty(pipe, "", "", 0.0)
    measured(pipe, reference, graphs)
    assert set(graphs.batches) == {1, 2, 5}


def test_labels_are_spread_and_seeds_follow_each_other(tiny: Path) -> None:
    request = request_of(read_manifest(tiny), 4, 2**64 - 2, 8)
    assert request.labels.tolist() == [(2**64 - 2 + step) % 10 for step in (0, 2, 5, 7)]
    assert request.seeds.tolist() == [2**64 - 2, 2**64 - 1, 0, 1]


def test_the_command_compares_the_teacher(tiny: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(tiny), "--json", "--images", "4", "--report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"]
    rows = {(one["scope"], one["name"]) for one in report["rows"] if "limit" in one}
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
    failed = [one["scope"] for one in json.loads(result.stdout)["rows"] if not one["passed"]]
    assert failed
    assert all("teacher" in scope or "end to end" in scope for scope in failed)


def test_the_teachers_file_has_to_be_the_bundles(tiny: Path, tmp_path: Path) -> None:
    """Missing, another one, or one too many: each says which option and file."""
    manifest = read_manifest(tiny)
    golden = TESTS / "golden" / "var-dd-small"
    files = {"student": golden / "student.pth", "tokenizer": golden / "vae.pth"}
    with pytest.raises(ReferenceFilesError, match="random weights, seed 3, not from") as caught:
        build_reference(manifest, {"teacher": tmp_path / "teacher.pth"})
    assert caught.value.hint == "leave out --teacher"
    sources = tuple(
        SourceFile(role=role, file=path.name, sha256=sha256_of(path), bytes=1)
        for role, path in {**files, "teacher": golden / "teacher.pth"}.items()
    )
    recipe = {**manifest.recipe, **{k: v for k, v in _golden_recipe(golden).items() if k != "schedules"}}
    recipe["schedules"] = {"1": {"known": [0]}}
    checked = structs.replace(
        manifest,
        recipe=recipe,
        weights=structs.replace(manifest.weights, kind="checkpoint", seed=None, files=sources),
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
