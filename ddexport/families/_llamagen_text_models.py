"""LlamaGen's student and teacher of a text in place of a class (arXiv 2406.06525, section 3.2).

Shapes: those of `_llamagen_text`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddexport.families._base import compose
from ddexport.families._llamagen_blocks import LayerCache
from ddexport.families._llamagen_models import LlamaGenStudent, LlamaGenTeacher
from ddexport.families._llamagen_text import TextKey, TextRow, text_mask, text_prefix, with_text_rows


def shared_by(images: int, *prefix: Tensor) -> list[Tensor]:
    """What is seen of P texts [P, ...] for so many images, of which as many in a row share a text."""
    return [rows.repeat_interleave(images // len(rows), 0) for rows in prefix]


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
        """As that of a class. Texts that n images in a row share may be given once: features
        [B / n, T, W]."""
        values, log_count, condition = shared_by(len(tokens), *self.prefix(features, mask))
        hidden = self._images(tokens, values, log_count, known)
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
        x, S = self._images(tokens, values, log_count, known), self.geometry.split
        return self._composed(tokens, x[:, :S], x[:, S:], condition, known)

    def _images(self, tokens: Tensor, values: Tensor, log_count: Tensor, known: Tensor) -> Tensor:
        x = self._embedded(tokens, known)
        turn, mask = self.rotation[:, 1:], self.mask[1:, 1:]
        for block, value in zip(self.blocks, values.unbind(1), strict=True):
            x = block(x, turn, mask, TextKey(value, log_count))
        return x

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
        """tokens [B, L] int64, features [B, T, W], mask [B, T] -> logits [B, L, V]; see that of a class.

        Texts that n images in a row share may be given once: features [B / n, T, W].
        """
        prefix = text_prefix(self.condition_embedding, self.blocks, features, mask)
        values, log_count, last = shared_by(len(tokens), *prefix)
        x = torch.cat([last[:, None], self.token_embedding(tokens[:, :-1])], dim=1)
        turn, visible = self.rotation[:, :-1], self.mask[:-1, :-1]
        for block, value in zip(self.blocks, values.unbind(1), strict=True):
            x = block(x, turn, visible, TextRow(value, log_count))
        return self.logits_head(self.norm(x))

    def step(  # type: ignore[override]
        self, tokens: Tensor, features: Tensor, mask: Tensor, cache: list[LayerCache]
    ) -> Tensor:
        """The logits [B, V] of the token that follows; as that of a class."""
        x, start = self.token_embedding(tokens), cache[0].length
        if start == 0:
            x = torch.cat([self.condition_embedding(features), x], dim=1)
        end, length = start + x.shape[1], self.geometry.length
        turn = with_text_rows(self.rotation, features.shape[1])[:, start:end]
        visible = text_mask(mask, length)[:, :, start:end, :end]
        for block, layer in zip(self.blocks, cache, strict=True):
            x = block(x, turn, visible, layer)
        return self.logits_head(self.norm(x))[:, -1]

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
