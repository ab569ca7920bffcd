"""The rows for people: one a line, as text for a terminal and as a table of Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ddexport.validate.bench.roofline import Peaks
from ddexport.validate.bench.rows import Row, best_rows


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
    best = best_rows(rows)
    percentiles = {
        f"p{mark:g}": [_number(row.percentiles.get("total", {}).get(f"{mark:g}")) for row in rows]
        for mark in marks
        if mark != 50
    }
    columns = {
        "student ms": [_number(row.student_ms) for row in rows],
        "teacher ms": [_number(row.teacher_ms) for row in rows],
        "decoder ms": [_number(row.decoder_ms) for row in rows],
        "total ms": [_number(row.total_ms) for row in rows],
        **percentiles,
        "images/s": [_number(row.images_per_s) for row in rows],
        "MiB": [_number(row.peak_mib, 0) for row in rows],
        "of peak": [_share(row.roofline) for row in rows],
        "speed-up": [ratio(row) for row in rows],
        "rounds": [str(row.rounds) for row in rows],
        " ": ["best" if index in best else row.verdict for index, row in enumerate(rows)],
    }
    columns[" "] = ["" if verdict == "ok" else verdict for verdict in columns[" "]]
    for name in ("teacher ms", "of peak", "speed-up"):
        if not any(columns[name]):
            del columns[name]
    return _grid(rows, columns)


def parity_grid(rows: Sequence[Row]) -> Grid:
    """What the timed outputs were like."""
    columns = {
        "tokens equal": [_share(row.tokens_equal, 2) for row in rows],
        "embeddings, rel. error": [
            "" if row.embedding_error is None else f"{row.embedding_error:.1e}" for row in rows
        ],
        "image PSNR, dB": [_psnr(row) for row in rows],
        "8-bit difference": [_number(row.image_max, 0) for row in rows],
        " ": [row.verdict for row in rows],
    }
    return _grid(rows, columns)


def remarks(rows: Sequence[Row]) -> list[str]:
    """Errors, faults and notes of all rows, each with the name of its row."""
    texts = []
    for row in rows:
        texts += [f"failed: {row}: {row.error}"] if row.error is not None else []
        texts += [f"WRONG: {row}: {fault}" for fault in row.faults]
        texts += [f"note: {row}: {note}" for note in row.notes]
    return texts


def work_line(rows: Sequence[Row], peaks: Peaks) -> str:
    """What an image asks for, and what the machine gives; empty if neither is known."""
    work: dict[str, float] = {}
    for row in rows:
        flops, steps = row.flops or {}, row.workload.steps
        if "student" in flops and "teacher" not in flops and isinstance(steps, int):
            work.setdefault("student", flops["student"] / steps)
        for part in ("teacher", "decoder"):
            work[part] = max(work.get(part, 0.0), flops.get(part, 0.0))
    parts = [f"{part} {_flops(work[part])}" for part in ("student", "teacher", "decoder") if work.get(part)]
    rates: dict[int, list[str]] = {}
    for (threads, precision), peak in sorted(peaks.items(), key=lambda item: item[0][0]):
        rate = f"? ({precision}: {peak})" if isinstance(peak, str) else f"{peak:.0f} ({precision})"
        rates.setdefault(threads, []).append(rate)
    speeds = [f"{', '.join(rates[n])} GFLOP/s with {n} thread{'s' * (n > 1)}" for n in rates]
    texts = [f"{', '.join(parts)} an image"] if parts else []
    texts += [f"this machine multiplies at {'; '.join(speeds)}"] if speeds else []
    return "; ".join(texts)


def ratio(row: Row) -> str:
    """As in `3.2x [3.1, 3.3]`; empty without a baseline."""
    if row.speedup is None:
        return ""
    if row.speedup_low is None or row.speedup_high is None:
        return f"{_number(row.speedup, 2)}x"
    return f"{_number(row.speedup, 2)}x [{_number(row.speedup_low, 2)}, {_number(row.speedup_high, 2)}]"


def _flops(value: float) -> str:
    return f"{value / 1e9:.0f} GFLOP" if value >= 1e10 else f"{value / 1e9:.3g} GFLOP"


def _grid(rows: Sequence[Row], columns: dict[str, list[str]]) -> Grid:
    """The columns, with those before them that say which row it is."""
    named = {
        "": [str(row.runner) for row in rows],
        "threads": [str(row.runner.threads) for row in rows],
        "batch": [str(row.workload.batch) for row in rows],
        "steps": [str(row.workload.steps) for row in rows],
        **columns,
    }
    if len(set(named["threads"])) == 1:  # the line about the machine says it
        del named["threads"]
    return Grid(list(named), list(zip(*named.values(), strict=True)))


def _number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return ""
    if math.isnan(value):
        return "nan"
    return f"{value:.{digits}f}" if abs(value) >= 10 or digits == 0 else f"{value:.2f}"


def _share(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _psnr(row: Row) -> str:
    if row.image_psnr is None:
        return ""
    return "equal" if math.isinf(row.image_psnr) else f"{row.image_psnr:.1f}"
