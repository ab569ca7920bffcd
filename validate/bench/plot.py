"""A picture of the rows: stacked bars of student, teacher and decoder, with the ratio written on each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddexport.runtime.errors import DDError, OutputError
from ddexport.validate.bench.rows import Row
from ddexport.validate.bench.table import ratio

PARTS = {"student": "#0072b2", "teacher": "#e69f00", "decoder": "#56b4e9", "the rest": "#999999"}
"""Of Okabe and Ito's palette, whose colours keep apart for the colour-blind."""
WRONG = "#d55e00"
WIDTH, DPI = 10.0, 100  # 1000 pixels
BAR, MARGIN = 0.34, 1.3  # inches


def write_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """One panel for each bundle and batch. Rows that were not timed are left out.

    Raises DDError without matplotlib or without a row, OutputError when the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DDError("the plot needs matplotlib", 'pip install "ddexport[validate]"') from error
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.timed:
            groups.setdefault(f"{row.model}, batch {row.workload.batch}", []).append(row)
    if not groups:
        raise DDError("there is nothing to plot: no row was timed")
    heights = [len(group) for group in groups.values()]
    tall = MARGIN + sum(BAR * height + 0.75 for height in heights)
    figure = Figure(figsize=(WIDTH, tall), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    handles: dict[str, Any] = {}
    for panel, (name, group) in zip(panels, groups.items(), strict=True):
        _fill(panel, name, group)
        bars, parts = panel.get_legend_handles_labels()
        handles |= dict(zip(parts, bars, strict=True))
    shown = {part: handles[part] for part in PARTS if part in handles}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}", "give a path ending in .png") from error


def _fill(panel: Any, name: str, rows: Sequence[Row]) -> None:
    # Medians of parts may sum to more than the median of the whole.
    widest = max(sum(_parts(row).values()) for row in rows)
    several_threads = len({row.runner.threads for row in rows}) > 1
    for place, row in enumerate(rows):
        left = 0.0
        for part, width in _parts(row).items():
            if width > 0:
                panel.barh(place, width, left=left, color=PARTS[part], height=0.7, label=part)
                left += width
        colour = WRONG if row.passed is False else "black"
        panel.text(left + 0.01 * widest, place, _text(row), va="center", fontsize=8.5, color=colour)
    panel.set_yticks(range(len(rows)), [_label(row, several_threads) for row in rows], fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, widest * 1.35)
    panel.set_title(name, loc="left", fontsize=10)
    panel.set_xlabel("milliseconds a batch, median of the rounds", fontsize=9)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _parts(row: Row) -> dict[str, float]:
    """Milliseconds by part."""
    times = [row.student_ms or 0.0, row.teacher_ms or 0.0, row.decoder_ms or 0.0]
    return dict(zip(PARTS, [*times, max((row.total_ms or 0.0) - sum(times), 0.0)], strict=True))


def _label(row: Row, threads: bool) -> str:
    steps = row.workload.steps
    text = steps if isinstance(steps, str) else f"{steps} step{'s' * (steps != 1)}"
    return f"{row.runner}, {text}" + (f", {row.runner.threads} thr." if threads else "")


def _text(row: Row) -> str:
    total = row.total_ms or 0.0
    time = f"{total:.3g} ms" if total < 100 else f"{total:,.0f} ms"
    return "  ".join(filter(None, [time, ratio(row), "" if row.passed is not False else "WRONG"]))
