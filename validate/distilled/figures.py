"""The figures of a set of digits, explained in docs/distillation.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ddexport.distill.data import DataSet, Part
from ddexport.validate.features.digits import DigitClassifier
from ddexport.validate.metrics.frechet import frechet
from ddexport.validate.metrics.precision_recall import precision_recall

CHUNK = 1000  # images a Frechet distance, and a side of precision and recall

Float64Array: TypeAlias = npt.NDArray[np.float64]


class Gauge:
    """Measures images against the real training digits, in the features of the digit classifier.

    A feature's size is an accident of the classifier's training: its unit is its standard deviation over
    these digits.
    """

    COLUMNS = {  # heading, factor, decimal places
        "accuracy": ("acc %", 100.0, 1),
        "frechet": ("FD", 1.0, 2),
        "precision": ("prec", 1.0, 2),
        "recall": ("rec", 1.0, 2),
        "variance": ("var", 1.0, 1),
        "paired_error": ("paired", 1.0, 4),
        "paired_ratio": ("ratio", 1.0, 2),
    }

    def __init__(self, classifier: DigitClassifier, data: DataSet) -> None:
        features = classifier.read(data.train.images()).features.numpy()
        self.classifier, self.data = classifier, data
        self.scale: Float64Array = features.std(0)
        self.real: Float64Array = features / self.scale

    def held_out(self, part: Part, count: int) -> tuple[Tensor, Tensor]:
        """All digits that no training read: (N, 3, H, W) in [-1, 1], and labels (N,)."""
        return self.data.held_out.images(), self.data.held_out.labels

    def measure(self, images: Tensor, labels: Tensor, target: Tensor | None = None) -> dict[str, float]:
        """The figures of images (N, 3, H, W) in [0, 1] asked for by labels (N,).

        target: the map's images of the same noise, for `paired_error` and `paired_ratio`.
        """
        read = self.classifier.read(images * 2 - 1)
        features = read.features.numpy() / self.scale
        mixed = features[np.random.default_rng(0).permutation(len(features))]  # or chunks hold few classes
        precision, recall = precision_recall(mixed[:CHUNK], self.real[:CHUNK])
        figures = {
            "accuracy": float((read.classes == labels).double().mean()),
            "frechet": chunked_frechet(mixed, self.real),
            "precision": precision,
            "recall": recall,
            "variance": within_class_variance(features, labels.numpy()),
        }
        return figures | (paired_errors(images, target, labels) if target is not None else {})


def chunked_frechet(features: Float64Array, real: Float64Array, chunk: int = CHUNK) -> float:
    """Mean Frechet distance to `real` (M, D) of chunks of `features` (N, D), which are in random order.

    The distance is biased upwards in small sets, so that figures compare only for chunks of one size. Rows
    that do not fill a chunk are left out; a set smaller than one chunk is one.
    """
    chunk = min(chunk, len(features))
    starts = range(0, len(features) - chunk + 1, chunk)
    return float(np.mean([frechet(features[start : start + chunk], real) for start in starts]))


def within_class_variance(features: Float64Array, labels: npt.NDArray[np.int64]) -> float:
    """Mean over the classes of the variance inside the class, summed over D; features (N, D), labels (N,)."""
    classes, counts = np.unique(labels, return_counts=True)
    return float(np.mean([features[labels == c].var(0, ddof=1).sum() for c in classes[counts > 1]]))


def paired_errors(images: Tensor, target: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean squared error of images (N, 3, H, W) in [0, 1] to their targets, and its ratio to the error
    against another target of the class: 0 is the map itself, 1 knows nothing of the noise.
    """
    error = float((images - target).double().square().mean())
    other = float((images - target[shuffled_in_class(labels)]).double().square().mean())
    return {"paired_error": error, "paired_ratio": error / other}


def shuffled_in_class(labels: Tensor) -> Tensor:
    """For each sample the index of another one of its class: (N,) int64."""
    index = labels.new_empty(len(labels))
    for c in labels.unique():
        members = (labels == c).nonzero()[:, 0]
        index[members] = members.roll(1)
    return index


def over_seeds(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every figure over the seeds, and half of its range as `NAME_half_range`."""
    summary = {}
    for name in figures[0]:
        values = [of_seed[name] for of_seed in figures]
        summary[name] = sum(values) / len(values)
        if len(values) > 1:
            summary[f"{name}_half_range"] = (max(values) - min(values)) / 2
    return summary
