"""Which weights a command takes: options that `onnx` and `distill decoder` share, and what they ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime.options import PATH

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

EMBEDDED = "the weights that ship with ddexport, if any"
PUBLISHED = "the weights that ship with ddexport, else those on the Hugging Face Hub"
# fmt: off
OPTIONS: dict[str, dict[str, Any]] = {
    "named": {"names": ("--model", "named"), "metavar": "MODEL", "help": "The same as the argument MODEL."},
    "checkpoint": {"type": PATH, "metavar": "PATH", "show_default": PUBLISHED,
                   "help": "Weights of the student: a torch or safetensors file, or the index file or the"
                   " directory of a sharded checkpoint."},
    "vae": {"type": PATH, "metavar": "PATH", "show_default": PUBLISHED,
            "help": "Weights of the tokenizer (VQ-VAE), whose decoder makes the images, in the same"
            " formats."},
    "small-decoder": {"type": PATH, "metavar": "PATH", "show_default": EMBEDDED,
                      "help": "Weights of a small decoder, which `ddexport distill decoder` makes."},
    "teacher": {"metavar": "PATH|hub|random|none", "show_default": EMBEDDED,
                "help": "Weights of the teacher, the auto-regressive model that some schedules need. hub:"
                " those on the Hugging Face Hub. random: random weights, with --random-weights. none: no"
                " teacher."},
    "text-encoder": {"metavar": "DIR|hub|none", "show_default": "hub, if the recipe places it there",
                     "help": "Directory of the T5 text encoder of a text model, with tokenizer.json. none:"
                     " draw from features of the prompts."},
    "revision": {"metavar": "NAME", "show_default": "main",
                 "help": "Branch, tag or commit of the Hub repository of the student."},
    "cache-dir": {"type": PATH, "metavar": "DIR", "show_default": "HF_HUB_CACHE, or that of huggingface_hub",
                  "help": "Directory that keeps the files that were fetched from the Hub."},
    "offline": {"is_flag": True,
                "help": "Take fetched files from that directory alone, as with HF_HUB_OFFLINE=1."},
    "weights": {"metavar": "NAME", "show_default": "the EMA weights, if there are any",
                "help": "State dict to load from a checkpoint that has several, such as"
                " trainer.ema_parameters. The last part of the name is enough."},
    "random-weights": {"type": int, "metavar": "SEED",
                       "help": "Take random weights with this seed, instead of checkpoints."},
}
# fmt: on


def recipe_and_weights(
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
    small_decoder: Path | None = None,
    text_encoder: str | None = None,
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that these options and the argument `model` name, and the fields of a `WeightRequest`.

    Raises click.UsageError for what contradicts itself, DDError for packages that are missing, RecipeError.
    """
    if model and named and model != named:
        raise click.UsageError(f"the argument is {model}, but --model is {named}: give one of them.")
    if not (model := model or named):
        raise click.UsageError("MODEL is missing: `ddexport models` lists the models.")
    given = {
        "student": checkpoint,
        "tokenizer": vae,
        "teacher": _teacher_file(teacher, random_weights),
        "decoder_small": small_decoder,
        "text_encoder": None if text_encoder in (None, "hub", "none") else Path(str(text_encoder)),
    }
    files = {role: path for role, path in given.items() if path is not None}
    if files and random_weights is not None:
        raise click.UsageError(
            "--random-weights cannot be used with files of weights: give one or the other."
        )
    _require_export_extra()
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # which huggingface_hub reads when it is imported
    from ddexport.recipe import load_recipe, weights_beside

    recipe = load_recipe(model, cache_dir, revision)
    if random_weights is None:
        beside = weights_beside(recipe, model)
        if vae:
            beside.pop("decoder_small", None)  # which is of the tokenizer beside it
        files = beside | files
    if "://" in model:
        revision = None  # it was the recipe's repository's
    wanted = None if teacher is None else teacher != "none"
    fields = {"files": files, "weights": weights, "random_seed": random_weights, "teacher": wanted}
    fields["text_encoder"] = {"hub": True, "none": False}.get(str(text_encoder))
    if recipe.condition and random_weights is None and text_encoder != "none":
        _require(("transformers", "tokenizers"), "exporting a text encoder", "text-encoder")
    return recipe, {**fields, "revision": revision, "cache": cache_dir}


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
    _require(needed, "exporting", "export")
    if find_spec("onnxruntime") is None:
        raise DDError("exporting needs onnxruntime", 'pip install "ddexport[cpu]", or [gpu]')


def _require(packages: tuple[str, ...], what: str, extra: str) -> None:
    from importlib.util import find_spec

    from ddexport.runtime.errors import DDError

    if missing := [name for name in packages if find_spec(name) is None]:
        raise DDError(f"{what} needs {', '.join(missing)}", f'pip install "ddexport[{extra}]"')
