"""What was measured is kept and found again, and nothing else is believed: other machines, versions, graphs,
and files that were tampered with count as nothing, with a warning and never an exception."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddexport.runtime.machine import Cpu, Machine, Package
from ddexport.runtime.manifest import Manifest, read_manifest
from ddexport.runtime.measured import (
    FOLDER,
    MAX_BYTES,
    Measured,
    Setting,
    common_setting,
    fingerprint,
    read_measured,
    times_of,
    write_measured,
)
from ddexport.runtime.options import Options

BASE = Measured("openvino", "2026.4.1", "fp32", None, "latency", 1, 1, 12.5, True)


def machine_of(**changes: Any) -> Machine:
    facts: dict[str, Any] = {
        "cpu": Cpu("Toy EPYC", 4, ("AVX2", "BF16")),
        "onnxruntime": Package("onnxruntime", "1.31.0", None),
        "openvino": Package("openvino", "2026.4.1", None),
        "distributions": {"own-engine": "3.0"},
    }
    return Machine(**(facts | changes))


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle, verify=False)


def write(bundle: Path, *records: Measured, machine: Machine | None = None) -> Path:
    path = write_measured(bundle, read_manifest(bundle, verify=False), machine or machine_of(), records)
    assert path is not None
    return path


def read(bundle: Path, machine: Machine | None = None) -> tuple[Measured, ...]:
    return read_measured(bundle, read_manifest(bundle, verify=False), machine or machine_of())


def test_nothing_measured_is_nothing_said(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(bundle) == ()
    assert not caplog.records
    assert not (bundle / FOLDER).exists()


def test_what_was_written_is_read(bundle: Path) -> None:
    records = (
        BASE,
        replace(BASE, steps="teacher", threads=2, mode="throughput", batch=8),
        Measured("onnxruntime", "1.31.0", "int8", 1, None, 2, 4, 3, False, "3.1 % of tokens differ", "cpu"),
        Measured("own_engine", "3.0", "fp32", None, None, 1, 1, 1.0, True),
    )
    path = write(bundle, *records)
    assert path == bundle / FOLDER / f"{fingerprint(machine_of())}.json"
    assert read(bundle) == records
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name]  # nothing half written is left


def test_a_newer_measurement_takes_the_place_of_the_older(bundle: Path) -> None:
    """And the others stay."""
    other = replace(BASE, batch=4)
    write(bundle, BASE, other)
    newer = replace(BASE, total_ms=11.0, passed=False, why="one image in ten is off")
    write(bundle, newer)
    assert set(read(bundle)) == {newer, other}


@pytest.mark.parametrize(
    "cpu",
    [
        Cpu("Other EPYC", 4, ("AVX2", "BF16")),
        Cpu("Toy EPYC", 2, ("AVX2", "BF16")),
        Cpu("Toy EPYC", 4, ("AVX2",)),
        Cpu("Toy EPYC", 4, None),
    ],
)
def test_another_cpu_has_a_file_of_its_own(bundle: Path, cpu: Cpu) -> None:
    mine, other = write(bundle, BASE), machine_of(cpu=cpu)
    assert read(bundle, other) == ()
    theirs = write(bundle, replace(BASE, total_ms=99.0), machine=other)
    assert theirs != mine
    assert [each.total_ms for each in read(bundle, other)] == [99.0]
    assert [each.total_ms for each in read(bundle)] == [12.5]


def test_a_file_that_was_copied_from_another_machine_is_left_aside(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, other = write(bundle, BASE), machine_of(cpu=Cpu("Other", 4, None))
    path.rename(path.with_name(f"{fingerprint(other)}.json"))
    assert read(bundle, other) == ()
    assert "is of another machine" in caplog.text


def test_another_version_of_the_engine_was_not_measured(bundle: Path) -> None:
    write(bundle, BASE)
    assert read(bundle, machine_of(openvino=Package("openvino", "2026.5.0", None))) == ()
    assert read(bundle, machine_of(openvino=Package("openvino", None, "missing", True))) == ()


def test_other_graphs_were_not_measured(
    bundle: Path, add_graphs: Callable[..., None], replace_file: Callable[[str, bytes], None]
) -> None:
    """New graphs of a precision leave the records of the others valid; other float32 graphs leave none,
    since an engine may compute in any precision from those."""
    add_graphs("int8")
    write(bundle, BASE, replace(BASE, precision="int8"), replace(BASE, precision="bf16"))
    replace_file("student_int8.onnx", (bundle / "student_int8.onnx").read_bytes() + b"\n")
    assert [each.precision for each in read(bundle)] == ["fp32", "bf16"]
    replace_file("decoder.onnx", (bundle / "decoder.onnx").read_bytes() + b"\n")
    assert read(bundle) == ()
    write(bundle, replace(BASE, total_ms=1.0))  # the old ones are dropped
    assert [each.total_ms for each in read(bundle)] == [1.0]


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


def spoil(path: Path, edit: Callable[[Any], object]) -> None:
    content = content_of(path)
    edit(content)
    path.write_text(json.dumps(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda path: path.write_text("{"),
    "empty": lambda path: path.write_text(""),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "a list": lambda path: path.write_text("[]"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "not a number": lambda path: path.write_text(path.read_text().replace("12.5", "NaN")),
    "too large": lambda path: path.write_text(" " * MAX_BYTES + path.read_text()),
    "a newer schema": lambda path: spoil(path, lambda c: c.update(schema=2)),
    "an unknown key": lambda path: spoil(path, lambda c: c.update(more=1)),
    "a missing key": lambda path: spoil(path, lambda c: c["records"][0]["measured"].pop("passed")),
    "a wrong type": lambda path: spoil(path, lambda c: c["records"][0]["measured"].update(passed="yes")),
    "a nested why": lambda path: spoil(path, lambda c: c["records"][0]["measured"].update(why=["x"])),
    "another machine": lambda path: spoil(path, lambda c: c["cpu"].update(cores=64)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_left_aside_and_written_anew(
    bundle: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(bundle, BASE)
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert read(bundle) == ()
    assert "is left aside" in caplog.text
    write(bundle, BASE)
    assert read(bundle) == (BASE,)


@pytest.mark.parametrize(
    "lie",
    [
        {"total_ms": 0.0},
        {"total_ms": -3.0},
        {"batch": 0},
        {"threads": 0},
        {"mode": "fast"},
        {"why": "\x1b[2Jall is well"},
        {"why": "x" * 1000},
    ],
)
def test_a_record_that_cannot_be_is_left_out(bundle: Path, lie: dict[str, Any]) -> None:
    """The others of the file count; a text that would steer the terminal is never shown."""
    other = replace(BASE, batch=2)
    path = write(bundle, BASE, other)
    spoil(path, lambda content: content["records"][0]["measured"].update(lie))
    assert read(bundle) == (other,)


def test_a_time_without_end_is_none(bundle: Path) -> None:
    path = write(bundle, BASE)
    path.write_text(path.read_text().replace("12.5", "1e999"))
    assert read(bundle) == ()
    with pytest.raises(ValueError, match="not a measurement"):
        write(bundle, replace(BASE, total_ms=float("nan")))


def test_a_reason_is_made_fit_to_be_shown(bundle: Path) -> None:
    write(bundle, replace(BASE, passed=False, why="two\nlines \x1b[31m" + "x" * 1000))
    (record,) = read(bundle)
    assert record.why.startswith("twolines [31mxxx")
    assert len(record.why) == 300


def test_links_that_lead_out_of_the_bundle_are_not_followed(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(bundle, BASE)
    outside = tmp_path / "outside"
    outside.mkdir()
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)
    assert read(bundle) == ()
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(outside)
    assert read(bundle) == ()
    before = (outside / path.name).read_bytes()
    assert write_measured(bundle, read_manifest(bundle), machine_of(), [replace(BASE, batch=3)]) is None
    assert (outside / path.name).read_bytes() == before
    assert "is left aside" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_does_not_hang_it(bundle: Path) -> None:
    path = write(bundle, BASE)
    path.unlink()
    os.mkfifo(path)
    assert read(bundle) == ()


def test_a_bundle_that_cannot_be_written_is_a_warning(
    bundle: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    (bundle / FOLDER).write_text("a file where the folder would be")
    assert write_measured(bundle, manifest, machine_of(), [BASE]) is None
    assert "what was measured is not kept" in caplog.text
    assert read(bundle) == ()


# Comparing times


def test_a_way_is_an_engine_a_precision_and_a_part() -> None:
    record = replace(BASE, backend="onnxruntime", mode=None, provider="cpu")
    assert record.is_of("onnxruntime", "fp32", Options(provider="cpu"))
    assert not record.is_of("onnxruntime", "fp32", Options(provider="cuda"))
    assert not record.is_of("onnxruntime", "int8", Options(provider="cpu"))
    assert not record.is_of("openvino", "fp32", Options(provider="cpu"))


def test_the_engines_own_choice_of_threads_is_all_cores() -> None:
    times = times_of([BASE], "openvino", "fp32", Options(), cores=4)
    assert times == {Setting(4, "latency", "1", 1): 12.5}


@pytest.mark.parametrize(
    ("settings", "asked", "chosen"),
    [
        ([], Options(), None),
        # One image before eight, one step before two.
        ([(4, "latency", "1", 8), (4, "latency", "2", 1), (4, "latency", "1", 1)], Options(), 2),
        # The mode asked for, then the threads asked for.
        ([(4, "latency", "1", 1), (4, "throughput", "1", 8)], Options(mode="throughput"), 1),
        ([(4, "latency", "1", 1), (2, "latency", "1", 8)], Options(threads=2), 1),
        ([(2, "latency", "1", 1), (4, "throughput", "1", 1)], Options(), 0),
        # Something is better than nothing.
        ([(2, "throughput", "teacher", 16)], Options(), 0),
    ],
)
def test_which_setting_ways_are_compared_in(settings: list[Any], asked: Options, chosen: int | None) -> None:
    tables = [{Setting(*each): 1.0} for each in settings]
    expected = None if chosen is None else Setting(*settings[chosen])
    assert common_setting(tables, asked, cores=4) == expected
    assert common_setting(tables[::-1], asked, cores=4) == expected


def test_a_setting_that_more_ways_share_is_better() -> None:
    alone, shared = Setting(4, "latency", "1", 1), Setting(4, "latency", "2", 8)
    assert common_setting([{alone: 1.0, shared: 2.0}, {shared: 3.0}], Options(), cores=4) == shared


def test_numbers_of_numpy_can_be_written(bundle: Path) -> None:
    """As a median comes out of it."""
    write(bundle, replace(BASE, total_ms=np.median([1.0, 2.0])))
    assert read(bundle)[0].total_ms == 1.5
