"""Latency tables from what others wrote: known forms are read, everything else is passed over."""

from __future__ import annotations

import json
import math

import pytest

from ddexport.validate.page.latency import Latency, latencies, measure

ROW = {"model": "m", "backend": "openvino", "precision": "bf16", "batch": 4, "steps": 2, "total_ms": 8.0}


@pytest.mark.parametrize("data", [[ROW], {"rows": [ROW]}])
def test_rows_of_a_benchmark(data):
    assert latencies("bench.json", data) == [
        Latency("bench.json", "openvino", "bf16", 4, "2", None, None, 8.0, None, None)
    ]


def test_timings_of_validate_speed_become_times_of_a_batch():
    data = {
        "timings": [{"name": "teacher", "passes": 4, "image": {"1": 8.0, "64": 2.0}, "sequence": {"64": 1.5}}]
    }
    one, many = latencies("speed.json", data)
    assert (one.batch, one.total_ms, one.student_ms, one.images_per_s) == (1, 8.0, None, 125.0)
    assert (many.batch, many.total_ms, many.student_ms, many.decoder_ms) == (64, 128.0, 96.0, 32.0)
    assert many.steps == "teacher" and many.images_per_s == 500.0


@pytest.mark.parametrize(
    "data",
    [
        None, "text", 3, {}, {"rows": 7}, {"rows": [7, None]}, {"timings": [1, {"image": 3}]},
        {"timings": [{"image": {"x": 1.0, "2": None}}]}, [{**ROW, "batch": 0}], [{**ROW, "batch": True}],
        [{**ROW, "total_ms": "8"}], [{**ROW, "total_ms": math.nan}], [{**ROW, "total_ms": -1}],
    ],
)  # fmt: skip
def test_what_has_no_time_is_passed_over(data):
    assert latencies("x", data) == []


def test_an_open_bundle_is_timed_in_every_schedule(random_bundle):
    """And what is measured is read back as it was."""
    from ddexport.runtime.pipeline import load

    with load(random_bundle) as pipe:
        found = measure(pipe, (1, 3))
    assert [(row.steps, row.batch) for row in found] == [("1", 1), ("2", 1), ("1", 3), ("2", 3)]
    for row in found:
        assert row.total_ms > 0 and row.images_per_s == pytest.approx(row.batch * 1e3 / row.total_ms)
    again = latencies("", json.loads(json.dumps({"rows": [row.to_dict() for row in found]})))
    assert again == found
