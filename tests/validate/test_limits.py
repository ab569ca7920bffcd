"""`validate limits`: the worst of several runs beside each limit, and which limits are too loose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from ddexport.validate.limits import command, rows_of
from ddexport.validate.report import Measurement


def row(name: str, value: float, limit: float | None, direction: str = "at most") -> Measurement:
    return Measurement("m", "s", name, value, limit, direction, rule=name)  # type: ignore[arg-type]


def test_a_limit_is_at_most_twice_the_largest_value() -> None:
    for measured, limit, ratio, verdict in (
        (0.5, 1.0, 2.0, "ok"),
        (0.4, 1.0, 2.5, "too loose"),
        (1.25, 1.0, 0.8, "too tight"),
        (0.0, 0.0, 1.0, "ok"),
    ):
        rows = [row("logits_rms", measured / 3, limit), row("logits_rms", measured, limit)]
        (found,) = rows_of(rows, "bf16")
        assert (found.measured, found.ratio, found.verdict) == (measured, pytest.approx(ratio), verdict)


def test_decibels_are_ratios_of_the_errors() -> None:
    psnr = [row("image_psnr", value, 60.0, "at least") for value in (90.0, 66.0)]
    (found,) = rows_of(psnr, "fp32")
    assert (found.measured, found.verdict) == (66.0, "ok")
    assert found.ratio == pytest.approx(1.995, abs=1e-3)
    (loose,) = rows_of([row("image_psnr", 66.1, 60.0, "at least")], "fp32")
    assert loose.verdict == "too loose"


def test_what_float32_leaves_out_has_a_limit_of_its_own() -> None:
    (undefined,) = rows_of([row("logits_rms", value, 1.0) for value in (0.5, math.nan, 0.7)], "fp32")
    assert undefined.verdict == "too tight"
    assert rows_of([row("images_left_out", 0.0, 0.1)], "fp32")[0].verdict == "ok"
    assert rows_of([row("images_left_out", 0.0, 0.2)], "fp32")[0].verdict == "too loose"
    assert rows_of([row("images_left_out", 0.2, 0.1)], "fp16")[0].verdict == "too tight"
    assert rows_of([row("drawn_left_out", 0.0, None)], "fp16")[0].verdict == "not stated"


def test_the_command_names_the_limits_to_correct(random_bundle: Path) -> None:
    """Those of the golden recipe are far from what so small a model needs."""
    result = CliRunner().invoke(
        command, [str(random_bundle), "--seeds", "2", "--images", "4", "--backend", "onnxruntime", "--json"]
    )
    assert result.exit_code == 3
    rows = {one["limit_name"]: one for one in json.loads(result.stdout)}
    assert set(rows) >= {"token_margin", "logits_rms", "image_psnr", "pixel_psnr", "images_left_out"}
    assert rows["token_margin"]["verdict"] == "too loose"
    assert "token_margin" in result.stderr
