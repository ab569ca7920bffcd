"""The whole chain on a few iterations: it runs, is skipped when nothing changed, and goes on after a stop.
Its settings are read strictly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import replace
from torch import nn

from ddexport.commands.distill import command
from ddexport.distill import loop as loop_module
from ddexport.distill.data import DataSet, ImageSet
from ddexport.distill.data.coloured_digits import ColouredDigits, ColouredDigitsData
from ddexport.distill.loop import Run, fit, rate_at, save_atomically
from ddexport.distill.machine import private_compile_cache
from ddexport.distill.settings import Loop, distill_settings, quick
from ddexport.distill.train import STAGES, install, shipped, train
from ddexport.families._checkpoint import load_part
from ddexport.recipe import RecipeError, load_recipe, recipe_from_dict
from ddexport.runtime.errors import DDError, OutputError
from ddexport.text_encoder import text_encoder


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """small(name): a recipe file of the family of an embedded model, of one block and two scales.

    Everything trains on a few images of noise; test_distill_data.py has the digits.
    """
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 8, 8), dtype=torch.uint8, generator=draws)
    images = ImageSet(pixels, torch.arange(24) % 10)
    coloured = ColouredDigits(pixels, images.labels)

    def data_of(name):
        if name == "coloured_digits":
            return ColouredDigitsData(name, coloured, coloured)
        return DataSet(name, images, images)

    folder = tmp_path_factory.mktemp("recipes")

    def recipe_file(name):
        data = load_recipe(name).to_dict()
        scales = {"scales": [1, 2]} if name == "digits-var" else {}
        data["image"]["size"] = 8
        data["sequence"] |= {"length": 5 if scales else 4, "codebook": 16, "split": 1}
        data["schedules"] = {"1": {"known": [0]}, "2": {"known": [0, 1]}}
        data["model"] = {"depth": 1, "width": 32, "heads": 2, **scales}
        data["tokenizer"] |= {"multipliers": [1, 1, 1]}
        data["distill"]["student"]["timesteps"] = [0, 1]
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(data))  # JSON is YAML
        return str(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddexport.distill.train.load_data", data_of)
        yield recipe_file


def run(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def quick_run(model, folder):
    result = run(model, "--quick", "--out", folder, "--json")
    assert result.exit_code == 0, result.output
    return {stage["stage"]: stage["outcome"] for stage in json.loads(result.stdout)["stages"]}


def check_weights(model, folder):
    recipe = load_recipe(model)
    for role in ("tokenizer", "teacher", "student"):
        module = load_part(recipe, role, folder / recipe.files[role].embedded)
        assert all(torch.equal(p, p.half().float()) for p in module.parameters()), "not float16-exact"


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A folder in which `ddexport distill MODEL --quick` has run, and was once stopped after its first
    stage."""
    folder = tmp_path_factory.mktemp("run")

    def stop(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddexport.distill.train.train_decoder", stop)
        assert run(small("digits-var"), "--quick", "--out", folder).exit_code != 0
    first = folder / "tokenizer.safetensors"
    written = first.stat().st_mtime_ns
    outcomes = quick_run(small("digits-var"), folder)
    assert outcomes == dict.fromkeys(STAGES, "trained") | {"tokenizer": "unchanged"}
    assert first.stat().st_mtime_ns == written
    return folder


def test_quick_runs_every_stage_and_writes_loadable_weights(small, finished):
    check_weights(small("digits-var"), finished)
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"tokenizer", "decoder", "teacher", "student"}
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    assert not list(finished.glob(".*.part")) and not list(finished.glob("*.state.pt"))


def test_the_stages_know_no_family(small, tmp_path):
    assert set(quick_run(small("digits-llamagen"), tmp_path).values()) == {"trained"}
    check_weights(small("digits-llamagen"), tmp_path)


def test_a_text_model_is_trained_with_its_encoder(small, tmp_path):
    assert set(quick_run(small("digits-t2i"), tmp_path).values()) == {"trained"}
    check_weights(small("digits-t2i"), tmp_path)
    encoder = text_encoder(tmp_path / "digits-t2i-text-encoder")
    assert all(torch.equal(p, p.half().float()) for p in encoder.parameters())
    assert encoder.tokenizer_file(96).is_file()
    target = tmp_path / "weights"
    target.mkdir()
    recipe = load_recipe("digits-t2i")
    assert len(install(recipe, tmp_path, shipped(recipe), target)) == 4
    assert text_encoder(target / "digits-t2i-text-encoder").words == encoder.words
    (tmp_path / "digits-t2i-text-encoder" / "tokenizer.json").unlink()
    result = run(small("digits-t2i"), "--quick", "--out", tmp_path)
    assert result.exit_code == 1 and "digits-t2i-text-encoder/tokenizer.json" in result.stderr


def test_a_second_run_trains_nothing(small, finished):
    before = {path.name: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}
    assert set(quick_run(small("digits-var"), finished).values()) == {"unchanged"}
    assert before == {path.name: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}


def test_changed_settings_train_their_stage_and_those_after_it(small, finished):
    recipe = load_recipe(small("digits-var"))
    settings = quick(distill_settings(recipe))
    changed = replace(settings, student=replace(settings.student, regression=2.0))
    reports = {r.stage: r.outcome for r in train(recipe, changed, Run(finished, 0), stages=())}
    assert reports == dict.fromkeys(STAGES, "unchanged") | {"student": "left out"}
    other_student = train(recipe, settings, Run(finished, 0), student_seed=1, stages=())
    assert [r.outcome for r in other_student] == ["unchanged"] * 4 + ["left out"]
    another = {r.outcome for r in train(recipe, settings, Run(finished, 1), stages=())}
    assert another == {"left out"}


def test_install_copies_the_three_files_and_refuses_an_unfinished_run(finished, tmp_path):
    recipe, target = load_recipe("digits-var"), tmp_path / "weights"
    target.mkdir()
    files = {role: recipe.files[role].embedded for role in ("tokenizer", "teacher", "student")}
    copied = install(recipe, finished, files, target)
    assert len(copied) == 3
    assert all(path.read_bytes() == (finished / path.name).read_bytes() for path in copied)
    with pytest.raises(DDError):
        install(recipe, tmp_path, files, target)


@pytest.mark.parametrize(
    ("words", "named"), [(["--out", "file/run"], "file"), (["--stages", "pairs"], "tokenizer")]
)
def test_what_cannot_be_run(tmp_path, monkeypatch, words, named):
    """The place cannot be written, or the result of an earlier stage is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = run("digits-var", "--quick", "--out", "out", *words)
    assert result.exit_code == 1 and named in result.stderr


class Line(nn.Module):
    """y = a x + b, enough to follow a training loop to the last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))

    def loss(self, i, generator):
        x = torch.randn(4, 3, generator=generator)
        return ((x @ self.weight.T - x[:, :2]) ** 2).mean(), {}


def run_line(folder, key="k", stop_at=None):
    folder.mkdir(exist_ok=True)
    line = Line()

    def after_step(i):
        if i == stop_at:
            raise KeyboardInterrupt

    fit("line", Run(folder, 0), Loop(40, 4, 0.1, warmup=5, ema=0.9), line, line.loss, key, after_step)
    return line.weight.detach().clone()


def test_a_loop_that_was_stopped_ends_with_the_very_same_weights(tmp_path, monkeypatch):
    """Weights, averages, optimiser and batches all go on, to the last bit; a state of other settings does
    not."""
    straight = run_line(tmp_path / "a")
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_line(tmp_path / "b", stop_at=23)
    saved = torch.load(tmp_path / "b" / "line.state.pt", weights_only=True)
    assert saved["iteration"] == 23
    assert torch.equal(run_line(tmp_path / "b"), straight)
    assert straight.abs().max() > 0.5
    with pytest.raises(KeyboardInterrupt):
        run_line(tmp_path / "c", key="old", stop_at=30)
    torch_state = torch.load(tmp_path / "c" / "line.state.pt", weights_only=True)
    torch_state["module"]["weight"] += 1
    torch.save(torch_state, tmp_path / "c" / "line.state.pt")
    assert torch.equal(run_line(tmp_path / "c"), straight)


def test_the_rate_warms_up_and_ends_at_zero():
    loop = Loop(iterations=100, batch=1, rate=2.0, warmup=10)
    assert rate_at(loop, 0) == pytest.approx(0.2) and rate_at(loop, 9) == pytest.approx(2.0)
    assert rate_at(loop, 55) == pytest.approx(1.0) and rate_at(loop, 99) < 0.01


def test_seed_stage_and_number_all_matter_to_the_random_numbers(tmp_path):
    draws = [
        torch.rand(1, generator=Run(tmp_path, seed).generator(stage, number)).item()
        for seed in (0, 1)
        for stage in ("teacher", "student")
        for number in (0, 1)
    ]
    assert len(set(draws)) == 8


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    save_atomically({"a": 1}, path)

    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(loop_module.os, "fsync", full)
    with pytest.raises(OutputError):
        save_atomically({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_the_compile_cache_is_private_and_the_environment_comes_back(monkeypatch):
    """Half a library that a killed process left in the shared cache must not break the runs after it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/shared")
    with private_compile_cache():
        inside = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert inside != "/shared" and Path(inside).is_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/shared" and not Path(inside).exists()


@pytest.mark.parametrize(
    ("model", "part", "change", "place"),
    [
        ("digits-var", "teacher", {"iteration": 5}, "iteration"),
        ("digits-var", "teacher", {"iterations": 1.5}, "teacher.iterations"),
        ("digits-var", "tokenizer", {"rate": float("nan")}, "tokenizer.rate"),
        ("digits-var", "tokenizer", {"reseed": 0}, "tokenizer.reseed"),
        ("digits-var", "student", {"timesteps": [0, 9]}, "student.timesteps"),
        ("digits-var", "student", {"timesteps": []}, "student.timesteps"),
        ("digits-llamagen", "student", {"timesteps": [0, 16]}, "student.timesteps"),
        ("digits-var", "studnet", {}, "studnet"),
        ("digits-var", "pairs", None, "pairs"),
    ],
)
def test_a_mistake_in_the_settings_is_named(model, part, change, place):
    """A typing mistake is an error, not another experiment."""
    data = load_recipe(model).to_dict()
    section = data["distill"].pop(part, {})
    if change is not None:
        data["distill"][part] = section | change
    with pytest.raises(RecipeError) as caught:
        distill_settings(recipe_from_dict(data))
    assert place in caught.value.message
