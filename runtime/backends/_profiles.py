"""How a request of any size is run by engines that take certain sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddexport.runtime.engines import Profile
from ddexport.runtime.errors import BackendError


@dataclass(frozen=True)
class Part:
    """Images `start` to `start + count` of a request, run as a batch of `size` by profile number `profile`.

    `size` is `count`, but for a request below the smallest batch, which is padded to it.
    """

    start: int
    count: int
    profile: int
    size: int


def parts(count: int, profiles: Sequence[Profile], others: Mapping[str, int] | None = None) -> list[Part]:
    """Splits a request of `count` images to the largest batch; the last part takes the profile that suits.

    others: the sizes of the dynamic dimensions that are not the batch, which stay as they are. Raises
    BackendError if no profile takes them.
    """
    able = _able(profiles, others or {})
    if not able:
        given = ", ".join(f"{name} {size}" for name, size in (others or {}).items())
        raise BackendError(
            f"no profile of the engine takes {given}: {'; '.join(map(str, profiles))}",
            "Build the engines again: ddexport trt.",
        )
    largest = max(profiles[number].maximum for number in able)
    return [
        Part(start, min(largest, count - start), *pick(min(largest, count - start), profiles, others))
        for start in range(0, count, largest)
    ]


def pick(count: int, profiles: Sequence[Profile], others: Mapping[str, int] | None = None) -> tuple[int, int]:
    """The profile for a batch, and the size that it is run in.

    First the one that pads least, then the one that is tuned for the nearest batch, then for the nearest
    other sizes. count: at most the largest maximum of the profiles that take the others.
    """
    sizes = others or {}

    def cost(number: int) -> tuple[int, int, int]:
        profile = profiles[number]
        size = max(count, profile.minimum)
        away = sum(abs(profile.range_of(name)[1] - other) for name, other in sizes.items())
        return size, abs(profile.optimum - size), away

    able = [number for number in _able(profiles, sizes) if count <= profiles[number].maximum]
    best = min(able, key=cost)
    return best, max(count, profiles[best].minimum)


def _able(profiles: Sequence[Profile], others: Mapping[str, int]) -> list[int]:
    """The numbers of the profiles that take the sizes which are not the batch."""
    found = []
    for number, profile in enumerate(profiles):
        ranges = ((profile.range_of(name), size) for name, size in others.items())
        if all(least <= size <= most for (least, _, most), size in ranges):
            found.append(number)
    return found
