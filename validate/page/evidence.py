"""What people want to look at beside the figures: samples, the worst images, and how close the tokens were.

`validate parity` states figures; this module keeps what they were made from, as small pictures and
histograms, in BUNDLE/parity/evidence-PRECISION.json. A file is read back with the suspicion that everything
in a bundle deserves: numbers are checked, pictures are decoded and encoded again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta, ValidationError, convert, to_builtins
from msgspec.structs import replace
from PIL import Image

from ddexport.runtime.records import Natural, Record
from ddexport.validate import pictures
from ddexport.validate.metrics._base import Comparison, FloatArray, StudentPair
from ddexport.validate.metrics.tokens import excused, margins

SCHEMA = 1
DECADES, BINS = (-9, 3), 60  # of the axis that logit errors and margins share
LISTED = 200  # mismatches named one by one
MAX_SIDE, MAX_SHOWN = 2048, 64

ByteImage = npt.NDArray[np.uint8]


class EvidenceError(ValueError):
    """A file of evidence that does not hold what it should."""


class Histogram(Record, frozen=True):
    """Counts over equal bins of log10, from 10 ** low to 10 ** high; exact zeros apart."""

    low: Annotated[float, Meta(ge=-300, le=300)]
    high: Annotated[float, Meta(ge=-300, le=300)]
    counts: Annotated[tuple[Natural, ...], Meta(min_length=1, max_length=1000)]
    zeros: Natural
    largest: float

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError("a histogram without an axis")

    @property
    def total(self) -> int:
        """How many values there were."""
        return sum(self.counts) + self.zeros

    @staticmethod
    def of(values: npt.NDArray[Any]) -> Histogram:
        """Of values >= 0, any shape; what lies outside the axis, or is not a number, counts at its end."""
        flat = np.nan_to_num(np.asarray(values, dtype=np.float64).ravel(), nan=np.inf)
        positive = flat[flat > 0]
        low, high = DECADES
        with np.errstate(over="ignore"):
            place = np.clip(np.log10(np.clip(positive, 10.0**low, 10.0**high)), low, high)
        counts, _ = np.histogram(place, bins=BINS, range=(low, high))
        largest = float(flat.max(initial=0.0))
        return Histogram(low, high, tuple(map(int, counts)), int((flat == 0).sum()), largest)

    def merged(self, other: Histogram) -> Histogram:
        """Of the values of both."""
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(
            self.low, self.high, counts, self.zeros + other.zeros, max(self.largest, other.largest)
        )


class Mismatch(Record, frozen=True):
    """A token that the bundle chose differently from the same input.

    margin: the reference's largest logit less its second. lost: less the one of the token that was chosen.
    """

    scope: str
    place: str
    position: Natural
    expected: Natural
    got: Natural
    margin: float
    lost: float
    excused: bool


class Worst(Record, frozen=True):
    """An image that differs, as both sides drew it, and the difference times `factor`. Pictures are PNG."""

    scope: str
    place: str
    size: float
    factor: float
    reference: bytes
    bundle: bytes
    difference: bytes


class Sample(Record, frozen=True):
    """An image of the bundle: its class, and a picture."""

    label: Natural
    picture: bytes


class Evidence(Record, frozen=True):
    """All of one run in one precision; `manifest` is the SHA-256 of the bundle.json that it is of."""

    manifest: str
    precision: str
    backend: str
    images: Natural
    seed: Natural
    token_margin: float
    compared: Natural
    margins: Histogram
    errors: Histogram
    mismatches: Annotated[tuple[Mismatch, ...], Meta(max_length=LISTED)]
    mismatched: Natural
    worst: Annotated[tuple[Worst, ...], Meta(max_length=MAX_SHOWN)]
    samples: Mapping[int, tuple[Sample, ...]]

    def to_dict(self) -> dict[str, Any]:
        """As plain data; pictures in base64, numbers that are not finite as text."""
        return {"schema": SCHEMA, **_plain(to_builtins(self, str_keys=True))}


def closeness(comparison: Comparison, limit: float) -> dict[str, Any]:
    """The fields of `Evidence` that are about tokens: margins, errors of logits, mismatches."""
    pairs = [pair for pair in comparison.students if not pair.itself]
    decided = [margins(pair.expected.logits)[pair.decided()] for pair in pairs]
    errors = Histogram.of(np.zeros(0))
    for pair in pairs:
        errors = errors.merged(
            Histogram.of(np.abs(pair.got.logits.astype(np.float64) - pair.expected.logits))
        )
    mismatches = sorted(
        (mismatch for pair in pairs for mismatch in _mismatches(pair, limit)),
        key=lambda mismatch: -mismatch.lost,
    )
    return {
        "token_margin": limit,
        "compared": int(sum(len(values) for values in decided)),
        "margins": Histogram.of(np.concatenate(decided)),
        "errors": errors,
        "mismatches": tuple(mismatches[:LISTED]),
        "mismatched": len(mismatches),
    }


def worst_cases(comparison: Comparison, count: int = 4) -> tuple[Worst, ...]:
    """The images that differ most from the reference's, each once, where it is worst."""
    worst = []
    for pair, index, size in pictures.ranked(comparison.pictures())[:count]:
        factor = pictures.amplification(size)
        difference = np.abs(pair.got[index].astype(np.float64) - pair.expected[index]) * factor
        sides = (pair.expected[index], pair.got[index], difference)
        reference, bundle, amplified = (png(to_bytes(side)) for side in sides)
        worst.append(Worst(pair.scope, pair.places[index], size, factor, reference, bundle, amplified))
    return tuple(worst)


def to_bytes(image: FloatArray | npt.NDArray[np.float64]) -> ByteImage:
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8; what is not finite is white."""
    values = np.rint(np.clip(np.nan_to_num(image, nan=1.0), 0.0, 1.0) * 255.0)
    return np.asarray(values.astype(np.uint8).transpose(1, 2, 0))


def png(pixels: ByteImage) -> bytes:
    """(H, W, 3) uint8 -> a PNG."""
    return _encoded(Image.fromarray(pixels))


def evidence_from_dict(data: Any) -> Evidence:
    """Reads what `to_dict` gave. Raises EvidenceError for anything else."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise EvidenceError(f"not of schema {SCHEMA}")
    fields = {key: value for key, value in data.items() if key != "schema"}
    try:
        evidence = convert(fields, Evidence, strict=False, str_keys=True)  # "nan" and "inf" are numbers
    except ValidationError as error:
        raise EvidenceError(str(error)) from error
    sides = ("reference", "bundle", "difference")
    worst = [
        replace(image, **{side: _picture(getattr(image, side)) for side in sides}) for image in evidence.worst
    ]
    samples = {
        steps: tuple(Sample(sample.label, _picture(sample.picture)) for sample in images)
        for steps, images in evidence.samples.items()
    }
    return replace(evidence, worst=tuple(worst), samples=samples)


def _mismatches(pair: StudentPair, limit: float) -> list[Mismatch]:
    logits, wanted, got = pair.expected.logits, pair.expected.tokens, pair.got.tokens
    gap, pardoned = margins(logits), excused(pair, limit)
    return [
        Mismatch(
            pair.scope,
            pair.places[row],
            int(position),
            int(wanted[row, position]),
            int(got[row, position]),
            float(gap[row, position]),
            float(logits[row, position].max() - logits[row, position, got[row, position]]),
            bool(pardoned[row, position]),
        )
        for row, position in zip(*np.nonzero(pair.differing()), strict=True)
    ]


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _picture(content: bytes) -> bytes:
    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "WEBP"]) as image:
            if max(image.size) > MAX_SIDE:
                raise EvidenceError(f"a picture of {image.width} x {image.height}")
            return _encoded(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise EvidenceError(f"not a picture: {error}") from error


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def samples_of(images: Iterable[ByteImage], labels: Sequence[int]) -> tuple[Sample, ...]:
    """Images (H, W, 3) uint8 and their classes, in order."""
    return tuple(Sample(int(label), png(pixels)) for label, pixels in zip(labels, images, strict=True))
