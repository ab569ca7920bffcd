"""The Inception network of 2015-12-05, which FID is defined by, as pytorch-fid and torch-fidelity run it.

It is not torchvision's: average pooling does not count the padding, the last block pools by maximum
(Mixed_7c; Mixed_7b by average), and there are 1008 classes. Modules carry the published names, so that the
published file is its state dict. Sources: Szegedy et al., arXiv 1512.00567; mseitzer/pytorch-fid 0.3.0 and
toshas/torch-fidelity 0.4.0, which agree in the network and differ in how an image is prepared.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, CLASSES, SIDE = 2048, 1008, 299

Pool = Literal["average", "maximum", "halving"]


@dataclass(frozen=True)
class Conv:
    """A convolution by its published name; stride 1 pads to the same size, stride 2 does not pad."""

    name: str
    out: int
    kernel: tuple[int, int]
    stride: int = 1


# A branch is a chain; a tuple at its end is a fork whose arms are concatenated.
Branch: TypeAlias = list[Conv | tuple[Conv, Conv]]


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, width: int, out: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, width, H, W) -> (N, out, H', W')."""
        return functional.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of parallel branches, the last of which is a pooling of the input."""

    def __init__(self, width: int, branches: list[Branch], pool: Pool, pool_out: int = 0) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            arm_width = width
            for link in branch:
                for conv in link if isinstance(link, tuple) else (link,):
                    self.add_module(conv.name, _conv_norm(arm_width, conv))
                    out = conv.out
                arm_width = out
        if pool != "halving":
            self.branch_pool = _conv_norm(width, Conv("branch_pool", pool_out, (1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, width, H, W) -> (N, sum of the branches' widths, H', W')."""
        return torch.cat([*(self._run(branch, x) for branch in self.branches), self._pooled(x)], 1)

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        for link in branch:
            arms = link if isinstance(link, tuple) else (link,)
            x = torch.cat([self.get_submodule(conv.name)(x) for conv in arms], 1)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "halving":
            return functional.max_pool2d(x, 3, 2)
        if self.pool == "maximum":
            return self.branch_pool(functional.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


class FidInception(nn.Module):
    """Images of 299 x 299 in [-1, 1] -> pool3 features and the 1008 logits without their bias."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in _body().items():
            self.add_module(name, module)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (N, 3, 299, 299) -> (N, 2048), (N, 1008)."""
        x = images
        for name, module in self.named_children():
            if name == "fc":
                break
            x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = functional.max_pool2d(x, 3, 2)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def prepare_half_pixel(images: Tensor) -> Tensor:
    """As pytorch-fid does: images (N, 3, H, W) of 0..255 -> (N, 3, 299, 299), v / 127.5 - 1.

    Pixels are squares whose centres lie at half integers: output i reads the input at (i + 0.5) s - 0.5. No
    smoothing when an image is made smaller.
    """
    resized = functional.interpolate(images / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def prepare_tf1(images: Tensor) -> Tensor:
    """As the original graph and torch-fidelity do: images (N, 3, H, W) of 0..255 -> (N, 3, 299, 299),
    (v - 128) / 128.

    TensorFlow 1's rule: output i reads the input at i s, so that everything lies up to half a pixel further
    to the lower right than by the rule of half integers.
    """
    resized = _resized_tf1(_resized_tf1(images, 2), 3)
    return (resized - 128) / 128


def _resized_tf1(x: Tensor, dimension: int) -> Tensor:
    size = x.shape[dimension]
    position = torch.arange(SIDE, dtype=torch.float32, device=x.device) * (size / SIDE)
    low = position.long().clamp(max=size - 1)
    share = (position - low).view(-1, *[1] * (3 - dimension))
    a = x.index_select(dimension, low)
    return a + (x.index_select(dimension, (low + 1).clamp(max=size - 1)) - a) * share


def _conv_norm(width: int, conv: Conv) -> ConvNorm:
    padding = (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.stride == 1 else (0, 0)
    return ConvNorm(width, conv.out, conv.kernel, conv.stride, padding)


def _body() -> OrderedDict[str, nn.Module]:
    """Everything between image and pool3 but the two poolings of the stem, which have no weights."""
    return OrderedDict(
        Conv2d_1a_3x3=ConvNorm(3, 32, (3, 3), 2, (0, 0)),
        Conv2d_2a_3x3=ConvNorm(32, 32, (3, 3), 1, (0, 0)),
        Conv2d_2b_3x3=ConvNorm(32, 64, (3, 3), 1, (1, 1)),
        Conv2d_3b_1x1=ConvNorm(64, 80, (1, 1), 1, (0, 0)),
        Conv2d_4a_3x3=ConvNorm(80, 192, (3, 3), 1, (0, 0)),
        Mixed_5b=_block_35(192, 32),
        Mixed_5c=_block_35(256, 64),
        Mixed_5d=_block_35(288, 64),
        Mixed_6a=_to_17(288),
        Mixed_6b=_block_17(128),
        Mixed_6c=_block_17(160),
        Mixed_6d=_block_17(160),
        Mixed_6e=_block_17(192),
        Mixed_7a=_to_8(768),
        Mixed_7b=_block_8(1280, "average"),
        Mixed_7c=_block_8(2048, "maximum"),
    )


def _chain(prefix: str, *convs: tuple[int, int, int]) -> list[Conv]:
    """Convolutions `prefix`_1, `prefix`_2, ... of (out, height, width)."""
    return [Conv(f"{prefix}_{i}", out, (h, w)) for i, (out, h, w) in enumerate(convs, 1)]


def _block_35(width: int, pool_out: int) -> Mixed:
    branches: list[Branch] = [
        [Conv("branch1x1", 64, (1, 1))],
        [*_chain("branch5x5", (48, 1, 1), (64, 5, 5))],
        [*_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))],
    ]
    return Mixed(width, branches, "average", pool_out)


def _to_17(width: int) -> Mixed:
    branches: list[Branch] = [
        [Conv("branch3x3", 384, (3, 3), 2)],
        [*_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), 2)],
    ]
    return Mixed(width, branches, "halving")


def _block_17(inner: int) -> Mixed:
    long = ((inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
    branches: list[Branch] = [
        [Conv("branch1x1", 192, (1, 1))],
        [*_chain("branch7x7", (inner, 1, 1), (inner, 1, 7), (192, 7, 1))],
        [*_chain("branch7x7dbl", *long)],
    ]
    return Mixed(768, branches, "average", 192)


def _to_8(width: int) -> Mixed:
    branches: list[Branch] = [
        [Conv("branch3x3_1", 192, (1, 1)), Conv("branch3x3_2", 320, (3, 3), 2)],
        [
            *_chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2),
        ],
    ]
    return Mixed(width, branches, "halving")


def _block_8(width: int, pool: Pool) -> Mixed:
    def fork(name: str) -> tuple[Conv, Conv]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    branches: list[Branch] = [
        [Conv("branch1x1", 320, (1, 1))],
        [Conv("branch3x3_1", 384, (1, 1)), fork("branch3x3_2")],
        [*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), fork("branch3x3dbl_3")],
    ]
    return Mixed(width, branches, pool, 192)
