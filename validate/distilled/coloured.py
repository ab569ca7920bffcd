"""The figures of coloured digits: what an image shows, read without a network but for the digit.

The ground is the commonest colour of the border. The ink is that of the pixels furthest from it, and how far
a pixel is, between the two, is a grey digit. Brought to the middle, that is read by the classifier of grey
digits, which saw nothing of this training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddexport.distill.data import Part
from ddexport.distill.data.coloured_digits import (
    COMBINATIONS,
    GROUNDS,
    INKS,
    ColouredDigits,
    ColouredDigitsData,
    rgb,
)
from ddexport.validate.distilled.figures import Float64Array, paired_errors
from ddexport.validate.features.digits import DigitClassifier
from ddexport.validate.metrics.frechet import frechet

FURTHEST = 20  # pixels that say what the ink is
DRIFT = 0.2  # of RGB in [0, 1]: what is further from the word's colour has drifted
REAL = 4000  # images that the distances are to
SEED = 4


class Seen(NamedTuple):
    """What N images show: attributes (N, 4) as in `COMBINATIONS`; colours of ink and ground (N, 3) in [0, 1];
    the centre of the digit in columns (N,); the classifier's features (N, 64)."""

    attributes: Tensor
    ink: Tensor
    ground: Tensor
    centre: Tensor
    features: Tensor


class ColouredGauge:
    """Measures images against real composed ones of the training digits, with the same labels."""

    COLUMNS = {
        "right": ("all %", 100.0, 1),
        "digit": ("digit", 100.0, 1),
        "ink": ("ink", 100.0, 1),
        "ground": ("ground", 100.0, 1),
        "place": ("place", 100.0, 1),
        "frechet": ("FD digit", 1.0, 2),
        "frechet_colour": ("FD colour", 1.0, 4),
        "drift": ("drift %", 100.0, 1),
        "paired_ratio": ("ratio", 1.0, 2),
    }

    def __init__(self, classifier: DigitClassifier, data: ColouredDigitsData) -> None:
        self.classifier, self.data = classifier, data
        self._references: dict[tuple[int, ...], tuple[Float64Array, Float64Array]] = {}
        self.scale = classifier.read(data.train.images()).features.std(0)

    def held_out(self, part: Part, count: int) -> tuple[Tensor, Tensor]:
        """Composed of digits that no training read: (count, 3, H, W) in [-1, 1], and labels (count,)."""
        labels = part.of(count)
        return self._composed(self.data.held_out, labels), labels

    def measure(self, images: Tensor, labels: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """The figures of images (N, 3, H, W) in [0, 1] asked for by labels (N,).

        target: the map's images of the same noise, for `paired_error` and `paired_ratio`.
        """
        seen, wanted = self.read(images), COMBINATIONS[labels]
        right = seen.attributes == wanted
        names = ("digit", "ink", "ground", "place")
        figures = {"right": float(right.all(1).double().mean())}
        figures |= {name: float(right[:, i].double().mean()) for i, name in enumerate(names)}
        (digit, colour), (real_digit, real_colour) = self._numbers(seen), self._reference(labels)
        drift = (seen.ink - _colours_of(INKS)[wanted[:, 1]]).norm(dim=1)
        figures |= {
            "frechet": frechet(digit, real_digit),
            "frechet_colour": frechet(colour, real_colour),
            "drift": float((drift > DRIFT).double().mean()),
        }
        return figures | (paired_errors(images, target, labels) if target is not None else {})

    def read(self, images: Tensor) -> Seen:
        """images: (N, 3, H, W) in [0, 1]."""
        border = torch.cat([images[:, :, [0, -1]].flatten(2), images[:, :, :, [0, -1]].flatten(2)], 2)
        ground = border.median(2).values
        distance = (images - ground[:, :, None, None]).norm(dim=1)
        far = distance.flatten(1).topk(FURTHEST)
        ink = images.flatten(2).gather(2, far.indices[:, None].expand(-1, 3, -1)).mean(2)
        grey = (distance / far.values.mean(1)[:, None, None].clamp(min=1e-6)).clamp(max=1)
        columns = torch.arange(images.shape[-1], dtype=grey.dtype)
        mass = grey.where(grey > 0.5, 0).sum(1)
        centre = (mass * columns).sum(1) / mass.sum(1)
        middle = (images.shape[-1] - 1) / 2
        offset = (centre - middle).round().long()
        index = (columns.long() + offset[:, None]).clamp(0, images.shape[-1] - 1)
        upright = grey.gather(2, index[:, None].expand_as(grey))
        reading = self.classifier.read(upright[:, None] * 2 - 1)
        attributes = (
            reading.classes,
            _nearest(ink, INKS),
            _nearest(ground, GROUNDS),
            (centre > middle).long(),
        )
        return Seen(torch.stack(attributes, 1), ink, ground, centre, reading.features)

    def _numbers(self, seen: Seen) -> tuple[Float64Array, Float64Array]:
        """Of the digits (N, 64); of ink, ground and place (N, 7). All are about 1."""
        colours = torch.cat([seen.ink, seen.ground, seen.centre[:, None] / 32], 1).double()
        return (seen.features / self.scale).numpy(), colours.numpy()

    def _reference(self, labels: Tensor) -> tuple[Float64Array, Float64Array]:
        """The numbers of real images with the mix of these labels."""
        key = tuple(torch.bincount(labels, minlength=len(COMBINATIONS)).tolist())
        if key not in self._references:
            images = self._composed(self.data.train, labels.repeat(-(-REAL // len(labels)))[:REAL])
            self._references[key] = self._numbers(self.read((images + 1) / 2))
        return self._references[key]

    def _composed(self, digits: ColouredDigits, labels: Tensor) -> Tensor:
        return digits.composed(labels, torch.Generator().manual_seed(SEED))


def _nearest(colours: Tensor, names: tuple[str, ...]) -> Tensor:
    """The word of each colour (N, 3) in [0, 1]: (N,) int64."""
    return torch.cdist(colours, _colours_of(names)).argmin(1)


def _colours_of(names: tuple[str, ...]) -> Tensor:
    """Those of these words: (n, 3) in [0, 1]."""
    return (rgb(names)[:, :, 0, 0] + 1) / 2
