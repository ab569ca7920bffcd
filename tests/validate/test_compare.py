"""A bundle against its reference: what is compared, in which row a fault shows, and which files are
wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from ddexport.recipe import Limits, load_recipe
from ddexport.runtime.backends.onnxruntime import OnnxRuntime
from ddexport.runtime.bundle import Source as SourceFile
from ddexport.runtime.bundle import read_manifest, sha256_of
from ddexport.runtime.pipeline import Pipeline, load
from ddexport.validate.compare import compare, measure
from ddexport.validate.reference import ReferenceFilesError, build_reference, request_of

TESTS = Path(__file__).parents[1]
LIMITS = Limits(1e-3, 1e-4, 60.0, 2, 1e-4, 0.0, 1e-4, 60.0, 0.1)


@pytest.fixture(scope="module")
def reference(random_bundle):
    return build_reference(read_manifest(random_bundle), {}, threads=1, teacher=True)


@pytest.fixture
def pipe(random_bundle):
    with load(random_bundle, "onnxruntime", threads=1) as pipeline:
        yield pipeline


class Faulty(OnnxRuntime):
    """Graphs of which one output is wrong, in the rows that `where` picks by the feeds."""

    def __init__(self, pipe, role, output, error, where=None, split=None):
        super().__init__(pipe.root, pipe.manifest, pipe.backend.configuration, 1)
        self.target, self.output, self.error, self.where = (role, split), output, error, where
        self.batches = []

    def run(self, graph, feeds, names=None):
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


def measured(pipe, reference, graphs=None):
    """The rows; what the reference draws is kept in it, as one object serves many tests."""
    request = request_of(pipe.manifest, 12, 5, 5)
    if not hasattr(reference, "runs"):
        reference.runs = reference.draw(request, lambda rows: None)
    if graphs is not None:
        pipe = Pipeline(pipe.root, pipe.manifest, pipe.labels, graphs)
    return measure(compare(pipe, reference.runs, request, lambda rows: None), LIMITS)


def failed(rows):
    return {(row.scope, row.name) for row in rows if not row.passed}


def test_a_bundle_agrees_with_its_reference(pipe, reference):
    """In every schedule: all steps on the same input, the decoder, end to end; and a batch with its rows."""
    rows = measured(pipe, reference)
    assert failed(rows) == set()
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


TEACHER, ALONE = "3 steps, teacher (positions 0 to 4)", "teacher alone, teacher (positions 0 to 13)"
STUDENT = "3 steps, student (known 5)"
GUIDED = "guided logits, largest error"
DRAWS = ("tokens that differ, largest", "tokens that differ, drawn", "chi-square of draws, deviations")


@pytest.mark.parametrize(
    ("role", "split", "output", "error", "rows"),
    [
        ("teacher", None, "logits", 0.01, {(TEACHER, GUIDED)}),
        ("teacher", None, "logits", 2.0, {(ALONE, name) for name in DRAWS}),
        # Every pass after the first reads the cache.
        ("teacher", None, "new_key_0", 0.5, {(ALONE, GUIDED)}),
        ("teacher", None, "new_value_0", 0.5, {(ALONE, GUIDED)}),
        ("student", None, "logits", 0.01,
         {("step 1 (known 0)", name) for name in ("logits, largest error", "logits, rms error")}),
        ("student", 5, "sequence", 0.01,
         {(STUDENT, "embeddings, relative error"), ("3 steps, end to end", "sequence, relative error")}),
        ("decoder", None, "image", 0.1,
         {("1 step, decoder on the same sequence", "image, largest 8-bit difference"),
          ("1 step, end to end", "8-bit image PSNR, dB")}),
    ],
)  # fmt: skip
def test_a_fault_is_seen_where_it_is(pipe, reference, role, split, output, error, rows):
    found = failed(measured(pipe, reference, Faulty(pipe, role, output, error, split=split)))
    assert found >= rows
    assert role == "teacher" or not any("teacher (positions" in scope for scope, _ in found)


def test_tokens_are_forced_so_that_one_flip_is_one_flip(pipe, reference):
    """A fault in the first AR step does not change what the steps behind it are compared on."""
    first = Faulty(pipe, "teacher", "logits", 3.0, lambda feeds, n: np.full(n, not feeds["filled"][0]))
    rows = measured(pipe, reference, first)
    scope, name = "teacher alone, teacher (positions 0 to 13)", "tokens that differ, drawn"
    (drawn,) = [row for row in rows if (row.scope, row.name) == (scope, name)]
    assert 1 <= drawn.value <= 12  # of the first position of twelve images


def test_a_row_that_depends_on_its_batch_fails_against_itself(golden_bundle, golden_files):
    reference = build_reference(read_manifest(golden_bundle), golden_files, threads=1)
    with load(golden_bundle, "onnxruntime", threads=1) as pipe:
        for where in (
            lambda feeds, n: np.arange(n) > 0,  # the first row is right
            lambda feeds, n: np.full(n, n > 3),  # small batches are right
            lambda feeds, n: np.full(n, n == 1),  # one row alone is wrong
            lambda feeds, n: np.full(n, len(set(feeds["known"].tolist())) > 1),  # mixed steps are wrong
        ):
            rows = measured(pipe, reference, Faulty(pipe, "student", "sequence", 0.1, where))
            assert "student, split 5: batch of 5 against single images" in {
                scope for scope, _ in failed(rows)
            }


def test_so_do_teacher_and_decoder(pipe, reference):
    for role, output, scope in (
        ("teacher", "logits", "teacher alone, teacher, one image alone"),
        ("decoder", "image", "decoder: batch of 5 against single images"),
    ):
        alone = Faulty(pipe, role, output, 0.1, lambda feeds, n: np.full(n, n == 1))
        assert scope in {scope for scope, _ in failed(measured(pipe, reference, alone))}


def test_runs_never_exceed_the_batch(pipe, reference):
    graphs = Faulty(pipe, "", "", 0.0)
    measured(pipe, reference, graphs)
    assert set(graphs.batches) == {1, 2, 5}


def test_labels_are_spread_and_seeds_follow_each_other(random_bundle):
    request = request_of(read_manifest(random_bundle), 4, 2**64 - 2, 8)
    assert request.labels.tolist() == [(2**64 - 2 + step) % 10 for step in (0, 2, 5, 7)]
    assert request.seeds.tolist() == [2**64 - 2, 2**64 - 1, 0, 1]


def test_the_teachers_file_has_to_be_the_bundles(random_bundle):
    manifest = read_manifest(random_bundle)
    golden = TESTS / "golden" / "var-dd-small"
    files = {"student": golden / "student.pth", "tokenizer": golden / "vae.pth"}
    teacher = golden / "teacher.pth"
    sources = tuple(
        SourceFile(role=role, file=path.name, sha256=sha256_of(path), bytes=1)
        for role, path in {**files, "teacher": teacher}.items()
    )
    recipe = load_recipe(str(golden / "recipe.yaml")).to_dict() | {"schedules": {"1": {"known": [0]}}}
    weights = structs.replace(manifest.weights, kind="checkpoint", seed=None, files=sources)
    checked = structs.replace(manifest, recipe=manifest.recipe | recipe, weights=weights)
    for given in ({}, {"teacher": golden / "vae.pth"}):
        with pytest.raises(ReferenceFilesError, match="teacher"):
            build_reference(checked, files | given, teacher=True)
    assert build_reference(checked, files | {"teacher": teacher}, teacher=True)
    assert build_reference(checked, files)  # where no teacher is run, its file is not asked for
