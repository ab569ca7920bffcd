"""`ddexport onnx`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from ddexport.precision.policy import FLOAT32, HALVES, INT8, PRECISIONS
from ddexport.quantize.policy import IMAGES
from ddexport.runtime import console

EPILOG = """
\b
Examples:
  ddexport onnx --model digits-var
  ddexport onnx --model var-d16 --checkpoint var-d16.pth --vae vae_ch160v4096z32.pth
  ddexport onnx --model var-d16 --checkpoint var-d16.pth --vae vae_ch160v4096z32.pth --teacher var_d16.pth
  ddexport onnx --model var-d16 --random-weights 0 --teacher random -o build/var-d16-random
  ddexport onnx --model digits-var --precision fp32,fp16,bf16
  ddexport onnx --model digits-var --precision fp32,int8 --calibration 256
  ddexport onnx --model digits-var --precision fp16 --keep-fp32 'blocks.3.*' -o build/mixed
"""

existing = click.Path(path_type=Path)


def _named_precisions(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in PRECISIONS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(PRECISIONS)}.")
        if names.count(name) > 1:
            raise click.BadParameter(f"{name} is named twice.")
    return names


@click.command("onnx", cls=console.Command, epilog=EPILOG)
@click.option(
    "--model", required=True, metavar="NAME|YAML", help="A name of `ddexport models`, or a recipe file."
)
@click.option("--checkpoint", type=existing,
              help="The student's weights, torch or safetensors; shards by index or directory.")  # fmt: skip
@click.option("--vae", type=existing, help="The tokenizer's weights, likewise.")
@click.option("--teacher", metavar="FILE|random|none",
              help="The teacher's weights, for steps that involve it; random beside --random-weights."
              " [default: those that ship with the project, if any]")  # fmt: skip
@click.option("--weights", metavar="NAME",
              help="Which state dict of a file with several, as trainer.ema_parameters, or its last part."
              " [default: ema, if there is one]")  # fmt: skip
@click.option("--random-weights", type=int, metavar="SEED", help="Random weights in place of the files.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The bundle directory. [default: build/NAME]"
)
@click.option("--precision", "precisions", default=FLOAT32, show_default=True, metavar="NAME,...",
              callback=_named_precisions, help=f"One or several of {', '.join(PRECISIONS)}.")  # fmt: skip
@click.option("--keep-fp32", multiple=True, metavar="PATTERN",
              help="Modules that stay float32 in half graphs, as 'blocks.3.*'. Repeatable.")  # fmt: skip
@click.option("--calibration", type=click.IntRange(min=1), metavar="N",
              help="How many images of noise the ranges of int8 graphs are taken from; no data is needed."
              f" [default: {IMAGES}]")  # fmt: skip
@click.option("--opset", type=int, help="ONNX opset. [default: 20; bf16: 22]")
@click.option("--force", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@console.debug_option
def command(
    model: str,
    checkpoint: Path | None,
    vae: Path | None,
    teacher: str | None,
    weights: str | None,
    random_weights: int | None,
    output: Path | None,
    precisions: tuple[str, ...],
    keep_fp32: tuple[str, ...],
    calibration: int | None,
    opset: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Export a model to a bundle: student.onnx, decoder.onnx and all that the runtime needs.

    The graphs are checked against PyTorch before the bundle appears; a mismatch ends with exit code 3 and no
    bundle. Half graphs (fp16, bf16) run with every rounding of a half engine, int8 graphs in ONNX Runtime,
    and both are held to the recipe's limits. int8 is of student and decoder: a teacher needs fp32 beside it.
    """
    named = (("student", checkpoint), ("tokenizer", vae), ("teacher", _teacher_file(teacher, random_weights)))
    files = {role: path for role, path in named if path is not None}
    if calibration is not None and INT8 not in precisions:
        raise click.UsageError("--calibration is of int8 graphs: ask for them with --precision")
    if keep_fp32 and not set(precisions) & set(HALVES):
        raise click.UsageError("--keep-fp32 is of fp16 and bf16 graphs: ask for one with --precision")
    if files and random_weights is not None:
        raise click.UsageError("--random-weights takes the place of all files: give one or the other")
    _require_export_extra()
    from ddexport.recipe import load_recipe
    from ddexport.runtime.bundle import FILE_NAME
    from ddexport.staging import check_target

    recipe = load_recipe(model)
    target = output or Path("build") / recipe.name
    check_target(target, force, FILE_NAME)  # before torch is imported
    from ddexport.card import accuracy_lines, read_accuracy
    from ddexport.export import export_bundle
    from ddexport.sources import WeightRequest

    exported = export_bundle(
        recipe,
        target,
        WeightRequest(files, weights, random_weights, None if teacher is None else teacher != "none"),
        precisions=precisions,
        keep_fp32=keep_fp32,
        opset=opset,
        force=force,
        stage=console.stage,
        calibration=IMAGES if calibration is None else calibration,
    )
    manifest, accuracy = exported.manifest, read_accuracy(exported.path)
    if as_json:
        graphs = {"weights": manifest.weights, "graphs": manifest.graphs, "accuracy": accuracy}
        console.emit_json({"bundle": str(exported.path), **graphs})
        return
    click.echo(f"{exported.path}: {recipe.title}")
    for file in dict.fromkeys(file for graph in manifest.graphs for file in graph.files):
        click.echo(f"  {file.file:24} {file.bytes / 2**20:9.1f} MiB")
    click.echo("  largest error against PyTorch in float32, on random inputs:")
    for line in accuracy_lines(accuracy):
        click.echo(f"    {line}")
    if manifest.weights.kind == "random":
        click.echo(f"  random weights, seed {manifest.weights.seed}: the images mean nothing")


def _teacher_file(teacher: str | None, random_weights: int | None) -> Path | None:
    if teacher == "random" and random_weights is None:
        raise click.UsageError("--teacher random goes with --random-weights SEED")
    return None if teacher in (None, "random", "none") else Path(str(teacher))


def _require_export_extra() -> None:
    from importlib.util import find_spec

    from ddexport.runtime.errors import DDError

    needed = ("torch", "onnx", "onnxscript", "safetensors", "yaml")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise DDError(f"exporting needs {', '.join(missing)}", 'pip install "ddexport[export]"')
    if find_spec("onnxruntime") is None:
        raise DDError("exporting needs onnxruntime", 'pip install "ddexport[cpu]", or [gpu]')
