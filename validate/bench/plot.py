"""A picture of the rows: stacked bars of student, teacher and decoder, with the ratio written on each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddexport.runtime.errors import DDError, OutputError
from ddexport.validate.bench.rows import Row

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
            groups.setdefault(f"{row.model}, batch {row.batch}", []).append(row)
    if not groups:
        raise DDError("there is nothing to plot: no row was timed")
    heights = [len(group) for group in groups.values()]
    tall = MARGIN + sum(BAR * height + 0.75 for height in heights)
    figure = Figure(figsize=(WIDTH, tall), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    for panel, (name, group) in zip(panels, groups.items(), strict=True):
        _draw(panel, name, group)
    figure.legend(*_keys(list(panels)), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}", "give a path ending in .png") from error


def _draw(panel: Any, name: str, rows: Sequence[Row]) -> None:
    # Medians of parts may sum to more than the median of the whole.
    widest = max(sum(_part(row, part) for part in PARTS) for row in rows)
    several_threads = len({row.threads for row in rows}) > 1
    for place, row in enumerate(rows):
        left = 0.0
        for part, colour in PARTS.items():
            width = _part(row, part)
            if width > 0:
                panel.barh(place, width, left=left, color=colour, height=0.7, label=part)
                left += width
        panel.text(left + 0.01 * widest, place, _words(row), va="center", fontsize=8.5, color=_colour(row))
    panel.set_yticks(range(len(rows)), [_label(row, several_threads) for row in rows], fontsize=9)
    for label, row in zip(panel.get_yticklabels(), rows, strict=True):
        label.set_color(_colour(row))
    panel.invert_yaxis()
    panel.set_xlim(0, widest * 1.35)
    panel.set_title(name, loc="left", fontsize=10)
    panel.set_xlabel("milliseconds a batch, median of the rounds", fontsize=9)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _part(row: Row, part: str) -> float:
    parts = {"student": row.student_ms, "teacher": row.teacher_ms, "decoder": row.decoder_ms}
    if part in parts:
        return parts[part] or 0.0
    return max((row.total_ms or 0.0) - sum(value or 0.0 for value in parts.values()), 0.0)


def _label(row: Row, threads: bool) -> str:
    steps = "teacher" if row.steps == "teacher" else f"{row.steps} step{'s' * (row.steps != 1)}"
    return f"{row.name}, {steps}" + (f", {row.threads} thr." if threads else "")


def _words(row: Row) -> str:
    total = row.total_ms or 0.0
    said = [f"{total:.3g} ms" if total < 100 else f"{total:,.0f} ms"]
    if row.speedup is not None:
        said.append(f"{row.speedup:.2f}x")
        if row.speedup_low is not None and row.speedup_high is not None:
            said[-1] += f" [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
    if row.passed is False:
        said.append("WRONG")
    return "  ".join(said)


def _colour(row: Row) -> str:
    return WRONG if row.passed is False else "black"


def _keys(panels: Sequence[Any]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    names = [name for name in PARTS if name in found]
    return [found[name] for name in names], names
