"""One graph from noise to 8-bit images: what the runtime draws, with the weights of the other graphs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import ddexport
from ddexport.export import Exported, WeightRequest, export_bundle
from ddexport.graph.verify import verify_pipeline
from ddexport.recipe import Recipe, load_recipe, recipe_from_dict
from ddexport.runtime.bundle import FULL, decoder_role, read_manifest
from ddexport.runtime.errors import ScheduleError, VerificationError
from ddexport.runtime.noise import gaussian_noise

ASKED = ((1, FULL), (2, FULL), (1, "small"))
EXAMPLE = Path(__file__).parents[3] / "examples" / "draw.py"


@pytest.fixture(scope="session")
def exported(cached_export: Callable[..., Exported], tiny_recipe: Recipe) -> Path:
    loose = {"token_margin": 10.0, "embedding_error": 1.0, "image_psnr": 10.0, "image_max": 255}
    parity = {"fp32": loose, "fp16": loose, "int8": loose}
    decoders = {"small": {"widths": [32], "blocks": [1]}}
    recipe = recipe_from_dict(tiny_recipe.to_dict() | {"parity": parity, "decoders": decoders})
    asked: dict[str, Any] = {"precisions": ("fp32", "fp16", "int8"), "pipelines": ASKED, "calibration": 8}
    request = WeightRequest({}, random_seed=5)
    return cached_export("pipelines", lambda target: export_bundle(recipe, target, request, **asked)).path


def test_they_draw_what_the_runtime_draws(exported: Path):
    manifest = read_manifest(exported)
    size = manifest.sequence
    noise = gaussian_noise(7, range(3), size.length, size.width)
    labels = np.array([1, 0, 2])
    assert [(p.steps, p.decoder, p.precision) for p in manifest.pipelines] == [
        (*asked, precision) for asked in ASKED for precision in ("fp32", "fp16", "int8")
    ]
    assert manifest.pipelines[-1].file == "pipeline_1_small_int8.onnx"
    for pipeline in (p for p in manifest.pipelines if p.precision != "fp16"):  # which has no engine here
        session = onnxruntime.InferenceSession(exported / pipeline.file)
        images, tokens = session.run(None, {"noise": noise, "label": labels})
        with ddexport.load(exported, precision=pipeline.precision) as pipe:
            wanted = pipe(labels, steps=pipeline.steps, noise=noise, output="numpy", decoder=pipeline.decoder)
        np.testing.assert_array_equal(tokens, wanted.steps[-1].tokens)
        assert images.dtype == np.uint8
        most = (
            40 if pipeline.precision == "int8" else 1
        )  # a float at a tie is rounded to either of 256 numbers
        assert np.abs(images.astype(int) - wanted.images).max() <= most


def test_the_weights_are_those_of_the_other_graphs(exported: Path):
    manifest = read_manifest(exported)
    for pipeline in manifest.pipelines:
        parts = [
            manifest.graph(role, pipeline.precision) for role in ("student", decoder_role(pipeline.decoder))
        ]
        assert {*pipeline.files[1:]} == {file for graph in parts for file in graph.files[1:]}
        graph = onnx.load(exported / pipeline.file, load_external_data=False).graph
        inside = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
        assert max(len(tensor.raw_data) for tensor in inside) <= 1024


def test_the_example_needs_nothing_of_ours(exported: Path, tmp_path: Path):
    """It draws a picture, in a Python that cannot import ddexport or Pillow."""
    code = "import sys; sys.modules.update(ddexport=None, PIL=None); import runpy; sys.argv = sys.argv[1:]"
    command = [sys.executable, "-c", f"{code}; runpy.run_path(sys.argv[0], run_name='__main__')", EXAMPLE]
    graph, out = exported / "pipeline_1.onnx", tmp_path / "out.png"
    subprocess.run([*command, graph, out, "1", "0", "2"], check=True)
    manifest = read_manifest(exported)
    noise = np.random.default_rng(0).standard_normal(
        (3, manifest.sequence.length, manifest.sequence.width), "f"
    )
    with ddexport.load(exported, precision="fp32") as pipe:
        wanted = pipe([1, 0, 2], steps=1, noise=noise, output="numpy").images
    with Image.open(out) as picture:
        got = np.asarray(picture).astype(int)
    assert np.abs(got - np.concatenate([*np.asarray(wanted)], axis=1)).max() <= 1
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_a_pipeline_that_computes_something_else_is_refused(exported: Path, tmp_path: Path):
    manifest = read_manifest(exported)
    for file in exported.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(tmp_path / "pipeline_2.onnx", load_external_data=False)
    [rest] = [node for node in model.graph.node if node.output[0] == "step2/latents/rest"]
    rest.input[0] = "step1/sequence"  # in place of the original noise
    onnx.save(model, tmp_path / "pipeline_2.onnx")
    verify_pipeline(tmp_path, manifest, manifest.pipelines[0])
    with pytest.raises(VerificationError, match=r"pipeline_2.onnx is not its graphs"):
        verify_pipeline(tmp_path, manifest, manifest.pipelines[3])


def test_steps_without_a_pipeline_are_refused_before_the_export(tiny_recipe: Recipe, tmp_path: Path):
    request = WeightRequest({}, random_seed=0)
    for recipe, steps in ((tiny_recipe, 3), (load_recipe("digits-var"), 4)):
        with pytest.raises(ScheduleError, match=f"no pipeline of {steps} steps"):
            export_bundle(recipe, tmp_path / "bundle", request, pipelines=((1, FULL), (steps, FULL)))
