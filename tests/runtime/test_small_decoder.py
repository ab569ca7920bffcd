"""The small decoder of a bundle: asked for by name, never taken by itself, run by every engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import ddexport
from ddexport.cli import main
from ddexport.runtime.bundle import read_manifest
from ddexport.runtime.errors import BundleError

MODELS = ("digits-var", "digits-llamagen")
OTHER = {"output": "numpy", "seed": 1}


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(-10 * np.log10(np.square((first.astype(float) - second) / 255).mean()))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("backend", "precision"),
    [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "bf16"),
     ("openvino", "int8")],
)  # fmt: skip
def test_every_engine_runs_it(
    embedded_bundle: Callable[[str], Path], model: str, backend: str, precision: str
) -> None:
    """Its images are near those of the full decoder, and nearer still to those of the same graph in fp32."""
    if backend == "openvino":
        Core = pytest.importorskip("openvino").Core
        if precision == "bf16" and "BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            pytest.skip("this CPU has no bf16 arithmetic")
    with ddexport.load(embedded_bundle(model), backend, 1, precision, decoder="small") as pipe:
        full, small = (pipe(range(10), 1, decoder=name, **OTHER) for name in ("full", "small"))  # type: ignore[arg-type]
        by_default = pipe(range(10), 1, **OTHER)  # type: ignore[arg-type]
    np.testing.assert_array_equal(by_default.images, full.images)
    np.testing.assert_array_equal(small.steps[-1].sequence, full.steps[-1].sequence)
    assert 25 < psnr(full.images, small.images) < 60


@pytest.mark.parametrize("model", MODELS)
def test_the_manifest_says_what_it_costs(embedded_bundle: Callable[[str], Path], model: str) -> None:
    bundle = embedded_bundle(model)
    cost = read_manifest(bundle).decoders["small"]
    assert cost.operations <= 1 / 8
    assert cost.psnr > 27
    assert set(cost.fid) == {1, 2}
    assert all(low <= value <= high < 0.12 for value, low, high in cost.fid.values())


def test_sample_shows_the_cost(embedded_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    words = [
        "sample",
        str(embedded_bundle("digits-var")),
        "--decoder",
        "small",
        "-o",
        str(tmp_path / "x.png"),
    ]
    shown = CliRunner().invoke(main, words)
    assert shown.exit_code == 0, shown.output
    assert "decoder small, against the full one: 12" in shown.stdout
    report = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert report["decoder"] == "small"
    assert report["decoder_cost"]["operations"] < 0.13


def test_one_that_there_is_not(embedded_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = embedded_bundle("digits-var")
    with pytest.raises(BundleError, match="no decoder 'tiny'") as error:
        ddexport.load(bundle, decoder="tiny")
    assert "full, small" in error.value.hint
    with ddexport.load(bundle) as pipe, pytest.raises(BundleError):
        pipe.stream([0], decoder="tiny")  # at once
