"""The quality-against-steps curve: which schedules it has, what is drawn and timed for each, and the plot."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ddexport import runtime
from ddexport.runtime.pipeline import Pipeline
from ddexport.validate import curve
from ddexport.validate.curve import Options, Point, measure, schedules_of, table, time_schedules
from ddexport.validate.curve_plot import MIXED, STUDENT, TEACHER, colour, write_plot
from ddexport.validate.quality import Quality

RUNTIME_TESTS = Path(__file__).parents[1] / "runtime"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_{name}_for_the_curve", RUNTIME_TESTS / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle of the runtime's tests, with its teacher."""
    root = load("conftest").write_bundle(tmp_path_factory.mktemp("toys") / "bundle")
    return Path(load("toy_teacher").add_teacher(root))


@pytest.fixture
def pipe(toy_bundle: Path) -> Iterator[Pipeline]:
    with runtime.load(toy_bundle, threads=1) as pipeline:
        yield pipeline


class FakeGauge:
    """Remembers what it is given; every row is as far away as its images are bright."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def measure(self, row: Any) -> Quality:
        self.rows.append(row)
        return Quality(0.5, float(row.images.mean()), 0, 0, 0, 0.25, 0.75)


def test_every_schedule_has_its_passes(pipe: Pipeline) -> None:
    assert schedules_of(pipe) == {"1": (1, 0), "2": (2, 0), "3": (2, 1), "4": (1, 3), "teacher": (0, 4)}


def test_what_is_measured_is_what_the_runtime_draws(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit images of balanced labels, with one noise for all schedules of a seed."""
    monkeypatch.setattr("ddexport.recipe.recipe_of", lambda manifest: None)
    gauge = FakeGauge()
    options = Options(images=7, seeds=(3, 4), batches=(1, 2), rounds=1)
    points = measure(pipe, options, gauge)  # type: ignore[arg-type]
    assert [point.name for point in points] == ["1", "2", "3", "4", "teacher"]
    assert [len(point.quality) for point in points] == [2] * 5
    row = gauge.rows[5 + 2]  # the second seed, three steps
    wanted = pipe([0, 1, 2, 0, 1, 2, 0], 3, seed=4, output="numpy").images
    np.testing.assert_allclose(row.images.numpy() * 255, np.moveaxis(wanted, 3, 1), atol=1e-3)
    assert row.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_every_part_that_runs_is_timed(pipe: Pipeline) -> None:
    times = time_schedules(pipe, ["1", "3", "teacher"], [1, 3], 2)
    assert times["1"][3].keys() == {"student", "decoder"}
    assert times["3"][1].keys() == {"student", "teacher", "decoder"}
    assert times["teacher"][1]["student"] == 0
    assert all(part >= 0 for found in times.values() for parts in found.values() for part in parts.values())


def point(name: str, student: int, teacher: int, frechet: float, ms: float) -> Point:
    quality = tuple(Quality(0.9, frechet + shift, 0, 0, 0, 0.8, 0.7) for shift in (-0.1, 0.1))
    return Point(name, student, teacher, quality, {1: {"student": ms, "decoder": 1.0}})


POINTS = [point("1", 1, 0, 2.0, 3.0), point("3", 2, 1, 1.5, 7.0), point("teacher", 0, 4, 1.0, 15.0)]


def test_the_table_has_the_trade() -> None:
    """FD with its range over the seeds, and the speed-up over the whole teacher."""
    lines = table(POINTS).splitlines()
    assert "2.00 +-0.10" in lines[1]
    assert "4.00 ms (4.0x)" in lines[1]
    assert "16.00 ms (1.0x)" in lines[3]


def test_the_plot_tells_who_draws(tmp_path: Path) -> None:
    assert [colour(one) for one in POINTS] == [STUDENT, MIXED, TEACHER]
    write_plot(POINTS, "Toy", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size[0] > 400
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    found = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(pixels, axis=0).tolist()}
    assert {STUDENT, MIXED, TEACHER} <= found


def test_wrong_options_and_the_json(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(curve, "measure", lambda pipe, options: POINTS)
    runner = CliRunner()
    result = runner.invoke(curve.command, [str(toy_bundle), "--json", "--plot", str(tmp_path / "p.png")])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["steps"] for one in found["points"]] == ["1", "3", "teacher"]
    assert found["points"][1]["image_ms"] == {"1": 8.0}
    assert (tmp_path / "p.png").exists()
    assert runner.invoke(curve.command, [str(toy_bundle), "--seeds", "a"]).exit_code == 2
    assert runner.invoke(curve.command, [str(toy_bundle), "--batches", "0"]).exit_code == 2
    assert runner.invoke(curve.command, [str(toy_bundle), "--plot", "curve.xyz"]).exit_code == 1
