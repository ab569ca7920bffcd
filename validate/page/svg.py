"""Plots as inline SVG, drawn by hand: their colours are classes of the page's style sheet, so that they
follow light and dark, and their text is text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ddexport.validate.page.evidence import Histogram, Mismatch

WIDTH, HEIGHT = 720, 282
LEFT, RIGHT, TOP, BOTTOM = 16, 704, 62, 222


@dataclass(frozen=True)
class Point:
    """A figure at a place of the horizontal axis, with its interval; `side` is the class of its colour."""

    place: int
    value: float
    low: float | None
    high: float | None
    side: str


def closeness(
    errors: Histogram, margins: Histogram, limit: float, mismatches: Sequence[Mismatch], title: str
) -> str:
    """Errors of logits and margins between first and second choice on one logarithmic axis.

    While the two do not meet, no choice can have been turned by rounding. Mismatches are marked below.
    """
    low, high = _decades((errors, margins), [limit, *(mismatch.margin for mismatch in mismatches)])
    across = _Log(low, high)
    parts = [
        *_bars(errors, across, "errors"),
        *_bars(margins, across, "margins"),
        *_decade_axis(across),
        _text((LEFT + RIGHT) / 2, HEIGHT - 8, "difference of two logits", "middle", "tick"),
    ]
    for mismatch in mismatches:
        x = across(mismatch.margin)
        kind = "excused" if mismatch.excused else "fault"
        label = escape(f"{mismatch.place}, position {mismatch.position}: margin {mismatch.margin:.2g}")
        shape = f"{x:.1f},{BOTTOM + 2} {x - 5:.1f},{BOTTOM + 12} {x + 5:.1f},{BOTTOM + 12}"
        parts.append(f'<polygon class="{kind}" points="{shape}"><title>{label}</title></polygon>')
    x = across(limit)
    parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 16}" y2="{BOTTOM}"/>')
    parts.append(_text(x, TOP - 22, f"limit {limit:g}", "middle", "limit-name"))
    parts.append(_legend(LEFT, 16, "errors", f"error of each logit ({_count(errors.total)})"))
    parts.append(
        _legend(
            LEFT + 300, 16, "margins", f"margin between first and second choice ({_count(margins.total)})"
        )
    )
    return _svg(parts, title)


def against_steps(
    points: Sequence[Point], names: Sequence[str], sides: Sequence[tuple[str, str]], title: str
) -> str:
    """Figures at named places, low values at the bottom from zero on; sides: (class, legend)."""
    finite = [p for p in points if math.isfinite(p.value)]
    ends = [end for p in finite for end in (p.value, p.low, p.high) if end is not None and math.isfinite(end)]
    top = _round_up(max(ends, default=1.0))
    bottom, left = BOTTOM + 26, LEFT + 44
    step = (RIGHT - left) / max(1, len(names))

    def height(value: float) -> float:
        return bottom - (bottom - TOP) * min(max(value / top, 0.0), 1.05)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = height(share * top)
        parts.append(f'<line class="grid" x1="{left}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{share * top:.3g}", "end", "tick"))
    for number, name in enumerate(names):
        parts.append(_text(left + (number + 0.5) * step, bottom + 20, name, "middle", "tick"))
    order = [kind for kind, _ in sides]
    for p in finite:
        apart = (order.index(p.side) - (len(order) - 1) / 2) * 22
        x, y = left + (p.place + 0.5) * step + apart, height(p.value)
        if p.low is not None and p.high is not None and math.isfinite(p.low) and math.isfinite(p.high):
            ends_at = f'y1="{height(p.low):.1f}" y2="{height(p.high):.1f}"'
            parts.append(f'<line class="whisker {p.side}" x1="{x:.1f}" x2="{x:.1f}" {ends_at}/>')
        parts.append(f'<circle class="dot {p.side}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        anchor = "end" if apart < 0 else "start"
        parts.append(_text(x + (-9 if apart < 0 else 9), y + 4, f"{p.value:.3g}", anchor, "value"))
    for number, (kind, name) in enumerate(sides):
        parts.append(_legend(left + 170 * number, 16, kind, name))
    return _svg(parts, title)


def against_passes(points: Sequence[tuple[str, float, float, str]], title: str) -> str:
    """Named points (name, passes, value, class of the colour) on two logarithmic axes."""
    good = [p for p in points if p[1] > 0 and p[2] > 0 and math.isfinite(p[1]) and math.isfinite(p[2])]
    left, bottom = LEFT + 44, BOTTOM + 6
    ends_x, ends_y = [math.log10(p[1]) for p in good], [math.log10(p[2]) for p in good]
    low_x, low_y = min(ends_x, default=0.0) - 0.08, min(ends_y, default=0.0) - 0.08
    wide, tall = max(ends_x, default=0.0) + 0.25 - low_x, max(ends_y, default=0.0) + 0.08 - low_y

    def across(value: float) -> float:
        return left + (math.log10(value) - low_x) / wide * (RIGHT - left)

    def height(value: float) -> float:
        return bottom - (math.log10(value) - low_y) / tall * (bottom - TOP + 40)

    parts = [f'<line class="axis" x1="{left}" x2="{RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    for value in _nice(low_y, low_y + tall):
        y = height(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{value:g}", "end", "tick"))
    for passes in sorted({p[1] for p in good}):
        parts.append(_text(across(passes), bottom + 20, f"{passes:g}", "middle", "tick"))
    parts.append(_text((left + RIGHT) / 2, bottom + 42, "passes of a network", "middle", "tick"))
    taken: list[tuple[float, float, float]] = []  # left and right end and height of each name
    for name, passes, value, kind in good:
        x, y, words = across(passes), height(value), f"{name} {value:.2f}"
        start, stop, line = x + 9, x + 9 + 6.8 * len(words), y + 4
        while any(start < b and a < stop and abs(line - other) < 14 for a, b, other in taken):
            line -= 15
        taken.append((start, stop, line))
        parts.append(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        parts.append(_text(start, line, words, "start", "value"))
    return _svg(parts, title)


class _Log:
    """Decades to pixels; what lies outside is drawn at the end."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        place = math.log10(value) if value > 0 else self.low
        share = (min(max(place, self.low), self.high) - self.low) / (self.high - self.low)
        return LEFT + share * (RIGHT - LEFT)


def _decades(histograms: Sequence[Histogram], values: Sequence[float]) -> tuple[int, int]:
    """The whole decades that hold every filled bin and value."""
    ends = [math.log10(value) for value in values if value > 0 and math.isfinite(value)]
    for histogram in histograms:
        width = (histogram.high - histogram.low) / len(histogram.counts)
        filled = [number for number, count in enumerate(histogram.counts) if count]
        ends += [histogram.low + width * number for number in filled]
        ends += [histogram.low + width * (number + 1) for number in filled]
    low, high = math.floor(min(ends, default=-1) + 1e-9), math.ceil(max(ends, default=0) - 1e-9)
    return max(low, -30), min(max(high, low + 1), 30)


def _bars(histogram: Histogram, across: _Log, kind: str) -> list[str]:
    most = max(histogram.counts, default=0)
    width = (histogram.high - histogram.low) / max(1, len(histogram.counts))
    bars = []
    for number, count in enumerate(histogram.counts):
        if count:
            left, right = (across(10.0 ** (histogram.low + width * n)) for n in (number, number + 1))
            tall = max(1.0, count / most * (BOTTOM - TOP))
            box = f'x="{left + 0.5:.1f}" y="{BOTTOM - tall:.1f}" width="{max(0.5, right - left - 1):.1f}"'
            bars.append(
                f'<rect class="{kind}" {box} height="{tall:.1f}"><title>{count:,} at '
                f"{10.0 ** (histogram.low + width * number):.1e}</title></rect>"
            )
    return bars


def _decade_axis(across: _Log) -> list[str]:
    parts = [f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>']
    for power in range(math.ceil(across.low), math.floor(across.high) + 1):
        x = across(10.0**power)
        anchor = "start" if power == across.low else "end" if power == across.high else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 5}"/>')
        parts.append(_text(x, BOTTOM + 28, _power(power), anchor, "tick"))
    return parts


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -4 <= power <= 4 else f"1e{power}"


def _round_up(value: float) -> float:
    if not math.isfinite(value) or value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value * 1.15))
    return next(
        step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= value * 1.15
    )


def _nice(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two logarithms."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    return [value for value in ticks if low <= math.log10(value) <= high]


def _legend(x: float, y: float, kind: str, name: str) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y - 9}" width="12" height="10" rx="2"/>' + _text(
        x + 18, y, name, "start", "legend"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _count(number: int) -> str:
    return f"{number:,}"


def _svg(parts: Sequence[str], title: str) -> str:
    name = escape(title)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">'
    return f"{head}<title>{name}</title>{''.join(parts)}</svg>"
