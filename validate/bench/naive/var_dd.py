"""A literal reading of the VAR-DD student, as slow as the formulas are written.

Dense noise-or-data projections over all positions, the modulation computed from the class embedding in every
call, both heads everywhere, and a nearest-code search over all positions. It takes a `VarStudent`'s weights
and must agree with it: each thing that `VarStudent` leaves out is shown to change nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ddexport.families._var_blocks import Conditioning, NoiseDataRows
from ddexport.families.var_dd import VarStudent

if TYPE_CHECKING:
    from ddexport.recipe import Recipe
    from ddexport.validate.bench.naive import Step


def literal_step(
    student: VarStudent, tokens: Tensor, label: Tensor, known: int
) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, L, Cv], label [B] -> sequence [B, L, Cv], and both heads everywhere: [B, L, V], [B, L,
    Cv]."""
    conditioning, rows = student.conditioning, student.noise_or_data
    assert isinstance(conditioning, Conditioning) and isinstance(rows, NoiseDataRows)
    B, L, _ = tokens.shape
    S, codes = student.geometry.split, student.codebook
    condition = conditioning.embedding(label)
    is_data = torch.arange(L + 1) <= known
    noise_or_data = rows.embedding(is_data.long()).expand(B, L + 1, -1)

    x = torch.cat([condition[:, None] + student.start, student.token_embedding(tokens)], dim=1)
    x = x + student.level_embedding(student.levels) + student.positions + noise_or_data
    for i, block in enumerate(student.blocks):
        modulation = conditioning.blocks[i](F.silu(condition)).view(B, 6, 1, -1)
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(1)
        normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + block.attention(normal * (1 + scale1) + shift1, student.mask) * gate1
        x = x + rows.projections[i](noise_or_data)
        normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x = x + block.mlp(normal * (1 + scale2) + shift2) * gate2
    x = (x + rows.projections[-1](noise_or_data))[:, 1:]

    normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    scale, shift = conditioning.head(F.silu(condition)).view(B, 2, 1, -1).unbind(1)
    logits = student.logits_head(normal * (1 + scale) + shift)
    shift, scale = (student.embedding_modulation + condition[:, None])[:, :, None].unbind(1)
    embeddings = student.embedding_head(normal * (1 + scale) + shift)

    # Kept positions: their logits point at the nearest code, their embedding is the input itself.
    nearest = torch.cdist(tokens, codes).argmin(-1)
    kept = torch.full_like(logits, -torch.inf).scatter(-1, nearest[..., None], 0.0)
    final_logits = torch.where(is_data[1:, None], kept, logits)
    final_embeddings = torch.where(is_data[1:, None], tokens, embeddings)
    sequence = torch.cat([codes[final_logits.argmax(-1)][:, :S], final_embeddings[:, S:]], dim=1)
    return sequence, logits, embeddings


def step_of(recipe: Recipe, student: VarStudent) -> Step:
    """The step of `ddexport.validate.bench.naive` for a student as loaded."""
    return partial(literal_step, student)
