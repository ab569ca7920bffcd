"""Two sets of images from the same labels and noise, measured batch by batch as they are drawn.

Nothing is kept of an image but what its batch adds to sums of fixed size and to a bounded sample, so that
50,000 images take no more memory than 5,000; and all of it can be written down and read back, so that a run
that was stopped goes on with the very numbers it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.errors import DDError
from ddexport.validate.drawing import ByteImages, Draw, Order, Schedules
from ddexport.validate.features._base import Extractor, Readings
from ddexport.validate.fid_state import State
from ddexport.validate.metrics._base import IntArray
from ddexport.validate.metrics.inception_score import ScoreSums
from ddexport.validate.statistics import Float64Array, GroupedMoments, Reservoir

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Sink: TypeAlias = Callable[[str, int, range, ByteImages], None]  # side, steps, which images, the images

BUNDLE, REFERENCE = "bundle", "reference"
VISIBLE = 2  # an 8-bit difference that rounding at a tie cannot make: `image_max` of the float32 limits


@dataclass(frozen=True)
class Sizes:
    """What a tally is made for: D features, K classes or None, bootstrap groups, rows of the sample."""

    width: int
    classes: int | None
    groups: int
    rows: int


class SetTally:
    """One set of images: what its figures are computed from."""

    def __init__(self, sizes: Sizes) -> None:
        self.moments = GroupedMoments(sizes.width, sizes.groups)
        self.sample = Reservoir(sizes.width, sizes.rows)
        self.scores = ScoreSums(sizes.classes) if sizes.classes else None

    def update(self, readings: Readings, indices: IntArray) -> None:
        """Adds what the extractor read off the images `indices` (n,)."""
        self.moments.update(readings.features, indices)
        self.sample.update(readings.features, indices)
        if self.scores is not None and readings.probabilities is not None:
            self.scores.update(readings.probabilities, indices)

    def to_arrays(self, prefix: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Everything by name; one large array at a time is made."""
        yield from _named(f"{prefix}.moments", self.moments.to_arrays())
        yield from _named(f"{prefix}.sample", self.sample.to_arrays())
        if self.scores is not None:
            yield from _named(f"{prefix}.scores", self.scores.to_arrays())

    def restore(self, prefix: str, arrays: Arrays) -> None:
        """Takes over what `to_arrays` gave. Raises KeyError or ValueError where it does not fit."""
        self.moments = GroupedMoments.from_arrays(_under(f"{prefix}.moments", arrays))
        self.sample = Reservoir.from_arrays(_under(f"{prefix}.sample", arrays))
        if self.scores is not None:
            self.scores = ScoreSums.from_arrays(_under(f"{prefix}.scores", arrays))


class PairTally:
    """How far image i of one set is from image i of the other."""

    def __init__(self, groups: int) -> None:
        self.count: IntArray = np.zeros(groups, dtype=np.int64)
        self.squared: Float64Array = np.zeros(groups)  # summed squared feature distance
        self.changed: IntArray = np.zeros(groups, dtype=np.int64)  # images that differ visibly
        self.identical: IntArray = np.zeros((), dtype=np.int64)  # images equal in every bit
        self.largest: IntArray = np.zeros((), dtype=np.int64)  # of all 8-bit differences
        self.worst: IntArray = np.full((), -1, dtype=np.int64)  # the image it is in

    def update(self, images: list[ByteImages], readings: list[Readings], indices: IntArray) -> None:
        """Adds both sides of the images `indices` (n,)."""
        first, second = (reading.features.astype(np.float64) for reading in readings)
        apart = np.abs(images[0].astype(np.int16) - images[1].astype(np.int16)).max(axis=(1, 2, 3))
        group = indices % len(self.count)
        np.add.at(self.count, group, 1)
        np.add.at(self.squared, group, ((first - second) ** 2).sum(1))
        np.add.at(self.changed, group, apart > VISIBLE)
        self.identical = np.asarray(self.identical + (apart == 0).sum())
        if apart.max() > self.largest:
            self.largest = np.asarray(apart.max(), dtype=np.int64)
            self.worst = np.asarray(indices[apart.argmax()])

    def mean_squared(self, multiplicities: IntArray | None = None) -> float:
        """Mean squared feature distance of all pairs, or of a bootstrap draw of the groups."""
        return _mean(self.squared, self.count, multiplicities)

    def changed_share(self, multiplicities: IntArray | None = None) -> float:
        """Share of the images that differ by more than `VISIBLE` in some 8-bit value."""
        return _mean(self.changed, self.count, multiplicities)


class PairedRun:
    """Draws and measures both sides of every image in every schedule; `reference` None: the bundle alone."""

    def __init__(
        self,
        order: Order,
        schedules: Schedules,
        extractor: Extractor,
        sides: Mapping[str, Draw],
        sizes: Sizes,
    ) -> None:
        self.order, self.schedules, self.sides = order, schedules, sides
        self.extractor = extractor
        self.sets = {(side, steps): SetTally(sizes) for side in sides for steps in schedules}
        self.pairs = {steps: PairTally(sizes.groups) for steps in schedules if len(sides) > 1}
        self.done = 0
        self._whole = True  # False while a batch is being counted

    def resume(self, state: State) -> int:
        """Takes over what was saved, and returns how many images that is. Raises StateError."""
        self.done = state.load(self._restore)
        return self.done

    def run(
        self, batch: int, state: State | None, advance: Callable[[int], None], sink: Sink | None = None
    ) -> None:
        """Draws and measures what is left. What was counted is saved now and then, and when it is stopped."""
        try:
            for indices in self.order.batches(batch, self.done):
                self._count(indices, self._draw(indices, sink))
                if state is not None and state.due():
                    state.save(self.done, self._arrays())
                advance(len(indices))
        except BaseException:
            if state is not None:
                self.keep(state)
            raise

    def keep(self, state: State) -> None:
        """Saves what was counted as far as that is possible: something else has gone wrong already."""
        if self._whole and self.done:
            with suppress(DDError):
                state.save(self.done, self._arrays())

    def _draw(self, indices: range, sink: Sink | None) -> dict[tuple[str, int], tuple[ByteImages, Readings]]:
        """Images and readings of one batch. Nothing is counted yet: it may be stopped at any point."""
        drawn = {}
        for side, draw in self.sides.items():
            for steps, images in draw(self.order, indices).items():
                if sink is not None:
                    sink(side, steps, indices, images)
                drawn[side, steps] = images, self.extractor(images)
        return drawn

    def _count(self, indices: range, drawn: Mapping[tuple[str, int], tuple[ByteImages, Readings]]) -> None:
        self._whole = False
        numbers = np.arange(indices.start, indices.stop, dtype=np.int64)
        for where, (_, readings) in drawn.items():
            self.sets[where].update(readings, numbers)
        for steps, pair in self.pairs.items():
            both = [drawn[side, steps] for side in (BUNDLE, REFERENCE)]
            pair.update([images for images, _ in both], [readings for _, readings in both], numbers)
        self.done = indices.stop
        self._whole = True

    def _arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for (side, steps), tally in self.sets.items():
            yield from tally.to_arrays(f"{side}.{steps}")
        for steps, pair in self.pairs.items():
            yield from _named(f"pair.{steps}", vars(pair))

    def _restore(self, arrays: Arrays) -> None:
        for (side, steps), tally in self.sets.items():
            tally.restore(f"{side}.{steps}", arrays)
        for steps, pair in self.pairs.items():
            _take_over(pair, f"pair.{steps}", arrays)


def _mean(sums: npt.NDArray[Any], count: IntArray, multiplicities: IntArray | None) -> float:
    times = np.ones(len(count), dtype=np.int64) if multiplicities is None else multiplicities
    return float(times @ sums / (times @ count))


def _named(prefix: str, arrays: Mapping[str, Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for name, array in arrays.items():
        yield f"{prefix}.{name}", array


def _under(prefix: str, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
    """The arrays of one tally, by their own names."""
    start = f"{prefix}."
    return {name[len(start) :]: arrays[name] for name in arrays if name.startswith(start)}


def _take_over(tally: PairTally, prefix: str, arrays: Arrays) -> None:
    """Sets every array of `tally` to the saved one. Raises ValueError where a shape differs."""
    for name, own in vars(tally).items():
        saved = arrays[f"{prefix}.{name}"]
        if saved.shape != own.shape or saved.dtype != own.dtype:
            raise ValueError(f"{prefix}.{name} is {saved.dtype} {saved.shape}, not {own.dtype} {own.shape}")
        setattr(tally, name, saved)
