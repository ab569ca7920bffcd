"""`ddexport trt`: the graphs of a bundle become TensorRT engines in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@click.command("trt", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto",
              show_default=True, help="The package. auto: tensorrt where there is a GPU.")  # fmt: skip
@click.option("--precision", metavar="P[,P]", help="fp16, bf16, fp32: which graphs. [default: fp16]")
@click.option("--role", "roles", multiple=True, type=click.Choice(["student", "decoder"]),
              help="Which graphs; repeatable. [default: both]")  # fmt: skip
@click.option("--batch", "batches", multiple=True, metavar="MIN,OPT,MAX", default=["1,4,8"],
              show_default=True, help="Batch sizes; repeatable, one optimization profile each.")  # fmt: skip
@click.option("--compute-capability", metavar="SM[,SM]",
              help="GPUs to build for, as in sm80,sm89, or `current`. TensorRT-RTX alone. [default: 8.0,"
              " 8.6, 8.9, 12.0 and later]")  # fmt: skip
@click.option("--workspace", metavar="SIZE", help="Limit on scratch memory, as in 4GB. [default: all]")
@click.option("--builder-optimization-level", "level", type=click.IntRange(0, 5), help="0 builds fastest.")
@click.option("--timing-cache", type=click.Path(path_type=Path, dir_okay=False),
              help="File of measured kernel times, read and written. Full TensorRT alone.")  # fmt: skip
@click.option("--version-compatible", is_flag=True, help="Runs with later TensorRT. Full TensorRT alone.")
@click.option("--hardware-compatibility-level", "hardware",
              type=click.Choice(["ampere+", "same-compute-capability"]),
              help="Runs on other GPUs too. Full TensorRT alone.")  # fmt: skip
@click.option("--strip-plan", is_flag=True, help="Leaves the weights out; needs a GPU.")
@click.option("--refittable", is_flag=True, help="Weights can be replaced later; needs a GPU.")
@click.option("--weight-streaming", is_flag=True, help="Weights may stay in host memory.")
@click.option("--sparse-weights", is_flag=True, help="Uses 2:4 sparsity where the weights have it.")
@click.option("--tf32/--no-tf32", default=False, show_default=True, help="float32 products on TF32 units.")
@click.option("--force", is_flag=True, help="Build even what is in the bundle already.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@console.debug_option
def command(
    bundle: Path,
    backend: str,
    precision: str | None,
    roles: tuple[str, ...],
    force: bool,
    as_json: bool,
    **build_options: Any,
) -> None:
    """Build TensorRT engines of a bundle's students and decoders, into the bundle.

    An engine has the precision of its graph: export that first, with `ddexport onnx --precision fp16`. One
    that does not compute in the precision asked for is refused, with exit code 3.
    """
    precisions = _precisions(precision)
    _require_export_extra()
    from ddexport.engine.build import build_engines
    from ddexport.engine.module import load_tensorrt

    options = _options(**build_options)
    built = build_engines(
        bundle,
        load_tensorrt(backend),
        options,
        precisions,
        roles,
        force,
        console.stage,
        _progress,
    )
    if as_json:
        console.emit_json({"bundle": bundle, "engines": [_row(bundle, item) for item in built]})
        return
    for item in built:
        click.echo(_line(bundle, item))


def _options(
    batches: tuple[str, ...],
    compute_capability: str | None,
    workspace: str | None,
    level: int | None,
    **rest: Any,
) -> Any:
    from ddexport.engine.options import BuildOptions, bytes_from_text, profile_from_text, targets_from_text

    return BuildOptions(
        profiles=_usage("--batch", lambda: tuple(dict.fromkeys(map(profile_from_text, batches)))),
        targets=_usage("--compute-capability", lambda: targets_from_text(compute_capability))
        if compute_capability is not None
        else (),
        workspace=_usage("--workspace", lambda: bytes_from_text(workspace))
        if workspace is not None
        else None,
        optimization_level=level,
        **rest,
    )


def _usage(option: str, parse: Callable[[], Any]) -> Any:
    """What `parse` gives; a text it cannot read is a usage error."""
    from ddexport.runtime.errors import DDError

    try:
        return parse()
    except DDError as error:
        raise click.BadParameter(f"{error.message}: {error.hint}", param_hint=option) from error


def _precisions(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    wrong = [name for name in names if name not in PRECISIONS]
    if wrong or len(set(names)) < len(names):
        raise click.BadParameter(f"{text!r} is no list of {', '.join(PRECISIONS)}", param_hint="--precision")
    return names


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int], None]]:
    """Steps and time, without a total: TensorRT does not say how long its last step will take."""
    done = 0
    with console.progress(0, f"building {name}, step") as bar:

        def report(steps: int) -> None:
            nonlocal done
            bar.advance(steps - done)
            done = steps

        yield report


def _line(bundle: Path, item: Built) -> str:
    engine = item.engine
    how = "was there already" if item.origin == "kept" else f"built in {console.duration(item.seconds)}"
    layers = ", ".join(f"{count} in {name}" for name, count in engine.layers.items())
    return (
        f"{item.plan.relative_to(bundle)}  {engine.bytes / 2**20:.1f} MiB, {how}\n"
        f"  {engine.precision}: products and convolutions {layers};"
        f" batch {', '.join(map(str, engine.profiles))}; for {', '.join(engine.targets)}"
    )


def _row(bundle: Path, item: Built) -> dict[str, Any]:
    import msgspec

    return {
        "plan": item.plan.relative_to(bundle),
        "origin": item.origin,
        "seconds": item.seconds,
        "engine": msgspec.to_builtins(item.engine, str_keys=True),
    }


def _require_export_extra() -> None:
    from importlib.util import find_spec

    from ddexport.runtime.errors import DDError

    missing = [name for name in ("onnx", "filelock") if find_spec(name) is None]
    if missing:
        raise DDError(f"building engines needs {', '.join(missing)}", 'pip install "ddexport[tensorrt-rtx]"')
