"""`validate parity` from the command line: real bundles, faults that only it can see, and what it says
about bad input.

A planted bundle has the right hashes, and the graphs are valid, so that nothing but the comparison can
object.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddexport.runtime.backends import Configuration
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BundleError
from ddexport.validate import cli, runners
from ddexport.validate.runners import Emulated, emulated_precision

TOKENS = "tokens that differ"
LOGITS = "logits, largest error"
EMBEDDINGS = "embeddings, relative error"
COPIED = "kept and codebook entries, relative error"
IMAGES = {"image PSNR, dB", "image, largest 8-bit difference"}


def parity(bundle: Path, *options: object) -> Result:
    return CliRunner().invoke(cli.command, ["parity", str(bundle), "--threads", "1", *map(str, options)])


def failed_rows(result: Result) -> set[tuple[str, str]]:
    """(scope, name) of the failed rows that do not merely follow from others end to end."""
    rows = [one for one in json.loads(result.stdout)["rows"] if not one["passed"]]
    return {(one["scope"], one["name"]) for one in rows if "end to end" not in one["scope"]}


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


def constant(graph, *, name: str = "", shape: tuple[int, ...] = ()):
    """(array, put): an initializer of the graph by name or shape, and how to put a changed one back."""
    from onnx import numpy_helper

    (tensor,) = [t for t in graph.initializer if t.name == name or (shape and tuple(t.dims) == shape)]
    array = numpy_helper.to_array(tensor).copy()
    return array, lambda new: tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))


def producer(graph, name: str):
    return next(node for node in graph.node if name in node.output)


class TestGoodBundles:
    def test_the_golden_bundle_passes_and_leaves_a_report(self, golden_bundle, sources, tmp_path):
        bundle = shutil.copytree(golden_bundle, tmp_path / "copy")
        result = parity(bundle, *sources)
        assert result.exit_code == 0, result.output
        names = {path.name for path in (bundle / "parity").iterdir()}
        reports = {"parity-fp32.json", "parity-fp32-0.png", "parity-fp32-1.png", "golden.npz"}
        assert names >= reports | {"graphs.json"}

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


STEPS = ("step 1 (known 0)", "step 2 (known 0, 5)")


def shifted(amount: float, index=..., **which):
    """An edit: a constant, or one number of it, is wrong by so much."""

    def edit(graph) -> None:
        array, put = constant(graph, **which)
        array[index(array) if callable(index) else index] += np.float32(amount)
        put(array)

    return edit


# One changed number, and exactly the rows that it concerns.
FAULTS = {
    "embedding head": (
        "student", shifted(0.01, 3, name="embedding_head.bias"), {(step, EMBEDDINGS) for step in STEPS},
    ),
    "logits head, too little to flip a token": (
        "student", shifted(-0.01, np.argmin, name="logits_head.bias"),
        {*((step, LOGITS) for step in STEPS), (STEPS[0], "logits, rms error"),
         (STEPS[0], "token histogram, bias")},
    ),
    # Every logit and embedding is right, and step 2 keeps the reference's tokens.
    "codebook": ("student", shifted(0.01, shape=(64, 8)), {(STEPS[0], COPIED)}),
    "decoder": (
        "decoder", shifted(0.05, 1, name="decoder.conv_out.bias"),
        {(f"{title}, decoder on the same sequence", name) for title in ("1 step", "2 steps")
         for name in IMAGES},
    ),
}  # fmt: skip


class TestEmulation:
    def test_half_is_emulated_on_the_cpu_unless_the_provider_is_asked_for(self, embedded_bundle, tmp_path):
        """The provider rounds less. The report names what ran, and the limits are those of the precision."""
        errors, bundle = {}, embedded_bundle("digits-var")
        for option, backend in (("--emulate", Emulated.name), ("--no-emulate", "onnxruntime")):
            words = (
                "--precision",
                "fp16",
                "--images",
                4,
                "--batch",
                4,
                "--json",
                "--report",
                tmp_path,
                option,
            )
            result = parity(bundle, *words, "--backend", "onnxruntime")
            data = json.loads(result.stdout)  # so few images may pass a limit by chance
            assert (data["backend"], data["precision"]) == (backend, "fp16")
            limits = read_manifest(bundle, verify=False).parity["fp16"]
            assert data["settings"]["limits"] == {**limits, "provisional": False}
            errors[option] = next(one["value"] for one in data["rows"] if one["name"] == EMBEDDINGS)
        assert errors["--emulate"] > errors["--no-emulate"] > 0
        result = parity(bundle, *words, "--backend", "onnxruntime", "--precision", "bf16")
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
    @pytest.mark.parametrize("name", FAULTS)
    def test_a_number_shows_in_its_rows_alone(self, planted, sources, tmp_path, name):
        role, edit, rows = FAULTS[name]
        result = parity(planted(role, edit), *sources, "--json", "--report", tmp_path / "report")
        assert result.exit_code == 3, result.output
        assert failed_rows(result) == rows
        for scope, row in rows:
            assert f"{scope}: {row}" in result.stderr

    def test_the_other_copy_of_the_weights(self, golden_bundle, sources, tmp_path):
        """The golden file holds two; the bundle was made of the averaged one."""
        result = parity(golden_bundle, *sources, "--weights", "model", "--report", tmp_path, "--json")
        assert result.exit_code == 3, result.stdout
        assert ("step 1 (known 0)", TOKENS) in failed_rows(result)

    def test_a_limit_of_the_recipe_is_the_one_that_counts(self, golden_bundle, sources, tmp_path):
        """A limit below rounding fails a good bundle."""

        def tight(manifest):
            manifest["parity"]["fp32"]["embedding_error"] = 1e-12

        result = parity(changed(golden_bundle, tmp_path, tight), *sources, "--json")
        assert result.exit_code == 3
        assert {name for _, name in failed_rows(result)} == {EMBEDDINGS}

    def test_a_graph_that_does_not_run(self, planted, sources, tmp_path):
        """Its shapes are not those that it states: the bundle is at fault, and not the user."""

        def edit(graph):
            (output,) = [one for one in graph.output if one.name == "image"]
            output.type.tensor_type.shape.dim[2].dim_value = 32
            del graph.value_info[:]
            graph.node.append(halved(graph))

        result = parity(planted("decoder", edit), *sources, "--report", tmp_path / "report")
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


def halved(graph):
    """A node that takes every second row of what was the image."""
    from onnx import helper, numpy_helper

    producer(graph, "image").output[0] = "whole_image"
    for name, value in (("rows_from", 0), ("rows_to", 64), ("rows_axis", 2), ("rows_step", 2)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    inputs = ["whole_image", "rows_from", "rows_to", "rows_axis", "rows_step"]
    return helper.make_node("Slice", inputs, ["image"])
