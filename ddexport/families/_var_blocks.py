"""The transformer blocks that VAR and its distilled students share (VAR, arXiv 2404.02905, section 3.3).

Shapes: B batch, N positions, C width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.families._explicit_cache import ExplicitCache

MAX_LOG_SCALE = math.log(100)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without learned affine: the modulation takes its place."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class LayerCache:
    """Keys and values of one layer for the positions already run: [B, H, n, D] each."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class Attention(nn.Module):
    """Multi-head attention on L2-normalised queries and keys, with a learned scale a head."""

    no_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("no_bias", torch.zeros(width, device="cpu"), persistent=False)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4.0)))
        self.proj = nn.Linear(width, width)
        self.groups: tuple[int, ...] = ()  # where a student's groups start, and N; see `attend_in_groups`

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: LayerCache | ExplicitCache | None = None
    ) -> Tensor:
        # x [B, N, C]; mask [N, N] additive, that of the first group if there are groups, or None to see every
        # position
        B, N, C = x.shape
        weight = self.qkv.weight
        bias = torch.cat([self.q_bias, self.no_bias, self.v_bias]).to(weight.dtype)
        qkv = F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
        q, k, v = qkv.view(B, N, 3 * self.heads, -1).transpose(1, 2).chunk(3, dim=1)
        scale = self.log_scale.clamp(max=MAX_LOG_SCALE).exp().view(-1, 1, 1)
        # Unit length is an island: a sum of squares in half overflows, and its root scales every score.
        q, k = F.normalize(q.float(), dim=-1) * scale, F.normalize(k.float(), dim=-1)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if isinstance(cache, LayerCache):
            k, v = cache.extend(k, v)
        if isinstance(cache, ExplicitCache):
            x = cache.attend(q, k, v, mask)
        elif mask is None:
            x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        elif self.groups:
            x = attend_in_groups(q, k, v, mask.to(q.dtype), self.groups)
        else:  # with a mask the fused kernel is the slower one on a CPU
            x = (q @ k.transpose(-2, -1) + mask.to(q.dtype)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, starts: Sequence[int]) -> Tensor:
    """Attention where a position sees the positions of strictly earlier scales and itself, and no more is
    computed than it sees.

    The first group is attended to as a whole, with its mask. Each other group is one scale: its positions see
    all that comes before it, which needs no mask, and themselves, which is one product a position. The column
    of weights for that one stays where it is, on a row of zeros: to cut it off would copy all the weights.

    Args:
        q, k, v: [B, H, N, D], queries scaled.
        mask: [n, n] additive, of the first group.
        starts: where the groups start, and N: 0, n, ...

    Returns:
        [B, H, N, D].
    """
    n, zero = starts[1], torch.zeros_like(v[:, :, :1])
    outputs = [(q[:, :, :n] @ k[:, :, :n].transpose(-2, -1) + mask).softmax(-1) @ v[:, :, :n]]
    for start, end in pairwise(starts[1:]):
        queries = q[:, :, start:end]
        before = queries @ k[:, :, :start].transpose(-2, -1)
        own = (queries * k[:, :, start:end]).sum(-1, keepdim=True)
        weights = torch.cat([before, own], dim=-1).softmax(-1)  # [B, H, end - start, start + 1]
        values = torch.cat([v[:, :, :start], zero], dim=2)
        outputs.append(weights @ values + weights[..., start:] * v[:, :, start:end])
    return torch.cat(outputs, dim=2)


class Mlp(nn.Module):
    """Two linear layers around the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated; a student adds its noise-or-data rows in between."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, 4 * width)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        modulation: Tensor,  # [B, 6, C]
        mask: Tensor | None = None,  # [N, N]
        rows: Tensor | None = None,  # [B, N, C], added to the residual stream
        cache: LayerCache | ExplicitCache | None = None,
    ) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, dim=1)  # each [B, 1, C]
        x = x + self.attention(layer_norm(x) * (1 + scale1) + shift1, mask, cache) * gate1
        if rows is not None:
            x = x + rows
        return x + self.mlp(layer_norm(x) * (1 + scale2) + shift2) * gate2


class Conditioning(nn.Module):
    """All that the network takes from the class label."""

    def __init__(self, classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, width)  # the last row is the null class of guidance
        self.blocks = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(depth))
        self.head = nn.Linear(width, 2 * width)

    def forward(self, label: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """label [B] -> class embedding [B, C], [B, 6, C] for each block, [B, 2, C] for the logits."""
        embedding = self.embedding(label)
        active = F.silu(embedding)
        C = embedding.shape[-1]
        blocks = [linear(active).view(-1, 6, C) for linear in self.blocks]
        return embedding, blocks, self.head(active).view(-1, 2, C)


class ConditioningTable(nn.Module):
    """`Conditioning`, tabulated for every class: a gather in place of its matrix products."""

    def __init__(self, source: Conditioning) -> None:
        """Takes the matrices out of `source` one by one, so that memory never holds both copies."""
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(source.embedding.weight.detach())
        active = F.silu(self.embedding.weight)
        self.blocks = nn.ModuleList()
        while len(source.blocks):
            self.blocks.append(nn.Embedding.from_pretrained(_product(source.blocks[0], active)))
            del source.blocks[0]
        self.head = nn.Embedding.from_pretrained(_product(source.head, active))
        self.width = active.shape[1]

    def forward(self, label: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        blocks = [table(label).view(-1, 6, self.width) for table in self.blocks]
        return self.embedding(label), blocks, self.head(label).view(-1, 2, self.width)


class NoiseDataRows(nn.Module):
    """What a position adds for holding noise (row 0) or data (row 1): at input, blocks and heads."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, width)
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(depth + 1))

    def forward(self) -> list[Tensor]:
        """Depth + 2 tensors [2, C]: two rows to project, where the published code projects all positions."""
        rows = self.embedding.weight
        return [rows, *(linear(rows) for linear in self.projections)]


class NoiseDataTable(nn.Module):
    """`NoiseDataRows`, tabulated."""

    def __init__(self, source: NoiseDataRows) -> None:
        super().__init__()
        with torch.no_grad():
            self.rows = nn.ParameterList(nn.Parameter(rows, requires_grad=False) for rows in source())

    def forward(self) -> list[Tensor]:
        return list(self.rows)


@torch.no_grad()
def _product(linear: nn.Module, rows: Tensor) -> Tensor:
    return linear(rows)
