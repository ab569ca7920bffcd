"""`ddexport distill`: train tokenizer, teacher and student of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddexport.runtime import console

if TYPE_CHECKING:
    from ddexport.distill.train import StageReport


@click.command(cls=console.Command)
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [default: runs/MODEL]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random numbers.")
@click.option("--student-seed", type=int, help="Seed of the student alone. [default: the same]")
@click.option("--stages", help="Only these, as a list with commas: tokenizer,decoder,teacher,pairs,student.")
@click.option("--quick", is_flag=True, help="A few iterations of everything: shows that it runs.")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads torch may use."
)
@click.option("--compile/--no-compile", default=True, show_default=True, help="Train through torch.compile.")
@click.option("--install", is_flag=True, help="Afterwards copy the weights to recipes/weights.")
@click.option("--json", "as_json", is_flag=True, help="Print the stages as JSON.")
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
    """Train MODEL, a recipe's name or file, from its data set.

    Stages whose settings, seed and inputs did not change are skipped, and a run that was stopped goes on
    where it was: repeat the same command.
    """
    from ddexport.recipe import load_recipe

    if quick and install:
        raise click.UsageError("--quick trains nothing worth installing")
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
