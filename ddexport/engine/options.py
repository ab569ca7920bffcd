"""What may be asked of a build, as data: one `BuildOptions`, whatever package builds."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddexport.runtime.engines import DEFAULT_TARGET, Profile
from ddexport.runtime.errors import DDError

DEFAULT_PROFILES = (Profile(1, 4, 8),)
HARDWARE_LEVELS = ("ampere+", "same-compute-capability")
CURRENT_TARGET = "current"
OPTIMIZATION_LEVELS = range(6)
LARGEST_BATCH = 1 << 16

_UNITS = {"": 1, "k": 10, "m": 20, "g": 30, "t": 40}


class OptionError(DDError):
    """A build option that makes no sense, or that this package or machine cannot honour."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Settings of a build, with the names and meanings of `trtexec`.

    Attributes:
        profiles: the batch sizes, one optimisation profile each.
        targets: compute capabilities as `sm89`, in rising order; empty for the builder's own choice.
        workspace: limit on scratch memory in bytes; None for all there is.
        optimization_level: 0 (fastest build) to 5; None for the builder's default.
        tf32: float32 products on TF32 units. Off: it keeps 10 bits of mantissa, and the float32 parts of a
            half-precision graph are float32 because they need more.
        version_compatible, hardware: full TensorRT's wider engines.
        strip_plan, refittable, weight_streaming, sparse_weights: as `trtexec` has them.
        timing_cache: full TensorRT's file of measured kernel times. Changes how long a build takes, and only
            by chance what it gives.
    """

    profiles: tuple[Profile, ...] = DEFAULT_PROFILES
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware: str | None = None
    strip_plan: bool = False
    refittable: bool = False
    weight_streaming: bool = False
    sparse_weights: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if not self.profiles:
            raise OptionError("an engine needs at least one range of batch sizes", "--batch 1,4,8")
        if self.workspace is not None and self.workspace < 1:
            raise OptionError(f"a workspace of {self.workspace} bytes builds nothing", "--workspace 4GB")
        if self.optimization_level is not None and self.optimization_level not in OPTIMIZATION_LEVELS:
            raise OptionError(f"there is no builder optimization level {self.optimization_level}", "0 to 5")
        if self.hardware is not None and self.hardware not in HARDWARE_LEVELS:
            raise OptionError(
                f"unknown hardware compatibility level {self.hardware!r}",
                f"known: {', '.join(HARDWARE_LEVELS)}",
            )

    def canonical(self) -> dict[str, Any]:
        """The options that shape an engine, as JSON data: part of its key and of its sidecar."""
        content = dataclasses.asdict(self)
        for elsewhere in ("profiles", "targets", "hardware", "version_compatible", "timing_cache"):
            del content[elsewhere]
        return content


def profile_from_text(text: str) -> Profile:
    """`MIN,OPT,MAX`, or one number for all three. Raises `OptionError`."""
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise OptionError(
            f"{text!r} is no range of batch sizes", "give MIN,OPT,MAX, as in 1,4,8, or one number"
        )
    sizes = [int(part) for part in parts]
    low, best, high = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    if not 1 <= low <= best <= high <= LARGEST_BATCH:
        raise OptionError(
            f"the batch sizes {text} are not in order",
            f"MIN,OPT,MAX must rise from 1 on, up to {LARGEST_BATCH}, as in 1,4,8",
        )
    return Profile(low, best, high)


def targets_from_text(text: str) -> tuple[str, ...]:
    """`sm80,sm89` or `8.0,8.9` or `current`, each once and in rising order. Raises `OptionError`."""
    numbers: set[int] = set()
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if names == [CURRENT_TARGET]:
        return (CURRENT_TARGET,)
    if names == [DEFAULT_TARGET]:
        return ()
    for name in names:
        match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", name)
        if not match:
            raise OptionError(
                f"{name!r} is no compute capability", "give a list such as sm80,sm89, or `current` alone"
            )
        numbers.add(int(match[1] + match[2]))
    if not numbers:
        raise OptionError("the list of compute capabilities is empty", "give a list such as sm80,sm89")
    return tuple(f"sm{number}" for number in sorted(numbers))


def bytes_from_text(text: str) -> int:
    """`4GB`, `512MiB`, `1.5g` or a number of bytes. Units are powers of 1024, as in trtexec."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise OptionError(f"{text!r} is no size", "give a number and a unit, as in 4GB or 512MiB")
    return int(float(match[1]) * 2 ** (_UNITS[match[2]] if match[2] else 0))
