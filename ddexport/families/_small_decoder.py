"""A decoder with a fraction of the operations of a tokenizer's own (docs/small-decoders.md).

The form is that of TAESD (https://github.com/madebyollin/taesd): 3x3 convolutions, ReLU and residual blocks,
no norms, no attention. The channels are spent where the map is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.families._base import GeometryError

if TYPE_CHECKING:
    from ddexport.recipe import Recipe

LIMIT = 3.0  # a latent is bent to lie within it: no outlier is larger than what was trained on
PATCH = 2  # the side of the square of pixels that one place of the last map becomes


class SmallBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if not self.conv2.weight.is_meta:
            nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:  # [B, width, H, W]
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class SmallDecoder(nn.Module):
    """Sequences to images, as the tokenizer's `forward`.

    Args:
        code_width: Cv.
        widths, blocks: at each side, the latent's first; the map is doubled between two.
        channels: of the image.
    """

    reader: Any  # the tokenizer without its codec, from `connect`: how a sequence becomes a latent

    def __init__(self, code_width: int, widths: Sequence[int], blocks: Sequence[int], channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(code_width, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(SmallBlock(width) for _ in range(count)))
            for width, count in zip(widths, blocks, strict=True)
        )
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairwise(widths))
        self.conv_out = nn.Conv2d(widths[-1], channels * PATCH**2, 3, padding=1)

    def forward(self, sequence: Tensor) -> Tensor:
        """sequence [B, L, Cv] -> images [B, C, H, W] in [0, 1]."""
        return (self.pixels(self.reader.latent(sequence)).clamp(-1, 1) + 1) / 2

    def pixels(self, latent: Tensor) -> Tensor:
        """latent [B, Cv, h, w] -> images [B, C, H, W], not yet cut to [-1, 1]."""
        x = self.levels[0](self.conv_in(torch.tanh(latent / LIMIT) * LIMIT))
        for narrow, level in zip(self.narrow, list(self.levels)[1:], strict=True):
            # The 1x1 convolution comes before the doubling, where it has a quarter of the operations.
            x = level(F.interpolate(narrow(x), scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.conv_out(F.relu(x)), PATCH)


def small_decoder(recipe: Recipe, role: str) -> SmallDecoder:
    """The module of `decoder_NAME`. Raises GeometryError where the recipe has none, or it does not fit."""
    name = role.removeprefix("decoder_")
    if name not in recipe.decoders:
        have = ", ".join(recipe.decoders) or "none"
        raise GeometryError(f"recipe {recipe.name} has no decoder {name}", f"it has: {have}")
    size, multipliers = recipe.decoders[name], recipe.tokenizer["multipliers"]
    levels = len(multipliers) - 1 if isinstance(multipliers, list) else 0  # of factors of two
    if not len(size.widths) == len(size.blocks) == levels:
        raise GeometryError(
            f"recipe {recipe.name}: decoders.{name}: widths and blocks must have {levels} numbers each",
            f"one for each side from the latent's to {recipe.image.size // PATCH}",
        )
    decoder = SmallDecoder(recipe.sequence.width, size.widths, size.blocks, recipe.image.channels)
    decoder.eval()
    return decoder
