"""A plot of `validate curve`: Frechet distance against the time of an image, a panel for each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddexport.runtime.errors import DDError, OutputError

if TYPE_CHECKING:
    from ddexport.validate.curve import Point

STUDENT, MIXED, TEACHER = "#1f6fb4", "#2e8b57", "#3b4252"


def write_plot(points: Sequence[Point], title: str, path: Path) -> None:
    """One line through all schedules in the order of their steps, bars for the range over the seeds.

    Raises DDError without matplotlib, OutputError when the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DDError("the plot needs matplotlib", 'pip install "ddexport[validate]"') from error

    batches = list(points[0].times)
    figure = Figure(figsize=(5.6 * len(batches), 4.2), dpi=110, layout="constrained")
    figure.suptitle(f"{title}: what each step more buys", fontsize=12)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for number, (panel, batch) in enumerate(zip(panels, batches, strict=True)):
        _draw(panel, points, batch)
        if number == 0:
            panel.set_ylabel("Frechet distance (lower is better)")
            _legend(panel)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}", "give a path ending in .png") from error


def colour(point: Point) -> str:
    """Students alone, with their teacher, or the teacher alone."""
    if not point.teacher:
        return STUDENT
    return MIXED if point.student else TEACHER


def _draw(panel: Any, points: Sequence[Point], batch: int) -> None:
    xs = [point.image(batch) for point in points]
    sets = [[quality.frechet for quality in point.quality] for point in points]
    ys = [sum(values) / len(values) for values in sets]
    panel.plot(xs, ys, color="#b8bcc6", lw=1, zorder=1)
    for point, x, y, values in zip(points, xs, ys, sets, strict=True):
        bars = [[y - min(values)], [max(values) - y]]
        panel.errorbar([x], [y], bars, fmt="o", ms=7, capsize=3, lw=0.8, color=colour(point))
        panel.annotate(
            point.name, (x, y), (6, 7), textcoords="offset points", color=colour(point), fontsize=10
        )
    panel.margins(x=0.16, y=0.16)
    panel.tick_params(labelsize=9)
    panel.grid(True, color="#e4e4e8", lw=0.6)
    panel.set_axisbelow(True)
    panel.set_ylim(bottom=0)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.set_xlabel(f"ms an image, batch {batch}")


def _legend(panel: Any) -> None:
    for name, own in (
        ("student alone", STUDENT),
        ("student and teacher", MIXED),
        ("teacher alone", TEACHER),
    ):
        panel.plot([], [], "o", color=own, label=name)
    panel.legend(fontsize=9, frameon=False, title="steps", title_fontsize=9)
