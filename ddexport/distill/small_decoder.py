"""Trains a small decoder to make the images that the tokenizer's own makes, without data: what it learns from
are sequences that the student draws from noise, some that the teacher draws, and some of random codes.

Losses: absolute and squared error of the pixels, absolute error of their differences to the next pixel, and
squared error of the means of squares of 4x4 pixels. What else was tried is in docs/log.md.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import structs, to_builtins
from torch import Tensor

from ddexport.distill.loop import Run, fit
from ddexport.distill.machine import keep_freed_memory
from ddexport.distill.settings import SmallDecoderSettings
from ddexport.distill.teacher import at_random, generate
from ddexport.distill.train import StageReport, new_part, run_stage
from ddexport.distill.trainers import Tokenizer
from ddexport.families._base import Student, Teacher
from ddexport.families._checkpoint import connect, save_part
from ddexport.families._small_decoder import SmallDecoder
from ddexport.recipe import Recipe
from ddexport.runtime.bundle import decoder_role
from ddexport.runtime.files import make_directory
from ddexport.runtime.sampler import sample
from ddexport.sources import WeightRequest, load_parts, provenance, sources_of

VERSION = 1  # raise it when the code here changes what it computes

BEYOND = 1.02  # targets are cut a little outside [-1, 1]: how far they are past it shows in no image
SQUARE = 4


class Sequences:
    """Chunks of latents with the full decoder's images, the newest of which are trained on.

    Chunk n depends on n and the seed alone, so that a run that goes on has the same ones. An equal share of
    a chunk is drawn in each schedule of the student alone.
    """

    def __init__(
        self, recipe: Recipe, parts: Mapping[str, Any], settings: SmallDecoderSettings, run: Run, stage: str
    ) -> None:
        """parts: student and tokenizer, connected, and perhaps the teacher, on `run.device`."""
        self.recipe, self.settings, self.run, self.stage = recipe, settings, run, stage
        self.student: Student = parts["student"]
        self.tokenizer: Tokenizer = parts["tokenizer"]
        self.teacher: Teacher | None = parts.get("teacher")
        self._chunks: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.chunks)
        self._next = 0

    def batch(self, iteration: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The latents (B, Cv, h, w) and images (B, C, H, W) in [-1, 1] of an iteration, on the device."""
        settings = self.settings
        newest = settings.chunks - 1 + iteration // settings.refresh
        for number in range(max(self._next, newest + 1 - settings.chunks), newest + 1):
            self._chunks.append(self._chunk(number))
            self._next = number + 1
        chosen = torch.randint(settings.chunks * settings.chunk, (settings.batch,), generator=generator)
        places = [divmod(int(i), settings.chunk) for i in chosen]
        latents, images = (
            torch.stack([self._chunks[chunk][part][row] for chunk, row in places]).to(self.run.device)
            for part in (0, 1)
        )
        return latents, images

    @torch.no_grad()
    def _chunk(self, number: int) -> tuple[Tensor, Tensor]:
        settings, device = self.settings, self.run.device
        generator = self.run.generator(f"{self.stage}-sequences", number)
        latents, images = [], []
        for start in range(0, settings.chunk, settings.batch):
            for part in self._drawn(min(settings.batch, settings.chunk - start), generator):
                latent = self.tokenizer.latent(part.to(device))
                image = self.tokenizer.decoder(self.tokenizer.post_quant_conv(latent))
                latents.append(latent.cpu())
                images.append(image.clamp(-BEYOND, BEYOND).cpu())
        return torch.cat(latents), torch.cat(images)

    def _drawn(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """`count` sequences (n, L, Cv) in parts, of every kind."""
        size, settings, device = self.recipe.sequence, self.settings, self.run.device
        labels = torch.randint(self.recipe.classes, (count,), generator=generator)
        noise = torch.randn(count, size.length, size.width, generator=generator)
        random = round(count * settings.random)
        codes = torch.randint(size.codebook, (random, size.length), generator=generator)
        yield self.tokenizer.embed(codes.to(device))
        taught = round(count * settings.teacher) if self.teacher else 0
        if self.teacher and taught:
            choose, guidance = at_random(generator), self.settings.guidance
            yield self.tokenizer.embed(
                generate(self.teacher, self.tokenizer, labels[:taught].to(device), choose, guidance)
            )
        alone = [s for s in self.recipe.schedules.values() if s.teacher is None]
        rest = torch.arange(random + taught, count)
        for schedule, rows in zip(alone, rest.tensor_split(len(alone)), strict=True):
            if len(rows):
                step = sample(self._student, noise[rows].numpy(), labels[rows].numpy(), schedule)[-1]
                yield torch.from_numpy(step.sequence)

    def _student(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        inputs = (torch.from_numpy(feeds[name]).to(self.run.device) for name in ("latents", "label", "known"))
        sequence, tokens, _ = self.student(*inputs)
        return {"sequence": sequence.cpu().numpy(), "tokens": tokens.cpu().numpy()}


def decoder_loss(pixels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """pixels, images (B, C, H, W) in [-1, 1] -> the loss, and the mean squared error in it."""
    error = pixels - images
    squared = error.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    coarse = F.avg_pool2d(error, SQUARE).square().mean()
    return error.abs().mean() + 2 * squared + edges + 2 * coarse, squared


def train_small_decoder(
    decoder: SmallDecoder,
    recipe: Recipe,
    parts: Mapping[str, Any],
    settings: SmallDecoderSettings,
    run: Run,
    stage: str,
    key: str,
) -> None:
    """Trains `decoder`, in place. parts: as of `Sequences`. stage: its role, under which the run logs."""
    sequences = Sequences(recipe, parts, settings, run, stage)

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        latents, images = sequences.batch(i, generator)
        value, squared = decoder_loss(decoder.pixels(latents), images)
        return value, {"psnr": -10 * torch.log10(squared.detach() / 4)}

    fit(stage, run, settings, decoder, loss, key)


def distil_decoder(
    recipe: Recipe,
    name: str,
    request: WeightRequest,
    settings: SmallDecoderSettings,
    run: Run,
) -> StageReport:
    """Trains the decoder `name` of a recipe for the weights of the request, in the run's folder, going on
    where an earlier run stopped; its weights are in `decoder_NAME.safetensors`.

    Raises:
        MissingWeightsError, CheckpointError: as `ddexport.sources.load_parts`.
        RecipeError: the recipe has no such decoder.
        OutputError: the folder cannot be made.
    """
    role = decoder_role(name)
    decoder = new_part(recipe, role, run.seed)
    before = {role: source for role, source in recipe.files.items() if not role.startswith("decoder")}
    recipe = structs.replace(recipe, files=before)
    sources = sources_of(recipe, request)
    make_directory(run.folder)
    values = {
        "version": VERSION,
        "seed": run.seed,
        "settings": structs.asdict(settings),
        "size": [structs.asdict(recipe.decoders[name]) | {"distill": None, "fid": None}],
        "schedules": to_builtins(recipe.schedules),
        "weights": to_builtins(provenance(recipe, request, sources)),
    }
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path = run.folder / f"{role}.safetensors"

    def work() -> None:
        parts = {k: part.to(run.device) for k, part in load_parts(recipe, request, sources).items()}
        connect(parts["student"], parts["tokenizer"])  # its codebook is now on the device
        train_small_decoder(decoder.to(run.device), recipe, parts, settings, run, role, key)
        save_part(decoder.cpu(), recipe, role, path)

    keep_freed_memory()
    return run_stage(role, run, key, path, work)
