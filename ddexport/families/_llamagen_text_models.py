"""LlamaGen's student and teacher of a text in place of a class (arXiv 2406.06525, section 3.2).

Shapes: those of `_llamagen_text`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddexport.families._base import compose
from ddexport.families._llamagen_blocks import LayerCache
from ddexport.families._llamagen_models import LlamaGenStudent, LlamaGenTeacher
from ddexport.families._llamagen_text import TextKey, text_mask, text_prefix, with_text_rows


class LlamaGenTextStudent(LlamaGenStudent):
    """A student of a text: as published, but for what was never published there (docs/text-to-image.md).

    Rows of the text count as data, and the condition of the embeddings is one row of the embedded text.
    """

    def forward(  # type: ignore[override]
        self, tokens: Tensor, features: Tensor, mask: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, L, Cv], features [B, T, W], mask [B, T], known [B] -> as that of a class."""
        S = self.geometry.split
        hidden, condition = self.trunk(tokens, features, mask, known)
        return self._composed(tokens, hidden[:, :S], hidden[:, S:], condition, known)

    def heads(  # type: ignore[override]
        self, tokens: Tensor, features: Tensor, mask: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden, condition = self.trunk(tokens, features, mask, known)
        return self.logits(hidden), self.embeddings(hidden, condition)

    def trunk(  # type: ignore[override]
        self, tokens: Tensor, features: Tensor, mask: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What both heads start from [B, L, C], and the condition [B, C], over the padded, masked text."""
        rows = self.condition_embedding(features)
        x = torch.cat([rows + self._data, self._embedded(tokens, known)], dim=1)
        turn, visible = with_text_rows(self.rotation, rows.shape[1]), text_mask(mask, tokens.shape[1])
        for block in self.blocks:
            x = block(x, turn, visible)
        return x[:, rows.shape[1] :], self.condition_embedding.vector(rows, mask)

    def prefix(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """features [B, T, W], mask [B, T] -> values [B, layers, H, D], log_count [B], condition [B, C]."""
        return text_prefix(self.condition_embedding, self.blocks, features, mask, self._data)

    def behind(
        self, tokens: Tensor, values: Tensor, log_count: Tensor, condition: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` gives, from what `prefix` gives of the text: L positions, L + 1 keys."""
        x = self._embedded(tokens, known)
        turn, mask = self.rotation[:, 1:], self.mask[1:, 1:]
        for block, value in zip(self.blocks, values.unbind(1), strict=True):
            x = block(x, turn, mask, TextKey(value, log_count))
        S = self.geometry.split
        return self._composed(tokens, x[:, :S], x[:, S:], condition, known)

    @property
    def _data(self) -> Tensor:
        return self.noise_or_data_embedding.weight[1:]

    def _embedded(self, tokens: Tensor, known: Tensor) -> Tensor:
        noise, data = self.noise_or_data_embedding.weight.chunk(2)
        is_data = (torch.arange(tokens.shape[1], device=tokens.device) < known[:, None])[:, :, None]
        return self.token_embedding(tokens) + torch.where(is_data, data, noise)

    def _composed(
        self, tokens: Tensor, before: Tensor, after: Tensor, condition: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, embeddings = self.logits(before), self.embeddings(after, condition)
        return compose(tokens, logits, embeddings, self.codebook, known)


class LlamaGenTextTeacher(LlamaGenTeacher):
    """The auto-regressive model behind a text. Its first token comes from the last row of the text."""

    def forward(self, tokens: Tensor, features: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """tokens [B, L] int64, features [B, T, W], mask [B, T] -> logits [B, L, V]; see that of a class."""
        cache = [None] * len(self.blocks)
        return self._logits(tokens[:, :-1], features, mask, cache)[:, -tokens.shape[1] :]

    def step(  # type: ignore[override]
        self, tokens: Tensor, features: Tensor, mask: Tensor, cache: list[LayerCache]
    ) -> Tensor:
        """The logits [B, V] of the token that follows; as that of a class."""
        return self._logits(tokens, features, mask, cache)[:, -1]

    def pair(self, features: Tensor, mask: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The null text has the rows of the prompt's own mask, so that it depends on the prompt's length."""
        null = self.condition_embedding.null.expand_as(features)
        return torch.cat([features, null]), torch.cat([mask, mask])

    def prefix(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a student's gives, with the null text beside the text: values [B, 2, layers, H, D], log_count
        [B], condition [B, 2, C], which is the last row."""
        both = text_prefix(self.condition_embedding, self.blocks, *self.pair(features, mask))
        values, log_count, condition = (rows.unflatten(0, (2, -1)).transpose(0, 1) for rows in both)
        return values, log_count[:, 0], condition

    def _first_row(self, label: Tensor) -> Tensor:
        """The last row of the text, which `extend` gets in place of a label, with caches of a text."""
        return label

    def new_cache(self) -> list[LayerCache]:
        return [LayerCache(self.geometry.text.tokens + self.geometry.length) for _ in self.blocks]

    def _logits(
        self, tokens: Tensor, features: Tensor, mask: Tensor, cache: Sequence[LayerCache | None]
    ) -> Tensor:
        x, start = self.token_embedding(tokens), cache[0].length if cache[0] else 0
        if start == 0:
            x = torch.cat([self.condition_embedding(features), x], dim=1)
        end, length = start + x.shape[1], self.geometry.length
        turn = with_text_rows(self.rotation, features.shape[1])[:, start:end]
        visible = text_mask(mask, length)[:, :, start:end, :end]
        for block, layer in zip(self.blocks, cache, strict=True):
            x = block(x, turn, visible, layer)
        return self.logits_head(self.norm(x))
