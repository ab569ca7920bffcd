"""`ddexport debug layers`: every stage is there, and a bad one is found where it is."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from ddexport.bundle import Exported, WeightRequest, load_parts
from ddexport.commands.debug import command
from ddexport.precision.cast import in_precision
from ddexport.precision.layers import HalfArithmetic, Layer, compare_layers, inputs_of
from ddexport.recipe import Recipe


@pytest.fixture(scope="module")
def parts(golden_recipe: Recipe) -> dict[str, nn.Module]:
    found = load_parts(golden_recipe, WeightRequest({}, random_seed=0))
    found["student"].tabulate()  # type: ignore[operator]
    return found


def layers(
    parts: dict[str, nn.Module], recipe: Recipe, *keep: str, precision: str = "fp16", images: int = 1
) -> dict[str, Layer]:
    size = recipe.sequence
    given = inputs_of(recipe.classes, size.length, size.width, images)
    return {layer.layer: layer for layer in compare_layers(parts, precision, keep, **given)}


class TestStages:
    def test_every_block_and_stage_in_order(self, parts: dict[str, nn.Module], golden_recipe: Recipe) -> None:
        found = list(layers(parts, golden_recipe))
        assert found[:4] == ["blocks.0", "blocks.1", "logits_head", "embedding_head"]
        assert found[4:9] == ["post_quant_conv", "decoder.conv_in", *(f"decoder.mid.{i}" for i in range(3))]
        assert found[-1] == "decoder.conv_out"
        assert sum(".resample" in name for name in found) == 4

    def test_error_enters_where_half_is(self, parts: dict[str, nn.Module], golden_recipe: Recipe) -> None:
        """With all but one block in float32, the one adds all the error, and the heads pass it on."""
        found = layers(parts, golden_recipe, "blocks.0", "decoder.*", "mask")
        assert found["blocks.0"].own == found["blocks.0"].relative == 0
        assert found["blocks.1"].own == found["blocks.1"].relative > 0
        assert found["embedding_head"].own == 0 < found["embedding_head"].relative
        assert found["decoder.conv_in"].own == 0 < found["decoder.conv_in"].relative

    def test_the_numbers_are_those_of_the_modules(
        self, parts: dict[str, nn.Module], golden_recipe: Recipe
    ) -> None:
        """rms and largest of the logits, over two images, by hand."""
        found = layers(parts, golden_recipe, images=2)["logits_head"]
        size = golden_recipe.sequence
        given = inputs_of(golden_recipe.classes, size.length, size.width, 2)
        feeds = (
            torch.from_numpy(given["noise"]),
            torch.from_numpy(given["labels"]),
            torch.zeros(2, dtype=int),
        )
        with torch.no_grad():
            wanted = parts["student"](*feeds)[2]
            with HalfArithmetic():
                got = in_precision(parts["student"], "fp16")(*feeds)[2]
        error = (got - wanted).double()
        assert found.rms == pytest.approx(float(error.square().mean().sqrt()), rel=0.05)
        assert found.largest == pytest.approx(float(error.abs().max()), rel=0.05)

    def test_a_stage_near_the_end_of_the_range(
        self, parts: dict[str, nn.Module], golden_recipe: Recipe
    ) -> None:
        """The range used, and what is past it, are of the stage that makes them."""
        stretched = {**parts, "student": copy.deepcopy(parts["student"])}
        with torch.no_grad():
            stretched["student"].blocks[1].mlp.fc1.bias[3] = 6e4
        before, after = (layers(p, golden_recipe) for p in (parts, stretched))
        assert before["blocks.1"].range_share < 0.01
        assert after["blocks.1"].range_share == pytest.approx(6e4 / 65504, rel=0.01)
        assert after["blocks.0"] == before["blocks.0"]
        with torch.no_grad():
            stretched["student"].blocks[1].mlp.fc2.weight[0, 3] = 5e1
        broken = layers(stretched, golden_recipe)
        assert broken["blocks.0"].infinite == 0 < broken["blocks.1"].infinite
        assert broken["embedding_head"].infinite > 0
        fine = layers(stretched, golden_recipe, "blocks.1.mlp")
        assert all(layer.infinite == 0 for layer in fine.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_round_once(dtype: torch.dtype) -> None:
    """The arithmetic of `debug layers` is that of a half product that adds up in float32."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 300, generator=generator).to(dtype) for _ in range(2))
    image, kernel = (torch.randn(2, 3, 6, 6, generator=generator).to(dtype) for _ in range(2))
    with torch.no_grad(), HalfArithmetic():
        product = a @ b.T
        map_ = torch.conv2d(image, kernel)
    assert product.dtype == map_.dtype == dtype
    assert torch.equal(product, (a.float() @ b.float().T).to(dtype))
    assert torch.equal(map_, torch.conv2d(image.float(), kernel.float()).to(dtype))


def debug(bundle: Path, *options: object) -> Result:
    return CliRunner().invoke(command, ["layers", str(bundle), *map(str, options)])


class TestCommand:
    def test_random_weights_table_plot_and_json(self, half_export: Exported, tmp_path: Path) -> None:
        result = debug(half_export.path, "--precision", "bf16", "--plot", tmp_path / "layers.png")
        assert result.exit_code == 0, result.output
        assert "student blocks.0" in result.stdout
        assert "decoder conv_out" in result.stdout
        assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
        result = debug(half_export.path, "--images", 2, "--keep-fp32", "blocks.0", "--json")
        data = json.loads(result.stdout)
        assert (data["precision"], data["images"], data["keep_fp32"]) == ("fp16", 2, ["blocks.0"])
        assert data["layers"][0]["own"] == 0 < data["layers"][-1]["relative"]

    def test_patterns_of_the_bundle_are_the_default(self, half_export: Exported, tmp_path: Path) -> None:
        bundle = shutil.copytree(half_export.path, tmp_path / "b")
        manifest = json.loads((bundle / "bundle.json").read_text())
        for graph in manifest["graphs"]:
            if graph["precision"] == "fp16":
                graph["keep_fp32"] = ["blocks.0.*"]
        (bundle / "bundle.json").write_text(json.dumps(manifest))
        data = json.loads(debug(bundle, "--json").stdout)
        assert data["keep_fp32"] == ["blocks.0.*"]
        assert data["layers"][0]["own"] == 0

    def test_a_checkpoint_is_given_again(
        self, golden_bundle: Path, golden_files: dict[str, Path], tmp_path: Path
    ) -> None:
        """The bundle need not have the precision: this one is float32 alone."""
        files = ("--checkpoint", golden_files["student"], "--vae", golden_files["tokenizer"])
        result = debug(golden_bundle, *files)
        assert result.exit_code == 0, result.output
        assert "fp16 against float32" in result.stdout
        result = debug(golden_bundle)
        assert result.exit_code == 1
        assert "--checkpoint student.pth" in result.output
        other = tmp_path / "student.pth"
        other.write_bytes(golden_files["student"].read_bytes() + b"\0")
        result = debug(golden_bundle, "--checkpoint", other, "--vae", golden_files["tokenizer"])
        assert result.exit_code == 1
        assert "is not the student.pth" in result.output

    def test_files_for_weights_that_need_none(self, half_export: Exported, tmp_path: Path) -> None:
        result = debug(half_export.path, "--checkpoint", tmp_path / "x.pth")
        assert result.exit_code == 1
        assert "leave out --checkpoint" in result.output

    def test_a_pattern_without_a_match(self, half_export: Exported) -> None:
        result = debug(half_export.path, "--keep-fp32", "blocks.9")
        assert result.exit_code == 1
        assert "matches no module" in result.output


def test_inputs_are_the_seed_s(golden_recipe: Recipe) -> None:
    """Labels spread over the classes, and noise that does not depend on how many images there are."""
    few, many = (inputs_of(10, 4, 2, n) for n in (2, 5))
    assert list(many["labels"]) == [0, 2, 4, 6, 8]
    assert np.array_equal(few["noise"], many["noise"][:2])
