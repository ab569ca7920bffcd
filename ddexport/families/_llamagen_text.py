"""LlamaGen with a text in place of a class (text-conditional LlamaGen, arXiv 2406.06525, section 3.2).

The rows of the text stand in front of the image. They have zero queries and keys, so that every score of a
text is 0: a row of the text gets the running mean of the values, and an image position sees the whole text of
n rows as one key of score log n, whose value is their mean. That is what graphs compute; `forward` is the
published statement, padded and masked.

Shapes: B batch, T text rows (left-padded), W width of a feature, L image positions, C width, H heads, D head
width, V codebook entries, Cv code width, S positions before the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.families._explicit_cache import ExplicitCache


@dataclass(frozen=True)
class TextSize:
    """Rows of a text and width of their features; which row is the condition of the student's embeddings."""

    tokens: int
    width: int
    vector: Literal["last", "mean"] = "last"


class CaptionEmbedding(nn.Module):
    """The features of a text as rows of the transformer; `null` [T, W] are those of guidance's null text."""

    null: Tensor

    def __init__(self, size: TextSize, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("null", torch.zeros(size.tokens, size.width))
        self.fc1 = nn.Linear(size.width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:  # [B, T, W] -> [B, T, C]
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))

    def vector(self, rows: Tensor, mask: Tensor) -> Tensor:
        """One row for the whole text: [B, T, C], [B, T] -> [B, C]."""
        if self.size.vector == "last":
            return rows[:, -1]
        weight = mask.to(rows.dtype)[:, :, None]
        return (rows * weight).sum(1) / weight.sum(1)


class TextKey:
    """A text as one more key and value of a layer; takes the place of a cache.

    Args:
        value: [B, H, D], the mean of the values of its rows.
        log_count: [B], the logarithm of their number, which is the score.
    """

    def __init__(self, value: Tensor, log_count: Tensor) -> None:
        self.value, self.score = value[:, :, None], log_count[:, None, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v [B, H, N, D], mask [N, N] additive -> [B, H, N, D]."""
        scores = q @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores + mask.to(q.dtype)
        ahead = self.score.to(q.dtype).expand(-1, *scores.shape[1:3], -1)
        weights = torch.cat([ahead, scores], dim=-1).softmax(-1)
        return weights @ torch.cat([self.value.to(v.dtype), v], dim=2)


class TextRow(TextKey):
    """A text as position 0 of the images that follow it, all at once; takes the place of a cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        score = F.pad(self.score.to(q.dtype), (0, k.shape[2] - 1))
        weights = (q @ k.transpose(-2, -1) + score + mask.to(q.dtype)).softmax(-1)
        return weights @ torch.cat([self.value.to(v.dtype), v[:, :, 1:]], dim=2)


class TextCache(ExplicitCache):
    """A cache whose position 0 is the text: its value, and the score of the key, are those of all its rows.

    Args:
        keys, values, filled: as those of `ExplicitCache`.
        positions: [n] int64 of the pass.
        value: [2B, H, D]; log_count: [B], as those of `TextKey`.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        filled: Tensor,
        positions: Tensor,
        value: Tensor,
        log_count: Tensor,
    ) -> None:
        super().__init__(keys, values, filled)
        score = log_count[:, None, None, None]
        place = torch.arange(keys.shape[3], device=keys.device)
        self.is_text = positions == 0
        self.value = value[:, :, None]
        self.hidden = self.hidden + (place == 0) * score
        self.score = self.is_text * score

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        v = torch.where(self.is_text[:, None], self.value.to(v.dtype), v)
        return super().attend(q, k, v, self.score if mask is None else mask + self.score)


def text_mask(mask: Tensor, length: int) -> Tensor:
    """The published mask, additive [B, 1, T + L, T + L]: valid text rows and earlier positions are seen, and
    every position sees itself.

    mask: [B, T], 1 where a row of the text is valid.
    """
    seen = F.pad(mask != 0, (0, length), value=True)[:, None, :]
    size = seen.shape[-1]
    causal = torch.ones(size, size, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(size, dtype=torch.bool, device=mask.device)
    hidden = ~((causal & seen) | itself)
    return torch.zeros(hidden.shape, device=mask.device).masked_fill(hidden, -torch.inf)[:, None]


def with_text_rows(rotation: Tensor, tokens: int) -> Tensor:
    """A rotation [2, 1 + L, D] with so many rows in place of the first, which is zero: [2, T + L, D]."""
    return torch.cat([rotation[:, :1].expand(-1, tokens, -1), rotation[:, 1:]], dim=1)


def text_prefix(
    caption: CaptionEmbedding, blocks: Sequence[Any] | nn.ModuleList, features: Tensor, mask: Tensor,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What image positions see of a text: values [B, layers, H, D], log_count [B], condition [B, C].

    features: [B, T, W], left-padded. mask: [B, T], 1 where a row is valid. offset: [1, C], is added to rows.
    """
    rows = caption(features)
    condition = caption.vector(rows, mask)
    x = rows if offset is None else rows + offset
    weight = mask.to(x.dtype)[:, :, None]
    count = weight.cumsum(1).clamp(min=1)
    values = []
    for number, block in enumerate(blocks, 1):
        own = block.attention.values(block.attention_norm(x))
        mean = (own * weight).cumsum(1) / count
        values.append(mean[:, -1].unflatten(-1, (block.attention.heads, -1)))
        if number < len(blocks):
            x = x + block.attention.proj(mean)
            x = x + block.mlp(block.mlp_norm(x))
    return torch.stack(values, dim=1), weight.sum((1, 2)).log(), condition
