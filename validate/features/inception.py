"""The features that published FIDs are measured in: Inception's pool3, prepared as pytorch-fid does.

The weights are not ours to ship: a user gives the file that pytorch-fid and torch-fidelity use, or an ONNX
file of the same network. `inception_tf` is the same with the preparation of the original TensorFlow graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddexport.validate.features._base import ByteImages, Extractor, FeatureError, FloatArray, Readings
from ddexport.validate.features._inception_network import CLASSES, WIDTH, prepare_half_pixel
from ddexport.validate.features._inception_weights import Loaded, load_weights, random_weights

Network: TypeAlias = Callable[[Tensor], tuple[FloatArray, FloatArray | None]]


class InceptionFeatures(Extractor):
    """2048 features of images of any size; 1008 classes, where the weights have the classifier."""

    name = "inception"
    width = WIDTH
    batch = 16
    prepare = staticmethod(prepare_half_pixel)

    def __init__(self, loaded: Loaded) -> None:
        """With a network that is ready to run."""
        self.run, self._network, self._device = loaded.run, loaded.network, "cpu"
        self.classes = CLASSES if loaded.classifier else None
        self.identity = f"{self.name}:{loaded.digest}"

    @classmethod
    def load(cls, weights: Path | None) -> InceptionFeatures:
        """From a state dict of torch, or an ONNX file."""
        return cls(load_weights(weights))

    @classmethod
    def random(cls, seed: int) -> InceptionFeatures:
        """Random weights: distances between images are real, and compare with nothing published."""
        return cls(random_weights(seed))

    def to(self, device: str) -> None:
        """As promised; an ONNX file runs on the CPU alone."""
        if self._network is None:
            return super().to(device)
        self._network.to(device)
        self._device = device

    def _read(self, images: ByteImages) -> Readings:
        if min(images.shape[1:3]) < 2:
            raise FeatureError(f"images of {images.shape[2]} x {images.shape[1]} pixels", "Give larger ones.")
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._device).permute(0, 3, 1, 2).float()
        features, logits = self.run(self.prepare(pixels))
        return Readings(features, None if logits is None else _softmax(logits))


def _softmax(logits: FloatArray) -> FloatArray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True), dtype=np.float32)


EXTRACTOR = InceptionFeatures
