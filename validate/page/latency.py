"""Times of an image, from whatever measured them: rows of a benchmark, `validate speed`, or the page itself.

The readers are tolerant: a row that has no time is passed over, a column that nobody filled is not shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddexport.runtime.pipeline import Pipeline

FIELDS = ("student_ms", "decoder_ms", "total_ms", "images_per_s", "peak_mib")
ROUNDS, MOST_SECONDS = 7, 20.0


@dataclass(frozen=True)
class Latency:
    """One row: milliseconds a batch of student, decoder and both, images a second, and peak memory."""

    source: str
    backend: str
    precision: str
    batch: int
    steps: str
    student_ms: float | None = None
    decoder_ms: float | None = None
    total_ms: float | None = None
    images_per_s: float | None = None
    peak_mib: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a row of a benchmark."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "source"}


def latencies(source: str, data: Any) -> list[Latency]:
    """The rows of a benchmark ({"rows": [...]} or the list itself), or the timings of `validate speed`."""
    if isinstance(data, dict) and isinstance(data.get("timings"), list):
        return _of_speed(source, data)
    rows = data.get("rows") if isinstance(data, dict) else data
    return [row for entry in rows for row in _row(source, entry)] if isinstance(rows, list) else []


def measure(pipe: Pipeline, batches: tuple[int, ...] = (1, 8)) -> list[Latency]:
    """Times an open bundle: every schedule and batch size in turn, the median of up to `ROUNDS` rounds."""
    spent: dict[tuple[int, int], list[tuple[float, float]]] = {}
    workloads = [(steps, batch) for batch in batches for steps in sorted(pipe.manifest.schedules)]
    start = time.perf_counter()
    for number in range(ROUNDS + 1):
        for steps, batch in workloads:
            labels = [i % pipe.manifest.classes for i in range(batch)]
            seconds = pipe(labels, steps, output="numpy", batch_size=batch).seconds
            if number:  # the first round warms up
                decoder = seconds["decoder"]
                spent.setdefault((steps, batch), []).append((sum(seconds.values()) - decoder, decoder))
        if number and time.perf_counter() - start > MOST_SECONDS:
            break
    rows = []
    for (steps, batch), times in spent.items():
        student, decoder = (median(parts[side] for parts in times) * 1e3 for side in (0, 1))
        total = median(sum(parts) for parts in times) * 1e3
        rows.append(
            Latency(
                "",
                pipe.backend.name,
                pipe.precision,
                batch,
                str(steps),
                student,
                decoder,
                total,
                batch * 1e3 / total,
            )
        )
    return rows


def _row(source: str, data: Any) -> list[Latency]:
    if not isinstance(data, dict):
        return []
    values = [_positive(data.get(name)) for name in FIELDS]
    batch = _positive(data.get("batch"))
    if batch is None or all(value is None for value in values):
        return []
    backend, precision, steps = (str(data.get(name, ""))[:80] for name in ("backend", "precision", "steps"))
    return [Latency(source, backend, precision, int(batch), steps, *values)]


def _of_speed(source: str, data: Mapping[str, Any]) -> list[Latency]:
    """Its times are milliseconds an image, by batch size; the network's own are in `sequence`."""
    rows = []
    for timing in data["timings"]:
        row: Mapping[str, Any] = timing if isinstance(timing, dict) else {}
        images, networks = row.get("image"), row.get("sequence")
        for batch, image in images.items() if isinstance(images, dict) else ():
            size, total = _positive(_as_number(batch)), _positive(image)
            if size is None or total is None:
                continue
            student = _positive(networks.get(batch)) if isinstance(networks, dict) else None
            decoder = None if student is None else (total - student) * size
            student = None if student is None else student * size
            name = str(row.get("name", ""))[:80]
            times = (student, decoder, total * size, 1e3 / total)
            rows.append(Latency(source, "torch", "fp32", int(size), name, *times))
    return rows


def _as_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _positive(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and value > 0 else None
