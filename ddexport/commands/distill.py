"""`ddexport distill`: train tokenizer, teacher and student of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddexport.runtime import console
from ddexport.runtime.options import option, shared

if TYPE_CHECKING:
    from ddexport.distill.train import StageReport


EPILOG = """
\b
Examples:
  ddexport distill digits-var --quick
  ddexport distill digits-llamagen --stages tokenizer,teacher --threads 2
  ddexport distill digits-var --seed 1 --out runs/digits-var-seed-1 --json
"""


@click.command("distill", cls=console.Command, epilog=EPILOG)
@shared("model")
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
@shared("json")
@console.debug_option
def command(
    model: str,
    out: Path | None,
    seed: int,
    student_seed: int | None,
    stages: str | None,
    quick: bool,
    threads: int,
    compile: bool,
    install: bool,
    as_json: bool,
) -> None:
    """Train the tokenizer, teacher and student of MODEL.

    The recipe needs a section `distill`, which names the data set. To continue a run that was interrupted,
    repeat the same command. Stages whose settings, seed and inputs have not changed are not run again.
    """
    from ddexport.recipe import load_recipe

    if quick and install:
        raise click.UsageError("--install cannot be used with --quick, which does not train to the end.")
    recipe = load_recipe(model)
    folder = out or Path("runs") / (f"{recipe.name}-quick" if quick else recipe.name)
    reports = run(model, folder, seed, stages, quick, threads, compile, student_seed)
    if install:
        from importlib import resources

        from ddexport.distill.train import install as install_weights

        for path in install_weights(
            recipe, folder, Path(str(resources.files("ddexport.recipes") / "weights"))
        ):
            click.echo(f"installed {path}", err=True)
    if as_json:
        console.emit_json({"model": recipe.name, "folder": folder, "seed": seed, "stages": reports})
        return
    for report in reports:
        size = f"{report.bytes / 1e6:6.2f} MB" if report.bytes else ""
        click.echo(
            f"{report.stage:10}  {report.outcome:10}  {console.duration(report.seconds):>12}"
            f"  {size:>10}  {report.file}"
        )


def run(
    model: str,
    folder: Path,
    seed: int,
    stages: str | None,
    quick: bool,
    threads: int,
    compile: bool,
    student_seed: int | None = None,
) -> list[StageReport]:
    """Train the recipe `model` in `folder`. Raises DDError, click.BadParameter for an unknown stage."""
    import torch

    from ddexport.distill.settings import distill_settings
    from ddexport.distill.settings import quick as quickened
    from ddexport.distill.train import STAGES, train
    from ddexport.recipe import load_recipe

    chosen = tuple(name.strip() for name in stages.split(",")) if stages else STAGES
    unknown = [name for name in chosen if name not in STAGES]
    if unknown:
        text = f"unknown stage {unknown[0]!r}; stages: {', '.join(STAGES)}"
        raise click.BadParameter(text, param_hint="--stages")
    recipe = load_recipe(model)
    settings = distill_settings(recipe)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        settings = quickened(settings) if quick else settings
        return train(recipe, settings, folder, seed, chosen, compile and not quick, student_seed)
    finally:
        torch.set_num_threads(before)
