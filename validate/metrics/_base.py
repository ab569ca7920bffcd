"""What a parity metric is given, and the arithmetic that metrics share.

A metric is a file in this folder. One that takes part in `validate parity` has a function

    compare(comparison: Comparison, limits: Limits) -> list[Measurement]

and is found by its file name; other files here belong to other commands. A metric decides nothing beyond its
own limits. Shapes: N rows, L positions, Cv width of a code, P positions of a step, V codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.teacher import Sampling

FloatArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class StepOutput:
    """What a step gave for N rows: logits (N, P, V) and, of a student, sequence (N, L, Cv), float32."""

    logits: FloatArray
    sequence: FloatArray | None = None

    @property
    def tokens(self) -> IntArray:
        """argmax of the logits (N, P), int64."""
        return np.asarray(np.argmax(self.logits, axis=-1), dtype=np.int64)

    def rows(self, index: Any) -> StepOutput:
        """The rows that `index` selects."""
        return StepOutput(self.logits[index], None if self.sequence is None else self.sequence[index])


@dataclass(frozen=True)
class StepPair:
    """A step of a student, or all AR steps of a teacher, run twice on the same input: expected and got.

    known (N,) int64: of each row the leading positions that hold data. places: the name of each row. itself:
    the bundle is compared with itself, and not with the reference. Of a teacher: start, the position of its
    first logits, and uniforms (N, P), the numbers by which `sampling` draws its tokens.
    """

    scope: str
    expected: StepOutput
    got: StepOutput
    known: IntArray
    places: Sequence[str]
    itself: bool = False
    start: int = 0
    sampling: Sampling | None = None
    uniforms: npt.NDArray[np.float64] | None = None

    @property
    def split(self) -> int:
        """The position behind those that have logits: of a student, where its embeddings start."""
        return self.start + int(self.expected.logits.shape[1])

    def decided(self) -> BoolArray:
        """(N, P): the positions whose token this step decides, that is before the split and not kept."""
        return np.asarray(np.arange(self.start, self.split)[None, :] >= self.known[:, None])

    def differing(self) -> BoolArray:
        """(N, P): the positions among the decided ones where the tokens differ."""
        return np.asarray((self.expected.tokens != self.got.tokens) & self.decided())

    def place(self, row: int, position: int) -> str:
        """The name of a position, which is counted from `start`."""
        return f"{self.places[row]}, position {self.start + position}"


@dataclass(frozen=True)
class ImagePair:
    """Images (N, C, H, W) float32 in [0, 1], expected and got.

    comparable (N,): False for an image whose tokens differ already, so that it shows another picture, not
    an error of the decoder. Such images are counted, and left out. pixels: they were 8-bit images.
    further: by a decoder beside the full one.
    """

    scope: str
    expected: FloatArray
    got: FloatArray
    comparable: BoolArray
    places: Sequence[str]
    itself: bool = False
    pixels: bool = False
    further: bool = False


@dataclass(frozen=True)
class Drawn:
    """What a whole schedule gave: tokens (N, T) of all steps, the sequence (N, L, Cv) float32 that was
    decoded, pixels (N, H, W, C) uint8. A graph of all of it gives the last tokens and no sequence."""

    tokens: IntArray
    sequence: FloatArray | None
    pixels: npt.NDArray[np.uint8]

    @property
    def image(self) -> FloatArray:
        """The pixels in [0, 1], channels first."""
        return np.asarray(self.pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


@dataclass(frozen=True)
class DrawnPair:
    """What reference and users' pipeline drew from the same noise. by_teacher: with AR steps in it."""

    scope: str
    expected: Drawn
    got: Drawn
    places: Sequence[str]
    by_teacher: bool = False

    @property
    def comparable(self) -> BoolArray:
        """(N,): the images of which every token agrees."""
        return np.asarray((self.expected.tokens == self.got.tokens).all(axis=1))

    def images(self) -> ImagePair:
        """The 8-bit images."""
        sides = (self.expected.image, self.got.image)
        return ImagePair(self.scope, *sides, self.comparable, self.places, pixels=True)


@dataclass(frozen=True)
class TextPair:
    """Features (N, T, W) float32 that both sides' text encoders make of the same prompts, left-padded."""

    scope: str
    expected: FloatArray
    got: FloatArray
    places: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """Everything that was run: what every metric is given."""

    steps: list[StepPair] = field(default_factory=list)
    images: list[ImagePair] = field(default_factory=list)
    drawn: list[DrawnPair] = field(default_factory=list)
    texts: list[TextPair] = field(default_factory=list)

    @property
    def students(self) -> list[StepPair]:
        """The steps that are a student's."""
        return [pair for pair in self.steps if pair.sampling is None]

    def pictures(self) -> list[ImagePair]:
        """Every pair of images of bundle and reference."""
        return [pair for pair in self.images if not pair.itself] + [drawn.images() for drawn in self.drawn]

    def scopes(self) -> list[str]:
        """The names of what was compared: texts, steps, images, end to end; with itself last."""
        pairs: list[StepPair | ImagePair] = [*self.steps, *self.images]
        ahead, behind = ([pair.scope for pair in pairs if pair.itself is itself] for itself in (False, True))
        first = (text.scope for text in self.texts)
        return list(dict.fromkeys([*first, *ahead, *(drawn.scope for drawn in self.drawn), *behind]))


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
    error = np.where(mask, np.abs(got.astype(np.float64) - expected).max(axis=-1), -1.0)
    row, position = np.unravel_index(int(np.argmax(error)), error.shape)  # argmax takes the first NaN
    return float(error[row, position]), (int(row), int(position))
