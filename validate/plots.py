"""Plots, by matplotlib's Figure API; each function returns a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from PIL import Image

PARTS = {"student": "#0072b2", "teacher": "#e69f00", "decoder": "#56b4e9", "the rest": "#999999"}
"""Of Okabe and Ito's palette, whose colours keep apart for the colour-blind."""
WRONG = "#d55e00"


def bench_bars(rows: Sequence[Mapping[str, Any]], title: str) -> Image.Image:
    """Stacked bars of student, teacher, decoder and the rest, a panel a model and batch; 1000 pixels wide.

    rows: of `ddexport bench`; those that were not timed are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["total_ms"] is not None]
    grouped = groupby(timed, key=lambda row: f"{row['model']}, batch {row['batch']}")
    groups = [(name, list(group)) for name, group in grouped]
    heights = [len(group) + 1 for _, group in groups]
    figure = Figure(figsize=(10, 1.3 + sum(0.34 * height + 0.4 for height in heights)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, group) in zip(panels, groups, strict=True):
        _bench_panel(panel, group)
        panel.set_title(name, loc="left", fontsize=10)
    shown = {
        name: bars for panel in panels for bars, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, frameon=False)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return Image.open(stream)


def _bench_panel(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar a row, with its time and ratio; a wrong one says so."""
    several = len({row["threads"] for row in rows}) > 1
    names, texts = [], []
    for row in rows:
        threads = f", {row['threads']} thr." if several else ""
        names.append(f"{row['backend']} {row['precision']}, steps {row['steps']}{threads}")
        ratio = "" if row["speedup"] is None else f"  {row['speedup']:.2f}x"
        digits = ".3g" if row["total_ms"] < 1000 else ".0f"
        texts.append(f"{row['total_ms']:{digits}} ms{ratio}{'  WRONG' if row['passed'] is False else ''}")
    left = [0.0] * len(rows)
    for part, colour in PARTS.items():
        # Medians of the parts need not sum to the median of the whole.
        widths = [
            max(row["total_ms"] - start, 0.0) if part == "the rest" else row[f"{part}_ms"] or 0.0
            for row, start in zip(rows, left, strict=True)
        ]
        if any(widths):
            panel.barh(range(len(rows)), widths, left=left, color=colour, height=0.7, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, (end, text) in enumerate(zip(left, texts, strict=True)):
        colour = WRONG if text.endswith("WRONG") else "black"
        panel.text(end + 0.01 * max(left), place, text, va="center", fontsize=8.5, color=colour)
    panel.set_yticks(range(len(rows)), names, fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, max(left) * 1.35)
    panel.set_xlabel("milliseconds a batch, median of the rounds", fontsize=9)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
