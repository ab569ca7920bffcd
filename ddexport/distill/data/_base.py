"""What a data set is, and how one is found by its name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ddexport.distill.augment import random_affine
from ddexport.distill.settings import Augmentation
from ddexport.runtime.errors import DDError


@dataclass(frozen=True)
class ImageSet:
    """Images with their classes: pixels (N, H, W) or (N, H, W, 3) uint8, labels (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The images at `index` as the tokenizer wants them: (n, 3, H, W) float32 in [-1, 1]."""
        pixels = self.pixels[index].float() / 127.5 - 1.0
        if pixels.ndim == 3:
            return pixels[:, None].expand(-1, 3, -1, -1)
        return pixels.permute(0, 3, 1, 2)

    def random_labels(self, count: int, generator: torch.Generator) -> Tensor:
        """Of the set's images: (count,) int64."""
        return self.labels[torch.randint(len(self), (count,), generator=generator)]

    def draw(self, count: int, generator: torch.Generator, augment: Augmentation) -> Tensor:
        """`count` augmented images: (count, 3, H, W) float32 in [-1, 1], contiguous."""
        index = torch.randint(len(self), (count,), generator=generator)
        return self._augmented(self.images(index), generator, augment).contiguous()

    def copy(self, generator: torch.Generator, augment: Augmentation | None) -> tuple[Tensor, Tensor]:
        """All images, augmented if so asked, and their labels (N,)."""
        images = self.images()
        return (self._augmented(images, generator, augment) if augment else images), self.labels

    def _augmented(self, images: Tensor, generator: torch.Generator, augment: Augmentation) -> Tensor:
        return random_affine(images, generator, augment.degrees, augment.shift, augment.scale)


@dataclass(frozen=True)
class Part:
    """What is measured together: so many `images` take a label, and then the next of the labels (M,).

    held_out: whether their captions are in frames that no training reads.
    """

    name: str
    labels: Tensor
    images: int = 1
    held_out: bool = False

    def of(self, count: int) -> Tensor:
        """The labels of so many images: (count,) int64."""
        return self.labels[torch.arange(count) // self.images % len(self.labels)]


@dataclass(frozen=True)
class DataSet:
    """A training part and a held-out part that no training ever reads.

    words: that its captions are made of, if there are any; attributes: what they say of each label (M, A).
    """

    name: str
    train: ImageSet
    held_out: ImageSet
    words: ClassVar[tuple[str, ...]] = ()
    attributes: ClassVar[Tensor]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is measured apart."""
        return (Part("", torch.arange(int(self.train.labels.max()) + 1)),)

    def captions(self, labels: Tensor, generator: torch.Generator, held_out: bool = False) -> list[str]:
        """A sentence about each label (N,), another one each time. held_out: as that of `Part`.

        Raises DDError for data without.
        """
        raise DDError(
            f"the images of {self.name} have no captions", "a model of texts needs data with captions"
        )

    def fingerprint(self) -> str:
        """SHA-256 over all pixels and labels: a stage whose data changed is trained again."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(part.pixels.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()


def stratified_split(labels: np.ndarray[Any, Any], held_out: int) -> tuple[Tensor, Tensor]:
    """Indices (train, held out) with the same share of every class held out, the same on every machine.

    `held_out` images in all; the order within each part is random, so that a leading part of it is a fair
    sample.
    """
    random = np.random.Generator(np.random.Philox(key=20241217))
    classes = np.unique(labels)
    share = held_out // len(classes)
    members = [random.permutation(np.flatnonzero(labels == c)) for c in classes]
    parts = np.concatenate([m[share:] for m in members]), np.concatenate([m[:share] for m in members])
    train, held = (torch.from_numpy(random.permutation(part)) for part in parts)
    return train, held


def load_data(name: str) -> DataSet:
    """The data set called `name`. Raises DDError: no such name, or package not installed."""
    names = sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py"))
    if name not in names:
        raise DDError(f"unknown data set {name!r}", f"known data sets: {', '.join(names)}")
    data: DataSet = import_module(f"ddexport.distill.data.{name}").load()
    return data
