"""What a feature extractor is: images in, features and class probabilities out.

An extractor is a file in this folder, registered by its name, that names its class `EXTRACTOR`. It is asked
for by name, with the weights that a user gave: a file, `random:SEED` for trials, or nothing for those that
ship with the project.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.errors import DDError
from ddexport.runtime.registry import load_plugin

FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteImages: TypeAlias = npt.NDArray[np.uint8]
RANDOM = "random:"


class FeatureError(DDError):
    """An extractor that is unknown, has no weights, or cannot read these images."""


class Readings(NamedTuple):
    """features (N, D) float32, and probabilities (N, K) float32 or None if there is no classifier."""

    features: FloatArray
    probabilities: FloatArray | None


class Extractor(ABC):
    """Maps images to features. Calls are independent: an image's features do not depend on its batch.

    name: the plug-in's. width: D. classes: K of the classifier, None without one. identity: the name with
    the SHA-256 of the weights.
    """

    name: ClassVar[str]
    width: int
    classes: int | None
    identity: str
    batch: int = 50  # images a pass, so that memory does not grow with what is asked at once
    random_weights: bool = False  # set where `random` made them

    @classmethod
    @abstractmethod
    def load(cls, weights: Path | None) -> Extractor:
        """With the weights of the file, or those that ship. Raises FeatureError, which says where a missing
        file comes from.
        """

    @classmethod
    def random(cls, seed: int) -> Extractor:
        """With random weights, for trials of the tools. Raises FeatureError where that makes no sense."""
        raise FeatureError(f"the features {cls.name!r} have no random weights", "Leave the weights out.")

    def to(self, device: str) -> None:
        """Moves the network to a device of PyTorch. Raises FeatureError where it runs on the CPU alone."""
        if device != "cpu":
            raise FeatureError(f"{self.name!r} features are computed on the CPU alone", "Leave --device out.")

    def __call__(self, images: ByteImages) -> Readings:
        """images: (N, H, W, 3) uint8, N >= 1. Raises FeatureError: a size that it cannot read, or a result
        that is not finite.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
            raise ValueError(
                f"images must be uint8 (N, H, W, 3), N >= 1, but are {images.dtype} {images.shape}"
            )
        parts = [self._read(images[i : i + self.batch]) for i in range(0, len(images), self.batch)]
        features = np.concatenate([part.features for part in parts])
        self._check("features", features, (len(images), self.width))
        if self.classes is None:
            return Readings(features, None)
        probabilities = np.concatenate([np.asarray(part.probabilities) for part in parts])
        self._check("probabilities", probabilities, (len(images), self.classes))
        return Readings(features, probabilities)

    @abstractmethod
    def _read(self, images: ByteImages) -> Readings:
        """The same for at most `batch` images, already checked."""

    def _check(self, what: str, values: FloatArray, shape: tuple[int, int]) -> None:
        if values.shape != shape:
            raise FeatureError(
                f"{self.name}: {what} of shape {values.shape}, expected {shape}",
                "The weights are of another network.",
            )
        if not np.isfinite(values).all():
            raise FeatureError(
                f"{self.name}: {what} that are not finite", "The images or the weights are damaged."
            )


def load_extractor(name: str, weights: str | Path | None = None, device: str = "cpu") -> Extractor:
    """The extractor called `name`; `weights`: a file, "random:SEED", or None for those that ship.

    Raises FeatureError: no such extractor, no or bad weights, or it does not run on the device.
    """
    kind: type[Extractor] = load_plugin(
        "ddexport.validate.features", name, kind="feature extractor", error=FeatureError
    ).EXTRACTOR
    if str(weights).startswith(RANDOM):
        seed = str(weights)[len(RANDOM) :]
        if not seed.isdecimal():
            raise FeatureError(f"{weights!s} is not random:SEED", "Give random:0, or the path of a file.")
        extractor = kind.random(int(seed))
        extractor.random_weights = True
    else:
        extractor = kind.load(None if weights is None else Path(weights))
    extractor.to(device)
    return extractor


def digest_of_arrays(arrays: Iterable[tuple[str, npt.NDArray[Any]]]) -> str:
    """SHA-256 over names, shapes and float32 values in the order of the names: one for one set of weights,
    however it is stored.
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda pair: pair[0]):
        digest.update(f"{name}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array, dtype=np.float32).tobytes())
    return digest.hexdigest()
