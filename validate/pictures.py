"""The pictures of a parity report: the worst images side by side, and how close the tokens were."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ddexport.validate.metrics._base import Comparison, FloatArray, ImagePair, StepPair, largest_difference
from ddexport.validate.metrics.tokens import margins

INK, PALE, GRID = (32, 32, 36), (120, 120, 128), (225, 225, 230)
BAR, FAULT, LIMIT = (70, 120, 180), (200, 40, 40), (220, 130, 20)
SHOWN_IMAGES, TILE, GAP, LINE = 4, 192, 12, 20
PLOT = (760, 320)
DECADES = (-6, 2)  # of the margin axis
BINS = 48


class AREA:
    """Where the bars of the margin plot are."""

    left, right, top, bottom = 56, 740, 70, 280


def worst_images(comparison: Comparison) -> Image.Image:
    """The images that differ most: bundle, reference and their difference, one row each."""
    shown = ranked(comparison.pictures())
    height = LINE + len(shown) * (TILE + LINE + GAP) + GAP
    sheet = Image.new("RGB", (3 * TILE + 4 * GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("bundle", "reference", "difference")):
        draw.text((GAP + column * (TILE + GAP), 4), title, fill=INK, font=_font(14))
    for row, (pair, index, size) in enumerate(shown):
        top = LINE + GAP + row * (TILE + LINE + GAP)
        factor = amplification(size)
        difference = np.abs(pair.got[index] - pair.expected[index]) * factor
        for column, image in enumerate((pair.got[index], pair.expected[index], difference)):
            sheet.paste(_tile(image), (GAP + column * (TILE + GAP), top))
        text = f"{pair.scope}, {pair.places[index]}: difference up to {size:.2g}, shown times {factor:g}"
        draw.text((GAP, top + TILE + 3), text, fill=PALE, font=_font(12))
    return sheet


def token_margins(comparison: Comparison, limit: float) -> Image.Image:
    """How clear the reference's choices were: a histogram of its top-2 logit margins on a logarithmic axis.

    Differing tokens are marked in red below the axis. What lies left of `limit` could be excused; the largest
    logit error shows how far rounding really reaches.
    """
    pairs = [pair for pair in comparison.students if not pair.itself]
    values = np.concatenate([margins(pair.expected.logits)[pair.decided()] for pair in pairs])
    faults = np.concatenate([margins(pair.expected.logits)[pair.differing()] for pair in pairs])
    plot = Image.new("RGB", PLOT, "white")
    draw = ImageDraw.Draw(plot)
    title = f"Top-2 logit margin of the reference: {len(values)} tokens, {len(faults)} differ"
    draw.text((AREA.left, 10), title, fill=FAULT if len(faults) else INK, font=_font(16))
    _histogram(draw, values)
    _axis(draw)
    for fault in faults:
        x = _across(float(fault))
        draw.polygon([(x, AREA.bottom), (x - 4, AREA.bottom + 9), (x + 4, AREA.bottom + 9)], fill=FAULT)
    _mark(draw, limit, f"limit {limit:g}", LIMIT, row=0)
    error = _largest_logit_error(pairs)
    _mark(draw, error, f"largest logit error {error:.2g}", PALE, row=1)
    return plot


def _across(margin: float) -> float:
    """The x of a margin; what lies outside the axis is drawn at its end."""
    low, high = DECADES
    share = (math.log10(min(max(margin, 10.0**low), 10.0**high)) - low) / (high - low)
    return AREA.left + share * (AREA.right - AREA.left)


def _histogram(draw: ImageDraw.ImageDraw, values: FloatArray) -> None:
    edges = np.logspace(*DECADES, BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    most = max(int(counts.max()), 1)
    for count, start, stop in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            height = int(count) / most * (AREA.bottom - AREA.top)
            draw.rectangle(
                (_across(start) + 1, AREA.bottom - height, _across(stop) - 1, AREA.bottom), fill=BAR
            )
    for count, y in ((most, AREA.top), (0, AREA.bottom)):
        draw.text((AREA.left - 8, y), str(count), fill=PALE, font=_font(12), anchor="rm")


def _axis(draw: ImageDraw.ImageDraw) -> None:
    draw.line((AREA.left, AREA.bottom, AREA.right, AREA.bottom), fill=INK)
    for power in range(DECADES[0], DECADES[1] + 1):
        x = _across(10.0**power)
        draw.line((x, AREA.bottom, x, AREA.bottom + 5), fill=INK)
        draw.text((x, AREA.bottom + 12), f"{10.0**power:g}", fill=INK, font=_font(12), anchor="ma")


def _mark(draw: ImageDraw.ImageDraw, value: float, text: str, colour: tuple[int, int, int], row: int) -> None:
    x, y = _across(value), AREA.top - 24 + 14 * row
    draw.line((x, y, x, AREA.bottom), fill=colour, width=2)
    draw.text((x + 5, y - 4), text, fill=colour, font=_font(12))


def ranked(pairs: Sequence[ImagePair]) -> list[tuple[ImagePair, int, float]]:
    """The images with the largest difference, each once, where it is worst: pair, index, difference."""
    worst: dict[int, tuple[ImagePair, int, float]] = {}
    for pair in pairs:
        sizes = np.abs(pair.got.astype(np.float64) - pair.expected).max(axis=(1, 2, 3))
        for i, size in enumerate(np.nan_to_num(sizes, nan=np.inf)):
            if i not in worst or size > worst[i][2]:
                worst[i] = (pair, i, float(size))
    return sorted(worst.values(), key=lambda entry: -entry[2])[:SHOWN_IMAGES]


def amplification(size: float) -> float:
    """The factor, of one digit, that makes a difference of `size` nearly white and keeps it below one."""
    if not math.isfinite(size) or size <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(-math.log10(size))
    return float(max(math.floor(1.0 / (size * power)) * power, 1.0))


def _tile(image: FloatArray) -> Image.Image:
    values = np.rint(np.clip(np.nan_to_num(image, nan=1.0), 0.0, 1.0) * 255.0)
    pixels: npt.NDArray[np.uint8] = values.astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    scale = min(TILE / picture.width, TILE / picture.height)
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), method)


def _largest_logit_error(pairs: Sequence[StepPair]) -> float:
    return max(
        largest_difference(p.expected.logits, p.got.logits, np.ones(p.expected.logits.shape[:2], dtype=bool))[
            0
        ]
        for p in pairs
    )


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow 10.0 has its small bitmap font alone
        return ImageFont.load_default()
