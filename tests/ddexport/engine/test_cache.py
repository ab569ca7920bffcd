"""The cache gives back what was stored or nothing: damage, kills and company must not show."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ddexport.runtime.engines import Engine, Profile
from ddexport.runtime.manifest import sha256_of
from filelock import Timeout

from ddexport.engine.cache import (
    ENTRY,
    PLAN,
    CacheError,
    EngineCache,
    cache_key,
    default_directory,
)
from ddexport.engine.prune import Limits, doomed, prune_cache

KEYS = [cache_key({"number": number}) for number in range(4)]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "some.plan"
    path.write_bytes(b"an engine" * 1000)
    return path


@pytest.fixture
def engine(plan: Path) -> Engine:
    return Engine(
        role="student",
        precision="fp16",
        file="student_fp16.plan",
        sha256=sha256_of(plan),
        bytes=plan.stat().st_size,
        source="0" * 64,
        backend="tensorrt-rtx",
        version="1.7.1.116",
        platform="linux-x86_64",
        targets=("default",),
        hardware=None,
        version_compatible=False,
        profiles=(Profile(1, 4, 8),),
        inputs=(),
        outputs=(),
        layers={"float16": 2},
        options={"tf32": False},
        key=KEYS[0],
        made_with={},
        seconds=1.5,
    )


def store(cache: EngineCache, plan: Path, engine: Engine, number: int = 0, used: float | None = None) -> Path:
    with cache.lock(KEYS[number]):
        cache.store(KEYS[number], plan, replace(engine, key=KEYS[number]), f"model {number}")
    folder = cache.directory / KEYS[number]
    if used is not None:
        os.utime(folder / ENTRY, (used, used))
    return folder


def find(cache: EngineCache, number: int = 0) -> Any:
    with cache.lock(KEYS[number]):
        return cache.find(KEYS[number])


def test_what_was_stored_is_found(cache: EngineCache, plan: Path, engine: Engine) -> None:
    """Protects the hit: same bytes, same sidecar, and the time of the last use."""
    assert find(cache) is None
    folder = store(cache, plan, engine, used=1000.0)
    entry = find(cache)
    assert (entry.path / PLAN).read_bytes() == plan.read_bytes()
    assert replace(entry.engine, file=engine.file) == engine and entry.model == "model 0"
    assert (folder / ENTRY).stat().st_mtime > 1000.0
    assert find(cache, 1) is None


@pytest.mark.parametrize("damage", ["plan changed", "plan cut", "plan gone", "sidecar cut", "sidecar gone"])
def test_a_damaged_entry_is_removed(
    cache: EngineCache, plan: Path, engine: Engine, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Protects the GPU from a plan that rotted on disk: warned about, removed, and built again."""
    folder = store(cache, plan, engine)
    content = bytearray((folder / PLAN).read_bytes())
    if damage == "plan changed":
        content[100] ^= 1
        (folder / PLAN).write_bytes(content)
    elif damage == "plan cut":
        (folder / PLAN).write_bytes(content[:-1])
    elif damage == "plan gone":
        (folder / PLAN).unlink()
    elif damage == "sidecar cut":
        (folder / ENTRY).write_text((folder / ENTRY).read_text()[:100])
    else:
        (folder / ENTRY).unlink()
    assert find(cache) is None
    assert not folder.exists()
    assert "is damaged and is built again" in caplog.text
    store(cache, plan, engine)
    assert find(cache)


def test_the_key_knows_order_no_but_every_value() -> None:
    """Protects the key's meaning."""
    assert cache_key({"a": 1, "b": [1, 2]}) == cache_key({"b": [1, 2], "a": 1})
    assert len({cache_key({"a": a, "b": b}) for a in (1, 2, None) for b in ([1, 2], [2, 1])}) == 6


def _hold(directory: Path, key: str, taken: Any, done: Any) -> None:
    with EngineCache(directory).lock(key):
        taken.set()
        done.wait(30)


def test_a_key_is_locked_against_other_processes(cache: EngineCache, plan: Path, engine: Engine) -> None:
    """Protects two builds at once: one builds, the other waits; pruning passes over what is in use."""
    folder = store(cache, plan, engine)
    context = multiprocessing.get_context("spawn")
    taken, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(cache.directory, KEYS[0], taken, done))
    process.start()
    try:
        assert taken.wait(60)
        with pytest.raises(Timeout), cache.lock(KEYS[0], timeout=0.1):
            pytest.fail("two processes hold one lock")
        pruned = prune_cache(cache, Limits(keep=0), time.time())
        assert [entry.key for entry in pruned.busy] == [KEYS[0]] and not pruned.removed
        assert folder.exists()
        with cache.lock(KEYS[1], timeout=1):
            pass  # another key is another lock
        process.kill()  # the lock goes with its holder
        process.join(30)
        with cache.lock(KEYS[0], timeout=10):
            pass
    finally:
        process.kill()
        process.join(30)


def test_leftovers_of_a_killed_process_are_cleared(cache: EngineCache, plan: Path, engine: Engine) -> None:
    """Protects the disk, and the next build of the same key, from half-written entries."""
    store(cache, plan, engine)
    for number, suffix in ((0, "partial"), (1, "partial"), (2, "removed")):
        folder = cache.directory / f"{KEYS[number]}.{suffix}"
        folder.mkdir()
        (folder / PLAN).write_bytes(b"half")
    entries, damaged = cache.entries()
    assert len(entries) == 1 and not damaged  # nobody takes them for entries
    assert find(cache)
    assert cache.leftovers() == sorted(KEYS[1:3])  # that of key 0 went with its lock
    assert prune_cache(cache, Limits(), time.time(), dry_run=True).leftovers == 2
    assert prune_cache(cache, Limits(), time.time()).leftovers == 2
    assert cache.leftovers() == [] and find(cache)


def test_a_full_disk_leaves_no_half_entry(
    cache: EngineCache, plan: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the cache, and the user's understanding of what happened."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddexport.engine.cache.shutil.copyfile", full)
    with pytest.raises(CacheError, match="No space left") as caught:
        store(cache, plan, engine)
    assert "prune" in caught.value.hint
    assert cache.leftovers() == [] and cache.entries() == ([], [])


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """Protects whoever has a read-only home: the way out is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError) as caught, EngineCache(tmp_path / "file" / "cache").lock(KEYS[0]):
        pytest.fail("the lock was taken")
    assert "DDEXPORT_CACHE_DIR" in caught.value.hint and "--no-cache" in caught.value.hint


def test_prune_follows_its_limits(cache: EngineCache, plan: Path, engine: Engine) -> None:
    """Protects what is used: old, many and large go, those used last stay."""
    now = 1_000_000.0
    for number in range(4):
        store(cache, plan, engine, number, used=now - 100 * number)
    entries, _ = cache.entries()
    assert [entry.key for entry in entries] == KEYS
    two = entries[0].bytes + entries[1].bytes  # not twice one: times are written with more or fewer digits

    def going(**limits: Any) -> list[str]:
        return [entry.key for entry in doomed(entries, Limits(**limits), now)]

    assert going() == []
    assert going(older_than=150) == KEYS[2:]
    assert going(keep=1) == KEYS[1:]
    assert going(keep=0) == KEYS
    assert going(max_bytes=two) == KEYS[2:]
    assert going(max_bytes=2 * two, older_than=50) == KEYS[1:]
    dry = prune_cache(cache, Limits(keep=3), now, dry_run=True)
    assert [entry.key for entry in dry.removed] == KEYS[3:] and len(cache.entries()[0]) == 4
    wet = prune_cache(cache, Limits(keep=3), now)
    assert wet.removed == dry.removed and wet.kept == dry.kept
    assert [entry.key for entry in cache.entries()[0]] == KEYS[:3]


def test_prune_removes_what_cannot_be_read(cache: EngineCache, plan: Path, engine: Engine) -> None:
    """Protects against entries that no limit would ever name."""
    folder = store(cache, plan, engine)
    content = json.loads((folder / ENTRY).read_text())
    (folder / ENTRY).write_text(json.dumps(content | {"unknown": 1}))
    assert cache.entries() == ([], [KEYS[0]])
    assert prune_cache(cache, Limits(), time.time()).damaged == [KEYS[0]]
    assert not folder.exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects the order: own variable, XDG, home."""
    monkeypatch.delenv("DDEXPORT_CACHE_DIR", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_directory() == tmp_path / "home" / ".cache" / "ddexport" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_directory() == tmp_path / "xdg" / "ddexport" / "engines"
    monkeypatch.setenv("DDEXPORT_CACHE_DIR", str(tmp_path / "own"))
    assert default_directory() == tmp_path / "own" / "engines"
