"""The README.md of a bundle: what the model is, where its weights come from, what it is for."""

from __future__ import annotations

from ddexport.precision.policy import FLOAT32
from ddexport.precision.table import summary
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
        *_half(manifest),
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


def _half(manifest: Manifest) -> list[str]:
    """What the half graphs are, where there are any."""
    graphs = [graph for graph in manifest.graphs if graph.precision != FLOAT32]
    if not graphs:
        return []
    lines = [
        "## Half precision",
        "",
        "| graph | computes in half | rms error | kept in fp32 |",
        "|---|---|---|---|",
    ]
    for graph in graphs:
        accuracy = graph.accuracy
        errors = {error["output"]: error["rms"] for error in accuracy["errors"]}  # the largest batch is last
        rms = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
        kept = ", ".join(f"`{pattern}`" for pattern in accuracy["keep_fp32"])
        lines.append(f"| {graph.file} | {summary(graph)} | {rms} | {kept} |")
    oracle = graphs[0].accuracy["oracle"]
    return [*lines, "", f"Errors are relative to float32, on random inputs ({oracle}).", ""]


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
