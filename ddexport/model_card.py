"""The README.md of a bundle: what the model is, where its weights come from, what it is for."""

from __future__ import annotations

from ddexport.recipe import Recipe
from runtime.manifest import Manifest


def model_card(recipe: Recipe, manifest: Manifest) -> str:
    """Markdown."""
    steps = " or ".join(sorted(recipe.schedules, key=int))
    lines = [
        f"# {recipe.title}",
        "",
        f"A Distilled Decoding student (arXiv 2412.17153) that draws {recipe.image.size}x{recipe.image.size}"
        f" images of {recipe.classes} classes in {steps} steps, exported by ddexport"
        f" {manifest.tools['ddexport']}.",
        "",
        "```",
        f"python -m runtime.infer . --label 0 --steps {min(recipe.schedules, key=int)} -o out.png",
        "```",
        "",
        "## Weights",
        "",
        *_weights(manifest),
        "",
        *_published(recipe),
        "## Licence and intended use",
        "",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in recipe.licence.items()),
    ]
    return "\n".join(lines) + "\n"


def _weights(manifest: Manifest) -> list[str]:
    weights = manifest.weights
    if weights.kind == "random":
        return [f"**Random weights, seed {weights.seed}: the images mean nothing.** For tests alone."]
    return [
        f"- {file.role}: `{file.file}`, {file.bytes:,} bytes, SHA-256 `{file.sha256}`"
        for file in weights.files
    ]


def _published(recipe: Recipe) -> list[str]:
    if "fid" not in recipe.published:
        return []
    rows = [f"| {steps} | {fid} |" for steps, fid in recipe.published["fid"].items()]
    return [
        f"## Published FID ({recipe.published.get('dataset', 'data set not stated')})",
        "",
        "| steps | FID |",
        "|---|---|",
        *rows,
        "",
        "As published by the authors for their checkpoints; `validate parity` shows that this export agrees.",
        "",
    ]
