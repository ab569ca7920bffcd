"""What is exported is stated once: in the bundle's contract."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

from ddexport.graph.spec import BATCHES, graph_specs, rows, sample_inputs
from ddexport.recipe import load_recipe
from ddexport.runtime.bundle import FileInfo, Teacher


def test_the_graphs_are_those_of_the_bundle_format() -> None:
    """Names, types and shapes as in docs/bundle.md."""
    specs = graph_specs(load_recipe("var-d16"))
    sequence = ("batch", 680, 32)
    assert [[(t.name, t.dtype, t.shape) for t in side] for s in specs for side in (s.inputs, s.outputs)] == [
        [("latents", "float32", sequence), ("label", "int64", ("batch",)), ("known", "int64", ("batch",))],
        [("sequence", "float32", sequence), ("tokens", "int64", ("batch", 55)),
         ("logits", "float32", ("batch", 55, 4096))],
        [("sequence", "float32", sequence)],
        [("image", "float32", ("batch", 3, 256, 256))],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["var-d16", "llamagen-l"])
def test_sample_inputs_fit_and_mix_the_steps(name: str) -> None:
    """A batch mixes first and second steps, every number is one that the model has, and the seed decides."""
    recipe = load_recipe(name)
    steps = {k for schedule in recipe.schedules.values() for k in schedule.known}
    for spec in graph_specs(recipe):
        for batch in (*BATCHES, 7):
            inputs, again, other = (sample_inputs(spec, recipe, batch, seed) for seed in (3, 3, 4))
            assert list(inputs) == [t.name for t in spec.inputs]
            assert all(np.array_equal(inputs[name], again[name]) for name in inputs)
            assert not np.array_equal(inputs[spec.inputs[0].name], other[spec.inputs[0].name])
            for tensor in spec.inputs:
                value = inputs[tensor.name]
                assert (value.shape, value.dtype) == ((batch, *tensor.shape[1:]), tensor.dtype)
        if spec.role == "student":
            assert set(inputs["known"]) == steps
            assert 0 <= inputs["label"].min() <= inputs["label"].max() < recipe.classes


TEACHER = Teacher(
    starts=(0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680),
    layers=16,
    heads=16,
    head_width=64,
    guidance="rising",
    cfg=2.0,
    top_k=900,
    top_p=0.95,
    temperature=1.0,
    codebook=FileInfo(file="codebook.npy", sha256="", bytes=0),
)


def test_a_teacher_brings_its_graph_and_students_of_other_splits() -> None:
    """One student for each split that a schedule names, whichever number of schedules share it."""
    specs = graph_specs(load_recipe("var-d16"), TEACHER)
    assert [spec.stem for spec in specs] == [
        "student", "decoder", "student_split255", "student_split424", "teacher"
    ]  # fmt: skip
    assert [spec.part for spec in specs] == ["student", "tokenizer", "student", "student", "teacher"]
    assert {spec.outputs[2].shape for spec in specs if spec.role == "student"} == {
        ("batch", split, 4096) for split in (55, 255, 424)
    }
    teacher = specs[-1]
    assert len(teacher.inputs) == 5 + 2 * 16
    assert teacher.inputs[5].shape == (2, "batch", 16, "capacity", 64)
    assert teacher.outputs[1].shape == (2, "batch", 16, "new", 64)


def test_the_teachers_trial_passes_are_possible_ones() -> None:
    """With a prefix, without, and of one position alone: the cache holds what came before and what is new."""
    recipe = load_recipe("var-d16")
    spec = graph_specs(recipe, structs.replace(TEACHER, layers=4, heads=2))[-1]
    assert {sizes["filled"] == 0 for sizes in spec.sizes} == {True, False}
    assert 1 in {sizes["new"] for sizes in spec.sizes}
    for sizes in spec.sizes:
        inputs = sample_inputs(spec, recipe, 3, seed=0, sizes=sizes)
        assert list(inputs) == [t.name for t in spec.inputs]
        filled, positions = int(inputs["filled"][0]), inputs["positions"]
        assert positions.tolist() == list(range(filled, filled + sizes["new"]))
        assert filled + len(positions) <= inputs["key_0"].shape[3] <= 680
        assert inputs["tokens"].max() < 4096
        part = rows(inputs, spec.inputs, 2)
        assert part["key_0"].shape[:2] == (2, 2)
        assert part["positions"] is inputs["positions"]
        assert np.array_equal(part["value_3"], inputs["value_3"][:, :2])
