"""The manifest `bundle.json`, which is where the runtime has every number from. Format: docs/bundle.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ddexport.runtime._json import DAMAGED, decode, read_json
from ddexport.runtime.contract import TEACHER, FileInfo, ImageSize, SequenceSize, TensorSpec, contract
from ddexport.runtime.errors import BundleError, ScheduleError
from ddexport.runtime.schedules import (
    Schedule,
    Span,
    Teacher,
    contradiction,
    number_of_steps,
    teacher_contradiction,
)

# What others take from here although it is defined elsewhere.
__all__ = [
    "TEACHER",
    "FileInfo",
    "ImageSize",
    "Schedule",
    "SequenceSize",
    "Span",
    "Teacher",
    "TensorSpec",
    "contract",
]

SCHEMA = 1
FILE_NAME = "bundle.json"
ROLES = ("student", "decoder")
OPTIONAL = ("split", "teacher")  # keys that are left out where they say nothing
WEIGHT_KINDS = ("checkpoint", "embedded", "random")


@dataclass(frozen=True)
class Graph:
    """One graph in one precision; `files` lists `file` itself and its external data.

    split: of a student whose split is not the manifest's. accuracy: what the export measured, carried as
    data: error against float32, operators by type, and the modules that were kept in float32.
    """

    role: str
    precision: str
    file: str
    files: tuple[FileInfo, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    split: int | None = None
    accuracy: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The role, and the split where it is not the manifest's: `student@255`. One graph a precision."""
        return self.role if self.split is None else f"{self.role}@{self.split}"


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
    teacher: Teacher | None = None
    schema: int = SCHEMA  # a bundle that lacks it is refused by `_parse`

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that have a student and a decoder, in the manifest's order."""
        found = dict.fromkeys(graph.precision for graph in self.graphs)
        return tuple(p for p in found if all((role, p) in self._index() for role in ROLES))

    def graph(self, role: str, precision: str | None = None, split: int | None = None) -> Graph:
        """The graph of a role, of the student with that split; without a precision, that of the first one.

        BundleError if there is none.
        """
        own = split is None or role != "student" or split == self.sequence.split
        key = role if own else f"{role}@{split}"
        wanted = precision or next(iter(self.precisions), "")
        try:
            return self._index()[key, wanted]
        except KeyError:
            have = ", ".join(dict.fromkeys(p for k, p in self._index() if k == key))
            what = role if own else f"{role} of split {split}"
            raise BundleError(
                f"bundle {self.name} has no {what} in precision {wanted}", f"It has: {have or 'none'}."
            ) from None

    def schedule(self, steps: int | str | None = None) -> Schedule:
        """The schedule of so many steps, the shortest without a number, all from the teacher for "teacher".

        ScheduleError if there is none.
        """
        if steps is None:
            return self.schedules[min(self.schedules)]
        if steps == TEACHER and self.teacher is not None:
            return Schedule((), None, Span(0, self.sequence.length))
        if isinstance(steps, (bool, str)) or steps not in self.schedules:
            have = ", ".join([str(n) for n in sorted(self.schedules)] + ([TEACHER] if self.teacher else []))
            raise ScheduleError(f"{self.name} has no schedule of {steps} steps", f"It can draw in: {have}.")
        return self.schedules[steps]

    def number_of_steps(self, schedule: Schedule) -> int:
        """Student steps and the teacher's AR steps together."""
        return number_of_steps(schedule, self.teacher)

    def to_json(self) -> str:
        """The text of bundle.json."""
        content = {"schema": self.schema, **dataclasses.asdict(self, dict_factory=_without_empty)}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def check(self) -> None:
        """Raises BundleError where the manifest contradicts itself."""
        _check_sizes(self)
        _check_schedules(self)
        if len(self._index()) < len(self.graphs):
            raise _wrong("graphs", "lists one role and precision twice")
        if not self.precisions:
            raise _wrong("graphs", f"needs a {' and a '.join(ROLES)} in one precision")
        for number, graph in enumerate(self.graphs):
            self._check_graph(f"graphs[{number}]", graph)
        self._check_teacher_graphs()

    def files(self) -> tuple[FileInfo, ...]:
        """Every file of the bundle that the runtime may open, each once."""
        listed = [self.labels, *(info for graph in self.graphs for info in graph.files)]
        if self.teacher is not None:
            listed.append(self.teacher.codebook)
        return tuple(dict.fromkeys(listed))

    def _check_graph(self, where: str, graph: Graph) -> None:
        roles = ROLES if self.teacher is None else (*ROLES, TEACHER)
        if graph.role not in roles:
            raise _wrong(f"{where}.role", f"is {graph.role!r}, not one of {', '.join(roles)}")
        if graph.split is not None and (
            graph.role != "student" or graph.split == self.sequence.split or graph.split < 1
        ):
            raise _wrong(f"{where}.split", "is for students whose split is not that of the sequence")
        if graph.file not in [info.file for info in graph.files]:
            raise _wrong(f"{where}.files", f"does not list {graph.file}")
        if graph.role == TEACHER and self.teacher and self.teacher.layers > len(graph.inputs):
            # before the contract lists them: it could be any number
            raise _wrong(f"{where}.inputs", f"has no caches for {self.teacher.layers} layers")
        promised = contract(graph.role, self.sequence, self.image, self.teacher, graph.split)
        for side, have, want in zip(
            ("inputs", "outputs"), (graph.inputs, graph.outputs), promised, strict=True
        ):
            if have != want:
                raise _wrong(f"{where}.{side}", f"must be {_specs(want)}, but is {_specs(have)}")

    def _check_teacher_graphs(self) -> None:
        """The first precision can draw every schedule; others may lack what the teacher's schedules need."""
        first = self.precisions[0]
        needed = {f"student@{s.split}" for s in self.schedules.values() if self._other(s.split)}
        for key in sorted(needed | ({TEACHER} if self.teacher else set())):
            if (key, first) not in self._index():
                raise _wrong("graphs", f"lacks the {key} in {first} that the schedules need")

    def _other(self, split: int | None) -> bool:
        return split is not None and split != self.sequence.split

    def _index(self) -> dict[tuple[str, str], Graph]:
        return {(graph.key, graph.precision): graph for graph in self.graphs}


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
    try:
        path = resolve(root, info.file)
        found = path.is_file()
    except (OSError, ValueError) as error:  # no file can have this name
        raise BundleError(f"the bundle {root} lacks its file {info.file!r}", DAMAGED) from error
    if not found:
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
    if manifest.weights.kind not in WEIGHT_KINDS:
        raise _wrong("weights.kind", f"is {manifest.weights.kind!r}, not one of {', '.join(WEIGHT_KINDS)}")


def _check_schedules(manifest: Manifest) -> None:
    length, teacher = manifest.sequence.length, manifest.teacher
    if not manifest.schedules:
        raise _wrong("schedules", "is empty")
    if teacher is not None and (why := teacher_contradiction(teacher, length)):
        raise BundleError(f"bundle.json: teacher{why}", DAMAGED)
    for steps, schedule in manifest.schedules.items():
        if why := contradiction(steps, schedule, length, teacher):
            raise BundleError(f"bundle.json: schedules.{steps}{why}", DAMAGED)


def _without_empty(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value is not None or key not in OPTIONAL}


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
