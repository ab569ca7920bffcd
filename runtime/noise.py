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
GAUSSIAN_DOMAIN, LABEL_DOMAIN, UNIFORM_DOMAIN = range(3)
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)
CHUNK = 8192  # blocks computed at once: their arrays stay in the cache, which halves the time
# fdlibm (Sun Microsystems, 1993): e_log.c, k_sin.c, k_cos.c.
SQRT_HALF = 0.7071067811865476
LN2_HIGH, LN2_LOW = 6.9314718036912381649e-1, 1.90821492927058770002e-10
LOG = (
    6.66666666666673513e-1, 3.999999999940941908e-1, 2.857142874366239149e-1, 2.222219843214978396e-1,
    1.818357216161805012e-1, 1.531383769920937332e-1, 1.479819860511658591e-1,
)  # fmt: skip
SINE = (
    -1.66666666666666324348e-1, 8.33333333332248946124e-3, -1.98412698298579493134e-4,
    2.75573137070700676789e-6, -2.50507602534068634195e-8, 1.58969099521155010221e-10,
)  # fmt: skip
COSINE = (
    4.16666666666666019037e-2, -1.38888888888741095749e-3, 2.48015872894767294178e-5,
    -2.75573143513906633035e-7, 2.0875723212981748279e-9, -1.13596475577881948265e-11,
)  # fmt: skip


def gaussian_noise(seed: int, image_indices: Iterable[int], length: int, width: int) -> NDArray[np.float32]:
    """Standard normal noise for the images of a seed.

    seed and every image index are integers from 0 to 2**64 - 1. Returns float32 (N, length, width).
    Raises NoiseError for a seed or an index outside that range.
    """
    blocks, indices = -(-length * width // 4), list(image_indices)
    size = max(1, CHUNK // blocks)
    parts = [
        _box_muller(_random_words(seed, indices[i : i + size], blocks, GAUSSIAN_DOMAIN))
        for i in range(0, len(indices), size)
    ] or [np.empty((0, blocks, 4), np.float32)]
    values = np.concatenate(parts).reshape(len(indices), blocks * 4)
    return values[:, : length * width].reshape(-1, length, width)


def uniform_numbers(seed: int, image_indices: Iterable[int], length: int) -> NDArray[np.float64]:
    """One number between 0 and 1 for each position of the images of a seed: what a teacher draws tokens by.

    Independent of the Gaussian noise of the same seed. Returns float64 (N, L), no number 0 or 1. Raises
    NoiseError for a seed or an index outside 0 to 2**64 - 1.
    """
    words = _random_words(seed, image_indices, -(-length // 4), UNIFORM_DOMAIN)
    values = (np.moveaxis(words, 0, -1).astype(np.float64) + 0.5) * 2.0**-32
    return values.reshape(words.shape[1], words.shape[2] * 4)[:, :length]


def uniform_labels(seed: int, image_indices: Iterable[int], classes: int) -> NDArray[np.int64]:
    """A label drawn uniformly for each image of a seed: int64 (N,) from 0 to classes - 1.

    Independent of the noise of the same seed. Raises NoiseError as `uniform_numbers`.
    """
    word = _random_words(seed, image_indices, 1, LABEL_DOMAIN)[0, :, 0]
    return np.asarray((word * np.uint64(classes)) >> WORD_BITS, dtype=np.int64)


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
    """uint64 (4, N, blocks) of 32-bit words -> float32 (N, blocks, 4).

    Logarithm, sine and cosine are polynomials here (fdlibm's, without branches): those of NumPy differ
    between machines in the last bit, + - * / and sqrt do not. runtime/web/noise.js has the same.
    """
    radius = np.sqrt(-2.0 * _log_of_share(words[0::2] + np.uint64(1)))
    whole = words[1::2].astype(np.int64)
    quarter = (whole + (1 << 29)) >> 30
    angle = (whole - (quarter << 30)) * (np.pi / 2.0 * 2.0**-30)
    sine, cosine = _sine(angle), _cosine(angle)
    x, y = np.where(quarter & 1, sine, cosine), np.where(quarter & 1, cosine, sine)
    x, y = np.where((quarter + 1) & 2, -x, x), np.where(quarter & 2, -y, y)
    values = np.stack([radius * x, radius * y], axis=-1).astype(np.float32)
    return np.moveaxis(values, 0, -2).reshape(*words.shape[1:], 4)


def _log_of_share(n: NDArray[np.uint64]) -> NDArray[np.float64]:
    """log(n / 2**32) of integers from 1 to 2**32."""
    mantissa, exponent = np.frexp(n * 2.0**-32)
    small = mantissa < SQRT_HALF
    f, k = np.where(small, 2.0 * mantissa, mantissa) - 1.0, exponent - small
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (LOG[1] + w * (LOG[3] + w * LOG[5]))
    odd = z * (LOG[0] + w * (LOG[2] + w * (LOG[4] + w * LOG[6])))
    half = 0.5 * f * f
    return np.asarray(k * LN2_HIGH - (half - (s * (half + (even + odd)) + k * LN2_LOW) - f))


def _sine(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of angles from -pi/4 to pi/4."""
    z = x * x
    r = SINE[1] + z * (SINE[2] + z * (SINE[3] + z * (SINE[4] + z * SINE[5])))
    return x + z * x * (SINE[0] + z * r)


def _cosine(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of angles from -pi/4 to pi/4."""
    z = x * x
    low, high = COSINE[0] + z * (COSINE[1] + z * COSINE[2]), COSINE[3] + z * (COSINE[4] + z * COSINE[5])
    r = z * low + z * z * (z * z) * high
    half = 0.5 * z
    w = 1.0 - half
    return w + (1.0 - w - half + z * r)


def _uint64(value: int, what: str) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise NoiseError(f"the {what} must be an integer, but is {value!r}")
    if not 0 <= value < 2**64:
        raise NoiseError(f"the {what} must be from 0 to 2**64 - 1, but is {value}")
    return int(value)
