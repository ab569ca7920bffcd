"""A literal reading of the LlamaGen-DD student, from the published state dict and as slow as the formulas are
written.

Rotary pairs side by side and turned as complex numbers, the class position's query and key set to zero by
hand, w1 and w3 apart, both heads everywhere, and a nearest-code search over all positions. It shares nothing
with the modules but the weights, and must agree with them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ddexport.families._llamagen_models import LlamaGenStudent
    from ddexport.recipe import Recipe
    from ddexport.validate.bench.naive import Step


def literal_step(
    state: Mapping[str, Tensor],
    codes: Tensor,
    heads: int,
    split: int,
    tokens: Tensor,
    label: Tensor,
    known: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, L, Cv], label [B] -> sequence [B, L, Cv], and both heads everywhere: [B, L, V], [B, L, Cv].

    `state` has the published keys, `codes` [V, Cv] are of unit length.
    """
    L = tokens.shape[1]
    condition = state["cls_embedding.embedding_table.weight"][label]
    is_data = torch.arange(L + 1) <= known
    x = F.linear(tokens, state["tok_embeddings.weight"], state["tok_embeddings.bias"])
    x = torch.cat([condition[:, None], x], dim=1) + state["n_d_embed.weight"][is_data.long()]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    for i in range(depth):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in state.items() if k.startswith(f"layers.{i}.")}
        x = x + attention(rms_norm(x, layer["attention_norm.weight"]), layer, heads)
        y = rms_norm(x, layer["ffn_norm.weight"])
        y = F.silu(y @ layer["feed_forward.w1.weight"].T) * (y @ layer["feed_forward.w3.weight"].T)
        x = x + y @ layer["feed_forward.w2.weight"].T
    logits = rms_norm(x, state["norm.weight"]) @ state["output.weight"].T
    shift, scale = (state["final_layer_conti.scale_shift_table"] + condition[:, None])[:, :, None].unbind(1)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    embeddings = F.linear(x, state["final_layer_conti.linear.weight"], state["final_layer_conti.linear.bias"])
    logits, embeddings = logits[:, 1:], embeddings[:, 1:]

    # Kept positions: their logits point at the nearest code, their embedding is the input itself.
    nearest = torch.cdist(tokens, codes).argmin(-1)
    kept = torch.full_like(logits, -torch.inf).scatter(-1, nearest[..., None], 0.0)
    final_logits = torch.where(is_data[1:, None], kept, logits)
    final_embeddings = torch.where(is_data[1:, None], tokens, embeddings)
    sequence = torch.cat([codes[final_logits.argmax(-1)][:, :split], final_embeddings[:, split:]], dim=1)
    return sequence, logits, embeddings


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * gain


def attention(x: Tensor, layer: Mapping[str, Tensor], heads: int) -> Tensor:
    B, N, C = x.shape
    q, k, v = (
        part.view(B, N, heads, -1)
        for part in (x @ layer["attention.wqkv.weight"].T).view(B, N, 3, C).unbind(2)
    )
    q, k, v = (part.transpose(1, 2) for part in (rotated(q), rotated(k), v))
    scores = (q @ k.transpose(2, 3)) / math.sqrt(C // heads)
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    x = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return x.transpose(1, 2).reshape(B, N, C) @ layer["attention.wo.weight"].T


def rotated(x: Tensor) -> Tensor:
    """x [B, 1 + side^2, H, D]: each neighbouring pair is a complex number that row or column turns."""
    _, N, _, D = x.shape
    pairs = torch.view_as_complex(x[:, 1:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * turns(math.isqrt(N - 1), D)[:, None]).flatten(-2)
    return torch.cat([torch.zeros_like(x[:, :1]), turned], dim=1)


@functools.cache
def turns(side: int, width: int) -> Tensor:
    """The turn of each pair at each position: [side^2, width / 2] complex."""
    angles = torch.zeros(side * side, width // 2)
    for position in range(side * side):
        for pair in range(width // 2):
            place = position // side if pair < width // 4 else position % side
            angles[position, pair] = place / 10000 ** ((pair % (width // 4)) * 4 / width)
    return torch.polar(torch.ones_like(angles), angles)


def step_of(recipe: Recipe, student: LlamaGenStudent) -> Step:
    """The step of `ddexport.validate.bench.naive` for a student as loaded."""
    from ddexport.families._checkpoint import published_state

    state = published_state(student, recipe, "student")
    geometry = student.geometry
    return functools.partial(literal_step, state, student.codebook, geometry.heads, geometry.split)
