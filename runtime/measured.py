"""What was measured of a bundle on this machine, kept in the bundle for `auto`.

It lies in `measured/<fingerprint of the CPU>.json`, written by whoever measures (`ddexport bench`), and is
read back without trust: a record counts only on the CPU it was taken on, for the version of the engine that
is installed, and for the graphs that are in the bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ddexport.runtime._json import decode, read_json
from ddexport.runtime.engines import graph_digest
from ddexport.runtime.errors import BundleError, OutputError
from ddexport.runtime.files import atomic_write
from ddexport.runtime.manifest import Manifest, resolve
from ddexport.runtime.options import MODES, Options

if TYPE_CHECKING:
    from ddexport.runtime.machine import Machine

FOLDER = "measured"
SCHEMA = 1
MAX_BYTES = 1 << 20
MAX_TEXT = 300

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One measurement of a way to run a bundle.

    version: of the engine, as `engine_version` has it. threads: None for the engine's own choice. mode: None
    for an engine without modes. steps: a number, or "teacher". total_ms: the median of a batch, noise to
    images. passed: the outputs met the bundle's limits for the precision; why: how they did not.
    """

    backend: str
    version: str
    precision: str
    threads: int | None
    mode: str | None
    steps: int | str
    batch: int
    total_ms: float
    passed: bool
    why: str = ""
    provider: str | None = None

    def is_of(self, backend: str, precision: str, options: Options) -> bool:
        """Whether it was measured of such a way, with any number of threads and in any mode."""
        same_part = self.provider is None or self.provider == options.provider
        return same_part and (self.backend, self.precision) == (backend, precision)

    @property
    def key(self) -> tuple[object, ...]:
        """What it is a measurement of: a newer one takes the place of an older one."""
        return (
            self.backend,
            self.provider,
            self.precision,
            self.threads,
            self.mode,
            str(self.steps),
            self.batch,
        )

    @property
    def is_sane(self) -> bool:
        """Whether the numbers can have been measured, and the texts can be shown."""
        texts = (self.backend, self.version, self.precision, self.why)
        return (
            math.isfinite(self.total_ms)
            and self.total_ms > 0
            and self.batch > 0
            and (self.threads is None or self.threads > 0)
            and self.mode in (None, *MODES)
            and all(len(text) <= MAX_TEXT and text.isprintable() for text in texts)
        )


class Setting(NamedTuple):
    """What times depend on, beside the way; only those of one setting can be compared."""

    threads: int
    mode: str
    steps: str
    batch: int


@dataclass(frozen=True)
class _Host:
    name: str
    cores: int
    features: tuple[str, ...]  # none where the system does not tell


@dataclass(frozen=True)
class _Record:
    graphs: str
    measured: Measured


@dataclass(frozen=True)
class _File:
    cpu: _Host
    records: tuple[_Record, ...]
    schema: int = SCHEMA


def fingerprint(machine: Machine) -> str:
    """Sixteen hex digits for a CPU: its name, its features, and how many cores this process may use."""
    cpu = machine.cpu
    text = json.dumps([cpu.name, cpu.cores, cpu.features])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def engine_version(backend: str, machine: Machine) -> str | None:
    """The installed version of an engine, as records name it; None if it is not there."""
    known = {"onnxruntime": lambda: machine.onnxruntime, "openvino": lambda: machine.openvino}
    if backend in known:
        return known[backend]().version
    return machine.distributions.get(backend.replace("_", "-").lower())


def write_measured(
    root: Path, manifest: Manifest, machine: Machine, records: Iterable[Measured]
) -> Path | None:
    """Adds records to those of this machine in the bundle `root`; returns the file.

    None, with a warning in the log, where the bundle cannot be written. Raises ValueError for a record that
    cannot have been measured, a time that is not finite, say.
    """
    fresh = {}
    for each in records:
        shown = replace(each, why="".join(c for c in each.why if c.isprintable())[:MAX_TEXT])
        if not shown.is_sane:
            raise ValueError(f"not a measurement: {each}")
        fresh[each.key] = _Record(_digest(manifest, each.precision), shown)
    path = _path(root, machine)
    kept = {record.measured.key: record for record in _valid(_read(root, path, machine), manifest)}
    content = dataclasses.asdict(_File(_host(machine), tuple((kept | fresh).values())))
    try:
        if path.parent.is_symlink():
            raise OutputError(f"{path.parent} is a link", "A bundle holds its own files.")
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as stream:
            stream.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    except (OSError, OutputError) as error:
        logger.warning("what was measured is not kept: %s", error)
        return None
    return path


def read_measured(root: Path, manifest: Manifest, machine: Machine) -> tuple[Measured, ...]:
    """The records of this CPU, for the installed engines and the bundle's own graphs.

    A file that is damaged, too large, of another machine or leads out of the bundle counts as none, with a
    warning in the log.
    """
    versions: dict[str, str | None] = {}
    found = []
    for record in _valid(_read(root, _path(root, machine), machine), manifest):
        backend = record.measured.backend
        if backend not in versions:
            versions[backend] = engine_version(backend, machine)
        if record.measured.version == versions[backend]:
            found.append(record.measured)
    return tuple(found)


def times_of(
    records: Iterable[Measured], backend: str, precision: str, options: Options, cores: int
) -> dict[Setting, float]:
    """The times measured of a way. cores: what an engine uses that was given no number of threads."""
    return {
        Setting(each.threads or cores, each.mode or MODES[0], str(each.steps), each.batch): each.total_ms
        for each in records
        if each.is_of(backend, precision, options)
    }


def common_setting(tables: Sequence[Mapping[Setting, float]], asked: Options, cores: int) -> Setting | None:
    """The setting by which ways are compared, None if nothing was measured of any of them.

    With the mode and the threads asked for, if there is such a one; then the one measured of most of them;
    of these the smallest batch, and one step.
    """

    def preference(one: Setting) -> tuple[object, ...]:
        other_mode = one.mode != (asked.mode or MODES[0])
        other_threads = one.threads != (asked.threads or cores)
        measured = sum(one in table for table in tables)
        return other_mode, other_threads, -measured, one.batch, one.steps != "1", one

    return min((one for table in tables for one in table), key=preference, default=None)


def _path(root: Path, machine: Machine) -> Path:
    return root / FOLDER / f"{fingerprint(machine)}.json"


def _host(machine: Machine) -> _Host:
    return _Host(machine.cpu.name, machine.cpu.cores, machine.cpu.features or ())


def _digest(manifest: Manifest, precision: str) -> str:
    """Over the graphs that a way in this precision may read: those in float32 as well, and every role."""
    graphs = [graph for graph in manifest.graphs if graph.precision in ("fp32", precision)]
    text = "\n".join(f"{graph.key} {graph.precision} {graph_digest(graph)}" for graph in graphs)
    return hashlib.sha256(text.encode()).hexdigest()


def _valid(records: Iterable[_Record], manifest: Manifest) -> list[_Record]:
    return [
        each
        for each in records
        if each.measured.is_sane and each.graphs == _digest(manifest, each.measured.precision)
    ]


def _read(root: Path, path: Path, machine: Machine) -> tuple[_Record, ...]:
    try:
        if not path.is_file():
            return ()
        resolve(root, path.relative_to(root).as_posix())
        if path.stat().st_size > MAX_BYTES:
            raise BundleError(f"it is larger than {MAX_BYTES >> 20} MiB")
        content = decode(_File, read_json(path), file=path.name)
        if content.schema != SCHEMA:
            raise BundleError(f"it has schema {content.schema}, and this runtime reads {SCHEMA}")
        if content.cpu != _host(machine):
            raise BundleError("it is of another machine")
    except (BundleError, OSError) as error:
        logger.warning("%s is left aside: %s", path, error)
        return ()
    return content.records
