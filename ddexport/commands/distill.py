"""`ddexport distill`: train tokenizer, teacher and student of a recipe, or a small decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddexport.commands.weights import OPTIONS, recipe_and_weights
from ddexport.runtime import console
from ddexport.runtime.options import option, shared

if TYPE_CHECKING:
    from ddexport.distill.loop import Run
    from ddexport.distill.train import StageReport
    from ddexport.recipe import Recipe


SMALL = "small"

EPILOG = """
\b
Examples:
  ddexport distill digits-var --quick
  ddexport distill decoder --model digits-var
"""


class _ModelByDefault(console.Group):
    """`distill digits-var` is short for `distill model digits-var`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = (*self.commands, *ctx.help_option_names)
        return super().parse_args(ctx, args if not args or args[0] in own else ["model", *args])


@click.group("distill", cls=_ModelByDefault, epilog=EPILOG)
def command() -> None:
    """Train a model. `distill MODEL` is short for `distill model MODEL`."""


MODEL_EPILOG = """
\b
Examples:
  ddexport distill digits-var --quick
  ddexport distill digits-llamagen --stages tokenizer,teacher --threads 2
  ddexport distill digits-var --seed 1 --out runs/digits-var-seed-1 --json
  ddexport distill --model llamagen-t2i-xl --prompts prompts.txt --device cuda
"""


@command.command("model", cls=console.Command, epilog=MODEL_EPILOG)
@shared("model", required=False)
@shared("named", options=OPTIONS)
@option("--out", type=click.Path(path_type=Path), metavar="DIR", show_default="runs/MODEL",
        help="Directory of the run.")  # fmt: skip
@shared("seed", type=int, help="Seed of all random numbers.")
@option(
    "--student-seed", type=int, metavar="N", show_default="--seed", help="Seed of the student's training."
)
@option("--stages", metavar="STAGE,...", show_default="all",
        help="Stages to run, separated by commas: tokenizer, decoder, teacher, pairs, student.")  # fmt: skip
@option("--quick", is_flag=True, help="Train each stage for a few iterations only, to test the setup.")
@shared("threads", default=1, show_default=None)
@option("--compile/--no-compile", default=True, help="Train with torch.compile.")
@option("--install", is_flag=True,
        help="Afterwards copy the weights to recipes/weights, from where MODEL is exported.")  # fmt: skip
@option("--prompts", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="Train the student of a published text model from these prompts: a text file with one prompt on"
        " each line, or an npz of their features.")  # fmt: skip
@shared("vae", "teacher", "text-encoder", "revision", "cache-dir", "offline", "random-weights",
        options=OPTIONS)  # fmt: skip
@option(
    "--device", default="cpu", metavar="NAME", help="Device of PyTorch, with --prompts: cpu, cuda or cuda:N."
)
@shared("json")
@console.debug_option
def model_command(
    out: Path | None,
    seed: int,
    student_seed: int | None,
    stages: str | None,
    quick: bool,
    threads: int,
    compile: bool,
    install: bool,
    prompts: Path | None,
    device: str,
    as_json: bool,
    **weights: Any,
) -> None:
    """Train the tokenizer, teacher and student of MODEL.

    The recipe needs a section `distill`, which names the data set. Of a published text model the student
    alone is trained, from pairs that its teacher makes of --prompts. To continue a run that was interrupted,
    repeat the same command. Stages whose settings, seed and inputs have not changed are not run again.
    """
    if quick and install:
        raise click.UsageError("--install cannot be used with --quick, which does not train to the end.")
    if prompts is not None and (stages or install or student_seed is not None):
        raise click.UsageError("--prompts cannot be used with --stages, --install or --student-seed.")
    recipe, requested = recipe_and_weights(**weights, checkpoint=None, weights=None)
    given = requested["files"] or requested["random_seed"] is not None or device != "cpu"
    if prompts is None and given:
        raise click.UsageError("Weights and --device are for --prompts; else all parts are trained.")
    from ddexport.devices import torch_device
    from ddexport.distill.loop import Run
    from ddexport.distill.train import shipped

    folder = out or Path("runs") / (f"{recipe.name}-quick" if quick else recipe.name)
    run = Run(folder, seed, compile and not quick, str(torch_device(device)))
    with _threads(threads):
        if prompts is None:
            reports = _from_data(recipe, stages, quick, run, student_seed)
        else:
            reports = _from_prompts(recipe, prompts, requested, quick, run)
    if install:
        _install(recipe, folder, shipped(recipe))
    _show(recipe, run, reports, as_json)


def _install(recipe: Recipe, folder: Path, files: Mapping[str, str]) -> None:
    from importlib import resources

    from ddexport.distill.train import install

    for path in install(recipe, folder, files, Path(str(resources.files("ddexport.recipes") / "weights"))):
        click.echo(f"installed {path}", err=True)


def _show(recipe: Recipe, run: Run, reports: list[StageReport], as_json: bool) -> None:
    if as_json:
        console.emit_json({"model": recipe.name, "folder": run.folder, "seed": run.seed, "stages": reports})
        return
    for report in reports:
        size = f"{report.bytes / 1e6:6.2f} MB" if report.bytes else ""
        click.echo(
            f"{report.stage:10}  {report.outcome:10}  {console.duration(report.seconds):>12}"
            f"  {size:>10}  {report.file}"
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many of torch, for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _from_prompts(
    recipe: Recipe, prompts: Path, requested: dict[str, Any], quick: bool, run: Run
) -> list[StageReport]:
    from ddexport.distill.prompts import distil_from_prompts
    from ddexport.distill.settings import prompt_settings, quick_prompts
    from ddexport.sources import WeightRequest

    settings = prompt_settings(recipe)
    settings = quick_prompts(settings) if quick else settings
    return distil_from_prompts(recipe, prompts, WeightRequest(**requested), settings, run)


def _from_data(
    recipe: Recipe, stages: str | None, quick: bool, run: Run, student_seed: int | None
) -> list[StageReport]:
    """Raises click.BadParameter for an unknown stage."""
    from ddexport.distill.settings import distill_settings
    from ddexport.distill.settings import quick as quickened
    from ddexport.distill.train import STAGES, train

    chosen = tuple(name.strip() for name in stages.split(",")) if stages else STAGES
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        text = f"unknown stage {unknown[0]!r}; stages: {', '.join(STAGES)}"
        raise click.BadParameter(text, param_hint="--stages")
    settings = distill_settings(recipe)
    settings = quickened(settings) if quick else settings
    return train(recipe, settings, run, chosen, student_seed)


DECODER_EPILOG = """
\b
Examples:
  ddexport distill decoder --model digits-var
  ddexport distill decoder --model var-d16 --checkpoint my-var-d16.pth --device cuda
  ddexport onnx var-d16 --checkpoint my-var-d16.pth \\
      --small-decoder runs/var-d16-decoder/decoder_small.safetensors
"""


@command.command("decoder", cls=console.Command, epilog=DECODER_EPILOG)
@shared("model", required=False)
@shared("named", "checkpoint", "vae", "teacher", "revision", "cache-dir", "offline", "weights",
        "random-weights", options=OPTIONS)  # fmt: skip
@option("--out", type=click.Path(path_type=Path), metavar="DIR", show_default="runs/MODEL-decoder",
        help="Directory of the run.")  # fmt: skip
@shared("seed", type=int, help="Seed of all random numbers.")
@option("--quick", is_flag=True, help="Train for a few iterations only, to test the setup.")
@option("--device", default="cpu", metavar="NAME", help="Device of PyTorch: cpu, cuda or cuda:N.")
@shared("threads", default=1, show_default=None)
@option("--install", is_flag=True, help="Afterwards copy the weights to recipes/weights.")
@shared("json")
@console.debug_option
def decoder_command(
    out: Path | None,
    seed: int,
    quick: bool,
    device: str,
    threads: int,
    install: bool,
    as_json: bool,
    **weights: Any,
) -> None:
    """Train the small decoder of MODEL.

    It learns to make the images that the full decoder makes, from sequences that the student draws, some that
    the teacher draws, if there is one, and some of random codes. No data is needed. The recipe says how large
    it is and how it is trained: decoders.small. To continue a run that was interrupted, repeat the same
    command.
    """
    if quick and install:
        raise click.UsageError("--install cannot be used with --quick, which does not train to the end.")
    recipe, requested = recipe_and_weights(**weights)
    if install and (requested["files"] or requested["random_seed"] is not None):
        raise click.UsageError("--install is for decoders of the weights that ship.")
    from ddexport.devices import torch_device
    from ddexport.distill.loop import Run
    from ddexport.distill.settings import decoder_settings, quick_decoder
    from ddexport.distill.small_decoder import distil_decoder
    from ddexport.runtime.bundle import decoder_role
    from ddexport.sources import WeightRequest

    settings = decoder_settings(recipe, SMALL)
    folder = out or Path("runs") / f"{recipe.name}-decoder{'-quick' if quick else ''}"
    run = Run(folder, seed, device=str(torch_device(device)))
    settings = quick_decoder(settings) if quick else settings
    with _threads(threads):
        reports = distil_decoder(recipe, SMALL, WeightRequest(**requested), settings, run)
    if install:
        _install(recipe, folder, {decoder_role(SMALL): reports[-1].file})
    _show(recipe, run, reports, as_json)
