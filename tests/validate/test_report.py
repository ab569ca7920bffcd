"""What a run leaves behind (the table and the file, read back with suspicion), its limits, and devices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image

from ddexport.devices import torch_device
from ddexport.runtime.errors import DDError
from ddexport.validate.limits import command, rows_of
from ddexport.validate.report import SCHEMA, Measurement, Report, ReportError, read, table, write

ROWS = (
    Measurement("tokens", "step 1", "tokens that differ", 2.0, 0.0, where="image 3, position 1", note="of 9"),
    Measurement("images", "step 1", "image PSNR, dB", math.inf, 60.0, "at least"),
    Measurement("images", "1 step, end to end", "share", 0.25, 0.5, note="1 of 4", rule="images_left_out"),
    Measurement("fid", "1 step, end to end", "FID", math.nan, low=0.1, high=0.2),
)


def report_of(*rows: Measurement, **changes: Any) -> Report:
    report = Report(
        schema=SCHEMA, kind="parity", name="toy", title="toy: none in fp32", manifest="0" * 64,
        precision="fp32", backend="none", images=4, seed=0, settings={"batch": 8}, versions={}, seconds=0.1,
        rows=rows,
    )  # fmt: skip
    return replace(report, **changes)


def test_the_table_names_what_failed_and_where() -> None:
    lines = table(report_of(*ROWS)).splitlines()
    failed = next(line for line in lines if "FAIL" in line)
    for word in ("tokens that differ", "2", "<= 0", "image 3, position 1", "of 9"):
        assert word in failed
    assert "nan [0.1, 0.2]" in next(line for line in lines if line.startswith("  FID"))
    assert lines[-1].startswith("parity fails: 1 of 3 measurements past their limits")
    assert lines[-1].endswith("1 of 4 in 1 step")  # left out
    assert str(ROWS[0]) == "step 1: tokens that differ 2, limit <= 0, worst at image 3, position 1; of 9"


def test_verdicts() -> None:
    good, bad = report_of(*ROWS[1:]), report_of(*ROWS)
    assert (good.passed, bad.passed, replace(good, no_verdict="too few").passed) == (True, False, None)
    assert "provisional" in replace(good, provisional=True).verdict
    assert "too few" in replace(good, no_verdict="too few").verdict


def test_the_file_is_strict_json_and_reads_back(tmp_path: Path) -> None:
    """Infinite and undefined values included, which JSON has no word for."""
    written = write(report_of(*ROWS), tmp_path, {"worst": Image.new("RGB", (2, 3))})
    path = tmp_path / "parity-fp32.json"
    data = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["value"] for row in data["rows"]] == [2.0, "inf", 0.25, "nan"]
    assert [row["passed"] for row in data["rows"]] == [False, True, True, True]
    assert data["passed"] is False
    assert Image.open(tmp_path / written.pictures["worst"]).size == (2, 3)
    assert repr(read(path)) == repr(written)  # nan is not equal to itself


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "parity-fp32.json"
    for lie in (
        {"schema": 1}, {"rows": [{"value": 1}]}, {"rows": ["a"]}, {"rows": 3}, {"kind": "speed"},
        {"images": "many"}, {"more": 1},
    ):  # fmt: skip
        path.write_text(json.dumps(report_of(*ROWS).to_dict() | lie))
        with pytest.raises(ReportError):
            read(path)


def test_verdicts_are_made_again_from_the_values(tmp_path: Path) -> None:
    path = tmp_path / "parity-fp32.json"
    data = report_of(*ROWS).to_dict()
    data["passed"], data["verdict"], data["rows"][0]["passed"] = True, "parity holds", True
    path.write_text(json.dumps(data))
    assert read(path).failures == ROWS[:1]


@given(st.floats(allow_nan=True), st.floats(allow_nan=False, allow_infinity=False))
def test_exactly_the_values_within_the_limit_pass(value: float, limit: float) -> None:
    """NaN passes in neither direction."""
    assert Measurement("m", "s", "n", value, limit, "at most").passed == (value <= limit)
    assert Measurement("m", "s", "n", value, limit, "at least").passed == (value >= limit)
    assert Measurement("m", "s", "n", value).passed


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


def test_the_cpu_is_there_and_products_keep_float32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert torch_device("cpu") == torch.device("cpu")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_that_is_not_there(monkeypatch):
    for seen in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        with pytest.raises(DDError, match="cuda:1"):
            torch_device("cuda:1")
    assert torch_device("cuda") == torch.device("cuda")
    for name in ("gpu", "meta", ""):
        with pytest.raises(DDError):
            torch_device(name)
