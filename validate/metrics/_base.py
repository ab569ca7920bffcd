"""What a parity metric is given, and the typed results it gives back.

A metric is a file in this folder. One that takes part in `validate parity` has a function

    compare(comparison: Comparison, limits: Limits) -> list[Measurement]

and is found by the harness through its file name; other files here belong to other commands. A metric
prints nothing and decides nothing beyond its own limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.teacher import Sampling
from ddexport.validate.report import Measurement as Measurement  # noqa: PLC0414

FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Limits:
    """What is allowed in one precision: the manifest's `parity[precision]`; docs/parity.md says what each
    holds.

    token_margin: a difference of one logit. logits_rms: of all. tokens_differing: share of the tokens
    decided. histogram_bias: total variation of the mean probabilities of the tokens. embedding_error: rms
    error / rms. image_psnr: dB, of the decoder's images in [0, 1]; pixel_psnr: of the 8-bit images that users
    get. image_max: largest difference of an 8-bit value. images_left_out: share of the images whose tokens
    differ. provisional: the limits are guesses, since nobody has measured the model. None: shown, but not
    held; `validate parity` wants all.
    """

    token_margin: float
    embedding_error: float
    image_psnr: float
    image_max: int
    logits_rms: float | None = None
    tokens_differing: float | None = None
    histogram_bias: float | None = None
    pixel_psnr: float | None = None
    images_left_out: float | None = None
    drawn_left_out: float | None = None
    provisional: bool = False


@dataclass(frozen=True)
class StudentOutput:
    """What the student gave for N rows: sequence (N, L, Cv) and logits (N, S, V), float32."""

    sequence: FloatArray
    logits: FloatArray

    def __len__(self) -> int:
        return int(self.sequence.shape[0])

    def rows(self, index: Any) -> StudentOutput:
        """The rows `index` selects."""
        return StudentOutput(self.sequence[index], self.logits[index])

    @staticmethod
    def concatenate(parts: Sequence[StudentOutput]) -> StudentOutput:
        """The rows of all parts, in order."""
        return StudentOutput(
            np.concatenate([part.sequence for part in parts]), np.concatenate([part.logits for part in parts])
        )

    @property
    def tokens(self) -> IntArray:
        """argmax of the logits (N, S), int64."""
        return np.asarray(np.argmax(self.logits, axis=-1), dtype=np.int64)


@dataclass(frozen=True)
class StudentPair:
    """The student run twice on the same rows: what is expected and what was got.

    known (N,) int64: leading positions that hold data, for each row. places: the name of each row, for
    `where`. itself: the bundle is compared with itself, in another batch, and not with the reference.
    """

    scope: str
    expected: StudentOutput
    got: StudentOutput
    known: IntArray
    split: int
    places: tuple[str, ...]
    itself: bool = False

    def decided(self) -> BoolArray:
        """(N, S): the positions whose token this step decides, that is before the split and not kept."""
        return np.asarray(np.arange(self.split)[None, :] >= self.known[:, None])

    def differing(self) -> BoolArray:
        """(N, S): the positions among the decided ones where the tokens differ."""
        return np.asarray((self.expected.tokens != self.got.tokens) & self.decided())


@dataclass(frozen=True)
class ImagePair:
    """Images (N, 3, H, W) float32 in [0, 1], expected and got.

    comparable (N,): False for an image whose tokens differ already, so that it shows another picture, not
    an error of the decoder. Such images are counted, and left out. pixels: they were 8-bit images.
    """

    scope: str
    expected: FloatArray
    got: FloatArray
    comparable: BoolArray
    places: tuple[str, ...]
    itself: bool = False
    pixels: bool = False


@dataclass(frozen=True)
class TeacherPair:
    """A teacher run twice on the same tokens: guided logits (N, P, V) of the positions from `start` on.

    uniforms (N, P): the numbers that tokens are chosen by, as `sampling` says. The rest as in `StudentPair`.
    """

    scope: str
    expected: FloatArray
    got: FloatArray
    start: int
    uniforms: npt.NDArray[np.float64]
    sampling: Sampling
    places: tuple[str, ...]
    itself: bool = False


@dataclass(frozen=True)
class DrawnPair:
    """What reference and users' pipeline drew from the same noise: tokens (N, T) of all steps, sequences
    (N, L, Cv) float32, and the images (N, H, W, C) uint8."""

    scope: str
    expected_tokens: IntArray
    got_tokens: IntArray
    expected: FloatArray
    got: FloatArray
    expected_pixels: npt.NDArray[np.uint8]
    got_pixels: npt.NDArray[np.uint8]
    places: tuple[str, ...]
    itself: bool = False
    by_teacher: bool = False

    @property
    def comparable(self) -> BoolArray:
        """(N,): the images of which every token agrees."""
        return np.asarray((self.expected_tokens == self.got_tokens).all(axis=1))

    def images(self) -> ImagePair:
        """The 8-bit images as floats, channels first."""
        sides = (self.expected_pixels, self.got_pixels)
        expected, got = (side.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) for side in sides)
        return ImagePair(self.scope, expected, got, self.comparable, self.places, self.itself, pixels=True)


@dataclass(frozen=True)
class Comparison:
    """Everything that was run: what every metric is given."""

    students: list[StudentPair]
    images: list[ImagePair]
    teachers: list[TeacherPair] = field(default_factory=list)
    drawn: list[DrawnPair] = field(default_factory=list)

    def pictures(self) -> list[ImagePair]:
        """Every pair of images of bundle and reference."""
        return [pair for pair in [*self.images, *(drawn.images() for drawn in self.drawn)] if not pair.itself]

    def scopes(self) -> list[str]:
        """The names of what was compared: against the reference first, in the order in which it was run."""
        pairs: list[StudentPair | ImagePair | TeacherPair | DrawnPair]
        pairs = [*self.students, *self.teachers, *self.images, *self.drawn]
        named = [(pair.itself, pair.scope) for pair in pairs]
        return [scope for _, scope in sorted(dict.fromkeys(named), key=lambda pair_scope: pair_scope[0])]


Compare: TypeAlias = Callable[[Comparison, Limits], list[Measurement]]


def relative_error(expected: FloatArray, got: FloatArray, mask: BoolArray) -> tuple[float, int]:
    """rms(got - expected) / rms(expected) of the worst row, over its positions in `mask`, and that row.

    Arrays (N, P, C), mask (N, P). Row by row, so that many good images cannot hide a bad one. (0.0, 0) when
    nothing is selected; infinite where only `expected` is zero; NaN, which counts as worst, where `got` is
    not a number.
    """
    weight = mask[:, :, None]
    error = np.sum(np.where(weight, got.astype(np.float64) - expected, 0.0) ** 2, axis=(1, 2))
    norm = np.sum(np.where(weight, expected.astype(np.float64), 0.0) ** 2, axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(error == 0.0, 0.0, np.sqrt(error / norm))
    row = int(np.argmax(ratios))
    return float(ratios[row]), row


def largest_difference(
    expected: FloatArray, got: FloatArray, mask: BoolArray
) -> tuple[float, tuple[int, int]]:
    """The largest |got - expected| over the positions of `mask`, and its (row, position). NaN counts as
    largest.

    Arrays (N, P, C), mask (N, P). (0.0, (0, 0)) when nothing is selected.
    """
    if not mask.any():
        return 0.0, (0, 0)
    error = np.abs(got.astype(np.float64) - expected).max(axis=-1)
    error = np.where(mask, error, -1.0)
    row, position = np.unravel_index(int(np.argmax(error)), error.shape)  # argmax takes the first NaN
    return float(error[row, position]), (int(row), int(position))
