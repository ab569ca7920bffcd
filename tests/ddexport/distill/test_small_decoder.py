"""A small decoder learns, goes on after a stop with the same numbers, and has few operations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from msgspec.structs import replace
from torch import nn

from ddexport.commands.distill import command
from ddexport.commands.weights import recipe_and_weights
from ddexport.distill import loop as loop_module
from ddexport.distill.loop import Run
from ddexport.distill.settings import decoder_settings, quick_decoder
from ddexport.distill.small_decoder import Sequences, distil_decoder
from ddexport.families import family
from ddexport.families._base import GeometryError
from ddexport.families._checkpoint import load_part
from ddexport.graph.verify import compare_decoders
from ddexport.recipe import RecipeError, load_recipe, recipe_from_dict, recipe_names
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import VerificationError
from ddexport.sources import WeightRequest, load_parts, roles_of

MODELS = ("digits-var", "digits-llamagen")
SHORT = quick_decoder(decoder_settings(load_recipe("digits-var"), "small"))


def distil(*words: object) -> Result:
    return CliRunner().invoke(command, ["decoder", *map(str, words)])


@pytest.mark.parametrize("model", MODELS)
def test_one_command_makes_weights_that_an_export_takes(model: str, tmp_path: Path) -> None:
    """A second run trains nothing; another seed trains again."""
    outcomes = []
    for seed in (0, 0, 1):
        result = distil("--model", model, "--quick", "--out", tmp_path, "--seed", seed, "--json")
        assert result.exit_code == 0, result.output
        outcomes.append([stage["outcome"] for stage in json.loads(result.stdout)["stages"]])
    assert outcomes == [["trained"] * 2, ["unchanged"] * 2, ["trained"] * 2]
    module = load_part(load_recipe(model), "decoder_small", tmp_path / "decoder_small.safetensors")
    assert all(torch.equal(p, p.half().float()) for p in module.parameters())
    [*_, last] = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (last["stage"], last["iteration"]) == ("decoder_small-finish", 3)


def test_a_stopped_run_goes_on_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, request = load_recipe("digits-var"), WeightRequest({}, teacher=False)
    settings = replace(SHORT, iterations=8, refresh=2, finish=None)

    def weights(folder: str) -> dict[str, torch.Tensor]:
        distil_decoder(recipe, "small", request, settings, Run(tmp_path / folder, 0))
        path = tmp_path / folder / "decoder_small.safetensors"
        return load_part(recipe, "decoder_small", path).state_dict()

    whole = weights("whole")
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0.0)
    batch, calls = Sequences.batch, []

    def stopping(self: Sequences, iteration: int, generator: torch.Generator) -> object:
        calls.append(iteration)
        if calls == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return batch(self, iteration, generator)

    monkeypatch.setattr(Sequences, "batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        weights("stopped")
    stopped = weights("stopped")
    assert calls == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_it_learns_the_full_decoder(tmp_path: Path) -> None:
    settings = replace(SHORT, iterations=75, batch=16, chunk=32, refresh=75, rate=3e-3, finish=None)
    request = WeightRequest({}, teacher=False)
    distil_decoder(load_recipe("digits-var"), "small", request, settings, Run(tmp_path, 0))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 1


def test_every_kind_of_sequence_is_in_a_chunk() -> None:
    """Codes of the codebook in what the teacher and chance draw, and the student's regressed embeddings."""
    recipe = load_recipe("digits-var")
    parts = load_parts(recipe, WeightRequest({}))
    settings = replace(SHORT, random=0.25, teacher=0.25)
    sequences = Sequences(recipe, parts, settings, Run(Path(), 0), "decoder_small")
    kinds = [*sequences._drawn(8, torch.Generator().manual_seed(0))]
    assert [len(kind) for kind in kinds] == [2, 2, 2, 2]
    codes = parts["tokenizer"].codebook
    distances = [torch.cdist(kind.flatten(0, 1), codes).amin(1).view(2, -1) for kind in kinds]
    assert [bool((distance < 1e-3).all()) for distance in distances] == [True, True, False, False]


@pytest.mark.parametrize("model", [name for name in recipe_names() if load_recipe(name).decoders])
def test_it_has_at_most_an_eighth_of_the_operations(model: str) -> None:
    recipe, operations = load_recipe(model), {"tokenizer": 0, "decoder_small": 0}
    latent = recipe.image.size >> len(recipe.decoders["small"].widths)
    with torch.device("meta"):
        for role in operations:
            part = family(recipe.family).build(recipe, role)

            def count(module: nn.Module, _: object, output: torch.Tensor, role: str = role) -> None:
                kernel = module.kernel_size[0] ** 2 if isinstance(module, nn.Conv2d) else 0
                if kernel:
                    # The export does 9 products of a doubled map as 4 (TransposedUpsample).
                    share = 4 / 9 if module in doubled else 1  # noqa: B023
                    operations[role] += int(2 * output.numel() * module.in_channels * kernel * share)

            doubled = {m.conv for m in part.modules() if type(m).__name__ == "Upsample"}
            for module in part.modules():
                module.register_forward_hook(count)
            z = torch.zeros(1, recipe.sequence.width, latent, latent)
            image = part.decode(z) if role == "tokenizer" else part.pixels(z)
            assert image.shape == (1, 3, recipe.image.size, recipe.image.size)
    assert operations["decoder_small"] * 8 <= operations["tokenizer"]


def test_what_a_recipe_must_say() -> None:
    recipe = load_recipe("digits-var")
    with pytest.raises(RecipeError, match="decoder large"):
        decoder_settings(recipe, "large")
    data = recipe.to_dict()
    data["decoders"]["small"]["widths"] = [80, 40]
    with pytest.raises(GeometryError, match="3 numbers"):
        family("var_dd").build(recipe_from_dict(data), "decoder_small")
    data["decoders"] = {"large": data["decoders"]["small"]}
    with pytest.raises(RecipeError, match="small"):
        recipe_from_dict(data)
    taught = replace(recipe, schedules={"4": recipe.schedules["4"]})
    with pytest.raises(RecipeError, match="student alone"):
        decoder_settings(taught, "small")


def test_a_decoder_of_another_tokenizer_is_left_out() -> None:
    recipe = load_recipe("digits-var")
    assert "decoder_small" in roles_of(recipe, WeightRequest({}))
    assert "decoder_small" not in roles_of(recipe, WeightRequest({"tokenizer": Path("vae.pth")}))
    files = {"tokenizer": Path("vae.pth"), "decoder_small": Path("small.safetensors")}
    assert "decoder_small" in roles_of(recipe, WeightRequest(files))
    assert "decoder_small" in roles_of(load_recipe("var-d16"), WeightRequest({}, random_seed=0))
    assert "decoder_small" not in roles_of(load_recipe("var-d16"), WeightRequest({}))


def test_that_of_a_directory_is_of_the_tokenizer_in_it(tmp_path: Path) -> None:
    recipe = load_recipe("digits-var").to_dict()
    recipe["schedules"] = {"1": recipe["schedules"]["1"]}
    recipe["files"] = {role: {"file": role} for role in ("student", "tokenizer", "decoder_small")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for role in recipe["files"]:
        (tmp_path / role).touch()
    rest: dict[str, Any] = dict.fromkeys(
        ("named", "checkpoint", "teacher", "revision", "cache_dir", "weights", "random_weights")
    )
    for vae, small, files in (
        (None, None, {"student", "tokenizer", "decoder_small"}),
        (Path("vae"), None, {"student", "tokenizer"}),
        (Path("vae"), Path("small"), {"student", "tokenizer", "decoder_small"}),
    ):
        chosen = recipe_and_weights(str(tmp_path), vae=vae, small_decoder=small, offline=False, **rest)[1]
        assert set(chosen["files"]) == files


def test_what_the_manifest_says_is_of_these_weights(
    embedded_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """No FID where other weights are; and no bundle with the decoder of another tokenizer."""
    bundle, recipe = embedded_bundle("digits-var"), load_recipe("digits-var")
    manifest = read_manifest(bundle)
    assert compare_decoders(bundle, manifest, "small", recipe) == manifest.decoders["small"]
    others = tuple(replace(file, file="other.pth") for file in manifest.weights.files)
    other = replace(manifest, weights=replace(manifest.weights, kind="checkpoint", files=others))
    assert compare_decoders(bundle, other, "small", recipe).fid == {}
    for path in (*bundle.glob("student.onnx*"), *bundle.glob("decoder.onnx*")):
        shutil.copyfile(path, tmp_path / path.name)
    model = onnx.load(bundle / "decoder_small.onnx")
    [last] = (weight for weight in model.graph.initializer if weight.name.endswith("conv_out.weight"))
    last.raw_data = bytes(len(last.raw_data))
    onnx.save(model, tmp_path / "decoder_small.onnx")
    with pytest.raises(VerificationError, match="PSNR"):
        compare_decoders(tmp_path, manifest, "small", recipe)
