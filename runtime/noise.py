"""Random numbers from a counter: image i of seed s is the same at every batch size, on every machine.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns the number of an
image and a position in it into random bits. Box-Muller turns these into the normal numbers of the noise; a
teacher draws its tokens by uniform numbers from another domain of the counter. docs/bundle.md has the
pseudo-code and test vectors for other languages.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.errors import NoiseError

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
GAUSSIAN_DOMAIN, UNIFORM_DOMAIN = 0, 2  # 1: the labels of validate fid
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


def gaussian_noise(seed: int, image_indices: Iterable[int], length: int, width: int) -> NDArray[np.float32]:
    """Standard normal noise for the images of a seed.

    seed and every image index are integers from 0 to 2**64 - 1. Returns float32 (N, length, width).
    Raises NoiseError for a seed or an index outside that range.
    """
    words = _random_words(seed, image_indices, -(-length * width // 4), GAUSSIAN_DOMAIN)
    values = _box_muller(words).reshape(words.shape[1], words.shape[2] * 4)
    return values[:, : length * width].reshape(-1, length, width)


def uniform_numbers(seed: int, image_indices: Iterable[int], length: int) -> NDArray[np.float64]:
    """One number between 0 and 1 for each position of the images of a seed: what a teacher draws tokens by.

    Independent of the Gaussian noise of the same seed. Returns float64 (N, L), no number 0 or 1. Raises
    NoiseError for a seed or an index outside 0 to 2**64 - 1.
    """
    words = _random_words(seed, image_indices, -(-length // 4), UNIFORM_DOMAIN)
    values = (np.moveaxis(words, 0, -1).astype(np.float64) + 0.5) * 2.0**-32
    return values.reshape(words.shape[1], words.shape[2] * 4)[:, :length]


def _random_words(seed: int, image_indices: Iterable[int], blocks: int, domain: int) -> NDArray[np.uint64]:
    """uint64 (4, N, blocks) of 32-bit words."""
    images = np.array([_uint64(index, "image index") for index in image_indices], dtype=np.uint64)
    counter = np.empty((4, len(images), blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = domain
    counter[2] = (images & LOW_WORD)[:, None]
    counter[3] = (images >> WORD_BITS)[:, None]
    return philox4x32(counter, _uint64(seed, "seed"))


def philox4x32(counter: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Philox4x32-10: counter uint64 (4, ...) of 32-bit words, 64-bit key -> random words of that shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        product0 = c0 * np.uint64(MULTIPLIERS[0])
        product1 = c2 * np.uint64(MULTIPLIERS[1])
        c0 = (product1 >> WORD_BITS) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> WORD_BITS) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & LOW_WORD, product0 & LOW_WORD
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def _box_muller(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """uint64 (4, N, blocks) of 32-bit words -> float32 (N, blocks, 4)."""
    radius = np.sqrt(
        -2.0 * np.log((words[0::2] + np.uint64(1)) * 2.0**-32)
    )  # of (0, 1], so the log is finite
    angle = words[1::2] * (2.0 * np.pi * 2.0**-32)
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).astype(np.float32)
    return np.moveaxis(values, 0, -2).reshape(*words.shape[1:], 4)


def _uint64(value: int, what: str) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise NoiseError(f"the {what} must be an integer, but is {value!r}")
    if not 0 <= value < 2**64:
        raise NoiseError(f"the {what} must be from 0 to 2**64 - 1, but is {value}")
    return int(value)
