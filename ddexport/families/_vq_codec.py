"""The convolutional encoder and decoder of VQGAN and latent diffusion, which both families' tokenizers use.

Facts: "Taming Transformers" (arXiv 2012.09841), appendix; VAR and LlamaGen keep the design with a
downsampling of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddexport.families._base import GeometryError

if TYPE_CHECKING:
    from ddexport.recipe import Recipe


@dataclass(frozen=True)
class CodecGeometry:
    """Sizes of encoder and decoder. Level i of n has `channels * multipliers[i]` channels; level n-1 is the
    coarsest."""

    channels: int
    multipliers: tuple[int, ...]
    encoder_multipliers: tuple[int, ...]
    latent_channels: int
    residual_blocks: int = 2
    image_channels: int = 3

    @property
    def downsampling(self) -> int:
        """Image side over latent side."""
        return 2 ** (len(self.multipliers) - 1)


def codec_of_recipe(recipe: Recipe, latent_side: int, **sizes: int) -> CodecGeometry:
    """The geometry that the recipe's `tokenizer` section gives, `sizes` being those its family knows from
    elsewhere.

    Raises:
        GeometryError: a key is unknown, missing or given twice, or the decoder does not end at the image
            size.
    """
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in recipe.tokenizer.items()}
    try:
        options.setdefault("encoder_multipliers", options["multipliers"])
        codec = CodecGeometry(image_channels=recipe.image.channels, **sizes, **options)
    except (TypeError, KeyError) as error:
        raise GeometryError(
            f"recipe {recipe.name}: tokenizer: {error}", f"see a recipe of family {recipe.family} in recipes/"
        ) from error
    side = latent_side * codec.downsampling
    if side != recipe.image.size:
        raise GeometryError(
            f"recipe {recipe.name}: the decoder makes images of side {side}, not {recipe.image.size}",
            "latent side times 2^(levels - 1) is the image size",
        )
    return codec


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution where the number of channels
    changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # [B, inputs, H, W] -> [B, outputs, H, W]
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over all pixels of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3 * C, H * W).chunk(3, dim=1)
        weights = torch.softmax(q.transpose(1, 2) @ k * C**-0.5, dim=-1)  # [B, HW, HW]
        return x + self.proj((v @ weights.transpose(1, 2)).reshape(B, C, H, W))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 2H, 2W]
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    """Convolution with stride 2, padded by one pixel right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H/2, W/2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked for, then the
    resampling."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, resample: nn.Module) -> None:
        super().__init__()
        widths = [inputs, *([outputs] * blocks)]
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(SpatialAttention(outputs) for _ in range(blocks if attention else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return self.resample(x)


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels), SpatialAttention(channels), ResidualBlock(channels, channels)
    )


class Encoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> features [B, latent_channels, H/f, W/f]. Level 0 is the finest."""

    def __init__(self, geometry: CodecGeometry) -> None:
        super().__init__()
        widths = [geometry.channels * m for m in geometry.encoder_multipliers]
        self.conv_in = nn.Conv2d(geometry.image_channels, geometry.channels, 3, padding=1)
        last = len(widths) - 1
        self.levels = nn.ModuleList(
            Level(a, b, geometry.residual_blocks, i == last, Downsample(b) if i < last else nn.Identity())
            for i, (a, b) in enumerate(pairwise([geometry.channels, *widths]))
        )
        self.mid = middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], geometry.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features [B, latent_channels, h, w] -> images [B, 3, h f, w f], unclamped. Level 0 is the coarsest."""

    def __init__(self, geometry: CodecGeometry) -> None:
        super().__init__()
        widths = [geometry.channels * m for m in reversed(geometry.multipliers)]
        self.conv_in = nn.Conv2d(geometry.latent_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        last = len(widths) - 1
        self.levels = nn.ModuleList(
            Level(a, b, geometry.residual_blocks + 1, i == 0, Upsample(b) if i < last else nn.Identity())
            for i, (a, b) in enumerate(pairwise([widths[0], *widths]))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], geometry.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
