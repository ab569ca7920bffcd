"""`ddexport models`: what can be exported, and where its files come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console
from ddexport.runtime.options import shared

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

EPILOG = """
\b
Examples:
  ddexport models
  ddexport models --json
"""


@click.command("models", cls=console.Command, epilog=EPILOG)
@shared("json")
@console.debug_option
def command(as_json: bool) -> None:
    """List the models that can be exported.

    The list shows family, number of parameters, image size, numbers of steps, the FID that the authors
    published for each number of steps, and where the weights come from.
    """
    from ddexport.recipe import load_recipe, recipe_names

    rows = [_row(load_recipe(name)) for name in recipe_names()]
    if as_json:
        console.emit_json(rows)
        return
    click.echo(f"{'model':14} {'family':12} {'parameters':>10}  {'image':>7}  {'steps':6} published FID")
    for row in rows:
        fid = ", ".join(f"{value} ({steps})" for steps, value in row["published_fid"].items()) or "-"
        size = f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else "-"
        click.echo(
            f"{row['name']:14} {row['family']:12} {size:>10}"
            f"  {row['image']:>7}  {', '.join(map(str, row['steps'])):6} {fid}"
        )
        for source in row["files"]:
            click.echo(f"    {source}")


def _row(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "title": recipe.title,
        "family": recipe.family,
        "parameters": recipe.parameters.get("student" if recipe.schedules else "teacher"),
        "tokenizer_parameters": recipe.parameters.get("tokenizer"),
        "image": f"{recipe.image.size}x{recipe.image.size}",
        "steps": sorted(map(int, recipe.schedules)) or ["teacher"],
        "published_fid": recipe.published.get("fid", {}),
        "files": [
            f"{role}: ships with ddexport"
            if source.embedded
            else f"{role}: {source.repo} {source.path} ({source.option} {source.file})"
            for role, source in recipe.files.items()
        ],
    }
