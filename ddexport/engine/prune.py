"""Which cached engines go, and removing them."""

from __future__ import annotations

from dataclasses import dataclass

from ddexport.engine.cache import EngineCache, Entry


@dataclass(frozen=True)
class Limits:
    """An entry goes if any limit says so; None is no limit.

    older_than: seconds since its last use. keep: how many of those used last may stay. max_bytes: how large
    those that stay may be together.
    """

    older_than: float | None = None
    keep: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Pruned:
    """What went and what stayed; `busy` should have gone, but is in use. `leftovers` of killed processes."""

    removed: list[Entry]
    kept: list[Entry]
    busy: list[Entry]
    damaged: list[str]
    leftovers: int


def doomed(entries: list[Entry], limits: Limits, now: float) -> list[Entry]:
    """Those of `entries`, which are given with the one used last first, that a limit names."""
    going: list[Entry] = []
    staying, total = 0, 0
    for entry in entries:
        old = limits.older_than is not None and now - entry.used > limits.older_than
        many = limits.keep is not None and staying >= limits.keep
        large = limits.max_bytes is not None and total + entry.bytes > limits.max_bytes
        if old or many or large:
            going.append(entry)
        else:
            staying, total = staying + 1, total + entry.bytes
    return going


def prune_cache(cache: EngineCache, limits: Limits, now: float, dry_run: bool = False) -> Pruned:
    """Removes what `limits` names, damaged entries, and leftovers; with `dry_run` it only says what."""
    entries, damaged = cache.entries()
    leftovers = cache.leftovers()
    going = doomed(entries, limits, now)
    kept = [entry for entry in entries if entry not in going]
    if dry_run:
        return Pruned(going, kept, [], damaged, len(leftovers))
    cleared = sum(cache.clear(key) for key in leftovers)
    for key in damaged:
        cache.remove(key)
    busy = [entry for entry in going if not cache.remove(entry.key)]
    return Pruned([entry for entry in going if entry not in busy], kept, busy, damaged, cleared)
