"""What a bundle says of itself to people: its README.md, and how accurate its graphs are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddexport.precision.policy import FLOAT32
from ddexport.recipe import Recipe
from ddexport.runtime.bundle import Manifest
from ddexport.runtime.records import read_json
from ddexport.runtime.text import example_prompt

ACCURACY_FILE = "parity/graphs.json"
HEADINGS = ["graph", "reduced", "output", "rms error", "largest", "tokens", "image"]


def read_accuracy(bundle: Path) -> dict[str, Any]:
    """What the export measured of each graph, by the graph's file (`graph.verify.Accuracy` as JSON); empty
    where the bundle does not say."""
    path = bundle / ACCURACY_FILE
    return dict(read_json(path)) if path.is_file() else {}


def accuracy_lines(accuracy: Mapping[str, Any]) -> list[str]:
    """The table of `accuracy_rows`, aligned; nothing where nothing was measured."""
    rows = [HEADINGS, *accuracy_rows(accuracy)] if accuracy else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def accuracy_rows(accuracy: Mapping[str, Any]) -> list[list[str]]:
    """A row for each graph and output, under `HEADINGS`: the share of its products' weights that is not
    float32, and the worst errors against PyTorch over all batch sizes."""
    rows = []
    for file, measured in accuracy.items():
        weights = measured.get("weights", {})  # bundles of an older version do not say
        total = sum(weights.values())
        share = f"{1 - weights.get(FLOAT32, 0) / total:.1%}" if total else ""
        for output in dict.fromkeys(error["output"] for error in measured["errors"]):
            errors = [error for error in measured["errors"] if error["output"] == output]
            rms, largest = (max(error[key] for error in errors) for key in ("rms", "largest"))
            tokens = image = ""
            if "differing" in errors[0]:
                worst = max(errors, key=lambda error: (error["differing"], error["compared"]))
                tokens = f"{worst['differing']} of {worst['compared']} differ"
            if "psnr" in errors[0]:
                bits = max(error["bits8"] for error in errors)
                image = f"{min(error['psnr'] for error in errors):.1f} dB, {bits} of 255"
            rows.append([file, share, output, f"{rms:.1e}", f"{largest:.1e}", tokens, image])
    return rows


def model_card(recipe: Recipe, manifest: Manifest, accuracy: Mapping[str, Any], bundle: str = ".") -> str:
    """Markdown: what the model is, where its weights are from, its use.

    accuracy: `read_accuracy`. bundle: how a command is told where it is.
    """
    *most, last = map(str, [*sorted(manifest.schedules)] or [manifest.sequence.length])
    steps = f"{', '.join(most)} or {last}" if most else last
    student = "A Distilled Decoding student (arXiv 2412.17153)"
    what = student if manifest.schedules else "An auto-regressive model"
    drawn, request = f" of {recipe.classes} classes", "--label 0"
    if manifest.text is not None:
        drawn, request = " of a text", f'--prompt "{example_prompt(manifest.recipe)}"'
        request = request if manifest.text.tokenizer else "--features FILE.npz"
    lines = [
        f"# {recipe.title}",
        "",
        f"{what} that draws {recipe.image.size}x{recipe.image.size}"
        f" images{drawn} in {steps} steps, exported by ddexport"
        f" {manifest.tools['ddexport']}.",
        "",
        "```",
        f"ddexport sample {bundle} {request} --steps {min(manifest.schedules, default='teacher')} -o out.png",
        "```",
        "",
        "## Weights",
        "",
        *_weights(manifest),
        "",
        *_accuracy(manifest, accuracy),
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
    line = "- {0.role}: `{0.file}`{1}, {0.bytes:,} bytes, SHA-256 `{0.sha256}`"
    places = [f" of {file.repository} at {file.commit}" if file.repository else "" for file in weights.files]
    return [line.format(file, place) for file, place in zip(weights.files, places, strict=True)]


def _accuracy(manifest: Manifest, accuracy: Mapping[str, Any]) -> list[str]:
    if not accuracy:
        return []
    engines = {graph.precision: accuracy[graph.file]["engine"] for graph in manifest.graphs}
    kept = {pattern for graph in manifest.graphs for pattern in graph.keep_fp32}
    return [
        "## Accuracy of the graphs",
        "",
        *_table(HEADINGS, accuracy_rows(accuracy)),
        "",
        "Reduced: the share of the weights of matrix products and convolutions that is not float32. Errors"
        " are against PyTorch in float32, on random inputs"
        f" ({'; '.join(f'{precision}: {engine}' for precision, engine in engines.items())}).",
        *([f"Kept in float32: {', '.join(f'`{pattern}`' for pattern in sorted(kept))}."] if kept else []),
        "",
    ]


def _teacher(manifest: Manifest) -> list[str]:
    """Which steps involve the auto-regressive model, where it is in the bundle."""
    teacher = manifest.teacher
    if teacher is None:
        return []
    rows = [
        [number, f"{schedule.teacher.start} to {schedule.teacher.end}", len(schedule.known)]
        for number, schedule in sorted(manifest.schedules.items())
        if schedule.teacher is not None
    ]
    rows.append(["teacher", f"all {manifest.sequence.length}, in {len(teacher.starts) - 1} AR steps", 0])
    return [
        "## Steps that involve the teacher",
        "",
        *_table(["`--steps`", "positions that the teacher generates", "passes of the student"], rows),
        "",
        f"Guidance {teacher.cfg:g} ({teacher.guidance}), top-k {teacher.top_k}, top-p {teacher.top_p:g},"
        f" temperature {teacher.temperature:g}, unless a request says otherwise.",
        "",
    ]


def _published(recipe: Recipe, manifest: Manifest) -> list[str]:
    """The figures of those steps that the bundle can draw in; of random weights none is true."""
    if "fid" not in recipe.published or manifest.weights.kind == "random":
        return []
    figures = recipe.published["fid"].items()
    return [
        f"## Published FID ({recipe.published.get('dataset', 'data set not stated')})",
        "",
        *_table(["steps", "FID"], [[n, fid] for n, fid in figures if int(n) in manifest.schedules]),
        "",
        "As published by the authors for their checkpoints; `ddexport validate fid` measures this bundle's.",
        "",
    ]


def _table(headings: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(map(str, row))} |" for row in cells]
