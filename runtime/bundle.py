"""The manifest `bundle.json`, which is where the runtime has every number from. Format: docs/bundle.md."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from ddexport.runtime.contract import TensorSpec, contract
from ddexport.runtime.errors import BundleError, ScheduleError
from ddexport.runtime.records import Natural, Positive, Record, convert, read_json, to_json
from ddexport.runtime.schedule import Schedule, Span, rises, schedule_fault

SCHEMA = 2
FLOAT32: Final = "fp32"
FILE_NAME = "bundle.json"
TEACHER: Final = "teacher"
ROLES = ("student", "decoder")  # what every precision of a bundle has, if there is a student
PREFIXES: Final = {"student": "text_prefix", TEACHER: "teacher_prefix"}
ENCODER: Final = "text_encoder"
TEXT_ROLES = (*PREFIXES.values(), ENCODER)  # they run once a prompt, and so in float32 in every precision
FULL: Final = "full"  # the name of the tokenizer's own decoder, where others are beside it
DAMAGED = "The bundle is damaged or incomplete: copy it again, or export it again."


ROLE = "^(student|teacher|decoder(_[a-z0-9]+)?|(text|teacher)_prefix|text_encoder)$"
Role: TypeAlias = Annotated[str, msgspec.Meta(pattern=ROLE)]


class FileInfo(Record, frozen=True, kw_only=True):
    """A file of the bundle: POSIX path relative to the bundle, SHA-256 in hex, size."""

    file: str
    sha256: str
    bytes: Natural


class SequenceSize(Record, frozen=True, kw_only=True):
    """L positions of width Cv; the first `split` are entries of a codebook of V."""

    length: Positive
    width: Positive
    codebook: Positive
    split: Positive


class ImageSize(Record, frozen=True, kw_only=True):
    height: Positive
    width: Positive
    channels: Positive


class Teacher(Record, frozen=True, kw_only=True):
    """The auto-regressive model in a bundle, and how its tokens are chosen unless a request says otherwise.

    starts: where its AR steps start, and the length. layers, heads, head_width: of its key-value cache.
    guidance: `rising` from 0 in the first AR step to `cfg` in the last one, or `constant` at `cfg` - 1.
    top_k, top_p, temperature: which tokens can be drawn. codebook: npy, float32 (V, Cv).
    """

    starts: tuple[Natural, ...]
    layers: Positive
    heads: Positive
    head_width: Positive
    guidance: Literal["rising", "constant"]
    cfg: Annotated[float, msgspec.Meta(ge=0)]
    top_k: Positive
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)]
    temperature: Annotated[float, msgspec.Meta(gt=0)]
    codebook: FileInfo

    def steps(self, span: Span) -> list[tuple[int, int]]:
        """The AR steps of a span, each by its first position and the one after its last."""
        inside = [start for start in self.starts if span.start <= start <= span.end]
        return list(itertools.pairwise(inside))

    def guidance_scale(self, start: int, cfg: float) -> float:
        """The g of logits c + g (c - u) in the AR step that starts at position `start`.

        Source: VAR (arXiv 2404.02905) counts from no guidance and lets it rise with the scale; LlamaGen
        (arXiv 2406.06525) calls no guidance 1.
        """
        if self.guidance == "constant":
            return max(cfg - 1.0, 0.0)
        return cfg * self.starts.index(start) / max(len(self.starts) - 2, 1)


class Text(Record, frozen=True, kw_only=True):
    """The texts that images are drawn from, in place of classes.

    tokens, width: of the features of a text, T rows of width W at most. layers, heads, head_width: of what
    student and teacher see of it. tokenizer: the tokenizer.json of the text encoder, where there is one.
    """

    tokens: Positive
    width: Positive
    layers: Positive
    heads: Positive
    head_width: Positive
    tokenizer: FileInfo | None = None


class Graph(Record, frozen=True, kw_only=True):
    """One graph in one precision; `files` lists `file` itself and its external data.

    split: of a student whose split is not the manifest's. keep_fp32: patterns of the modules that stayed
    float32 in a half graph.
    """

    role: Role
    precision: str
    file: str
    files: tuple[FileInfo, ...]
    split: Positive | None = None
    keep_fp32: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 in hex over the contents of the graph and its external data."""
        content = "".join(f"{info.sha256} {info.bytes}\n" for info in self.files)
        return hashlib.sha256(content.encode()).hexdigest()


class PipelineGraph(Record, frozen=True, kw_only=True):
    """A graph from noise to 8-bit images, for those who do not use the runtime; `files` as of a `Graph`."""

    steps: Positive
    precision: str
    file: str
    files: tuple[FileInfo, ...]
    decoder: str = FULL


class Decoder(Record, frozen=True, kw_only=True):
    """What a further decoder saves and what it costs, in comparison with the tokenizer's own.

    operations: its share of the floating-point operations. psnr: dB, of its images of the student's own
    sequences. fid: by number of steps, the change of the FID as a share, and its 95 % interval.
    """

    operations: Annotated[float, msgspec.Meta(gt=0)]
    psnr: float
    fid: Mapping[int, tuple[float, float, float]] = {}

    def __str__(self) -> str:
        changes = [
            f"FID {value:+.1%} [{low:+.1%}, {high:+.1%}] in {steps} step{'s' * (steps != 1)}"
            for steps, (value, low, high) in self.fid.items()
        ]
        return ", ".join([f"{self.operations:.1%} of the operations", f"PSNR {self.psnr:.1f} dB", *changes])


class Source(Record, frozen=True, kw_only=True):
    """A checkpoint file that a part was made from; `weights` names the copy in it, such as `ema`.

    repository, commit: of a file that was fetched from the Hugging Face Hub; `file` is its path there.
    """

    role: str
    file: str
    sha256: str
    bytes: Natural
    weights: str | None = None
    repository: str | None = None
    commit: str | None = None


class Weights(Record, frozen=True, kw_only=True):
    """Where the weights come from: `checkpoint`, `embedded`, or `random` with its seed."""

    kind: Literal["checkpoint", "embedded", "random"]
    seed: int | None = None
    files: tuple[Source, ...] = ()


class Manifest(Record, frozen=True, kw_only=True, dict=True):
    """All of bundle.json. `licence` to `tools` are carried as data, but for the limits in `parity`.

    recipe: what the bundle was exported from, without the keys that stand here.
    """

    schema: int
    name: str
    title: str
    created: str
    sequence: SequenceSize
    image: ImageSize
    classes: Natural
    labels: FileInfo
    text: Text | None = None
    schedules: Mapping[int, Schedule]
    teacher: Teacher | None = None
    graphs: tuple[Graph, ...]
    pipelines: tuple[PipelineGraph, ...] = ()
    decoders: Mapping[str, Decoder] = {}
    weights: Weights
    licence: Mapping[str, Any]
    published: Mapping[str, Any]
    parity: Mapping[str, Any]
    recipe: Mapping[str, Any]
    tools: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raises ValueError where the manifest contradicts itself."""
        length = self.sequence.length
        if self.sequence.split > length:
            raise ValueError(f"sequence.split is {self.sequence.split}, past the length {length}")
        self._check_condition()
        starts = self.teacher.starts if self.teacher else ()
        if self.teacher and not (starts[:1] == (0,) and starts[-1:] == (length,) and rises(starts)):
            raise ValueError(f"teacher.starts must rise from 0 to {length}, but is {list(starts)}")
        for steps, schedule in self.schedules.items():
            if fault := schedule_fault(steps, schedule, length, starts):
                raise ValueError(f"schedules.{steps}{fault}")
        for number, graph in enumerate(self.graphs):
            other = graph.role == "student" and graph.split != self.sequence.split
            if graph.split is not None and not other:
                raise ValueError(f"graphs[{number}].split is for students of another split than the sequence")
            if graph.file not in [info.file for info in graph.files]:
                raise ValueError(f"graphs[{number}].files does not list {graph.file}")
        if len(self._index) < len(self.graphs):
            raise ValueError("graphs lists one role and precision twice")
        if not self.precisions:
            raise ValueError(f"graphs needs a {' and a '.join(ROLES)} in one precision")
        for role, split in self._needed():
            precision = FLOAT32 if role in TEXT_ROLES else self.precisions[0]
            if (role, split, precision) not in self._index:
                of = f" of split {split}" if split else ""
                raise ValueError(
                    f"graphs lacks the {role}{of} in {precision}, which schedules and decoders need"
                )

    def _check_condition(self) -> None:
        """Raises ValueError unless it is classes, or a text with a student or a teacher."""
        if not self.schedules and not (self.text and self.teacher):
            raise ValueError("schedules is empty")
        if (ENCODER, None, FLOAT32) in self._index and not (self.text and self.text.tokenizer):
            raise ValueError("text.tokenizer is missing beside a text encoder")
        if bool(self.classes) is bool(self.text):
            raise ValueError("`classes` must be above 0 where there is no `text`, else 0")

    def _needed(self) -> list[tuple[str, int | None]]:
        """Role and split of every graph that schedules and decoders need."""
        splits = {schedule.split for schedule in self.schedules.values()} - {self.sequence.split, None}
        parts = [*(["student"] if self.schedules else []), *([TEACHER] if self.teacher else [])]
        roles = [*parts, *map(decoder_role, self.decoders)]
        roles += [PREFIXES[part] for part in parts] if self.text else []
        roles += [ENCODER] if self.text and self.text.tokenizer else []
        return [*(("student", split) for split in sorted(splits, key=str)), *((role, None) for role in roles)]

    @cached_property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that have a student and a decoder, in the manifest's order; where no student is
        known, a teacher and a decoder."""
        listed = dict.fromkeys(graph.precision for graph in self.graphs)
        roles = ROLES if self.schedules else (TEACHER, "decoder")
        return tuple(p for p in listed if all((role, None, p) in self._index for role in roles))

    @cached_property
    def _index(self) -> dict[tuple[str, int | None, str], Graph]:
        return {(graph.role, graph.split, graph.precision): graph for graph in self.graphs}

    def graph(self, role: str, precision: str | None = None, split: int | None = None) -> Graph:
        """The graph of a role, of the student with that split; without a precision, that of the first one.
        What runs once a text is float32 in every precision.

        BundleError if there is none.
        """
        if role != "student" or split == self.sequence.split:
            split = None
        wanted = FLOAT32 if role in TEXT_ROLES else precision or self.precisions[0]
        graph = self._index.get((role, split, wanted))
        if graph is None:
            have = ", ".join(p for r, s, p in self._index if (r, s) == (role, split))
            what = role if split is None else f"{role} of split {split}"
            raise BundleError(
                f"bundle {self.name} has no {what} in precision {wanted}", f"It has: {have or 'none'}."
            )
        return graph

    def decoder(self, name: str = FULL, precision: str | None = None) -> Graph:
        """The graph of a decoder. BundleError if there is none."""
        have = [FULL, *(other for other in self.decoders)]
        if name not in have:
            raise BundleError(f"bundle {self.name} has no decoder {name!r}", f"It has: {', '.join(have)}.")
        return self.graph(decoder_role(name), precision)

    def tensors(self, graph: Graph) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The inputs and outputs that a graph must have; see `contract`."""
        return contract(graph.role, self.sequence, self.image, self.teacher, graph.split, self.text)

    def schedule(self, steps: int | str | None = None) -> Schedule:
        """The schedule of so many steps, the shortest without a number, all from the teacher for "teacher",
        or where no student is known.

        ScheduleError if there is none.
        """
        if steps is None:
            steps = min(self.schedules, default=TEACHER)
        if steps == TEACHER and self.teacher is not None:
            return Schedule(known=(), teacher=Span(start=0, end=self.sequence.length))
        if isinstance(steps, (bool, str)) or steps not in self.schedules:
            have = ", ".join([str(n) for n in sorted(self.schedules)] + ([TEACHER] if self.teacher else []))
            raise ScheduleError(
                f"{self.name} has no schedule of {steps} steps", f"It has schedules of: {have}."
            )
        return self.schedules[steps]

    def number_of_steps(self, schedule: Schedule) -> int:
        """Student steps and the teacher's AR steps together."""
        span = schedule.teacher
        return len(schedule.known) + (len(self.teacher.steps(span)) if self.teacher and span else 0)

    def files(self) -> tuple[FileInfo, ...]:
        """Every file of the bundle that the runtime may open, each once."""
        graphs: tuple[Graph | PipelineGraph, ...] = (*self.graphs, *self.pipelines)
        listed = [self.labels, *(info for graph in graphs for info in graph.files)]
        listed += [self.teacher.codebook] if self.teacher else []
        listed += [self.text.tokenizer] if self.text and self.text.tokenizer else []
        return tuple(dict.fromkeys(listed))

    def to_json(self) -> str:
        """The text of bundle.json."""
        return to_json(self)


def decoder_role(name: str) -> str:
    """The role of the graph of a decoder, which is FULL or one of `Manifest.decoders`."""
    return "decoder" if name == FULL else f"decoder_{name}"


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
            f"not a bundle: {root} {what}",
            "Make one with `ddexport onnx MODEL`; `ddexport models` lists the models.",
        )
    manifest = manifest_from(path)
    for info in manifest.files():
        _check_file(root, info, verify)
    return manifest


def manifest_from(path: Path) -> Manifest:
    """The manifest in a bundle.json, of whose files none is looked at. Raises BundleError."""
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        again = f"Export it again: ddexport onnx MODEL -o {path.parent} --force"
        remedy = "Upgrade: pip install --upgrade ddexport" if schema > SCHEMA else again
        raise BundleError(f"the bundle has schema {schema}, and this runtime reads {SCHEMA}", remedy)
    return convert(Manifest, content, FILE_NAME, hint=DAMAGED)


def resolve(root: Path, file: str) -> Path:
    """The path of a file of the bundle. BundleError for a name that leaves it.

    A link may lead out, as in the Hub's cache: the hash of its target is always compared.
    """
    pure = PurePosixPath(file)
    if not file or pure.is_absolute() or ".." in pure.parts or "\\" in file or ":" in file:
        raise BundleError(
            f"bundle.json names a path outside the bundle: {file!r}",
            "A bundle may only name files in its own directory; do not trust this one.",
        )
    return root / pure


def file_info(path: Path, root: Path) -> FileInfo:
    """Describes `path`, which lies in `root`, reading it in pieces."""
    name = path.relative_to(root).as_posix()
    return FileInfo(file=name, sha256=sha256_of(path), bytes=path.stat().st_size)


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
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # no file can have this name
        size = None
    if size is None:
        raise BundleError(f"the bundle {root} lacks its file {info.file!r}", DAMAGED)
    if size != info.bytes:
        raise BundleError(f"{info.file} has {size} bytes, but bundle.json says {info.bytes}", DAMAGED)
    linked = not path.resolve().is_relative_to(root.resolve())
    if (verify or linked) and sha256_of(path) != info.sha256:
        raise BundleError(f"the SHA-256 of {info.file} is not the one in bundle.json", DAMAGED)
