"""What a graph computes in half precision and what stays float32, as data: the one place that says so.

A *region* is a module that computes in half: its input is cast on the way in, its output back to float32 on
the way out, its weights are half. Everything outside a region is float32: the residual streams of student
and decoder, norms, modulation, heads, argmax, codebook, embeddings and tables, the quantizer (resize and
phi), the attention products of the decoder, the last convolution and the clamp. Inside the regions
the blocks state their own islands (unit length of queries and keys, rotation). docs/export.md gives the
reasons and the figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

FLOAT32 = "fp32"
HALVES = ("fp16", "bf16")
INT8 = "int8"
PRECISIONS = (FLOAT32, *HALVES, INT8)
"""In the order of a manifest: the first one there is the runtime's default."""

REGIONS = (
    # Both families' transformers, students and teachers: the products, and what lies between two of them.
    "blocks.*.attention",
    "blocks.*.mlp",
    # The decoder: each convolution but the last one is a region of its own.
    "post_quant_conv",
    "decoder.conv_in",
    "decoder.*.conv[12]",
    "decoder.*.shortcut",
    "decoder.*.qkv",
    "decoder.*.proj",
    "decoder.*.resample.conv",
    # A small decoder, in the same way.
    "conv_in",
    "levels.*.conv[12]",
    "narrow.*",
)
"""Paths of the modules that compute in half."""

ISLANDS = ("*.attention.log_scale",)
"""Weights inside a region that stay float32: an exponent's rounding would be every score's."""

BORROWED = ("mask",)
"""Tensors outside the regions that are used in there alone: half, so that no block has to cast them."""


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether the dotted path is one of the patterns (`*` and `?` match dots too)."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def lies_in(path: str, patterns: Iterable[str]) -> bool:
    """Whether the path, or a module that it lies in, is one of the patterns."""
    patterns = tuple(patterns)
    parts = path.split(".")
    return any(matches(".".join(parts[:n]), patterns) for n in range(1, len(parts) + 1))
