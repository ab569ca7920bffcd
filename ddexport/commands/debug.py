"""`ddexport debug`: to find out why a graph is not what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddexport.precision.policy import HALVES
from ddexport.runtime import console

if TYPE_CHECKING:
    from ddexport.precision.layers import Layer

EPILOG = """
\b
Examples:
  ddexport debug layers build/digits-var
  ddexport debug layers build/digits-var --precision bf16 --images 4 --plot layers.png
  ddexport debug layers build/var-d16 --checkpoint var-d16.pth --vae vae_ch160v4096z32.pth
  ddexport debug layers build/digits-var --keep-fp32 'blocks.0.*'
"""
HEADINGS = ("", "rms", "largest", "relative", "own", "range", "")

existing = click.Path(path_type=Path)


@click.group("debug", cls=console.Group, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Find out where a graph goes wrong."""


@command.command("layers", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", type=existing)
@click.option("--precision", type=click.Choice(HALVES), default="fp16", show_default=True,
              help="What to compare with float32; the bundle need not have it.")  # fmt: skip
@click.option("--images", type=click.IntRange(min=1), default=1, show_default=True, help="How many images.")
@click.option("--keep-fp32", multiple=True, metavar="PATTERN",
              help="Modules that stay float32. Repeatable.  [default: as exported]")  # fmt: skip
@click.option("--checkpoint", type=existing, help="The student's checkpoint that the bundle was made from.")
@click.option("--vae", type=existing, help="The tokenizer's checkpoint that the bundle was made from.")
@click.option("--plot", type=existing, metavar="FILE", help="Also draw it, as a PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@console.debug_option
def layers(
    bundle: Path,
    precision: str,
    images: int,
    keep_fp32: tuple[str, ...],
    checkpoint: Path | None,
    vae: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Show where half precision loses accuracy: every block of the student, every stage of the decoder.

    Both run in PyTorch on the CPU, on the same noise: in float32, and cast as the export casts. `relative` is
    the error after a stage, `own` what the stage alone adds, `range` the largest half number in it over the
    largest there is.
    """
    from ddexport.precision.cast import check_patterns
    from ddexport.precision.layers import compare_layers, inputs_of
    from ddexport.precision.weights import parts_of_bundle
    from ddexport.runtime.bundle import read_manifest

    manifest = read_manifest(bundle, verify=False)
    files = {role: path for role, path in (("student", checkpoint), ("tokenizer", vae)) if path is not None}
    with console.stage("loading weights", keep=False):
        parts = parts_of_bundle(manifest, files)
    if not keep_fp32:
        kept = (g.keep_fp32 for g in manifest.graphs if g.precision == precision)
        keep_fp32 = tuple(next(kept, ()))
    check_patterns(parts.values(), keep_fp32)
    size = manifest.sequence
    compared: list[Layer] = []
    with console.stage(f"comparing {images} image{'s' if images > 1 else ''}", keep=False):
        compared += compare_layers(
            parts, precision, keep_fp32, **inputs_of(manifest.classes, size.length, size.width, images)
        )
    if plot is not None:
        from ddexport.precision.plot import plot_layers

        plot_layers(compared, f"{manifest.name}: {precision} against float32", plot)
        click.echo(f"plot: {plot}", err=True)
    if as_json:
        console.emit_json({"bundle": str(bundle), "precision": precision, "images": images,
                           "keep_fp32": keep_fp32, "layers": compared})  # fmt: skip
        return
    click.echo(f"{manifest.name}: {precision} against float32, {images} images")
    click.echo("\n".join(_table(compared)))


def _table(compared: list[Layer]) -> list[str]:
    from ddexport.precision.table import columns

    rows = [list(HEADINGS)]
    for layer in compared:
        numbers = (layer.rms, layer.largest, layer.relative, layer.own)
        remark = f"{layer.infinite} numbers are not finite" if layer.infinite else ""
        name = f"{layer.part} {layer.layer.removeprefix('decoder.')}"
        rows.append([name, *(f"{n:.1e}" for n in numbers), f"{layer.range_share:.2%}", remark])
    return columns(rows)
