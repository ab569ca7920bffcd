"""The features of the embedded digit model: a small convolutional classifier of real 32 x 32 digits.

It is trained on the real training digits alone and has seen neither generated images nor the held-out digits.
Its 64 features before the last layer, each in units of its standard deviation over the real training digits,
are what the Frechet distance and precision and recall measure: the size of a classifier's features is an
accident of its training, and without that unit the distances would depend on it. The weights ship as
`recipes/weights/digits-classifier.safetensors`, with the units in its metadata; `ddexport validate
distilled digits-var --train-classifier` trains them again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ddexport.distill.augment import random_affine
from ddexport.distill.data import DataSet
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write
from ddexport.validate.features._base import ByteImages, Extractor, FeatureError, Readings, digest_of_arrays

FILE = "digits-classifier.safetensors"
SIDE, FEATURES, CLASSES = 32, 64, 10
TRAIN_IT = "train it: ddexport validate distilled digits-var --train-classifier"
WIDTHS = (32, 32, 64, 64, 128, 64)
STRIDES = (1, 2, 1, 2, 1, 2)
EPOCHS, BATCH, RATE, SEED = 30, 64, 3e-3, 2024


class Reading(NamedTuple):
    """What the classifier says of N images: classes (N,) int64, features (N, 64) float64."""

    classes: Tensor
    features: Tensor


class DigitClassifier(nn.Module):
    """Six 3x3 convolutions with batch norm, mean over the image, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 1
        for out, stride in zip(WIDTHS, STRIDES, strict=True):
            layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """images: (N, 1, 32, 32) in [-1, 1] -> (N, 64)."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 1, 32, 32) in [-1, 1] -> class logits (N, 10)."""
        return self.head(self.features(images))

    def read(self, images: Tensor, batch: int = 500) -> Reading:
        """images: (N, 1 or 3, 32, 32) in [-1, 1]; the mean over the colours is read."""
        with torch.no_grad():
            features = torch.cat([self.features(x.mean(1, keepdim=True)) for x in images.split(batch)])
            return Reading(self.head(features).argmax(1), features.double())


class DigitFeatures(Extractor):
    """64 features in units of their spread over real digits, and 10 classes."""

    name = "digits"
    width = FEATURES
    classes = CLASSES

    def __init__(self, classifier: DigitClassifier, scale: Tensor) -> None:
        """classifier: in eval mode; scale (64,) float64, the unit of each feature."""
        self.classifier, self.scale, self._device = classifier, scale, "cpu"
        state = {
            key: value.numpy() for key, value in classifier.state_dict().items() if "num_batches" not in key
        }
        self.identity = f"digits:{digest_of_arrays({**state, 'scale': scale.numpy()}.items())}"

    @classmethod
    def load(cls, weights: Path | None) -> DigitFeatures:
        """From a file that `--train-classifier` wrote, or the one that ships."""
        path = weights or classifier_path()
        return cls(load_classifier(path), load_scale(path))

    def to(self, device: str) -> None:
        """As promised."""
        self.classifier.to(device)
        self._device = device

    def _read(self, images: ByteImages) -> Readings:
        if images.shape[1:3] != (SIDE, SIDE):
            raise FeatureError(
                f"the features 'digits' are of images of {SIDE} x {SIDE}, but these are of"
                f" {images.shape[2]} x {images.shape[1]}",
                "Choose other features: --features inception --features-weights FILE.",
            )
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            features = self.classifier.features(pixels.mean(1, keepdim=True))
            probabilities = self.classifier.head(features).softmax(1)
        scaled = features.cpu().double() / self.scale
        return Readings(scaled.float().numpy(), probabilities.cpu().numpy())


EXTRACTOR = DigitFeatures


def classifier_path() -> Path:
    """Where the classifier's weights ship."""
    return Path(str(resources.files("ddexport.recipes") / "weights" / FILE))


def feature_scale(classifier: DigitClassifier, data: DataSet) -> Tensor:
    """The standard deviation of each feature over the real training digits: (64,) float64."""
    return classifier.read(data.train.images()).features.std(0, correction=0)


def load_scale(path: Path) -> Tensor:
    """The units of the features: (64,) float64. Raises DDError if the file does not state them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            scale = torch.tensor(json.loads((file.metadata() or {})["scale"]), dtype=torch.float64)
        if scale.shape != (FEATURES,) or not (scale.isfinite() & (scale > 0)).all():
            raise ValueError("no positive number for each feature")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DDError(f"{path} does not state the units of its features", TRAIN_IT) from error
    return scale


def load_classifier(path: Path) -> DigitClassifier:
    """The trained classifier, in eval mode. Raises DDError when the file is missing or is another."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    classifier = DigitClassifier()
    try:
        classifier.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise DDError(f"{path} does not hold the digit classifier", TRAIN_IT) from error
    classifier.eval()
    return classifier


def save_classifier(classifier: DigitClassifier, path: Path, scale: Tensor) -> None:
    """Write the weights as float16, and `scale` (64,) float64 exactly. `classifier` should hold float16-exact
    values, see `round_to_half`.
    """
    from safetensors.torch import save

    state = {k: v.half().contiguous() for k, v in classifier.state_dict().items() if "num_batches" not in k}
    with atomic_write(path) as stream:
        stream.write(save(state, {"scale": json.dumps(scale.tolist())}))


def train_classifier(
    data: DataSet, epochs: int = EPOCHS, on_epoch: Callable[[int, float], None] | None = None
) -> DigitClassifier:
    """Train on `data.train`; held-out accuracy goes to `on_epoch(epoch, accuracy)` and selects nothing."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    classifier = DigitClassifier().to(memory_format=torch.channels_last)
    images, labels = data.train.images(), data.train.labels
    per_epoch = len(labels) // BATCH
    optimizer = torch.optim.AdamW(classifier.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / (epochs * per_epoch))),
    )
    for epoch in range(epochs):
        classifier.train()
        for index in torch.randperm(len(labels), generator=generator)[: per_epoch * BATCH].split(BATCH):
            batch = random_affine(images[index], generator, degrees=12, shift=2, scale=0.12)[:, :1]
            with torch.autocast("cpu", torch.bfloat16):
                logits = classifier(batch.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), labels[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if on_epoch:
            on_epoch(epoch, held_out_accuracy(classifier.eval(), data))
    return round_to_half(classifier.eval())


def round_to_half(classifier: DigitClassifier) -> DigitClassifier:
    """Round every weight to a float16 value in place, so that the stored file is what was measured."""
    with torch.no_grad():
        for value in classifier.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    return classifier


def held_out_accuracy(classifier: DigitClassifier, data: DataSet) -> float:
    """Share of the held-out real digits that are read right."""
    read = classifier.read(data.held_out.images()).classes
    return float((read == data.held_out.labels).double().mean())
