"""The rows of `validate distilled`, and a sheet of the samples that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from PIL import Image

from ddexport.distill.conditions import Captions
from ddexport.distill.data import DataSet, Part
from ddexport.distill.data.coloured_digits import ColouredDigitsData
from ddexport.distill.tokenizer import images_of_sequences, tokens_of_images
from ddexport.runtime import console
from ddexport.validate.distilled.coloured import ColouredGauge
from ddexport.validate.distilled.draws import Inputs, Models, draw, methods
from ddexport.validate.distilled.figures import Gauge, over_seeds
from ddexport.validate.distilled.times import time_methods
from ddexport.validate.features.digits import DigitClassifier
from ddexport.validate.plots import panels_of_images, sheet_of_sentences

EACH = 8  # images of a class in the sheet
SENTENCES, NOISES = 6, 4  # of each part of the data, and images of a sentence
MARK = "* "
SHOWN = {"teacher": "teacher, its own draws", "map": "teacher through the map", "student": "student, {}"}


def gauge_of(data: DataSet, classifier: DigitClassifier) -> Gauge | ColouredGauge:
    """What measures images like those of the data."""
    if isinstance(data, ColouredDigitsData):
        return ColouredGauge(classifier, data)
    return Gauge(classifier, data)


def measured_rows(
    models: Models, gauge: Gauge | ColouredGauge, data: DataSet, seeds: Sequence[int], samples: int
) -> list[dict[str, Any]]:
    """Of every part of the data: its images, and every method with its figures over the seeds and its times,
    as flat rows."""
    rows = methods(models)
    with console.stage("timing"):
        times = time_methods(models, data.parts[0], rows)
    measured: list[dict[str, Any]] = []
    with console.progress(len(data.parts) * len(seeds) * len(rows), "drawing and measuring") as bar:
        for part in data.parts:
            figures: dict[str, list[dict[str, float]]] = {method.name: [] for method in rows}
            for seed in seeds:
                inputs, target = Inputs.of(models, part, seed, samples), None
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
            of_part = data_rows(models, gauge, part, samples) + of_methods
            measured += [{"part": part.name} | row for row in of_part] if part.name else of_part
    return measured


def data_rows(models: Models, gauge: Gauge | ColouredGauge, part: Part, samples: int) -> list[dict[str, Any]]:
    """The held-out digits, and what the tokenizer makes of them."""
    real, labels = gauge.held_out(part, samples)
    embedded = models.tokenizer.embed(tokens_of_images(models.tokenizer, real))
    sets = {
        "real held-out": (real + 1) / 2,
        "reconstruction": images_of_sequences(models.tokenizer, embedded),
    }
    return [{"name": name, "kind": "data"} | gauge.measure(images, labels) for name, images in sets.items()]


def sheet_of_samples(models: Models, data: DataSet, seed: int) -> Image.Image:
    """Teacher, map and the student's schedules side by side, a row a class; of texts see `sheet_of_texts`."""
    if models.recipe.condition:
        return sheet_of_texts(models, data, seed)
    classes = models.recipe.classes
    by_class = torch.arange(EACH * classes).view(EACH, classes).T.flatten()
    shown = [method for method in methods(models) if method.kind in SHOWN]
    panels = {}
    for method, images in draw(models, shown, Inputs.of(models, data.parts[0], seed, EACH * classes)):
        panels[SHOWN[method.kind].format(method.name)] = images[by_class].numpy()
    return panels_of_images(panels, EACH)


def sheet_of_texts(models: Models, data: DataSet, seed: int) -> Image.Image:
    """What the teacher and the student's schedules make of sentences and the same noise."""
    parts = data.parts
    asked = [(part, part.labels[:SENTENCES]) for part in parts if not part.held_out]
    labels, generator = torch.cat([own for _, own in asked]), torch.Generator().manual_seed(seed)
    sentences, condition = data.captions(labels, generator), cast(Captions, models.condition)
    with torch.inference_mode():
        read = condition.inputs({"ids": condition.ids(sentences)})
    inputs = Inputs.of(models, Part("", labels, images=NOISES), seed, NOISES * len(labels))
    inputs = replace(inputs, condition=tuple(rows.repeat_interleave(NOISES, 0) for rows in read))
    shown = [method for method in methods(models) if method.kind in ("map", "student")]
    panels = {
        SHOWN[method.kind].format(method.name): images.split(NOISES)
        for method, images in draw(models, shown, inputs)
    }
    marks = [MARK if part is not parts[0] else "" for part, own in asked for _ in own]
    rows = [
        (mark + sentence, [images[i].numpy() for images in panels.values()])
        for i, (mark, sentence) in enumerate(zip(marks, sentences, strict=True))
    ]
    return sheet_of_sentences(rows, list(panels), f"{MARK}a combination that no training has seen")
