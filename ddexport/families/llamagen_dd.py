"""LlamaGen and its distilled students (Distilled Decoding, arXiv 2412.17153; LlamaGen, arXiv 2406.06525).

Shapes: B batch, L positions, C width, V codebook entries, Cv code width, S positions before the split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.families._base import (
    Family,
    GeometryError,
    Layout,
    Student,
    Teacher,
    check_steps,
    compose,
    renamed,
)
from ddexport.families._explicit_cache import ExplicitCache, causal
from ddexport.families._llamagen_blocks import (
    Block,
    LayerCache,
    RmsNorm,
    causal_mask,
    halves_from_pairs,
    rotary_table,
    rotation,
)
from ddexport.families._llamagen_text import (
    CaptionEmbedding,
    TextKey,
    TextSize,
    text_mask,
    text_prefix,
    with_text_rows,
)
from ddexport.families._llamagen_tokenizer import RasterTokenizer
from ddexport.families._vq_codec import codec_of_recipe

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

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


def guided(logits: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: [2B, ...], conditional rows before unconditional ones -> [B, ...].

    A scale of 1 is the conditional model, and so is the same at every position; VAR counts from 0.
    """
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


class LlamaGenFamily(Family):
    """Reads recipes whose `model` has depth, width and heads."""

    def geometry(self, recipe: Recipe) -> LlamaGenGeometry:
        """Raises `GeometryError` if the keys are not these or do not fit each other."""
        wrong = {"depth", "width", "heads"} ^ set(recipe.model)
        if wrong:
            raise GeometryError(
                f"recipe {recipe.name}: model has wrong or missing keys: {', '.join(sorted(wrong))}",
                "family llamagen_dd needs exactly depth, width and heads",
            )
        sequence, side = recipe.sequence, math.isqrt(recipe.sequence.length)
        if side * side != sequence.length:
            raise GeometryError(
                f"recipe {recipe.name}: sequence.length {sequence.length} is not a square",
                "the token map is square, and the length the square of its side",
            )
        sizes: dict[str, Any] = dict(recipe.model)
        text = recipe.condition
        geometry = LlamaGenGeometry(
            side=side,
            classes=recipe.classes,
            codebook=sequence.codebook,
            code_width=sequence.width,
            split=sequence.split,
            text=TextSize(text.tokens, text.width, text.vector or "last") if text else None,
            **sizes,
        )
        if geometry.width % (4 * geometry.heads):
            raise GeometryError(
                f"recipe {recipe.name}: {geometry.heads} heads do not fit a width of {geometry.width}",
                "the width is heads times a multiple of four: rotary pairs for row and column",
            )
        check_steps(recipe, geometry.starts)
        return geometry

    def _build(self, recipe: Recipe, role: str) -> nn.Module:
        geometry = self.geometry(recipe)
        if role == "student":
            return (LlamaGenTextStudent if geometry.text else LlamaGenStudent)(geometry).eval()
        if role == "teacher":
            return (LlamaGenTextTeacher if geometry.text else LlamaGenTeacher)(geometry).eval()
        codec = codec_of_recipe(recipe, geometry.side)
        return RasterTokenizer(codec, geometry.codebook, geometry.code_width, geometry.side).eval()

    def _layout(self, recipe: Recipe, role: str) -> Layout:
        if role == "tokenizer":
            return Layout(
                published=_published_tokenizer_keys,
                recomputable={r"quantize\.codebook_used": lambda _: True},  # a training statistic
            )
        geometry = self.geometry(recipe)
        order = halves_from_pairs(geometry.width, geometry.heads)
        table = torch.from_numpy(rotary_table(geometry.side, geometry.head_width))
        return Layout(
            published=_published_transformer_keys,
            # Teachers of older training code keep their rotary table, perhaps in half precision.
            recomputable={r"freqs_cis": lambda t: t.shape == table.shape and near(t, table)},
            rows=lambda key: order if key.endswith(".qkv.weight") else None,
        )


FAMILY = LlamaGenFamily

TRANSFORMER_KEYS = (
    (r"^condition_embedding\.weight$", "cls_embedding.embedding_table.weight"),
    (r"^condition_embedding\.null$", "cls_embedding.uncond_embedding"),
    (r"^condition_embedding\.fc", "cls_embedding.cap_proj.fc"),
    (r"^token_embedding\.", "tok_embeddings."),
    (r"^noise_or_data_embedding\.", "n_d_embed."),
    (r"^blocks\.", "layers."),
    (r"\.attention\.qkv\.", ".attention.wqkv."),
    (r"\.attention\.proj\.", ".attention.wo."),
    (r"\.mlp_norm\.", ".ffn_norm."),
    (r"\.mlp\.output\.", ".feed_forward.w2."),
    (r"^logits_head\.", "output."),
    (r"^embedding_modulation$", "final_layer_conti.scale_shift_table"),
    (r"^embedding_head\.", "final_layer_conti.linear."),
)

TOKENIZER_KEYS = (
    (r"^embedding\.", "quantize.embedding."),
    (r"^(encoder|decoder)\.levels\.", r"\1.conv_blocks."),
    (r"^(encoder\.conv_blocks\.\d+)\.resample\.", r"\1.downsample."),
    (r"^(decoder\.conv_blocks\.\d+)\.resample\.", r"\1.upsample."),
    (r"\.blocks\.", ".res."),
    (r"\.attentions\.", ".attn."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.proj\.", ".proj_out."),
)


def near(values: Tensor, expected: Tensor) -> bool:
    return bool((values - expected).abs().max() < 1e-2)


def _published_transformer_keys(key: str) -> tuple[str, ...]:
    key = renamed(key, TRANSFORMER_KEYS)
    parts = ("feed_forward.w1", "feed_forward.w3")
    return tuple(key.replace("mlp.gate_and_value", part) for part in parts) if "gate_and" in key else (key,)


def _published_tokenizer_keys(key: str) -> tuple[str, ...]:
    key = renamed(key, TOKENIZER_KEYS)
    return tuple(re.sub(r"\.qkv\.", f".{part}.", key) for part in "qkv") if ".qkv." in key else (key,)
