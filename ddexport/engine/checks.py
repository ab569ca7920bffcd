"""What a package or this machine cannot do, said before a build: some of it TensorRT only logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ddexport.engine.module import TensorRT
from ddexport.engine.network import Layers
from ddexport.engine.options import CURRENT_TARGET, BuildOptions, OptionError
from ddexport.runtime.engines import DEFAULT_TARGET

OLDEST_MAJOR = 10  # of full TensorRT: the first with strong typing, INT64 and weight streaming
TURING = "sm75"


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be built: `applies` says when, `message` why, `hint` what to do instead."""

    applies: Callable[[BuildOptions, TensorRT], bool]
    message: str
    hint: str


REFUSALS = (
    Refusal(
        lambda options, trt: not trt.is_rtx and trt.gpu is None,
        "full TensorRT builds on the GPU it builds for, and there is no GPU (or no driver) here",
        "build on the target machine, or without a GPU with: --backend tensorrt-rtx",
    ),
    Refusal(
        lambda options, trt: not trt.is_rtx and options.targets not in ((), (CURRENT_TARGET,)),
        "full TensorRT builds for the GPU of this machine only: it has no --compute-capability",
        "leave it out, and use --hardware-compatibility-level for other GPUs; or --backend tensorrt-rtx",
    ),
    Refusal(
        lambda options, trt: trt.is_rtx and options.version_compatible,
        "TensorRT-RTX comes without the lean runtime that --version-compatible needs",
        "leave it out, or use --backend tensorrt",
    ),
    Refusal(
        lambda options, trt: trt.is_rtx and options.hardware is not None,
        "TensorRT-RTX has no --hardware-compatibility-level: it would ignore it",
        "name the GPUs instead, as in --compute-capability sm80,sm89",
    ),
    Refusal(
        lambda options, trt: trt.is_rtx and options.timing_cache is not None,
        "TensorRT-RTX has no timing cache: it would ignore it",
        "leave --timing-cache out",
    ),
    Refusal(
        lambda options, trt: trt.gpu is None and options.refittable,
        "TensorRT-RTX builds refittable engines only where there is a GPU with its driver",
        "leave --refittable out, or build on the target machine",
    ),
    Refusal(
        lambda options, trt: trt.gpu is None and options.strip_plan,
        "TensorRT-RTX builds engines without weights only where there is a GPU with its driver",
        "leave --strip-plan out, or build on the target machine",
    ),
    Refusal(
        lambda options, trt: trt.gpu is None and options.targets == (CURRENT_TARGET,),
        "--compute-capability current means this machine's GPU, and there is none (or no driver) here",
        "name the GPUs, as in --compute-capability sm80,sm89, or leave it out",
    ),
)


def check_options(options: BuildOptions, trt: TensorRT) -> tuple[str, ...]:
    """The targets of the build, resolved. Raises `OptionError` for what cannot be built here, and why."""
    major = trt.version.partition(".")[0]
    if not trt.is_rtx and (not major.isdecimal() or int(major) < OLDEST_MAJOR):
        raise OptionError(f"{trt} is too old: TensorRT {OLDEST_MAJOR} or later is needed", "upgrade tensorrt")
    for refusal in REFUSALS:
        if refusal.applies(options, trt):
            raise OptionError(refusal.message, refusal.hint)
    if options.timing_cache is not None and not options.timing_cache.parent.is_dir():
        raise OptionError(f"there is no folder for {options.timing_cache}", "make it, or name another file")
    for flag in wanted_flags(options):
        if not hasattr(trt.module.BuilderFlag, flag):
            raise OptionError(f"{trt} does not know {_option(flag)}", f"leave {_option(flag)} out")
    return _targets(options, trt)


def wanted_flags(options: BuildOptions) -> Iterator[str]:
    """The names of the builder flags that `options` ask for."""
    switches = {
        "TF32": options.tf32,
        "VERSION_COMPATIBLE": options.version_compatible,
        "STRIP_PLAN": options.strip_plan,
        "REFIT": options.refittable,
        "WEIGHT_STREAMING": options.weight_streaming,
        "SPARSE_WEIGHTS": options.sparse_weights,
    }
    return (name for name, wanted in switches.items() if wanted)


def known_targets(trt: TensorRT) -> tuple[str, ...]:
    """The compute capabilities a TensorRT-RTX can be told to build for, in rising order."""
    names = [name for name in dir(trt.module.ComputeCapability) if name.startswith("SM")]
    return tuple(sorted((name.lower() for name in names), key=lambda name: int(name[2:])))


def check_targets(targets: tuple[str, ...], layers: Layers) -> None:
    """Raises `OptionError` where a target lacks what the graph's layers need."""
    if TURING not in targets:
        return
    if ("product", "float32") in layers:
        missing = "float32 matrix products, and this graph has some (a half-precision one keeps a few)"
    elif any(name == "bfloat16" for _, name in layers):
        missing = "bfloat16"
    else:
        return
    raise OptionError(f"for sm75 (Turing) TensorRT-RTX does not build {missing}", "leave sm75 out")


def _targets(options: BuildOptions, trt: TensorRT) -> tuple[str, ...]:
    if not trt.is_rtx:
        assert trt.gpu is not None  # else refused
        return (trt.gpu.target,)
    if not options.targets:
        return (DEFAULT_TARGET,)
    targets = options.targets
    if targets == (CURRENT_TARGET,):
        assert trt.gpu is not None  # else refused
        targets = (trt.gpu.target,)
    known = known_targets(trt)
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise OptionError(
            f"{trt} cannot build for {', '.join(unknown)}",
            f"it can for {', '.join(known)}; for Hopper (sm90) and data-centre Blackwell: --backend tensorrt",
        )
    return targets


def _option(flag: str) -> str:
    return "--" + {"REFIT": "refittable"}.get(flag, flag.lower().replace("_", "-"))
