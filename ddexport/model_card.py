"""The README.md of a bundle: what the model is, where its weights come from, what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddexport.precision.policy import FLOAT32
from ddexport.precision.table import summary
from ddexport.recipe import Recipe
from ddexport.runtime.bundle import Manifest


def model_card(recipe: Recipe, manifest: Manifest, accuracy: Mapping[str, Any]) -> str:
    """Markdown. accuracy: what was measured of the graphs, by file."""
    *most, last = map(str, sorted(manifest.schedules))
    steps = f"{', '.join(most)} or {last}" if most else last
    lines = [
        f"# {recipe.title}",
        "",
        f"A Distilled Decoding student (arXiv 2412.17153) that draws {recipe.image.size}x{recipe.image.size}"
        f" images of {recipe.classes} classes in {steps} steps, exported by ddexport"
        f" {manifest.tools['ddexport']}.",
        "",
        "```",
        f"ddexport sample . --label 0 --steps {min(manifest.schedules)} -o out.png",
        "```",
        "",
        "## Weights",
        "",
        *_weights(manifest),
        "",
        *_reduced(manifest, accuracy),
        *_teacher(manifest),
        *_published(recipe, manifest),
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


def _reduced(manifest: Manifest, accuracy: Mapping[str, Any]) -> list[str]:
    """What the half and int8 graphs are, where there are any."""
    graphs = [graph for graph in manifest.graphs if graph.precision != FLOAT32]
    if not graphs:
        return []
    lines = [
        "## Reduced precision",
        "",
        "| graph | reduced | rms error | kept in fp32 |",
        "|---|---|---|---|",
    ]
    for graph in graphs:
        measured = accuracy[graph.file]
        errors = {error["output"]: error["rms"] for error in measured["errors"]}  # the largest batch is last
        rms = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
        kept = ", ".join(f"`{pattern}`" for pattern in graph.keep_fp32)
        lines.append(f"| {graph.file} | {summary(graph, measured)} | {rms} | {kept} |")
    oracles = dict.fromkeys(f"{graph.precision}: {accuracy[graph.file]['oracle']}" for graph in graphs)
    return [*lines, "", f"Errors are relative to float32, on random inputs ({'; '.join(oracles)}).", ""]


def _teacher(manifest: Manifest) -> list[str]:
    """Which steps involve the auto-regressive model, where it is in the bundle."""
    teacher = manifest.teacher
    if teacher is None:
        return []
    rows = [
        f"| {number} | {schedule.teacher.start} to {schedule.teacher.end} | {len(schedule.known)} |"
        for number, schedule in sorted(manifest.schedules.items())
        if schedule.teacher is not None
    ]
    rows.append(f"| teacher | all {manifest.sequence.length}, in {len(teacher.starts) - 1} AR steps | 0 |")
    return [
        "## Steps that involve the teacher",
        "",
        "| `--steps` | positions that the teacher generates | passes of the student |",
        "|---|---|---|",
        *rows,
        "",
        f"Guidance {teacher.cfg:g} ({teacher.guidance}), top-k {teacher.top_k}, top-p {teacher.top_p:g},"
        f" temperature {teacher.temperature:g}, unless a request says otherwise.",
        "",
    ]


def _published(recipe: Recipe, manifest: Manifest) -> list[str]:
    """The figures of those steps that the bundle can draw in."""
    if "fid" not in recipe.published:
        return []
    rows = [
        f"| {steps} | {fid} |"
        for steps, fid in recipe.published["fid"].items()
        if int(steps) in manifest.schedules
    ]
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
