"""LlamaGen's student and teacher (Distilled Decoding, arXiv 2412.17153; LlamaGen, arXiv 2406.06525).

Shapes: B batch, L positions, C width, V codebook entries, Cv code width, S positions before the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.families._base import Student, Teacher, compose
from ddexport.families._explicit_cache import ExplicitCache, causal
from ddexport.families._llamagen_blocks import Block, LayerCache, RmsNorm, causal_mask, rotation
from ddexport.families._llamagen_text import CaptionEmbedding, TextSize

HIDDEN_MULTIPLE = 256


@dataclass(frozen=True)
class LlamaGenGeometry:
    """Sizes of a LlamaGen transformer: `side` is that of the token map; `text` takes the place of classes."""

    depth: int
    width: int
    heads: int
    side: int
    classes: int
    codebook: int
    code_width: int
    split: int
    text: TextSize | None = None

    @property
    def length(self) -> int:
        return self.side * self.side

    @property
    def starts(self) -> list[int]:
        """Where the AR steps start, and the length: every token is a step."""
        return list(range(self.length + 1))

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Llama's rule: two thirds of 4C, rounded up to a multiple of 256."""
        return -(-(8 * self.width // 3) // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE

    def blocks(self) -> nn.ModuleList:
        return nn.ModuleList(Block(self.width, self.heads, self.hidden) for _ in range(self.depth))

    def condition_embedding(self) -> nn.Module:
        """Of a class, whose table has a last row for guidance's null class; or of a text."""
        if self.text is None:
            return nn.Embedding(self.classes + 1, self.width)
        return CaptionEmbedding(self.text, self.width)


class LlamaGenStudent(Student):
    """From noise (or noise behind known data) to the whole token sequence in one pass.

    A position reads its own vector and predicts its own token: unlike the teacher's, its output is not
    shifted.
    """

    mask: Tensor
    rotation: Tensor

    def __init__(self, geometry: LlamaGenGeometry) -> None:
        super().__init__()
        C, L = geometry.width, geometry.length
        self.geometry = geometry
        self.condition_embedding = geometry.condition_embedding()  # its null condition is not used
        self.token_embedding = nn.Linear(geometry.code_width, C)
        self.noise_or_data_embedding = nn.Embedding(2, C)
        self.blocks = geometry.blocks()
        self.norm = RmsNorm(C)
        self.logits_head = nn.Linear(C, geometry.codebook, bias=False)
        self.embedding_modulation = nn.Parameter(torch.zeros(2, C))  # shift, scale
        self.embedding_head = nn.Linear(C, geometry.code_width)
        self.register_buffer(
            "codebook", torch.zeros(geometry.codebook, geometry.code_width), persistent=False
        )
        self.register_buffer("rotation", rotation(geometry.side, geometry.head_width), persistent=False)
        self.register_buffer("mask", causal_mask(L + 1), persistent=False)

    def forward(self, tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, L, Cv], label [B], known [B] -> sequence [B, L, Cv], tokens [B, S], logits [B, S, V]."""
        S = self.geometry.split
        hidden, embedding = self.trunk(tokens, label, known)
        logits = self.logits(hidden[:, :S])
        embeddings = self.embeddings(hidden[:, S:], embedding)
        return compose(tokens, logits, embeddings, self.codebook, known)

    def heads(self, tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Both heads at every position: logits [B, L, V], embeddings [B, L, Cv]."""
        hidden, embedding = self.trunk(tokens, label, known)
        return self.logits(hidden), self.embeddings(hidden, embedding)

    def trunk(self, tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """What both heads start from [B, L, C], and the class embedding [B, C]."""
        embedding = self.condition_embedding(label)
        noise, data = self.noise_or_data_embedding.weight.chunk(2)
        # The class position is one more known position in front.
        is_data = (torch.arange(tokens.shape[1] + 1, device=tokens.device) <= known[:, None])[:, :, None]
        x = torch.cat([embedding[:, None], self.token_embedding(tokens)], dim=1)
        x = x + torch.where(is_data, data, noise)
        for block in self.blocks:
            x = block(x, self.rotation, self.mask)
        return x[:, 1:], embedding

    def logits(self, hidden: Tensor) -> Tensor:
        return self.logits_head(self.norm(hidden))

    def embeddings(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (self.embedding_modulation + embedding[:, None]).chunk(2, dim=1)
        normal = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return self.embedding_head(normal * (1 + scale) + shift)


class TokensBefore(nn.Module):
    """What the LlamaGen teacher reads at a position: the token before it. Position 0 gets one to ignore."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # [B, L], [n] -> [B, n]
        return tokens.index_select(1, (positions - 1).clamp(min=0))


class LlamaGenTeacher(Teacher):
    """The auto-regressive model: token by token in raster order, each from the tokens before it."""

    family = "llamagen_dd"
    guidance = "constant"
    mask: Tensor
    rotation: Tensor

    def __init__(self, geometry: LlamaGenGeometry) -> None:
        super().__init__()
        C, L = geometry.width, geometry.length
        self.geometry = geometry
        self.condition_embedding = geometry.condition_embedding()
        self.token_embedding = nn.Embedding(geometry.codebook, C)
        self.blocks = geometry.blocks()
        self.norm = RmsNorm(C)
        self.logits_head = nn.Linear(C, geometry.codebook, bias=False)
        self.register_buffer("rotation", rotation(geometry.side, geometry.head_width), persistent=False)
        self.register_buffer("mask", causal_mask(L + 1), persistent=False)

    def forward(self, tokens: Tensor, label: Tensor) -> Tensor:
        """All positions at once, for training: tokens [B, L] int64, label [B] -> logits [B, L, V].

        The logits of a token come from the position before it; the last token is not read.
        """
        x = torch.cat([self.condition_embedding(label)[:, None], self.token_embedding(tokens[:, :-1])], dim=1)
        return self.logits_head(self.norm(self._run(x, 0, [None] * len(self.blocks))))

    def step(self, tokens: Tensor, label: Tensor, cache: list[LayerCache]) -> Tensor:
        """The logits [B, V] of the token that follows `tokens`.

        Args:
            tokens: [B, n] int64, those chosen since the last call with this cache: one, or at the first call
                a prefix of any length, none included.
            label: [B] int64, read at the first call; `classes` is the null class of guidance.
            cache: from `new_cache`, for one batch and one sequence.
        """
        start = cache[0].length
        x = self.token_embedding(tokens)
        if start == 0:
            x = torch.cat([self.condition_embedding(label)[:, None], x], dim=1)
        x = self._run(x, start, cache)
        return self.logits_head(self.norm(x[:, -1]))

    def reader(self, tokenizer: nn.Module) -> TokensBefore:
        """The tokenizer is not needed: this teacher has a table of its own."""
        return TokensBefore()

    def extend(
        self, inputs: Tensor, label: Tensor, positions: Tensor, past: Sequence[ExplicitCache]
    ) -> Tensor:
        """The new positions see each other causally."""
        is_first = (positions == 0)[:, None]
        x = torch.where(is_first, self._first_row(label)[:, None], self.token_embedding(inputs))
        turn, mask = self.rotation.index_select(1, positions), causal(positions)
        for block, layer in zip(self.blocks, past, strict=True):
            x = block(x, turn, mask, layer)
        return self.logits_head(self.norm(x))

    def _first_row(self, label: Tensor) -> Tensor:
        """What stands at position 0: [B, C]."""
        return self.condition_embedding(label)

    def new_cache(self) -> list[LayerCache]:
        return [LayerCache(self.geometry.length) for _ in self.blocks]

    def _run(self, x: Tensor, start: int, cache: Sequence[LayerCache | None]) -> Tensor:
        end = start + x.shape[1]
        turn, mask = self.rotation[:, start:end], self.mask[start:end, :end]
        for block, layer in zip(self.blocks, cache, strict=True):
            x = block(x, turn, mask, layer)
        return x


def guided(logits: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: [2B, ...], conditional rows before unconditional ones -> [B, ...].

    A scale of 1 is the conditional model, and so is the same at every position; VAR counts from 0.
    """
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
