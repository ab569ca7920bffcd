"""The transformer blocks that LlamaGen and its distilled students share (LlamaGen, arXiv 2406.06525, section
2.2: Llama's blocks, with a rotary embedding of row and column).

Shapes: B batch, N positions (class position and tokens), C width, H heads, D head width.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10000.0
RMS_EPSILON = 1e-5


def rotary_table(side: int, head_width: int) -> np.ndarray:
    """Cosine and sine of each pair's angle at each position: [1 + side^2, D / 2, 2] float32.

    The first half of a head's pairs turns with the row, the second with the column. The class position in
    front has zeros, not the identity: it makes its query and key zero vectors, so that everyone attends to it
    with score 0, and it to itself alone.
    """
    quarter = head_width // 4
    frequencies = ROTARY_BASE ** -(np.arange(quarter) / quarter)
    rows, columns = np.divmod(np.arange(side * side), side)
    angles = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return np.concatenate([np.zeros_like(table[:1]), table]).astype(np.float32)


def rotation(side: int, head_width: int) -> Tensor:
    """`rotary_table` as `Attention` applies it, [2, 1 + side^2, D]: x * first + swap(x) * second.

    A pair is (i, i + D/2) of a head, see `halves_from_pairs`. The scale of the scores, D^-1/2, is in it:
    query and key carry half of it each.
    """
    cosine, sine = np.moveaxis(rotary_table(side, head_width), -1, 0) * head_width**-0.25
    both = np.stack([np.concatenate([cosine, cosine], 1), np.concatenate([-sine, sine], 1)])
    return torch.from_numpy(both.astype(np.float32))


def halves_from_pairs(width: int, heads: int) -> Tensor:
    """For each row of our qkv matrix the row of the published one: [3C] int64.

    Published heads keep the two numbers of a rotary pair side by side; ours keep all first numbers before all
    second ones, which rotates with a split and a concatenation instead of strided copies. Query and key are
    reordered alike, so every score stays the sum of the same products.
    """
    D = width // heads
    head = np.arange(D).reshape(-1, 2).T.ravel()
    query_or_key = (np.arange(heads)[:, None] * D + head).ravel()
    return torch.from_numpy(
        np.concatenate([query_or_key, width + query_or_key, np.arange(width) + 2 * width])
    )


def causal_mask(length: int) -> Tensor:
    """Additive [N, N]: 0 at the position itself and before, -inf after."""
    return torch.from_numpy(np.triu(np.full((length, length), -np.inf, dtype=np.float32), k=1))


class LayerCache:
    """Keys and values of one layer for the positions already run, in memory taken once.

    Raster order adds one position at a time: appending by concatenation would copy all of them each time.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._kept: Tensor | None = None  # [2, B, H, capacity, D]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [B, H, n, D] each, and returns all there are: views of [B, H, length, D]."""
        if self._kept is None:
            B, H, _, D = keys.shape
            self._kept = keys.new_empty(2, B, H, self.capacity, D)
        end = self.length + keys.shape[2]
        self._kept[:, :, :, self.length : end] = torch.stack([keys, values])
        self.length = end
        return self._kept[0, :, :, :end], self._kept[1, :, :, :end]


class Attends(Protocol):
    """What attends in place of the plain softmax: a cache of a graph, or a text in front."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v [B, H, N, D], mask [N, n] additive -> [B, H, N, D]."""


class Attention(nn.Module):
    """Multi-head attention with rotary positions, no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, turn: Tensor, mask: Tensor, cache: LayerCache | Attends | None = None
    ) -> Tensor:
        # x [B, N, C]; turn [2, N, D]; mask [N, n] additive, n the positions seen, cached ones included
        B, N, C = x.shape
        H = self.heads
        qk, v = self.qkv(x).view(B, N, 3 * H, -1).transpose(1, 2).split([2 * H, H], dim=1)
        first, second = qk.chunk(2, dim=-1)
        # The rotation is an island: its float32 table is rounded once, with the result.
        qk = (qk * turn[0] + torch.cat([second, first], dim=-1) * turn[1]).to(v.dtype)
        q, k = qk.chunk(2, dim=1)
        if isinstance(cache, LayerCache):
            k, v = cache.extend(k, v)
        if cache is not None and not isinstance(cache, LayerCache):
            x = cache.attend(q, k, v, mask)
        else:
            x = (q @ k.transpose(-2, -1) + mask.to(q.dtype)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))

    def values(self, x: Tensor) -> Tensor:
        """The values alone, of all heads: [B, N, C] -> [B, N, C]. Queries and keys are computed with them: a
        product of its own would store these weights twice, beside other graphs that share them."""
        return self.qkv(x)[..., -x.shape[-1] :]


class SwiGlu(nn.Module):
    """output(silu(gate(x)) * value(x)), gate and value in one product unless separated, no bias."""

    gate_and_value: nn.Linear | nn.ModuleList

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(width, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.gate_and_value, nn.ModuleList):
            gate, value = (half(x) for half in self.gate_and_value)
        else:
            gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)

    def separate(self) -> None:
        """Makes gate and value, in place, two products that share the weights: engines copy the halves of one
        before they go on. Outputs stay equal."""
        assert isinstance(self.gate_and_value, nn.Linear)
        halves = nn.ModuleList()
        for weight in self.gate_and_value.weight.detach().chunk(2):
            half = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            half.weight = nn.Parameter(weight, requires_grad=False)
            halves.append(half)
        self.gate_and_value = halves


class RmsNorm(nn.Module):
    """x over its root mean square, times a gain. In these words, not those of `nn.RMSNorm`, engines find the
    pattern that they have one kernel for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # [..., C]
        return x / (x.pow(2).mean(-1, keepdim=True) + RMS_EPSILON).sqrt() * self.weight


class Block(nn.Module):
    """Attention and SwiGLU, each on the normalised stream and added to it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = RmsNorm(width)
        self.mlp = SwiGlu(width, hidden)

    def forward(
        self, x: Tensor, turn: Tensor, mask: Tensor, cache: LayerCache | Attends | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, mask, cache)  # [B, N, C]
        return x + self.mlp(self.mlp_norm(x))
