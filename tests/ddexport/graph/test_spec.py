"""What is exported is stated once: in the bundle's contract."""

from __future__ import annotations

import numpy as np
import pytest

from ddexport.graph.spec import BATCHES, graph_specs, sample_inputs
from ddexport.recipe import Recipe, load_recipe, recipe_names


def test_the_graphs_are_those_of_the_bundle_format() -> None:
    """Names, types and shapes as in docs/bundle.md."""
    student, decoder = graph_specs(load_recipe("var-d16"))
    assert [(t.name, t.dtype, t.shape) for t in student.inputs] == [
        ("tokens", "float32", ("batch", 680, 32)),
        ("label", "int64", ("batch",)),
        ("known", "int64", ("batch",)),
    ]
    assert [(t.name, t.dtype, t.shape) for t in student.outputs] == [
        ("sequence", "float32", ("batch", 680, 32)),
        ("logits", "float32", ("batch", 55, 4096)),
    ]
    assert [(t.name, t.dtype, t.shape) for t in (*decoder.inputs, *decoder.outputs)] == [
        ("sequence", "float32", ("batch", 680, 32)),
        ("image", "float32", ("batch", 3, 256, 256)),
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_sample_inputs_fit_and_mix_the_steps(name: str) -> None:
    """A batch mixes first and second steps, and every number is one that the model has."""
    recipe = load_recipe(name)
    steps = {k for schedule in recipe.schedules.values() for k in schedule.known}
    for spec in graph_specs(recipe):
        for batch in (*BATCHES, 7):
            inputs = sample_inputs(spec, recipe, batch, seed=3)
            assert list(inputs) == [t.name for t in spec.inputs]
            for tensor in spec.inputs:
                value = inputs[tensor.name]
                assert value.shape == (batch, *tensor.shape[1:])
                assert value.dtype == tensor.dtype
        if spec.role == "student":
            assert set(inputs["known"]) == steps
            assert inputs["label"].min() >= 0
            assert inputs["label"].max() < recipe.classes


def test_sample_inputs_depend_on_the_seed_alone(golden_recipe: Recipe) -> None:
    student, _ = graph_specs(golden_recipe)
    one, again, other = (sample_inputs(student, golden_recipe, 3, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["tokens"], other["tokens"])
