"""The manifest `bundle.json`, which is where the runtime has every number from. Format: docs/bundle.md."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from runtime._json import DAMAGED, decode, read_json
from runtime.errors import BundleError, ScheduleError

SCHEMA = 1
FILE_NAME = "bundle.json"
ROLES = ("student", "decoder")
WEIGHT_KINDS = ("checkpoint", "embedded", "random")


@dataclass(frozen=True)
class FileInfo:
    """A file of the bundle: POSIX path relative to the bundle, SHA-256 in hex, size."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output of a graph; a dimension that is a name, such as `batch`, is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One graph in one precision; `files` lists `file` itself and its external data.

    `accuracy` is what the export measured, carried as data: error against float32, operators by type, and
    the modules that were kept in float32.
    """

    role: str
    precision: str
    file: str
    files: tuple[FileInfo, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    accuracy: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SequenceSize:
    """L positions of width Cv; the first `split` are entries of a codebook of V."""

    length: int
    width: int
    codebook: int
    split: int


@dataclass(frozen=True)
class ImageSize:
    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class Schedule:
    """For each student step the number of leading positions that hold data."""

    known: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.known)


@dataclass(frozen=True)
class Source:
    """A checkpoint file that a part was made from; `weights` names the copy in it, such as `ema`."""

    role: str
    file: str
    sha256: str
    bytes: int
    weights: str | None


@dataclass(frozen=True)
class Weights:
    """Where the weights come from: `checkpoint`, `embedded`, or `random` with its seed."""

    kind: str
    seed: int | None
    files: tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All of bundle.json. `parity` to `tools` are carried as data: the runtime does not interpret them."""

    name: str
    title: str
    created: str
    sequence: SequenceSize
    image: ImageSize
    classes: int
    labels: FileInfo
    schedules: Mapping[int, Schedule]
    graphs: tuple[Graph, ...]
    weights: Weights
    parity: Mapping[str, Any]
    published: Mapping[str, Any]
    licence: Mapping[str, Any]
    recipe: Mapping[str, Any]
    tools: Mapping[str, Any]
    schema: int = SCHEMA  # a bundle that lacks it is refused by `_parse`

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that have every role, in the manifest's order."""
        found = dict.fromkeys(graph.precision for graph in self.graphs)
        return tuple(p for p in found if all((role, p) in self._index() for role in ROLES))

    def graph(self, role: str, precision: str | None = None) -> Graph:
        """The graph of a role; without a precision, that of the first one. BundleError if there is none."""
        wanted = precision or next(iter(self.precisions), "")
        try:
            return self._index()[role, wanted]
        except KeyError:
            have = ", ".join(self.precisions) or "none"
            raise BundleError(
                f"bundle {self.name} has no {role} in precision {wanted}", f"It has: {have}."
            ) from None

    def schedule(self, steps: int | None = None) -> Schedule:
        """The schedule of so many steps, the shortest without a number. ScheduleError if there is none."""
        if steps is None:
            return self.schedules[min(self.schedules)]
        if isinstance(steps, bool) or steps not in self.schedules:
            have = ", ".join(str(number) for number in sorted(self.schedules))
            raise ScheduleError(f"{self.name} has no schedule of {steps} steps", f"It can draw in: {have}.")
        return self.schedules[steps]

    def to_json(self) -> str:
        """The text of bundle.json."""
        content = {"schema": self.schema, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def check(self) -> None:
        """Raises BundleError where the manifest contradicts itself."""
        _check_sizes(self)
        if len(self._index()) < len(self.graphs):
            raise _wrong("graphs", "lists one role and precision twice")
        if not self.precisions:
            raise _wrong("graphs", f"needs a {' and a '.join(ROLES)} in one precision")
        for number, graph in enumerate(self.graphs):
            where = f"graphs[{number}]"
            if graph.role not in ROLES:
                raise _wrong(f"{where}.role", f"is {graph.role!r}, not one of {', '.join(ROLES)}")
            if graph.file not in [info.file for info in graph.files]:
                raise _wrong(f"{where}.files", f"does not list {graph.file}")
            for side, have, want in zip(
                ("inputs", "outputs"),
                (graph.inputs, graph.outputs),
                contract(graph.role, self.sequence, self.image),
                strict=True,
            ):
                if have != want:
                    raise _wrong(f"{where}.{side}", f"must be {_specs(want)}, but is {_specs(have)}")

    def files(self) -> tuple[FileInfo, ...]:
        """Every file of the bundle that the runtime may open, each once."""
        listed = [self.labels, *(info for graph in self.graphs for info in graph.files)]
        return tuple(dict.fromkeys(listed))

    def _index(self) -> dict[tuple[str, str], Graph]:
        return {(graph.role, graph.precision): graph for graph in self.graphs}


def contract(
    role: str, sequence: SequenceSize, image: ImageSize
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs that docs/bundle.md promises for a role; the same in every precision."""
    latent = ("batch", sequence.length, sequence.width)
    if role == "student":
        return (
            TensorSpec("tokens", "float32", latent),
            TensorSpec("label", "int64", ("batch",)),
            TensorSpec("known", "int64", ("batch",)),
        ), (
            TensorSpec("sequence", "float32", latent),
            TensorSpec("logits", "float32", ("batch", sequence.split, sequence.codebook)),
        )
    picture = ("batch", image.channels, image.height, image.width)
    return (TensorSpec("sequence", "float32", latent),), (TensorSpec("image", "float32", picture),)


def read_manifest(directory: str | Path, verify: bool = True) -> Manifest:
    """Reads and checks the manifest of a bundle directory.

    Paths, presence and sizes of the files are always checked; `verify` also compares every SHA-256.
    Raises BundleError, which names the key or the file.
    """
    root = Path(directory)
    path = root / FILE_NAME
    if not path.is_file():
        what = (
            "has no bundle.json" if root.is_dir() else "is not a directory" if root.exists() else "not found"
        )
        raise BundleError(
            f"not a bundle: {root} {what}", "Make one with: ddexport onnx --model NAME -o DIRECTORY"
        )
    manifest = _parse(read_json(path))
    for info in manifest.files():
        _check_file(root, info, verify)
    return manifest


def resolve(root: Path, file: str) -> Path:
    """The path of a file of the bundle. BundleError if it leaves the bundle, through a link as well."""
    pure = PurePosixPath(file)
    path = root / pure
    inside = path.resolve().is_relative_to(root.resolve())
    if not file or pure.is_absolute() or ".." in pure.parts or "\\" in file or ":" in file or not inside:
        raise BundleError(
            f"bundle.json names a path outside the bundle: {file!r}",
            "A bundle may only name files in its own directory; do not trust this one.",
        )
    return path


def file_info(path: Path, root: Path) -> FileInfo:
    """Describes `path`, which lies in `root`, reading it in pieces."""
    return FileInfo(path.relative_to(root).as_posix(), sha256_of(path), path.stat().st_size)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_file(root: Path, info: FileInfo, verify: bool) -> None:
    path = resolve(root, info.file)
    if not path.is_file():
        raise BundleError(f"the bundle {root} lacks its file {info.file}", DAMAGED)
    size = path.stat().st_size
    if size != info.bytes:
        raise BundleError(f"{info.file} has {size} bytes, but bundle.json says {info.bytes}", DAMAGED)
    if verify and sha256_of(path) != info.sha256:
        raise BundleError(f"the SHA-256 of {info.file} is not the one in bundle.json", DAMAGED)


def _check_sizes(manifest: Manifest) -> None:
    sequence, image = manifest.sequence, manifest.image
    for where, group in (("sequence", sequence), ("image", image), ("", manifest)):
        for key, value in vars(group).items():
            if isinstance(value, int) and value < 1:
                raise _wrong(f"{where}.{key}".lstrip("."), f"must be at least 1, but is {value}")
    if sequence.split > sequence.length:
        raise _wrong("sequence.split", f"is {sequence.split}, past the length {sequence.length}")
    if not manifest.schedules:
        raise _wrong("schedules", "is empty")
    for steps, schedule in manifest.schedules.items():
        known = schedule.known
        rising = all(before < after for before, after in itertools.pairwise(known))
        if len(known) != steps or known[:1] != (0,) or not rising or known[-1] >= sequence.length:
            raise _wrong(
                f"schedules.{steps}.known",
                f"must be {steps} rising numbers from 0 to below {sequence.length}, but is {list(known)}",
            )
    if manifest.weights.kind not in WEIGHT_KINDS:
        raise _wrong("weights.kind", f"is {manifest.weights.kind!r}, not one of {', '.join(WEIGHT_KINDS)}")


def _parse(content: Any) -> Manifest:
    schema = content.get("schema") if isinstance(content, dict) else SCHEMA
    if schema is None:
        raise BundleError("bundle.json lacks the key schema", DAMAGED)
    if isinstance(schema, int) and schema > SCHEMA:
        raise BundleError(
            f"the bundle has schema {schema}, and this runtime reads up to {SCHEMA}",
            "Upgrade the runtime: pip install --upgrade ddexport",
        )
    manifest = decode(Manifest, content)
    manifest.check()
    return manifest


def _wrong(where: str, what: str) -> BundleError:
    return BundleError(f"bundle.json: {where} {what}", DAMAGED)


def _specs(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs) or "nothing"
