"""`ddexport trt`: the graphs of a bundle become TensorRT engines in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.options import comma_list, known, option, shared

if TYPE_CHECKING:
    from ddexport.engine.build import Built

EPILOG = """
\b
Examples:
  ddexport trt digits-half
  ddexport trt build/var-d16 --precision fp16,fp32 --batch 1,4,8 --batch 16,32,64
  ddexport trt build/var-d16 --backend tensorrt-rtx --compute-capability sm86,sm89
  ddexport trt build/var-d16 --backend tensorrt --hardware-compatibility-level ampere+
"""

PRECISIONS = ("fp32", "fp16", "bf16")


def _read_by(reader: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A click callback: reads a text, or several, by that function of engine.options. What it cannot read is
    a usage error."""

    def read(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        from ddexport.engine import options
        from ddexport.runtime.errors import DDError

        try:
            if isinstance(value, tuple):
                return tuple(dict.fromkeys(map(getattr(options, reader), value)))
            return value if value is None else getattr(options, reader)(value)
        except DDError as error:
            raise click.BadParameter(f"{error.message}: {error.hint}") from error

    return read


@click.command("trt", cls=console.Command, epilog=EPILOG)
@shared("bundle")
@option("--backend", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto",
        metavar="NAME", help="Package that builds the engines: tensorrt or tensorrt-rtx. auto: tensorrt, if"
        " it is installed and there is a GPU, else tensorrt-rtx.")  # fmt: skip
@option("--precision", "precisions", metavar="NAME,...", show_default="fp16",
        callback=comma_list(partial(known, names=PRECISIONS)),
        help="Precisions of the engines, separated by commas: fp32, fp16, bf16.")  # fmt: skip
@option("--role", "roles", multiple=True, metavar="ROLE", show_default="all but the teacher",
        help="Graphs to build: student, decoder or decoder_small. Can be repeated.")  # fmt: skip
@option("--batch", "profiles", multiple=True, metavar="MIN,OPT,MAX", default=["1,4,8"],
        callback=_read_by("profile_from_text"),
        help="Batch sizes of an optimization profile: the smallest, the one to optimize for, the largest."
        " Can be repeated, for several profiles.")  # fmt: skip
@option("--compute-capability", "targets", metavar="SM,...", default="default",
        callback=_read_by("targets_from_text"), show_default="8.0, 8.6, 8.9, 12.0 and later",
        help="GPU architectures to build for, such as sm80,sm89; or current, the GPU of this machine. Only"
        " for tensorrt-rtx.")  # fmt: skip
@option("--workspace", metavar="SIZE", callback=_read_by("bytes_from_text"), show_default="no limit",
        help="Limit of the builder's scratch memory, such as 4GB.")  # fmt: skip
@option("--builder-optimization-level", "optimization_level", type=click.IntRange(0, 5), metavar="LEVEL",
        show_default="TensorRT's",
        help="0 to 5. A higher level builds longer, for engines that may be faster.")  # fmt: skip
@option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="File that keeps measured kernel times from build to build. Only for tensorrt.")  # fmt: skip
@option("--version-compatible", is_flag=True,
        help="Build engines that later versions of TensorRT can run. Only for tensorrt.")  # fmt: skip
@option("--hardware-compatibility-level", "hardware", metavar="LEVEL",
        type=click.Choice(["ampere+", "same-compute-capability"]), show_default="this GPU alone",
        help="Build engines that other GPUs can run: ampere+ or same-compute-capability. Only for"
        " tensorrt.")  # fmt: skip
@option("--tf32/--no-tf32", default=False, help="Compute float32 matrix products in TF32.")
@option("--force", is_flag=True, help="Also build engines that the bundle already has.")
@shared("json")
@console.debug_option
def command(
    bundle: Path,
    backend: str,
    precisions: tuple[str, ...],
    roles: tuple[str, ...],
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build TensorRT engines from the graphs of BUNDLE.

    The engines are written into the bundle. An engine computes in the precision of its graph, so export the
    graph first, for example with `ddexport onnx MODEL --precision fp16`. If an engine would compute in
    another precision, the command ends with exit code 3.
    """
    from ddexport.engine.build import build_engines
    from ddexport.engine.module import load_tensorrt
    from ddexport.engine.options import BuildOptions

    trt = load_tensorrt(backend)
    built = build_engines(bundle, trt, BuildOptions(**options), precisions, roles, force, console.stage)
    if as_json:
        console.emit_json({"bundle": bundle, "engines": [_row(bundle, item) for item in built]})
    else:
        click.echo("\n".join(_line(bundle, item) for item in built))


def _row(bundle: Path, item: Built) -> dict[str, Any]:
    import msgspec

    return {
        "plan": item.plan.relative_to(bundle),
        "origin": item.origin,
        "seconds": item.seconds,
        "engine": msgspec.to_builtins(item.engine, str_keys=True),
    }


def _line(bundle: Path, item: Built) -> str:
    engine = item.engine
    how = "was there already" if item.origin == "kept" else f"built in {console.duration(item.seconds)}"
    layers = ", ".join(f"{count} in {name}" for name, count in engine.layers.items())
    return (
        f"{item.plan.relative_to(bundle)}  {engine.bytes / 2**20:.1f} MiB, {how}\n"
        f"  {engine.precision}: products and convolutions {layers};"
        f" batch {', '.join(map(str, engine.profiles))}; for {', '.join(engine.targets)}"
    )
