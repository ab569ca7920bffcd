"""The tensors of each graph of a bundle, and the small records that the manifest is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddexport.runtime.schedules import Teacher

TEACHER = "teacher"
BATCH = "batch"


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

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with numbers in place of names."""
        return tuple(size if isinstance(size, int) else sizes[size] for size in self.shape)


def dynamic_sizes(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """The names of the dynamic dimensions of some tensors, each once, in the order of appearance."""
    return tuple(dict.fromkeys(size for spec in specs for size in spec.shape if isinstance(size, str)))


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


def contract(
    role: str,
    sequence: SequenceSize,
    image: ImageSize,
    teacher: Teacher | None = None,
    split: int | None = None,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs that docs/bundle.md promises for a role; the same in every precision.

    teacher: needed for its role. split: of a student whose split is not that of `sequence`.
    """
    latent = ("batch", sequence.length, sequence.width)
    if role == "student":
        return (
            TensorSpec("tokens", "float32", latent),
            TensorSpec("label", "int64", ("batch",)),
            TensorSpec("known", "int64", ("batch",)),
        ), (
            TensorSpec("sequence", "float32", latent),
            TensorSpec("logits", "float32", ("batch", split or sequence.split, sequence.codebook)),
        )
    if role == TEACHER:
        assert teacher is not None  # `check` has seen to it
        return _teacher_contract(sequence, teacher)
    picture = ("batch", image.channels, image.height, image.width)
    return (TensorSpec("sequence", "float32", latent),), (TensorSpec("image", "float32", picture),)


def _teacher_contract(
    sequence: SequenceSize, teacher: Teacher
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    names = [f"{what}_{layer}" for layer in range(teacher.layers) for what in ("key", "value")]
    # 2: the conditional and the unconditional rows of classifier-free guidance.
    cache = (2, "batch", teacher.heads, "capacity", teacher.head_width)
    fresh = (2, "batch", teacher.heads, "new", teacher.head_width)
    return (
        TensorSpec("tokens", "int64", ("batch", sequence.length)),
        TensorSpec("label", "int64", ("batch",)),
        TensorSpec("positions", "int64", ("new",)),
        TensorSpec("guidance", "float32", ("batch",)),
        TensorSpec("filled", "int64", (1,)),
        *(TensorSpec(name, "float32", cache) for name in names),
    ), (
        TensorSpec("logits", "float32", ("batch", "new", sequence.codebook)),
        *(TensorSpec(f"new_{name}", "float32", fresh) for name in names),
    )
