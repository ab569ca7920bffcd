"""What a run leaves behind: the table, and the file, read back with the suspicion that it deserves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from PIL import Image

from ddexport.runtime.errors import OutputError
from ddexport.validate.report import SCHEMA, Measurement, Report, ReportError, read, table, wide_table, write

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


def test_a_report_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken"):
        write(report_of(), tmp_path / "taken")


def test_a_wide_table_has_a_column_a_key() -> None:
    assert (
        wide_table([{"name": "a", "n": "1"}, {"name": "long", "n": "22"}]) == "name   n\na      1\nlong  22"
    )
    assert wide_table([]) == ""


@given(st.floats(allow_nan=True), st.floats(allow_nan=False, allow_infinity=False))
def test_exactly_the_values_within_the_limit_pass(value: float, limit: float) -> None:
    """NaN passes in neither direction."""
    assert Measurement("m", "s", "n", value, limit, "at most").passed == (value <= limit)
    assert Measurement("m", "s", "n", value, limit, "at least").passed == (value >= limit)
    assert Measurement("m", "s", "n", value).passed
