"""The convolutional encoder and decoder of VQGAN and latent diffusion, which both families' tokenizers use.

Facts: "Taming Transformers" (arXiv 2012.09841), appendix; VAR and LlamaGen keep the design with a
downsampling of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

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
        return 1 << (len(self.multipliers) - 1)


def codec_of_recipe(recipe: Recipe, latent_side: int, **sizes: Any) -> CodecGeometry:
    """The geometry that the recipe's `tokenizer` section gives, `sizes` being those its family knows from
    elsewhere.

    Raises:
        GeometryError: a key is unknown, missing or given twice, or the decoder does not end at the image
            size.
    """
    options: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in recipe.tokenizer.items()
    }
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


class ChannelNorm(nn.Module):
    """`nn.GroupNorm` as one product and one sum a channel: x * a + b.

    The map keeps its shape, so that engines keep it in the layout that their convolutions want; a group norm
    of three axes has it reordered twice. Mean and spread are two passes: a mean of squares less the square of
    the mean would cancel. The weights are shared with the norm it is made from.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        B, C = x.shape[:2]
        grouped = (B, self.groups, C // self.groups)
        mean = x.mean((2, 3)).view(grouped).mean(2, keepdim=True)  # [B, groups, 1]
        centred = x - mean.expand(grouped).reshape(B, C, 1, 1)
        spread = (centred * centred).mean((2, 3)).view(grouped).mean(2, keepdim=True)
        a = torch.rsqrt(spread + self.eps) * self.weight.view(grouped[1:])
        b = self.bias.view(grouped[1:]) - mean * a
        return x * a.view(B, C, 1, 1) + b.view(B, C, 1, 1)


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


class TransposedUpsample(nn.Module):
    """`Upsample` as one transposed convolution: 4 x 4 products for four output pixels in place of 4 x 9.

    Each output pixel sees two rows and two columns of the map before doubling; the weights of the taps that
    fall on the same pixel are summed, in float64, and rounded once. The border is zero in both.
    """

    def __init__(self, source: Upsample) -> None:
        super().__init__()
        weight = source.conv.weight.detach().double()  # [outputs, inputs, 3, 3]
        C = source.conv.in_channels
        summed = weight.new_zeros((*weight.shape[:2], 4, 4))
        # Output 2i + e reads doubled pixel 2i + e + k - 1 with tap k: it adds to tap 2 - k + e of the other.
        for row, column, down, right in product(range(3), range(3), range(2), range(2)):
            summed[:, :, 2 - row + down, 2 - column + right] += weight[:, :, row, column]
        with torch.device("meta"):
            self.conv = nn.ConvTranspose2d(C, C, 4, stride=2, padding=1)
        folded = summed.transpose(0, 1).to(source.conv.weight.dtype).contiguous()
        self.conv.weight = nn.Parameter(folded, requires_grad=False)
        self.conv.bias = source.conv.bias
        self.conv.eval()

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, 2H, 2W]
        return self.conv(x)


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

    def fold_upsampling(self) -> None:
        """Replaces, in place, each doubling with its convolution by one transposed convolution. Images stay
        equal."""
        for level in self.levels:
            if isinstance(level.resample, Upsample):
                level.resample = TransposedUpsample(level.resample)

    def norm_by_channel(self) -> None:
        """Replaces, in place, each group norm by one product and one sum a channel. Images stay equal."""
        for module in list(self.modules()):
            for name, norm in list(module.named_children()):
                if isinstance(norm, nn.GroupNorm):
                    setattr(module, name, ChannelNorm(norm))
