"""All plots and sheets of images that `validate` makes, each as a PIL image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddexport.validate.metrics._base import FloatArray

COLOURS = {  # by the kind of a method
    "teacher": "#3b4252",
    "student": "#1f6fb4",
    "student and teacher": "#2e8b57",
    "baseline": "#c8783c",
}
ZOOM, GAP, HEAD = 2, 12, 22  # of a sheet, in pixels


def frechet_against_time(
    rows: Sequence[Mapping[str, Any]], title: str, batches: Sequence[int]
) -> Image.Image:
    """Frechet distance against the time of an image, a panel for each batch size, both axes logarithmic.

    rows: of `validate distilled`. Each method that was timed is a point, with its number of passes and a bar
    for the range over the seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(batches), 4.6), dpi=110, layout="constrained")
    figure.suptitle(f"{title}: quality against time", fontsize=12)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        panel.set(xscale="log", yscale="log", xlabel=f"ms an image, batch {batch}")
        for kind, colour in COLOURS.items():
            own = [row for row in rows if row["kind"] == kind]
            if not own:
                continue
            times, distances = ([row[key] for row in own] for key in (f"ms_{batch}", "frechet"))
            bars = [row.get("frechet_half_range", 0.0) for row in own]
            panel.errorbar(times, distances, bars, fmt="o", color=colour, capsize=3, lw=0.8, label=kind)
            for row, point in zip(own, zip(times, distances, strict=True), strict=True):
                place = {"xytext": (6, 6), "textcoords": "offset points"}
                panel.annotate(str(row["passes"]), point, color=colour, fontsize=10, **place)
        panel.margins(x=0.1, y=0.12)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        panel.tick_params(which="both", labelsize=9)
        panel.grid(True, which="both", color="#e4e4e8", lw=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Frechet distance (lower is better)")
    panels[-1].legend(title="passes of a network", fontsize=9, title_fontsize=9, frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def panels_of_images(panels: Mapping[str, FloatArray], columns: int) -> Image.Image:
    """Sets of images (N, 3, H, W) in [0, 1] side by side under their names, each in rows of `columns`."""
    count, channels, height, width = next(iter(panels.values())).shape
    rows = count // columns
    size = (columns * width * ZOOM, rows * height * ZOOM)
    sheet = Image.new("RGB", (len(panels) * (size[0] + GAP) + GAP, HEAD + size[1] + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (name, images) in enumerate(panels.items()):
        left = GAP + number * (size[0] + GAP)
        tiles = images.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
        pixels = (tiles.reshape(rows * height, columns * width, channels) * 255).round().astype(np.uint8)
        pen.text((left, 3), name, "black", font=font)
        sheet.paste(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), (left, HEAD))
    return sheet
