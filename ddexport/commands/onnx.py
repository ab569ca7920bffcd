"""`ddexport onnx`: a checkpoint becomes a bundle."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click

from ddexport.commands.weights import OPTIONS, recipe_and_weights
from ddexport.precision.policy import FLOAT32, HALVES, INT8, PRECISIONS
from ddexport.quantize.policy import IMAGES
from ddexport.runtime import console
from ddexport.runtime.bundle import FULL
from ddexport.runtime.options import PATH, comma_list, known, number, option, shared

EPILOG = """
\b
Examples:
  ddexport onnx digits-var
  ddexport onnx digits-var --precision fp32,fp16,bf16 -o build/digits-half
  ddexport onnx digits-var --precision fp32,int8 -o build/digits-int8
  ddexport onnx digits-var --precision fp16 --keep-fp32 'blocks.3.*' -o build/digits-mixed
  ddexport onnx var-d16
  ddexport onnx var-d16 --teacher hub -o build/var-d16-teacher
  ddexport onnx var-d16 --checkpoint my-var-d16.pth -o build/my-var-d16
  ddexport onnx ./my-model
  ddexport onnx var-d16 --random-weights 0 --teacher random -o build/var-d16-random
"""


@click.command("onnx", cls=console.Command, epilog=EPILOG)
@shared("model", required=False)
@shared("named", "checkpoint", "vae", "small-decoder", "teacher", "text-encoder", "revision",
        "cache-dir", "offline", "weights", "random-weights", options=OPTIONS)  # fmt: skip
@option("-o", "--output", type=PATH, metavar="DIR", show_default="build/MODEL",
        help="Directory of the new bundle.")  # fmt: skip
@option("--precision", "precisions", default=FLOAT32, metavar="NAME,...",
        callback=comma_list(partial(known, names=PRECISIONS)),
        help=f"Precisions of the graphs, separated by commas: {', '.join(PRECISIONS)}.")  # fmt: skip
@option("--keep-fp32", multiple=True, metavar="PATTERN",
        help="Keep the modules with these paths, such as 'blocks.3.*', in float32 in fp16 and bf16 graphs."
        " Can be repeated.")  # fmt: skip
@option("--calibration", type=click.IntRange(min=1), metavar="N", show_default=str(IMAGES),
        help="Number of images from which the value ranges of int8 graphs are measured. They are generated"
        " from noise; no data set is needed.")  # fmt: skip
@option("--opset", type=int, metavar="N", show_default="20; 22 with bf16", help="ONNX opset version.")
@option("--pipeline", "pipelines", callback=comma_list(number), metavar="N,...",
        help="Also write pipeline_N.onnx: one graph from noise and label to 8-bit images in N"
        " steps.")  # fmt: skip
@option("--decoder", "decoders", default=FULL, callback=comma_list(str), metavar="NAME,...",
        help="Decoders that --pipeline writes graphs with, separated by commas: full, small.")  # fmt: skip
@option("--force", is_flag=True, help="Replace an existing bundle, after the new one is complete.")
@shared("json")
@console.debug_option
def command(
    output: Path | None,
    precisions: tuple[str, ...],
    keep_fp32: tuple[str, ...],
    calibration: int | None,
    opset: int | None,
    pipelines: tuple[int, ...],
    decoders: tuple[str, ...],
    force: bool,
    as_json: bool,
    **weights: Any,
) -> None:
    """Export MODEL to ONNX, as a bundle for the runtime.

    A bundle is a directory with the graphs student.onnx and decoder.onnx, the labels and a manifest.

    Before it is written, the graphs are run and compared with the PyTorch modules: fp32 and int8 graphs in
    ONNX Runtime, fp16 and bf16 graphs with every rounding emulated. If an error exceeds the limit in the
    recipe, the command ends with exit code 3 and writes nothing.

    Weights that are not given and do not ship with ddexport are fetched from the Hugging Face Hub. HF_HOME,
    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are obeyed.

    The teacher has no int8 graph. With --precision int8 also name fp32, or give --teacher none.
    """
    if calibration is not None and INT8 not in precisions:
        raise click.UsageError("--calibration needs int8 in --precision.")
    if keep_fp32 and not set(precisions) & set(HALVES):
        raise click.UsageError("--keep-fp32 needs fp16 or bf16 in --precision.")
    if decoders != (FULL,) and not pipelines:
        raise click.UsageError(
            "--decoder needs --pipeline; a decoder is in the bundle wherever it has weights."
        )
    recipe, requested = recipe_and_weights(**weights)
    from ddexport.runtime.bundle import FILE_NAME
    from ddexport.staging import check_target

    target = output or Path("build") / recipe.name
    check_target(target, force, FILE_NAME)  # before torch is imported
    from ddexport.card import accuracy_lines, read_accuracy
    from ddexport.export import export_bundle
    from ddexport.sources import WeightRequest

    exported = export_bundle(
        recipe,
        target,
        WeightRequest(**requested),
        precisions=precisions,
        keep_fp32=keep_fp32,
        opset=opset,
        force=force,
        stage=console.stage,
        calibration=IMAGES if calibration is None else calibration,
        pipelines=tuple(product(pipelines, decoders)),
    )
    manifest, accuracy = exported.manifest, read_accuracy(exported.path)
    if as_json:
        written = {"weights": manifest.weights, "graphs": manifest.graphs, "pipelines": manifest.pipelines}
        console.emit_json({"bundle": str(exported.path), **written, "accuracy": accuracy})
        return
    click.echo(f"{exported.path}: {recipe.title}")
    for file in (file for file in manifest.files() if file.file.partition(".")[2].startswith("onnx")):
        click.echo(f"  {file.file:24} {file.bytes / 2**20:9.1f} MiB")
    click.echo("  largest error against PyTorch in float32, on random inputs:")
    for line in accuracy_lines(accuracy):
        click.echo(f"    {line}")
    if manifest.weights.kind == "random":
        click.echo(f"  random weights, seed {manifest.weights.seed}: the images mean nothing")
