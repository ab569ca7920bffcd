"""`ddexport cache`: the engines that were built on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from ddexport.runtime import console

if TYPE_CHECKING:
    from ddexport.engine.cache import Entry

EPILOG = """
\b
Examples:
  ddexport cache ls
  ddexport cache prune --older-than 30d
  ddexport cache prune --max-size 10GB --dry-run
  ddexport cache prune --all
"""


@click.group("cache", cls=console.Group, epilog=EPILOG)
def command() -> None:
    """List and remove cached engines.

    They lie in ~/.cache/ddexport/engines, or in DDEXPORT_CACHE_DIR. An engine in a bundle is a copy: removing
    it here breaks nothing.
    """


@command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@console.debug_option
def ls(as_json: bool) -> None:
    """List the cached engines, the one used last first."""
    from ddexport.engine.cache import EngineCache, default_directory

    cache = EngineCache(default_directory())
    entries, damaged = cache.entries()
    if as_json:
        console.emit_json(
            {
                "directory": cache.directory,
                "bytes": sum(entry.bytes for entry in entries),
                "entries": [_row(entry) for entry in entries],
                "damaged": damaged,
            }
        )
        return
    for entry in entries:
        click.echo(_line(entry))
    for key in damaged:
        click.echo(f"{key[:12]}  damaged: `ddexport cache prune` removes it")
    total = sum(entry.bytes for entry in entries) / 2**20
    click.echo(f"{len(entries)} engines, {total:.1f} MiB in {cache.directory}")


@command.command("prune")
@click.option("--older-than", metavar="TIME", help="Remove what was not used for so long, as in 30d.")
@click.option("--keep", type=click.IntRange(0), metavar="N", help="Keep the N that were used last.")
@click.option("--max-size", metavar="SIZE", help="Remove what was not used for longest, down to this size.")
@click.option("--all", "everything", is_flag=True, help="Remove all engines.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@console.debug_option
def prune(
    older_than: str | None,
    keep: int | None,
    max_size: str | None,
    everything: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove cached engines: those that any of the options names, and always damaged ones and leftovers."""
    from ddexport.engine.cache import EngineCache, default_directory
    from ddexport.engine.options import bytes_from_text, seconds_from_text
    from ddexport.engine.prune import Limits, prune_cache

    limits = Limits(
        older_than=None if older_than is None else _parsed("--older-than", seconds_from_text, older_than),
        keep=0 if everything else keep,
        max_bytes=None if max_size is None else _parsed("--max-size", bytes_from_text, max_size),
    )
    pruned = prune_cache(EngineCache(default_directory()), limits, time.time(), dry_run)
    if as_json:
        console.emit_json(
            {
                "dry_run": dry_run,
                "removed": [_row(entry) for entry in pruned.removed],
                "kept": [_row(entry) for entry in pruned.kept],
                "busy": [entry.key for entry in pruned.busy],
                "damaged": pruned.damaged,
                "leftovers": pruned.leftovers,
            }
        )
        return
    for entry in pruned.removed:
        click.echo(_line(entry))
    verb = "would be removed" if dry_run else "removed"
    freed = sum(entry.bytes for entry in pruned.removed) / 2**20
    click.echo(
        f"{len(pruned.removed)} engines {verb} ({freed:.1f} MiB), {len(pruned.kept)} kept,"
        f" {len(pruned.damaged)} damaged and {pruned.leftovers} leftovers {verb}"
    )
    for entry in pruned.busy:
        click.echo(f"{entry.key[:12]} is in use and stays", err=True)


def _parsed(option: str, parse: Any, text: str) -> Any:
    from ddexport.runtime.errors import DDError

    try:
        return parse(text)
    except DDError as error:
        raise click.BadParameter(f"{error.message}: {error.hint}", param_hint=option) from error


def _line(entry: Entry) -> str:
    engine = entry.engine
    age = console.duration(max(time.time() - entry.used, 0.0))
    return (
        f"{entry.key[:12]}  {entry.bytes / 2**20:9.1f} MiB  {entry.model} {engine.role} {engine.precision},"
        f" {engine.backend} {engine.version} for {', '.join(engine.targets)},"
        f" batch {', '.join(map(str, engine.profiles))}; used {age} ago"
    )


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "model": entry.model,
        "bytes": entry.bytes,
        "created": entry.created,
        "used": entry.used,
        "path": entry.path,
        "engine": entry.engine,
    }
