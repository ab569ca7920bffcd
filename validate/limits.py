"""`validate limits`: how far an unbroken bundle is from PyTorch over several seeds, beside the recipe's
limits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.errors import VerificationError

if TYPE_CHECKING:
    from ddexport.runtime.bundle import Manifest
    from ddexport.validate.metrics._base import Limits, Measurement

LOOSENESS = 2.0  # a limit is at most so many times the largest value of an unbroken bundle
# What float32 and fp16 leave out of five seeds is nothing, or next to nothing; some seed will have a near
# tie.
FIXED = {
    ("tokens_differing", "fp32"): 0.001,
    ("images_left_out", "fp32"): 0.1,
    ("images_left_out", "fp16"): 0.1,
    ("drawn_left_out", "fp32"): 0.1,
}

EPILOG = """
\b
Examples:
  ddexport validate limits build/digits-var
  ddexport validate limits build/digits-var --precision int8 --backend onnxruntime,openvino --seeds 10
  ddexport validate limits build/digits-var --precision fp16 --fid-images 2000 --json
"""


def limits_of(manifest: Manifest, precision: str, complete: bool = True) -> Limits:
    """The limits of a precision, from the manifest. Raises VerificationError where one is missing."""
    from ddexport.validate.metrics._base import Limits

    stated = manifest.parity.get(precision)
    numbers: dict[str, Any] = stated if isinstance(stated, dict) else {}
    names = [field.name for field in fields(Limits) if field.name != "provisional"]
    needed = names if complete else [field.name for field in fields(Limits) if field.default is MISSING]
    if manifest.teacher is None:
        needed = [name for name in needed if name != "drawn_left_out"]
    missing = [name for name in needed if not isinstance(numbers.get(name), (int, float))]
    if missing:
        raise VerificationError(
            f"bundle {manifest.name} states no parity limits for {precision}: {', '.join(missing)} missing",
            f"state them in the recipe under parity.{precision}, and export again;"
            " `ddexport validate limits BUNDLE` measures what they can be",
        )
    values: dict[str, Any] = {name: numbers.get(name) for name in names}
    return Limits(**values, provisional=numbers.get("provisional", False))


@dataclass(frozen=True)
class LimitRow:
    """One limit, and the value nearest to breaking it over all seeds. ratio: the limit over the value; of
    decibels, the ratio of the rms errors."""

    limit_name: str
    measured: float
    limit: float | None
    ratio: float | None

    @property
    def verdict(self) -> str:
        """`ok`, `not stated`, `too tight` or `too loose`."""
        if self.ratio is None:
            return "not stated"
        if self.ratio < 1:
            return "too tight"
        return "ok" if self.ratio <= LOOSENESS * (1 + 1e-9) else "too loose"


def worst_of(measurements: Iterable[Measurement]) -> dict[str, Measurement]:
    """The measurement furthest towards its limit, by the limit's name."""
    worst: dict[str, Measurement] = {}
    for row in measurements:
        if not row.rule:
            continue
        known = worst.get(row.rule)
        further = row.value > known.value if known and row.direction == "at most" else None
        if known is None or further or (row.direction == "at least" and row.value < known.value):
            worst[row.rule] = row
    return worst


def rows_of(measurements: Iterable[Measurement], precision: str) -> list[LimitRow]:
    """Every limit beside what was measured."""
    rows = []
    for name, row in worst_of(measurements).items():
        ratio: float | None
        if row.limit is None:
            ratio = None
        elif row.direction == "at least":
            ratio = 10 ** ((row.value - row.limit) / 20) if math.isfinite(row.value) else math.inf
        else:
            ratio = row.limit / row.value if row.value else (1.0 if row.limit == 0 else math.inf)
        if ratio is not None and ratio >= 1 and FIXED.get((name, precision)) == row.limit:
            ratio = 1.0
        rows.append(LimitRow(name, row.value, row.limit, ratio))
    return rows


def table(rows: list[LimitRow]) -> str:
    """For people."""
    lines = [f"{'limit':20}{'measured':>12}{'limit':>12}{'ratio':>8}"]
    for row in rows:
        limit, ratio = ("" if value is None else f"{value:.4g}" for value in (row.limit, row.ratio))
        lines.append(f"{row.limit_name:20}{row.measured:>12.4g}{limit:>12}{ratio:>8}  {row.verdict}")
    return "\n".join(lines)


@click.command("limits", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="How many seeds, from 0 on."
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images for each seed.  [default: the recipe's, or 8]",
)
@click.option(
    "--fid-images",
    type=click.IntRange(min=2),
    metavar="N",
    help="Measure the limits of `validate fid` too, with N images for each seed.",
)
@click.option("--precision", metavar="NAME", help="Which graphs of the bundle.  [default: its first]")
@click.option(
    "--backend",
    metavar="NAMES",
    default="auto",
    help="Engines, separated by commas.  [default: the best installed]",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of engine and torch.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The student's checkpoint.")
@click.option("--vae", type=click.Path(path_type=Path), help="The tokenizer's checkpoint.")
@click.option("--teacher", type=click.Path(path_type=Path), help="The teacher's checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@console.debug_option
def command(
    seeds: int, fid_images: int | None, backend: str, as_json: bool, teacher: Path | None, **options: Any
) -> None:
    """Measure an unbroken BUNDLE over several seeds: the values that its recipe's limits are chosen from.

    A limit is at most twice the largest value, of all engines named. Exit code 3 where one is looser, or too
    tight for a seed.
    """
    from ddexport.validate.fid_plan import Options as FidOptions
    from ddexport.validate.fid_run import run_fid
    from ddexport.validate.parity import Options, run_parity

    measurements: list[Measurement] = []
    precision = ""
    for seed, name in product(range(seeds), backend.split(",")):
        arguments = {**options, "seed": seed, "backend": name}
        report, _, _ = run_parity(Options(teacher=teacher, **arguments), complete=False)
        precision = report.precision
        measurements += report.rows
        if fid_images:
            measurements += run_fid(FidOptions(**{**arguments, "images": fid_images})).measurements
    rows = rows_of(measurements, precision)
    if as_json:
        console.emit_json([{**vars(row), "verdict": row.verdict} for row in rows])
    else:
        click.echo(table(rows))
    wrong = [row.limit_name for row in rows if row.verdict != "ok"]
    if wrong:
        raise VerificationError(
            f"limits to correct: {', '.join(wrong)}", "docs/parity.md says how they are chosen"
        )
