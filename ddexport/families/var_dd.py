"""VAR and its distilled students (Distilled Decoding, arXiv 2412.17153; VAR, arXiv 2404.02905).

Shapes: B batch, L positions, C width, V codebook entries, Cv code width, S positions before the split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
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
from ddexport.families._explicit_cache import ExplicitCache
from ddexport.families._var_blocks import (
    Block,
    Conditioning,
    ConditioningTable,
    LayerCache,
    NoiseDataRows,
    NoiseDataTable,
    layer_norm,
)
from ddexport.families._var_tokenizer import MultiScaleTokenizer
from ddexport.families._vq_codec import codec_of_recipe

if TYPE_CHECKING:
    from ddexport.recipe import Recipe


FIRST_GROUP = 100
"""Scales that end by this position attend together: their own products would be too small to save time."""


@dataclass(frozen=True)
class VarGeometry:
    """Sizes of a VAR transformer: `scales` are the side lengths of the token maps, without the class
    position."""

    depth: int
    width: int
    heads: int
    scales: tuple[int, ...]
    classes: int
    codebook: int
    code_width: int
    split: int

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def starts(self) -> list[int]:
        """Where the scales start, and the length."""
        return [0, *np.cumsum([s * s for s in self.scales]).tolist()]

    @property
    def length(self) -> int:
        return self.starts[-1]


def levels_of(scales: tuple[int, ...]) -> np.ndarray:
    """The scale of each position: [L] int64."""
    return np.repeat(np.arange(len(scales)), [s * s for s in scales])


def additive_mask(allowed: np.ndarray) -> Tensor:
    """Boolean [N, N] (query, key) -> float32 with 0 where allowed and -inf elsewhere."""
    return torch.from_numpy(np.where(allowed, np.float32(0), np.float32(-np.inf)))


class VarStudent(Student):
    """From noise (or noise behind known data) to the whole token sequence in one pass."""

    mask: Tensor
    levels: Tensor

    def __init__(self, geometry: VarGeometry) -> None:
        super().__init__()
        C, depth, L = geometry.width, geometry.depth, geometry.length
        self.geometry = geometry
        self.token_embedding = nn.Linear(geometry.code_width, C)
        self.start = nn.Parameter(torch.zeros(1, 1, C))
        self.positions = nn.Parameter(torch.zeros(1, L + 1, C))
        self.level_embedding = nn.Embedding(len(geometry.scales) + 1, C)
        self.conditioning: nn.Module = Conditioning(geometry.classes, C, depth)
        self.noise_or_data: nn.Module = NoiseDataRows(C, depth)
        self.blocks = nn.ModuleList(Block(C, geometry.heads) for _ in range(depth))
        self.logits_head = nn.Linear(C, geometry.codebook)
        self.embedding_modulation = nn.Parameter(torch.zeros(2, C))  # shift, scale
        self.embedding_head = nn.Linear(C, geometry.code_width)
        self.register_buffer(
            "codebook", torch.zeros(geometry.codebook, geometry.code_width), persistent=False
        )
        levels = np.concatenate([[0], 1 + levels_of(geometry.scales)])
        # A position sees the positions of strictly earlier levels, and itself: not the others of its own
        # scale.
        allowed = (levels[None, :] < levels[:, None]) | np.eye(L + 1, dtype=bool)
        self.register_buffer("levels", torch.from_numpy(levels), persistent=False)
        self.register_buffer("mask", additive_mask(allowed), persistent=False)

    def forward(self, tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, L, Cv], label [B], known [B] -> sequence [B, L, Cv], tokens [B, S], logits [B, S, V]."""
        S = self.geometry.split
        hidden, embedding, modulation = self.trunk(tokens, label, known)
        logits = self.logits(hidden[:, :S], modulation)
        embeddings = self.embeddings(hidden[:, S:], embedding)
        return compose(tokens, logits, embeddings, self.codebook, known)

    def heads(self, tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Both heads at every position: logits [B, L, V], embeddings [B, L, Cv]."""
        hidden, embedding, modulation = self.trunk(tokens, label, known)
        return self.logits(hidden, modulation), self.embeddings(hidden, embedding)

    def trunk(self, tokens: Tensor, label: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What both heads start from [B, L, C], class embedding [B, C], the logits' modulation [B, 2, C]."""
        embedding, modulations, head = self.conditioning(label)
        rows = self.noise_or_data()
        # The class position is one more known position in front.
        is_data = (torch.arange(tokens.shape[1] + 1, device=tokens.device) <= known[:, None])[:, :, None]
        x = torch.cat([embedding[:, None] + self.start, self.token_embedding(tokens)], dim=1)
        x = x + (self.level_embedding(self.levels) + self.positions)
        x = x + torch.where(is_data, rows[0][1], rows[0][0])
        for block, modulation, row in zip(self.blocks, modulations, rows[1:-1], strict=True):
            x = block(x, modulation, self.mask, torch.where(is_data, row[1], row[0]))
        x = x + torch.where(is_data, rows[-1][1], rows[-1][0])
        return layer_norm(x[:, 1:]), embedding, head

    def logits(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        return self.logits_head(hidden * (1 + scale) + shift)

    def embeddings(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (self.embedding_modulation + embedding[:, None]).chunk(2, dim=1)
        return self.embedding_head(hidden * (1 + scale) + shift)

    def tabulate(self) -> None:
        if isinstance(self.conditioning, Conditioning):
            self.conditioning = ConditioningTable(self.conditioning)
        if isinstance(self.noise_or_data, NoiseDataRows):
            self.noise_or_data = NoiseDataTable(self.noise_or_data)

    def attend_in_groups(self, first: int = FIRST_GROUP) -> None:
        """Large scales attend by themselves, to earlier positions and each position to itself; the mask keeps
        the part that is left. Scales that end by position `first` stay together."""
        starts = [0, *(1 + start for start in self.geometry.starts)]  # the class position in front
        merged = max(start for start in starts if start <= max(first, 1))
        groups = (0, *(start for start in starts if start >= merged))
        if len(groups) == 2:
            return
        for block in self.blocks:
            block.attention.groups = groups  # type: ignore[union-attr,assignment]
        self.mask = self.mask[:merged, :merged].contiguous()


class FeatureReader(nn.Module):
    """What the VAR teacher reads at positions: the latent of all earlier scales, downsampled to theirs.

    The features of every scale are computed, whichever are asked for: as much as the transformer's work for a
    twentieth of one position.
    """

    def __init__(self, tokenizer: MultiScaleTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer.without_codec()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # [B, L], [n] -> [B, n, Cv]
        return self.tokenizer.teacher_features(self.tokenizer.embed(tokens)).index_select(1, positions)


class VarTeacher(Teacher):
    """The auto-regressive model: scale by scale, each from the accumulated latent of the scales before."""

    family = "var_dd"
    guidance = "rising"
    mask: Tensor
    levels: Tensor

    def __init__(self, geometry: VarGeometry) -> None:
        super().__init__()
        C, depth = geometry.width, geometry.depth
        self.geometry = geometry
        self.token_embedding = nn.Linear(geometry.code_width, C)
        self.start = nn.Parameter(torch.zeros(1, 1, C))
        self.positions = nn.Parameter(torch.zeros(1, geometry.length, C))
        self.level_embedding = nn.Embedding(len(geometry.scales), C)
        self.conditioning: nn.Module = Conditioning(geometry.classes, C, depth)
        self.blocks = nn.ModuleList(Block(C, geometry.heads) for _ in range(depth))
        self.logits_head = nn.Linear(C, geometry.codebook)
        levels = levels_of(geometry.scales)
        self.register_buffer("levels", torch.from_numpy(levels), persistent=False)
        self.register_buffer("mask", additive_mask(levels[None, :] <= levels[:, None]), persistent=False)

    def forward(self, features: Tensor, label: Tensor) -> Tensor:
        """All scales at once, for training: features [B, L, Cv], label [B] -> logits [B, L, V].

        `features` is `MultiScaleTokenizer.teacher_features`; its first position is not read.
        """
        every = torch.arange(features.shape[1], device=features.device)
        return self._run(features, label, every, self.mask, [None] * len(self.blocks))

    def step(self, features: Tensor, label: Tensor, start: int, cache: list[LayerCache]) -> Tensor:
        """The n positions from `start` on, behind what `cache` holds: features [B, n, Cv] -> logits [B, n,
        V].

        All n positions see each other, as the published sampler has it; give one scale at a time for the
        trained model.
        """
        positions = torch.arange(start, start + features.shape[1], device=features.device)
        return self._run(features, label, positions, None, cache)

    def reader(self, tokenizer: nn.Module) -> FeatureReader:
        assert isinstance(tokenizer, MultiScaleTokenizer)
        return FeatureReader(tokenizer)

    def extend(
        self, inputs: Tensor, label: Tensor, positions: Tensor, past: Sequence[ExplicitCache]
    ) -> Tensor:
        """All new positions see each other, as in `step`."""
        return self._run(inputs, label, positions, None, past)

    def tabulate(self) -> None:
        if isinstance(self.conditioning, Conditioning):
            self.conditioning = ConditioningTable(self.conditioning)

    def new_cache(self) -> list[LayerCache]:
        return [LayerCache() for _ in self.blocks]

    def _run(
        self,
        features: Tensor,
        label: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: Sequence[LayerCache | ExplicitCache | None],
    ) -> Tensor:
        embedding, modulations, head = self.conditioning(label)
        is_first = (positions == 0)[:, None]
        x = torch.where(is_first, embedding[:, None] + self.start, self.token_embedding(features))
        x = x + (self.level_embedding(self.levels) + self.positions).index_select(1, positions)
        for block, modulation, layer in zip(self.blocks, modulations, cache, strict=True):
            x = block(x, modulation, mask, None, layer)
        scale, shift = head.chunk(2, dim=1)
        return self.logits_head(layer_norm(x) * (1 + scale) + shift)


def guided(logits: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: [2B, n, V], conditional rows before unconditional ones -> [B, n, V]."""
    conditional, unconditional = logits.chunk(2)
    return (1 + guidance_scale) * conditional - guidance_scale * unconditional


class VarFamily(Family):
    """Reads recipes whose `model` has depth, width, heads and scales."""

    def geometry(self, recipe: Recipe) -> VarGeometry:
        """Raises `GeometryError` if the keys are not these or do not fit the sequence."""
        missing = {"depth", "width", "heads", "scales"} ^ set(recipe.model)
        if missing:
            raise GeometryError(
                f"recipe {recipe.name}: model has wrong or missing keys: {', '.join(sorted(missing))}",
                "family var_dd needs exactly depth, width, heads and scales",
            )
        sequence, scales = recipe.sequence, recipe.model["scales"]
        if not isinstance(scales, list) or len(scales) < 2:
            raise GeometryError(
                f"recipe {recipe.name}: model.scales is {scales!r}, not a list of two side lengths or more",
                "such as scales: [1, 2, 3, 4]",
            )
        sizes: dict[str, Any] = {**recipe.model, "scales": tuple(scales)}
        geometry = VarGeometry(
            **sizes,
            classes=recipe.classes,
            codebook=sequence.codebook,
            code_width=sequence.width,
            split=sequence.split,
        )
        if geometry.length != sequence.length or geometry.width % geometry.heads:
            raise GeometryError(
                f"recipe {recipe.name}: scales {list(scales)} make {geometry.length} positions,"
                f" sequence.length is {sequence.length}; width {geometry.width}, heads {geometry.heads}",
                "the squares of the scales sum to the length, and the heads divide the width",
            )
        schedules = recipe.schedules.values()
        borders = [
            *(("split", split) for split in (sequence.split, *(s.split for s in schedules)) if split),
            *(("known", k) for s in schedules for k in s.known),
        ]
        for what, position in borders:
            if position not in geometry.starts:
                raise GeometryError(
                    f"recipe {recipe.name}: {what} {position} is not the end of a scale",
                    f"scales end at {geometry.starts[1:]}",
                )
        check_steps(recipe, geometry.starts)
        return geometry

    def _build(self, recipe: Recipe, role: str) -> nn.Module:
        geometry = self.geometry(recipe)
        if role == "student":
            return VarStudent(geometry).eval()
        if role == "teacher":
            return VarTeacher(geometry).eval()
        codec = codec_of_recipe(recipe, geometry.scales[-1], latent_channels=geometry.code_width)
        return MultiScaleTokenizer(codec, geometry.codebook, geometry.scales).eval()

    def _layout(self, recipe: Recipe, role: str) -> Layout:
        if role == "tokenizer":
            multipliers = recipe.tokenizer["multipliers"]
            assert isinstance(multipliers, list)  # `build` has seen to it
            coarsest = len(multipliers) - 1
            return Layout(
                published=lambda key: (_published_tokenizer_key(key, coarsest),),
                recomputable={r"quantize\.ema_vocab_hit_SV": lambda _: True},  # a training statistic
            )
        with torch.device("meta"):  # but for its levels [N] and its mask [N, N]
            module: Any = self.build(recipe, role)
        return Layout(
            published=lambda key: (renamed(key, TRANSFORMER_KEYS),),
            recomputable={
                r"lvl_1L": lambda t: torch.equal(t.view(-1), module.levels.float()),
                r"attn_bias_for_masking": lambda t: torch.equal(t.view(module.mask.shape), module.mask),
                r"blocks\.\d+\.attn\.zero_k_bias": lambda t: not t.any(),
            },
        )


FAMILY = VarFamily

TRANSFORMER_KEYS = (
    (r"^start$", "pos_start"),
    (r"^positions$", "pos_1LC"),
    (r"^token_embedding\.", "word_embed."),
    (r"^level_embedding\.", "lvl_embed."),
    (r"^conditioning\.embedding\.", "class_emb."),
    (r"^conditioning\.blocks\.(\d+)\.", r"blocks.\1.ada_lin.1."),
    (r"^conditioning\.head\.", "head_nm.ada_lin.1."),
    (r"^noise_or_data\.embedding\.", "n_d_embed."),
    (r"^noise_or_data\.projections\.", "layerwise_n_d_embed."),
    (r"\.attention\.log_scale$", ".attn.scale_mul_1H11"),
    (r"\.attention\.qkv\.", ".attn.mat_qkv."),
    (r"\.attention\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"^logits_head\.", "head."),
    (r"^embedding_modulation$", "final_layer_conti.scale_shift_table"),
    (r"^embedding_head\.", "final_layer_conti.linear."),
)

TOKENIZER_KEYS = (
    (r"^phis\.(\d+)\.conv\.", r"quantize.quant_resi.qresi_ls.\1."),
    (r"^embedding\.", "quantize.embedding."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^(encoder\.down\.\d+)\.resample\.", r"\1.downsample."),
    (r"^(decoder\.levels\.\d+)\.resample\.", r"\1.upsample."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"(attn\S*)\.proj\.", r"\1.proj_out."),
)


def _published_tokenizer_key(key: str, coarsest: int) -> str:
    # Published decoders number their levels from the finest, ours in the order of computation.
    return re.sub(
        r"^decoder\.levels\.(\d+)\.",
        lambda m: f"decoder.up.{coarsest - int(m[1])}.",
        renamed(key, TOKENIZER_KEYS),
    )
