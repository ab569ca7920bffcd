"""What a run leaves behind: the table, the JSON, and pictures that can be drawn of any outcome."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ddexport.runtime.errors import OutputError
from ddexport.validate import pictures
from ddexport.validate.compare import measure
from ddexport.validate.metrics._base import Comparison, Limits, Measurement
from ddexport.validate.report import ParityReport, Settings, failure_line, table, write_report
from tests.validate.toys import compare

SETTINGS = Settings(
    bundle="build/toy",
    manifest="0" * 64,
    name="toy <b>",
    weights="random weights, seed 1",
    precision="fp32",
    backend="none",
    images=4,
    seed=0,
    batch=5,
    labels=(0, 1, 2, 3),
    steps=("1", "2"),
    versions={"numpy": np.__version__},
    seconds=0.1,
)


@pytest.fixture
def run(toy, four_images, limits: Limits):
    """run(bundle) -> the report and the comparison of a toy bundle with the toy reference."""

    def run(bundle) -> tuple[ParityReport, Comparison]:
        comparison = compare(bundle, toy(), four_images)
        return ParityReport(SETTINGS, limits, tuple(measure(comparison, limits))), comparison

    return run


def test_the_table_names_what_failed_and_where(toy, run):
    report, _ = run(toy(embedding_error=1.0))
    line = next(line for line in table(report).splitlines() if "FAIL" in line)
    assert "embeddings, relative error" in line
    assert "image" in line
    assert "position" in line
    assert table(report).endswith(f"{len(report.failures)} of {sum(m.gated for m in report.measurements)}"
                                  " measurements past their limits")  # fmt: skip


def test_the_table_says_that_the_weights_are_random(toy, run):
    assert "random weights, seed 1" in table(run(toy())[0]).splitlines()[0]


def test_a_failed_row_in_one_line():
    one = Measurement("tokens", "step 1", "tokens that differ", 2.0, 0.0, where="image 3, position 1")
    assert failure_line(one) == "step 1: tokens that differ 2, limit <= 0, worst at image 3, position 1"


def test_the_json_is_strict_and_complete(toy, run, tmp_path):
    """Infinite and undefined values included, which JSON has no word for."""
    bundle = toy()
    bundle.embedding_weight[:] = np.nan
    report, comparison = run(bundle)
    write_report(report, comparison, tmp_path)
    text = (tmp_path / "parity.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["passed"] is False
    assert data["limits"] == dataclasses.asdict(report.limits)
    assert len(data["measurements"]) == len(report.measurements)
    values = [one["value"] for one in data["measurements"] if not one["passed"]]
    assert "nan" in values


def test_the_page_shows_every_row_and_escapes_names(toy, run, tmp_path):
    report, comparison = run(toy(pixel_error=0.5))
    page = write_report(report, comparison, tmp_path).read_text()
    assert "toy &lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<tr class=") == len(report.measurements)
    assert page.count('<tr class="fail">') == len(report.failures) > 0
    for name in ("worst.png", "margins.png"):
        assert f'src="{name}"' in page
        assert (tmp_path / name).stat().st_size > 0


def test_a_report_that_cannot_be_written_says_where(toy, run, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken"):
        write_report(*run(toy()), tmp_path / "taken")


def test_worst_images_come_first_each_once(toy, run):
    _, comparison = run(toy())
    end = comparison.images[1]
    damaged = end.got.copy()
    damaged[2] = 1.0 - damaged[2]
    changed = Comparison(comparison.students, [dataclasses.replace(end, got=damaged), *comparison.images[2:]])
    ranked = pictures.ranked([pair for pair in changed.images if not pair.itself])
    assert ranked[0][1] == 2
    assert sorted(index for _, index, _ in ranked) == [0, 1, 2, 3]


def test_the_difference_column_shows_the_amplified_difference(toy, run):
    """Black where bundle and reference agree, bright where they do not, however small the difference is."""
    _, comparison = run(toy(pixel_error=1e-5))
    sheet = np.asarray(pictures.worst_images(comparison))
    left = 3 * pictures.GAP + 2 * pictures.TILE
    tile = sheet[pictures.LINE + pictures.GAP :][: pictures.TILE - 2, left : left + pictures.TILE]
    assert tile.max() > 200
    _, same = run(toy())
    sheet = np.asarray(pictures.worst_images(same))
    tile = sheet[pictures.LINE + pictures.GAP :][: pictures.TILE - 2, left : left + pictures.TILE]
    assert tile.max() == 0


def test_the_margin_plot_marks_differing_tokens(toy, run, limits):
    def red(bundle) -> bool:
        pixels = np.asarray(pictures.token_margins(run(bundle)[1], limits.token_margin))
        return bool((pixels[pictures.AREA.bottom + 2 :] == pictures.FAULT).all(-1).any())

    assert red(toy(flip_first_token=True))
    assert not red(toy())


@pytest.mark.parametrize("size", [0.0, 1e-9, 0.3, 1.0, np.inf])
def test_the_amplification_keeps_the_difference_in_range(size):
    factor = pictures.amplification(size)
    assert factor >= 1
    assert not np.isfinite(size) or size * factor <= 1
