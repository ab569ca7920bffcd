"""How a request of any size is run by engines that take certain batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.engines import Profile


@dataclass(frozen=True)
class Part:
    """Images `start` to `start + count` of a request, run as a batch of `size` by profile number `profile`.

    `size` is `count`, but for a request below the smallest batch, which is padded to it.
    """

    start: int
    count: int
    profile: int
    size: int


def parts(count: int, profiles: Sequence[Profile]) -> list[Part]:
    """Splits a request of `count` images to the largest batch; the last part takes the profile that suits."""
    largest = max(profile.maximum for profile in profiles)
    return [
        Part(start, min(largest, count - start), *pick(min(largest, count - start), profiles))
        for start in range(0, count, largest)
    ]


def pick(count: int, profiles: Sequence[Profile]) -> tuple[int, int]:
    """The profile for a batch, and the size that it is run in.

    First the one that pads least, then the one that is tuned for the nearest size. count: at most the largest
    maximum.
    """

    def cost(number: int) -> tuple[int, int]:
        size = max(count, profiles[number].minimum)
        return size, abs(profiles[number].optimum - size)

    able = [number for number, profile in enumerate(profiles) if count <= profile.maximum]
    best = min(able, key=cost)
    return best, max(count, profiles[best].minimum)
