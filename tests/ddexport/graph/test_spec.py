"""What is exported is stated once: in the bundle's contract."""

from __future__ import annotations

import pytest
from msgspec import structs

from ddexport.graph.spec import graph_specs, sample_inputs
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
def test_sample_inputs_mix_the_steps(name: str) -> None:
    recipe = load_recipe(name)
    inputs = sample_inputs(graph_specs(recipe)[0], recipe, batch=7, seed=3)
    assert set(inputs["known"]) == {k for schedule in recipe.schedules.values() for k in schedule.known}
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


def test_the_teachers_trial_passes_are_possible_ones() -> None:
    """With a prefix, without, and of one position alone: the cache holds what came before and what is new."""
    recipe = load_recipe("var-d16")
    spec = graph_specs(recipe, structs.replace(TEACHER, layers=4, heads=2))[-1]
    assert {sizes["filled"] == 0 for sizes in spec.sizes} == {True, False}
    assert 1 in {sizes["new"] for sizes in spec.sizes}
    for sizes in spec.sizes:
        inputs = sample_inputs(spec, recipe, 3, seed=0, sizes=sizes)
        filled, positions = int(inputs["filled"][0]), inputs["positions"]
        assert positions.tolist() == list(range(filled, filled + sizes["new"]))
        assert filled + len(positions) <= inputs["key_0"].shape[3] <= 680
