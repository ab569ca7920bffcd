"""LlamaGen and its distilled students: how recipes and published files spell them (arXiv 2406.06525)."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddexport.families._base import Family, GeometryError, Layout, check_steps, renamed
from ddexport.families._llamagen_blocks import halves_from_pairs, rotary_table
from ddexport.families._llamagen_models import LlamaGenGeometry, LlamaGenStudent, LlamaGenTeacher
from ddexport.families._llamagen_text import TextSize
from ddexport.families._llamagen_text_models import LlamaGenTextStudent, LlamaGenTextTeacher
from ddexport.families._llamagen_tokenizer import RasterTokenizer
from ddexport.families._vq_codec import codec_of_recipe

if TYPE_CHECKING:
    from ddexport.recipe import Recipe


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
            if geometry.text:  # its first token always comes from the last row
                geometry = replace(geometry, text=replace(geometry.text, vector="last"))
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
