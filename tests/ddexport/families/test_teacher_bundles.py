"""Bundles of the golden checkpoints with their teachers, through ONNX Runtime and the public pipeline: all
golden cases, and how their files share weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from msgspec import structs

from ddexport import runtime
from ddexport.export import Exported, WeightRequest, export_bundle
from ddexport.recipe import RecipeError, load_recipe
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.pipeline import Pipeline
from ddexport.sources import MissingWeightsError, roles_of, sources_of
from tests.goldens import BOTH, LLAMAGEN, VAR, Golden, close

Taught = Callable[[Golden], Exported]
# Golden case, steps, and where the teacher starts if not where the schedule says.
CASES = [
    (VAR, "teach_start0", 4, None),
    (VAR, "teach_start1", 4, 1),
    (VAR, "teach_start2_split2", 3, None),
    (LLAMAGEN, "teach_start0", 6, None),
    (LLAMAGEN, "teach_start3", 6, 3),
    (LLAMAGEN, "teach_start3_split11", 4, None),
]


def decoded(pipe: Pipeline, sequence: np.ndarray) -> np.ndarray:
    """The image before it is made 8-bit."""
    return pipe.backend.run(pipe.manifest.graph("decoder"), {"sequence": sequence})["image"]


@pytest.mark.parametrize(("family", "case", "steps", "start"), CASES)
def test_teacher_involved_steps_are_the_published_ones(
    family: Golden, case: str, steps: int, start: int | None, taught_export: Taught
) -> None:
    """First sequence, teacher's tokens, final sequence and image of every golden case, with the very graphs
    that are deployed."""
    expected = {key: value.numpy() for key, value in family.expected.items()}
    with runtime.load(taught_export(family).path) as pipe:
        given = {} if start is None else {"teacher_start": start}
        labels = expected["labels"].tolist()
        result = pipe(labels, steps, noise=expected["noise"], output="sequence", **given)
        image = decoded(pipe, result.images)
    *before, teacher, last = result.steps
    if before:
        close(before[0].sequence, expected[f"{case}_first_sequence"])
    end = teacher.tokens.shape[1]
    if family is VAR:
        close(teacher.sequence[:, :end], expected[f"{case}_teacher_sequence"])
        drawn = np.concatenate(
            [v for k, v in sorted(expected.items()) if k.startswith(f"{case}_teacher_tokens_scale")], axis=1
        )
        assert np.array_equal(teacher.tokens[:, -drawn.shape[1] :], drawn)
    else:
        assert np.array_equal(teacher.tokens, expected[f"{case}_teacher_tokens"])
    assert np.array_equal(teacher.sequence[:, end:], expected["noise"][:, end:])
    close(last.sequence, expected[f"{case}_sequence"])
    close(image, expected[f"{case}_image"].clip(0, 1))


@BOTH
def test_the_teacher_alone_draws_the_published_image(family: Golden, taught_export: Taught) -> None:
    """`--steps teacher`: the auto-regressive model from the bundle, no student involved."""
    expected = {key: value.numpy() for key, value in family.expected.items()}
    with runtime.load(taught_export(family).path) as pipe:
        cfg = 1.5 if family is VAR else 2.0
        result = pipe(expected["labels"].tolist(), "teacher", guidance_scale=cfg, output="sequence")
        image = decoded(pipe, result.images)
    if family is VAR:
        wanted = np.concatenate([expected[f"teacher_ar_tokens_scale{k}"] for k in range(4)], axis=1)
    else:
        wanted = expected["teacher_ar_tokens"]
    assert np.array_equal(result.steps[-1].tokens, wanted)
    close(image, expected["teacher_ar_image"].clip(0, 1))


@BOTH
def test_the_student_alone_draws_the_published_images(family: Golden, taught_export: Taught) -> None:
    """From the golden noise in one and in two steps: every step's sequence and 8-bit images. Tokens are those
    of the published logits also where a step keeps what it was given."""
    expected, folder = family.expected, taught_export(family).path
    codebook = np.load(folder / "codebook.npy")
    assert codebook.dtype == np.float32
    assert np.array_equal(codebook, family.tokenizer.codebook)  # as it is used, whatever the file holds
    labels = expected["labels"]
    with runtime.load(folder) as pipe:
        for steps, case in ((1, "onestep"), (2, "twostep")):
            result = pipe(labels.tolist(), steps, noise=expected["noise"].numpy(), output="numpy")
            for n, step in enumerate(result.steps):
                close(step.sequence, expected[f"{case}_step{n}_sequence"])
            close(codebook[result.steps[0].tokens], result.steps[0].sequence[:, :5])
            image = expected[f"{case}_image"].numpy().transpose(0, 2, 3, 1).clip(0, 1)
            assert np.abs(result.images / 255.0 - image).max() < 0.6 / 255
        for name, known in (("onestep_step0", 0), ("twostep_step1", 5)):
            latents = expected[f"{name}_input"].numpy()
            feeds = {"latents": latents, "label": labels.numpy(), "known": np.full(2, known)}
            outputs = pipe.backend.run(pipe.manifest.graph("student"), feeds)
            close(outputs["logits"], expected[f"{name}_raw_logits"][:, :5])
            assert np.array_equal(outputs["tokens"], outputs["logits"].argmax(-1))


def test_llamagens_graph_is_lean(taught_export: Taught) -> None:
    """A block's rotation is a split, a swap and two products, its norm the pattern that engines fuse; no
    strided gather in any block, and the logits' product covers the positions before the split alone."""
    graph = onnx.load(taught_export(LLAMAGEN).path / "student.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert len(kinds) <= 40 + 38 * 2  # two blocks
    assert kinds.count("Sqrt") == 5 and kinds.count("Reciprocal") == 0
    assert not set(kinds) & {"ScatterND", "ScatterElements", "Loop", "If", "Cast", "Expand"}
    assert kinds.count("Gather") + kinds.count("GatherND") <= 2  # class embedding, codebook
    (logits,) = (value for value in graph.output if value.name == "logits")
    assert [d.dim_value for d in logits.type.tensor_type.shape.dim][1:] == [5, 64]


def places(graph: Path) -> list[tuple[int, int]]:
    """Offset and length of every tensor outside the graph."""
    model = onnx.load(graph, load_external_data=False)
    entries = [{e.key: e.value for e in w.external_data} for w in model.graph.initializer if w.external_data]
    return [(int(entry["offset"]), int(entry["length"])) for entry in entries]


@BOTH
def test_students_of_all_splits_share_their_weights(family: Golden, taught_export: Taught) -> None:
    """One file of weights, listed with one hash by every student; nothing in it is there twice."""
    exported = taught_export(family)
    students = [graph for graph in exported.manifest.graphs if graph.role == "student"]
    assert len(students) == 2
    data = students[0].files[1]
    assert {graph.files[1] for graph in students} == {data} and data.file == "student.onnx.data"
    assert len(exported.manifest.files()) == len({info.file for info in exported.manifest.files()})
    used = [set(places(exported.path / graph.file)) for graph in students]
    assert used[0] == used[1] and sum(length for _, length in used[0]) > 0.9 * data.bytes
    assert all((exported.path / graph.file).stat().st_size < data.bytes for graph in students)


@BOTH
def test_the_manifest_with_a_teacher(family: Golden, taught_export: Taught, tmp_path: Path) -> None:
    """All schedules, the weights with the copy taken, and the teacher's sizes; each graph opens with the
    files that are listed for it and no others."""
    exported = taught_export(family)
    manifest = read_manifest(exported.path)
    assert manifest == exported.manifest
    assert {str(n) for n in manifest.schedules} == {"1", "2", *family.schedules}
    copies = {VAR: (None, None), LLAMAGEN: ("model", "model")}[family]
    assert {file.role: (file.file, file.weights) for file in manifest.weights.files} == {
        "student": ("student.pth", "ema"),
        "tokenizer": (family.tokenizer_file, copies[0]),
        "teacher": ("teacher.pth", copies[1]),
    }
    assert manifest.teacher is not None
    assert manifest.teacher.guidance == ("rising" if family is VAR else "constant")
    for graph in manifest.graphs:
        folder = tmp_path / graph.file
        folder.mkdir()
        for info in graph.files:
            shutil.copyfile(exported.path / info.file, folder / info.file)
        inputs, _ = manifest.tensors(graph)
        session = ort.InferenceSession(folder / graph.file, providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == [spec.name for spec in inputs]


def test_a_teacher_whose_drawing_is_not_stated_is_refused(tmp_path: Path) -> None:
    """A file given for a recipe that lacks the `teacher` section: not silently left out."""
    recipe = structs.replace(VAR.recipe(), teacher=None)
    with pytest.raises(RecipeError):
        export_bundle(recipe, tmp_path / "b", WeightRequest(VAR.files))


def test_without_a_teacher_its_schedules_are_left_out(replayed_trace: object, tmp_path: Path) -> None:
    """The same recipe, no file for the teacher: a bundle as before."""
    files = {role: path for role, path in VAR.files.items() if role != "teacher"}
    exported = export_bundle(VAR.taught_recipe, tmp_path / "b", WeightRequest(files))
    assert sorted(exported.manifest.schedules) == [1, 2]
    assert exported.manifest.teacher is None
    assert {p.name for p in exported.path.iterdir()} == {
        "student.onnx", "decoder.onnx", "labels.json", "bundle.json", "README.md", "parity"
    }  # fmt: skip


def test_which_parts_a_bundle_gets() -> None:
    """Random weights have a teacher only if asked; embedded ones unless told otherwise; files where given."""
    published, embedded = load_recipe("var-d16"), load_recipe("digits-var")
    every, few = ("student", "tokenizer", "teacher"), ("student", "tokenizer")
    small = (*few, "decoder_small")
    assert roles_of(published, WeightRequest({}, random_seed=0)) == small
    assert roles_of(published, WeightRequest({}, random_seed=0, teacher=True)) == (*small, "teacher")
    assert roles_of(published, WeightRequest({})) == few
    assert roles_of(published, WeightRequest({"teacher": Path("t.pth")})) == every
    assert roles_of(embedded, WeightRequest({})) == (*small, "teacher")
    assert roles_of(embedded, WeightRequest({}, random_seed=0)) == small
    assert roles_of(embedded, WeightRequest({}, teacher=False)) == small
    with pytest.raises(MissingWeightsError) as caught:
        sources_of(VAR.taught_recipe, WeightRequest({}, teacher=True))
    assert "teacher.pth" in caught.value.message and "--teacher teacher.pth" in (caught.value.hint or "")
