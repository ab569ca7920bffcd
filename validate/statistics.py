"""What is kept of a stream of features, in memory that does not grow with the number of images.

`Moments` is mean and covariance; `GroupedMoments` the same in groups, from which bootstrap sets are put
together; `Reservoir` a bounded random choice of the features themselves. Each can be written to arrays and
read back, so that a run goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ddexport.runtime.errors import DDError

Float64Array: TypeAlias = npt.NDArray[np.float64]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
IntArray: TypeAlias = npt.NDArray[np.int64]
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

GROUPS = 20


class TooFewSamples(DDError):  # noqa: N818  # it names what is wrong, like a sentence
    """A figure was asked for that this number of images does not determine."""


class GaussianFit(Protocol):
    """What a Frechet distance needs: mean (D,), covariance (D, D), float64; count None if not known."""

    @property
    def count(self) -> int | None: ...
    @property
    def mean(self) -> Float64Array: ...
    @property
    def covariance(self) -> Float64Array: ...


@dataclass(frozen=True)
class Gaussian:
    """A `GaussianFit` as it is: mean (D,), covariance (D, D), float64, and of how many images, if known."""

    mean: Float64Array
    covariance: Float64Array
    count: int | None = None


class Moments:
    """Streaming mean and unbiased covariance, float64.

    A batch is reduced about its own mean and then merged (Chan, Golub and LeVeque 1979), so that nothing is
    lost when the mean is large against the spread.
    """

    def __init__(self, width: int) -> None:
        """Of no samples yet, of `width` features."""
        self.count = 0
        self.mean: Float64Array = np.zeros(width)
        self._scatter: Float64Array = np.zeros((width, width))

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def covariance(self) -> Float64Array:
        """(D, D), divided by N - 1. Raises TooFewSamples below two samples."""
        if self.count < 2:
            raise TooFewSamples(
                f"a covariance needs 2 images at least, here are {self.count}", "Draw more images."
            )
        return np.asarray((self._scatter + self._scatter.T) / (2 * (self.count - 1)))

    def update(self, features: FloatArray) -> None:
        """Adds features (n, D) of any float type. Raises ValueError if they are not finite or of another
        width.
        """
        rows = np.asarray(features, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"features must be (n, {self.width}), but are {rows.shape}")
        if not np.isfinite(rows).all():
            raise ValueError("features that are not finite")
        if len(rows):
            mean = rows.mean(0)
            centred = rows - mean
            self._merge(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments, times: int = 1) -> None:
        """Adds all samples of `other`, each `times` times."""
        if other.width != self.width:
            raise ValueError(f"moments of width {other.width} into those of width {self.width}")
        if other.count and times:
            self._merge(other.count * times, other.mean, other._scatter * times)

    def _merge(self, count: int, mean: Float64Array, scatter: Float64Array) -> None:
        total = self.count + count
        shift = mean - self.mean
        self._scatter += scatter
        if self.count:
            self._scatter += np.outer(shift * (self.count * count / total), shift)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def to_arrays(self) -> Arrays:
        """Everything, to go on from: count (), mean (D,), scatter (D, D)."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self._scatter}

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> Moments:
        """What `to_arrays` gave. Raises ValueError for shapes that do not fit, KeyError for a missing one."""
        mean, scatter = arrays["mean"], arrays["scatter"]
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)):
            raise ValueError(f"mean {mean.shape} and scatter {scatter.shape} do not fit each other")
        result = Moments(len(mean))
        result.count = int(arrays["count"])
        result.mean = mean.astype(np.float64)
        result._scatter = scatter.astype(np.float64)
        return result


class GroupedMoments:
    """Moments of groups of images, by image index modulo `groups`: what a bootstrap needs in constant memory.

    Resampling groups in place of images gives the same spread as long as the groups are alike, which the
    modulus of a random set's index ensures. Memory: groups * D * D * 8 bytes, 640 MiB for 20 of 2048.
    """

    def __init__(self, width: int, groups: int = GROUPS) -> None:
        """Of no samples yet."""
        self.groups: list[Moments] = [Moments(width) for _ in range(groups)]

    @property
    def count(self) -> int:
        """N, of all groups."""
        return sum(group.count for group in self.groups)

    @property
    def width(self) -> int:
        """D."""
        return self.groups[0].width

    def update(self, features: FloatArray, indices: npt.ArrayLike) -> None:
        """Adds features (n, D) of the images numbered `indices` (n,)."""
        rows = np.asarray(features)
        member = np.asarray(indices, dtype=np.int64) % len(self.groups)
        if member.shape != (len(rows),):
            raise ValueError(f"{len(rows)} features but indices of shape {member.shape}")
        for group in np.unique(member):
            self.groups[group].update(rows[member == group])

    def total(self) -> Moments:
        """The moments of all images."""
        return self.weighted([1] * len(self.groups))

    def weighted(self, multiplicities: Sequence[int] | IntArray) -> Moments:
        """The moments of a set in which every image of group g is there multiplicities[g] times."""
        result = Moments(self.width)
        for group, times in zip(self.groups, multiplicities, strict=True):
            result.merge(group, int(times))
        return result

    def multiplicities(self, rng: np.random.Generator) -> IntArray:
        """(groups,) int64: how often a bootstrap draw takes each group; empty groups are never drawn.

        Two sets drawn from the same labels and noise are resampled in step by giving both the same draw.
        """
        filled = np.flatnonzero([group.count > 0 for group in self.groups])
        drawn = rng.choice(filled, len(filled))
        return np.asarray(np.bincount(drawn, minlength=len(self.groups)), dtype=np.int64)

    def resample(self, rng: np.random.Generator) -> Moments:
        """The moments of one bootstrap set: as many groups as there are, drawn with replacement."""
        return self.weighted(self.multiplicities(rng))

    def to_arrays(self) -> Arrays:
        """Everything, to go on from: count (G,), mean (G, D), scatter (G, D, D)."""
        parts = [group.to_arrays() for group in self.groups]
        return {name: np.stack([part[name] for part in parts]) for name in ("count", "mean", "scatter")}

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> GroupedMoments:
        """What `to_arrays` gave. Raises ValueError for shapes that do not fit, KeyError for a missing one."""
        counts, means, scatters = (arrays[name] for name in ("count", "mean", "scatter"))
        if not len(counts) == len(means) == len(scatters) or not len(counts):
            raise ValueError("arrays of different numbers of groups")
        result = GroupedMoments(means.shape[1], len(counts))
        result.groups = [
            Moments.from_arrays({"count": count, "mean": mean, "scatter": scatter})
            for count, mean, scatter in zip(counts, means, scatters, strict=True)
        ]
        return result


class Reservoir:
    """At most `rows` features, chosen by image index: a random sample that needs no memory of the rest.

    Kept are the images whose index has the smallest hash. So the choice depends on nothing but the set of
    indices: not on their order, batches, interruptions, nor on the model, and two sets drawn from the same
    labels and noise keep the same images.
    """

    def __init__(self, width: int, rows: int = 10_000) -> None:
        """Of nothing yet."""
        self.rows = rows
        self.count = 0  # images seen
        self._indices: IntArray = np.zeros(0, dtype=np.int64)
        self._features: npt.NDArray[np.float32] = np.zeros((0, width), dtype=np.float32)

    @property
    def indices(self) -> IntArray:
        """(M,) int64: the images kept, ascending."""
        return np.sort(self._indices)

    @property
    def features(self) -> npt.NDArray[np.float32]:
        """(M, D) float32: their features, in the order of `indices`."""
        return np.asarray(self._features[np.argsort(self._indices)])

    def update(self, features: FloatArray, indices: npt.ArrayLike) -> None:
        """Offers features (n, D) of the images numbered `indices` (n,), each of which must be new."""
        rows = np.asarray(features, dtype=np.float32)
        numbers = np.asarray(indices, dtype=np.int64)
        if rows.ndim != 2 or rows.shape != (len(numbers), self._features.shape[1]):
            raise ValueError(f"features {rows.shape} do not fit {len(numbers)} indices and this width")
        self.count += len(rows)
        together = np.concatenate([self._indices, numbers])
        if len(np.unique(together)) != len(together):
            raise ValueError("an image was given twice")
        keep = np.zeros(len(together), dtype=np.bool_)
        keep[np.argsort(_hashed(together), kind="stable")[: self.rows]] = True
        free = np.flatnonzero(~keep[: len(self._indices)])
        new = np.flatnonzero(keep[len(self._indices) :])
        # In place once it is full: most batches then change nothing, and 10,000 rows need not be copied.
        self._features[free], self._indices[free] = rows[new[: len(free)]], numbers[new[: len(free)]]
        more = new[len(free) :]
        if len(more):
            self._features = np.concatenate([self._features, rows[more]])
            self._indices = np.concatenate([self._indices, numbers[more]])

    def to_arrays(self) -> Arrays:
        """Everything, to go on from: rows (), count (), indices (M,), features (M, D)."""
        return {
            "rows": np.array(self.rows),
            "count": np.array(self.count),
            "indices": self.indices,
            "features": self.features,
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> Reservoir:
        """What `to_arrays` gave. Raises ValueError for shapes that do not fit, KeyError for a missing one."""
        features, indices = arrays["features"], arrays["indices"]
        if features.ndim != 2 or indices.shape != (len(features),):
            raise ValueError(f"features {features.shape} and indices {indices.shape} do not fit each other")
        result = Reservoir(features.shape[1], int(arrays["rows"]))
        result.update(features, indices)
        result.count = int(arrays["count"])
        return result


def _hashed(numbers: IntArray) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014), a bijection on 64 bits, so that no two indices tie."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
