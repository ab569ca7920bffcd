"""Built engines of a bundle: what each was made from, what it needs, and whether that is at hand. Format:
docs/engines.md.

An engine lies at `engines/<backend>-<version>-<target>/<role>_<precision>.plan`, with a sidecar of the same
name and the suffix `.json` that says all the runtime must know before it loads the engine: an engine cannot
be asked without a GPU, and a foreign one must not be loaded at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddexport.runtime._json import DAMAGED, decode, read_json
from ddexport.runtime.contract import BATCH, dynamic_sizes
from ddexport.runtime.errors import BundleError
from ddexport.runtime.manifest import Graph, TensorSpec, resolve

SCHEMA = 1
FOLDER = "engines"
BACKENDS = ("tensorrt", "tensorrt-rtx")
MAX_SIDECARS = 512
DEFAULT_TARGET = "default"
"""TensorRT-RTX's own choice of GPUs: Ampere, Ada, consumer Blackwell and later."""


@dataclass(frozen=True)
class SizeRange:
    """What a dynamic dimension may be, and what the engine is tuned for."""

    name: str
    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.name} {self.minimum}/{self.optimum}/{self.maximum}"


@dataclass(frozen=True)
class Profile:
    """The batch sizes an engine runs, and the one it is tuned for.

    others: the ranges of the dynamic dimensions that are not the batch, which only a teacher has.
    """

    minimum: int
    optimum: int
    maximum: int
    others: tuple[SizeRange, ...] = ()

    @property
    def batch(self) -> str:
        return f"{self.minimum}/{self.optimum}/{self.maximum}"

    def __str__(self) -> str:
        others = ", ".join(map(str, self.others))
        return f"{self.batch} ({others})" if others else self.batch

    def range_of(self, name: str) -> tuple[int, int, int]:
        """Smallest, best and largest size of a dynamic dimension; KeyError for one it does not know."""
        if name == BATCH:
            return self.minimum, self.optimum, self.maximum
        ranges = {other.name: (other.minimum, other.optimum, other.maximum) for other in self.others}
        return ranges[name]

    def to_dict(self) -> dict[str, Any]:
        """As the sidecar has it: without `others` where there are none."""
        content = dataclasses.asdict(self)
        return content if self.others else {key: content[key] for key in ("minimum", "optimum", "maximum")}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A sidecar: everything known of one engine file.

    file, sha256, bytes: the plan, beside the sidecar. source: `graph_digest` of the graph it was built from.
    backend, version: the package that built it, in full. platform: operating system and processor.
    targets: compute capabilities as `sm89`, or `default`. hardware: full TensorRT's hardware compatibility
    level, None for the targets alone. layers: how many layers compute in each type. options: the build
    options that shaped it. key: its name in the build cache. made_with: driver and GPU at hand, if any.
    """

    role: str
    precision: str
    file: str
    sha256: str
    bytes: int
    source: str
    backend: str
    version: str
    platform: str
    targets: tuple[str, ...]
    hardware: str | None
    version_compatible: bool
    profiles: tuple[Profile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: Mapping[str, int]
    options: Mapping[str, Any]
    key: str
    made_with: Mapping[str, Any]
    seconds: float
    schema: int = SCHEMA

    @property
    def largest_batch(self) -> int:
        return self.largest(BATCH)

    def largest(self, name: str) -> int:
        """The largest size of a dynamic dimension in any profile."""
        return max(profile.range_of(name)[2] for profile in self.profiles)

    def to_json(self) -> str:
        """The text of the sidecar."""
        content = {"schema": self.schema, **dataclasses.asdict(self)}
        content["profiles"] = [profile.to_dict() for profile in self.profiles]
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def engine_folder(backend: str, version: str, targets: tuple[str, ...]) -> str:
    """Where the engines of one build go, relative to the bundle."""
    return f"{FOLDER}/{backend}-{version}-{'_'.join(targets)}"


def this_platform() -> str:
    """Operating system and processor, as in `linux-x86_64`."""
    return f"{sys.platform}-{platform.machine().lower()}"


def graph_digest(graph: Graph) -> str:
    """SHA-256 in hex over the contents of a graph and its external data."""
    digest = hashlib.sha256()
    for info in graph.files:  # the graph itself first; the names are written in the graph
        digest.update(f"{info.sha256} {info.bytes}\n".encode())
    return digest.hexdigest()


def read_engine(root: Path, sidecar: Path) -> Engine:
    """One sidecar of the bundle `root`. Raises BundleError, which names the file and the key."""
    where = sidecar.relative_to(root).as_posix()
    content = read_json(sidecar)
    schema = content.get("schema", SCHEMA) if isinstance(content, dict) else SCHEMA
    if isinstance(schema, int) and schema > SCHEMA:
        raise BundleError(
            f"{where} has schema {schema}, and this runtime reads up to {SCHEMA}",
            "Upgrade the runtime: pip install --upgrade ddexport",
        )
    engine = decode(Engine, content, file=where)
    wrong = _contradiction(engine)
    if wrong:
        raise BundleError(f"{where}: {wrong}", DAMAGED)
    resolve(root, (sidecar.parent / engine.file).relative_to(root).as_posix())
    return engine


def _contradiction(engine: Engine) -> str | None:
    if engine.backend not in BACKENDS:
        return f"backend is {engine.backend!r}, not one of {', '.join(BACKENDS)}"
    if not re.fullmatch(r"[A-Za-z0-9_.-]+\.plan", engine.file):
        return f"file is {engine.file!r}, not a .plan beside it"
    dynamic = dynamic_sizes((*engine.inputs, *engine.outputs))
    if any(sorted((BATCH, *(each.name for each in p.others))) != sorted(dynamic) for p in engine.profiles):
        return f"profiles must give the range of {', '.join(dynamic)}, each once"
    ranges = [profile.range_of(name) for profile in engine.profiles for name in dynamic]
    if not ranges or any(not 1 <= least <= best <= most for least, best, most in ranges):
        return "profiles must be one or more of 1 <= minimum <= optimum <= maximum"
    if not engine.targets:
        return "targets is empty"
    return None


@dataclass(frozen=True)
class Found:
    """An engine of a bundle and the place of its sidecar."""

    sidecar: Path
    engine: Engine

    @property
    def plan(self) -> Path:
        return self.sidecar.parent / self.engine.file

    @property
    def folder(self) -> str:
        return self.sidecar.parent.name


def find_engines(root: Path) -> tuple[list[Found], list[BundleError]]:
    """The engines of the bundle `root`, in the order of their names, and what is wrong with the others.

    Nothing outside the bundle is read: a link that leads there is one of the errors.
    """
    found: list[Found] = []
    errors: list[BundleError] = []
    paths = sorted((root / FOLDER).glob("*/*.json"))
    if len(paths) > MAX_SIDECARS:
        return [], [BundleError(f"{FOLDER}/ has {len(paths)} sidecars, more than {MAX_SIDECARS}", DAMAGED)]
    for path in paths:
        try:
            resolve(root, path.relative_to(root).as_posix())
            found.append(Found(path, read_engine(root, path)))
        except BundleError as error:
            errors.append(error)
    return found, errors
