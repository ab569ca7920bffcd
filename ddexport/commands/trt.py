"""`ddexport trt`: the graphs of a bundle become TensorRT engines in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console

if TYPE_CHECKING:
    from ddexport.engine.build import Built

EPILOG = """
\b
Examples:
  ddexport trt build/digits-var
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


def _precisions(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[str, ...]:
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if not set(names) <= set(PRECISIONS) or len(set(names)) < len(names):
        raise click.BadParameter(f"{text!r} is no list of {', '.join(PRECISIONS)}")
    return names


@click.command("trt", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto",
              show_default=True, help="The package. auto: tensorrt where there is a GPU.")  # fmt: skip
@click.option("--precision", "precisions", metavar="P[,P]", callback=_precisions,
              help="fp16, bf16, fp32: which graphs. [default: fp16]")  # fmt: skip
@click.option("--role", "roles", multiple=True, type=click.Choice(["student", "decoder"]),
              help="Which graphs; repeatable. [default: both]")  # fmt: skip
@click.option("--batch", "profiles", multiple=True, metavar="MIN,OPT,MAX", default=["1,4,8"],
              show_default=True, callback=_read_by("profile_from_text"),
              help="Batch sizes; repeatable, one optimization profile each.")  # fmt: skip
@click.option("--compute-capability", "targets", metavar="SM[,SM]", default="default",
              callback=_read_by("targets_from_text"),
              help="GPUs to build for, as in sm80,sm89, or `current`. TensorRT-RTX alone. [default: 8.0,"
              " 8.6, 8.9, 12.0 and later]")  # fmt: skip
@click.option("--workspace", metavar="SIZE", callback=_read_by("bytes_from_text"),
              help="Limit on scratch memory, as in 4GB. [default: all]")  # fmt: skip
@click.option("--builder-optimization-level", "optimization_level", type=click.IntRange(0, 5),
              help="0 builds fastest.")  # fmt: skip
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False),
              help="File of measured kernel times, read and written. Full TensorRT alone.")  # fmt: skip
@click.option("--version-compatible", is_flag=True, help="Runs with later TensorRT. Full TensorRT alone.")
@click.option("--hardware-compatibility-level", "hardware",
              type=click.Choice(["ampere+", "same-compute-capability"]),
              help="Runs on other GPUs too. Full TensorRT alone.")  # fmt: skip
@click.option("--tf32/--no-tf32", default=False, show_default=True, help="float32 products on TF32 units.")
@click.option("--force", is_flag=True, help="Build even what is in the bundle already.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
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
    """Build TensorRT engines of a bundle's students and decoders, into the bundle.

    An engine has the precision of its graph: export that first, with `ddexport onnx --precision fp16`. One
    that does not compute in the precision asked for is refused, with exit code 3.
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
