"""The plots: well-formed, true to their numbers, with every text escaped."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from ddexport.validate.page.evidence import Histogram, Mismatch
from ddexport.validate.page.svg import LEFT, RIGHT, Point, against_passes, against_steps, closeness

NAMESPACE = "{http://www.w3.org/2000/svg}"


def elements(svg: str, tag: str, kind: str = "") -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)
    return [one for one in root.iter(NAMESPACE + tag) if not kind or kind in one.get("class", "").split()]


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in elements(svg, "text")]


def test_margins_and_errors_stand_where_they_belong():
    plot = closeness(Histogram.of(np.full(50, 2e-6)), Histogram.of(np.full(5, 2.0)), 1e-3, (), "t")
    (error,), (margin,) = ([one for one in elements(plot, "rect", kind) if one.get("width") != "12"]
                           for kind in ("errors", "margins"))  # fmt: skip
    limit = float(elements(plot, "line", "limit")[0].get("x1"))
    assert LEFT <= float(error.get("x")) < limit < float(margin.get("x")) <= RIGHT
    assert error.get("height") == margin.get("height")  # each scaled to its own tallest bar
    assert "error of each logit (50)" in texts(plot)


def test_mismatches_are_marked_at_their_margin_excused_or_not():
    both = [
        Mismatch("s", "image <1>", 3, 1, 2, margin, 0.1, excused)
        for margin, excused in ((0.1, False), (1e-4, True))
    ]
    plot = closeness(Histogram.of(np.array([1e-5])), Histogram.of(np.array([1.0])), 1e-3, both, "t")
    (fault,) = elements(plot, "polygon", "fault")
    (excused,) = elements(plot, "polygon", "excused")
    assert float(excused.get("points").split(",")[0]) < float(fault.get("points").split(",")[0])
    assert "image &lt;1&gt;" in plot


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros(0), np.array([np.inf, np.nan])])
def test_odd_histograms_are_drawn(values):
    plot = closeness(Histogram.of(values), Histogram.of(values), 1e-3, (), "t")
    assert "nan" not in plot.lower() and elements(plot, "line", "axis")


def test_higher_values_stand_higher_and_whiskers_enclose_them():
    points = [Point(0, 0.5, 0.4, 0.7, "side-bundle"), Point(1, 2.0, None, None, "side-bundle")]
    plot = against_steps(points, ["1 step", "2 steps"], [("side-bundle", "bundle")], "t")
    first, second = elements(plot, "circle")
    assert float(first.get("cy")) > float(second.get("cy")) and float(first.get("cx")) < float(
        second.get("cx")
    )
    (whisker,) = elements(plot, "line", "whisker")
    assert float(whisker.get("y1")) > float(first.get("cy")) > float(whisker.get("y2"))
    assert {"1 step", "2 steps", "0.5", "2"} <= set(texts(plot))


def test_values_that_are_no_numbers_are_left_out():
    points = [Point(0, math.nan, None, None, "side-bundle"), Point(0, 1.0, math.inf, math.nan, "side-bundle")]
    plot = against_steps(points, ["a"], [("side-bundle", "b")], "t")
    assert len(elements(plot, "circle")) == 1 and not elements(plot, "line", "whisker")
    assert (
        len(elements(against_passes([("x", 1.0, math.nan, "k"), ("y", 0.0, 1.0, "k")], "t"), "circle")) == 0
    )


def test_names_of_points_do_not_cover_each_other():
    plot = against_passes([("one", 4.0, 0.5, "k"), ("two", 4.0, 0.5, "k"), ("three", 4.0, 0.5, "k")], "t")
    lines = [float(one.get("y")) for one in elements(plot, "text", "value")]
    assert min(abs(a - b) for i, a in enumerate(lines) for b in lines[:i]) >= 14


def test_titles_are_escaped():
    plot = against_passes([("<b>&", 1.0, 1.0, "k")], '"><script>')
    assert "<script>" not in plot and "<b>" not in plot
    assert ElementTree.fromstring(plot).get("aria-label") == '"><script>'
