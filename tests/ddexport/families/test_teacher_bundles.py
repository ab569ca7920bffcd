"""Bundles with a teacher, through ONNX Runtime and the public pipeline: the golden cases with and without
it, and how their files share weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from msgspec import structs

from ddexport import runtime
from ddexport.commands.inspect import command as inspect_command
from ddexport.export import Exported, WeightRequest, export_bundle
from ddexport.families._checkpoint import load_part
from ddexport.recipe import Recipe, RecipeError, load_recipe, recipe_from_dict
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.pipeline import Pipeline
from ddexport.sources import MissingWeightsError, roles_of, sources_of

GOLDEN = Path(__file__).parents[2] / "golden"
TOLERANCE = 2e-5
SAMPLING = {"cfg": 2.0, "top_k": 1, "top_p": 1.0, "temperature": 1.0}


class Family(NamedTuple):
    golden: str
    tokenizer: str
    schedules: dict


VAR = Family(
    "var-dd-small",
    "vae.pth",
    {
        "3": {"known": [0, 14], "teacher": {"start": 5, "end": 14}},
        "4": {"known": [14], "split": 14, "teacher": {"start": 0, "end": 14}},
    },
)
LLAMAGEN = Family(
    "llamagen-dd-small",
    "vq.pth",
    {
        "4": {"known": [0, 5], "split": 11, "teacher": {"start": 3, "end": 5}},
        "6": {"known": [5], "teacher": {"start": 0, "end": 5}},
    },
)
# Golden case, steps, and where the teacher starts if not where the schedule says.
CASES = [
    (VAR, "teach_start0", 4, None),
    (VAR, "teach_start1", 4, 1),
    (VAR, "teach_start2_split2", 3, None),
    (LLAMAGEN, "teach_start0", 6, None),
    (LLAMAGEN, "teach_start3", 6, 3),
    (LLAMAGEN, "teach_start3_split11", 4, None),
]


def recipe_of(family: Family) -> Recipe:
    data = load_recipe(str(GOLDEN / family.golden / "recipe.yaml")).to_dict()
    return recipe_from_dict(data | {"schedules": data["schedules"] | family.schedules, "teacher": SAMPLING})


@pytest.fixture(scope="session")
def bundles(cached_export: Callable[..., Exported]) -> Mapping[str, Exported]:
    """The bundle of each golden checkpoint with its teacher, made when first asked for."""

    def export(family: Family, target: Path) -> Exported:
        folder = GOLDEN / family.golden
        files = {"student": folder / "student.pth", "tokenizer": folder / family.tokenizer}
        request = WeightRequest(files | {"teacher": folder / "teacher.pth"})
        return export_bundle(recipe_of(family), target, request)

    class Bundles(dict[str, Exported]):
        def __missing__(self, name: str) -> Exported:
            (family,) = (each for each in (VAR, LLAMAGEN) if each.golden == name)
            self[name] = cached_export(f"teacher-{name}", lambda target: export(family, target))
            return self[name]

    return Bundles()


def expected_of(family: Family) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / family.golden / "expected.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def decoded(pipe: Pipeline, sequence: np.ndarray) -> np.ndarray:
    """The image before it is made 8-bit."""
    return pipe.backend.run(pipe.manifest.graph("decoder"), {"sequence": sequence})["image"]


def close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "case", "steps", "start"), CASES)
def test_teacher_involved_steps_are_the_published_ones(
    family: Family, case: str, steps: int, start: int | None, bundles: Mapping[str, Exported]
) -> None:
    """First sequence, teacher's tokens, final sequence and image of every golden case, with the very graphs
    that are deployed."""
    expected = expected_of(family)
    with runtime.load(bundles[family.golden].path) as pipe:
        labels = expected["labels"].tolist()
        given = {} if start is None else {"teacher_start": start}
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


@pytest.mark.parametrize(("family", "cfg"), [(VAR, 1.5), (LLAMAGEN, 2.0)])
def test_the_teacher_alone_draws_the_published_image(
    family: Family, cfg: float, bundles: Mapping[str, Exported]
) -> None:
    """`--steps teacher`: the auto-regressive model from the bundle, no student involved."""
    expected = expected_of(family)
    with runtime.load(bundles[family.golden].path) as pipe:
        result = pipe(expected["labels"].tolist(), "teacher", guidance_scale=cfg, output="sequence")
        image = decoded(pipe, result.images)
    if family is VAR:
        wanted = np.concatenate([expected[f"teacher_ar_tokens_scale{k}"] for k in range(4)], axis=1)
    else:
        wanted = expected["teacher_ar_tokens"]
    assert np.array_equal(result.steps[-1].tokens, wanted)
    close(image, expected["teacher_ar_image"].clip(0, 1))


@pytest.mark.parametrize(("steps", "case"), [(1, "onestep"), (2, "twostep")])
def test_llamagen_draws_the_published_images_through_the_doors_of_var(
    steps: int, case: str, bundles: Mapping[str, Exported]
) -> None:
    """Exporter and runtime know no family. From the golden noise: every step's sequence to 2e-5, and the
    8-bit images."""
    expected = expected_of(LLAMAGEN)
    with runtime.load(bundles[LLAMAGEN.golden].path) as pipe:
        result = pipe(expected["labels"].tolist(), steps, noise=expected["noise"], output="numpy")
    for n, step in enumerate(result.steps):
        close(step.sequence, expected[f"{case}_step{n}_sequence"])
    image = expected[f"{case}_image"].transpose(0, 2, 3, 1)
    assert np.abs(result.images / 255.0 - image.clip(0, 1)).max() < 0.6 / 255


@pytest.mark.parametrize("family", [VAR, LLAMAGEN])
def test_the_exported_tokens_are_the_published_ones(family: Family, bundles: Mapping[str, Exported]) -> None:
    """Those of the largest logits, in the first step and in the second, and the codes of the sequence."""
    expected, folder = expected_of(family), bundles[family.golden].path
    session = ort.InferenceSession(folder / "student.onnx", providers=["CPUExecutionProvider"])
    for name, known in (("onestep_step0", 0), ("twostep_step1", 5)):
        feeds = {"latents": expected[f"{name}_input"], "label": expected["labels"]}
        outputs = ["sequence", "tokens", "logits"]
        sequence, tokens, logits = session.run(outputs, feeds | {"known": np.full(2, known)})
        assert tokens.shape == (2, 5) and tokens.dtype == np.int64
        assert np.array_equal(tokens, logits.argmax(-1))
        assert np.array_equal(tokens, expected[f"{name}_raw_logits"][:, :5].argmax(-1))
        if not known:
            close(np.load(folder / "codebook.npy")[tokens], sequence[:, :5])


def test_llamagens_weights_are_named_with_the_copy_taken(bundles: Mapping[str, Exported]) -> None:
    """The student's file holds two copies, the others' one, called model."""
    files = bundles[LLAMAGEN.golden].manifest.weights.files
    assert {file.role: (file.file, file.weights) for file in files} == {
        "student": ("student.pth", "ema"), "tokenizer": ("vq.pth", "model"),
        "teacher": ("teacher.pth", "model"),
    }  # fmt: skip


def test_llamagens_graph_is_lean(bundles: Mapping[str, Exported]) -> None:
    """A block's rotation is a split, a swap and two products, its norm the pattern that engines fuse; no
    strided gather in any block, and the logits' product covers the positions before the split alone."""
    graph = onnx.load(bundles[LLAMAGEN.golden].path / "student.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert len(kinds) <= 40 + 38 * 2  # two blocks
    assert kinds.count("Sqrt") == 5 and kinds.count("Reciprocal") == 0
    assert not set(kinds) & {"ScatterND", "ScatterElements", "Loop", "If", "Cast", "Expand"}
    assert kinds.count("Gather") + kinds.count("GatherND") <= 2  # class embedding, codebook
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.output
    }
    assert shapes["logits"][1:] == [5, 64]


@pytest.mark.parametrize("family", [VAR, LLAMAGEN])
class TestFiles:
    def test_students_of_all_splits_share_their_weights(
        self, family: Family, bundles: Mapping[str, Exported]
    ) -> None:
        """One file of weights, listed with one hash by every student; nothing in it is there twice."""
        exported = bundles[family.golden]
        students = [graph for graph in exported.manifest.graphs if graph.role == "student"]
        assert len(students) == 2
        assert {graph.files[1] for graph in students} == {students[0].files[1]}
        assert students[0].files[1].file == "student.onnx.data"
        assert len(exported.manifest.files()) == len({info.file for info in exported.manifest.files()})
        used = [set(places(exported.path / graph.file)) for graph in students]
        small = [p for p in exported.path.iterdir() if p.suffix == ".onnx" and p.stem.startswith("student")]
        assert len(used[0] & used[1]) == len(used[0]) == len(used[1])
        assert sum(length for _, length in used[0]) > 0.9 * students[0].files[1].bytes
        assert all(path.stat().st_size < students[0].files[1].bytes for path in small)

    def test_each_graph_opens_alone(
        self, family: Family, bundles: Mapping[str, Exported], tmp_path: Path
    ) -> None:
        """With the files that the manifest lists for it, and no others."""
        exported = bundles[family.golden]
        for graph in exported.manifest.graphs:
            folder = tmp_path / graph.file
            folder.mkdir()
            for info in graph.files:
                shutil.copyfile(exported.path / info.file, folder / info.file)
            inputs, _ = exported.manifest.tensors(graph)
            session = ort.InferenceSession(folder / graph.file, providers=["CPUExecutionProvider"])
            assert [value.name for value in session.get_inputs()] == [spec.name for spec in inputs]

    def test_the_codebook_is_the_tokenizers(self, family: Family, bundles: Mapping[str, Exported]) -> None:
        """As it is used: LlamaGen's codes have unit length, whatever the file holds."""
        exported, recipe = bundles[family.golden], recipe_of(family)
        tokenizer = load_part(recipe, "tokenizer", GOLDEN / family.golden / family.tokenizer)
        stored = np.load(exported.path / "codebook.npy")
        assert stored.dtype == np.float32
        assert np.array_equal(stored, tokenizer.codebook.numpy())

    def test_manifest(self, family: Family, bundles: Mapping[str, Exported]) -> None:
        """All schedules, the teacher's file and its sizes; read back as written."""
        exported = bundles[family.golden]
        manifest = read_manifest(exported.path)
        assert manifest == exported.manifest
        assert {str(n) for n in manifest.schedules} == {"1", "2", *family.schedules}
        assert {file.role for file in manifest.weights.files} == {"student", "tokenizer", "teacher"}
        assert manifest.teacher is not None
        assert manifest.teacher.guidance == ("rising" if family is VAR else "constant")


def places(graph: Path) -> list[tuple[int, int]]:
    """Offset and length of every tensor outside the graph."""
    model = onnx.load(graph, load_external_data=False)
    entries = [{e.key: e.value for e in w.external_data} for w in model.graph.initializer if w.external_data]
    return [(int(entry["offset"]), int(entry["length"])) for entry in entries]


def test_a_teacher_whose_drawing_is_not_stated_is_refused(tmp_path: Path) -> None:
    """A file given for a recipe that lacks the `teacher` section: not silently left out."""
    recipe = structs.replace(load_recipe(str(GOLDEN / VAR.golden / "recipe.yaml")), teacher=None)
    folder = GOLDEN / VAR.golden
    files = {"student": folder / "student.pth", "tokenizer": folder / "vae.pth"}
    request = WeightRequest(files | {"teacher": folder / "teacher.pth"})
    with pytest.raises(RecipeError, match="has no sampling settings for its teacher"):
        export_bundle(recipe, tmp_path / "b", request)


def test_without_a_teacher_its_schedules_are_left_out(replayed_trace: object, tmp_path: Path) -> None:
    """The same recipe, no file for the teacher: a bundle as before."""
    folder = GOLDEN / VAR.golden
    files = {"student": folder / "student.pth", "tokenizer": folder / VAR.tokenizer}
    exported = export_bundle(recipe_of(VAR), tmp_path / "b", WeightRequest(files))
    assert sorted(exported.manifest.schedules) == [1, 2]
    assert exported.manifest.teacher is None
    assert {p.name for p in exported.path.iterdir()} == {
        "student.onnx", "decoder.onnx", "labels.json", "bundle.json", "README.md", "parity"
    }  # fmt: skip


def test_which_parts_a_bundle_gets() -> None:
    """Random weights have a teacher only if asked; embedded ones unless told otherwise; files where given."""
    published, embedded = load_recipe("var-d16"), load_recipe("digits-var")
    every, few = ("student", "tokenizer", "teacher"), ("student", "tokenizer")
    assert roles_of(published, WeightRequest({}, random_seed=0)) == few
    assert roles_of(published, WeightRequest({}, random_seed=0, teacher=True)) == every
    assert roles_of(published, WeightRequest({})) == few
    assert roles_of(published, WeightRequest({"teacher": Path("t.pth")})) == every
    assert roles_of(embedded, WeightRequest({})) == every
    assert roles_of(embedded, WeightRequest({}, random_seed=0)) == few
    assert roles_of(embedded, WeightRequest({}, teacher=False)) == few


def test_a_wanted_teacher_without_a_file_is_named() -> None:
    with pytest.raises(MissingWeightsError, match=r"var_d16\.pth") as caught:
        sources_of(load_recipe("var-d16"), WeightRequest({}, teacher=True))
    assert "--teacher var_d16.pth" in (caught.value.hint or "")


@pytest.mark.parametrize("family", [VAR, LLAMAGEN])
def test_the_card_says_what_the_teacher_draws(family: Family, bundles: Mapping[str, Exported]) -> None:
    """Which steps involve it, from where to where, and how it chooses."""
    card = (bundles[family.golden].path / "README.md").read_text()
    for steps, schedule in family.schedules.items():
        span = schedule["teacher"]
        assert f"| {steps} | {span['start']} to {span['end']} | {len(schedule['known'])} |" in card
    assert "| teacher | all " in card
    assert "Guidance 2 (" in card
    assert "top-k 1, top-p 1, temperature 1" in card


def test_inspect_shows_the_teacher(bundles: Mapping[str, Exported]) -> None:
    """Its span in each schedule, students by their split, and one layer's cache for all."""
    result = CliRunner().invoke(inspect_command, [str(bundles[VAR.golden].path)])
    assert result.exit_code == 0, result.output
    for text in (
        "3 steps    known 0, 14, teacher 5 to 14",
        "4 steps    known 14, split 14, teacher 0 to 14",
        "teacher    all 30 positions in 4 AR steps",
        "student, split 14 fp32",
        "in  key_0     float32 [2, batch, 2, capacity, 64]",
    ):
        assert text in result.output, text
    assert "key_1" not in result.output
