"""The pictures of a parity report can be drawn of any outcome, and show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from ddexport.validate import pictures
from ddexport.validate.metrics._base import Comparison, Limits
from tests.validate.toys import Rows, ToyModel, compare


@pytest.fixture
def run(four_images: Rows) -> Callable[[ToyModel], Comparison]:
    """run(bundle) -> the comparison of a toy bundle with the toy reference."""
    return lambda bundle: compare(bundle, ToyModel(), four_images)


def test_worst_images_come_first_each_once(toy, run):
    comparison = run(toy())
    end = comparison.images[1]
    damaged = end.got.copy()
    damaged[2] = 1.0 - damaged[2]
    changed = Comparison(comparison.steps, [dataclasses.replace(end, got=damaged), *comparison.images[2:]])
    ranked = pictures.ranked([pair for pair in changed.images if not pair.itself])
    assert ranked[0][1] == 2
    assert sorted(index for _, index, _ in ranked) == [0, 1, 2, 3]


def test_the_difference_column_shows_the_amplified_difference(toy, run):
    """Black where bundle and reference agree, bright where they do not, however small the difference is."""
    comparison = run(toy(pixel_error=1e-5))
    sheet = np.asarray(pictures.worst_images(comparison))
    left = 3 * pictures.GAP + 2 * pictures.TILE
    tile = sheet[pictures.LINE + pictures.GAP :][: pictures.TILE - 2, left : left + pictures.TILE]
    assert tile.max() > 200
    same = run(toy())
    sheet = np.asarray(pictures.worst_images(same))
    tile = sheet[pictures.LINE + pictures.GAP :][: pictures.TILE - 2, left : left + pictures.TILE]
    assert tile.max() == 0


def test_the_margin_plot_marks_differing_tokens(toy, run, limits: Limits):
    def red(bundle) -> bool:
        pixels = np.asarray(pictures.token_margins(run(bundle), limits.token_margin))
        return bool((pixels[pictures.AREA.bottom + 2 :] == pictures.FAULT).all(-1).any())

    assert red(toy(flip_first_token=True))
    assert not red(toy())


@pytest.mark.parametrize("size", [0.0, 1e-9, 0.3, 1.0, np.inf])
def test_the_amplification_keeps_the_difference_in_range(size):
    factor = pictures.amplification(size)
    assert factor >= 1
    assert not np.isfinite(size) or size * factor <= 1
