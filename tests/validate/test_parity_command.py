"""`validate parity` from the command line: what it writes, emulates, compares with, and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx import helper

from ddexport.runtime.backends import Configuration
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BundleError
from ddexport.validate import cli, runners
from ddexport.validate.runners import Emulated, emulated_precision
from tests.gates import faults
from tests.gates.conftest import failed_rows

EMBEDDINGS = "embeddings, relative error"


def parity(bundle: Path, *options: object) -> Result:
    return CliRunner().invoke(cli.command, ["parity", str(bundle), "--threads", "1", *map(str, options)])


def changed(bundle: Path, tmp_path: Path, change) -> Path:
    """A copy with another manifest."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = json.loads((copy / "bundle.json").read_text())
    change(manifest)
    (copy / "bundle.json").write_text(json.dumps(manifest))
    return copy


@pytest.fixture
def sources(golden_files) -> tuple[object, ...]:
    return ("--checkpoint", golden_files["student"], "--vae", golden_files["tokenizer"])


class TestGoodBundles:
    def test_the_report_is_what_json_prints(self, golden_bundle, sources, tmp_path):
        options = ("--report", tmp_path / "r", "--json", "--images", 3, "--batch", 4, "--seed", 5)
        result = parity(golden_bundle, *sources, *options)
        assert result.exit_code == 0, result.output
        printed = json.loads(result.stdout)
        assert printed == json.loads((tmp_path / "r" / "parity-fp32.json").read_text())
        settings = printed["settings"]
        assert (printed["images"], printed["seed"], len(settings["labels"])) == (3, 5, 3)
        assert (settings["steps"], settings["batch"]) == (["1", "2"], 4)
        assert [path.name for path in (golden_bundle / "parity").iterdir()] == ["graphs.json"]

    def test_a_read_only_bundle_is_compared_without_a_report(self, golden_bundle, sources, tmp_path):
        bundle = shutil.copytree(golden_bundle, tmp_path / "copy")
        shutil.rmtree(bundle / "parity")
        (bundle / "parity").write_text("in the way")
        result = parity(bundle, *sources)
        assert result.exit_code == 0, result.output
        assert "--report" in result.stderr


# One changed number, and exactly the rows that it concerns.
class TestEmulation:
    def test_half_is_emulated_on_the_cpu_unless_the_provider_is_asked_for(self, embedded_bundle, tmp_path):
        """The provider rounds less. The report names what ran, and the limits are those of the precision."""
        errors, bundle = {}, embedded_bundle("digits-var")
        for option, backend in (("--emulate", Emulated.name), ("--no-emulate", "onnxruntime")):
            words = ("--backend", "onnxruntime", "--images", 4, "--batch", 4, "--json", option)
            result = parity(bundle, *words, "--precision", "fp16", "--report", tmp_path)
            data = json.loads(result.stdout)  # so few images may pass a limit by chance
            assert (data["backend"], data["precision"]) == (backend, "fp16")
            limits = read_manifest(bundle, verify=False).parity["fp16"]
            assert data["settings"]["limits"] == {**limits, "provisional": False, "decoder_psnr": None}
            errors[option] = next(one["value"] for one in data["rows"] if one["name"] == EMBEDDINGS)
        assert errors["--emulate"] > errors["--no-emulate"] > 0
        result = parity(bundle, *words, "--precision", "bf16")
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)

    def test_only_the_cpus_half_precisions_are_emulated(self, embedded_bundle, monkeypatch):
        """TensorRT and ONNX Runtime on CUDA round by themselves: that is what is to be compared."""
        bundle = embedded_bundle("digits-var")
        manifest = read_manifest(bundle, verify=False)
        engine = Configuration("tensorrt", "cuda:0", "fp16", "fp16", 0)
        cuda = Configuration("onnxruntime", "cuda:0", "fp16", "fp16", 1)
        cpu = Configuration("onnxruntime", "cpu", "fp16", "fp16", 3)
        none = Configuration("onnxruntime", "cpu", "bf16", "bf16", 3, "no bf16 operators")

        def choose(able, backend="auto", precision="fp16", emulate=None):
            monkeypatch.setattr(runners, "configurations", lambda *a, **k: able)
            return emulated_precision(bundle, manifest, backend, precision, emulate)

        assert choose([engine, cpu]) is choose([cuda, cpu]) is choose([engine], "tensorrt") is None
        assert choose([cpu]) == choose([cuda], emulate=True) == "fp16"
        assert choose([none], precision="bf16") == "bf16"
        assert choose([cpu], emulate=False) is choose([cpu], precision="fp32") is None
        assert choose([cpu], precision=None, emulate=True) is None
        assert choose([], "no-such-engine") is None  # `load` refuses it
        with pytest.raises(BundleError):
            choose([cpu], precision="fp8")


class TestPlantedFaults:
    def test_the_other_copy_of_the_weights(self, golden_bundle, sources, tmp_path):
        """The golden file holds two; the bundle was made of the averaged one."""
        result = parity(golden_bundle, *sources, "--weights", "model", "--report", tmp_path, "--json")
        assert result.exit_code == 3
        assert "tokens that differ" in failed_rows(result)

    def test_a_limit_of_the_recipe_is_the_one_that_counts(self, golden_bundle, sources, tmp_path):
        """A limit below rounding fails a good bundle."""

        def tight(manifest):
            manifest["parity"]["fp32"]["embedding_error"] = 1e-12

        result = parity(changed(golden_bundle, tmp_path, tight), *sources, "--json")
        assert result.exit_code == 3
        assert EMBEDDINGS in failed_rows(result)

    def test_a_graph_that_does_not_run(self, golden_bundle, sources, tmp_path):
        """Its shapes are not those that it states: the bundle is at fault, and not the user."""

        def halved(graph):
            (output,) = [one for one in graph.output if one.name == "image"]
            output.type.tensor_type.shape.dim[2].dim_value = 32
            del graph.value_info[:]
            next(node for node in graph.node if "image" in node.output).output[0] = "whole"
            rows = [faults.constant(graph, f"rows_{n}", [n], np.int64) for n in (0, 64, 2)]
            graph.node.append(helper.make_node("Slice", ["whole", *rows, rows[2]], ["image"]))

        bundle = shutil.copytree(golden_bundle, tmp_path / "copy")
        faults.in_graph(halved, "decoder")(bundle, "fp32")
        result = parity(bundle, *sources)
        assert result.exit_code == 3, result.output


class TestBadInput:
    def test_files_that_are_not_the_bundles(self, golden_bundle, golden_files, random_bundle, tmp_path):
        student, vae = golden_files["student"], golden_files["tokenizer"]
        for bundle, options, word in (
            (golden_bundle, ("--checkpoint", student), "--vae"),
            (golden_bundle, ("--checkpoint", vae, "--vae", vae), "sha256"),
            (golden_bundle, ("--checkpoint", "no.pth", "--vae", vae), "no.pth"),
            (random_bundle, ("--vae", vae), "--vae"),
        ):
            result = parity(bundle, *options, "--report", tmp_path)
            assert result.exit_code == 1 and word in result.stderr, result.output

    def test_what_cannot_run_ends_with_1_before_the_work(self, golden_bundle, sources, tmp_path, monkeypatch):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        (tmp_path / "taken").write_text("a file")
        result = parity(golden_bundle, *sources, "--device", "cuda", "--report", tmp_path)
        assert result.exit_code == 1 and "--device" in result.stderr
        result = parity(golden_bundle, *sources, "--report", tmp_path / "taken")
        assert result.exit_code == 1 and "taken" in result.stderr and result.stdout == ""
        assert parity(tmp_path / "none").exit_code == 1 and not (tmp_path / "none").exists()
        assert parity(tmp_path, "--batch", 1).exit_code == 2  # nothing could be compared with itself

    def test_a_manifest_without_limits(self, golden_bundle, sources, tmp_path):
        def without(manifest):
            manifest["parity"]["fp32"]["pixel_psnr"] = None

        result = parity(changed(golden_bundle, tmp_path, without), *sources)
        assert result.exit_code == 3 and "pixel_psnr" in result.stderr
