"""Trains a small decoder to make the images that the tokenizer's own makes, without data: what it learns from
are sequences that the student draws from noise, some that the teacher draws, and some of random codes.

First loop: absolute and squared error of the pixels, absolute error of their differences to the next pixel,
and squared error of the means of squares of 4x4 pixels. Second loop: all squared, and the worst images of a
batch weigh most, for what a small decoder changes are the unusual images, and by these a Frechet distance
grows. What else was tried is in docs/log.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import structs, to_builtins
from torch import Tensor

from ddexport.distill.loop import Run, fit
from ddexport.distill.machine import keep_freed_memory
from ddexport.distill.settings import Loop, SmallDecoderSettings
from ddexport.distill.teacher import at_random, generate
from ddexport.distill.train import StageReport, key_of, new_part, run_stage
from ddexport.distill.trainers import Tokenizer
from ddexport.families._base import Student, Teacher
from ddexport.families._checkpoint import connect, load_part, save_part
from ddexport.families._small_decoder import SmallDecoder
from ddexport.recipe import Recipe
from ddexport.runtime.bundle import decoder_role
from ddexport.runtime.files import make_directory
from ddexport.runtime.sampler import sample
from ddexport.sources import WeightRequest, load_parts, provenance, sources_of

Losses: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

VERSION = 1  # raise it when the code here changes what it computes

BEYOND = 1.02  # targets are cut a little outside [-1, 1]: how far they are past it shows in no image
SQUARE = 4
HEAVIEST = 8.0  # the most that an image of a batch weighs, in means


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
        taught = min(round(count * settings.teacher), count - random) if self.teacher else 0
        if self.teacher and taught:
            choose, guidance = at_random(generator), settings.guidance
            condition = (labels[:taught].to(device),)
            yield self.tokenizer.embed(generate(self.teacher, self.tokenizer, condition, choose, guidance))
        alone = [s for s in self.recipe.schedules.values() if s.teacher is None]
        rest = torch.arange(random + taught, count)
        for schedule, rows in zip(alone, rest.tensor_split(len(alone)), strict=True):
            if len(rows):
                student = partial(self._step, self.student.at_split(schedule.split or size.split))
                label = {"label": labels[rows].numpy()}
                step = sample(student, noise[rows].numpy(), label, schedule)[-1]
                yield torch.from_numpy(step.sequence)

    def _step(self, student: Student, feeds: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        inputs = (torch.from_numpy(feeds[name]).to(self.run.device) for name in ("latents", "label", "known"))
        sequence, tokens, _ = student(*inputs)
        return {"sequence": sequence.cpu().numpy(), "tokens": tokens.cpu().numpy()}


def decoder_loss(pixels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """pixels, images (B, C, H, W) in [-1, 1] -> the loss, and the mean squared error in it."""
    error = pixels - images
    squared = error.square().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    coarse = F.avg_pool2d(error, SQUARE).square().mean()
    return error.abs().mean() + 2 * squared + edges + 2 * coarse, squared


def finishing_loss(pixels: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """As `decoder_loss`, squared; each image weighs as much as its error."""
    error = pixels - images

    def squared(values: Tensor) -> Tensor:
        return values.square().flatten(1).mean(1)

    edges = squared(error.diff(dim=2)) + squared(error.diff(dim=3))
    losses = 6 * squared(error) + 4 * edges + 6 * squared(F.avg_pool2d(error, SQUARE))
    weight = (losses.detach() / losses.detach().mean()).clamp(max=HEAVIEST)
    return (weight * losses).mean(), error.square().mean()


def train_small_decoder(
    decoder: SmallDecoder,
    sequences: Sequences,
    loop: Loop,
    losses: Losses,
    run: Run,
    stage: str,
    key: str,
) -> None:
    """Trains `decoder`, in place, by one of the losses above. The run logs under the name of the stage."""

    def loss(i: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        latents, images = sequences.batch(i, generator)
        value, squared = losses(decoder.pixels(latents), images)
        return value, {"psnr": -10 * torch.log10(squared.detach() / 4)}

    fit(stage, run, loop, decoder, loss, key)


def distil_decoder(
    recipe: Recipe,
    name: str,
    request: WeightRequest,
    settings: SmallDecoderSettings,
    run: Run,
) -> list[StageReport]:
    """Trains the decoder `name` of a recipe for the weights of the request, in the run's folder, going on
    where an earlier run stopped; its weights are in `decoder_NAME.safetensors`.

    Raises:
        MissingWeightsError, CheckpointError: as `ddexport.sources.load_parts`.
        RecipeError: the recipe has no such decoder.
        OutputError: the folder cannot be made.
    """
    role, size = decoder_role(name), recipe.decoders[name]
    decoder = new_part(recipe, role, run.seed)
    others = {role: source for role, source in recipe.files.items() if not role.startswith("decoder")}
    bare = structs.replace(recipe, files=others)
    sources = sources_of(bare, request)
    make_directory(run.folder)
    first, second = run.folder / f"{role}-begun.safetensors", run.folder / f"{role}.safetensors"
    values = {
        "version": VERSION,
        "seed": run.seed,
        "settings": {key: v for key, v in structs.asdict(settings).items() if key != "finish"},
        "size": [structs.asdict(size) | {"distill": None, "fid": None}],
        "schedules": to_builtins(recipe.schedules),
        "weights": to_builtins(provenance(bare, request, sources)),
    }
    begun = key_of(values)
    finished = key_of({"before": begun, "settings": to_builtins(settings.finish)})

    @cache
    def parts() -> dict[str, Any]:
        loaded = {k: part.to(run.device) for k, part in load_parts(bare, request, sources).items()}
        connect(loaded["student"], loaded["tokenizer"])  # its codebook is now on the device
        return loaded

    def train(stage: str, loop: Loop, losses: Losses, key: str, module: SmallDecoder, path: Path) -> None:
        of_chunks = structs.replace(settings, batch=loop.batch)
        sequences = Sequences(recipe, parts(), of_chunks, run, stage)
        module.to(run.device).requires_grad_(True)
        train_small_decoder(module, sequences, loop, losses, run, stage, key)
        save_part(module.cpu(), recipe, role, path)

    def begin() -> None:
        train(role, settings, decoder_loss, begun, decoder, first if settings.finish else second)

    def finish() -> None:
        assert settings.finish is not None
        module: Any = load_part(recipe, role, first)
        train(f"{role}-finish", settings.finish, finishing_loss, finished, module, second)

    keep_freed_memory()
    if settings.finish is None:
        return [run_stage(role, run, begun, second, begin)]
    return [
        run_stage(role, run, begun, first, begin),
        run_stage(f"{role}-finish", run, finished, second, finish),
    ]
