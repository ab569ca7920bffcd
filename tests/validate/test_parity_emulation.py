"""`validate parity` of half bundles: emulated on the CPU, the engine itself on request and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ddexport.runtime.backends import Configuration
from ddexport.runtime.bundle import read_manifest
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


def choose(monkeypatch: pytest.MonkeyPatch, root: Path, able: list[Configuration], **asked: Any) -> Any:
    monkeypatch.setattr(runners, "configurations", lambda *a, **k: able)
    asked = {"backend": "auto", "precision": "fp16", "emulate": None} | asked
    return emulated_precision(root, read_manifest(root, verify=False), **asked)


def test_only_the_cpus_half_precisions_are_emulated(
    monkeypatch: pytest.MonkeyPatch, half_bundle: Path
) -> None:
    """TensorRT and ONNX Runtime on CUDA round by themselves: that is what is to be compared."""
    engine = Configuration("tensorrt", "cuda:0", "fp16", "fp16", 0)
    cuda = Configuration("onnxruntime", "cuda:0", "fp16", "fp16", 1)
    cpu = Configuration("onnxruntime", "cpu", "fp16", "fp16", 3)
    none = Configuration("onnxruntime", "cpu", "bf16", "bf16", 3, "no bf16 operators")
    for able, asked, wanted in (
        ([engine, cpu], {}, None),
        ([cuda, cpu], {}, None),
        ([cpu], {}, "fp16"),
        ([engine], {"backend": "tensorrt"}, None),
        ([none], {"precision": "bf16"}, "bf16"),
        ([cpu], {"emulate": False}, None),
        ([cuda], {"emulate": True}, "fp16"),
        ([cpu], {"precision": None, "emulate": True}, None),
        ([cpu], {"precision": "fp32"}, None),
        ([], {"backend": "no-such-engine"}, None),  # `load` refuses it
    ):
        assert choose(monkeypatch, half_bundle, able, **asked) == wanted, asked
    with pytest.raises(BundleError):
        choose(monkeypatch, half_bundle, [cpu], precision="int8")
