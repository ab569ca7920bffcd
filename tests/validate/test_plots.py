"""Plots and contact sheets: what they show is where it belongs, and any outcome can be drawn."""

from __future__ import annotations

import numpy as np
from PIL import ImageColor

from ddexport.validate import plots
from ddexport.validate.report import Measurement
from tests.validate.test_page import fid_report
from tests.validate.toys import compare


def has(picture, colour: str, box: tuple[float, float, float, float] = (0, 0, 1, 1)) -> bool:
    """Whether a colour is in a part of a picture: left, top, right, bottom as shares."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    left, top, right, bottom = (
        round(share * size) for share, size in zip(box, (width, height) * 2, strict=True)
    )
    return bool((pixels[top:bottom, left:right] == ImageColor.getrgb(colour)).all(-1).any())


def tile(picture, column: int, top: int = plots.GAP):
    left = plots.GAP + column * (plots.TILE + plots.GAP)
    return np.asarray(picture)[top : top + plots.TILE, left : left + plots.TILE]


def test_the_difference_column_shows_the_amplified_difference(toy, four_images):
    """Black where bundle and reference agree, bright where they do not, however small the difference is."""
    for error, bright in ((1e-5, True), (0.0, False)):
        sheet = plots.worst_images(compare(toy(pixel_error=error), toy(), four_images))
        top = plots.GAP * 2 + sheet.width // 40
        assert bool(tile(sheet, 2, top).max() > 200) is bright
        np.testing.assert_allclose(tile(sheet, 0, top), tile(sheet, 1, top), atol=1)


def test_samples_keep_their_order_and_their_pixels():
    images = [np.full((8, 4, 3), 10 * number, np.uint8) for number in range(7)]
    sheet = plots.samples(images, ["a very long name that no tile has the room for"] * 7)
    assert [int(tile(sheet, column)[0, 0, 0]) for column in range(5)] == [0, 10, 20, 30, 40]
    assert int(tile(sheet, 0)[0, -1, 0]) == 255  # half as wide as high
    large = plots.samples([np.full((512, 512, 3), 7, np.uint8)], [""])
    assert (tile(large, 0) == 7).all()


def test_the_margin_plot_marks_differing_tokens_and_the_limit(toy, four_images):
    below = (0, 0.8, 1, 0.9)  # the axis
    for bundle, marked in ((toy(flip_first_token=True), True), (toy(), False)):
        picture = plots.token_margins(compare(bundle, toy(), four_images), 1e-3)
        assert has(picture, plots.RED, below) is marked
        assert has(picture, plots.ORANGE, (0, 0.2, 1, 0.7))


def test_margins_of_broken_logits_are_drawn(toy, four_images):
    broken, constant = toy(), toy()
    broken.logit_weight[:], constant.logit_weight[:] = np.nan, 0.0
    for sides in ((broken, toy()), (toy(), broken), (constant, toy()), (toy(), constant)):
        assert plots.token_margins(compare(*sides, four_images), 1e-3).width > 1000


def test_fid_is_plotted_for_both_sides_with_whiskers(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    report = fid_report(tmp_path)
    low = Measurement("fid", "1 step", "FID, bundle", 0.1)
    for rows, blue, orange in ((report.rows, True, True), ((low,), True, False)):
        picture = plots.against_steps(fid_report(tmp_path, rows=rows))
        assert has(picture, plots.BLUE) is blue and has(picture, plots.ORANGE) is orange
    broken = Measurement("fid", "2 steps", "FID, bundle", float("nan"))
    assert has(plots.against_steps(fid_report(tmp_path, rows=(low, broken))), plots.BLUE)
    assert list(plots.of_fid(report)) and plots.of_fid(fid_report(tmp_path, rows=report.rows[2:3])) == {}
