"""A picture of samples side by side: teacher, the map's target, one and two steps from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ddexport.distill.pairs import mapped_tokens
from ddexport.distill.teacher import at_random, generate
from ddexport.distill.tokenizer import images_of_sequences
from ddexport.runtime.errors import OutputError
from ddexport.runtime.noise import gaussian_noise
from ddexport.validate.image_sets import Models, student_sequences

EACH, ZOOM, GAP, HEAD = 8, 2, 12, 22


def write_grid(models: Models, seed: int, path: Path) -> None:
    """Four panels, a row a class, `EACH` images of it. Raises OutputError when the file cannot be written."""
    classes, sequence = models.recipe.classes, models.recipe.sequence
    labels = torch.arange(classes).repeat_interleave(EACH)
    # image i of the runtime's seed, in the order of the quality table, where labels are i mod classes
    index = [int(label) + classes * (n % EACH) for n, label in enumerate(labels)]
    noise = torch.from_numpy(gaussian_noise(seed, index, sequence.length, sequence.width))
    choose = at_random(torch.Generator().manual_seed(seed))
    tokenizer, pairs = models.tokenizer, models.pairs
    drawn = generate(models.teacher, tokenizer, labels, choose, pairs.guidance, pairs.top_k)
    mapped = mapped_tokens(models.teacher, tokenizer, noise, labels, pairs)
    schedules = models.recipe.schedules
    sequences = {
        "teacher, its own noise": tokenizer.embed(drawn),
        "teacher through the map": tokenizer.embed(mapped),
        "student, one step": student_sequences(models, noise, labels, schedules["1"].known, sequence.split),
        "student, two steps": student_sequences(models, noise, labels, schedules["2"].known, sequence.split),
    }
    panels = {
        name: images_of_sequences(tokenizer, value.detach()).numpy() for name, value in sequences.items()
    }
    picture = compose_panels(panels, classes)
    try:
        picture.save(path, optimize=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}", "give a path ending in .png") from error


def compose_panels(panels: dict[str, np.ndarray[Any, Any]], rows: int) -> Image.Image:
    """Named panels of images (rows * n, 3, H, W) in [0, 1], side by side, each under its name."""
    tiles = {name: tile(images, rows) for name, images in panels.items()}
    width = sum(t.width * ZOOM for t in tiles.values()) + GAP * (len(tiles) + 1)
    height = max(t.height * ZOOM for t in tiles.values()) + HEAD + GAP
    picture = Image.new("RGB", (width, height), "white")
    pen, font, x = ImageDraw.Draw(picture), ImageFont.load_default(14), GAP
    for name, panel in tiles.items():
        pen.text((x, 3), name, "black", font=font)
        big = panel.resize((panel.width * ZOOM, panel.height * ZOOM), Image.Resampling.NEAREST)
        picture.paste(big, (x, HEAD))
        x += big.width + GAP
    return picture


def tile(images: np.ndarray[Any, Any], rows: int) -> Image.Image:
    """Images (rows * n, 3, H, W) in [0, 1] as one picture of `rows` rows, in reading order."""
    count, channels, height, width = images.shape
    columns = count // rows
    grid = images.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return Image.fromarray(
        (grid.reshape(rows * height, columns * width, channels) * 255).round().astype(np.uint8)
    )
