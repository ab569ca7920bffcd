"""`validate limits`: how far an unbroken bundle is from PyTorch over several seeds, beside the recipe's
limits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.options import POSITIVE, option
from ddexport.validate.options import shared

if TYPE_CHECKING:
    from ddexport.recipe import Limits
    from ddexport.runtime.bundle import Manifest
    from ddexport.validate.report import Measurement

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
  ddexport validate limits digits-var
  ddexport validate limits digits-int8 --precision int8 --backend onnxruntime,openvino --seeds 10
  ddexport validate limits digits-half --precision fp16 --fid-images 2000 --json
"""


def limits_of(manifest: Manifest, precision: str, complete: bool = True) -> Limits:
    """The limits of a precision, from the manifest. Raises VerificationError where one is missing."""
    from msgspec.structs import fields

    from ddexport.recipe import Limits

    stated = manifest.parity.get(precision)
    numbers: dict[str, Any] = stated if isinstance(stated, dict) else {}
    stating = [field for field in fields(Limits) if field.name != "provisional"]
    needed = [f.name for f in stating if (complete and f.name != "decoder_psnr") or f.required]
    if manifest.teacher is None and complete:
        needed.remove("drawn_left_out")
    missing = [name for name in needed if not isinstance(numbers.get(name), (int, float))]
    if missing:
        raise VerificationError(
            f"bundle {manifest.name} states no parity limits for {precision}: {', '.join(missing)} missing",
            f"state them in the recipe under parity.{precision}, and export again;"
            " `ddexport validate limits BUNDLE` measures suitable values",
        )
    values: dict[str, Any] = {field.name: numbers.get(field.name) for field in stating}
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
        if not self.ratio >= 1:  # not a number, too
            return "too tight"
        return "ok" if self.ratio <= LOOSENESS * (1 + 1e-9) else "too loose"

    def to_dict(self) -> dict[str, Any]:
        """With the verdict."""
        return {**vars(self), "verdict": self.verdict}


def worst_of(measurements: Iterable[Measurement]) -> dict[str, Measurement]:
    """The measurement furthest towards its limit, by the limit's name."""
    worst: dict[str, Measurement] = {}
    for row in measurements:
        if row.rule:
            worst[row.rule] = max(worst.get(row.rule, row), row, key=_excess)
    return worst


def _excess(row: Measurement) -> float:
    """How far a value goes towards its limit, and over it; what is not a number goes furthest."""
    value = row.value if row.direction == "at most" else -row.value
    return math.inf if math.isnan(value) else value


def rows_of(measurements: Iterable[Measurement], precision: str) -> list[LimitRow]:
    """Every limit beside what was measured."""
    return [
        LimitRow(name, row.value, row.limit, _ratio(row, FIXED.get((name, precision))))
        for name, row in worst_of(measurements).items()
    ]


def _ratio(row: Measurement, fixed: float | None) -> float | None:
    """How loose a limit is, and 1 for one that is kept and `fixed`; None without one."""
    if row.limit is None:
        return None
    if row.direction == "at least":
        ratio = 10 ** ((row.value - row.limit) / 20)
    elif row.value:
        ratio = row.limit / row.value
    else:
        ratio = math.inf if row.limit else 1.0
    return 1.0 if ratio >= 1 and fixed == row.limit else ratio


def _text(value: str | float | None) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:.4g}"


@click.command("limits", cls=console.Command, epilog=EPILOG)
@shared("bundle")
@option("--seeds", type=POSITIVE, metavar="N", default=5, help="Number of seeds, from 0 on.")
@shared("images", help="Number of images per seed.")
@option("--fid-images", type=click.IntRange(min=2), metavar="N",
        help="Also measure the limits of `validate fid`, with N images per seed.")  # fmt: skip
@shared("precision")
@shared("backend", metavar="NAME,...",
        help="Inference engines, separated by commas. auto: the best one that runs here.")  # fmt: skip
@shared("threads", "checkpoint", "vae", "teacher", "text-encoder", "small-decoder", "json")
@console.debug_option
def command(
    seeds: int, fid_images: int | None, backend: str, as_json: bool, teacher: Path | None, **options: Any
) -> None:
    """Measure how much a correct BUNDLE deviates from PyTorch.

    The result helps to choose the limits in a recipe. The command runs `validate parity` with several seeds,
    and prints the largest deviation beside each limit. A good limit is one to two times that deviation. Exit
    code 3 if a limit is tighter or looser.
    """
    from ddexport.validate.parity import Options, run_parity
    from ddexport.validate.report import wide_table

    measurements: list[Measurement] = []
    precision = ""
    for seed, name in product(range(seeds), backend.split(",")):
        arguments = {**options, "seed": seed, "backend": name}
        report, _, _ = run_parity(Options(teacher=teacher, **arguments), complete=False)
        precision = report.precision
        measurements += report.rows
        if fid_images:
            from ddexport.validate.fid import Options as FidOptions
            from ddexport.validate.fid import run_fid

            measurements += run_fid(FidOptions(**{**arguments, "images": fid_images}), state=None).rows
    rows = rows_of(measurements, precision)
    if as_json:
        console.emit_json([row.to_dict() for row in rows])
    else:
        click.echo(wide_table([{key: _text(value) for key, value in row.to_dict().items()} for row in rows]))
    wrong = [row.limit_name for row in rows if row.verdict != "ok"]
    if wrong:
        raise VerificationError(
            f"limits that are too tight or too loose: {', '.join(wrong)}",
            "docs/validation.md explains how limits are chosen",
        )
