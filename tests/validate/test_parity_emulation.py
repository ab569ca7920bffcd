"""`validate parity` of half bundles: emulated on the CPU, the engine itself on request and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ddexport.runtime.backends import Configuration
from ddexport.runtime.bundle import Manifest, read_manifest
from ddexport.runtime.errors import BundleError
from ddexport.validate import cli, runners
from ddexport.validate.runners import Emulated, emulated_precision


@pytest.fixture(scope="module")
def half_bundle(var_half: Any) -> Path:
    """A tiny model with random weights in fp32, fp16 and bf16. Do not write into it."""
    return Path(var_half.path)


def parity(bundle: Path, report: Path, *options: object) -> Result:
    arguments = ["parity", str(bundle), "--threads", "1", "--images", "4", "--batch", "4", "--json"]
    return CliRunner().invoke(cli.command, [*arguments, "--report", str(report), *map(str, options)])


def error_of(result: Result) -> float:
    rows = json.loads(result.stdout)["rows"]
    return next(row["value"] for row in rows if row["name"] == "embeddings, relative error")


class TestCommand:
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_half_is_emulated_on_the_cpu(self, half_bundle: Path, tmp_path: Path, precision: str) -> None:
        """The report says so; the limits are those of the precision."""
        result = parity(half_bundle, tmp_path, "--precision", precision)
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        assert (data["backend"], data["precision"]) == (Emulated.name, precision)
        manifest = read_manifest(half_bundle)
        assert data["settings"]["limits"] == {**manifest.parity[precision], "provisional": False}
        assert error_of(result) > 1e-5

    def test_the_provider_as_it_is(self, half_bundle: Path, tmp_path: Path) -> None:
        """It rounds less, and the report names the engine alone."""
        plain = parity(half_bundle, tmp_path, "--precision", "fp16", "--no-emulate")
        assert plain.exit_code == 0, plain.output
        assert json.loads(plain.stdout)["backend"] == "onnxruntime"
        emulated = parity(half_bundle, tmp_path, "--precision", "fp16", "--emulate")
        assert error_of(plain) != error_of(emulated)

    def test_bf16_without_emulation_has_no_engine_here(self, half_bundle: Path, tmp_path: Path) -> None:
        result = parity(half_bundle, tmp_path, "--precision", "bf16", "--no-emulate",
                        "--backend", "onnxruntime")  # fmt: skip
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)

    def test_float32_is_never_emulated(self, half_bundle: Path, tmp_path: Path) -> None:
        result = parity(half_bundle, tmp_path)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["backend"] in ("onnxruntime", "openvino")
        assert error_of(result) < 1e-5


class TestChoice:
    @pytest.fixture
    def manifest(self, half_bundle: Path) -> Manifest:
        return read_manifest(half_bundle, verify=False)

    def choose(
        self, monkeypatch: pytest.MonkeyPatch, root: Path, manifest: Manifest,
        configurations: list[Configuration], backend: str = "auto", precision: str | None = "fp16",
        emulate: bool | None = None,
    ) -> str | None:  # fmt: skip
        monkeypatch.setattr(runners, "configurations", lambda *a, **k: configurations)
        return emulated_precision(root, manifest, backend, precision, emulate)

    def test_a_gpu_computes_itself(
        self, monkeypatch: pytest.MonkeyPatch, half_bundle: Path, manifest: Manifest
    ) -> None:
        """TensorRT and ONNX Runtime on CUDA round by themselves: that is what is to be compared."""
        engine = Configuration("tensorrt", "cuda:0", "fp16", "fp16", 0)
        cuda = Configuration("onnxruntime", "cuda:0", "fp16", "fp16", 1)
        cpu = Configuration("onnxruntime", "cpu", "fp16", "fp16", 3)
        assert self.choose(monkeypatch, half_bundle, manifest, [engine, cpu]) is None
        assert self.choose(monkeypatch, half_bundle, manifest, [cuda, cpu]) is None
        assert self.choose(monkeypatch, half_bundle, manifest, [cpu]) == "fp16"
        assert self.choose(monkeypatch, half_bundle, manifest, [engine], backend="tensorrt") is None

    def test_nothing_that_runs_is_emulated_too(
        self, monkeypatch: pytest.MonkeyPatch, half_bundle: Path, manifest: Manifest
    ) -> None:
        none = Configuration("onnxruntime", "cpu", "bf16", "bf16", 3, "no bf16 operators")
        assert self.choose(monkeypatch, half_bundle, manifest, [none], precision="bf16") == "bf16"

    def test_what_was_asked_for_counts(self, half_bundle: Path, manifest: Manifest) -> None:
        for emulate, precision, wanted in (
            (False, "fp16", None), (True, "fp16", "fp16"), (True, None, None), (True, "fp32", None),
        ):  # fmt: skip
            assert emulated_precision(half_bundle, manifest, "auto", precision, emulate) == wanted

    def test_what_is_not_there(self, half_bundle: Path, manifest: Manifest) -> None:
        with pytest.raises(BundleError, match="int8"):
            emulated_precision(half_bundle, manifest, "auto", "int8", None)
        assert (
            emulated_precision(half_bundle, manifest, "no-such-engine", "fp16", None) is None
        )  # `load` says so
