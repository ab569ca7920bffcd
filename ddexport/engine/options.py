"""What may be asked of a build, as data, and what a package or this machine cannot do of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ddexport.engine.module import TensorRT
from ddexport.runtime.engines import DEFAULT_TARGET, Profile
from ddexport.runtime.errors import DDError

CURRENT_TARGET = "current"
HARDWARE_LEVELS = {"ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
LARGEST_BATCH = 1 << 16
OLDEST_MAJOR = 10  # of full TensorRT: the first with strong typing and INT64


class OptionError(DDError):
    """A build option that makes no sense, or that this package or machine cannot honour."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Settings of a build, with the names and meanings of `trtexec`.

    Attributes:
        profiles: the batch sizes, one optimization profile each.
        targets: compute capabilities as `sm89`, in rising order; empty for the builder's own choice.
        workspace: limit on scratch memory in bytes; None for all there is.
        optimization_level: 0 (fastest build) to 5; None for the builder's default.
        tf32: float32 products on TF32 units. Off: it keeps 10 bits of mantissa, and the float32 parts of a
            half-precision graph are float32 because they need more.
        version_compatible, hardware: full TensorRT's wider engines; hardware is one of `HARDWARE_LEVELS`.
        timing_cache: full TensorRT's file of measured kernel times. Changes how long a build takes, and only
            by chance what it gives.
    """

    profiles: tuple[Profile, ...] = (Profile(1, 4, 8),)
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware: str | None = None
    timing_cache: Path | None = None


def profile_from_text(text: str) -> Profile:
    """`MIN,OPT,MAX`, or one number for all three. Raises `OptionError`."""
    sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    low, best, high = sizes * 3 if len(sizes) == 1 else sizes if len(sizes) == 3 else (0, 0, 0)
    if not 1 <= low <= best <= high <= LARGEST_BATCH:
        raise OptionError(
            f"{text!r} is not a range of batch sizes",
            f"give MIN,OPT,MAX, rising, from 1 to {LARGEST_BATCH}, such as 1,4,8",
        )
    return Profile(low, best, high)


def targets_from_text(text: str) -> tuple[str, ...]:
    """`sm80,sm89` or `8.0,8.9` or `current`, one of each and in rising order. Raises `OptionError`."""
    names = [name.strip().lower() for name in text.split(",")]
    if names in ([CURRENT_TARGET], [DEFAULT_TARGET]):
        return () if names == [DEFAULT_TARGET] else (CURRENT_TARGET,)
    matches = [re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", name) for name in names]
    if not all(matches):
        hint = f"give a list such as sm80,sm89, or `{CURRENT_TARGET}` alone"
        raise OptionError(f"{text!r} is not a list of compute capabilities", hint)
    return tuple(f"sm{number}" for number in sorted({int(match[1] + match[2]) for match in matches if match}))


def bytes_from_text(text: str) -> int:
    """`4GB`, `512MiB`, `1.5g` or a number of bytes. Units are powers of 1024, as in trtexec."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")) if match else 0
    if not size:
        raise OptionError(f"{text!r} is not a size", "give a number and a unit, such as 4GB or 512MiB")
    return size


def resolve(options: BuildOptions, trt: TensorRT) -> BuildOptions:
    """The options with their targets named. Raises `OptionError` for what the package or this machine cannot
    do: some of it TensorRT ignores or only logs."""
    rtx, here = trt.is_rtx, options.targets == (CURRENT_TARGET,)
    refusals = (
        (not rtx and int(trt.version.partition(".")[0]) < OLDEST_MAJOR,
         f"{trt} is too old: TensorRT {OLDEST_MAJOR} or later is needed", "upgrade tensorrt"),
        (not rtx and options.targets and not here,
         "full TensorRT builds for the GPU of this machine only: it has no --compute-capability",
         "leave it out, and use --hardware-compatibility-level for other GPUs; or --backend tensorrt-rtx"),
        (rtx and options.version_compatible,
         "TensorRT-RTX comes without the lean runtime that --version-compatible needs",
         "leave it out, or use --backend tensorrt"),
        (rtx and options.hardware,
         "TensorRT-RTX has no --hardware-compatibility-level: it would ignore it",
         "name the GPUs instead, such as --compute-capability sm80,sm89"),
        (rtx and options.timing_cache,
         "TensorRT-RTX has no timing cache: it would ignore it", "leave --timing-cache out"),
        (options.timing_cache and not options.timing_cache.parent.is_dir(),
         f"there is no folder for {options.timing_cache}", "make it, or name another file"),
        (trt.gpu is None and (not rtx or here),
         f"{trt.backend} builds for the GPU of this machine here, and there is none (or no driver)",
         "build on the target machine, or without one: --backend tensorrt-rtx --compute-capability sm89"),
    )  # fmt: skip
    for applies, reason, remedy in refusals:
        if applies:
            raise OptionError(reason, remedy)
    targets = options.targets or (DEFAULT_TARGET,)
    if trt.gpu and (not rtx or here):
        targets = (trt.gpu.target,)
    if rtx and (unknown := set(targets) - {DEFAULT_TARGET, *known_targets(trt)}):
        raise OptionError(
            f"{trt} cannot build for {', '.join(sorted(unknown))}",
            f"it can for {', '.join(known_targets(trt))}; for Hopper (sm90) and data-centre Blackwell:"
            " --backend tensorrt",
        )
    return replace(options, targets=targets)


def known_targets(trt: TensorRT) -> tuple[str, ...]:
    """The compute capabilities a TensorRT-RTX can be told to build for, in rising order."""
    names = [name.lower() for name in dir(trt.module.ComputeCapability) if name.startswith("SM")]
    return tuple(sorted(names, key=lambda name: int(name[2:])))
