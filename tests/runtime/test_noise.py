"""The noise is a published format: other languages rely on every number of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddexport.runtime.errors import NoiseError
from ddexport.runtime.noise import _box_muller, gaussian_noise, philox4x32, uniform_numbers

PAGES = "".join(page.read_text() for page in (Path(__file__).parents[2] / "docs").glob("*.md"))

# Known answers published with Random123 (kat_vectors): counter, key, output.
PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# Golden: seed, image, the bits of its first six numbers. A change here breaks every recorded seed.
NOISE = [
    (0, 0, "3f7dbb33 bf6cb6b0 bf1e1b9f bef6d1b2 be1d5357 3e392a6d"),
    (0, 1, "3f88a6cb bed9c6b5 c0178cdf be6d0d85 3ecf57cf bf0d6118"),
    (42, 0, "bf785e5c 3e46ace8 bf9e28d2 3ff6433b bd95e030 3e0e7a0f"),
    (2**64 - 1, 2**32 + 5, "3e90542f bfbc48f3 3f08534c bf806e9d 3e8173f6 3f03c703"),
]

# Golden: seed, image, the words of its first six uniform numbers.
UNIFORMS = [
    (0, 0, "58fe6cd3 067febbc ab2beaf9 b56f6386 c5723fd1 3e276da2"),
    (0, 1, "d6598bad bb9fa988 417551f0 bd3dc253 040d2697 3eb8cdd7"),
    (42, 0, "9be4a6d3 fb73b237 6fc2a456 955e31d8 8ab9f45d dedf59ec"),
    (2**64 - 1, 2**32 + 5, "098450a1 3ff84c8d 95fe4eaf 07448c6d 17466d5c 172e63a5"),
]

seeds = st.integers(0, 2**64 - 1)


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint64)


def bits(text: str) -> np.ndarray:
    return words(text).astype(np.uint32).view(np.float32)


def page_code() -> dict[str, Any]:
    """The functions that docs/ print."""
    names: dict[str, Any] = {}
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL) if "def image_noise" in code
    )
    exec(code, names)
    return names


def test_philox_gives_the_published_answers() -> None:
    for counter, key, expected in PHILOX:
        low, high = words(key).tolist()
        assert philox4x32(words(counter), low | high << 32).tolist() == words(expected).tolist()
        assert f"| `{counter}` | `{key}` | `{expected}` |" in PAGES


def test_golden_numbers() -> None:
    """Bit by bit, and the page has the same rows."""
    for seed, image, expected in NOISE:
        noise = gaussian_noise(seed, [image], 3, 2).ravel()
        np.testing.assert_array_equal(noise, bits(expected))
        row = re.search(rf"^\| {seed} \| {image} \| `(.*)` \| `{expected}` \|$", PAGES, re.MULTILINE)
        assert row
        np.testing.assert_array_equal(np.array(row.group(1).split(), dtype=np.float32), bits(expected))
    for seed, image, expected in UNIFORMS:
        numbers = (words(expected).astype(np.float64) + 0.5) / 2**32
        np.testing.assert_array_equal(uniform_numbers(seed, [image], 6)[0], numbers)
        row = re.search(rf"^\| {seed} \| {image} \| `{expected}` \| `(.*)` \|$", PAGES, re.MULTILINE)
        assert row
        np.testing.assert_allclose([float(text) for text in row.group(1).split()], numbers, atol=1e-10)


@given(seed=seeds, images=st.lists(seeds, max_size=4), length=st.integers(1, 23), width=st.integers(1, 3))
def test_the_code_of_the_page_gives_the_same(seed: int, images: list[int], length: int, width: int) -> None:
    """An independent scalar implementation, also where the count is no multiple of a block, and whatever the
    batch. A longer image starts with the same uniform numbers."""
    page = page_code()
    noise, numbers = gaussian_noise(seed, images, length, width), uniform_numbers(seed, images, length)
    assert (noise.shape, noise.dtype) == ((len(images), length, width), np.float32)
    assert (numbers.shape, numbers.dtype) == ((len(images), length), np.float64)
    for image, gaussian, uniform in zip(images, noise, numbers, strict=True):
        printed = np.array(page["image_noise"](seed, image, length * width), dtype=np.float32)
        np.testing.assert_array_equal(gaussian.ravel().view(np.uint32), printed.view(np.uint32))
        np.testing.assert_array_equal(uniform, page["image_uniforms"](seed, image, length))
        np.testing.assert_array_equal(uniform, uniform_numbers(seed, [image], length + 5)[0, :length])


def test_uniform_numbers_are_uniform_and_not_those_of_the_noise() -> None:
    """A chi-square over 1,000 cells of a million numbers lies within five standard deviations; no number
    correlates with its neighbour or with the Gaussian number of its place."""
    numbers = uniform_numbers(3, range(1000), 1000)
    assert 0 < numbers.min() < numbers.max() < 1
    counts = np.bincount((numbers * 1000).astype(int).ravel(), minlength=1000)
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 999) < 5 * np.sqrt(2 * 999)
    standard = (numbers.ravel() - 0.5) * np.sqrt(12)
    for lag in (1, 4, 1000):
        assert abs((standard[lag:] * standard[:-lag]).mean()) < 5 / np.sqrt(len(standard))
    noise = gaussian_noise(3, range(1000), 1000, 1).ravel()
    assert abs((standard * noise).mean()) < 5 / np.sqrt(len(standard))


def test_its_functions_are_those_of_box_muller() -> None:
    """Against NumPy's own logarithm, sine and cosine: to a float32's last bit, but where one of them is 0."""
    words = np.random.default_rng(0).integers(0, 2**32, (4, 1, 250_000), dtype=np.uint64)
    radius, angle = np.sqrt(-2 * np.log((words[0::2] + 1) / 2**32)), words[1::2] * (2 * np.pi / 2**32)
    plain = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).transpose(1, 2, 0, 3)
    np.testing.assert_allclose(_box_muller(words), plain.reshape(1, -1, 4), rtol=1.2e-7, atol=1e-14)


def test_the_extreme_words_give_finite_numbers() -> None:
    """A word of 0 has no logarithm: 1 is added, and the largest radius is sqrt(64 ln 2)."""
    values = _box_muller(np.array([0, 0, 2**32 - 1, 0], dtype=np.uint64).reshape(4, 1, 1))
    np.testing.assert_allclose(values[0, 0], [np.sqrt(64 * np.log(2)), 0, 0, 0], rtol=1e-7)


def test_it_is_standard_normal_and_uncorrelated() -> None:
    """Moments, tail share and correlations of a million numbers lie within five standard errors."""
    noise = gaussian_noise(5, range(50), 200, 100).astype(np.float64)
    count = noise.size
    assert abs(noise.mean()) < 5 / np.sqrt(count)
    assert abs(noise.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs((noise**3).mean()) < 5 * np.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / count)
    tail = 0.0026998  # beyond three standard deviations
    assert abs((abs(noise) > 3).mean() - tail) < 5 * np.sqrt(tail / count)
    flat = noise.ravel()
    for lag in (1, 2, 3, 4, 20000):  # within a block, to the next one, to the next image
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / np.sqrt(count - lag)


def test_a_wrong_seed_says_so() -> None:
    rows: list[Any] = [(-1, 0, "seed must be from 0"), (2**64, 0, "seed must be from 0")]
    rows += [(1.5, 0, "seed must be an integer"), (True, 0, "seed must be an integer")]
    rows += [(0, -1, "image index must be from 0"), (0, False, "image index must be an integer")]
    for seed, image, message in rows:
        for draw in (lambda s, i: gaussian_noise(s, i, 2, 2), lambda s, i: uniform_numbers(s, i, 2)):
            with pytest.raises(NoiseError, match=f"the {message}") as caught:
                draw(seed, [image])
            assert repr(image if "image" in message else seed) in caught.value.message
