"""The rows for people, and what is kept of them for `--backend auto`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddexport.runtime.bundle import FULL
from ddexport.validate.bench.plan import IN_TORCH
from ddexport.validate.report import wide_table

VERDICTS = {True: "ok", False: "WRONG", None: "?"}
TIMES = {
    "student ms": "student_ms", "teacher ms": "teacher_ms", "decoder ms": "decoder_ms",
    "total ms": "total_ms", "min": "total_min_ms", "max": "total_max_ms", "p90": "total_p90_ms",
    "p99": "total_p99_ms", "images/s": "images_per_s", "GFLOP": "gflop", "MiB": "peak_mib",
    "GPU MiB": "gpu_mib",
}  # fmt: skip


def name_of(row: dict[str, Any]) -> str:
    """`onnxruntime bf16, batch 1, steps 2`."""
    device = "" if row["device"] == "cpu" else f", {row['device']}"
    decoder = "" if row["decoder"] == FULL else f", decoder {row['decoder']}"
    return f"{row['backend']} {row['precision']}{device}, batch {row['batch']}, steps {row['steps']}{decoder}"


def verdict(row: dict[str, Any]) -> str:
    """`ok`, `WRONG`, `failed`, or a question mark where the bundle states no limits."""
    return "failed" if row["error"] else VERDICTS[row["passed"]]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios and times, then parity: a line a row. A column that no row fills is left out."""
    times, parity = [], []
    for row in rows:
        name = {"": name_of(row), "threads": str(row["threads"])}
        figures = {title: _number(row[key]) for title, key in TIMES.items()}
        share = "" if row["roofline"] is None else f"{row['roofline']:.0%}"
        ratios = {"speed-up": ratio(row), "small over full": small_over_full(row)}
        end = {"of peak": share, "rounds": str(row["rounds"]), "verdict": verdict(row)}
        times.append(name | ratios | figures | end)
        error, psnr = row["embedding_error"], row["image_psnr"]
        measured = {
            "tokens equal": "" if row["tokens_equal"] is None else f"{row['tokens_equal']:.2%}",
            "embeddings, rel. error": "" if error is None else f"{error:.1e}",
            "image PSNR, dB": "equal" if psnr == math.inf else _number(psnr),
            "8-bit difference": _number(row["image_max"]),
            "verdict": verdict(row),
        }
        parity.append(name | measured)
    return "\n\n".join(wide_table(_filled(cells)) for cells in (times, parity))


def remarks(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Errors, faults and notes, each with the name of its row."""
    for row in rows:
        for what, key in (("failed", "error"), ("WRONG", "faults"), ("note", "notes")):
            if row[key]:
                yield f"{what}: {name_of(row)}: {row[key]}"


def ratio(row: dict[str, Any]) -> str:
    """As in `3.20x [3.10, 3.31]`; empty without a baseline."""
    if row["speedup"] is None:
        return ""
    if row["speedup_low"] is None:
        return f"{row['speedup']:.2f}x"
    return f"{row['speedup']:.2f}x [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def small_over_full(row: dict[str, Any]) -> str:
    """How many times faster a row is than the same with the full decoder, and whether its images mean
    anything; empty for the full one."""
    words = [] if row["small_over_full"] is None else [f"{row['small_over_full']:.2f}x"]
    if row["decoder_trained"] is False:
        words.append("untrained at this size")
    return ", ".join(words)


def times_to_save(rows: Sequence[dict[str, Any]], precision: str) -> dict[str, float]:
    """Milliseconds an image by backend: the runtime's on the CPU, in one step and that precision, of the
    smallest batch and the most threads, and only where parity holds."""
    right = [
        row
        for row in rows
        if row["backend"] not in IN_TORCH
        and (row["device"], row["precision"], row["steps"]) == ("cpu", precision, 1)
        and row["passed"]
        and not row["error"]
    ]
    usual = min(((row["batch"], -row["threads"]) for row in right), default=None)
    chosen = [row for row in right if (row["batch"], -row["threads"]) == usual]
    return {row["backend"]: row["total_ms"] / row["batch"] for row in chosen}


def _filled(cells: list[dict[str, str]]) -> list[Mapping[str, str]]:
    kept = [key for key in cells[0] if any(row[key] for row in cells)]
    if len({row["threads"] for row in cells}) == 1:
        kept.remove("threads")
    return [{key: row[key] for key in kept} for row in cells]


def _number(value: float | None) -> str:
    """Three digits, but all of those before the point; empty where there is none."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
