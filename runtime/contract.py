"""The inputs and outputs of the graphs: what docs/bundle.md promises for each role."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ddexport.runtime.bundle import ImageSize, SequenceSize, Teacher, Text


class TensorSpec(NamedTuple):
    """An input or output of a graph; a dimension that is a name, such as `batch`, is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def contract(
    role: str,
    sequence: SequenceSize,
    image: ImageSize,
    teacher: Teacher | None = None,
    split: int | None = None,
    text: Text | None = None,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs that docs/bundle.md promises for a role; the same in every precision.

    teacher, text: needed for their roles. split: of a student whose split is not that of `sequence`.
    """
    latent = TensorSpec("sequence", "float32", ("batch", sequence.length, sequence.width))
    batch: tuple[int | str, ...] = ("batch",)
    if role == "text_encoder":
        assert text is not None  # `Manifest` has seen to it, and below
        words = tuple(
            TensorSpec(name, "int64", ("batch", "tokens")) for name in ("input_ids", "attention_mask")
        )
        return words, (TensorSpec("hidden", "float32", ("batch", "tokens", text.width)),)
    if role.endswith("_prefix"):
        assert text is not None
        features = TensorSpec("features", "float32", ("batch", text.tokens, text.width))
        mask = TensorSpec("features_mask", "int64", ("batch", text.tokens))
        return (features, mask), _condition(text, "teacher" if role == "teacher_prefix" else "student")
    if role == "student":
        codes = split or sequence.split
        return (
            latent._replace(name="latents"),
            *_condition(text, role),
            TensorSpec("known", "int64", batch),
        ), (
            latent,
            TensorSpec("tokens", "int64", ("batch", codes)),
            TensorSpec("logits", "float32", ("batch", codes, sequence.codebook)),
        )
    if role.startswith("decoder"):
        shape = ("batch", image.channels, image.height, image.width)
        return (latent,), (TensorSpec("image", "float32", shape),)
    assert teacher is not None  # `Manifest` has seen to it
    names = [f"{what}_{layer}" for layer in range(teacher.layers) for what in ("key", "value")]
    # 2: the conditional and the unconditional rows of classifier-free guidance.
    cache = (2, "batch", teacher.heads, "capacity", teacher.head_width)
    fresh = (2, "batch", teacher.heads, "new", teacher.head_width)
    return (
        TensorSpec("tokens", "int64", ("batch", sequence.length)),
        *_condition(text, role),
        TensorSpec("positions", "int64", ("new",)),
        TensorSpec("guidance", "float32", batch),
        TensorSpec("filled", "int64", (1,)),
        *(TensorSpec(name, "float32", cache) for name in names),
    ), (
        TensorSpec("logits", "float32", ("batch", "new", sequence.codebook)),
        *(TensorSpec(f"new_{name}", "float32", fresh) for name in names),
    )


def _condition(text: Text | None, role: str) -> tuple[TensorSpec, ...]:
    """What a student or a teacher is told of the class, or of the text by its prefix graph."""
    if text is None:
        return (TensorSpec("label", "int64", ("batch",)),)
    # 2: the text and the null text of guidance.
    batch: tuple[int | str, ...] = ("batch", 2) if role == "teacher" else ("batch",)
    return (
        TensorSpec("values", "float32", (*batch, text.layers, text.heads, text.head_width)),
        TensorSpec("log_count", "float32", ("batch",)),
        TensorSpec("condition", "float32", (*batch, text.heads * text.head_width)),
    )
