"""A plot of `validate comparison`: Frechet distance against the time of an image, a panel for each batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddexport.runtime.errors import DDError, OutputError

if TYPE_CHECKING:
    from ddexport.validate.comparison import Row

LOOKS: dict[str, tuple[str, tuple[int, int], str]] = {  # colour, and where a label is from its point
    "teacher": ("#3b4252", (0, -17), "center"),
    "at once": ("#c8783c", (7, 6), "left"),
    "student": ("#1f6fb4", (0, -18), "center"),
}


def write_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Both axes logarithmic, every point labelled, bars for the range over the seeds.

    Raises DDError without matplotlib, OutputError when the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DDError("the plot needs matplotlib", 'pip install "ddexport[validate]"') from error

    batches = list(rows[0].timing.image)
    figure = Figure(figsize=(5.6 * len(batches), 4.4), dpi=110, layout="constrained")
    figure.suptitle(f"{title}: quality against time", fontsize=12)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for number, (panel, batch) in enumerate(zip(panels, batches, strict=True)):
        _draw(panel, rows, batch)
        if number == 0:
            panel.set_ylabel("Frechet distance (lower is better)")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}", "give a path ending in .png") from error


def _draw(panel: Any, rows: Sequence[Row], batch: int) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    for by, (colour, offset, align) in LOOKS.items():
        own = [row for row in rows if row.kind.by == by]
        xs = [row.timing.image[batch] for row in own]
        sets = [[quality.frechet for quality in row.quality] for row in own]
        ys = [sum(values) / len(values) for values in sets]
        below = [y - min(values) for y, values in zip(ys, sets, strict=True)]
        above = [max(values) - y for y, values in zip(ys, sets, strict=True)]
        panel.errorbar(xs, ys, [below, above], fmt="o-", ms=7, color=colour, capsize=3, lw=0.8)
        for row, x, y in zip(own, xs, ys, strict=True):
            panel.annotate(
                row.kind.name, (x, y), offset, textcoords="offset points", color=colour, fontsize=10, ha=align
            )
    panel.margins(x=0.16, y=0.12)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    panel.tick_params(which="both", labelsize=9)
    panel.grid(True, which="both", color="#e4e4e8", lw=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.set_xlabel(f"ms an image, batch {batch}")
