"""The times that `ddexport bench --save` left in a bundle: which CPU engine is fastest on this machine."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Annotated

import msgspec

from ddexport.runtime.bundle import Manifest, resolve
from ddexport.runtime.errors import DDError
from ddexport.runtime.files import atomic_write
from ddexport.runtime.machine import cpu, version_of
from ddexport.runtime.records import Record, convert, read_json, to_json

FILE = "bench.json"

logger = logging.getLogger(__name__)


class Time(Record, frozen=True, kw_only=True):
    """The time of an image in the bundle's first precision, noise to pixels, which met the parity limits.

    cpu: name and usable cores. backend, version: of the engine. graphs: what was run, see `_digest`.
    """

    cpu: str
    backend: Annotated[str, msgspec.Meta(min_length=1)]
    version: str
    graphs: str
    milliseconds: Annotated[float, msgspec.Meta(gt=0)]


def save(root: Path, manifest: Manifest, milliseconds: dict[str, float]) -> Path:
    """Keeps the times by backend, in place of older ones of this CPU. Raises OutputError."""
    machine, graphs = _this_cpu(), _digest(manifest)
    kept = [t for t in _read(root) if (t.cpu, t.backend) not in {(machine, name) for name in milliseconds}]
    for name, time in milliseconds.items():
        kept.append(Time(cpu=machine, backend=name, version=_version(name), graphs=graphs, milliseconds=time))
    with atomic_write(root / FILE) as stream:
        stream.write(to_json(kept).encode())
    return root / FILE


def fastest(root: Path, manifest: Manifest) -> tuple[str, float] | None:
    """The engine with the shortest time and the time, of this CPU, the installed versions and these graphs.

    None if nothing was saved. A file that is damaged counts as none, with a warning in the log.
    """
    machine, graphs = _this_cpu(), _digest(manifest)
    times = [
        (time.milliseconds, time.backend)
        for time in _read(root)
        if (time.cpu, time.graphs, time.version) == (machine, graphs, _version(time.backend))
    ]
    return min(times)[::-1] if times else None


def _read(root: Path) -> list[Time]:
    if not (root / FILE).is_file():
        return []
    try:
        return convert(list[Time], read_json(resolve(root, FILE)), FILE)
    except DDError as error:
        logger.warning("%s is not used: %s", root / FILE, error)
        return []


def _version(backend: str) -> str:
    return version_of(backend) or version_of(f"{backend}-gpu") or ""


def _this_cpu() -> str:
    return f"{cpu().name}, {cpu().cores}"


def _digest(manifest: Manifest) -> str:
    graphs = [graph.digest for graph in manifest.graphs if graph.precision == manifest.precisions[0]]
    return hashlib.sha256("".join(graphs).encode()).hexdigest()
