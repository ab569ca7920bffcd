"""A request of any size becomes batches that the engine's profiles take."""

from __future__ import annotations

from ddexport.runtime.backends._profiles import parts, pick
from ddexport.runtime.engines import Profile
from hypothesis import given
from hypothesis import strategies as st

PROFILES = st.lists(
    st.lists(st.integers(1, 40), min_size=3, max_size=3).map(lambda sizes: Profile(*sorted(sizes))),
    min_size=1,
    max_size=4,
)


@given(st.integers(1, 300), PROFILES)
def test_every_image_is_run_once_in_a_batch_that_its_profile_takes(
    count: int, profiles: list[Profile]
) -> None:
    """In order, without gaps; padded only where no profile takes so few, and then no more than needed."""
    done = parts(count, profiles)
    assert [part.start for part in done] == [sum(p.count for p in done[:n]) for n in range(len(done))]
    assert sum(part.count for part in done) == count
    for part in done:
        profile = profiles[part.profile]
        assert profile.minimum <= part.size <= profile.maximum
        assert 1 <= part.count <= part.size
        exact = any(p.minimum <= part.count <= p.maximum for p in profiles)
        assert (part.size == part.count) == exact
        if not exact:
            assert part.size == min(p.minimum for p in profiles if p.minimum >= part.count)


@given(st.integers(1, 300), PROFILES)
def test_there_are_as_few_batches_as_can_be(count: int, profiles: list[Profile]) -> None:
    largest = max(profile.maximum for profile in profiles)
    assert len(parts(count, profiles)) == -(-count // largest)


def test_the_profile_tuned_nearest_is_taken() -> None:
    profiles = [Profile(1, 8, 8), Profile(1, 2, 8), Profile(4, 4, 4)]
    assert [pick(count, profiles)[0] for count in (1, 3, 4, 8)] == [1, 1, 2, 0]
