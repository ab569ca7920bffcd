"""The rows of `validate distilled`, and a sheet of the samples that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ddexport.distill.data import DataSet
from ddexport.distill.tokenizer import images_of_sequences, tokens_of_images
from ddexport.runtime import console
from ddexport.validate.distilled.draws import Inputs, Models, draw, methods
from ddexport.validate.distilled.figures import Gauge, over_seeds
from ddexport.validate.distilled.times import time_methods
from ddexport.validate.plots import panels_of_images

EACH = 8  # images of a class in the sheet
SHOWN = {"teacher": "teacher, its own draws", "map": "teacher through the map", "student": "student, "}


def measured_rows(
    models: Models, gauge: Gauge, data: DataSet, seeds: Sequence[int], samples: int
) -> list[dict[str, Any]]:
    """The data, and every method with its figures over the seeds and its times: flat rows."""
    rows = methods(models)
    with console.stage("timing"):
        times = time_methods(models, rows)
    figures: dict[str, list[dict[str, float]]] = {method.name: [] for method in rows}
    with console.progress(len(seeds) * len(rows), "drawing and measuring") as bar:
        for seed in seeds:
            inputs, target = Inputs.of(models.recipe, seed, samples), None
            for method, images in draw(models, rows, inputs):
                target = images if method.kind == "map" else target
                pair = target if method.paired else None
                figures[method.name].append(gauge.measure(images, inputs.labels, pair))
                bar.advance()
    of_methods = [
        {"name": method.name, "kind": method.kind, "passes": method.passes}
        | over_seeds(figures[method.name])
        | times.get(method.name, {})
        for method in rows
    ]
    return data_rows(models, gauge, data) + of_methods


def data_rows(models: Models, gauge: Gauge, data: DataSet) -> list[dict[str, Any]]:
    """The held-out digits, and what the tokenizer makes of them."""
    real, labels = data.held_out.images(), data.held_out.labels
    embedded = models.tokenizer.embed(tokens_of_images(models.tokenizer, real))
    sets = {
        "real held-out": (real + 1) / 2,
        "reconstruction": images_of_sequences(models.tokenizer, embedded),
    }
    return [{"name": name, "kind": "data"} | gauge.measure(images, labels) for name, images in sets.items()]


def sheet_of_samples(models: Models, seed: int) -> Image.Image:
    """Teacher, map and the student's schedules side by side, a row a class."""
    classes = models.recipe.classes
    by_class = torch.arange(EACH * classes).view(EACH, classes).T.flatten()
    shown = [method for method in methods(models) if method.kind in SHOWN]
    panels = {}
    for method, images in draw(models, shown, Inputs.of(models.recipe, seed, EACH * classes)):
        title = SHOWN[method.kind] + (method.name if method.kind == "student" else "")
        panels[title] = images[by_class].numpy()
    return panels_of_images(panels, EACH)
