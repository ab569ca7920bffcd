"""The golden LlamaGen checkpoint through the same doors as VAR: exporter and runtime know no family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from ddexport.bundle import WeightRequest, export_bundle
from ddexport.recipe import load_recipe

GOLDEN = Path(__file__).parents[2] / "golden" / "llamagen-dd-small"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    files = {"student": GOLDEN / "student.pth", "tokenizer": GOLDEN / "vq.pth"}
    recipe = load_recipe(str(GOLDEN / "recipe.yaml"))
    return export_bundle(recipe, tmp_path_factory.mktemp("llamagen") / "bundle", WeightRequest(files))


@pytest.mark.parametrize(("steps", "case"), [(1, "onestep"), (2, "twostep")])
def test_the_runtime_draws_the_published_images(steps, case, exported):
    """From the golden noise: every step's sequence to 2e-5, and the 8-bit images."""
    with np.load(GOLDEN / "expected.npz") as expected:
        with runtime.load(exported.path) as pipeline:
            labels = [int(label) for label in expected["labels"]]
            result = pipeline(labels, steps=steps, noise=expected["noise"], output="numpy")
        for n, step in enumerate(result.steps):
            np.testing.assert_allclose(step.sequence, expected[f"{case}_step{n}_sequence"], rtol=0, atol=2e-5)
        image = expected[f"{case}_image"].transpose(0, 2, 3, 1)
    assert np.abs(result.images / 255.0 - image.clip(0, 1)).max() < 0.6 / 255


def test_the_weights_are_named_with_the_copy_taken(exported):
    """The student's file holds two copies, the tokenizer's one."""
    found = {file.role: (file.file, file.weights) for file in exported.manifest.weights.files}
    assert found == {"student": ("student.pth", "ema"), "tokenizer": ("vq.pth", None)}


def test_the_graph_is_lean(exported):
    """A block's rotation is a split, a swap and two products, its norm the pattern that engines fuse; no
    strided gather in any block, and the logits' product covers the positions before the split alone."""
    graph = onnx.load(exported.path / "student.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert len(kinds) <= 40 + 38 * 2  # two blocks
    assert kinds.count("Sqrt") == 5 and kinds.count("Reciprocal") == 0
    assert not set(kinds) & {"ScatterND", "ScatterElements", "Loop", "If", "Cast", "Expand"}
    assert kinds.count("Gather") + kinds.count("GatherND") <= 2  # class embedding, codebook
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.output
    }
    assert shapes["logits"][1:] == [5, 64]
