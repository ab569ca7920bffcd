"""The rows for people: one a line, as text for a terminal and as a table of Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddexport.validate.bench.peak import Peak
from ddexport.validate.bench.rows import Row, best_rows

BEST = "best"


@dataclass(frozen=True)
class Grid:
    """Headers and cells of equal length. left: how many leading columns are text."""

    headers: Sequence[str]
    cells: Sequence[Sequence[str]]
    left: int = 1

    def text(self) -> str:
        """Columns of equal width, numbers to the right."""
        lines = [self.headers, *self.cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < self.left or i == len(widths) - 1 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """As a table of Markdown."""
        last = len(self.headers) - 1
        rule = ["---" if i < self.left or i == last else "---:" for i in range(len(self.headers))]
        lines = [self.headers, rule, *self.cells]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def times_grid(rows: Sequence[Row], marks: Sequence[float] = ()) -> Grid:
    """Latency, images a second, memory and the share of the peak; what no row has is no column.

    marks: the percentiles to show of the whole, beside the median.
    """
    best = best_rows(list(rows))
    shown = [f"{mark:g}" for mark in marks if mark != 50]
    columns: dict[str, list[str]] = {
        "": [row.name for row in rows],
        "threads": [str(row.threads) for row in rows],
        "batch": [str(row.batch) for row in rows],
        "steps": [str(row.steps) for row in rows],
        "student ms": [_number(row.student_ms) for row in rows],
        "teacher ms": [_number(row.teacher_ms) for row in rows],
        "decoder ms": [_number(row.decoder_ms) for row in rows],
        "total ms": [_number(row.total_ms) for row in rows],
        **{
            f"p{mark}": [_number(row.percentiles.get("total", {}).get(mark)) for row in rows]
            for mark in shown
        },
        "images/s": [_number(row.images_per_s) for row in rows],
        "MiB": [_number(row.peak_mib, 0) for row in rows],
        "of peak": [_share(row.roofline) for row in rows],
        "speed-up": [ratio(row) for row in rows],
        "rounds": [str(row.rounds) for row in rows],
        " ": [_mark(row, index in best) for index, row in enumerate(rows)],
    }
    for name in ("teacher ms", "of peak", "speed-up"):
        if not any(columns[name]):
            del columns[name]
    return _grid(columns)


def parity_grid(rows: Sequence[Row]) -> Grid:
    """What the timed outputs were like."""
    columns = {
        "": [row.name for row in rows],
        "threads": [str(row.threads) for row in rows],
        "batch": [str(row.batch) for row in rows],
        "steps": [str(row.steps) for row in rows],
        "tokens equal": [_share(row.tokens_equal, 2) for row in rows],
        "embeddings, rel. error": [_small(row.embedding_error) for row in rows],
        "image PSNR, dB": [_psnr(row) for row in rows],
        "8-bit difference": [_number(row.image_max, 0) for row in rows],
        " ": [row.verdict for row in rows],
    }
    return _grid(columns)


def remarks(rows: Sequence[Row]) -> list[str]:
    """Faults, errors and notes of all rows, each with the name of its row."""
    found = []
    for row in rows:
        where = f"{row.name}, batch {row.batch}, steps {row.steps}"
        found += [f"failed: {where}: {row.error}"] if row.error is not None else []
        found += [f"WRONG: {where}: {fault}" for fault in row.faults]
        found += [f"note: {where}: {note}" for note in row.notes]
    return found


def work_line(rows: Sequence[Row], peaks: Mapping[tuple[int, str], Peak]) -> str:
    """What an image asks for, and what the machine gives; empty if neither is known."""
    parts: dict[str, float] = {}
    for row in rows:
        passes = row.steps if isinstance(row.steps, int) else 1
        for part, flops in (row.flops or {}).items():
            if part == "student" and (row.flops or {}).get("teacher") is None:
                parts.setdefault(part, flops / passes)
            elif part in ("teacher", "decoder"):
                parts[part] = max(flops, parts.get(part, 0.0))
    work = ", ".join(f"{part} {_flops(flops)}" for part, flops in sorted(parts.items(), key=_order))
    threads = sorted({count for count, _ in peaks})
    rates = [f"{_rates(peaks, count)} GFLOP/s with {count} thread{'s' * (count > 1)}" for count in threads]
    said = [f"{work} an image"] if work else []
    said += [f"this machine multiplies at {'; '.join(rates)}"] if rates else []
    return "; ".join(said)


def ratio(row: Row) -> str:
    """As in `3.2x [3.1, 3.3]`; empty without a baseline."""
    if row.speedup is None:
        return ""
    if row.speedup_low is None or row.speedup_high is None:
        return f"{_number(row.speedup, 2)}x"
    return f"{_number(row.speedup, 2)}x [{_number(row.speedup_low, 2)}, {_number(row.speedup_high, 2)}]"


def _order(part: tuple[str, float]) -> int:
    return ("student", "teacher", "decoder").index(part[0])


def _rates(peaks: Mapping[tuple[int, str], Peak], threads: int) -> str:
    return ", ".join(
        f"{peak.gflops:.0f} ({precision})" if peak.gflops else f"? ({precision}: {peak.why})"
        for (count, precision), peak in peaks.items()
        if count == threads
    )


def _flops(value: float) -> str:
    return f"{value / 1e9:.0f} GFLOP" if value >= 1e10 else f"{value / 1e9:.3g} GFLOP"


def _grid(columns: dict[str, list[str]]) -> Grid:
    if len(set(columns["threads"])) == 1:  # the line about the machine says it
        del columns["threads"]
    return Grid(list(columns), list(zip(*columns.values(), strict=True)))


def _mark(row: Row, is_best: bool) -> str:
    return BEST if is_best else "" if row.passed and row.error is None else row.verdict


def _number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "nan"
    return f"{value:.{digits}f}" if abs(value) >= 10 or digits == 0 else f"{value:.2f}"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _share(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _psnr(row: Row) -> str:
    if row.image_psnr is None:
        return ""
    return "equal" if math.isinf(row.image_psnr) else f"{row.image_psnr:.1f}"
