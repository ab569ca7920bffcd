"""`ddexport onnx`: a checkpoint becomes a bundle."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click

from ddexport.precision.policy import FLOAT32, HALVES, INT8, PRECISIONS
from ddexport.quantize.policy import IMAGES
from ddexport.runtime import console
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

EMBEDDED = "the weights that ship with ddexport, if any"
PUBLISHED = "the weights that ship with ddexport, else those on the Hugging Face Hub"


@click.command("onnx", cls=console.Command, epilog=EPILOG)
@shared("model", required=False)
@option("--model", "named", metavar="MODEL", help="The same as the argument MODEL.")
@option("--checkpoint", type=PATH, metavar="PATH", show_default=PUBLISHED,
        help="Weights of the student: a torch or safetensors file, or the index file or the directory of a"
        " sharded checkpoint.")  # fmt: skip
@option("--vae", type=PATH, metavar="PATH", show_default=PUBLISHED,
        help="Weights of the tokenizer (VQ-VAE), whose decoder makes the images, in the same"
        " formats.")  # fmt: skip
@option("--teacher", metavar="PATH|hub|random|none", show_default=EMBEDDED,
        help="Weights of the teacher, the auto-regressive model that some schedules need. hub: those on the"
        " Hugging Face Hub. random: random weights, with --random-weights. none: no teacher.")  # fmt: skip
@option("--revision", metavar="NAME", show_default="main",
        help="Branch, tag or commit of the Hub repository of the student.")  # fmt: skip
@option("--cache-dir", type=PATH, metavar="DIR", show_default="HF_HUB_CACHE, or that of huggingface_hub",
        help="Directory that keeps the files that were fetched from the Hub.")  # fmt: skip
@option("--offline", is_flag=True,
        help="Take fetched files from that directory alone, as with HF_HUB_OFFLINE=1.")  # fmt: skip
@option("--weights", metavar="NAME", show_default="the EMA weights, if there are any",
        help="State dict to load from a checkpoint that has several, such as trainer.ema_parameters. The last"
        " part of the name is enough.")  # fmt: skip
@option("--random-weights", type=int, metavar="SEED",
        help="Export random weights with this seed, instead of checkpoints.")  # fmt: skip
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
@option("--force", is_flag=True, help="Replace an existing bundle, after the new one is complete.")
@shared("json")
@console.debug_option
def command(
    model: str | None,
    named: str | None,
    checkpoint: Path | None,
    vae: Path | None,
    teacher: str | None,
    revision: str | None,
    cache_dir: Path | None,
    offline: bool,
    weights: str | None,
    random_weights: int | None,
    output: Path | None,
    precisions: tuple[str, ...],
    keep_fp32: tuple[str, ...],
    calibration: int | None,
    opset: int | None,
    pipelines: tuple[int, ...],
    force: bool,
    as_json: bool,
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
    if model and named and model != named:
        raise click.UsageError(f"the argument is {model}, but --model is {named}: give one of them.")
    if not (model := model or named):
        raise click.UsageError("MODEL is missing: `ddexport models` lists the models.")
    given = (("student", checkpoint), ("tokenizer", vae), ("teacher", _teacher_file(teacher, random_weights)))
    files = {role: path for role, path in given if path is not None}
    if calibration is not None and INT8 not in precisions:
        raise click.UsageError("--calibration needs int8 in --precision.")
    if keep_fp32 and not set(precisions) & set(HALVES):
        raise click.UsageError("--keep-fp32 needs fp16 or bf16 in --precision.")
    if files and random_weights is not None:
        raise click.UsageError(
            "--random-weights cannot be used with files of weights: give one or the other."
        )
    _require_export_extra()
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # which huggingface_hub reads when it is imported
    from ddexport.recipe import load_recipe, weights_beside
    from ddexport.runtime.bundle import FILE_NAME
    from ddexport.staging import check_target

    recipe = load_recipe(model, cache_dir, revision)
    if random_weights is None:
        files = {**weights_beside(recipe, model), **files}
    target = output or Path("build") / recipe.name
    check_target(target, force, FILE_NAME)  # before torch is imported
    from ddexport.card import accuracy_lines, read_accuracy
    from ddexport.export import export_bundle
    from ddexport.sources import WeightRequest

    wanted = None if teacher is None else teacher != "none"
    if "://" in model:
        revision = None  # it was the recipe's repository's
    exported = export_bundle(
        recipe,
        target,
        WeightRequest(
            files, weights, random_weights, wanted, None if "://" in model else revision, cache_dir
        ),
        precisions=precisions,
        keep_fp32=keep_fp32,
        opset=opset,
        force=force,
        stage=console.stage,
        calibration=IMAGES if calibration is None else calibration,
        pipelines=pipelines,
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


def _teacher_file(teacher: str | None, random_weights: int | None) -> Path | None:
    if teacher == "random" and random_weights is None:
        raise click.UsageError("--teacher random needs --random-weights SEED.")
    if teacher == "hub" and random_weights is not None:
        raise click.UsageError("--teacher hub cannot be used with --random-weights: give --teacher random.")
    return None if teacher in (None, "hub", "random", "none") else Path(str(teacher))


def _require_export_extra() -> None:
    from importlib.util import find_spec

    from ddexport.runtime.errors import DDError

    needed = ("torch", "onnx", "onnxscript", "safetensors", "yaml", "huggingface_hub")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise DDError(f"exporting needs {', '.join(missing)}", 'pip install "ddexport[export]"')
    if find_spec("onnxruntime") is None:
        raise DDError("exporting needs onnxruntime", 'pip install "ddexport[cpu]", or [gpu]')
