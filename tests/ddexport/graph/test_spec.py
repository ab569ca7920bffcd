"""What is exported is stated once: in the bundle's contract."""

from __future__ import annotations

import pytest

from ddexport.graph.spec import graph_specs, sample_inputs
from ddexport.recipe import load_recipe


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
